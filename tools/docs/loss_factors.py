"""The table of factors in softcache/docs/LOSSES.md: what other frameworks give under a loss's name, over what softcache gives.

    python tools/docs/loss_factors.py             # prints it
    python tools/docs/loss_factors.py --write     # puts it into the page
    python tools/docs/loss_factors.py --quick     # prints its first two lines

Every line is computed on DRAWS, in float64, with the formulas of `other_losses.py`: a constant is checked on each draw, and
where there is none the smallest and the largest ratio are shown. tests/losses/test_factors.py does the same, and compares the
page.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from docs import other_losses as other
from docs.loss_values import PAGE, between
from softcache.features.spec import REDUCTIONS
from softcache.losses import LOSSES, Crd, kd
from softcache.losses.review_kd import hierarchical_context

BEGIN, END = "<!-- factors: begin -->\n", "<!-- factors: end -->\n"  # of what this tool writes into the page
T, WIDTH, CHANNELS, NEGATIVES = 4.0, 12, (8, 16), 8
NONE = "no constant"
HEAD = """\
| loss | whose | there | theirs / ours | published weight |
|---|---|---|---|---|"""


@dataclass(frozen=True)
class Draw:
    """Random inputs: teachers, and students that are `share` teacher and for the rest noise.

    Attributes:
        batch, classes: B and C.
        share: 0 unrelated, near 1 close.
        seed: of the numbers.
    """

    batch: int
    classes: int
    share: float
    seed: int

    def pair(self, which: int, make: Callable[[np.random.Generator], np.ndarray]) -> tuple[Tensor, Tensor]:
        """A student's and a teacher's, of one shape."""
        rng = np.random.default_rng([self.seed, self.batch, which])
        teacher, noise = make(rng), make(rng)
        student = self.share * teacher + math.sqrt(1 - self.share**2) * noise
        return torch.from_numpy(student).requires_grad_(), torch.from_numpy(teacher)

    @cached_property
    def logits(self) -> tuple[Tensor, Tensor]:
        return self.pair(0, lambda rng: 3 * rng.standard_normal((self.batch, self.classes)))

    @cached_property
    def members(self) -> list[Tensor]:
        return [
            self.pair(which, lambda rng: 3 * rng.standard_normal((self.batch, self.classes)))[1] for which in (1, 2, 3)
        ]

    @cached_property
    def labels(self) -> Tensor:
        """Half of them the teacher's first class."""
        first, row = self.logits[1].argmax(dim=1), torch.arange(self.batch)
        return torch.where(row % 2 == 0, first, (first + 1 + row) % self.classes)

    @cached_property
    def vectors(self) -> tuple[Tensor, Tensor]:
        return self.pair(4, lambda rng: rng.standard_normal((self.batch, WIDTH)) + 0.5)

    @cached_property
    def classifier(self) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng(self.seed)
        weight, bias = rng.standard_normal((self.classes, WIDTH)), rng.standard_normal(self.classes)
        return torch.from_numpy(weight), torch.from_numpy(bias)

    def map(self, which: int) -> tuple[Tensor, Tensor]:
        """Early (16 x 16) or late (8 x 8), not negative: a channel's number times a position's, and half one of its own."""
        side, channels = 16 // (which + 1), CHANNELS[which]

        def make(rng: np.random.Generator) -> np.ndarray:
            structure = rng.standard_normal((self.batch, channels, 1, 1)) * rng.standard_normal(
                (self.batch, 1, side, side)
            )
            return np.maximum(structure + 0.5 * rng.standard_normal((self.batch, channels, side, side)), 0)

        return self.pair(5 + which, make)

    @cached_property
    def maps(self) -> tuple[list[Tensor], list[Tensor]]:
        """The student's two, and the teacher's."""
        (own_early, early), (own_late, late) = self.map(0), self.map(1)
        return [own_early, own_late], [early, late]

    @cached_property
    def late(self) -> tuple[Tensor, Tensor]:
        return self.maps[0][1], self.maps[1][1]

    @cached_property
    def scores(self) -> tuple[Crd, Tensor]:
        """CRD with its banks, and the (2, B, 1 + K) scores of both directions."""
        samples, width = 3 * self.batch, 6
        sizes: dict[str, Any] = {
            "student_shape": (WIDTH,),
            "teacher_shape": (WIDTH,),
            "num_samples": samples,
            "seed": self.seed,
        }
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            crd = Crd(**sizes, sample_labels=torch.arange(samples) % 3, negatives=NEGATIVES, width=width).double()
        rows = torch.arange(self.batch)
        places = torch.cat([rows[:, None], crd.draw(rows, rows, 1)], dim=1)
        embedded = (layer(x) for layer, x in zip((crd.embed_student, crd.embed_teacher), self.vectors, strict=True))
        banks = crd.teacher_bank[places], crd.student_bank[places]  # (B, 1 + K, width) each
        both = [(bank @ other.unit_rows(x)[:, :, None])[..., 0] for bank, x in zip(banks, embedded, strict=True)]
        return crd, torch.stack(both) / crd.nce_temperature


DRAWS = [Draw(*size, share, seed) for size in ((8, 10), (64, 100)) for share in (0.0, 0.7, 0.98) for seed in (0, 1)]


def inputs_of(name: str, draw: Draw) -> dict[str, Any]:
    """Whatever the loss asks for, its features reduced as in a run."""
    loss = LOSSES[name]
    student, teacher = draw.vectors if loss.layers == "head" else draw.late
    if loss.features[:1] == ("fsp",):
        student, teacher = (REDUCTIONS["fsp"].function(*maps) for maps in draw.maps)
    elif loss.features and loss.layers != "head":
        kinds = loss.reduction or loss.features[0], loss.features[0]
        student, teacher = (REDUCTIONS[kind].function(x) for kind, x in zip(kinds, (student, teacher), strict=True))
    known = {
        "student_logits": draw.logits[0],
        "teacher_logits": draw.logits[1],
        "labels": draw.labels,
        "student_features": student,
        "teacher_features": teacher,
        "student_maps": draw.maps[0],
        "teacher_maps": draw.maps[1],
        "classifier_weight": draw.classifier[0],
        "classifier_bias": draw.classifier[1],
    }
    return {key: known[key] for key in loss.inputs}


def own(name: str, settings: dict[str, Any], draw: Draw) -> Tensor:
    """softcache's value."""
    loss, inputs = LOSSES[name], inputs_of(name, draw)
    sizes = {"teacher_shape": draw.late[1].shape[1:]}
    made: Callable[..., Any] = loss.function
    if loss.module is not None:
        made = loss.module(**{key: sizes[key] for key in loss.sizes}).double()
    value: Tensor = made(**inputs, **settings)
    return value


def of_crd(draw: Draw) -> Tensor:
    rows = torch.arange(draw.batch)
    value: Tensor = draw.scores[0](*draw.vectors, rows, rows, 1)
    return value


def of_ensemble(draw: Draw) -> Tensor:
    """`kd` of the members' probabilities at T, averaged."""
    mean = torch.stack([other.softmax(one, T) for one in draw.members]).mean(dim=0)
    return kd(draw.logits[0], T * mean.log(), T)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        loss: in LOSSES, as it is called here.
        whose: frameworks that have this form.
        there: the form, in words.
        theirs: its value.
        factor: theirs / ours, as text; NONE where it depends on the inputs.
        constant: the same as a number, of the draw.
        weight: published for this form; "" where none is.
        settings: of the loss here.
        gradient: the factor is that of the gradients; the values differ by something that the student cannot change.
        within: relative difference that small constants in their code make.
        ours: instead of `own`.
    """

    loss: str
    whose: str
    there: str
    theirs: Callable[[Draw], Tensor]
    factor: str = "1"
    constant: Callable[[Draw], float] = lambda _: 1.0
    weight: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    gradient: bool = False
    within: float = 1e-9
    ours: Callable[[Draw], Tensor] | None = None

    def values(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """Theirs and ours, of the student's tensors with gradients."""
        mine = own(name_of(self), self.settings, draw) if self.ours is None else self.ours(draw)
        return self.theirs(draw), mine


def on_logits(formula: Callable[..., Tensor], *rest: float) -> Callable[[Draw], Tensor]:
    return lambda draw: formula(*draw.logits, *rest)


def on_labels(formula: Callable[..., Tensor]) -> Callable[[Draw], Tensor]:
    return lambda draw: formula(*draw.logits, draw.labels, T)


def on_vectors(formula: Callable[..., Tensor], *rest: float) -> Callable[[Draw], Tensor]:
    return lambda draw: formula(*draw.vectors, *rest)


def on_late(formula: Callable[..., Tensor]) -> Callable[[Draw], Tensor]:
    return lambda draw: formula(*draw.late)


def times(factor: float, formula: Callable[[Draw], Tensor]) -> Callable[[Draw], Tensor]:
    return lambda draw: factor * formula(draw)


AT_T = {"temperature": T}
BARE: dict[str, Any] = {"factor": "1 / T**2: 1/16", "constant": lambda _: 1 / T**2}  # at T = 4
OVER_CLASSES: dict[str, Any] = {"factor": "1 / C", "constant": lambda draw: 1 / draw.classes}
RKD, MMRAZOR = "RepDistiller, mdistiller", "mmrazor, with its L2 norm"
KD_LIB = "KD_Lib 0.0.32"

ROWS = [
    Row("kd", "RepDistiller, KD-Zoo, mdistiller, timm, modelopt, mmrazor, DIST, CTKD; torchdistill with a weight for hard labels",
        "T**2 KL, mean over samples", on_logits(other.softened_kl, T), weight="0.9 beside 0.1 for ce (RepDistiller)"),
    Row("kd", "DeiT; KD_Lib's SoftRandom, MessyCollab; Tf-KD's self-training, multiplier 1", "T**2 KL, mean over B x C",
        on_logits(other.elementwise_kl, T), **OVER_CLASSES),
    Row("kd", "torchdistill without a weight for hard labels, or with 0", "KL without T**2 and without its weight",
        on_logits(other.bare_kl, T), **BARE),
    Row("kd", "TRL's GKD, beta=0", "KL without T**2", on_logits(other.bare_kl, T), **BARE),
    Row("kd", "TextBrewer", "cross-entropy without T**2", on_logits(other.bare_cross_entropy, T), gradient=True, **BARE),
    Row("kd", "KD_Lib's VanillaKD", "T**2 times the mean square of the difference of probabilities",
        on_logits(other.squared_probabilities, T), NONE),
    Row("kd", "KD_Lib's TAKD", "the same of log-probabilities", on_logits(other.squared_log_probabilities, T), NONE),
    Row("kd", "KD_Lib's NoisyTeacher", "the same of the student's log-probabilities and the teacher's probabilities",
        on_logits(other.squared_mixture, T), NONE),
    Row("kd:standardized=true", "Logit Standardization's authors", "as here", on_logits(other.standardized_kl, 2.0),
        weight="9, T = 2", settings={"temperature": 2.0, "standardized": True}),
    Row("kd --combine mean_probs_at_t", "big_vision", "the sum of the M members' KL", lambda draw: other.summed_over_members(
        draw.logits[0], draw.members, T), "M", lambda draw: len(draw.members), gradient=True, ours=of_ensemble),
    Row("soft_ce", "TextBrewer", "without T**2", on_logits(other.bare_cross_entropy, T), **BARE),
    Row("reverse_kl:temperature=4", "TRL's GKD, beta=1", "without T**2", on_logits(other.bare_reverse_kl, T),
        settings=AT_T, **BARE),
    Row("jsd:temperature=4", "TRL's GKD, 0 < beta < 1", "without T**2", on_logits(other.bare_jsd, T), settings=AT_T, **BARE),
    Row("skew_kl", "DistiLLM's authors", "as here at T = 1, without the teacher's entropy",
        on_logits(other.skewed_cross_entropy, 0.1), gradient=True),
    Row("skew_reverse_kl", "DistiLLM's authors", "as here at T = 1", on_logits(other.skewed_reverse_kl, 0.1)),
    Row("tvd", "DistiLLM's authors", "as here at T = 1", on_logits(other.total_variation)),
    Row("mse_logits", "KD-Zoo; TextBrewer at T = 1", "as here", on_logits(other.squared_logits)),
    Row("mse_logits", "TextBrewer at T = 4", "of logits / T", on_logits(other.softened_squared_logits, T), **BARE),
    Row("hard", "DeiT; big_vision without smoothing", "as here", on_logits(other.first_class), weight="0.5 beside 0.5 for ce"),
    Row("ctkd", "CTKD's authors", "as here, T = 1 + 20 sigmoid", on_logits(other.softened_kl, 1 + 20 / (1 + math.exp(-1))),
        weight="0.9 beside 0.1 for ce"),
    Row("dist", "DIST's authors, mmrazor, torchdistill", "as here", on_logits(other.dist, T), weight="2 beside 1 for ce"),
    Row("batch_correlation", "MLKD's function", "as here, no T**2", on_logits(other.batch_gram, T)),
    Row("batch_correlation", "MLKD's training, also in Logit Standardization",
        "times the share of rows below a median; weak view", on_logits(
        other.masked_batch_gram, T), "1/2", lambda _: 0.5, "0.9 at each T of 2, 3, 4, 5, 6"),
    Row("class_correlation", "MLKD's function", "as here, no T**2", on_logits(other.class_gram, T)),
    Row("class_correlation", "MLKD's training, also in Logit Standardization", "times the share of classes below a median; "
        "weak view", on_logits(other.masked_class_gram, T), "1/2", lambda _: 0.5, "0.9 at each T of 2, 3, 4, 5, 6"),
    Row("dkd", "its authors (mdistiller), Logit Standardization, mmrazor", "as here", on_labels(other.decoupled),
        weight="1, warmed up; alpha and beta by pair"),
    Row("dkd", "mmrazor's configuration, reduction='mean'", "summed over the batch", on_labels(other.summed_decoupled), "B",
        lambda draw: draw.batch),
    Row("wsld", "its authors, mmrazor", "as here", on_labels(other.weighted_soft_labels),
        weight="2.5, T = 2 (ImageNet); 2.25, T = 4 (CIFAR)"),
    Row("shifted_kd", "TextBrewer", "cross-entropy without T**2", on_labels(other.bare_shifted_cross_entropy), gradient=True,
        **BARE),
    Row("shifted_kd", "KD_Lib's ProbShift", "KLDivLoss of probabilities in place of logarithms, the student's as target",
        on_labels(other.probability_shift), NONE),
    Row("tf_virtual", "its authors, KD_Lib's VirtualTeacher", "softmax of probabilities / T, student at T = 1, mean over B x C",
        lambda draw: other.teacher_free(draw.logits[0], draw.labels, 20.0, 0.99), NONE,
        weight="0.1 to 0.95, T 10 to 40, and a factor up to 100: theirs alone"),
    Row("hint", "RepDistiller, SimKD", "as here", on_vectors(other.squared), weight="100"),
    Row("fitnet", "RepDistiller, SimKD", "as here, behind BatchNorm and ReLU", on_late(other.squared), weight="100"),
    Row("cosine", "TextBrewer, DistilBERT", "as here", on_vectors(other.one_minus_cosine)),
    Row("rkd_distance", "its authors, torchdistill, KD-Zoo", "as here; its weight is given", on_vectors(other.distances)),
    Row("rkd_distance", RKD, "25 inside", times(25, on_vectors(other.distances)), "25", lambda _: 25, "1"),
    Row("rkd_distance", KD_LIB, "0.5 inside", times(0.5, on_vectors(other.distances)), "0.5", lambda _: 0.5),
    Row("rkd_distance", MMRAZOR, "25 inside, of vectors scaled to length 1",
        times(25, on_vectors(other.distances_of_unit_vectors)), NONE),
    Row("rkd_angle", "its authors, torchdistill, KD-Zoo", "as here; its weight is given", on_vectors(other.angles)),
    Row("rkd_angle", RKD, "50 inside", times(50, on_vectors(other.angles)), "50", lambda _: 50, "1"),
    Row("rkd_angle", KD_LIB, "0.5 inside", times(0.5, on_vectors(other.angles)), "0.5", lambda _: 0.5),
    Row("rkd_angle", MMRAZOR, "50 inside, of vectors scaled to length 1", times(50, on_vectors(other.angles_of_unit_vectors)),
        NONE),
    Row("pkt", "its authors, RepDistiller, mdistiller, torchdistill", "mean over B x B", on_vectors(other.transfer),
        weight="30000, tuned at B = 64", within=1e-5),
    Row("pkt", "KD-Zoo", "the same, 1e-6 for 1e-7", on_vectors(other.transfer, 1e-6), within=1e-3),
    Row("pkt", "the paper", "mean over rows", on_vectors(other.transfer_by_rows), "B", lambda draw: draw.batch, within=1e-5),
    Row("cc", "KD-Zoo", "as here, gamma 0.4", on_vectors(other.congruence)),
    Row("cc", "RepDistiller", "products of neighbouring rows' absolute differences", on_vectors(other.products_of_neighbours),
        NONE, weight="0.02: theirs alone"),
    Row("cc", "torchdistill", "vectors of any length, the distance itself over B**2", on_vectors(other.raw_congruence), NONE),
    Row("crd", "its authors (RepDistiller), mmrazor, torchdistill", "1e-7 more in each denominator",
        lambda draw: other.contrast(draw.scores[1], 3 * draw.batch), weight="0.8", within=1e-4, ours=of_crd),
    Row("srrl:logits=mse", "its authors, SimKD, CTKD", "as here, behind BatchNorm and ReLU",
        lambda draw: other.vectors_and_logits(*draw.vectors, *draw.classifier), weight="1", settings={"logits": "mse"}),
    Row("srrl", "its authors, SimKD, CTKD", "the mean square of the logits' difference in place of the KL",
        lambda draw: other.vectors_and_logits(*draw.vectors, *draw.classifier), NONE),
    Row("at", "its authors, RepDistiller, mdistiller, mmrazor, torchdistill's mode 'code'", "as here",
        on_late(other.attention_transfer), weight="1000"),
    Row("at", "KD-Zoo", "the channels' sum, and 1e-6 in the length", on_late(other.summed_attention_transfer), within=1e-5),
    Row("at", "torchdistill's mode 'paper'", "mean over samples of the distance itself", on_late(other.attention_distance), NONE),
    Row("at", KD_LIB, "squares of all C x H x W, no mean over channels", on_late(other.squared_activations), NONE),
    Row("sp", "RepDistiller, KD-Zoo, mdistiller", "as here", on_late(other.similarity), weight="3000"),
    Row("sp", "torchdistill", "rows of sum 1 in place of length 1", on_late(other.similarity_by_l1), NONE),
    Row("nst", "RepDistiller, KD-Zoo, mdistiller", "as here", on_late(other.selectivity), weight="50"),
    Row("vid", "RepDistiller, KD-Zoo, torchdistill; mdistiller, which never learns the variances", "as here, behind "
        "three 1 x 1 convolutions", on_late(other.likelihood), weight="1", within=1e-6),
    Row("ab", "RepDistiller's last layer (earlier ones 1/2, 1/4), mmrazor", "as here", on_late(other.boundaries),
        weight="1, in 30 epochs of its own"),
    Row("ab", "torchdistill", "without 3 / 1000", on_late(other.summed_boundaries), "1000/3", lambda _: 1000 / 3),
    Row("ab", "KD-Zoo", "mean over the n units of a sample too", on_late(other.mean_boundaries), "1000/3 / n",
        lambda draw: 1000 / 3 / draw.late[0][0].numel()),
    Row("fsp_average", "RepDistiller, KD-Zoo", "as here", lambda draw: other.average_flow(*draw.maps),
        weight="50, by which RepDistiller multiplies nothing: 1, in 30 epochs of its own"),
    Row("fsp", "RepDistiller, KD-Zoo", "averages in place of maxima", lambda draw: other.average_flow(*draw.maps), NONE),
    Row("fsp", "torchdistill", "the lengths of the columns of the difference, summed", lambda draw: other.columns_of_flow(
        *draw.maps), NONE),
    Row("ickd", "its authors on CIFAR", "as here, behind BatchNorm", on_late(other.channel_correlation), weight="2.5"),
    Row("ickd", "torchdistill", "over B once more", on_late(
        other.channel_correlation_over_batch_twice), "1 / B", lambda draw: 1 / draw.batch),
    Row("reviewkd", "its authors, mdistiller, torchdistill", "as here, of fused maps", on_late(other.hierarchical),
        weight="1 to 8, warmed up", ours=lambda draw: hierarchical_context(*draw.late)),
    Row("simkd", "its authors", "as here", on_late(other.squared), weight="1, and nothing beside it"),
]  # fmt: skip


def name_of(row: Row) -> str:
    """In LOSSES."""
    return row.loss.partition(" ")[0].partition(":")[0]


def ratios(row: Row) -> list[float]:
    """Theirs / ours on each draw: of the values, or how many times the student's gradient is theirs (by least squares)."""
    return [ratio(row, draw) for draw in DRAWS]


def ratio(row: Row, draw: Draw) -> float:
    theirs, ours = row.values(draw)
    if not row.gradient:
        return float(theirs.detach() / ours.detach())
    leaf = draw.logits[0]
    (a,), (b,) = (torch.autograd.grad(value, leaf, retain_graph=True) for value in (theirs, ours))
    scale = float((a * b).sum() / b.square().sum())
    return scale if torch.allclose(a, scale * b, rtol=1e-7, atol=1e-12) else math.nan


def factor_of(row: Row) -> str:
    if row.factor == NONE:
        found = ratios(row)
        smallest, largest = (f"{float(f'{bound:.2g}'):,.6g}" for bound in (min(found), max(found)))
        return f"{NONE}: {smallest} to {largest}"
    return row.factor + (", of the gradient" if row.gradient else "")


def weight_of(row: Row) -> str:
    """As published, and what that is here where a number inside makes it another."""
    inside = {"25": "25", "50": "50", "1/2": "0.45"}.get(row.factor, "")
    return row.weight + (f": {inside} here" if row.weight and inside else "")


def markdown(rows: Iterable[Row]) -> str:
    cells = [[f"`{row.loss}`", row.whose, row.there, factor_of(row), weight_of(row)] for row in rows]
    return "\n".join([HEAD, *(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in cells)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into the page instead of printing")
    parser.add_argument("--quick", action="store_true", help="print the first two lines only")
    arguments = parser.parse_args()
    if arguments.write and arguments.quick:
        parser.error("--write does not take --quick: the page has every line")
    if arguments.write:
        made = between(PAGE.read_text(encoding="utf-8"), markdown(ROWS), BEGIN, END)
        PAGE.write_text(made, encoding="utf-8")
    else:
        print(markdown(ROWS[:2] if arguments.quick else ROWS))


if __name__ == "__main__":
    main()

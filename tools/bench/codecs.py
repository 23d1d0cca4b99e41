"""What does each codec cost, and what does it keep? Bytes, divergence and speed on rows of several kinds, and the goals.

    python tools/bench/codecs.py                                  # everything synthetic, about five minutes on one core
    python tools/bench/codecs.py --quick                          # does it run at all: small, untrained, no goals
    python tools/bench/codecs.py --only trained --png front.png   # the front as a picture
    python tools/bench/codecs.py --only real --model runs/teacher --data digits --json codecs.json
    python tools/bench/codecs.py --device cuda

Sources of rows: `trained`, held-out rows of a network trained here on a synthetic mixture of 1000 classes; `unstructured`, random
logits of the same entropy; `wide`, a random linear head over 21,841 classes, of the same entropy; `real`, rows of a trained run.
A record's bytes have everything that decoding takes and the stored bound; digests and checksums come on top in a cache.
Rows kept dense are counted in. KL is in nats. Speeds are the fastest of several passes in batches of 256.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softcache.codecs import Codec, Probe, make_codec
from softcache.codecs.fidelity import GRID, grid_of, kl_at, kl_rows
from softcache.codecs.records import read_field
from softcache.data.loading import ViewedSet, to_device
from softcache.data.transfer_set import open_transfer_set
from softcache.data.views import Policy
from softcache.dump.choose_codec import CANDIDATES
from softcache.errors import CodecFitError, CodecRangeError, SoftcacheError
from softcache.models import final_linear, load_model
from softcache.report.tables import table
from softcache.spec import split_term

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.harness import heading, parser_of, write_json

BATCH = 256
SHOWN = (*CANDIDATES, "lowrank:max_kl=0.001,at_temperature=1")
DRAWN = (  # besides, in the picture
    *(f"lowrank:max_kl={kl}" for kl in ("0.01", "0.003", "0.001", "0.0003", "3e-05", "1e-05")),
    *(f"headtail:k={k},bits={bits}" for k, bits in ((1, 8), (64, 8), (1, 6), (64, 6), (1, 4), (64, 4))),
    *(f"topk:k={k}" for k in (1, 3, 30, 300)),
)
REFERENCE = "top-100 float16 probabilities"


# ---------------------------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class Source:
    """Rows of one kind: those that codecs are fitted on, and others that they are measured on."""

    name: str
    about: str
    fitted: Probe
    measured: Probe

    @property
    def num_classes(self) -> int:
        return self.measured.logits.shape[1]


def entropy(logits: Tensor) -> float:
    """Mean entropy of the softmax, in nats."""
    log_p = logits.double().log_softmax(dim=1)
    return float(-(log_p.exp() * log_p).sum(dim=1).mean())


def split(name: str, about: str, probe: Probe, fitted_rows: int) -> Source:
    inputs = probe.classifier_input
    both = [
        Probe(
            probe.logits[part], None if inputs is None else inputs[part], probe.classifier_weight, probe.classifier_bias
        )
        for part in (slice(fitted_rows), slice(fitted_rows, None))
    ]
    about = f"{about}; softmax entropy {entropy(both[1].logits):.2f} nat on {len(both[1].logits):,} rows"
    return Source(name, about, *both)


class Mixture:
    """1000 Gaussian classes in 128 dimensions, 20 about each of 50 centres, so that classes are taken for each other."""

    classes, groups, dimensions, noise = 1000, 50, 128, 3.4

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        centres = 1.5 * torch.randn(self.groups, self.dimensions, generator=generator)
        own = torch.randn(self.classes, self.dimensions, generator=generator)
        self.means = centres[torch.arange(self.classes) % self.groups] + own

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """(count, 128) samples and (count,) labels, fresh ones every time."""
        labels = torch.randint(self.classes, (count,), generator=self.generator)
        noise = torch.randn(count, self.dimensions, generator=self.generator)
        return self.means[labels] + self.noise * noise, labels


def trained_source(fitted_rows: int, measured_rows: int, steps: int) -> Source:
    """Held-out rows of an MLP with 512 units before its last layer."""
    torch.manual_seed(0)
    mixture = Mixture(torch.Generator().manual_seed(0))
    body = nn.Sequential(nn.Linear(mixture.dimensions, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU())
    last = nn.Linear(512, mixture.classes)
    parameters = [*body.parameters(), *last.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        samples, labels = mixture.draw(256)
        optimizer.zero_grad()
        F.cross_entropy(last(body(samples)), labels).backward()
        optimizer.step()
        schedule.step()
    samples, labels = mixture.draw(fitted_rows + measured_rows)
    with torch.no_grad():
        inputs = body(samples)
        logits = last(inputs)
    accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
    about = (
        f"synthetic: an MLP 128-512-512-1000 after {steps:,} steps on a Gaussian mixture, top-1 {100 * accuracy:.1f} %"
    )
    return split("trained", about, Probe(logits, inputs, last.weight.data, last.bias.data), fitted_rows)


def at_entropy(rows: Tensor, wanted: float) -> float:
    """The factor that gives these logits the wanted entropy, by bisection."""
    low, high = 0.0, 1000.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if entropy(middle * rows) > wanted else (low, middle)
    return (low + high) / 2


def unstructured_source(fitted_rows: int, measured_rows: int, wanted: float) -> Source:
    rows = torch.randn(fitted_rows + measured_rows, 1000, generator=torch.Generator().manual_seed(1))
    rows *= at_entropy(rows[:512], wanted)
    return split("unstructured", "synthetic: independent Gaussian logits", Probe(rows), fitted_rows)


def wide_source(fitted_rows: int, measured_rows: int, wanted: float) -> Source:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(fitted_rows + measured_rows, 256, generator=generator) * torch.logspace(0, -1.5, 256)
    inputs = inputs @ torch.linalg.qr(torch.randn(256, 256, generator=generator))[0]
    weight = torch.randn(21_841, 256, generator=generator)
    weight *= at_entropy(inputs[:64] @ weight.T, wanted)
    about = "synthetic: a random linear head over 256 correlated features"
    return split("wide", about, Probe(inputs @ weight.T, inputs, weight, torch.zeros(21_841)), fitted_rows)


def real_source(model_text: str, data: str, fitted_rows: int, measured_rows: int) -> Source:
    """Rows of a trained model on the first samples of a set, shuffled by a fixed seed."""
    transfer_set = open_transfer_set(data)
    viewed = ViewedSet(transfer_set, Policy(), ())
    order = torch.randperm(len(viewed), generator=torch.Generator().manual_seed(3)).tolist()
    model = load_model(
        model_text,
        num_classes=transfer_set.num_classes,
        class_names=transfer_set.class_names,
        input_shape=getattr(viewed.render(0, 0), "shape", None),
    ).eval()
    seen: list[Tensor] = []
    last = final_linear(model.net, transfer_set.num_classes)
    if last is not None:
        last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = []
    order = order[: fitted_rows + measured_rows]
    with torch.no_grad():
        for start in range(0, len(order), BATCH):
            items = [viewed.render(i, 0) for i in order[start : start + BATCH]]
            logits.append(model(to_device(model.input.collate(items), torch.device("cpu"))))
    probe = Probe(torch.cat(logits))
    if last is not None:
        bias = None if last.bias is None else last.bias.data
        probe = Probe(torch.cat(logits), torch.cat(seen), last.weight.data, bias)
    name = f"{Path(model_text).name or model_text} on {data}"
    return split(name, f"real: {model.spec}", probe, min(fitted_rows, 2 * len(order) // 3))


def moved(probe: Probe, device: torch.device) -> Probe:
    parts = (probe.logits, probe.classifier_input, probe.classifier_weight, probe.classifier_bias)
    return Probe(*(None if part is None else part.to(device) for part in parts))  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- measuring


@dataclass
class Result:
    """One codec on one source.

    Attributes:
        nbytes: of a record with its bound, dense rows counted in.
        dense: share of records that are kept dense.
        constants: bytes that are stored once.
        mean_kl, worst_kl: by temperature.
        agreement: share of rows whose largest class is kept.
        encode, decode: rows per second; None where it was not measured.
        step_square: mean squared step of int8, for its goal.
    """

    source: str
    codec: str
    nbytes: float = 0.0
    dense: float = 0.0
    constants: int = 0
    mean_kl: dict[float, float] = field(default_factory=dict)
    worst_kl: dict[float, float] = field(default_factory=dict)
    agreement: float = 0.0
    encode: float | None = None
    decode: float | None = None
    step_square: float | None = None
    refused: str = ""


def array_bytes(arrays: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    return sum(int(dtype[2:]) * math.prod(shape) for dtype, shape in arrays.values())


def batches(probe: Probe) -> Iterator[tuple[Tensor, Tensor | None]]:
    inputs = probe.classifier_input
    for start in range(0, len(probe.logits), BATCH):
        part = slice(start, start + BATCH)
        yield probe.logits[part], None if inputs is None else inputs[part]


def fastest(run: Callable[[], Any], rows: int, device: torch.device, passes: int) -> float:
    """Rows per second of the fastest pass, the first one left out."""
    times = []
    for _ in range(passes + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return rows / min(times[1:])


def decoded_or_read(codec: Codec, arrays: Mapping[str, Tensor]) -> Any:
    """What a loss reads: the logits, or of a codec that is not complete its head and the tail's log-sum-exp."""
    return codec.decode(arrays) if codec.complete else (codec.head(arrays), codec.tail_logsumexp(arrays, 4.0))


def measure(text: str, source: Source, device: torch.device, *, passes: int) -> Result:
    """Fit, encode and decode; speeds are measured unless `passes` is 0."""
    result = Result(source.name, text)
    name, parameters = split_term(text, "--codec")
    given = moved(source.measured, device)
    try:
        codec = make_codec(name, parameters, source.num_classes).fit(moved(source.fitted, device))
        coded = [codec.encode(logits, inputs) for logits, inputs in batches(given)]
    except (CodecFitError, CodecRangeError) as exc:
        result.refused = exc.message
        return result
    rows = len(given.logits)
    result.dense = sum(len(arrays.get("dense_at", ())) for arrays in coded) / rows
    result.nbytes = array_bytes(codec.arrays) + 2 * codec.bounded + result.dense * 2 * source.num_classes
    result.constants = sum(value.nbytes for value in codec.constants.values())
    decoded = [codec.decode(arrays) if codec.complete else None for arrays in coded]
    for t in grid_of(codec):
        found = [
            kl_at(codec, logits, arrays, stored, t)
            for (logits, _), arrays, stored in zip(batches(given), coded, decoded, strict=True)
        ]
        result.mean_kl[t], result.worst_kl[t] = float(torch.cat(found).mean()), float(torch.cat(found).max())
    shown = [codec.spread(a, 1.0) if stored is None else stored for a, stored in zip(coded, decoded, strict=True)]
    result.agreement = float((torch.cat(shown).argmax(dim=1) == given.logits.argmax(dim=1)).double().mean())
    if name == "int8":
        (step,) = (part for part in codec.fields if part.name == "step")
        result.step_square = float(torch.cat([read_field(a["records"], step) for a in coded]).double().square().mean())
    if passes:
        result.encode = fastest(lambda: [codec.encode(*batch) for batch in batches(given)], rows, device, passes)
        result.decode = fastest(lambda: [decoded_or_read(codec, arrays) for arrays in coded], rows, device, passes)
    return result


def measure_reference(source: Source) -> Result:
    """The 100 largest probabilities at T=1 as float16 with 16-bit ids and the sample's 32-bit id, the rest spread evenly."""
    logits = source.measured.logits
    kept, rest = min(100, source.num_classes), max(0, source.num_classes - 100)
    values, ids = logits.softmax(dim=1).topk(kept, dim=1)
    stored = values.half().double().clamp(min=2.0**-24)  # what float16 holds; its zero would be no probability at all
    tail = (1 - stored.sum(dim=1, keepdim=True)).clamp(min=2.0**-24) / max(1, rest)
    log_q = tail.log().repeat(1, source.num_classes).scatter_(1, ids, stored.log())
    result = Result(source.name, REFERENCE, nbytes=4 * kept + 4)
    for t in GRID:
        found = kl_rows(logits, log_q, 1.0) if t == 1.0 else kl_rows(logits / t, log_q / t, 1.0)
        result.mean_kl[t], result.worst_kl[t] = float(found.mean()), float(found.max())
    result.agreement = float((log_q.argmax(dim=1) == logits.argmax(dim=1)).double().mean())
    return result


# ------------------------------------------------------------------------------------------------------------------ goals


@dataclass(frozen=True)
class Goal:
    """What a codec should reach on the trained network's rows; None = nothing said."""

    codec: str
    nbytes: int | None = None
    mean_kl: Mapping[float, float] = field(default_factory=dict)
    decode: float | None = None


GOALS = (
    Goal("int8", 1010, decode=1e6),
    Goal("headtail:k=8,bits=8", 1040, {1.0: 2e-5, 4.0: 5e-5}, 3e5),
    Goal("headtail:k=16,bits=6", 820, {1.0: 5e-5, 4.0: 4e-4}),
    Goal("lowrank", 320, {1.0: 2e-4, 4.0: 1e-4}, 6e4),
    Goal("topk:k=10", 36),
    Goal("linear_head:dtype=float16", decode=5e4),
)


def judge(goal: Goal, found: Result) -> list[list[Any]]:
    """Rows of (codec, what, goal, found, verdict)."""
    if found.refused:
        return [[goal.codec, "fit", "-", "refused", "FAIL"]]
    limits: list[tuple[str, float | None, float]] = [("bytes", goal.nbytes, found.nbytes)]
    wanted = dict(goal.mean_kl)
    if found.step_square is not None:
        wanted = {t: 1.2 * found.step_square / (24 * t * t) for t in found.mean_kl}
    limits += [(f"mean KL at T={t:g}", limit, found.mean_kl[t]) for t, limit in wanted.items()]
    judged = [
        [goal.codec, what, f"<= {limit:.4g}", f"{value:.4g}", "PASS" if value <= limit else "FAIL"]
        for what, limit, value in limits
        if limit is not None
    ]
    if goal.decode is not None and found.decode is not None:
        verdict = "PASS" if found.decode >= goal.decode else "FAIL"
        judged.append([goal.codec, "decoded rows/s", f">= {goal.decode:,.0f}", f"{found.decode:,.0f}", verdict])
    return judged


# ---------------------------------------------------------------------------------------------------------------- showing


def show(source: Source, results: Sequence[Result]) -> None:
    print(f"\n{source.name}: C = {source.num_classes:,}; {source.about}")
    header = ["codec", "bytes", "dense", *(f"T={t:g}" for t in GRID), "top-1 kept", "encode/s", "decode/s"]
    rows: list[list[Any]] = []
    for found in results:
        if not found.refused:
            kl = [f"{found.mean_kl[t]:.1e} ({found.worst_kl[t]:.0e})" if t in found.mean_kl else "-" for t in GRID]
            speeds = [None if speed is None else round(speed) for speed in (found.encode, found.decode)]
            kept = f"{100 * found.agreement:.2f} %"
            rows.append([found.codec, f"{found.nbytes:,.1f}", f"{100 * found.dense:.2f} %", *kl, kept, *speeds])
    print(table(header, rows))
    for found in results:
        if found.refused:
            print(f"  {found.refused}")


FAMILIES = {
    "float32": "#555555",
    "float16": "#555555",
    "int8": "#1b6ca8",
    "headtail": "#e07b00",
    "lowrank": "#1a8a4a",
    "linear_head": "#8a3fa0",
    "topk": "#c0392b",
    REFERENCE: "#999999",
}


def draw(path: Path, source: Source, results: Sequence[Result]) -> None:
    """Bytes against mean KL at T=1 and T=4, one point per codec setting."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(12, 5), sharex=True, sharey=True)
    for panel, t in zip(panels, (1.0, 4.0), strict=True):
        for family, colour in FAMILIES.items():
            points = sorted(
                (found.nbytes, max(found.mean_kl[t], 1e-9))
                for found in results
                if found.codec.split(":")[0] == family and found.mean_kl.get(t) is not None and family != "float32"
            )
            if points:
                panel.plot(
                    *zip(*points, strict=True),
                    linestyle="-" if family == "lowrank" else "none",
                    marker="x" if family == REFERENCE else "o",
                    color=colour,
                    label=family,
                    linewidth=1,
                )
        panel.set(xscale="log", yscale="log", xlabel="bytes per record", title=f"T = {t:g}")
        panel.grid(True, which="major", alpha=0.3)
    panels[0].set_ylabel("mean KL to the given logits, nats")
    panels[1].legend(fontsize=8)
    figure.suptitle(f"{source.name}: {source.about}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def make_sources(arguments: argparse.Namespace) -> list[Source]:
    quick = arguments.quick
    fitted, measured, steps = (256, 256, 30) if quick else (2048, 4096, 2500)
    sources = []
    wanted = 0.75  # nat; what `trained` has, where it is made
    if "trained" in arguments.only:
        sources.append(trained_source(fitted, measured, steps))
        wanted = entropy(sources[0].measured.logits)
    if "unstructured" in arguments.only:
        sources.append(unstructured_source(fitted, measured // 4, wanted))
    if "wide" in arguments.only:
        sources.append(wide_source(fitted // 2, 64 if quick else 512, wanted))
    if "real" in arguments.only:
        pairs = zip(arguments.model, arguments.data, strict=True)
        sources += [real_source(model, data, fitted, measured // 2) for model, data in pairs]
    return sources


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    kinds = ("trained", "unstructured", "wide", "real")
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds, help="which sources (default: all)")
    parser.add_argument(
        "--model", action="append", default=[], help="a trained run folder, or a model spec with weights"
    )
    parser.add_argument("--data", action="append", default=[], help="data set of the --model at the same place")
    parser.add_argument("--device", default="cpu", help="where codecs run (default: cpu)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    parser.add_argument(
        "--png", type=Path, metavar="FILE", help="draw the first source's front there, more settings in it"
    )
    arguments = parser.parse_args()
    if len(arguments.model) != len(arguments.data):
        parser.error("--model and --data come in pairs")
    return arguments


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    device, passes = torch.device(arguments.device), 1 if arguments.quick else 5
    print(heading("codecs.py", arguments, device))
    everything: list[Result] = []
    drawn: list[Result] = []
    sources = make_sources(arguments)
    for source in sources:
        results = [measure(text, source, device, passes=passes) for text in SHOWN[:: 2 if arguments.quick else 1]]
        results.append(measure_reference(source))
        show(source, results)
        everything += results
        if arguments.png and not drawn:
            drawn = results + [measure(text, source, device, passes=0) for text in DRAWN]
    by_codec = {found.codec: found for found in everything if found.source == "trained"}
    if by_codec and not arguments.quick:
        goals = [row for goal in GOALS for row in judge(goal, by_codec[goal.codec])]
        print("\ngoals on `trained`\n" + table(["codec", "what", "goal", "found", "verdict"], goals))
    found = {
        "made_with": heading("codecs.py", arguments, device),
        "sources": {s.name: s.about for s in sources},
        "results": [asdict(r) for r in everything],
    }
    write_json(arguments.json, found)
    if arguments.png and sources:
        draw(arguments.png, sources[0], drawn)


if __name__ == "__main__":
    try:
        main()
    except SoftcacheError as exc:
        raise SystemExit(str(exc)) from None

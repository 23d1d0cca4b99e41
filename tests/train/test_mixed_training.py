"""Training on views that are a blend of two samples, at another resolution, or that are not the targets' own.

Every loss that training reports is computed again in float64: the views from policy and sample ids, the teacher's and the
student's logits by a matrix product, the formulas from the papers. Learning rates are too small to move a weight, so that
this holds in every epoch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORLDS, QuickDump
from torch.utils.data import ConcatDataset, DataLoader, Subset
from training import run_with

import softcache
from softcache import losses
from softcache.config import EvalConfig, TrainConfig
from softcache.data.loading import LoadedBatch, Partners, ViewedSet, epoch_order
from softcache.data.transfer_set import open_transfer_set
from softcache.data.views import Policy
from softcache.errors import ConfigError, DataError, DriftError, LossError, SoftcacheError
from softcache.evaluate import measure
from softcache.losses import LOSSES, ce, kd, make_term, mixed_ce
from softcache.losses.schedules import Moment
from softcache.models.weights import read_metadata
from softcache.spec import load_user_file
from softcache.train import TrainResult
from softcache.train import flow as train
from softcache.train.objective import Given, Labels, Objective

CLASSES, SEED, T = 4, 5, 3.0
TEACHER, STUDENT = 1, 99  # seeds of the toy's `exact`
MIXUP = ("crop_flip:padding=1", "mixup:alpha=1")
CUTMIX = ("shift:pixels=1", "cutmix")
MIXES = [pytest.param(MIXUP, id="mixup"), pytest.param(CUTMIX, id="cutmix")]
RESIZED = ("resized_crop_flip:size=6,scale_min=0.3",)


@pytest.fixture(scope="session")
def pieces() -> Path:
    return WORLDS / "some_labels.py"


# ---- the formulas ---------------------------------------------------------------------------------------------------


def log_softmax(logits: np.ndarray) -> np.ndarray:
    top = logits.max(axis=1, keepdims=True)
    shown: np.ndarray = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    return shown


def kd_oracle(student: np.ndarray, teacher: np.ndarray) -> float:
    log_q, log_p = log_softmax(student / T), log_softmax(teacher / T)
    return float(T**2 * (np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean())


def mixed_ce_oracle(logits: np.ndarray, labels: np.ndarray, partners: np.ndarray, shares: np.ndarray) -> float:
    """Row by row, term by term; over the labelled weight."""
    log_q = log_softmax(logits)
    if labels.ndim == 2:
        total = 0.0
        for row, z in enumerate(logits):
            for c, value in enumerate(z):
                target = shares[row] * labels[row, c] + (1 - shares[row]) * partners[row, c]
                total += target * np.logaddexp(0, -value) + (1 - target) * np.logaddexp(0, value)
        return float(total / logits.size)
    total = weight = 0.0
    for row in range(len(logits)):
        for label, share in ((labels[row], shares[row]), (partners[row], 1 - shares[row])):
            if label >= 0:
                total -= share * log_q[row, label]
                weight += share
    return float(total / weight) if weight else 0.0


def mixed_ce_gradient(logits: np.ndarray, labels: np.ndarray, partners: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """d/dz: the labelled weight of each row times its softmax, less each label's weight, over the weight of the batch."""
    found = np.zeros_like(logits)
    q, weight = np.exp(log_softmax(logits)), 0.0
    for row in range(len(logits)):
        for label, share in ((labels[row], shares[row]), (partners[row], 1 - shares[row])):
            if label >= 0:
                found[row] += share * q[row]
                found[row, label] -= share
                weight += share
    return found / weight if weight else found


LABELS = {
    "all labelled": (np.array([0, 1, 2, 3, 1]), np.array([3, 1, 0, 2, 2])),
    "same class": (np.array([0, 1, 2, 3, 1]), np.array([0, 1, 2, 3, 1])),
    "own unlabelled": (np.array([-1, 1, -1, 3, 1]), np.array([3, 1, 0, 2, 2])),
    "partner unlabelled": (np.array([0, 1, 2, 3, 1]), np.array([3, -1, 0, -1, 2])),
    "either": (np.array([0, -1, -1, 3, 1]), np.array([3, 1, -1, -1, 2])),
    "none labelled": (np.full(5, -1), np.full(5, -1)),
}
SHARES = {
    "any": np.array([0.3, 0.75, 0.01, 0.5, 0.999]),
    "ones": np.ones(5),
    "zeros": np.zeros(5),
    "ends": np.array([0.0, 1.0, 0.0, 1.0, 0.5]),
}


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("case", LABELS)
def test_mixed_ce_is_the_formula(case: str, shares: str) -> None:
    logits = np.random.default_rng(0).normal(size=(5, CLASSES)) * 4
    labels, partners = LABELS[case]
    student = torch.tensor(logits, requires_grad=True)
    value = mixed_ce(student, *map(torch.from_numpy, (labels, partners, SHARES[shares])))
    assert value.item() == pytest.approx(
        mixed_ce_oracle(logits, labels, partners, SHARES[shares]), rel=1e-12, abs=1e-15
    )
    (gradient,) = torch.autograd.grad(value, student)
    expected = mixed_ce_gradient(logits, labels, partners, SHARES[shares])
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("shares", SHARES)
def test_mixed_ce_of_several_labels(shares: str) -> None:
    draw = np.random.default_rng(1)
    logits, labels, partners = draw.normal(size=(5, 7)) * 3, draw.random((5, 7)) < 0.4, draw.random((5, 7)) < 0.4
    student = torch.tensor(logits, requires_grad=True)
    value = mixed_ce(student, *map(torch.from_numpy, (labels, partners, SHARES[shares])))
    assert value.item() == pytest.approx(mixed_ce_oracle(logits, labels, partners, SHARES[shares]), rel=1e-12)
    (gradient,) = torch.autograd.grad(value, student)
    share = SHARES[shares][:, None]
    target = share * labels + (1 - share) * partners
    np.testing.assert_allclose(gradient.numpy(), (1 / (1 + np.exp(-logits)) - target) / logits.size, atol=1e-14)


@pytest.mark.parametrize("case", LABELS)
def test_a_share_of_one_is_ce_and_of_zero_the_partners(case: str) -> None:
    logits = torch.randn(5, CLASSES, generator=torch.Generator().manual_seed(2)) * 5
    labels, partners = map(torch.from_numpy, LABELS[case])
    torch.testing.assert_close(mixed_ce(logits, labels, partners, torch.ones(5)), ce(logits, labels))
    torch.testing.assert_close(mixed_ce(logits, labels, partners, torch.zeros(5)), ce(logits, partners))


def test_mixed_ce_of_half_types_and_far_logits() -> None:
    logits = torch.tensor([[300.0, -300.0, 0.0, 1.0]] * 5)
    labels, partners = map(torch.from_numpy, LABELS["either"])
    shares = torch.from_numpy(SHARES["ends"]).float()
    expected = mixed_ce_oracle(logits.double().numpy(), *LABELS["either"], SHARES["ends"])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        student = logits.to(dtype).requires_grad_()
        value = mixed_ce(student, labels, partners, shares)
        assert value.dtype == torch.float32 and value.item() == pytest.approx(expected, rel=1e-2)
        value.backward()
        assert student.grad is not None and bool(student.grad.isfinite().all())


def test_a_term_on_labels_takes_what_the_batch_has() -> None:
    """Without partners the plain form; with them the mixed one. Terms on the teacher see neither."""
    logits = torch.randn(5, CLASSES, generator=torch.Generator().manual_seed(3))
    own, partners = map(torch.from_numpy, LABELS["either"])
    shares = torch.from_numpy(SHARES["any"]).float()
    objective = Objective([make_term("ce", weight="0.5")])
    plain = objective(logits, {}, Given(Labels(own)), Moment())
    mixed = objective(logits, {}, Given(Labels(own, partners, shares)), Moment())
    assert plain["ce"].item() == ce(logits, own).item()
    expected = mixed_ce_oracle(logits.double().numpy(), *LABELS["either"], SHARES["any"])
    assert mixed["ce"].item() == pytest.approx(expected, rel=1e-6)
    assert mixed["ce"].item() != pytest.approx(plain["ce"].item(), rel=1e-2)


# ---- training, computed again ---------------------------------------------------------------------------------------


def blake64(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def weight_of(seed: int, pixels: int) -> np.ndarray:
    """(C, pixels) of the toy's `exact`."""
    return np.random.default_rng(seed).integers(-8, 9, (CLASSES, pixels)) / 1024


@dataclass
class World:
    """A data set, as its file gives it, and where partners are drawn from.

    Attributes:
        keys, items, labels: of the whole set.
        table: ids by row, from which partners are drawn: a cache's, or the set's own.
    """

    keys: list[str]
    items: Sequence[np.ndarray]
    labels: np.ndarray
    table: list[int]

    @classmethod
    def of(cls, pieces: Path, cache: softcache.Cache | None = None, *, count: int = 40, multi: bool = False) -> World:
        made = load_user_file(str(pieces)).some(count, multi)
        own = [blake64(key) for key in made.sample_keys]
        return cls(made.sample_keys, made.images, made.labels, own if cache is None else cache.samples.ids.tolist())

    def view(self, policy: Policy, index: int, view: int) -> tuple[np.ndarray, int, float]:
        """Pixels, the partner's place in the whole set (the sample's own without mixing), the own label's weight."""
        ident = blake64(self.keys[index])
        image = policy.render(self.items[index], ident, view)
        if policy.mixing is None:
            return image, index, 1.0
        other = self.table[policy.partner(ident, view, len(self.table))]
        partner = [blake64(key) for key in self.keys].index(other)
        mixed, share = policy.mix(image, policy.render(self.items[partner], other, view), ident, view)
        return mixed, partner, share

    def logits(self, seed: int, policy: Policy, index: np.ndarray, view: int) -> np.ndarray:
        """(B, C) of the toy's `exact` on these views."""
        pixels = np.stack([self.view(policy, i, view)[0].ravel() for i in index.tolist()]).astype(np.float64)
        return pixels @ weight_of(seed, pixels.shape[1]).T

    def losses(
        self,
        seen: Policy,
        view: int,
        epoch: int,
        visited: np.ndarray,
        batch_size: int,
        targets: tuple[Policy, int] | None,
    ) -> dict[str, float]:
        """The means over the steps of one epoch that training reports."""
        order = visited[epoch_order(len(visited), SEED, epoch)]
        found: dict[str, list[float]] = {"ce": [], "kd": [], "bce": []}
        for start in range(0, len(order), batch_size):
            index = order[start : start + batch_size]
            student = self.logits(STUDENT, seen, index, view)
            mixed = [self.view(seen, i, view)[1:] for i in index.tolist()]
            partners, shares = np.array([j for j, _ in mixed]), np.array([share for _, share in mixed])
            found["ce"].append(mixed_ce_oracle(student, self.labels[index], self.labels[partners], shares))
            if targets is not None:
                teacher = self.logits(TEACHER, targets[0], index, targets[1])
                found["kd"].append(kd_oracle(student, teacher))
                target = 1 / (1 + np.exp(-teacher))
                nats = target * np.logaddexp(0, -student) + (1 - target) * np.logaddexp(0, student)
                found["bce"].append(float(nats.mean()))
        return {name: float(np.mean(values)) for name, values in found.items() if values}


def settings(tmp_path: Path, toy: Path, data: str, **more: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "student": f"{toy}:exact?seed={STUDENT}",
        "out": str(tmp_path / "run"),
        "epochs": 3,
        "batch_size": 16,
        "optimizer": "sgd",
        **({} if "optimizer" in more else {"momentum": 0.0}),
        "lr": 1e-30,
        "seed": SEED,
        "threads": 1,
        "workers": 0,
    }
    return TrainConfig(data=data, **(defaults | more))


def cached(tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {"cache": str(tmp_path / "cache"), "loss": (f"kd:temperature={T}", "ce"), **more}


def agree(reported: dict[str, Any], expected: dict[str, float], names: Sequence[str]) -> None:
    for name in names:
        assert reported[name] == pytest.approx(expected[name], rel=2e-5), name


@pytest.mark.parametrize("policy", MIXES)
def test_cached_training_weighs_both_labels(
    quick_dump: QuickDump, toy: Path, pieces: Path, tmp_path: Path, policy: tuple[str, ...]
) -> None:
    """kd to what the teacher says of the blend, ce to both labels by their shares; e mod V is the view."""
    data = f"{pieces}:some"
    cache = quick_dump(data, [f"{toy}:exact?seed={TEACHER}"], policy=policy, views=2, view_seed=9)
    result = train.run(settings(tmp_path, toy, data, **cached(tmp_path)), quiet=True)
    world, everyone = World.of(pieces, cache), np.arange(40)
    assert (world.labels == -1).any() and (world.labels >= 0).any()
    for epoch, reported in enumerate(result.metrics):
        view = epoch % 2
        expected = world.losses(cache.policy, view, epoch, everyone, 16, (cache.policy, view))
        agree(reported, expected, ["kd", "ce"])
        plain = World(world.keys, world.items, world.labels, world.table)
        unmixed = replace(cache.policy, steps=cache.policy.steps[:-1])
        assert plain.losses(unmixed, view, epoch, everyone, 16, None)["ce"] != pytest.approx(expected["ce"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("policy", MIXES)
@pytest.mark.parametrize("chosen", ["keep_labels", "samples"])
def test_a_subset_visits_its_samples_and_mixes_with_all(
    quick_dump: QuickDump, toy: Path, pieces: Path, tmp_path: Path, policy: tuple[str, ...], chosen: str
) -> None:
    data = f"{pieces}:some"
    cache = quick_dump(data, [f"{toy}:exact?seed={TEACHER}"], policy=policy, views=2)
    world = World.of(pieces, cache)
    more: dict[str, Any]
    if chosen == "keep_labels":
        visited, more = np.flatnonzero(np.isin(world.labels, [1, 3])), {"keep_labels": ("bee", "dog")}
    else:
        visited = np.array([3, 4, 8, 20, 21, 22, 39])
        (tmp_path / "keys").write_text("".join(f"some/{i}\n" for i in visited[::-1]))
        more = {"samples": str(tmp_path / "keys")}
    partners = {world.view(cache.policy, int(i), v)[1] for i in visited for v in (0, 1)}
    assert not partners <= set(visited.tolist())
    result = train.run(settings(tmp_path, toy, data, **cached(tmp_path, **more)), quiet=True)
    for epoch, reported in enumerate(result.metrics):
        view = epoch % 2
        agree(
            reported,
            world.losses(cache.policy, view, epoch, visited, 16, (cache.policy, view)),
            ["kd", "ce"],
        )
    assert json.loads((tmp_path / "run" / "run.json").read_text())["samples"] == len(visited)


def test_several_labels_are_blended(quick_dump: QuickDump, toy: Path, pieces: Path, tmp_path: Path) -> None:
    data = f"{pieces}:some?multi=true"
    cache = quick_dump(data, [f"{toy}:exact?seed={TEACHER}"], policy=MIXUP, views=2)
    config = settings(tmp_path, toy, data, **cached(tmp_path, loss=("bce", "ce")))
    world = World.of(pieces, cache, multi=True)
    for epoch, reported in enumerate(train.run(config, quiet=True).metrics):
        view = epoch % 2
        agree(
            reported,
            world.losses(cache.policy, view, epoch, np.arange(40), 16, (cache.policy, view)),
            ["bce", "ce"],
        )


@pytest.mark.parametrize("policy", MIXES)
@pytest.mark.parametrize("kept", [False, True], ids=["whole", "subset"])
def test_hard_label_training_mixes_too(
    toy: Path, pieces: Path, tmp_path: Path, policy: tuple[str, ...], kept: bool
) -> None:
    """A fresh view each epoch; partners are drawn from the whole set, in its own order."""
    world, data = World.of(pieces), f"{pieces}:some"
    visited = np.flatnonzero(np.isin(world.labels, [0, 2])) if kept else np.arange(40)
    more: dict[str, Any] = {"keep_labels": ("ant", "cat")} if kept else {}
    config = settings(tmp_path, toy, data, policy=policy, view_seed=3, eval_data=data, **more)
    result = train.run(config, quiet=True)
    parsed = Policy.parse(policy, 3)
    for epoch, reported in enumerate(result.metrics):
        assert reported["view"] == epoch
        agree(reported, world.losses(parsed, epoch, epoch, visited, 16, None), ["ce"])
    # evaluated on the items as they are: neither moved nor mixed
    raw = world.logits(STUDENT, Policy(), np.arange(40), 0)
    labelled = world.labels >= 0
    assert result.metrics[-1]["eval_top1"] == (raw.argmax(axis=1) == world.labels)[labelled].mean()


@pytest.mark.slow
def test_mixed_training_learns(quick_dump: QuickDump, toy: Path, tmp_path: Path) -> None:
    quick_dump(f"{toy}:images", [f"{toy}:exact?seed={TEACHER}"], policy=MIXUP, views=4)
    more: dict[str, Any] = {"student": "softcache:mlp?hidden=32", "optimizer": "adamw", "lr": 0.01, "epochs": 24}
    result = train.run(settings(tmp_path, toy, f"{toy}:images", **cached(tmp_path, **more)), quiet=True)
    assert result.metrics[-1]["kd"] < 0.6 * result.metrics[0]["kd"]


def test_a_partner_that_is_not_there_is_told_with_the_way_out(
    quick_dump: QuickDump, toy: Path, pieces: Path, tmp_path: Path
) -> None:
    """A smaller data set, not a selection of the whole one."""
    quick_dump(f"{pieces}:some", [f"{toy}:exact"], policy=MIXUP, views=2)
    with pytest.raises(DataError, match="the data set does not hold that sample") as caught:
        train.run(settings(tmp_path, toy, f"{pieces}:some?count=30", **cached(tmp_path)), quiet=True)
    assert "give the whole transfer set of the cache; --samples, --keep-labels" in caught.value.tip
    assert "while loading sample some/" in str(caught.value.__notes__)
    assert not (tmp_path / "run").exists()


def test_a_loss_defined_by_one_label_is_refused(
    quick_dump: QuickDump, toy: Path, pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = f"{pieces}:some"
    quick_dump(data, [f"{toy}:exact"], policy=MIXUP, views=2)
    monkeypatch.setitem(LOSSES, "ce", replace(LOSSES["ce"], mixed=None))
    for more in (cached(tmp_path), {"policy": CUTMIX}):
        with pytest.raises(LossError, match="'ce' is defined by one hard label, and these views are mixed"):
            train.run(settings(tmp_path, toy, data, **more), quiet=True)
    config = settings(tmp_path, toy, data, **cached(tmp_path, loss=(f"kd:temperature={T}",)))
    assert train.run(config, quiet=True).metrics  # losses on the teacher alone do not mind


# ---- the cache in a loop of one's own -------------------------------------------------------------------------------


def as_train_sees(cache: softcache.Cache, data: str, view: int) -> LoadedBatch:
    """All samples of the data set in its own order, through training's loader."""
    transfer_set = open_transfer_set(data)
    rows = cache.join(transfer_set).rows
    partners = Partners.of(transfer_set, rows, len(cache))
    viewed = ViewedSet(transfer_set, cache.policy, [np.stack], partners=partners)
    batch = viewed.__getitems__([(i, view) for i in range(len(transfer_set))])
    assert isinstance(batch, LoadedBatch) and batch.partner_rows is not None and batch.shares is not None
    return batch


@pytest.mark.slow
@pytest.mark.parametrize("policy", MIXES)
@pytest.mark.parametrize("kind", ["whole", "subset", "concatenated", "reversed"])
def test_a_plain_loop_sees_what_training_sees(
    quick_dump: QuickDump, toy: Path, pieces: Path, policy: tuple[str, ...], kind: str
) -> None:
    data = f"{pieces}:some"
    cache = quick_dump(data, [f"{toy}:exact?seed={TEACHER}"], policy=policy, views=3)
    own: Any = load_user_file(str(pieces)).some()
    indices = {"subset": [7, 30, 2, 2, 19], "reversed": list(range(39, -1, -1))}.get(kind, list(range(40)))
    dataset = {
        "whole": lambda: own,
        "subset": lambda: Subset(own, indices),
        "concatenated": lambda: ConcatDataset([Subset(own, range(25)), Subset(own, range(25, 40))]),
        "reversed": lambda: Subset(own, indices),
    }[kind]()
    joined = cache.join(dataset, whole=own) if kind == "subset" else cache.join(dataset)
    for view in range(3):
        seen = as_train_sees(cache, data, view)
        assert seen.partner_rows is not None and seen.shares is not None
        found = list(DataLoader(joined.for_view(view), batch_size=8))
        images = torch.cat([samples[0] for samples, *_ in found]).numpy()
        labels = torch.cat([samples[1] for samples, *_ in found]).numpy()
        records, partner_rows, shares = (torch.cat([part[n] for part in found]) for n in (1, 2, 3))
        assert np.array_equal(images, seen.inputs[0][indices])
        assert np.array_equal(partner_rows.numpy(), seen.partner_rows[indices])
        assert np.array_equal(shares.numpy().astype(np.float32), seen.shares[indices])
        assert np.array_equal(labels, own.labels[indices])
        targets = joined.gather(records)
        assert np.array_equal(targets.views, np.full(len(indices), view))
        keys = [cache.samples.key(int(row)) for row in targets.rows]
        assert keys == [own.sample_keys[i] for i in indices]
        teacher = images.reshape(len(images), -1).astype(np.float64) @ weight_of(TEACHER, 64).T
        np.testing.assert_allclose(targets.logits().numpy(), teacher, rtol=1e-6)
        assert len(set(zip(partner_rows.tolist(), shares.tolist(), strict=True))) > len(set(indices)) // 2


def test_a_plain_loop_has_trainings_losses(quick_dump: QuickDump, toy: Path, pieces: Path, tmp_path: Path) -> None:
    """The loop that the README shows for mixed views: own labels, partners' labels from the cache, shares."""
    data = f"{pieces}:some"
    cache = quick_dump(data, [f"{toy}:exact?seed={TEACHER}"], policy=CUTMIX, views=2)
    reported = train.run(settings(tmp_path, toy, data, batch_size=40, **cached(tmp_path)), quiet=True).metrics
    student = load_user_file(str(toy)).exact(CLASSES, (8, 8), STUDENT)
    joined = cache.join(load_user_file(str(pieces)).some())
    for epoch in range(3):
        ((images, labels), records, partner_rows, shares) = next(
            iter(DataLoader(joined.for_view(epoch % 2), batch_size=40, shuffle=True))
        )
        logits = student(images)
        partner_labels = torch.from_numpy(cache.samples.labels_of(partner_rows.numpy()))
        assert mixed_ce(logits, labels, partner_labels, shares).item() == pytest.approx(reported[epoch]["ce"], rel=1e-5)
        assert kd(logits, joined.gather(records).logits(), T).item() == pytest.approx(reported[epoch]["kd"], rel=1e-4)


def test_a_subset_without_its_whole_is_told_what_to_give(quick_dump: QuickDump, toy: Path, pieces: Path) -> None:
    cache = quick_dump(f"{pieces}:some", [f"{toy}:exact"], policy=MIXUP, views=2)
    own: Any = load_user_file(str(pieces)).some()
    joined = cache.join(Subset(own, [1, 2, 3]))
    with pytest.raises(
        DataError, match=r"some/\d+: views are mixed with this sample, and the data set does not"
    ) as caught:
        [joined[i] for i in range(3)]
    assert "join(subset, whole=data_set)" in caught.value.tip


def test_a_selected_transfer_set_knows_its_whole(
    quick_dump: QuickDump, toy: Path, pieces: Path, tmp_path: Path
) -> None:
    cache = quick_dump(f"{pieces}:some", [f"{toy}:exact"], policy=MIXUP, views=2)
    chosen = open_transfer_set(f"{pieces}:some", keep_labels=("bee",))
    joined = cache.join(chosen)
    assert 0 < len(joined) < 40
    seen = as_train_sees(cache, f"{pieces}:some", 0)
    for i in range(len(joined)):
        (image, label), _, partner, share = joined[i]
        place = int(chosen.keys[i].removeprefix("some/"))
        assert seen.partner_rows is not None and seen.shares is not None and label == 1
        assert np.array_equal(image, seen.inputs[0][place]) and partner == seen.partner_rows[place]
        assert np.float32(share) == seen.shares[place]


@pytest.mark.parametrize("form", ["tuple", "dict", "bare"])
def test_samples_of_any_form_are_mixed(quick_dump: QuickDump, toy: Path, pieces: Path, form: str) -> None:
    own: Any = load_user_file(str(pieces)).some()
    cache = quick_dump(f"{pieces}:some", [f"{toy}:exact"], policy=MIXUP, views=1)
    seen = as_train_sees(cache, f"{pieces}:some", 0)

    class Formed(torch.utils.data.Dataset[Any]):
        sample_keys, class_names = own.sample_keys, own.class_names

        def __len__(self) -> int:
            return 40

        def __getitem__(self, i: int) -> Any:
            image, label = own[i]
            return {"tuple": (image, label, i), "dict": {"image": image, "label": label}, "bare": image}[form]

    joined = cache.join(Formed())
    for i in (0, 17, 39):
        sample, record, partner, share = joined[i]
        image = sample[0] if form == "tuple" else sample["image"] if form == "dict" else sample
        assert seen.partner_rows is not None and seen.shares is not None
        assert np.array_equal(image, seen.inputs[0][i])
        assert (partner, np.float32(share)) == (seen.partner_rows[i], seen.shares[i])
        assert cache.samples.key(record) == f"some/{i}"


@pytest.mark.parametrize("policy", [pytest.param(CUTMIX, id="mixed"), pytest.param(CUTMIX[:1], id="not mixed")])
def test_a_sample_whose_item_cannot_be_found_is_refused(
    quick_dump: QuickDump, toy: Path, pieces: Path, policy: tuple[str, ...]
) -> None:
    """Never handed out as it is: it would not be what the teacher saw."""
    own: Any = load_user_file(str(pieces)).some()
    cache = quick_dump(f"{pieces}:some", [f"{toy}:exact"], policy=policy, views=1)

    class Named(torch.utils.data.Dataset[Any]):
        sample_keys, class_names = own.sample_keys, own.class_names

        def __len__(self) -> int:
            return 40

        def __getitem__(self, i: int) -> Any:
            return {"pixels": own[i][0], "label": own[i][1]}

    with pytest.raises(SoftcacheError, match="needs uint8 images, got dict"):
        cache.join(Named())[0]


@pytest.mark.slow
@pytest.mark.parametrize("policy", [pytest.param((), id="as they are"), pytest.param(CUTMIX[:1], id="moved"), *MIXES])
def test_samples_with_other_names_see_the_views_of_their_contents(
    quick_dump: QuickDump, toy: Path, pieces: Path, tmp_path: Path, policy: tuple[str, ...]
) -> None:
    """Joined by content: a view belongs to the cached sample, whatever its name is here; partners' too."""
    data = f"{pieces}:some"
    cache = quick_dump(data, [f"{toy}:exact?seed={TEACHER}"], policy=policy, views=2 if policy else 1)
    world = World.of(pieces, cache)
    more = cached(tmp_path, join="content")
    result = train.run(settings(tmp_path, toy, f"{data}?prefix=renamed", **more), quiet=True)
    for epoch, reported in enumerate(result.metrics):
        view = epoch % cache.num_views
        expected = world.losses(cache.policy, view, epoch, np.arange(40), 16, (cache.policy, view))
        agree(reported, expected, ["kd", "ce"])
    joined = cache.join(load_user_file(str(pieces)).some(prefix="renamed"), by="content")
    for i in range(3):
        assert np.array_equal(joined[i][0][0], world.view(cache.policy, i, 0)[0])


# ---- another resolution ---------------------------------------------------------------------------------------------


def with_batches(config: TrainConfig) -> tuple[TrainResult, list[LoadedBatch]]:
    """A run, and every batch that it learned from as it was loaded."""
    seen: list[LoadedBatch] = []

    def noted(prepared: Any, live: Any, loaded: LoadedBatch, *rest: Any) -> Any:
        seen.append(loaded)
        return train.one_step(prepared, live, loaded, *rest)

    return run_with(config, step=noted), seen


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 6, 12])
@pytest.mark.parametrize("mixing", ["", "mixup:alpha=1", "cutmix"])
def test_another_resolution_shows_the_same_boxes(
    quick_dump: QuickDump,
    toy: Path,
    pieces: Path,
    tmp_path: Path,
    size: int,
    mixing: str,
) -> None:
    """The teacher saw six pixels a side; targets and draws stay its own."""
    data, policy = f"{pieces}:some", (*RESIZED, mixing) if mixing else RESIZED
    cache = quick_dump(data, [f"{toy}:exact?seed={TEACHER}"], policy=policy, views=2, view_seed=2)
    result, seen = with_batches(settings(tmp_path, toy, data, eval_data=data, **cached(tmp_path, size=size)))
    world, at_size = World.of(pieces, cache), cache.policy.at_size(size)
    assert at_size.steps[0].parameters["size"] == size
    for batch in seen:
        for place, (i, view) in enumerate(zip(batch.index.tolist(), batch.views.tolist(), strict=True)):
            pixels, _, share = world.view(at_size, i, view)
            assert pixels.shape == (size, size)
            assert np.array_equal(batch.inputs[0][place].numpy(), pixels)
            if mixing == "mixup:alpha=1":
                assert share == world.view(cache.policy, i, view)[2]
    for epoch, reported in enumerate(result.metrics):
        view = epoch % 2
        expected = world.losses(at_size, view, epoch, np.arange(40), 16, (cache.policy, view))
        agree(reported, expected, ["kd", "ce"])
    if size == 6:
        assert at_size == cache.policy


def test_drift_is_looked_for_at_the_teachers_size(
    quick_dump: QuickDump, toy: Path, pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from softcache.data import philox

    data = f"{pieces}:some"
    quick_dump(data, [f"{toy}:exact?seed={TEACHER}"], policy=RESIZED, views=2)
    config = settings(tmp_path, toy, data, **cached(tmp_path, size=12))
    train.run(config, quiet=True)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["drift"] is None
    monkeypatch.setattr(philox, "_ROUNDS", 9)
    with pytest.raises(DriftError):
        train.run(replace(config, out=str(tmp_path / "other")), quiet=True)


def test_a_size_is_the_runs_own(quick_dump: QuickDump, toy: Path, pieces: Path, tmp_path: Path) -> None:
    """It is recorded, saved with the student, and a resume with another one is refused."""
    from softcache.errors import TrainingError

    data = f"{pieces}:some"
    quick_dump(data, [f"{toy}:exact?seed={TEACHER}"], policy=RESIZED, views=2)
    config = settings(tmp_path, toy, data, **cached(tmp_path, size=4))
    train.run(config, quiet=True)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["targets"] == "matched"
    with pytest.raises(TrainingError, match="size was 4, is now 5"):
        train.run(replace(config, size=5), quiet=True)


@pytest.mark.parametrize("more", [{"size": 4}, {"augment": ("resized_crop_flip:size=5",)}], ids=["size", "augment"])
def test_such_a_student_is_evaluated_as_it_was_trained(
    quick_dump: QuickDump, toy: Path, pieces: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    """The run folder knows its size: the whole image at that size, without crop and partner."""
    data = f"{pieces}:some"
    quick_dump(data, [f"{toy}:exact?seed={TEACHER}"], policy=(*RESIZED, "mixup"), views=2)
    config = settings(tmp_path, toy, data, eval_data=data, **cached(tmp_path, student="softcache:mlp?hidden=4", **more))
    trained = train.run(config, quiet=True).evaluation
    again = measure.run(str(tmp_path / "run"), EvalConfig(data=data, threads=1, workers=0), quiet=True)
    assert trained is not None
    assert (again.top1, again.nll) == (trained.top1, trained.nll)
    saved = Policy.from_json(json.loads(read_metadata(tmp_path / "run")["softcache_policy"]), 0)
    assert saved.steps[0].parameters["size"] == more.get("size", 5)


# ---- views of the student's own -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("of_the_cache", [(), MIXUP, ("shift:pixels=1",)], ids=["none", "mixup", "shift"])
@pytest.mark.parametrize("augment", [("rotate:degrees=30",), CUTMIX], ids=["rotate", "cutmix"])
@pytest.mark.parametrize("pinned", [None, 0], ids=["", "pinned"])
def test_augmented_views_are_fresh_and_targets_stay(
    quick_dump: QuickDump,
    toy: Path,
    pieces: Path,
    tmp_path: Path,
    of_the_cache: tuple[str, ...],
    augment: tuple[str, ...],
    pinned: int | None,
) -> None:
    """One fixed target, or V of them in turn, under views that never come back."""
    data, count = f"{pieces}:some", 2 if of_the_cache else 1
    cache = quick_dump(data, [f"{toy}:exact?seed={TEACHER}"], policy=of_the_cache, views=count)
    more: dict[str, Any] = {"augment": augment, "view_seed": 6, "view": pinned}
    result, seen = with_batches(settings(tmp_path, toy, data, **cached(tmp_path, **more)))
    world, own = World.of(pieces, cache), Policy.parse(augment, 6)
    assert [set(batch.views.tolist()) for batch in seen] == [{0}] * 3 + [{1}] * 3 + [{2}] * 3
    for epoch, reported in enumerate(result.metrics):
        target = epoch % count if pinned is None else pinned
        assert reported["view"] == epoch
        expected = world.losses(own, epoch, epoch, np.arange(40), 16, (cache.policy, target))
        agree(reported, expected, ["kd", "ce"])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["targets"] == "mismatched"


def test_augmented_views_are_not_looked_at_for_drift(
    quick_dump: QuickDump, toy: Path, pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody claims that they are the teacher's."""
    from softcache.data import philox

    data = f"{pieces}:some"
    quick_dump(data, [f"{toy}:exact?seed={TEACHER}"], policy=MIXUP, views=2)
    monkeypatch.setattr(philox, "_ROUNDS", 9)
    config = settings(tmp_path, toy, data, **cached(tmp_path, augment=("shift",)))
    train.run(config, quiet=True)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["drift"] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "message"),
    [
        pytest.param({"size": 8}, "--size 8 needs --cache", id="size without a cache"),
        pytest.param({"augment": ("shift",)}, "--augment needs --cache", id="augment without a cache"),
        pytest.param({"cache": "", "size": 8, "augment": ("shift",)}, "--size and --augment cannot", id="both"),
        pytest.param({"cache": "", "policy": ("shift",)}, "--policy and --cache cannot", id="policy"),
        pytest.param({"cache": "", "augment": ("shiftt",)}, "shiftt", id="unknown step"),
        pytest.param({"cache": "", "size": 8}, "no step that sets a size", id="no step with a size"),
        pytest.param(
            {"cache": "", "augment": ("shift",), "view": 2}, "--view 2: the cache has views 0 to 1", id="view"
        ),
        pytest.param({"cache": "", "view": 2}, "--view 2: the cache has views 0 to 1", id="view of its own"),
        pytest.param({"cache": "", "view": -1}, "--view -1: the cache has views 0 to 1", id="negative view"),
    ],
)
def test_what_is_refused(
    quick_dump: QuickDump, toy: Path, pieces: Path, tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    data = f"{pieces}:some"
    quick_dump(data, [f"{toy}:exact?seed={TEACHER}"], policy=CUTMIX, views=2)
    if "cache" in more:
        more = {**more, "cache": str(tmp_path / "cache")}
    with pytest.raises(ConfigError, match=message):
        train.run(settings(tmp_path, toy, data, **more), quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", [0, -4])
def test_impossible_sizes_are_refused(
    quick_dump: QuickDump, toy: Path, pieces: Path, tmp_path: Path, size: int
) -> None:
    quick_dump(f"{pieces}:some", [f"{toy}:exact?seed={TEACHER}"], policy=RESIZED, views=2)
    with pytest.raises(ConfigError, match="size"):
        train.run(settings(tmp_path, toy, f"{pieces}:some", **cached(tmp_path, size=size)), quiet=True)


def test_mixed_losses_are_public() -> None:
    assert losses.mixed_ce is mixed_ce

"""What a cache promises of its logits: every codec within its bound, --max-kl kept by every record, fidelity that is true."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from codec_rows import kl
from conftest import WORLDS
from torch import Tensor

import softcache
from softcache import cli, dump
from softcache.cache.row_table import ReadMode
from softcache.cache.statistics import MemberStatistics
from softcache.check import inspect, verify
from softcache.codecs import CODECS
from softcache.config import DumpConfig, PlanConfig, TrainConfig
from softcache.dump import choose_codec, forecast
from softcache.dump.choose_codec import FITTED_ROWS
from softcache.dump.encode import MEASURED_ROWS
from softcache.errors import (
    CacheError,
    CodecFitError,
    ConfigError,
    LossError,
    PlanMismatchError,
    SoftcacheError,
    TeacherError,
)
from softcache.features.taps import classifier_of
from softcache.files import durable
from softcache.models import load_model
from softcache.spec import load_user_file
from softcache.train import flow as train

MODES: tuple[ReadMode, ...] = ("mmap", "pread")
COUNT, CLASSES, BATCH, SHARD = 300, 64, 64, 256
POLICY = ("shift:pixels=2",)
GRID = (1.0, 2.0, 4.0, 10.0, 20.0)

# one row for each way a codec stores: what --codec takes
ROWS = {
    "float32": "float32",
    "float16": "float16",
    "int8": "int8",
    "headtail": "headtail:k=8,bits=8",
    "headtail, 6 bits": "headtail:k=4,bits=6",
    "headtail, 4 bits": "headtail:k=16,bits=4",
    "topk": "topk:k=10",
    "topset": "topset:k=10",
    "lowrank": "lowrank:max_kl=0.001,at_temperature=4",
    "linear_head": "linear_head",
    "linear_head, int8": "linear_head:dtype=int8",
    "linear_head, groups": "linear_head:group=8",
}
COMPLETE = [row for row, text in ROWS.items() if not text.startswith("top")]
over_rows = pytest.mark.parametrize("row", ROWS)
QUICK = ("float16", "headtail", "topk", "lowrank")  # one of each kind; the others in the full run
over_quick_rows = pytest.mark.parametrize(
    "row", [row if row in QUICK else pytest.param(row, marks=pytest.mark.slow) for row in ROWS]
)


@pytest.fixture(scope="module")
def pieces() -> Path:
    return WORLDS / "narrow_64.py"


def config(
    pieces: Path, out: Path, data: str = "images", teacher: str | tuple[str, ...] = "narrow", **more: Any
) -> Any:
    names = (teacher,) if isinstance(teacher, str) else teacher
    settings: dict[str, Any] = {
        "batch_size": BATCH,
        "shard_rows": SHARD,
        "threads": 1,
        "workers": 0,
        "device": "cpu",
    } | more
    return DumpConfig(
        data=f"{pieces}:{data}", teacher=tuple(f"{pieces}:{name}" for name in names), out=str(out), **settings
    )


def dumped(*arguments: Any, **settings: Any) -> softcache.Cache:
    return softcache.open(dump.run(config(*arguments, **settings), quiet=True).path)


@pytest.fixture(scope="module")
def caches(pieces: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, softcache.Cache]:
    """Row of ROWS -> a cache of two views in two parts."""
    folder = tmp_path_factory.mktemp("caches")
    return {
        row: dumped(pieces, folder / str(number), codec=text, policy=POLICY, views=2)
        for number, (row, text) in enumerate(ROWS.items())
    }


def batches(count: int = COUNT) -> Iterator[slice]:
    """The rows of every batch of one view, in the order of the dump: none crosses a part's border."""
    for start in range(0, count, SHARD):
        stop = min(start + SHARD, count)
        yield from (slice(begin, min(begin + BATCH, stop)) for begin in range(start, stop, BATCH))


def live(pieces: Path, cache: softcache.Cache, teacher: Any = None, data: Any = None, view: int = 0) -> Tensor:
    """(N, C) float32 logits of every row of the cache, computed in the dump's own batches."""
    module = load_user_file(pieces)
    teacher, data = teacher or module.narrow(), data or module.images()
    index = [int(cache.samples.key(row)[5:]) for row in range(len(cache))]
    seen = [cache.policy.render(data.images[i], int(cache.samples.ids[row]), view) for row, i in enumerate(index)]
    found = []
    with torch.inference_mode():
        for part in batches(len(seen)):
            if hasattr(teacher, "collate"):
                found.append(teacher(teacher.collate(seen[part])))
            else:
                flat = np.stack([image.astype(np.float32).ravel() for image in seen[part]])
                found.append(torch.from_numpy(teacher(flat)).float())
    return torch.cat(found)


def whole_view(cache: softcache.Cache, view: int = 0) -> Any:
    return cache.gather(np.arange(len(cache)), np.full(len(cache), view))


def eps_of(cache: softcache.Cache, view: int = 0) -> np.ndarray:
    (member,) = cache.members
    return cache.eps(member, np.arange(len(cache)), np.full(len(cache), view)).astype(np.float64)


# ---------------------------------------------------------------------------------------------------------- every codec


def test_every_codec_has_a_row() -> None:
    assert {text.split(":")[0] for text in ROWS.values()} == set(CODECS)


@pytest.mark.slow
@pytest.mark.parametrize("row", COMPLETE)
def test_cached_logits_are_the_live_ones_within_eps(pieces: Path, caches: dict[str, softcache.Cache], row: str) -> None:
    cache = caches[row]
    worst = 0.0
    for view in (0, 1):
        given, eps = live(pieces, cache, view=view).double(), eps_of(cache, view)
        stored = whole_view(cache, view).logits()
        assert stored.dtype == torch.float32 and stored.shape == (COUNT, CLASSES)
        apart = (stored.double() - given).abs().amax(dim=1).numpy()
        assert (apart <= eps).all()
        assert eps.max() < 1.0 and given.std() > 2
        assert (apart.max() == 0) == (row == "float32")
        worst = max(worst, eps.max())
    assert cache.manifest.statistics["narrow"].max_eps == worst
    assert len(cache.manifest.plan.rounds[0].layout) == 2


def test_topk_keeps_the_largest_and_the_mass_of_the_rest(pieces: Path, caches: dict[str, softcache.Cache]) -> None:
    cache = caches["topk"]
    for view in (0, 1):
        given = live(pieces, cache, view=view).double().numpy()
        order = np.argsort(-given, axis=1, kind="stable")
        targets = whole_view(cache, view)
        for t in (1.0, 2.0, 4.0, 8.0):
            ids, logits, tail = (value.double().numpy() for value in targets.head("narrow", t))
            assert np.array_equal(ids, order[:, :10])
            below = given - given.max(axis=1, keepdims=True)
            exact = np.take_along_axis(below, order[:, :10], axis=1)
            assert (np.abs(logits - exact) <= -exact * 2.5 * 2**-10).all()
            others = np.take_along_axis(below, order[:, 10:], axis=1) / t
            rest = np.log(np.exp(others).sum(axis=1))
            assert np.abs(tail - rest).max() <= (np.log(CLASSES - 10) - rest).max() * 2**-11 + 1e-5
    with pytest.raises(CacheError, match="keeps 10 of 64 classes only"):
        whole_view(cache).logits()
    with pytest.raises(CacheError, match="has no bound"):
        cache.eps("narrow", np.arange(2), np.zeros(2, np.int64))


def test_topset_keeps_the_largest_and_the_mass_of_the_rest(pieces: Path, caches: dict[str, softcache.Cache]) -> None:
    cache = caches["topset"]
    assert cache.manifest.plan.format == 2
    given = live(pieces, cache).double()
    below, targets = given - given.amax(dim=1, keepdim=True), whole_view(cache)
    best = below.topk(10, dim=1)
    for t in (1.0, 2.0, 4.0, 8.0):
        ids, logits, tail = targets.head("narrow", t)
        assert torch.equal(ids.sort(dim=1).values, best.indices.sort(dim=1).values)
        assert torch.equal(ids[:, 0], best.indices[:, 0])
        reach = -best.values[:, 9:]
        assert bool(((logits - below.gather(1, ids)).abs() <= reach / 508 + 1e-5).all())
        rest = (below / t).scatter(1, ids, -torch.inf).logsumexp(dim=1)
        assert float((tail - rest).abs().max()) <= (np.log(CLASSES - 10) - float(rest.min())) * 2**-11 + 1e-5
    statistics = cache.manifest.statistics["narrow"]
    both = torch.cat([given, live(pieces, cache, view=1).double()])
    for t in (1.0, 2.0, 4.0, 8.0):
        inside = (both / t).softmax(dim=1).topk(10, dim=1).values.sum(dim=1).mean()
        assert statistics.mean_kept[t] == pytest.approx(float(inside), abs=2e-3)
    assert caches["topk"].manifest.statistics["narrow"].kept == {}  # version 1 has no place for it
    with pytest.raises(ValueError, match="1, 2, 4 and 8 alone, not 3"):
        targets.log_probs("narrow", 3.0)


def test_linear_head_in_groups_keeps_the_layer_in_16_bits(pieces: Path, caches: dict[str, softcache.Cache]) -> None:
    layer, cache = load_user_file(pieces).narrow().fc, caches["linear_head, groups"]
    (file,) = cache.manifest.files_of("constants", "narrow")
    assert file.arrays["codec_weight"].dtype == "<f2" and cache.manifest.plan.format == 2
    kept = cache.classifier("narrow")
    assert kept is not None and torch.equal(kept[0], layer.weight.detach().half().float())


@pytest.mark.parametrize("row", ["linear_head", "linear_head, int8"])
def test_linear_head_keeps_the_layer_once(pieces: Path, caches: dict[str, softcache.Cache], row: str) -> None:
    layer, kept = load_user_file(pieces).narrow().fc, caches[row].classifier("narrow")
    assert kept is not None and torch.equal(kept[0], layer.weight.detach())
    assert kept[1] is not None and torch.equal(kept[1], layer.bias.detach())
    assert caches["int8"].classifier("narrow") is None


@over_rows
def test_gathers_of_any_order_views_and_read_mode_agree(caches: dict[str, softcache.Cache], row: str) -> None:
    cache = caches[row]
    draw = np.random.default_rng(3)
    rows, views = draw.integers(0, COUNT, 200), draw.integers(0, 2, 200)
    rows[:4], views[:4] = [255, 256, 255, 299], [0, 1, 1, 0]  # both sides of the border of two parts
    wanted = torch.stack([whole_view(cache, view).log_probs("narrow", 4.0) for view in (0, 1)])
    wanted = wanted[torch.from_numpy(views), torch.from_numpy(rows)]
    for mode in MODES:
        found = softcache.open(cache.reader.path, mode=mode).gather(rows, views)
        # a product's sums may run in another order in another batch; the bound counts it in
        torch.testing.assert_close(found.log_probs("narrow", 4.0), wanted, rtol=0, atol=2e-6)
    assert not torch.equal(wanted[0], wanted[2])


def run_config(pieces: Path, cache: softcache.Cache, out: Path, *loss: str, **more: Any) -> TrainConfig:
    settings: dict[str, Any] = {"epochs": 1, "threads": 1, "workers": 0, "device": "cpu", "batch_size": 512} | more
    return TrainConfig(
        data=f"{pieces}:images",
        student=f"{pieces}:student",
        cache=str(cache.reader.path),
        loss=loss,
        out=str(out),
        **settings,
    )


@pytest.mark.slow
@pytest.mark.parametrize("row", COMPLETE)
def test_training_sees_the_live_loss_within_the_codecs_bound(
    pieces: Path, caches: dict[str, softcache.Cache], tmp_path: Path, row: str
) -> None:
    """One step at a learning rate of nothing: kd and mse_logits of the initial student against the live teacher."""
    cache = caches[row]
    losses = ("kd:temperature=4", "mse_logits:weight=0.1")
    result = train.run(run_config(pieces, cache, tmp_path / "run", *losses, lr=1e-30), quiet=True)
    given, eps = live(pieces, cache).double(), torch.from_numpy(eps_of(cache))
    student = student_logits(pieces, cache, tmp_path / "run")
    log_p, log_q = (given / 4).log_softmax(dim=1), (student / 4).log_softmax(dim=1)
    kd = 16 * (log_p.exp() * (log_p - log_q)).sum(dim=1).mean().item()
    difference = given - student
    span = difference.amax(dim=1) - difference.amin(dim=1)
    bound = (eps * span / 2 + eps**2 / 2).mean().item()
    assert result.metrics[0]["kd"] == pytest.approx(kd, abs=bound + 1e-5)
    mse = difference.square().mean().item()
    of_mse = (2 * eps * difference.abs().mean(dim=1) + eps**2).mean().item()
    assert result.metrics[0]["mse_logits"] == pytest.approx(mse, abs=of_mse + 1e-4)
    assert kd > 1 and mse > 1


def student_logits(pieces: Path, cache: softcache.Cache, run: Path) -> Tensor:
    """(N, C) float64 logits of the trained student on view 0, in the order of the cache's rows."""
    model = load_model(f"{pieces}:student@{run}", num_classes=CLASSES).eval()
    data = load_user_file(pieces).images()
    index = [int(cache.samples.key(row)[5:]) for row in range(len(cache))]
    seen = [cache.policy.render(data.images[i], int(cache.samples.ids[row]), 0) for row, i in enumerate(index)]
    with torch.no_grad():
        logits: Tensor = model(model.input.collate(seen)).double()
    return logits


@pytest.mark.parametrize("row", ["topk", "topset"])
def test_training_on_the_largest_classes_sees_the_lower_bound(
    pieces: Path, caches: dict[str, softcache.Cache], tmp_path: Path, row: str
) -> None:
    cache = caches[row]
    config = run_config(pieces, cache, tmp_path / "run", "kd_lower_bound:temperature=2", lr=1e-30)
    found = train.run(config, quiet=True).metrics[0]["kd_lower_bound"]
    p = (live(pieces, cache).double() / 2).softmax(dim=1)
    q = (student_logits(pieces, cache, tmp_path / "run") / 2).softmax(dim=1)
    ids = p.topk(10, dim=1).indices
    p_all, q_all = (torch.cat([x.gather(1, ids), 1 - x.gather(1, ids).sum(1, keepdim=True)], dim=1) for x in (p, q))
    bound = 4 * (p_all * (p_all / q_all).log()).sum(dim=1).mean().item()
    whole = 4 * (p * (p / q).log()).sum(dim=1).mean().item()
    assert found == pytest.approx(bound, rel=2e-3)
    assert bound < whole * 0.999


@pytest.mark.slow
@over_quick_rows
def test_an_epoch_of_steps_learns(pieces: Path, caches: dict[str, softcache.Cache], tmp_path: Path, row: str) -> None:
    loss = "kd" if row in COMPLETE else "kd_lower_bound"
    settings = {"batch_size": 32, "epochs": 3, "view": 0, "lr": 0.05, "read": "pread"}
    result = train.run(
        run_config(
            pieces, caches[row], tmp_path / "run", f"{loss}:temperature={2 if row == 'topset' else 4}", **settings
        ),
        quiet=True,
    )
    assert 0 < result.metrics[-1]["loss"] < 0.8 * result.metrics[0]["loss"]


# losses that a cache cannot serve: (cache, loss, message)
MISFITS = {
    "kd on topk": ("topk", "kd:temperature=4", r"'kd' needs the logits of every class"),
    "soft_ce on topk": ("topk", "soft_ce:temperature=2", r"'soft_ce' needs the logits of every class"),
    "mse_logits on topk": ("topk", "mse_logits", r"'mse_logits' needs the logits of every class"),
    "bce on topk": ("topk", "bce", r"'bce' needs the logits of every class"),
    "kd_lower_bound at T=20": ("topk", "kd_lower_bound:temperature=20", r"from 1 to 8, kd_lower_bound asks for 20"),
    "kd_lower_bound of little": ("topset", "kd_lower_bound:temperature=4", r"hold 40\.\d% of the probability at T=4"),
    "kd_lower_bound between temperatures": (
        "topset",
        "kd_lower_bound:temperature=3",
        r"temperatures 1, 2, 4 and 8 alone, kd_lower_bound asks for 3",
    ),
    "kd_lower_bound over temperatures": (
        "topset",
        "kd_lower_bound:temperature=linear(4, 2)",
        r"temperatures 1, 2, 4 and 8 alone, kd_lower_bound asks for all from 2 to 4",
    ),
    "kd_lower_bound at T=0.5": ("topk", "kd_lower_bound:temperature=0.5", r"from 1 to 8, kd_lower_bound asks for 0\.5"),
    **{
        f"kd_lower_bound on {row}": (row, "kd_lower_bound:temperature=4", "for caches that keep some classes")
        for row in COMPLETE
    },
}


@pytest.fixture
def no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training that comes as far as an optimiser fails."""
    monkeypatch.setattr(torch.optim.Optimizer, "__init__", lambda *_: pytest.fail("refused too late"))


@pytest.mark.usefixtures("no_step")
@pytest.mark.parametrize("case", MISFITS)
def test_a_loss_that_a_codec_cannot_serve_is_refused_before_the_first_step(
    pieces: Path, caches: dict[str, softcache.Cache], tmp_path: Path, case: str
) -> None:
    row, loss, message = MISFITS[case]
    with pytest.raises(LossError, match=message) as raised:
        train.run(run_config(pieces, caches[row], tmp_path / "run", loss), quiet=True)
    assert raised.value.tip


@pytest.mark.usefixtures("no_step")
def test_teachers_without_level_and_several_top_k_members_are_refused(pieces: Path, tmp_path: Path) -> None:
    probs = dumped(pieces, tmp_path / "probs", teacher="narrow?gives=probs", codec="int8")
    with pytest.raises(LossError, match="'mse_logits' needs the level of the logits; member 'narrow' gave probs"):
        train.run(run_config(pieces, probs, tmp_path / "run", "mse_logits"), quiet=True)
    two = dumped(pieces, tmp_path / "two", teacher=("narrow", "narrow?seed=2"), codec="topk:k=5")
    with pytest.raises(LossError, match="takes one teacher"):
        train.run(run_config(pieces, two, tmp_path / "run", "kd_lower_bound:temperature=4"), quiet=True)


def test_one_of_several_top_k_members_can_be_learned_from(pieces: Path, tmp_path: Path) -> None:
    two = dumped(pieces, tmp_path / "two", teacher=("narrow", "narrow?seed=2"), codec="topk:k=5")
    losses = [
        train.run(
            run_config(pieces, two, tmp_path / member, "kd_lower_bound:temperature=4", members=(member,), lr=1e-30),
            quiet=True,
        ).metrics[0]["loss"]
        for member in two.members
    ]
    assert 0 < min(losses) < max(losses)


@pytest.mark.slow
@over_rows
@pytest.mark.parametrize(("where", "order"), [(3, "natural"), (250, "permuted")])
def test_logits_that_are_not_finite_name_the_sample(
    pieces: Path, tmp_path: Path, row: str, where: int, order: str
) -> None:
    """Whether it is in the first batch or later."""
    out = tmp_path / "c"
    with pytest.raises(TeacherError, match=rf"'narrow' gave logits that are not finite for .*some/{where:03d}"):
        dumped(pieces, out, f"images?marked={where}", "narrow?value=inf", codec=ROWS[row], order=order, batch_size=32)
    assert not (out / "manifest.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("row", ["lowrank", "linear_head"])
def test_not_finite_behind_the_rows_of_the_fit(pieces: Path, tmp_path: Path, row: str) -> None:
    data = f"images?count={FITTED_ROWS + 9}&marked={FITTED_ROWS + 7}"
    with pytest.raises(TeacherError, match=f"not finite for 1 samples of this batch: some/{FITTED_ROWS + 7}"):
        dumped(pieces, tmp_path / "c", data, "narrow?value=nan", codec=ROWS[row], order="natural")


@pytest.mark.slow
@over_quick_rows
def test_inspect_verify_and_card(
    caches: dict[str, softcache.Cache], row: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, path = caches[row], str(caches[row].reader.path)
    codec = cache.codecs["narrow"]
    assert cli.main(["inspect", path]) == 0
    shown = capsys.readouterr().out
    (line,) = [one for one in shown.splitlines() if one.startswith("narrow")]
    assert codec.name in line and ("none" in line) == (not codec.bounded)
    assert all(f"{key}={value}" in shown for key, value in codec.parameters.items())
    assert cli.main(["inspect", path, "--json"]) == 0
    statistics = json.loads(capsys.readouterr().out)["statistics"]["narrow"]
    assert set(statistics["kl"]) == {f"{t:g}" for t in GRID if codec.serves(t)}
    key = cache.samples.key(17)
    assert cli.main(["inspect", path, "--sample", key, "--view", "1"]) == 0
    shown = capsys.readouterr().out
    shares = cache.gather(np.array([17]), np.array([1])).log_probs("narrow", 1.0)[0].exp()
    first = next(line for line in shown.splitlines() if line.lstrip("* ").startswith(f"c{int(shares.argmax()):02d}"))
    assert f"{100 * shares.max().item():.2f} %" in first
    assert ("T=20" in shown) == codec.serves(20.0)
    assert cli.main(["verify", path, "--full"]) == 0
    assert "whole" in capsys.readouterr().out
    (line,) = [one for one in (Path(path) / "README.md").read_text().splitlines() if one.startswith("| narrow")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[3].startswith(codec.name)
    s = cache.manifest.statistics["narrow"]
    assert cells[4] == (f"{s.max_eps:.3g}" if codec.bounded else "none")
    assert cells[5] == f"{s.mean_kl('1'):.2g} / {s.mean_kl('4'):.2g} nats"


# ------------------------------------------------------------------------------------------------- rows kept dense

MANY = FITTED_ROWS + 300
SPIKY = tuple(range(FITTED_ROWS + 2, MANY, 4))  # behind the rows of the fit, in the last two parts and several batches
DENSE: dict[str, Any] = {
    "data": f"images?count={MANY}&marked={','.join(map(str, SPIKY))}",
    "teacher": "narrow?spikes=6",
    "codec": "lowrank:max_kl=0.0001,at_temperature=4",
    "order": "natural",
    "policy": POLICY,
    "views": 2,
}


@pytest.fixture(scope="module")
def dense_cache(pieces: Path, tmp_path_factory: pytest.TempPathFactory) -> softcache.Cache:
    """The fit does not see the rows that are off its plane."""
    return dumped(pieces, tmp_path_factory.mktemp("dense") / "c", **DENSE)


def dense_numbers(cache: softcache.Cache, view: int) -> np.ndarray:
    """(N,) 0, or the number of each record's dense row within its part."""
    (place,) = [field for field in cache.codecs["narrow"].fields if field.name == "dense"]
    records = cache.reader.gather("narrow", "records", np.arange(len(cache)), np.full(len(cache), view))
    return np.ascontiguousarray(records[:, place.offset : place.offset + 4]).view("<u4")[:, 0]


def spiky_live(pieces: Path, cache: softcache.Cache, view: int) -> Tensor:
    module = load_user_file(pieces)
    return live(pieces, cache, module.narrow(spikes=6.0), module.images(MANY, SPIKY), view)


@pytest.mark.slow
def test_dense_rows_are_numbered_through_batches_views_and_parts(pieces: Path, dense_cache: softcache.Cache) -> None:
    cache = dense_cache
    numbers = np.stack([dense_numbers(cache, view) for view in (0, 1)])
    counts = []
    for part, (start, stop) in [(8, (2048, 2304)), (9, (2304, MANY))]:
        kept = numbers[:, start:stop].ravel()  # view by view, row by row
        kept = kept[kept > 0]
        assert np.array_equal(kept, np.arange(1, len(kept) + 1))
        with h5py.File(cache.reader.path / f"members/narrow/dense-{part:05d}.h5") as file:
            stored = file["logits"][:]
        assert stored.dtype == np.float16 and stored.shape == (len(kept), CLASSES)
        given = torch.cat([spiky_live(pieces, cache, view)[start:stop] for view in (0, 1)])
        given = given[torch.from_numpy(numbers[:, start:stop].ravel() > 0)]
        offsets = given - given.amax(dim=1, keepdim=True)
        relative = torch.from_numpy(stored).float()
        relative = relative - relative.amax(dim=1, keepdim=True)
        assert (relative - offsets).abs().max() < 0.02 and offsets.abs().max() > 10
        counts.append(len(kept))
    assert min(counts) > 4 and counts[0] > 2 * (BATCH // 8)
    assert set(np.flatnonzero((numbers > 0).any(axis=0))) & set(SPIKY)
    assert cache.manifest.statistics["narrow"].dense == sum(counts)
    described: Any = inspect.describe(cache.reader.path)
    assert described["statistics"]["narrow"]["dense"] == sum(counts)


@pytest.mark.slow
def test_gathers_mix_dense_rows_and_others_in_any_order(pieces: Path, dense_cache: softcache.Cache) -> None:
    cache = dense_cache
    given = torch.stack([spiky_live(pieces, cache, view) for view in (0, 1)])
    draw = np.random.default_rng(1)
    rows, views = draw.integers(FITTED_ROWS, MANY, 500), draw.integers(0, 2, 500)
    wanted = given[torch.from_numpy(views), torch.from_numpy(rows)].double()
    for mode in MODES:
        opened = softcache.open(cache.reader.path, mode=mode)
        stored = opened.gather(rows, views).logits().double()
        assert ((stored - wanted).abs().amax(dim=1).numpy() <= opened.eps("narrow", rows, views)).all()
        assert kl(wanted, stored, 4.0).max() <= 1e-4 * (1 + 1e-6)
    numbers = dense_numbers(cache, 0)
    for chosen in (np.flatnonzero(numbers), np.flatnonzero(numbers == 0)[:7], np.flatnonzero(numbers)[:1]):
        stored = cache.gather(chosen, np.zeros(len(chosen), np.int64)).logits().double()
        wanted = given[0][torch.from_numpy(chosen)].double()
        assert ((stored - wanted).abs().amax(dim=1).numpy() <= eps_of(cache)[chosen]).all()


@pytest.mark.slow
def test_verify_finds_one_flipped_bit_among_the_dense_rows(dense_cache: softcache.Cache, tmp_path: Path) -> None:
    path = tmp_path / "c"
    shutil.copytree(dense_cache.reader.path, path)
    assert verify.run(path, full=True, quiet=True).state == "whole"
    name = "members/narrow/dense-00009.h5"
    (file,) = [one for one in dense_cache.manifest.files if one.path == name]
    whole = bytearray((path / name).read_bytes())
    whole[file.arrays["logits"].offset + 5] ^= 1
    (path / name).write_bytes(whole)
    verdict = verify.run(path, full=True, quiet=True)
    assert verdict.exit_code == 1 and any(name in fault and "logits" in fault for fault in verdict.faults)
    (path / name).unlink()
    verdict = verify.run(path, full=False, quiet=True)
    assert verdict.exit_code == 1 and any(name in fault for fault in verdict.faults)


class Killed(BaseException):
    """Stands for SIGKILL: no cleaning up runs, except locks, which a dead process cannot hold."""


def bytes_of(cache: softcache.Cache) -> dict[str, str]:
    """Path -> sha256 of everything that the manifest names, and of the manifest."""
    names = [*(file.path for file in cache.manifest.files), "manifest.json", "README.md"]
    return {name: hashlib.sha256((cache.reader.path / name).read_bytes()).hexdigest() for name in names}


def kill_at_journal_line(patch: pytest.MonkeyPatch, number: int) -> None:
    append, lines = durable.append_line, 0

    def counted(path: Path, line: bytes) -> None:
        nonlocal lines
        lines += 1
        if lines == number:
            raise Killed
        append(path, line)

    patch.setattr(durable, "append_line", counted)


@pytest.mark.slow
@pytest.mark.parametrize("line", [1, 2])
def test_a_resume_writes_the_same_dense_rows(
    pieces: Path, dense_cache: softcache.Cache, tmp_path: Path, line: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        kill_at_journal_line(patch, line)
        with pytest.raises(Killed):
            dumped(pieces, tmp_path / "c", **DENSE)
        assert not (tmp_path / "c" / "manifest.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose_codec.Prober, "fitting_rows", None)  # what was fitted lies on disk: it is not fitted again
        assert bytes_of(dumped(pieces, tmp_path / "c", **DENSE)) == bytes_of(dense_cache)


@pytest.mark.slow
def test_parts_in_any_order_write_the_same_dense_rows(
    pieces: Path, dense_cache: softcache.Cache, tmp_path: Path
) -> None:
    assert dump.run(config(pieces, tmp_path / "c", part="2/2", **DENSE), quiet=True).manifest is None
    assert bytes_of(dumped(pieces, tmp_path / "c", part="1/2", **DENSE)) == bytes_of(dense_cache)


@pytest.mark.slow
def test_more_views_number_their_own_dense_rows(pieces: Path, dense_cache: softcache.Cache, tmp_path: Path) -> None:
    dumped(pieces, tmp_path / "c", **DENSE | {"views": 1})
    grown = dumped(pieces, tmp_path / "c", **DENSE | {"codec": None, "policy": (), "order": "permuted"}, extend=True)
    for view in (0, 1):
        one, other = (whole_view(cache, view).logits() for cache in (dense_cache, grown))
        assert torch.equal(one, other)
    assert grown.manifest.statistics["narrow"].dense == dense_cache.manifest.statistics["narrow"].dense


# ---------------------------------------------------------------------------------------------------------- the promise


def of_float16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float64)


def affine(x: np.ndarray, lowest: np.ndarray, highest: np.ndarray, bits: int) -> np.ndarray:
    step = (highest - lowest) / (2**bits - 1)
    return lowest + step * np.clip(np.round((x - lowest) / np.where(step > 0, step, 1)), 0, 2**bits - 1)


def of_int8(x: np.ndarray) -> np.ndarray:
    return affine(x, x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True), 8)


def of_headtail(x: np.ndarray, k: int, bits: int) -> np.ndarray:
    order = np.argsort(-x, axis=1, kind="stable")
    top = np.take_along_axis(x, order[:, :1], axis=1)
    tail = np.take_along_axis(x, order[:, k : k + 1], axis=1)
    decoded = affine(x, x.min(axis=1, keepdims=True), tail, bits)
    head = top - (top - np.take_along_axis(x, order[:, :k], axis=1)).astype(np.float16)
    np.put_along_axis(decoded, order[:, :k], head, axis=1)
    return decoded


ID_BYTES = {8: 6, 16: 12}  # of k ids of 6 bits
ORACLES: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {  # text -> bytes with eps, decode(encode(.))
    "float32": (4 * CLASSES + 2, lambda x: x),
    "float16": (2 * CLASSES + 2, of_float16),
    "int8": (CLASSES + 8 + 2, of_int8),
    "headtail:k=8,bits=8": (12 + 14 + ID_BYTES[8] + CLASSES + 2, lambda x: of_headtail(x, 8, 8)),
    "headtail:k=16,bits=6": (12 + 30 + ID_BYTES[16] + 6 * CLASSES // 8 + 2, lambda x: of_headtail(x, 16, 6)),
    "headtail:k=16,bits=4": (12 + 30 + ID_BYTES[16] + 4 * CLASSES // 8 + 2, lambda x: of_headtail(x, 16, 4)),
}


def worst_kl(given: np.ndarray, decoded: np.ndarray, temperature: float) -> float:
    return float(kl(torch.from_numpy(given), torch.from_numpy(decoded), temperature).max())


def holding(given: np.ndarray, max_kl: float, temperature: float) -> dict[str, int]:
    """Bytes of a record of every codec of ORACLES whose worst KL on these rows is at most half of what is promised."""
    x = given.astype(np.float64)
    return {
        text: nbytes
        for text, (nbytes, through) in ORACLES.items()
        if 2 * worst_kl(x, through(x), temperature) <= max_kl
    }


PROMISES = [(1e-4, 4.0), (3e-6, 4.0), (1e-6, 4.0), (1e-4, 1.0), (1e-13, 4.0)]


def test_the_promises_below_pick_different_codecs(pieces: Path) -> None:
    data, teacher = load_user_file(pieces).images(), load_user_file(pieces).noise()
    given = teacher(data.images.reshape(COUNT, -1).astype(np.float32)).astype(np.float32)
    picks = set()
    for promise in PROMISES:
        held = holding(given, *promise)
        picks.add(min(held, key=lambda text: held[text]))
    assert len(picks) >= 4 and "float32" in picks


@pytest.mark.slow
@pytest.mark.parametrize(("max_kl", "temperature"), PROMISES)
def test_the_smallest_codec_that_holds_on_the_probe_is_picked(
    pieces: Path, tmp_path: Path, max_kl: float, temperature: float
) -> None:
    """Of the plain codecs, of which float64 says what they keep."""
    asked: dict[str, Any] = {"teacher": "noise", "policy": POLICY, "views": 2, "max_kl": max_kl}
    asked |= {"at_temperature": temperature}
    given = config(pieces, tmp_path / "plan", **asked)
    planned = PlanConfig(**{f.name: getattr(given, f.name) for f in fields(PlanConfig)})
    picked = forecast.run(planned, codecs=tuple(ORACLES), trial_rows=(BATCH, BATCH)).chosen
    cache = dumped(pieces, tmp_path / "c", codec=picked, **asked)
    teacher = load_user_file(pieces).noise()
    held = holding(live(pieces, cache, teacher).numpy(), max_kl, temperature)
    assert cache.codecs["noise"].text == picked == min(held, key=lambda text: held[text])
    file = next(cache.manifest.files_of("member", "noise"))
    stored = sum(a.nbytes for name, a in file.arrays.items() if not name.endswith("_crc32"))
    assert stored == held[cache.codecs["noise"].text] * 2 * SHARD
    for view in (0, 1):
        given = live(pieces, cache, teacher, view=view)
        assert kl(given, whole_view(cache, view).logits(), temperature).max() <= max_kl


@pytest.mark.slow
@pytest.mark.parametrize(("max_kl", "temperature"), [(1e-3, 4.0), (1e-4, 2.0)])
def test_the_picked_codec_takes_the_least_space_constants_counted_in(
    pieces: Path, tmp_path: Path, max_kl: float, temperature: float
) -> None:
    """A final layer or a basis is stored once: it pays for many records, and not for few."""
    settings: dict[str, Any] = {"max_kl": max_kl, "at_temperature": temperature, "policy": POLICY}
    few = dumped(pieces, tmp_path / "few", **settings)
    many = dumped(pieces, tmp_path / "many", views=6, **settings)
    given = live(pieces, few)
    held = holding(given.numpy(), max_kl, temperature)
    plain = min(held, key=lambda text: held[text])
    assert few.codecs["narrow"].text == plain
    assert many.codecs["narrow"].name in ("lowrank", "linear_head")
    for cache, views, text in ((few, 1, many.codecs["narrow"].text), (many, 6, plain)):
        other = dumped(pieces, tmp_path / f"other-{views}", codec=text, policy=POLICY, views=views)
        assert cache.manifest.nbytes < other.manifest.nbytes
    for view in range(6):
        stored = whole_view(many, view).logits()
        assert kl(live(pieces, many, view=view), stored, temperature).max() <= max_kl


@pytest.mark.slow
def test_one_codec_holds_for_every_member(pieces: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_kl": 2e-5, "at_temperature": 4.0}
    teachers = ("noise?scale=0.3&name=easy", "noise?scale=8&name=hard")
    alone = dumped(pieces, tmp_path / "easy", teacher=teachers[0], **settings)
    cache = dumped(pieces, tmp_path / "both", teacher=teachers, **settings)
    texts = {member: cache.codecs[member].text for member in cache.members}
    assert len(set(texts.values())) == 1 and texts["easy"] != alone.codecs["easy"].text
    targets = whole_view(cache)
    for member, scale in (("easy", 0.3), ("hard", 8.0)):
        given = live(pieces, cache, load_user_file(pieces).noise(scale))
        assert kl(given, targets.logits(member), 4.0).max() <= 2e-5


BROKEN = ["float16", "int8", "headtail:k=8,bits=4", "linear_head:dtype=int8", "topk:k=10"]


@pytest.mark.slow
@pytest.mark.parametrize("codec", BROKEN)
def test_a_broken_promise_stops_the_dump(
    pieces: Path, tmp_path: Path, codec: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says which samples of the batch, and what it saw; nothing is committed, and the same again is refused again."""
    out, max_kl = tmp_path / "c", {"float16": 1e-9, "topk:k=10": 1e-4}.get(codec, 1e-6)
    argv = ["dump", "--data", f"{pieces}:images", "--teacher", f"{pieces}:narrow", "--out", str(out), "--quiet"]
    argv += ["--codec", codec, "--batch-size", str(BATCH), "--shard-rows", str(SHARD), "--threads", "1"]
    argv += ["--device", "cpu", "--max-kl", str(max_kl), "--at-temperature", "2"]
    assert cli.main(argv) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told and f"does not keep KL <= {max_kl:g} at T=2" in told and "tip: " in told
    assert not (out / "manifest.json").exists()
    whole = dumped(pieces, tmp_path / "whole", codec=codec)
    given, targets = live(pieces, whole)[:BATCH], whole_view(whole)
    if codec.startswith("topk"):
        found = kl(given / 2, targets.log_probs("narrow", 2.0)[:BATCH], 1.0)
    else:
        found = kl(given, targets.logits()[:BATCH], 2.0)
    broken = [whole.samples.key(int(row)) for row in np.flatnonzero(found > max_kl)]
    named = ", ".join(broken[:5])
    assert f"KL {found.max():.3g} for {len(broken)} samples of this batch: {named}" in told
    assert cli.main(argv) == 2
    with pytest.raises(SoftcacheError):
        softcache.open(out)


def test_a_promise_kept_by_a_named_codec_stands_in_the_manifest(pieces: Path, tmp_path: Path) -> None:
    """The records stay the same; the divergence at the promise's temperature is measured too."""
    plain = dumped(pieces, tmp_path / "plain", codec="int8")
    promised = dumped(pieces, tmp_path / "promised", codec="int8", max_kl=1e-2, at_temperature=3.0)
    assert plain.member("narrow").promise is None
    assert promised.member("narrow").promise == {"max_kl": "0.01", "at_temperature": "3.0"}
    shards = [name for name in bytes_of(plain) if name.endswith(".h5")]
    assert [bytes_of(promised)[name] for name in shards] == [bytes_of(plain)[name] for name in shards]
    found = kl(live(pieces, promised), whole_view(promised).logits(), 3.0)[measured_rows()]
    statistics = promised.manifest.statistics["narrow"]
    assert set(statistics.kl) == {"1", "2", "3", "4", "10", "20"}
    assert statistics.kl["3"].worst == pytest.approx(found.max(), rel=1e-7)
    assert statistics.mean_kl("3") == pytest.approx(found.mean(), rel=1e-7)


@pytest.mark.slow
def test_lowrank_takes_the_promise_as_its_own_and_keeps_failing_rows(pieces: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = DENSE | {"codec": "lowrank", "views": 1}
    cache = dumped(pieces, tmp_path / "c", max_kl=2e-5, at_temperature=2.0, **settings)
    assert cache.codecs["narrow"].parameters == {"max_kl": "2e-05", "at_temperature": "2.0"}
    given, numbers = spiky_live(pieces, cache, 0), dense_numbers(cache, 0)
    assert kl(given, whole_view(cache).logits(), 2.0).max() <= 2e-5 * (1 + 1e-6)
    kept = int((numbers > 0).sum())
    assert 0 < kept < 150
    statistics = cache.manifest.statistics["narrow"]
    assert statistics.dense == kept
    dense_files = list(cache.manifest.files_of("dense", "narrow"))
    assert sum(file.arrays["logits"].shape[0] for file in dense_files) == kept
    assert f"  {kept} of {MANY:,} records of narrow are kept dense" in inspect.report(cache.reader.path)


@pytest.mark.slow
@pytest.mark.parametrize("line", [1, 2])
def test_a_resume_keeps_the_codec_that_was_picked(pieces: Path, tmp_path: Path, line: int) -> None:
    settings: dict[str, Any] = {"teacher": "noise", "max_kl": 1e-4, "at_temperature": 4.0}
    whole = dumped(pieces, tmp_path / "whole", **settings)
    with pytest.MonkeyPatch.context() as patch:
        kill_at_journal_line(patch, line)
        with pytest.raises(Killed):
            dumped(pieces, tmp_path / "c", **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose_codec, "pick_codec", None)  # it is not picked again
        resumed = dumped(pieces, tmp_path / "c", **settings)
    assert resumed.codecs["noise"].text == whole.codecs["noise"].text != "float32"
    assert bytes_of(resumed) == bytes_of(whole)


@pytest.mark.slow
def test_other_parts_pick_the_same(pieces: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_kl": 1e-3, "at_temperature": 4.0}
    whole = dumped(pieces, tmp_path / "whole", **settings)
    assert dump.run(config(pieces, tmp_path / "c", part="2/2", **settings), quiet=True).manifest is None
    assert bytes_of(dumped(pieces, tmp_path / "c", part="1/2", **settings)) == bytes_of(whole)


@pytest.mark.slow
def test_more_views_are_held_to_the_caches_promise(pieces: Path, tmp_path: Path) -> None:
    """It is broken by a view that the first dump did not see."""
    settings: dict[str, Any] = {"codec": "int8", "policy": POLICY}
    all_views = dumped(pieces, tmp_path / "all", views=6, **settings)
    worst = [
        kl(live(pieces, all_views, view=view), whole_view(all_views, view).logits(), 4.0).max() for view in range(6)
    ]
    assert max(worst) > 1.02 * worst[0]
    max_kl = (max(worst) + worst[0]) / 2
    kept = dumped(pieces, tmp_path / "c", max_kl=max_kl, at_temperature=4.0, **settings)
    with pytest.raises(CodecFitError, match=f"codec 'int8' does not keep KL <= {max_kl:g} at T=4"):
        dumped(pieces, tmp_path / "c", views=6, extend=True)
    assert softcache.open(tmp_path / "c").id == kept.id
    with pytest.raises(ConfigError, match="--max-kl cannot be given with more views"):
        dumped(pieces, tmp_path / "c", views=6, extend=True, max_kl=1.0)


def test_a_resume_cannot_change_the_promise(pieces: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"codec": "int8", "at_temperature": 4.0}
    with pytest.MonkeyPatch.context() as patch:
        kill_at_journal_line(patch, 2)
        with pytest.raises(Killed):
            dumped(pieces, tmp_path / "c", max_kl=1e-2, **settings)
    with pytest.raises(PlanMismatchError, match="max_kl"):
        dumped(pieces, tmp_path / "c", max_kl=1e-1, **settings)
    assert dumped(pieces, tmp_path / "c", max_kl=1e-2, **settings).member("narrow").promise is not None


NONSENSE: dict[str, dict[str, Any]] = {
    f"{name}={value}": {"max_kl": 1e-3, "at_temperature": 4.0} | {name: value}
    for name in ("max_kl", "at_temperature")
    for value in (0.0, -1.0, float("nan"), float("inf"))
}


@pytest.mark.parametrize("codec", [None, "int8"])
@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_is_refused(pieces: Path, tmp_path: Path, case: str, codec: str | None) -> None:
    with pytest.raises(ConfigError, match=r"--max-kl .* --at-temperature "):
        dumped(pieces, tmp_path / "c", codec=codec, **NONSENSE[case])
    assert not (tmp_path / "c").exists()


def test_what_cannot_be_promised_is_refused(pieces: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="several labels per sample") as raised:
        dumped(pieces, tmp_path / "c", data="images?multi_label=true", max_kl=1e-3)
    assert "--codec" in raised.value.tip
    with pytest.raises(ConfigError, match="'topk' serves temperatures from 1 to 8"):
        dumped(pieces, tmp_path / "c", codec="topk", max_kl=1.0, at_temperature=20.0)
    assert not (tmp_path / "c").exists()


# ------------------------------------------------------------------------------------------------- measured fidelity


def measured_rows(format: int = 1) -> np.ndarray:
    """(N,) bool: the first of each batch; of version 2 spread over it."""
    chosen = np.zeros(COUNT, bool)
    for part in batches():
        count = part.stop - part.start
        spread = [part.start + i * count // MEASURED_ROWS for i in range(MEASURED_ROWS)]
        if format == 1 or count <= MEASURED_ROWS:
            chosen[part] = np.arange(count) < MEASURED_ROWS
        else:
            chosen[spread] = True
    return chosen


def check_fidelity(
    pieces: Path, cache: softcache.Cache, statistics: MemberStatistics, row: str, given: list[Tensor]
) -> None:
    chosen = measured_rows(cache.manifest.plan.format)
    wanted = torch.cat([x[torch.from_numpy(chosen)] for x in given])
    targets = [whole_view(cache, view) for view in range(len(given))]
    codec = cache.codecs["narrow"]
    assert statistics.records == COUNT * len(given)
    assert statistics.measured == len(wanted) == len(given) * int(chosen.sum())
    assert set(statistics.kl) == {f"{t:g}" for t in GRID if codec.serves(t)}
    for t in (t for t in GRID if codec.serves(t)):
        log_q = torch.cat([one.log_probs("narrow", t)[torch.from_numpy(chosen)] for one in targets]).double()
        if codec.complete:
            log_q = torch.cat([one.logits()[torch.from_numpy(chosen)] for one in targets]).double() / t
        found = kl(wanted.double() / t, log_q, 1.0)
        # a product in a batch of another size may round its sums otherwise
        close = (
            {"rel": 1e-3, "abs": 1e-12} if row.startswith(("lowrank", "linear_head")) else {"rel": 1e-7, "abs": 1e-15}
        )
        assert statistics.mean_kl(f"{t:g}") == pytest.approx(found.mean(), **close)  # type: ignore[arg-type]
        assert statistics.kl[f"{t:g}"].worst == pytest.approx(found.max(), **close)  # type: ignore[arg-type]
        assert (found.max() > 0) == (row != "float32")
    if codec.complete:
        stored = torch.cat([one.logits()[torch.from_numpy(chosen)] for one in targets])
        assert statistics.agreed == int((stored.argmax(dim=1) == wanted.argmax(dim=1)).sum())
    assert statistics.agreement == statistics.agreed / statistics.measured


@pytest.mark.slow
@over_rows
def test_the_manifests_fidelity_is_that_of_the_measured_rows(
    pieces: Path, caches: dict[str, softcache.Cache], row: str
) -> None:
    """Over two parts and two views, against float64."""
    cache = caches[row]
    given = [live(pieces, cache, view=view) for view in (0, 1)]
    check_fidelity(pieces, cache, cache.manifest.statistics["narrow"], row, given)
    assert measured_rows().sum() == 5 * MEASURED_ROWS < COUNT


@pytest.mark.slow
@pytest.mark.parametrize("row", ["headtail, 4 bits", "topk"])
def test_a_later_round_adds_to_the_fidelity(
    pieces: Path, caches: dict[str, softcache.Cache], tmp_path: Path, row: str
) -> None:
    one = dumped(pieces, tmp_path / "c", codec=ROWS[row], policy=POLICY, views=1)
    check_fidelity(pieces, one, one.manifest.statistics["narrow"], row, [live(pieces, one)])
    grown = dumped(pieces, tmp_path / "c", views=2, extend=True)
    given = [live(pieces, grown, view=view) for view in (0, 1)]
    check_fidelity(pieces, grown, grown.manifest.statistics["narrow"], row, given)


def test_disagreement_is_counted(pieces: Path, tmp_path: Path) -> None:
    """A step that is larger than the distance of the two largest logits loses the order; here there are many such rows."""
    cache = dumped(pieces, tmp_path / "c", teacher="noise", codec="headtail:k=1,bits=4")
    given, stored = live(pieces, cache, load_user_file(pieces).noise()), whole_view(cache).logits()
    same = (given.argmax(dim=1) == stored.argmax(dim=1)).numpy()
    statistics = cache.manifest.statistics["noise"]
    assert statistics.agreed == same[measured_rows()].sum() <= statistics.measured
    coarse = dumped(pieces, tmp_path / "d", teacher="noise", codec="int8")
    rounded = whole_view(coarse).logits()
    agreed = (given.argmax(dim=1) == rounded.argmax(dim=1)).numpy()[measured_rows()].sum()
    assert coarse.manifest.statistics["noise"].agreed == agreed < 5 * MEASURED_ROWS


def test_several_labels_have_no_divergence(pieces: Path, tmp_path: Path) -> None:
    cache = dumped(pieces, tmp_path / "c", data="images?multi_label=true", codec="int8")
    statistics = cache.manifest.statistics["narrow"]
    assert (statistics.records, statistics.measured, statistics.agreement, dict(statistics.kl)) == (COUNT, 0, None, {})
    assert statistics.max_eps > 0
    assert "not measured" in inspect.report(cache.reader.path)


def test_the_teacher_of_these_tests_has_its_head(pieces: Path) -> None:
    """Else linear_head and the picks above would prove less than they say."""
    module = load_user_file(pieces)
    inputs = module.narrow().collate(list(module.images().images[:8]))
    plain, spiky = module.narrow(), module.narrow(spikes=6.0)
    assert classifier_of(plain, inputs) is plain.fc
    inputs[:, 36] = 1
    assert classifier_of(spiky, inputs) is None

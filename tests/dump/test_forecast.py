"""softcache plan: the sizes, divergences and choices that it announces are those of the dump, and nothing is left behind."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from codec_rows import kl

import softcache
from softcache import cli
from softcache.cache import schema
from softcache.codecs.fidelity import GRID
from softcache.config import DumpConfig, PlanConfig
from softcache.dump import choose_codec
from softcache.dump import flow as dump
from softcache.dump import forecast as plan
from softcache.errors import CodecFitError, ConfigError, DiskSpaceError, SoftcacheError
from softcache.spec import load_user_file

PIECES = '''
"""Images and texts of 40 classes; teachers with a final layer, without one, and with logits beyond float16."""

import numpy as np
import torch
from torch import nn

CLASSES = tuple(f"c{i:02d}" for i in range(40))


class Data:
    class_names = CLASSES

    def __init__(self, items, multi_label=False):
        draw = np.random.default_rng(1)
        self.items = items
        self.labels = draw.integers(0, 2, (len(items), 40)).astype(bool) if multi_label else draw.integers(0, 40, len(items))
        self.sample_keys = [f"some/{'ä' * 20}-{i:04d}.png" for i in range(len(items))]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i], self.labels[i]


def images(count: int = 400, multi_label: bool = False, marked: int = 0):
    items = np.random.default_rng(0).integers(0, 250, (count, 8, 8)).astype(np.uint8)
    if marked:
        items[150::marked, 4, 4] = 255
    return Data(items, multi_label)


def texts(count: int = 300):
    draw = np.random.default_rng(2)
    return Data([" ".join(draw.choice(["one", "two", "three", "four"], draw.integers(1, 9))) for _ in range(count)])


class Narrow(nn.Module):
    def __init__(self, seed, factor, spikes=0.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body, self.fc = nn.Linear(64, 6), nn.Linear(6, 40)
            nn.init.normal_(self.body.weight, std=0.4)
            nn.init.normal_(self.fc.weight, std=2.0 * factor)
        self.spikes = spikes

    def collate(self, items):
        return torch.from_numpy(np.stack(items)).flatten(1).float() / 255

    def forward(self, x):
        logits = self.fc(self.body(x - 0.5).tanh())
        if self.spikes:
            marked = x.amax(dim=1, keepdim=True) == 1
            logits = logits + marked * self.spikes * torch.sin(torch.arange(1, 41) * (1 + 97 * x[:, 20:21]))
        return logits


def narrow(seed: int = 1, factor: float = 1.0, spikes: float = 0.0):
    return Narrow(seed, factor, spikes)


class Words(Narrow):
    def collate(self, items):
        return torch.stack([torch.tensor([hash_of(text, i) for i in range(64)]) for text in items])


def hash_of(text, i):
    return sum(ord(c) * (i + 3) % 17 for c in text) % 23 / 23


def words():
    return Words(1, 1.0)


def function():
    weight = np.random.default_rng(5).integers(-9, 10, (64, 40))
    return lambda batch: np.sin(batch.astype(np.float64) @ weight * 0.37) * 3
'''

COUNT, CLASSES, BATCH = 400, 40, 64
POLICY = ("shift:pixels=2",)


@pytest.fixture(autouse=True)
def _short_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "FEWEST_ROWS", 64)
    monkeypatch.setattr(plan, "TRIAL_SECONDS", 0.02)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "pieces.py"
    path.write_text(PIECES)
    return path


def config(pieces: Path, data: str = "images", teacher: str | tuple[str, ...] = "narrow", **more: Any) -> PlanConfig:
    names = (teacher,) if isinstance(teacher, str) else teacher
    settings: dict[str, Any] = {"batch_size": BATCH, "threads": 1, "workers": 0, "device": "cpu"} | more
    return PlanConfig(data=f"{pieces}:{data}", teacher=tuple(f"{pieces}:{name}" for name in names), **settings)


def dumped(config: PlanConfig, out: Path, **other: Any) -> softcache.Cache:
    values = {f.name: getattr(config, f.name) for f in fields(PlanConfig)} | other
    return softcache.open(dump.run(DumpConfig(**values, out=str(out)), quiet=True).path)


class Clock:
    """A dump that takes 2 s and, for each sample, 1 ms and 4 ms a view; other work takes no time. `noise` is added in turn."""

    def __init__(self, noise: list[float] | None = None) -> None:
        self.now, self.noise = 0.0, noise or []

    def monotonic(self) -> float:
        return self.now

    def run(self, config: DumpConfig, *, quiet: bool) -> dump.DumpResult:
        assert quiet and config.samples is not None and config.views is not None
        rows = len(Path(config.samples).read_text().splitlines())
        seconds = 2 + rows * (0.001 + 0.004 * config.views) + (self.noise.pop(0) if self.noise else 0.0)
        self.now += seconds
        return dump.DumpResult(Path(config.out), None, 1 / 0.004, 0.0, seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(plan, "time", clock)
    monkeypatch.setattr(
        plan, "dump", SimpleNamespace(open_samples=dump.open_samples, open_teachers=dump.open_teachers, run=clock.run)
    )
    return clock


no_trials = pytest.mark.usefixtures("clock")


def choice(forecast: plan.Forecast, text: str) -> plan.Choice:
    (found,) = [one for one in forecast.choices if one.codec == text]
    return found


# ----------------------------------------------------------------------------------------------------------------- size

CODECS = ("float32", "float16", "int8", "headtail:k=8,bits=8", "headtail:k=16,bits=4", "topk:k=10")
FITTED = ("lowrank:max_kl=0.0001,at_temperature=4.0", "linear_head:dtype=float16", "linear_head:dtype=int8")

SIZES: dict[str, dict[str, Any]] = {
    "plain": {},
    "many small parts": {"shard_rows": 256},
    "views": {"policy": POLICY, "views": 5},
    "no keys": {"no_keys": True},
    "several labels": {"data": "images?multi_label=true&count=2000"},
    "texts": {"data": "texts", "teacher": "words"},
    "two members": {"teacher": ("narrow", "narrow?seed=2"), "policy": POLICY, "views": 2},
    "features": {"features": ("body:flatten", "fc:sign"), "feature_dtype": "int8", "policy": POLICY, "views": 2},
    "some labels": {"keep_labels": ("3", "5", "c07", "11", "12", "13"), "order": "natural"},
}


def check_sizes(pieces: Path, tmp_path: Path, case: str, codecs: tuple[str, ...]) -> None:
    asked = config(pieces, **SIZES[case])
    forecast = plan.run(asked)
    for number, text in enumerate(codecs):
        cache = dumped(asked, tmp_path / str(number), codec=text)
        found = choice(forecast, text)
        written = sum(path.stat().st_size for path in cache.reader.path.rglob("*.h5"))
        # a row that is kept dense where the probe has none makes a file more
        dense = [file for file in cache.manifest.files if file.kind == "dense"]
        assert written - 25_000 * len(dense) <= found.nbytes <= written, text
        assert dense == [] or text.startswith("lowrank")
    sizes = [one.nbytes for one in forecast.choices if not one.refused]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 2


@no_trials
@pytest.mark.parametrize("case", SIZES)
def test_sizes_are_those_of_the_dump(pieces: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte, of all files that a manifest names."""
    monkeypatch.setattr(choose_codec, "CANDIDATES", ("float32", "float16", "topk:k=10", "linear_head:dtype=int8"))
    if case == "two members":  # as many rows as make parts differ with the number of members
        monkeypatch.setattr(schema, "MIN_SHARD_ROWS", schema.ROW_UNIT)
        monkeypatch.setattr(schema, "TARGET_SHARDS", 2)
    check_sizes(pieces, tmp_path, case, ("topk:k=10", "linear_head:dtype=int8"))


@no_trials
@pytest.mark.slow
@pytest.mark.parametrize("case", SIZES)
def test_sizes_of_every_codec_are_those_of_the_dump(pieces: Path, tmp_path: Path, case: str) -> None:
    fitted = ("linear_head:dtype=float16", *FITTED[2:]) if case == "some labels" else FITTED
    check_sizes(pieces, tmp_path, case, (*CODECS, *fitted))


@no_trials
def test_a_final_layer_beside_features_is_counted_in(pieces: Path, tmp_path: Path) -> None:
    """linear_head has the layer anyway, the others get it with the first feature."""
    asked = config(pieces, features=("body:flatten",), codec="linear_head:dtype=float16")
    forecast = plan.run(asked)
    for number, text in enumerate(("linear_head:dtype=float16", "int8")):
        cache = dumped(asked, tmp_path / str(number), codec=text)
        assert cache.classifier("narrow") is not None
        assert choice(forecast, text).nbytes == cache.manifest.nbytes
    assert forecast.features == {"narrow": {"body:flatten": 2 * 6 + 2}}


@no_trials
def test_dense_rows_are_foreseen_by_their_share(pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_codec, "FITTED_ROWS", 128)
    asked = config(pieces, "images?count=4000&marked=10", "narrow?spikes=6", codec="lowrank", order="natural")
    found = plan.run(asked).choice
    cache = dumped(asked, tmp_path / "c")
    statistics = cache.manifest.statistics["narrow"]
    assert found.found["narrow"].dense == pytest.approx(statistics.dense / statistics.records, abs=0.01)
    assert statistics.dense > 300
    assert found.nbytes == pytest.approx(cache.manifest.nbytes, rel=0.02)


# ------------------------------------------------------------------------------------------------------------- fidelity


ALL = (*CODECS, *FITTED, "headtail:k=16,bits=6")


@no_trials
@pytest.mark.parametrize(
    "codecs", [("float16", "topk:k=10", FITTED[0]), pytest.param(ALL, marks=pytest.mark.slow, id="all")]
)
def test_divergences_are_those_of_the_measured_rows(
    pieces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codecs: tuple[str, ...]
) -> None:
    """Of rows that the codecs were not fitted on: here 128 to 228 of the cache, at view 0; against float64."""
    monkeypatch.setattr(choose_codec, "FITTED_ROWS", 128)
    monkeypatch.setattr(choose_codec, "MEASURED_ROWS", 100)
    asked = config(pieces, policy=POLICY, views=2)
    forecast = plan.run(asked)
    exact = dumped(asked, tmp_path / "exact", codec="float32")
    measured = np.arange(128, 228)
    given = exact.gather(measured, np.zeros(100, np.int64)).logits().double()
    assert {one.codec for one in forecast.choices if not one.refused} == set(ALL)
    for number, one in enumerate(choice(forecast, text) for text in codecs):
        cache = dumped(asked, tmp_path / str(number), codec=one.codec)
        targets, codec = cache.gather(measured, np.zeros(100, np.int64)), cache.codecs["narrow"]
        for t in GRID:
            if not codec.serves(t):
                assert one.mean(t) is None and one.worst(t) is None
                continue
            log_q = targets.logits().double() / t if codec.complete else targets.log_probs("narrow", t).double()
            wanted = kl(given / t, log_q, 1.0)
            # a fitted codec's products may be summed in another order in another batch
            close: dict[str, Any] = {"rel": 2e-3, "abs": 1e-12} if one.codec in FITTED else {"rel": 1e-6, "abs": 1e-15}
            assert one.mean(t) == pytest.approx(wanted.mean(), **close), (one.codec, t)
            assert one.worst(t) == pytest.approx(wanted.max(), **close), (one.codec, t)
        if codec.complete:
            agreed = (targets.logits().argmax(dim=1) == given.argmax(dim=1)).double().mean().item()
            assert one.found["narrow"].agreement == agreed
        (file,) = cache.manifest.files_of("member", "narrow")
        stored = sum(a.nbytes for name, a in file.arrays.items() if not name.endswith("_crc32"))
        assert one.found["narrow"].record_bytes == stored / (2 * COUNT)


@no_trials
def test_with_several_members_the_worse_one_is_told(pieces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_codec, "CANDIDATES", ("float16", "int8", "topk:k=10"))
    alone = [plan.run(config(pieces, teacher=f"narrow?factor={factor}")) for factor in (0.2, 4.0)]
    both = plan.run(config(pieces, teacher=("narrow?factor=0.2", "narrow?factor=4.0&name=wild")))
    for text in ("int8", "topk:k=10"):
        means = [choice(one, text).mean(4.0) for one in alone]
        assert choice(both, text).mean(4.0) == max(m for m in means if m is not None)
        assert choice(both, text).worst(1.0) == max(choice(one, text).worst(1.0) or 0.0 for one in alone)
    assert both.members == 2


# -------------------------------------------------------------------------------------------------------------- refusals


@no_trials
def test_codecs_that_do_not_suit_say_why(pieces: Path) -> None:
    forecast = plan.run(config(pieces, teacher="function"))
    refused = {one.codec: one.refused for one in forecast.choices if one.refused}
    assert set(refused) >= {"linear_head:dtype=float16", "linear_head:dtype=int8"}
    assert all("no final nn.Linear" in refused[f"linear_head:dtype={dtype}"] for dtype in ("float16", "int8"))
    shown = forecast.text().split("not for this teacher:")
    assert len(shown) == 2
    assert all(f"  {codec}: {why}" in shown[1] and f" {codec} " not in shown[0] for codec, why in refused.items())
    entries: Any = forecast.to_json()["codecs"]
    assert {codec: entry for codec, entry in entries.items() if "refused" in entry} == {
        codec: {"refused": why} for codec, why in refused.items()
    }


@no_trials
def test_logits_beyond_float16_leave_the_codecs_that_hold_them(pieces: Path, tmp_path: Path) -> None:
    asked = config(pieces, teacher="narrow?factor=30000", codec="float32")
    forecast = plan.run(asked)
    refused = {one.codec: one.refused for one in forecast.choices if one.refused}
    assert "65504" in refused["float16"] and "float32" not in refused and "int8" not in refused
    for number, text in enumerate(refused):
        with pytest.raises(SoftcacheError):
            dumped(asked, tmp_path / str(number), codec=text)
    assert choice(forecast, "int8").nbytes == dumped(asked, tmp_path / "int8", codec="int8").manifest.nbytes


# ------------------------------------------------------------------------------------------------------------- the pick


@no_trials
@pytest.mark.parametrize(
    ("teacher", "max_kl", "temperature"),
    [
        ("narrow", 1e-3, 1.0),
        pytest.param("function", 1e-4, 4.0, marks=pytest.mark.slow),
        pytest.param("function", 1e-7, 4.0, marks=pytest.mark.slow),
        pytest.param("narrow", 1e-5, 3.0, marks=pytest.mark.slow),
    ],
)
def test_the_pick_is_the_dumps(pieces: Path, tmp_path: Path, teacher: str, max_kl: float, temperature: float) -> None:
    asked = config(pieces, teacher=teacher, max_kl=max_kl, at_temperature=temperature, policy=POLICY, views=3)
    forecast = plan.run(asked)
    cache = dumped(asked, tmp_path / "c")
    assert forecast.chosen == cache.codecs[teacher].text
    assert [one.codec for one in forecast.choices].count(forecast.chosen) == 1
    assert len({one.codec.split(":")[0] for one in forecast.choices if one.codec.startswith("lowrank")}) == 1
    assert forecast.choice.nbytes == pytest.approx(cache.manifest.nbytes, rel=0.02)
    worst = forecast.choice.worst(temperature)
    assert worst is not None and 0 <= worst <= max_kl
    smaller = [
        one
        for one in forecast.choices
        if not one.refused and one.nbytes < 0.95 * forecast.choice.nbytes and not one.codec.startswith("topk")
    ]
    assert all((one.worst(temperature) or 0.0) * choose_codec.HEADROOM > max_kl for one in smaller)
    last = forecast.text().splitlines()[-1]
    assert last.startswith(f"> {forecast.chosen}: ") and f"KL <= {max_kl:g} at T={temperature:g}" in last
    assert f"KL T={temperature:g}" in forecast.text()


@no_trials
def test_without_a_promise_it_is_the_codec_of_the_command(pieces: Path) -> None:
    assert plan.run(config(pieces)).chosen == "float16"
    forecast = plan.run(config(pieces, codec="headtail:bits=6"))
    assert forecast.chosen == "headtail:k=8,bits=6" and not forecast.choice.refused
    marked = [line.split()[1] for line in forecast.text().splitlines() if line.startswith("> ") and "B" in line]
    assert marked[0] == forecast.chosen


# ------------------------------------------------------------------------------------------------------------- the verb


def test_json_for_machines(pieces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--data", f"{pieces}:images", "--teacher", f"{pieces}:narrow", "--threads", "1", "--device", "cpu"]
    argv += ["--policy", POLICY[0], "--views", "2", "--features", "body:flatten", "--json"]
    assert cli.main(argv) == 0
    told = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert {name: told[name] for name in ("samples", "views", "members", "classes", "chosen")} == {
        "samples": COUNT,
        "views": 2,
        "members": 1,
        "classes": CLASSES,
        "chosen": "float16",
    }
    assert told["features"] == {"narrow": {"body:flatten": 14}}
    for text in CODECS:
        entry = told["codecs"][text]
        assert set(entry["kl"]) == {f"{t:g}" for t in GRID}
        assert all(entry[name] > 0 for name in ("bytes", "seconds", "record_bytes"))
        assert 0 < entry["agreement"] <= 1
    assert told["codecs"]["float32"]["kl"]["4"] == {"mean": 0.0, "worst": 0.0}
    assert told["codecs"]["topk:k=10"]["kl"]["20"] == {"mean": None, "worst": None}


@no_trials
def test_the_table_for_people(pieces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--data", f"{pieces}:images", "--teacher", f"{pieces}:narrow", "--threads", "1", "--device", "cpu"]
    assert cli.main([*argv, "--features", "body:flatten"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("400 samples x 1 views x 1 members, 40 classes")
    assert "  feature body:flatten of narrow: 14 bytes a record, counted in" in lines
    (row,) = [line.split() for line in lines if line.startswith("> ") and "float16 " in line]
    assert row[:3] == [">", "float16", "82.0"]
    assert lines[-1].startswith("> float16: ") and "about" in lines[-1]


@pytest.mark.parametrize(("count", "views"), [(50, 3), (400, 1), pytest.param(400, 3, marks=pytest.mark.slow)])
def test_numbers_are_positive_and_finite(pieces: Path, count: int, views: int) -> None:
    """Whether or not the whole set is fewer rows than a trial."""
    forecast = plan.run(config(pieces, f"images?count={count}", policy=POLICY, views=views))
    for one in forecast.choices:
        if not one.refused:
            assert 0 < one.seconds < 3600 and one.nbytes > 0
            assert all(0 < found.seconds < 60 and found.record_bytes > 0 for found in one.found.values())
            assert all(math.isfinite(value) for t in GRID for value in (one.mean(t), one.worst(t)) if value is not None)


@pytest.mark.parametrize(("count", "views"), [(400, 1), (400, 2), (400, 7), (64, 1), (50, 6)])
def test_the_time_is_extrapolated_over_rows_and_views(pieces: Path, clock: Clock, count: int, views: int) -> None:
    forecast = plan.run(config(pieces, f"images?count={count}", policy=POLICY, views=views))
    assert forecast.choice.seconds == pytest.approx(2 + count * (0.001 + 0.004 * views))


@pytest.mark.parametrize("noise", [[0.0, 1.0], [0.0, -1.9], [0.0, 0.0, 5.0], [0.0, 0.0, -2.0, 9.0]])
@pytest.mark.parametrize(("count", "views"), [(400, 1), (400, 30), (50, 30)])
def test_noise_in_the_trials_gives_no_negative_time(
    pieces: Path, clock: Clock, noise: list[float], count: int, views: int
) -> None:
    clock.noise = list(noise)
    forecast = plan.run(config(pieces, f"images?count={count}", policy=POLICY, views=views))
    assert all(one.seconds > 0 for one in forecast.choices if not one.refused)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


def test_nothing_is_left_behind(pieces: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    real = dump.run
    monkeypatch.chdir(tmp_path)

    def noted(config: DumpConfig, *, quiet: bool = False) -> Any:
        written.append(config.out)
        return real(config, quiet=quiet)

    monkeypatch.setattr(dump, "run", noted)
    monkeypatch.setattr(choose_codec, "CANDIDATES", ("float16",))
    plan.run(config(pieces, policy=POLICY, views=2))
    assert len(written) >= 3 and all(Path(out).is_relative_to(folder) for out in written)
    assert list(tmp_path.rglob("*")) == [folder]

    def broken(config: DumpConfig, *, quiet: bool = False) -> Any:
        real(config, quiet=quiet)
        raise DiskSpaceError("no room")

    monkeypatch.setattr(dump, "run", broken)
    with pytest.raises(DiskSpaceError, match="no room"):
        plan.run(config(pieces))
    assert list(tmp_path.rglob("*")) == [folder]


def test_a_codec_that_suits_the_set_but_not_a_trial_of_it(pieces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial of 20 rows is too small for lowrank's fit; the set is not."""
    monkeypatch.setattr(plan, "FEWEST_ROWS", 20)
    monkeypatch.setattr(plan, "MOST_ROWS", 30)
    forecast = plan.run(config(pieces, codec="lowrank"))
    assert forecast.chosen.startswith("lowrank:") and forecast.choice.seconds > 0
    with pytest.raises(CodecFitError, match="at least 32 rows"):
        plan.run(config(pieces, "images?count=20", codec="lowrank"))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "views all the same": ({"views": 3}, "every view of this policy is the same"),
    "no views": ({"views": 0, "policy": POLICY}, "at least one view"),
    "batch size": ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
    "shard rows": ({"shard_rows": -1}, "--shard-rows -1: must be at least 1"),
    "codec": ({"codec": "int7"}, "unknown codec 'int7'"),
    "its parameter": ({"codec": "topk:n=3"}, "has no parameter 'n'"),
    "feature": ({"features": ("bodi:flatten",)}, "no module 'bodi'"),
    "promise": ({"max_kl": 0.0}, "both must be numbers > 0"),
    "its temperature": ({"max_kl": 1e-3, "at_temperature": -1.0}, "both must be numbers > 0"),
    "promise of several labels": ({"max_kl": 1e-3, "data": "images?multi_label=true"}, "several labels"),
    "promise of topk": ({"max_kl": 1e-3, "at_temperature": 20.0, "codec": "topk"}, "from 1 to 8"),
    "policy": ({"policy": ("shfit",)}, "unknown view step 'shfit'"),
    "a factory that is not there": ({"teacher": "narow"}, "no factory 'narow'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(pieces: Path, folder: Path, case: str) -> None:
    settings, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        plan.run(config(pieces, **settings))
    assert not list(folder.iterdir())


def test_the_command_line_takes_no_out(pieces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--data", f"{pieces}:images", "--teacher", f"{pieces}:narrow", "--out", "somewhere"]
    assert cli.main(argv) == 2
    assert "--out" in capsys.readouterr().err


def test_the_oracles_teacher_is_the_dumps(pieces: Path, tmp_path: Path) -> None:
    """The float32 cache that stands for the live teacher above holds what the teacher says."""
    cache = dumped(config(pieces), tmp_path / "c", codec="float32")
    module = load_user_file(pieces)
    index = [int(cache.samples.key(row)[26:30]) for row in range(BATCH)]
    teacher = module.narrow()
    with torch.inference_mode():
        live = teacher(teacher.collate([module.images().items[i] for i in index]))
    assert torch.equal(cache.gather(np.arange(BATCH), np.zeros(BATCH, np.int64)).logits(), live)
    assert replace(config(pieces), codec="int8").codec == "int8"

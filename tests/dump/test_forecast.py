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
from conftest import WORLDS

import softcache
from softcache import cli
from softcache.cache import schema
from softcache.codecs.fidelity import GRID, binary_kl_rows
from softcache.config import DumpConfig, PlanConfig
from softcache.data.loading import Partners, ViewedSet
from softcache.data.transfer_set import open_transfer_set
from softcache.data.views import Policy
from softcache.dump import choose_codec
from softcache.dump import flow as dump
from softcache.dump import forecast as plan
from softcache.errors import CodecFitError, ConfigError, DiskSpaceError, SoftcacheError
from softcache.spec import load_user_file

COUNT, CLASSES, BATCH = 400, 40, 64
POLICY = ("shift:pixels=2",)


@pytest.fixture(scope="module")
def pieces() -> Path:
    return WORLDS / "narrow_40.py"


def config(pieces: Path, data: str = "images", teacher: str | tuple[str, ...] = "narrow", **more: Any) -> PlanConfig:
    names = (teacher,) if isinstance(teacher, str) else teacher
    settings: dict[str, Any] = {"batch_size": BATCH, "threads": 1, "workers": 0, "device": "cpu"} | more
    return PlanConfig(data=f"{pieces}:{data}", teacher=tuple(f"{pieces}:{name}" for name in names), **settings)


def dumped(config: PlanConfig, out: Path, **other: Any) -> softcache.Cache:
    values = {f.name: getattr(config, f.name) for f in fields(PlanConfig)} | other
    return softcache.open(dump.run(DumpConfig(**values, out=str(out)), quiet=True).path)


def foreseen(config: PlanConfig, **sizes: Any) -> plan.Forecast:
    """With short trials."""
    return plan.run(config, **{"trial_rows": (64, plan.MOST_ROWS), "trial_seconds": 0.02} | sizes)


def test_the_plan_of_topset_tells_what_is_kept(pieces: Path) -> None:
    forecast = foreseen(config(pieces, codec="topset:k=16"), codecs=("float16",))
    assert [one.k for one in forecast.kept] == [
        k for k in (16, 32, 50, 64, 100, 128) if k < forecast.classes
    ] and "kept at T=4" in forecast.text()
    assert forecast.to_json()["kept"][0]["record_bytes"] == 4 + 8 + 16 + 7  # type: ignore[index]
    assert not foreseen(config(pieces, codec="float16"), codecs=("float16",)).kept


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
    monkeypatch.setattr(plan, "dump", SimpleNamespace(run=clock.run))
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


@pytest.mark.slow
def test_several_labels_are_compared_by_each_label(pieces: Path) -> None:
    found = foreseen(config(pieces, data="images?multi_label=true&count=200"), codecs=("int8", "topk:k=10"))
    assert "binary KL of a label in nats" in found.text() and "decisions kept" in found.text()
    assert "keeps the largest classes and the rest of a softmax" in choice(found, "topk:k=10").refused
    assert 0 < choice(found, "int8").worst(1.0) < 1e-3


def test_the_binary_kl_of_a_record_is_the_mean_over_its_labels() -> None:
    given, stored = (np.random.default_rng(seed).normal(0, 3, (4, 5)) for seed in (0, 1))
    p, q = (1 / (1 + np.exp(-one / 4)) for one in (given, stored))
    wanted = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean(axis=1)
    np.testing.assert_allclose(
        binary_kl_rows(torch.from_numpy(given), torch.from_numpy(stored), 4.0), wanted, rtol=1e-10
    )


def check_sizes(pieces: Path, tmp_path: Path, case: str, dumps: tuple[str, ...], **sizes: Any) -> None:
    asked = config(pieces, **SIZES[case])
    forecast = foreseen(asked, **sizes)
    for number, text in enumerate(dumps):
        if case == "several labels" and text.startswith("topk"):  # which is refused
            continue
        cache = dumped(asked, tmp_path / str(number), codec=text)
        found = choice(forecast, text)
        written = sum(path.stat().st_size for path in cache.reader.path.rglob("*.h5"))
        # a row that is kept dense where the probe has none makes a file more
        dense = [file for file in cache.manifest.files if file.kind == "dense"]
        assert written - 25_000 * len(dense) <= found.nbytes <= written, text
        assert dense == [] or text.startswith("lowrank")
    sizes = [one.nbytes for one in forecast.choices if not one.refused]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 2


@pytest.mark.slow
@no_trials
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case not in ("plain", "features"))) for case in SIZES]
)
def test_sizes_are_those_of_the_dump(pieces: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte, of all files that a manifest names."""
    few = ("float32", "float16", "topk:k=10", "linear_head:dtype=int8")
    if case == "two members":  # as many rows as make parts differ with the number of members
        monkeypatch.setattr(schema, "MIN_SHARD_ROWS", schema.ROW_UNIT)
        monkeypatch.setattr(schema, "TARGET_SHARDS", 2)
    check_sizes(pieces, tmp_path, case, ("topk:k=10", "linear_head:dtype=int8"), codecs=few)


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
    forecast = foreseen(asked)
    for number, text in enumerate(("linear_head:dtype=float16", "int8")):
        cache = dumped(asked, tmp_path / str(number), codec=text)
        assert cache.classifier("narrow") is not None
        assert choice(forecast, text).nbytes == cache.manifest.nbytes
    assert forecast.features == {"narrow": {"body:flatten": 2 * 6 + 2}}


@pytest.mark.slow
@no_trials
def test_dense_rows_are_foreseen_by_their_share(pieces: Path, tmp_path: Path) -> None:
    """The fit sees none of the rows that are off its plane; of those measured behind it a tenth is, as of the whole set."""
    behind = choose_codec.FITTED_ROWS + choose_codec.MEASURED_ROWS
    marked = [*range(choose_codec.FITTED_ROWS, behind, 10), *np.linspace(behind, 4095, 307).astype(int)]
    data = f"images?count=4096&marked={','.join(map(str, marked))}"
    asked = config(pieces, data, "narrow?spikes=6", codec="lowrank", order="natural", shard_rows=4096)
    found = foreseen(asked).choice
    cache = dumped(asked, tmp_path / "c")
    statistics = cache.manifest.statistics["narrow"]
    assert found.found["narrow"].dense == pytest.approx(statistics.dense / statistics.records, abs=0.01)
    assert statistics.dense > 300
    assert found.nbytes == pytest.approx(cache.manifest.nbytes, rel=0.02)


# ------------------------------------------------------------------------------------------------------------- fidelity


class FirstPixels:
    """As a teacher that gives the first four pixels."""

    name, num_classes, width, classifier = "pixels", 4, 4, None

    def find_classifier(self, batch: torch.Tensor) -> None:
        return None

    def collated(self, items: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.stack(items)).flatten(1)[:, :4].float()

    def __call__(self, batch: torch.Tensor) -> Any:
        return SimpleNamespace(logits=batch, classifier_input=None)


@pytest.mark.parametrize(
    ("count", "fitted", "measured"), [(400, 128, (128, 228)), (200, 128, (100, 200)), (60, 60, (0, 60))]
)
def test_codecs_are_measured_on_rows_behind_those_of_the_fit(
    pieces: Path, count: int, fitted: int, measured: tuple[int, int]
) -> None:
    """As far as there are enough."""
    data = open_transfer_set(f"{pieces}:images?count={count}")
    order = np.random.default_rng(0).permutation(count)
    viewed = ViewedSet(data, Policy(), (), partners=Partners(data, order))
    prober, teacher = choose_codec.Prober(viewed, order, 32, fitted_rows=128, measured_rows=100), FirstPixels()
    pixels = torch.from_numpy(load_user_file(pieces).images(count).items[order]).flatten(1)[:, :4].float()
    assert torch.equal(prober.fitting_rows(teacher).logits, pixels[:fitted])  # type: ignore[arg-type]
    assert torch.equal(prober.measuring_rows(teacher).logits, pixels[slice(*measured)])  # type: ignore[arg-type]


ALL = (*CODECS, *FITTED, "headtail:k=16,bits=6")


@pytest.mark.slow
@no_trials
@pytest.mark.parametrize(
    "codecs", [("float16", "topk:k=10", FITTED[0]), pytest.param(ALL, marks=pytest.mark.slow, id="all")]
)
def test_divergences_are_those_of_the_measured_rows(pieces: Path, tmp_path: Path, codecs: tuple[str, ...]) -> None:
    """Of rows that the codecs were not fitted on: here 100 behind those, at view 0; against float64."""
    fitted = choose_codec.FITTED_ROWS
    asked = config(pieces, f"images?count={fitted + 150}", policy=POLICY, views=2, shard_rows=4096)
    forecast = foreseen(asked, measured_rows=100)
    exact = dumped(asked, tmp_path / "exact", codec="float32")
    measured = np.arange(fitted, fitted + 100)
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
        assert one.found["narrow"].record_bytes == stored / (2 * (fitted + 150))


@no_trials
def test_with_several_members_the_worse_one_is_told(pieces: Path) -> None:
    few = ("float16", "int8", "topk:k=10")
    alone = [foreseen(config(pieces, teacher=f"narrow?factor={factor}"), codecs=few) for factor in (0.2, 4.0)]
    both = foreseen(config(pieces, teacher=("narrow?factor=0.2", "narrow?factor=4.0&name=wild")), codecs=few)
    for text in ("int8", "topk:k=10"):
        means = [choice(one, text).mean(4.0) for one in alone]
        assert choice(both, text).mean(4.0) == max(m for m in means if m is not None)
        assert choice(both, text).worst(1.0) == max(choice(one, text).worst(1.0) or 0.0 for one in alone)
    assert both.members == 2


# -------------------------------------------------------------------------------------------------------------- refusals


@no_trials
def test_codecs_that_do_not_suit_say_why(pieces: Path) -> None:
    forecast = foreseen(config(pieces, teacher="function"))
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


@pytest.mark.slow
@no_trials
def test_logits_beyond_float16_leave_the_codecs_that_hold_them(pieces: Path, tmp_path: Path) -> None:
    asked = config(pieces, teacher="narrow?factor=30000", codec="float32")
    forecast = foreseen(asked)
    refused = {one.codec: one.refused for one in forecast.choices if one.refused}
    assert "65504" in refused["float16"] and "float32" not in refused and "int8" not in refused
    for number, text in enumerate(refused):
        with pytest.raises(SoftcacheError):
            dumped(asked, tmp_path / str(number), codec=text)
    assert choice(forecast, "int8").nbytes == dumped(asked, tmp_path / "int8", codec="int8").manifest.nbytes


# ------------------------------------------------------------------------------------------------------------- the pick


@pytest.mark.slow
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
    forecast = foreseen(asked)
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
    assert foreseen(config(pieces)).chosen == "float16"
    forecast = foreseen(config(pieces, codec="headtail:bits=6"))
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


@pytest.mark.slow
@pytest.mark.parametrize(("count", "views"), [(50, 3), (400, 1), pytest.param(400, 3, marks=pytest.mark.slow)])
def test_numbers_are_positive_and_finite(pieces: Path, count: int, views: int) -> None:
    """Whether or not the whole set is fewer rows than a trial."""
    forecast = foreseen(config(pieces, f"images?count={count}", policy=POLICY, views=views))
    for one in forecast.choices:
        if not one.refused:
            assert 0 < one.seconds < 3600 and one.nbytes > 0
            assert all(0 < found.seconds < 60 and found.record_bytes > 0 for found in one.found.values())
            assert all(math.isfinite(value) for t in GRID for value in (one.mean(t), one.worst(t)) if value is not None)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "views"), [(400, 1), (400, 2), (400, 7), (64, 1), (50, 6)])
def test_the_time_is_extrapolated_over_rows_and_views(pieces: Path, clock: Clock, count: int, views: int) -> None:
    forecast = foreseen(config(pieces, f"images?count={count}", policy=POLICY, views=views))
    assert forecast.choice.seconds == pytest.approx(2 + count * (0.001 + 0.004 * views))


@pytest.mark.slow
@pytest.mark.parametrize("noise", [[0.0, 1.0], [0.0, -1.9], [0.0, 0.0, 5.0], [0.0, 0.0, -2.0, 9.0]])
@pytest.mark.parametrize(("count", "views"), [(400, 1), (400, 30), (50, 30)])
def test_noise_in_the_trials_gives_no_negative_time(
    pieces: Path, clock: Clock, noise: list[float], count: int, views: int
) -> None:
    clock.noise = list(noise)
    forecast = foreseen(config(pieces, f"images?count={count}", policy=POLICY, views=views))
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
    foreseen(config(pieces, policy=POLICY, views=2), codecs=("float16",))
    assert len(written) >= 3 and all(Path(out).is_relative_to(folder) for out in written)
    assert list(tmp_path.rglob("*")) == [folder]

    def broken(config: DumpConfig, *, quiet: bool = False) -> Any:
        real(config, quiet=quiet)
        raise DiskSpaceError("no room")

    monkeypatch.setattr(dump, "run", broken)
    with pytest.raises(DiskSpaceError, match="no room"):
        foreseen(config(pieces))
    assert list(tmp_path.rglob("*")) == [folder]


def test_a_codec_that_suits_the_set_but_not_a_trial_of_it(pieces: Path) -> None:
    """A trial of 20 rows is too small for lowrank's fit; the set is not."""
    forecast = foreseen(config(pieces, codec="lowrank"), trial_rows=(20, 30))
    assert forecast.chosen.startswith("lowrank:") and forecast.choice.seconds > 0
    with pytest.raises(CodecFitError, match="at least 32 rows"):
        foreseen(config(pieces, "images?count=20", codec="lowrank"))


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
        foreseen(config(pieces, **settings))
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

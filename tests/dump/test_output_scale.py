"""The scale of outputs without classes: measured once at the dump, stored beside the records, which stay as they were given."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import WORLDS, QuickDump

import softcache
from softcache import cli, dump
from softcache.config import DumpConfig, PlanConfig
from softcache.data.views import Policy
from softcache.dump import choose_codec, forecast
from softcache.dump.layout import Storage
from softcache.dump.output_scale import measure_scale
from softcache.errors import CacheError, ConfigError
from softcache.spec import load_user_file

WORLD = WORLDS / "numbers.py"
EMBEDDER, WHOLE = f"{WORLD}:embedder?output=embedding", f"{WORLD}:whole?output=values&names=sum,bright"
DATA = f"{WORLD}:images"


def given(count: int = 60, **settings: Any) -> np.ndarray:
    """(count, W) float64 of what the embedder gives, in the order of its images."""
    world = load_user_file(WORLD)
    teacher = world.embedder((8, 8), **settings)
    with torch.no_grad():
        return teacher(teacher.collate(list(world.images(count).images))).double().numpy()


@pytest.mark.parametrize("kind", ["member", "each", "whiten"])
def test_a_scale_is_that_of_the_teachers_own_numbers(quick_dump: QuickDump, kind: str) -> None:
    """Of 256 rows, here of all."""
    cache = quick_dump(data=DATA, teacher=[EMBEDDER, WHOLE], codec="float32", whiten=True)
    mean, factor = (one.double().numpy() for one in cache.output_scale("embedder", kind))
    rows = given()
    np.testing.assert_allclose(mean, rows.mean(axis=0), atol=1e-6)
    made = (rows - mean) * factor if factor.ndim == 1 else (rows - mean) @ factor
    each = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    if kind == "member":
        np.testing.assert_allclose(made, (rows - rows.mean(axis=0)) / np.sqrt(rows.var(axis=0).mean()), atol=1e-5)
    elif kind == "each":
        np.testing.assert_allclose(made, each, atol=1e-5)
    else:  # R**(-1/2) is the symmetric positive matrix whose square is the inverse
        root = np.linalg.lstsq(each, made, rcond=None)[0]
        correlations = each.T @ each / len(each) + 0.01 * np.eye(12)
        np.testing.assert_allclose(root, root.T, atol=1e-5)
        np.testing.assert_allclose(root @ root @ correlations, np.eye(12), atol=1e-4)
        assert (np.linalg.eigvalsh(root) > 0).all()


@pytest.mark.parametrize("counts", [None, [0, 4, 0, 0, 1, 7, 2]])
def test_a_scale_is_measured_on_rows_of_every_part_of_sorted_data(counts: list[int] | None) -> None:
    """Numbers that rise from row to row: the first rows would have a tenth of the deviation."""
    count = 3500
    records = np.ones(count, np.int64) if counts is None else np.tile(counts, count // len(counts))
    said = np.linspace(0, 1, count)

    class Rising:
        name, width, classifier = "rising", 1, None

        def find_classifier(self, batch: Any) -> None:
            return None

        def collated(self, items: list[int]) -> list[int]:
            return items

        def __call__(self, batch: list[int]) -> Any:
            rows = np.repeat(said[batch], records[batch])
            return SimpleNamespace(logits=torch.from_numpy(rows)[:, None], classifier_input=None)

    positions = None if counts is None else SimpleNamespace(counts=records)
    viewed: Any = SimpleNamespace(
        transfer_set=SimpleNamespace(positions=positions), policy=Policy(), render=lambda i, _view: i
    )
    for whiten in (False, True):
        prober, teacher = choose_codec.Prober(viewed, np.arange(count), 64), cast(Any, Rising())
        rows = prober.scaling_rows(teacher, whiten=whiten)
        every = np.repeat(said, records)
        assert 0.8 < len(rows) / (choose_codec.FITTED_ROWS if whiten else choose_codec.SCALED_ROWS) < 1.2
        assert float(rows.mean()) == pytest.approx(every.mean(), abs=0.05)
        assert float(rows.std()) == pytest.approx(every.std(), rel=0.1)
        again = choose_codec.Prober(viewed, np.arange(count), 50).scaling_rows(teacher, whiten=whiten)
        assert torch.equal(rows, again)


def test_what_is_stored_is_as_it_was_given_with_a_scale_or_more(quick_dump: QuickDump) -> None:
    plain = quick_dump(data=DATA, teacher=[EMBEDDER], codec="float32", out="plain")
    whitened = quick_dump(data=DATA, teacher=[EMBEDDER], codec="float32", whiten=True, out="whitened")
    rows, views = np.arange(60), np.zeros(60, np.int64)
    a, b = (one.gather(rows, views).embedding() for one in (plain, whitened))
    assert torch.equal(a, b)
    torch.testing.assert_close(a, torch.from_numpy(given()[[int(plain.samples.key(r)[4:]) for r in rows]]).float())
    with pytest.raises(
        CacheError, match=r"holds nothing that whitens member 'embedder'\n.*--whiten, or use scale=each"
    ):
        plain.output_scale("embedder", "whiten")
    with pytest.raises(CacheError, match="unknown scale 'all'"):
        plain.output_scale("embedder", "all")


def test_a_number_that_never_changes_is_not_divided_by_nothing() -> None:
    rows = torch.cat([torch.full((40, 1), 3.0), torch.randn(40, 2, generator=torch.Generator().manual_seed(0))], dim=1)
    measured = measure_scale(rows, whiten=True)
    assert measured["deviation"][0] == 0 and bool(measured["whitening"].isfinite().all())


def test_it_goes_along_with_more_views_and_with_a_part_of_the_samples(quick_dump: QuickDump, tmp_path: Path) -> None:
    settings = {"data": f"{DATA}?kind=classes", "policy": ("shift:pixels=1",), "codec": "float32"}
    first = quick_dump(**settings, teacher=[EMBEDDER], views=2, whiten=True)
    wanted = first.output_scale("embedder", "whiten")
    with pytest.raises(ConfigError, match="--whiten cannot be given with more views"):
        quick_dump(data=settings["data"], teacher=[EMBEDDER], views=3, extend=True, codec=None, policy=(), whiten=True)
    quick_dump(data=settings["data"], teacher=[EMBEDDER], views=3, extend=True, codec=None, policy=())
    path = str(tmp_path / "cache")
    assert cli.main(["subset", path, str(tmp_path / "less"), "--keep-labels", "cat"]) == 0
    assert cli.main(["verify", str(tmp_path / "less"), "--full"]) == 0
    assert (
        "deviation of its numbers, and what whitens them stand beside" in (tmp_path / "less" / "README.md").read_text()
    )
    for one in (path, tmp_path / "less"):
        found = softcache.open(one, quiet=True).output_scale("embedder", "whiten")
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.slow
def test_parts_have_the_scale_of_the_whole_and_a_lost_one_is_made_again(quick_dump: QuickDump, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"data": f"{DATA}?count=300", "teacher": [EMBEDDER], "shard_rows": 256, "whiten": True}
    whole = quick_dump(out="whole", **settings)
    base = {**settings, "teacher": (EMBEDDER,), "threads": 1, "workers": 0, "codec": "float32"}
    for part in ("2/2", "1/2"):
        dump.run(DumpConfig(**base, out=str(tmp_path / "parts"), part=part), quiet=True)
    assert softcache.open(tmp_path / "parts", quiet=True).id == whole.id
    lost = tmp_path / "parts" / "members" / "embedder" / "constants-00000.h5"
    before = lost.read_bytes()
    lost.unlink()
    assert cli.main(["repair", str(tmp_path / "parts"), "--allow-code"]) == 0
    assert lost.read_bytes() == before
    shutil.rmtree(tmp_path / "parts")


@pytest.mark.slow
def test_plan_counts_it(quick_dump: QuickDump) -> None:
    settings: dict[str, Any] = {"data": f"{DATA}?count=300", "teacher": (f"{EMBEDDER}&width=200",), "whiten": True}
    cache = quick_dump(**settings, codec="int8")
    plan = PlanConfig(**settings, codec="int8", threads=1, workers=0)
    found = forecast.run(plan, quiet=True, codecs=("int8",), trial_rows=(256, 256), trial_seconds=0.1)
    assert found.choice.nbytes == pytest.approx(cache.manifest.nbytes, rel=0.02)


def test_a_dump_that_goes_on_keeps_the_scale_it_began_with(tmp_path: Path) -> None:
    made: dict[str, Any] = {
        "data": f"{DATA}?count=300",
        "teacher": (EMBEDDER,),
        "shard_rows": 256,
        "out": str(tmp_path / "c"),
    }
    made |= {"threads": 1, "workers": 0}
    dump.run(DumpConfig(**made, part="1/2"), quiet=True)
    with pytest.raises(ConfigError, match=r"was begun without --whiten, and its constants are written\n.*leave it out"):
        dump.run(DumpConfig(**made, part="2/2", whiten=True), quiet=True)
    assert dump.run(DumpConfig(**made, part="2/2"), quiet=True).manifest is not None


@pytest.mark.parametrize("wrong", ["length", "dtype", "nan"])
def test_a_scale_that_is_none_is_refused_when_it_is_asked_for(
    quick_dump: QuickDump, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """Somebody else's cache may hold anything."""
    whole = Storage.constants

    def others(self: Storage) -> dict[str, np.ndarray]:
        found = whole(self)
        mean = found["output_mean"]
        bad = {"length": mean[:-1], "dtype": mean.astype(np.float16), "nan": mean * np.float32("nan")}
        return found | {"output_mean": bad[wrong]}

    monkeypatch.setattr(Storage, "constants", others)
    cache = quick_dump(data=DATA, teacher=[EMBEDDER], codec="float32")
    assert cache.gather(np.arange(3), np.zeros(3, np.int64)).embedding().shape == (3, 12)
    with pytest.raises(CacheError, match="the stored mean of member 'embedder' is not one of its 12 numbers"):
        cache.output_scale("embedder", "each")


def test_teachers_of_classes_have_none(quick_dump: QuickDump) -> None:
    labelled = f"{DATA}?kind=classes"
    cache = quick_dump(data=labelled, teacher=[f"{WORLD}:classifier"])
    with pytest.raises(CacheError, match="the cache holds no scale of member 'classifier'"):
        cache.output_scale("classifier", "each")
    with pytest.raises(ConfigError, match="--whiten is of embeddings and values, and no teacher gives any"):
        quick_dump(data=labelled, teacher=[f"{WORLD}:classifier"], whiten=True, out="other")

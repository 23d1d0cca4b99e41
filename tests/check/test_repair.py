"""repair: damaged files come back byte for byte, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import WORLDS

import softcache
from softcache import cli
from softcache.cache.schema import MANIFEST
from softcache.check import verify
from softcache.errors import CacheError, DamagedCacheError

CODEC = {"lowrank": "lowrank:max_kl=1e-6,at_temperature=4", "int8": "int8", "linear_head": "linear_head"}


def dump(folder: Path, out: Path, *more: str) -> None:
    argv = ["dump", "--data", f"{folder}/pieces.py:toy", "--out", str(out), "--quiet", "--threads", "1"]
    assert cli.main([*argv, "--device", "cpu", "--batch-size", "64", *more]) == 0


def teacher(folder: Path, seed: int) -> str:
    return f"{folder}/pieces.py:network?seed={seed}&name=t{seed}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("repair")
    shutil.copy(WORLDS / "twelve_classes.py", path / "pieces.py")
    return path


@pytest.fixture(scope="module")
def pristine(folder: Path) -> Path:
    """Three rounds: two members (constants, dense rows, a feature), then more views of both, then a third member."""
    out = folder / "cache"
    first = ["--teacher", teacher(folder, 1), "--teacher", teacher(folder, 2)]
    views = ["--policy", "shift:pixels=1", "--views", "2", "--shard-rows", "256"]
    dump(folder, out, *first, *views, "--codec", CODEC["lowrank"], "--features", "1:flatten")
    dump(folder, out, *first, "--extend", "--views", "3", "--shard-rows", "256")
    dump(folder, out, "--extend", "--teacher", teacher(folder, 3), "--codec", "linear_head", "--shard-rows", "256")
    return out


@pytest.fixture
def cache(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "cache"))


def contents(cache: Path) -> dict[str, bytes]:
    """Every file that belongs to the cache, locks and leftovers of a dump aside."""
    inside = (p for p in cache.rglob("*") if p.is_file() and p.relative_to(cache).parts[0] != "dump")
    return {str(p.relative_to(cache)): p.read_bytes() for p in inside}


def repair(cache: Path, *more: str, code: int = 0) -> None:
    assert cli.main(["repair", str(cache), "--allow-code", *more]) == code


def flip(path: Path, offset: int = -9) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 16
    path.write_bytes(data)


def files_of(cache: Path) -> list[str]:
    return [file.path for file in softcache.open(cache).manifest.files]


def test_the_cache_holds_every_kind_of_file(pristine: Path) -> None:
    kinds = {file.kind for file in softcache.open(pristine).manifest.files}
    assert kinds == {"samples", "probe", "constants", "views", "member", "dense"}


@pytest.mark.slow
def test_every_single_file_can_be_made_again(
    pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = contents(pristine)
    names = files_of(pristine)
    chosen = [
        next(n for n in names if kind in n)
        for kind in ("samples", "probe", "t1/constants", "t3/constants", "views/part-00001")
    ]
    chosen += ["members/t1/part-00000.h5", "members/t2/part-00004.h5", "members/t3/part-00007.h5"]
    chosen += [next(n for n in names if "dense" in n)]
    for number, name in enumerate(chosen):
        cache = Path(shutil.copytree(pristine, tmp_path / f"{number}"))
        flip(cache / name, (cache / name).stat().st_size // 2)
        assert verify.run(cache, full=True, quiet=True).damaged == [name]
        repair(cache)
        assert f"mended  {name}: the same bytes" in capsys.readouterr().out
        assert contents(cache) == wanted


@pytest.mark.slow
def test_all_at_once_missing_cut_and_flipped(pristine: Path, cache: Path) -> None:
    wanted = contents(pristine)
    for number, name in enumerate(files_of(cache)):
        if number % 3 == 0:
            (cache / name).unlink()
        elif number % 3 == 1:
            os.truncate(cache / name, 5000)
        else:
            flip(cache / name)
    shutil.rmtree(cache / "members/t2")
    repair(cache)
    assert contents(cache) == wanted
    assert verify.run(cache, full=True, quiet=True).state == "whole"
    assert not (cache / "dump/repair").exists()


def test_a_whole_cache_is_left_alone(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in cache.rglob("*")}
    repair(cache)
    assert "nothing is damaged" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*")} == before


def test_only_what_is_damaged_is_written(cache: Path) -> None:
    name = "members/t2/part-00001.h5"
    flip(cache / name)
    before = {
        p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in cache.rglob("*.h5") if str(p.relative_to(cache)) != name
    }
    repair(cache)
    assert {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in before} == before


def test_code_that_the_cache_names_is_not_run_unasked(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(cache / "members/t1/part-00000.h5")
    before = contents(cache)
    assert cli.main(["repair", str(cache)]) == 2
    said = capsys.readouterr().err
    assert "pieces.py:toy" in said and f"softcache repair {cache} --allow-code" in said
    assert contents(cache) == before


def test_another_teacher_is_refused_and_nothing_changes(
    folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(cache / "members/t1/part-00000.h5")
    before = contents(cache)
    repair(cache, "--teacher", teacher(folder, 9), code=1)
    said = capsys.readouterr().out
    assert "0 files mended, 1 left" in said and "member 't1'" in said and "is not among the ones given" in said
    assert contents(cache) == before


def test_other_data_is_refused_and_nothing_changes(
    folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(cache / "members/t1/part-00000.h5")
    before = contents(cache)
    repair(cache, "--data", f"{folder}/pieces.py:toy?shift=1", code=1)
    assert "samples changed since" in capsys.readouterr().out
    assert contents(cache) == before


def test_samples_of_other_data_come_out_as_other_bytes(
    folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(cache / "samples.h5", 5000)
    before = contents(cache)
    repair(cache, "--data", f"{folder}/pieces.py:toy?shift=1", code=1)
    assert "samples.h5: came out as other bytes" in capsys.readouterr().out
    assert contents(cache) == before


@pytest.mark.slow
@pytest.mark.parametrize("told", [True, False])
def test_pixel_digests_need_the_data_and_no_teacher(told: bool, folder: Path, cache: Path) -> None:
    flip(cache / "views/part-00000.h5")
    if not told:
        (cache / "provenance.json").unlink()
    # code of the cache's own is not called
    assert cli.main(["repair", str(cache), "--data", f"{folder}/pieces.py:toy"]) == 0
    assert verify.run(cache, full=True, quiet=True).state == "whole"


@pytest.mark.slow
def test_without_provenance_it_asks_for_data_and_teacher(
    folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cache / "provenance.json").unlink()
    flip(cache / "members/t1/part-00000.h5")
    repair(cache, code=1)
    assert "does not say which data" in (said := capsys.readouterr().out) and "--teacher for each" in said
    repair(cache, "--data", f"{folder}/pieces.py:toy", "--teacher", teacher(folder, 1))
    assert verify.run(cache, full=True, quiet=True).state == "whole"


@pytest.mark.slow
def test_from_another_copy(pristine: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["samples.h5", "members/t1/part-00000.h5", "members/t3/part-00007.h5"]
    for name in names:
        flip(cache / name)
    mirror = Path(shutil.copytree(pristine, tmp_path / "mirror"))
    flip(mirror / names[2])
    repair(cache, "--from", str(mirror), code=1)
    said = capsys.readouterr().out
    assert "2 files mended, 1 left" in said and "is not whole in" in said
    assert verify.run(cache, full=True, quiet=True).damaged == [names[2]]
    repair(cache, "--from", str(pristine))
    assert contents(cache) == contents(pristine)


def break_manifest(cache: Path) -> None:
    flip(cache / MANIFEST, 40)


def break_copy(cache: Path) -> None:
    flip(cache / "manifests" / f"{softcache.open(cache).id}.json", 40)


def remove_copies(cache: Path) -> None:
    shutil.rmtree(cache / "manifests")


def remove_manifest_with_card(cache: Path) -> None:
    os.truncate(cache / MANIFEST, 10)
    (cache / "README.md").unlink()


@pytest.mark.slow
@pytest.mark.parametrize("harm", [break_manifest, break_copy, remove_manifest_with_card])
def test_manifest_and_copy_mend_each_other(harm: Any, pristine: Path, cache: Path) -> None:
    harm(cache)
    assert verify.run(cache, full=False).state == "damaged"
    repair(cache)
    assert contents(cache) == contents(pristine)


def test_a_manifest_without_any_copy_cannot_be_trusted(
    pristine: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remove_copies(cache)
    with pytest.raises(DamagedCacheError, match="no id in manifests/"):
        softcache.open(cache)
    repair(cache, code=2)
    assert "no id in manifests/" in capsys.readouterr().err
    repair(cache, "--from", str(pristine))
    assert softcache.open(cache).id == softcache.open(pristine).id


@pytest.mark.slow
def test_a_repair_that_is_interrupted_leaves_no_half_file(
    cache: Path, pristine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from softcache.cache.write import rewriter

    damaged = ["members/t1/part-00000.h5", "members/t1/part-00001.h5"]
    for name in damaged:
        flip(cache / name)
    publish = rewriter.durable.publish

    def interrupted(temporary: Path, final: Path) -> None:
        if final.parent.parent.parent == cache and final.name == "part-00001.h5":
            raise KeyboardInterrupt
        publish(temporary, final)

    monkeypatch.setattr(rewriter.durable, "publish", interrupted)
    assert cli.main(["repair", str(cache), "--allow-code"]) == 130
    assert verify.run(cache, full=True, quiet=True).damaged == damaged[1:]
    monkeypatch.undo()
    repair(cache)
    assert contents(cache) == contents(pristine)


def test_two_repairs_at_once(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from softcache.files.locks import release_lock, take_lock

    flip(cache / "members/t1/part-00000.h5")
    held = take_lock(cache / "dump/repair.lock")
    try:
        repair(cache, code=2)
    finally:
        release_lock(held)
    assert "is being repaired by another process" in capsys.readouterr().err


def test_json(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(cache / "members/t1/part-00000.h5")
    repair(cache, "--json")
    assert json.loads(capsys.readouterr().out) == {
        "path": str(cache),
        "mended": ["members/t1/part-00000.h5"],
        "left": {},
    }


def test_what_is_no_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repair(tmp_path / "nothing", code=2)
    assert "no such folder" in capsys.readouterr().err


def test_a_copy_that_is_not_there(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repair(cache, "--from", str(tmp_path / "nothing"), code=2)
    assert "--from" in (said := capsys.readouterr().err) and "no such folder" in said


def test_records_are_the_same_numbers_afterwards(pristine: Path, cache: Path) -> None:
    rows, views = np.arange(520).repeat(3), np.tile(np.arange(3), 520)
    wanted = softcache.open(pristine).gather(rows, views, features=["1:flatten"])
    for name in files_of(cache):
        if "part-00001" in name or "dense" in name:
            (cache / name).unlink()
    with pytest.raises(CacheError):
        softcache.open(cache).gather(rows, views)
    repair(cache)
    found = softcache.open(cache).gather(rows, views, features=["1:flatten"])
    for member in ("t1", "t2", "t3"):
        assert found.logits(member).equal(wanted.logits(member))
    assert found.feature("1:flatten", "t1").equal(wanted.feature("1:flatten", "t1"))

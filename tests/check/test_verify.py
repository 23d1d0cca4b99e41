"""verify: a whole cache is called whole, and any damage is named by file, data set and block."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import WORLDS

import softcache
from softcache import cli
from softcache.cache.manifest import Manifest, canonical_json
from softcache.check import verify
from softcache.errors import CacheError, SoftcacheError


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One span of 600 rows, 2 views, float32: 192,000 bytes of logits, three blocks."""
    folder = tmp_path_factory.mktemp("verify")
    shutil.copy(WORLDS / "forty_classes.py", folder / "pieces.py")
    argv = ["dump", "--data", f"{folder}/pieces.py:toy", "--teacher", f"{folder}/pieces.py:teacher", "--quiet"]
    argv += ["--codec", "float32", "--policy", "shift", "--views", "2", "--threads", "1", "--device", "cpu"]
    assert cli.main([*argv, "--out", str(folder / "cache")]) == 0
    return folder / "cache"


@pytest.fixture
def cache(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "cache"))


SHARD, VIEWS, SAMPLES, PROBE = "members/teacher/part-00000.h5", "views/part-00000.h5", "samples.h5", "probe.h5"


def stored(cache: Path, path: str) -> Any:
    return next(file for file in softcache.open(cache).manifest.files if file.path == path)


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def faults(cache: Path, *, full: bool) -> list[str]:
    verdict = verify.run(cache, full=full, quiet=True)
    assert (verdict.state == "whole") == (not verdict.faults)
    return verdict.faults


@pytest.mark.parametrize("full", [False, True])
def test_a_whole_cache(pristine: Path, full: bool) -> None:
    verdict = verify.run(pristine, full=full, quiet=True)
    files = list(pristine.rglob("*.h5"))
    assert (verdict.state, verdict.exit_code, verdict.faults) == ("whole", 0, [])
    assert verdict.files == len(files) == 4
    assert verdict.nbytes == sum(p.stat().st_size for p in files)
    assert verdict.id == hashlib.sha256((pristine / "manifest.json").read_bytes()).hexdigest()
    told = "whole" if full else "whole by names and sizes"
    assert f": {told}; " in verdict.text() and verdict.id in verdict.text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "name", "block"),
    [
        (SHARD, "logits", 0),
        (SHARD, "logits", 1),
        (SHARD, "logits", 2),
        (SHARD, "eps", 0),
        (VIEWS, "pixel_digests", 0),
        (SAMPLES, "ids", 0),
        (SAMPLES, "labels", 0),
        (SAMPLES, "digests", 0),
        (SAMPLES, "key_bytes", 0),
        (SAMPLES, "key_offsets", 0),
        (PROBE, "rows", 0),
        (PROBE, "views", 0),
        (PROBE, "shapes", 0),
        (PROBE, "pixels", 0),
    ],
)
@pytest.mark.parametrize("where", ["first", "last"])
def test_one_flipped_bit_names_file_data_set_and_block(
    cache: Path, path: str, name: str, block: int, where: str
) -> None:
    array = stored(cache, path).arrays[name]
    start, stop = block * 65536, min((block + 1) * 65536, array.nbytes)
    flip(cache / path, array.offset + (start if where == "first" else stop - 1), bit=7)
    found = faults(cache, full=True)
    assert re.fullmatch(
        rf"{path}: data set {name!r}, block {block}(, rows .*)?: its bytes are not those that were written(; samples .*)?",
        found[0],
    )
    assert len(found) == 2 and found[1].startswith(f"{path}: sha256 is ")
    assert faults(cache, full=False) == []  # names and sizes cannot show it


@pytest.mark.slow
@pytest.mark.parametrize("path", [SHARD, VIEWS, SAMPLES, PROBE])
def test_a_flipped_bit_outside_the_data(cache: Path, path: str) -> None:
    """In the checksums, in the HDF5 headers, and in the padding."""
    file = stored(cache, path)
    sums = next(array for name, array in file.arrays.items() if name.endswith("_crc32"))
    first = min(array.offset for array in file.arrays.values())
    assert first > 0
    for offset in (sums.offset, 8, first - 1):
        flip(cache / path, offset)
        found = faults(cache, full=True)
        assert found[-1].startswith(f"{path}: sha256 is ")
        assert (len(found) == 2) == (offset == sums.offset)
        flip(cache / path, offset)
    assert faults(cache, full=True) == []


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("path", [SHARD, VIEWS, SAMPLES, PROBE])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda p: p.write_bytes(p.read_bytes()[:-1]), r"has \d+ bytes, the manifest says \d+", id="cut"),
        pytest.param(lambda p: p.write_bytes(b""), "has 0 bytes", id="empty"),
        pytest.param(lambda p: p.write_bytes(p.read_bytes() + b"\0"), r"has \d+ bytes", id="longer"),
        pytest.param(lambda p: p.unlink(), "not there", id="missing"),
    ],
)
def test_a_file_of_another_size_or_none(
    cache: Path, path: str, damage: Callable[[Path], None], message: str, full: bool
) -> None:
    damage(cache / path)
    (fault,) = faults(cache, full=full)
    assert path in fault
    assert re.search(message, fault)
    assert verify.run(cache, full=full, quiet=True).exit_code == 1


def test_every_damaged_file_is_listed(cache: Path) -> None:
    (cache / SHARD).unlink()
    (cache / VIEWS).write_bytes(b"")
    found = faults(cache, full=True)
    assert len(found) == 2
    assert SHARD in "".join(found) and VIEWS in "".join(found)


def edit(cache: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest's JSON without telling its copy."""
    entry = json.loads((cache / "manifest.json").read_bytes())
    change(entry)
    (cache / "manifest.json").write_bytes(canonical_json(entry))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda m: m["class_names"].reverse(), "which is no id in manifests/", id="classes"),
        pytest.param(
            lambda m: m["files"][-1]["statistics"].update(correct=600),
            "which is no id in manifests/",
            id="statistics",
        ),
        pytest.param(lambda m: m["files"].pop(), "should stand here, not the end", id="a file less"),
        pytest.param(lambda m: m["files"][-1].update(rows=[0, 599]), "should stand here", id="rows"),
        pytest.param(lambda m: m.pop("views"), "views: missing", id="a field less"),
        pytest.param(
            lambda m: m["files"][0].update(bytes="many"), r"files\[0\]\.bytes: 'many' is not an integer", id="type"
        ),
    ],
)
def test_an_edited_manifest(cache: Path, change: Any, message: str, full: bool) -> None:
    edit(cache, change)
    found = faults(cache, full=full)
    assert any(re.search(message, fault) for fault in found), found
    assert all("manifest" in fault for fault in found)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b'{"form": 0}'])
def test_a_manifest_that_is_none(cache: Path, data: bytes) -> None:
    (cache / "manifest.json").write_bytes(data)
    (fault,) = faults(cache, full=False)
    assert "is no manifest that can be trusted" in fault


def test_a_changed_copy_in_manifests(cache: Path) -> None:
    (copy,) = (cache / "manifests").iterdir()
    flip(copy, 20)
    (fault,) = faults(cache, full=False)
    assert re.match(r"manifests/[0-9a-f]{64}\.json: has sha256 ", fault)


def commit(cache: Path, manifest: Manifest) -> None:
    """Make a manifest the cache's own, copy and all: what a careless tool or an attacker would do."""
    data = manifest.to_bytes()
    for old in (cache / "manifests").iterdir():
        old.unlink()
    (cache / "manifests" / f"{hashlib.sha256(data).hexdigest()}.json").write_bytes(data)
    (cache / "manifest.json").write_bytes(data)


def replaced(cache: Path, path: str, **changes: Any) -> Manifest:
    manifest = softcache.open(cache).manifest
    files = [dataclasses.replace(f, **changes) if f.path == path else f for f in manifest.files]
    return dataclasses.replace(manifest, files=files)


def test_a_file_that_is_no_hdf5_though_its_hash_is_right(cache: Path) -> None:
    """Data and checksums in place, hash and size as the manifest says, the HDF5 around them gone."""
    data = (cache / VIEWS).read_bytes()
    start = min(array.offset for array in stored(cache, VIEWS).arrays.values())
    (cache / VIEWS).write_bytes(bytes(start) + data[start:])
    commit(cache, replaced(cache, VIEWS, sha256=hashlib.sha256((cache / VIEWS).read_bytes()).hexdigest()))
    assert faults(cache, full=False) == []
    (fault,) = faults(cache, full=True)
    assert re.match(f"{VIEWS}: .*HDF5", fault)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda file: file.create_dataset("extra", data=np.arange(3)), "extra", id="data set more"),
        pytest.param(lambda file: file.__delitem__("pixel_digests"), "pixel_digests", id="data set less"),
        pytest.param(lambda file: file.move("pixel_digests", "pixels"), "pixel", id="renamed"),
        pytest.param(
            lambda file: (
                file.__delitem__("pixel_digests"),
                file.create_dataset("pixel_digests", data=np.zeros((2, 600), "<u4"), chunks=(2, 60)),
            ),
            "pixel_digests",
            id="chunked",
        ),
    ],
)
def test_hdf5_that_tells_another_story_than_the_manifest(cache: Path, change: Any, message: str) -> None:
    """What h5py would show must be what the manifest's offsets give."""
    arrays = stored(cache, VIEWS).arrays
    with h5py.File(cache / VIEWS, "r+", libver=("v110", "v110")) as file:
        change(file)
    data = (cache / VIEWS).read_bytes()
    changes = {"sha256": hashlib.sha256(data).hexdigest(), "nbytes": len(data), "arrays": arrays}
    commit(cache, replaced(cache, VIEWS, **changes))
    found = faults(cache, full=True)
    assert any(message in fault for fault in found), found
    assert all(fault.startswith(VIEWS) for fault in found)


def test_an_offset_that_is_another_data_sets(cache: Path) -> None:
    arrays = dict(stored(cache, SHARD).arrays)
    arrays["eps"] = dataclasses.replace(arrays["eps"], offset=arrays["logits"].offset)
    commit(cache, replaced(cache, SHARD, arrays=arrays))
    (fault,) = faults(cache, full=False)
    assert "'eps' lies over another data set" in fault or "'logits' lies over another data set" in fault


def test_a_data_set_past_the_end(cache: Path) -> None:
    arrays = dict(stored(cache, SHARD).arrays)
    arrays["eps_crc32"] = dataclasses.replace(
        arrays["eps_crc32"], offset=-(-(cache / SHARD).stat().st_size // 4096) * 4096
    )
    commit(cache, replaced(cache, SHARD, arrays=arrays))
    (fault,) = faults(cache, full=False)
    assert "data sets reach past the end" in fault


def test_an_unfinished_dump(cache: Path) -> None:
    (cache / "manifest.json").unlink()
    verdict = verify.run(cache, full=True, quiet=True)
    assert (verdict.state, verdict.exit_code) == ("unfinished", 3)
    assert "1 of 1 spans are written (100 %)" in verdict.faults[0]


def test_what_is_no_cache_is_an_error(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(CacheError, match="no such folder"):
        verify.run(tmp_path / "nothing", full=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CacheError, match="not a softcache cache"):
        verify.run(tmp_path / "empty", full=False)
    edit(cache, lambda m: m.update(format=7))
    with pytest.raises(CacheError, match="format version 7; this softcache reads versions 1 and 2"):
        verify.run(cache, full=False)


@pytest.mark.parametrize("depth", [[], ["--quick"], ["--full"]])
def test_json_for_machines(pristine: Path, depth: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(pristine), *depth, "--json"]) == 0
    said, errors = capsys.readouterr()
    verdict = json.loads(said)
    assert (verdict["state"], verdict["faults"], verdict["files"]) == ("whole", [], 4)
    assert verdict["id"] == softcache.open(pristine).id
    assert errors == ""


def test_json_and_text_of_a_damaged_cache(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(cache / SHARD, stored(cache, SHARD).arrays["logits"].offset + 65536)
    assert cli.main(["verify", str(cache), "--full", "--json"]) == 1
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["state"] == "damaged"
    assert verdict["faults"][0].startswith(f"{SHARD}: data set 'logits', block 1, rows 0 to 599 of views 0 to 1: ")
    assert verdict["damaged"] == [SHARD]
    place = {"file": SHARD, "data_set": "logits", "block": 1, "rows": [0, 600], "views": [0, 2]}
    assert verdict["damage"] == [place]
    assert cli.main(["verify", str(cache), "--full"]) == 1
    assert verdict["faults"][0] in capsys.readouterr().out
    assert cli.main(["verify", str(cache)]) == 0


def test_nothing_is_written_into_a_cache(cache: Path) -> None:
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in cache.rglob("*")}
    verify.run(cache, full=True, quiet=True)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in cache.rglob("*")} == before


def test_damage_is_met_by_readers_as_well(cache: Path) -> None:
    (cache / SHARD).write_bytes((cache / SHARD).read_bytes()[:-1])
    opened = softcache.open(cache)
    with pytest.raises(SoftcacheError, match=r"part-00000\.h5: has \d+ bytes"):
        opened.gather(np.arange(2), np.zeros(2, np.int64))


def test_ctrl_c_waits_for_no_file_that_is_being_hashed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards may be of many GB, and every core reads one."""
    given_up, hash_of = [], verify.sha256_of

    def slow(fd: int, *, stop: Callable[[], bool]) -> str:
        begin = time.monotonic()
        while not stop() and time.monotonic() - begin < 20:
            time.sleep(0.01)
        given_up.append(time.monotonic() - begin)
        return hash_of(fd, stop=stop)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    first = next(iter(softcache.open(cache).manifest.files))
    monkeypatch.setattr(verify, "sha256_of", lambda fd, *, stop: (hash_of if is_of(fd, first) else slow)(fd, stop=stop))
    monkeypatch.setattr("softcache.report.progress.Meter.add", interrupted)
    monkeypatch.setattr(verify.os, "cpu_count", lambda: 2)
    with pytest.raises(KeyboardInterrupt):
        verify.run(cache, full=True, quiet=True)
    assert given_up and max(given_up) < 10


def is_of(fd: int, file: Any) -> bool:
    return os.fstat(fd).st_size == file.nbytes

"""Block checksums while reading: a gather never gives a wrong number in silence, and says whose it would have been."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import QuickDump

import softcache
from softcache import cli
from softcache.cache import schema
from softcache.cache.checksums import damage_of
from softcache.errors import CacheError, DamagedCacheError
from softcache.targets.cache import Cache

MODES = ("mmap", "pread")


@pytest.fixture
def made(quick_dump: QuickDump, toy: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """600 rows in 3 spans x 2 views, in blocks of 512 bytes, so that a shard has several and a record may lie in two."""
    for module in ("schema", "checksums", "write.shard"):
        monkeypatch.setattr(f"softcache.cache.{module}.BLOCK_BYTES", 512)
    return quick_dump(f"{toy}:images?count=600", codec="float32", policy=("shift",), views=2, shard_rows=256)


def flip(cache: Cache, member: str | None, name: str, part: int, byte: int) -> Path:
    """Turn one bit of a data set of one part."""
    kind = "views" if member is None else "member"
    file = list(cache.manifest.files_of(kind, member))[part]
    path = cache.reader.path / file.path
    data = bytearray(path.read_bytes())
    data[file.arrays[name].offset + byte] ^= 4
    path.write_bytes(data)
    return path


def reopen(cache: Cache, **how: Any) -> Cache:
    """Without the hash of whole files, which would find everything before a block is touched."""
    return softcache.open(cache.reader.path, check_files=False, **how)


def all_places(cache: Cache) -> tuple[np.ndarray, np.ndarray]:
    return np.tile(np.arange(len(cache)), cache.num_views), np.repeat(np.arange(cache.num_views), len(cache))


def rows_of_block(cache: Cache, byte: int, record_bytes: int, part: int) -> set[tuple[int, int]]:
    """(row, view) of every record that shares a block of 512 bytes with one byte of a part, by plain arithmetic."""
    span = cache.manifest.plan.rounds[0].layout.spans()[part]
    start = byte // 512 * 512
    records = {b // record_bytes for b in range(start, start + 512)}
    inside = [r for r in records if r < span.rows * span.views]
    return {(span.row_start + r % span.rows, span.view_start + r // span.rows) for r in inside}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("part", "byte"),
    [(0, 0), (0, 511), (0, 512), (1, 5000), (2, 2 * 88 * 16 - 1)],
    ids=["0", "511", "512", "mid", "last"],
)
def test_exactly_the_records_of_a_damaged_block_are_refused(made: Cache, mode: str, part: int, byte: int) -> None:
    rows, views = all_places(made)
    wanted = made.gather(rows, views).logits()
    path = flip(made, "exact", "logits", part, byte)
    harmed = rows_of_block(made, byte, 16, part)
    for when in ("first", "always"):
        cache = reopen(made, mode=mode, check_blocks=when)
        for row, view in sorted(harmed | {(0, 0), (0, 1), (255, 0), (256, 1), (511, 0), (512, 0), (599, 1)}):
            if (row, view) in harmed:
                with pytest.raises(DamagedCacheError, match=re.escape(f"{path}: data set 'logits', block ")):
                    cache.gather(np.array([row]), np.array([view]))
            else:
                found = cache.gather(np.array([row]), np.array([view])).logits()[0]
                assert found.equal(wanted[view * 600 + row])
        with pytest.raises(DamagedCacheError):
            cache.gather(rows, views)


def test_the_error_names_rows_views_and_samples(made: Cache) -> None:
    flip(made, "exact", "logits", 1, 256 * 16 + 5 * 512)
    with pytest.raises(DamagedCacheError) as caught:
        reopen(made).gather(np.arange(600), np.ones(600, np.int64))
    found = re.search(
        r"block 13, rows (\d+) to (\d+) of view 1: its bytes .*; samples (.*) and 27 more", caught.value.message
    )
    assert found is not None
    assert (int(found[1]), int(found[2])) == (256 + 160, 256 + 191)
    assert found[3].split(", ") == [made.samples.key(row) for row in range(416, 421)]
    assert "softcache repair" in caught.value.tip


@pytest.mark.parametrize("mode", MODES)
def test_never_looks_at_nothing(made: Cache, mode: str) -> None:
    rows, views = all_places(made)
    before = made.gather(rows, views).logits()
    flip(made, "exact", "logits", 0, 100)
    after = reopen(made, mode=mode, check_blocks="never").gather(rows, views).logits()
    assert int((before != after).any(dim=1).sum()) == 1


@pytest.mark.parametrize("mode", MODES)
def test_first_looks_once_and_always_each_time(made: Cache, mode: str) -> None:
    places = all_places(made)
    caches = {when: reopen(made, mode=mode, check_blocks=when) for when in ("first", "always")}
    for cache in caches.values():
        cache.gather(*places)
    flip(made, "exact", "logits", 0, 100)
    caches["first"].gather(*places)  # every block was seen whole
    with pytest.raises(DamagedCacheError, match="block 0"):
        caches["always"].gather(*places)


@pytest.mark.parametrize("name", ["eps", "pixel_digests"])
def test_every_data_set_of_a_part_is_looked_at(made: Cache, name: str) -> None:
    member = None if name == "pixel_digests" else "exact"
    flip(made, member, name, 2, 3)
    cache = reopen(made)
    cache.reader.gather(member, name, np.array([0]), np.array([0]))
    with pytest.raises(DamagedCacheError, match=f"'{name}', block 0, rows 512 to"):
        cache.reader.gather(member, name, np.array([512]), np.array([0]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "name", "read"),
    [
        ("samples.h5", "ids", lambda c: c.samples),
        ("samples.h5", "labels", lambda c: c.samples),
        ("samples.h5", "key_bytes", lambda c: c.samples),
        ("probe.h5", "pixels", lambda c: c.reader.probe()),
    ],
)
def test_files_that_are_read_whole(made: Cache, path: str, name: str, read: Callable[[Cache], Any]) -> None:
    (file,) = (file for file in made.manifest.files if file.path == path)
    target = made.reader.path / path
    data = bytearray(target.read_bytes())
    data[file.arrays[name].offset] ^= 1
    target.write_bytes(data)
    with pytest.raises(DamagedCacheError, match=f"'{name}', block 0"):
        read(reopen(made))
    read(reopen(made, check_blocks="never"))


def test_damage_in_the_checksums_themselves_is_loud(made: Cache) -> None:
    flip(made, "exact", "logits_crc32", 0, 0)
    with pytest.raises(DamagedCacheError, match="block 0"):
        reopen(made).gather(np.array([0]), np.array([0]))


def test_a_record_larger_than_a_block(quick_dump: QuickDump, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its middle blocks belong to it alone: they are looked at too."""
    for module in ("schema", "checksums", "write.shard"):
        monkeypatch.setattr(f"softcache.cache.{module}.BLOCK_BYTES", 6)
    made = quick_dump(codec="float32")
    assert schema.BLOCK_BYTES == 6
    for byte in range(16):
        flip(made, "exact", "logits", 0, 16 * 7 + byte)
        cache = reopen(made)
        with pytest.raises(DamagedCacheError):
            cache.gather(np.array([7]), np.array([0]))
        cache.gather(np.array([3, 20]), np.array([0, 0]))
        flip(made, "exact", "logits", 0, 16 * 7 + byte)


def test_what_a_block_holds_is_said_of_every_file(made: Cache) -> None:
    by_path = {file.path: file for file in made.manifest.files}
    assert damage_of(by_path["samples.h5"], "ids", 1).rows == (64, 128)
    assert damage_of(by_path["samples.h5"], "key_bytes", 0).rows is None
    assert damage_of(by_path["probe.h5"], "pixels", 0).rows is None
    part = by_path["members/exact/part-00001.h5"]
    assert (damage_of(part, "logits", 15).rows, damage_of(part, "logits", 15).views) == ((480, 512), (1, 2))
    assert (damage_of(part, "logits", 7).rows, damage_of(part, "logits", 8).views) == ((480, 512), (1, 2))


def test_workers_check_as_their_parent_does(made: Cache) -> None:
    import pickle

    cache = pickle.loads(pickle.dumps(reopen(made, check_blocks="always", mode="pread")))
    assert (cache.reader.check_blocks, cache.reader.mode) == ("always", "pread")


def test_an_unknown_way_is_refused(made: Cache) -> None:
    with pytest.raises(CacheError, match="use one of first, always, never"):
        reopen(made, check_blocks="often")


@pytest.mark.slow
@pytest.mark.parametrize("when", ["first", "always", "never"])
def test_training_stops_at_a_damaged_block_unless_told_not_to_look(
    made: Cache, toy: Path, tmp_path: Path, when: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(made, "exact", "logits", 0, 256 * 16 + 7)
    argv = [
        "train",
        "--cache",
        str(made.reader.path),
        "--data",
        f"{toy}:images?count=600",
        "--student",
        "softcache:mlp?hidden=4",
    ]
    argv += ["--loss", "kd:temperature=2", "--epochs", "2", "--out", str(tmp_path / "run"), "--threads", "1", "--quiet"]
    code = cli.main([*argv, "--check-blocks", when, "--check-files", "no"])
    assert code == (0 if when == "never" else 2)
    if when != "never":
        said = capsys.readouterr().err
        assert re.search(r"'logits', block 8, rows 0 to 31 of view 1", said) and "softcache repair" in said

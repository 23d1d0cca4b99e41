"""A run's files are on the disk before they get their names: after a crash there is the old one or the new one, whole."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from small_world import World
from torch import nn

from softcache.errors import DiskSpaceError
from softcache.train.checkpoint import CHECKPOINT, Progress, Trained, save_progress
from softcache.train.ranks import ALONE
from softcache.train.run_folder import CONFIG, METRICS_CSV, METRICS_JSONL, RUN


def test_what_a_run_writes_is_durable_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[tuple[int, int]] = set()  # (inode, bytes) as they were when they went to the disk
    renamed: dict[str, list[bool]] = {}
    fsync, replace = os.fsync, os.replace

    def noted_fsync(fd: int) -> None:
        fsync(fd)
        found = os.fstat(fd)
        synced.add((found.st_ino, found.st_size))

    def noted_replace(source: Any, target: Any, **places: Any) -> None:
        found = os.stat(source, dir_fd=places.get("src_dir_fd"))
        renamed.setdefault(Path(target).name, []).append((found.st_ino, found.st_size) in synced)
        replace(source, target, **places)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    monkeypatch.setattr(os, "rename", noted_replace)
    World(tmp_path).train(tmp_path / "run", "ce", cache=None, checkpoint_every=1, epochs=1)
    for name, times in ((CHECKPOINT, 3), (RUN, 1), (CONFIG, 1), (METRICS_JSONL, 1), (METRICS_CSV, 1)):
        assert len(renamed[name]) >= times, name
        assert all(renamed[name]), name


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """The kernel refuses to write a file on from there, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("nbytes", [0, 1000, 9000, 20_000])
def test_a_disk_that_gets_full_within_a_checkpoint_is_told_and_the_one_of_before_is_whole(
    tmp_path: Path, nbytes: int
) -> None:
    """torch tells of its own bookkeeping then: `unexpected pos 6464 vs 6358`."""
    net = nn.Linear(80, 80)
    trained = Trained(net, nn.ModuleList(), torch.optim.SGD(net.parameters(), lr=0.1), torch.amp.GradScaler("cpu"))
    save_progress(tmp_path, trained, Progress(), ALONE)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with (
        pytest.raises(DiskSpaceError, match=r"checkpoint\.pt\.tmp-0: File too large[\s\S]*free some space"),
        largest_file(nbytes),
    ):
        save_progress(tmp_path, trained, Progress(epoch=1), ALONE)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {CHECKPOINT: before}

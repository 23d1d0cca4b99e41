"""A run's files are on the disk before they get their names: after a crash there is the old one or the new one, whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from small_world import World

from softcache.train.checkpoint import CHECKPOINT
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

"""Processes that meet: one folder, two writers; one journal, two entries; a run that finds other data when it resumes."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import QuickDump

from softcache import cli, dump, train
from softcache.cache.dump_folder import read_journals
from softcache.check import verify
from softcache.config import DumpConfig, TrainConfig
from softcache.data.join import batches
from softcache.errors import ConfigError, DiskSpaceError, DumpError, LockedError, LossError, TrainingError
from softcache.files import durable
from softcache.files.locks import release_lock, take_lock


def hold(path: Path) -> int:
    """A living process's lock, as seen from here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def settings(toy: str, out: Path, **more: Any) -> TrainConfig:
    return TrainConfig(
        **{"data": f"{toy}:images?count=40", "student": "softcache:mlp?hidden=4", "epochs": 2, "threads": 1, **more},
        out=str(out),
    )


def test_a_second_training_in_a_folder_is_refused(toy: str, tmp_path: Path) -> None:
    fd = hold(tmp_path / "run" / "lock")
    with pytest.raises(LockedError, match="another process is writing into this folder"):
        train.run(settings(toy, tmp_path / "run"), quiet=True)
    os.close(fd)
    assert train.run(settings(toy, tmp_path / "run"), quiet=True).metrics
    assert not (tmp_path / "run" / "lock").exists()


@pytest.mark.parametrize("moment", range(5))
@pytest.mark.parametrize("verb", ["dump", "train"])
def test_another_process_begins_at_the_same_moment(
    toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, moment: int
) -> None:
    """What it makes between two looks at the folder is ours: gone on with, never called somebody else's."""
    out, there = tmp_path / "out", tmp_path / "there"

    def work(out: Path) -> object:
        if verb == "train":
            return train.run(settings(toy, out, epochs=1), quiet=True)
        config = DumpConfig(data=f"{toy}:images?count=40", teacher=(f"{toy}:exact",), out=str(out), threads=1)
        return dump.run(config, quiet=True).manifest

    work(there)
    out.mkdir()
    looks = 0

    def appears(look: Any) -> Any:
        def looked(path: Path) -> Any:
            nonlocal looks
            if path == out or path.parent == out:
                looks += 1
                if looks == moment + 1:
                    shutil.copytree(there, out, dirs_exist_ok=True)
            return look(path)

        return looked

    for name in ("is_dir", "iterdir", "exists"):
        monkeypatch.setattr(Path, name, appears(getattr(Path, name)))
    assert work(out)
    assert looks > moment


def test_several_processes_without_torchrun_are_refused(
    toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2, and RANK is not set") as caught:
        train.run(settings(toy, tmp_path / "run"), quiet=True)
    assert "torchrun" in caught.value.tip
    assert not (tmp_path / "run").exists()


def test_a_misspelt_setting_is_told_as_such_in_a_folder_that_holds_a_run(toy: str, tmp_path: Path) -> None:
    train.run(settings(toy, tmp_path / "run"), quiet=True)
    with pytest.raises(LossError, match=r"loss 'ce' has no setting 'wieght'\n.*did you mean 'weight'"):
        train.run(settings(toy, tmp_path / "run", loss=("ce:wieght=2",)), quiet=True)


def test_a_refused_run_leaves_no_folder(toy: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="mlpp"):
        train.run(settings(toy, tmp_path / "run", student="softcache:mlpp"), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_refuses_other_samples(tmp_path: Path) -> None:
    table = tmp_path / "t.tsv"
    table.write_text("".join(f"word{i % 7} text{i % 5}\t{'ab'[i % 2]}\n" for i in range(40)))
    config = TrainConfig(
        data=f"tsv:{table}",
        student="softcache:textcnn?width=2&embedding=2",
        epochs=1,
        out=str(tmp_path / "run"),
        threads=1,
    )
    train.run(config, quiet=True)
    table.write_text("".join(f"word{i % 7} text{i % 5}\t{'ab'[i % 2]}\n" for i in range(30)))
    with pytest.raises(TrainingError, match="began with other samples, labels or another vocabulary"):
        train.run(config, quiet=True)


def test_a_damaged_run_file_is_named(toy: str, tmp_path: Path) -> None:
    train.run(settings(toy, tmp_path / "run"), quiet=True)
    (tmp_path / "run" / "run.json").write_text("")
    with pytest.raises(TrainingError, match=r"run\.json: is damaged"):
        train.run(settings(toy, tmp_path / "run"), quiet=True)


def test_a_living_dump_with_another_split_is_refused(toy: str, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    config = DumpConfig(data=f"{toy}:images?count=40", teacher=(f"{toy}:exact",), out=str(out), threads=1)
    fd = hold(out / "dump" / "part-1-of-3.lock")
    with pytest.raises(LockedError, match="is being written by another process"):
        dump.run(config, quiet=True)
    os.close(fd)
    assert dump.run(config, quiet=True).manifest is not None


def test_a_span_written_twice_is_the_one_that_is_there(toy: str, tmp_path: Path) -> None:
    """Two journals name one span with other hashes; the manifest must name the file that exists."""
    out = tmp_path / "cache"
    config = DumpConfig(
        data=f"{toy}:images?count=600", teacher=(f"{toy}:exact",), out=str(out), threads=1, shard_rows=256
    )
    first = dump.run(config, quiet=True)
    assert first.manifest is not None
    (entry,) = read_journals(out, 0)[0]
    stale = json.loads(json.dumps(entry))
    for file in stale["files"]:
        file["sha256"] = "0" * 64
    (out / "dump" / "part-3-of-3.jsonl").write_text(json.dumps(stale) + "\n")  # sorts last
    (out / "manifest.json").unlink()
    again = dump.run(config, quiet=True)
    assert again.manifest is not None
    assert again.manifest.id == first.manifest.id
    assert verify.run(out, full=True, quiet=True).state == "whole"


def test_a_journal_line_cut_by_a_full_disk_is_an_error(
    toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(durable.os, "write", lambda fd, data: write(fd, data[: len(data) // 2]))
    with pytest.raises(DiskSpaceError, match="No space left"):
        durable.append_line(tmp_path / "journal", b"x" * 100)
    monkeypatch.undo()
    durable.append_line(tmp_path / "journal", b"whole")
    assert (tmp_path / "journal").read_bytes().split(b"\n")[1] == b"whole"


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("batch_size", -5), ("shard_rows", 0)])
def test_impossible_sizes_are_refused_before_a_plan_is_made(toy: str, tmp_path: Path, name: str, value: int) -> None:
    out = tmp_path / "cache"
    base = {"data": f"{toy}:images?count=40", "teacher": (f"{toy}:exact",), "out": str(out)}
    with pytest.raises(ConfigError, match="must be at least 1"):
        dump.run(DumpConfig(**base, **{name: value}), quiet=True)
    assert not out.exists()


def test_a_commit_that_misses_spans_is_an_error(toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from softcache.cache.write.writer import CacheWriter

    monkeypatch.setattr(CacheWriter, "my_spans", lambda self: [])
    with pytest.raises(DumpError, match="some spans are missing"):
        dump.run(
            DumpConfig(data=f"{toy}:images?count=40", teacher=(f"{toy}:exact",), out=str(tmp_path / "c")), quiet=True
        )


def test_a_repeated_list_flag_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--members", "a=0.5", "--members", "b=0.5,c", "--keep-labels", "1", "--keep-labels", "2"]
    assert cli.main(["train", "--data", "digits", "--student", "m", "--out", "o", *flags, "--print-config"]) == 0
    shown = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "('a=0.5', 'b=0.5', 'c')" in shown["members"]
    assert "('1', '2')" in shown["keep_labels"]


def test_batches_take_their_slice() -> None:
    """Every index once, in order, whatever the start: and nothing is walked over again (a slice, not an iterator)."""

    class Order(np.ndarray):
        def __iter__(self) -> Any:
            raise AssertionError("the order was walked from its beginning")

    order = np.random.default_rng(0).permutation(1000).view(Order)
    got = [pair for batch in batches(order, 3, 64, start=2) for pair in batch]
    assert got == [(int(order[i]), 3) for i in range(128, 1000)]


def test_many_shards_need_few_descriptors(quick_dump: QuickDump, toy: str, tmp_path: Path) -> None:
    cache = quick_dump(f"{toy}:images?count=2600", [f"{toy}:exact"], tmp_path / "c", shard_rows=256)
    before = len(os.listdir("/proc/self/fd"))
    cache.gather(np.arange(100), np.zeros(100, np.int64))
    cache.eps("exact", np.arange(100), np.zeros(100, np.int64))
    assert len(cache.manifest.plan.rounds[0].layout) == 11
    assert len(os.listdir("/proc/self/fd")) - before <= 1  # samples.h5


def _wait(ready: Any, stop: Any) -> None:
    ready.set()
    stop.wait(30)


def test_a_forked_worker_does_not_keep_its_dead_parents_lock(tmp_path: Path) -> None:
    """A loader worker outlives a killed parent for a moment; the resume must not find the lock still held."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    fd = take_lock(tmp_path / "lock")
    ready, stop = context.Event(), context.Event()
    worker = context.Process(target=_wait, args=(ready, stop))
    worker.start()
    assert ready.wait(30)
    with pytest.raises(BlockingIOError):
        take_lock(tmp_path / "lock")
    release_lock(fd)  # as the kernel does when the parent dies: its own descriptors only
    release_lock(take_lock(tmp_path / "lock"))
    stop.set()
    worker.join()
    assert worker.exitcode == 0

"""What a collate may give goes to the device as it is; a worker that dies ends the loading with its cause and a cure."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from softcache.data.loading import ViewedSet, load_batches, map_tensors, to_device
from softcache.data.views import Policy
from softcache.errors import DataError

# ------------------------------------------------------------------------------------------------------- what is collated

Named = namedtuple("Named", "ids mask")
META = torch.device("meta")  # stands for a device that is not the CPU


@dataclass(frozen=True)
class Frozen:
    ids: Tensor
    name: str = "a"


@dataclass
class Open:
    ids: Tensor
    inner: Any = None


class Encoding(UserDict[str, Any]):
    """As transformers' BatchEncoding: a mapping whose values are attributes as well."""

    def __getattr__(self, name: str) -> Any:
        return self.data[name]


class Graphs:
    """Knows how to move itself."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: torch.device) -> Graphs:
        return Graphs(self.x.to(device))


def ids() -> Tensor:
    return torch.arange(6).reshape(2, 3)


CASES = [
    pytest.param(ids(), lambda v: [v], id="tensor"),
    pytest.param({"ids": ids()}, lambda v: [v["ids"]], id="dict"),
    pytest.param([ids(), (ids(),)], lambda v: [v[0], v[1][0]], id="nested"),
    pytest.param(OrderedDict(ids=ids()), lambda v: [v["ids"]], id="OrderedDict"),
    pytest.param(defaultdict(list, ids=ids()), lambda v: [v["ids"]], id="defaultdict"),
    pytest.param(Encoding(ids=ids()), lambda v: [v.ids], id="a mapping with attributes"),
    pytest.param(MappingProxyType({"ids": ids()}), lambda v: [v["ids"]], id="a mapping that is fixed"),
    pytest.param(Named(ids(), ids()), lambda v: [v.ids, v.mask], id="named tuple"),
    pytest.param(Frozen(ids()), lambda v: [v.ids], id="frozen dataclass"),
    pytest.param(Open(ids(), {"deep": [ids()]}), lambda v: [v.ids, v.inner["deep"][0]], id="dataclass"),
    pytest.param(Graphs(ids()), lambda v: [v.x], id="with a method to"),
    pytest.param(
        torch.nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)]), lambda v: [v.data], id="packed sequence"
    ),
]


@pytest.mark.parametrize(("inputs", "tensors"), CASES)
def test_every_tensor_goes_to_the_device_in_what_held_it(inputs: Any, tensors: Any) -> None:
    moved = to_device(inputs, META)
    assert all(tensor.is_meta for tensor in tensors(moved))
    assert not any(tensor.is_meta for tensor in tensors(inputs))  # what was collated stays as it was
    same_kind = dict if isinstance(inputs, MappingProxyType) else type(inputs)
    assert type(moved) is same_kind


def test_what_holds_no_tensor_stays() -> None:
    array = np.ones(2)
    assert map_tensors([1, "a", None, array, {"n": 2.5}], torch.neg)[3] is array
    assert to_device("text", META) == "text"
    bare = SimpleNamespace(path="a")
    assert to_device(bare, META) is bare


def test_what_holds_tensors_and_cannot_be_moved_is_refused_by_name() -> None:
    held = SimpleNamespace(ids=ids())
    assert to_device(held, torch.device("cpu")) is held  # it is there already
    for inputs in (held, [held], SimpleNamespace(parts=[ids()])):
        with pytest.raises(
            DataError, match=r"gives types\.SimpleNamespace, whose tensors cannot be moved to meta"
        ) as caught:
            to_device(inputs, META)
        assert "method to(device)" in caught.value.tip


# -------------------------------------------------------------------------------------------------------- workers that die


class Deadly:
    """40 pictures; whoever reads the 15th loses the process."""

    keys = tuple(f"picture/{i}" for i in range(40))

    def __init__(self, how: str) -> None:
        self.how = how

    def __len__(self) -> int:
        return 40

    def read(self, index: int) -> tuple[np.ndarray, int]:
        if index == 15 and self.how == "exit":
            os._exit(3)
        if index == 15 and self.how != "lives":
            os.kill(os.getpid(), getattr(signal, self.how))
        return np.full((1, 4, 4), index, np.uint8), 0


def stack(items: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(items))


def batches(how: str, workers: int = 1, collate: Any = stack, method: str | None = None) -> Generator[Any]:
    pairs = ([(i, 0) for i in range(start, start + 5)] for start in range(0, 40, 5))
    return load_batches(ViewedSet(Deadly(how), Policy(), [collate]), pairs, workers=workers, start_method=method)


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("SIGKILL", "one was killed by SIGKILL, as the kernel does where memory runs out"),
        ("SIGBUS", "one was killed by SIGBUS"),
        ("exit", "one ended with exit code 3"),
    ],
)
def test_a_worker_that_dies_is_told_with_cause_and_cure(how: str, cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        _MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,)
    )  # it looks every 5 seconds
    with pytest.raises(DataError, match=rf"the 1 processes .* failed; {cause}: .*exited unexpectedly") as caught:
        list(batches(how))
    for cure in ("--workers 0", "--shm-size", "smaller batch"):
        assert cure in caught.value.tip


def test_a_death_is_told_where_the_batch_is_asked_for() -> None:
    """And not in the middle of whatever the process does then."""
    before = signal.getsignal(signal.SIGCHLD)
    loaded = batches("SIGKILL", workers=2)
    next(loaded)
    assert signal.getsignal(signal.SIGCHLD) is before
    loaded.close()
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.extend(len(one.index) for one in batches("lives")))
    thread.start()
    thread.join(60)
    assert found == [5] * 8


def full(self: Tensor) -> Tensor:
    raise RuntimeError(f"unable to allocate shared memory(shm) for file </torch_1>: {os.strerror(errno.ENOSPC)} (28)")


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_without_room_for_a_batch_it_comes_through_a_pipe(
    method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("softcache.errors._TOLD", set())
    monkeypatch.setattr(Tensor, "share_memory_", full)
    collate = odd if method == "fork" else full_and_odd  # a worker that is spawned imports it, and is full as well
    found = list(batches("lives", 1, collate, method))
    for mine, theirs in zip(batches("lives", 0, odd), found, strict=True):
        assert theirs.by_pipe
        for name in ("view", "none", "same"):
            assert torch.equal(mine.inputs[0][name], theirs.inputs[0][name])
    told = capsys.readouterr().err
    assert told.count("too little shared memory for batches") == 1
    assert "--shm-size" in told


def test_workers_that_cannot_be_started_are_told_with_a_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("multiprocessing.synchronize.SemLock._make_name", refused)  # they lie in shared memory too
    with pytest.raises(DataError, match=r"1 processes that load samples cannot be started: .*No space left") as caught:
        list(batches("lives"))
    for cure in ("--workers 0", "--shm-size", "ulimit -n"):
        assert cure in caught.value.tip
    assert len(list(batches("lives", workers=0))) == 8


def full_and_odd(items: Sequence[np.ndarray]) -> dict[str, Any]:
    Tensor.share_memory_ = full  # type: ignore[method-assign]
    return odd(items)


def odd(items: Sequence[np.ndarray]) -> dict[str, Any]:
    whole = stack(items)
    return {
        "view": whole[1:, :, ::2],
        "none": whole[:0],
        "same": whole,
        "names": ["a"],
    }


def test_odd_tensors_come_over_as_they_are() -> None:
    for mine, theirs in zip(batches("lives", 0, odd), batches("lives", 1, odd), strict=True):
        for name in ("view", "none", "same"):
            assert torch.equal(mine.inputs[0][name], theirs.inputs[0][name])

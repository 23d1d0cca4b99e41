"""From samples and views to batches of model inputs: the data set that loader workers run."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from softcache.data.identity import pixel_digest, sample_id
from softcache.data.views import Policy
from softcache.errors import ConfigError, DataError, SoftcacheError, first_offenders, place_of, warn_once
from softcache.spec import load_user_file, user_files
from softcache.tokens import Tokens
from softcache.words import Words

MORE_SHARED_MEMORY = "in a container docker run --shm-size=2g"
SIGNALS = (signal.SIGTERM, signal.SIGINT)
LEFT_S = 10  # seconds a worker lives on after SIGTERM

Pair = tuple[int, int]  # (index in the transfer set, view index)


@dataclass(frozen=True)
class LoadedBatch:
    """What a worker hands over.

    Attributes:
        inputs: one collated input per collate function.
        index: (B,) int64 positions in the transfer set.
        views: (B,) int64 view indices.
        content_digests: (B, 16) uint8, where asked for.
        pixel_digests: (B,) uint32 digests of the rendered items, where asked for.
        partner_rows: (B,) int64 rows of the sample table that the views are mixed with, under a policy that mixes.
        shares: (B,) float32 weights of the samples' own labels, likewise; 1 - shares are their partners'.
        by_pipe: there was no shared memory for the inputs.
    """

    inputs: tuple[Any, ...]
    index: np.ndarray
    views: np.ndarray
    content_digests: np.ndarray | None = None
    pixel_digests: np.ndarray | None = None
    partner_rows: np.ndarray | None = None
    shares: np.ndarray | None = None
    by_pipe: bool = False

    def pin_memory(self) -> LoadedBatch:
        """Called by the DataLoader: the inputs in page-locked memory."""

        def pinned(held: Any) -> Any:
            return held.pin_memory() if hasattr(held, "pin_memory") else held

        return replace(self, inputs=map_tensors(self.inputs, torch.Tensor.pin_memory, pinned))


@dataclass(frozen=True)
class _Fault:
    """An error on its way out of a worker: raised again, whole, in the main process."""

    error: SoftcacheError


@dataclass(frozen=True)
class Partners:
    """Where the partners of a mixing policy come from: the whole set, however few of its samples are visited.

    Attributes:
        transfer_set: with `load`, `keys` and `__len__`.
        index_of_row: (N,) int64 position in it of each row of the sample table; -1 = it is not there.
        ids: (N,) uint64 sample id of each row, where the set's keys may be others; None: those of its keys.
    """

    transfer_set: Any
    index_of_row: np.ndarray
    ids: np.ndarray | None = None

    @classmethod
    def of(cls, transfer_set: Any, rows: np.ndarray, count: int, ids: np.ndarray | None = None) -> Partners:
        """From `rows`, the row of each of the set's samples in a sample table of `count` rows."""
        index_of_row = np.full(count, -1, np.int64)
        index_of_row[rows] = np.arange(len(rows))
        return cls(transfer_set, index_of_row, ids)


@dataclass(frozen=True)
class Rendered:
    """One view of one sample.

    Attributes:
        item: its pixels, mixed where the policy mixes.
        content_digest: 16 bytes, of the sample itself; None where digests were not asked for.
        partner_row: the row of the sample table that it is mixed with; -1 without mixing.
        share: the weight of the sample's own label.
    """

    item: Any
    content_digest: bytes | None
    partner_row: int = -1
    share: float = 1.0


class ViewedSet(Dataset[Any]):
    """A transfer set seen through a view policy, collated for one or several models.

    Args:
        transfer_set: with `read`, `load`, `keys` and `__len__`.
        policy: how views are rendered.
        collates: one per model; equal ones should be given once.
        digests: also hash contents and pixels (the dump does).
        partners: what a mixing policy mixes with.
        ids: (N,) uint64 sample ids that the views are drawn for, where they were joined by content and the keys may be others
            than the cache's; None: those of the keys.

    Raises:
        ConfigError: the policy mixes, and there are no partners.
    """

    def __init__(
        self,
        transfer_set: Any,
        policy: Policy,
        collates: Sequence[Callable[[list[Any]], Any]],
        *,
        digests: bool = False,
        partners: Partners | None = None,
        ids: np.ndarray | None = None,
    ) -> None:
        if policy.mixing is not None and partners is None:
            raise ConfigError(
                f"the policy ends with {policy.mixing}, and there are no samples to mix with",
                tip="a mixing step needs a cache's sample table; leave it out here",
            )
        self.transfer_set, self.policy, self.collates, self.digests = transfer_set, policy, tuple(collates), digests
        self.partners, self.ids = partners, ids

    def __len__(self) -> int:
        return len(self.transfer_set)

    def render(self, index: int, view: int) -> Any:
        """One rendered item, mixed where the policy mixes; errors name the sample."""
        return self.render_view(index, view).item

    def render_view(self, index: int, view: int) -> Rendered:
        """One view with everything that is known of it; errors name the sample, and the partner where it is at fault."""
        key = self.transfer_set.keys[index]
        with _naming(key, f"while loading sample {key}", "repair the sample, or leave it out: --without FILE"):
            ident = sample_id(key) if self.ids is None else int(self.ids[index])
            item, digest = self._unmixed(self.transfer_set, index, ident, view)
            if self.policy.mixing is None:
                return Rendered(item, digest)
            row, partner = self._partner(ident, view)
            mixed, share = self.policy.mix(item, partner, ident, view)
            return Rendered(mixed, digest, row, share)

    def _unmixed(self, transfer_set: Any, index: int, ident: int, view: int) -> tuple[Any, bytes | None]:
        """One view before mixing, and the sample's content digest where digests are asked for."""
        item, digest = transfer_set.load(index) if self.digests else (transfer_set.read(index)[0], None)
        return self.policy.render(item, ident, view), digest

    def _partner(self, ident: int, view: int) -> tuple[int, Any]:
        """The row of a view's partner, and the partner's own view of the same index."""
        assert self.partners is not None
        row = self.policy.partner(ident, view, len(self.partners.index_of_row))
        index = int(self.partners.index_of_row[row])
        if index < 0:
            raise DataError(
                f"view {view} is mixed with row {row} of the sample table, and the data set does not hold that sample",
                tip="give the whole transfer set of the cache; --samples, --keep-labels and --drop-labels may choose from it",
            )
        key = self.partners.transfer_set.keys[index]
        with _naming(
            key, f"while loading {key}, its partner in view {view}", "repair the sample: others are mixed with it"
        ):
            own_id = sample_id(key) if self.partners.ids is None else int(self.partners.ids[row])
            item, _ = self._unmixed(self.partners.transfer_set, index, own_id, view)
        return row, item

    def __getitems__(self, pairs: list[Pair]) -> LoadedBatch | _Fault:
        try:
            rendered = [self.render_view(index, view) for index, view in pairs]
            items = [one.item for one in rendered]
            index, views = np.array(pairs, dtype=np.int64).T
            batch = LoadedBatch(self._collated(items, index), index, views)
            if self.policy.mixing is not None:
                rows = np.array([one.partner_row for one in rendered], dtype=np.int64)
                shares = np.array([one.share for one in rendered], dtype=np.float32)
                batch = replace(batch, partner_rows=rows, shares=shares)
            if self.digests:
                contents = np.frombuffer(b"".join(one.content_digest or b"" for one in rendered), np.uint8).reshape(
                    -1, 16
                )
                pixels = np.array([pixel_digest(item) for item in items], dtype=np.uint32)
                batch = replace(batch, content_digests=contents, pixel_digests=pixels)
            return _shared(batch)
        except SoftcacheError as exc:
            return _Fault(exc)

    def _collated(self, items: list[Any], index: np.ndarray) -> tuple[Any, ...]:
        """The items as every model takes them; a fault of a collate names the samples, those of an odd shape first."""
        try:
            return tuple(collate(items) for collate in self.collates)
        except SoftcacheError as exc:
            self._name_words(exc, items, index)
            raise
        except Exception as exc:
            shapes = [getattr(item, "shape", None) for item in items]
            usual = max(shapes, key=shapes.count)
            odd = [i for i, shape in zip(index.tolist(), shapes, strict=True) if shape != usual]
            named = first_offenders((self.transfer_set.keys[i] for i in odd or index.tolist()), len(odd or index))
            why = f"of another shape than {usual}: " if odd else ""
            raise DataError(
                f"the model cannot take this batch: {type(exc).__name__}: {exc} ({place_of(exc)}); samples {why}{named}",
                tip="make their items alike (--policy resize:size=N), or leave them out: --without FILE",
            ) from exc

    def _name_words(self, exc: SoftcacheError, items: list[Any], index: np.ndarray) -> None:
        """Of samples that are words or tokens: which of them a model cannot answer about alone either."""

        def fits(item: Any) -> bool:
            try:
                return all(collate([item]) is not None for collate in self.collates)
            except SoftcacheError:
                return False

        if isinstance(items[0], Words | Tokens):
            bad = [self.transfer_set.keys[i] for i, item in zip(index.tolist(), items, strict=True) if not fits(item)]
            exc.add_note(f"samples {first_offenders(bad, len(bad))}")

    def __reduce__(self) -> tuple[Any, ...]:
        # classes from a user's file must be importable in a spawned worker before they are unpickled
        return _restore, (type(self), user_files(), pickle.dumps(self.__dict__))


@contextmanager
def _naming(key: str, note: str, tip: str) -> Iterator[None]:
    """Whatever goes wrong inside is told of this sample: our own errors get a note, any other becomes a DataError."""
    try:
        yield
    except SoftcacheError as exc:
        exc.add_note(note)
        raise
    except Exception as exc:
        raise DataError(f"sample {key}: {type(exc).__name__}: {exc} ({place_of(exc)})", tip=tip) from exc


def _restore(kind: type[ViewedSet], files: Sequence[str], state: bytes) -> ViewedSet:
    for file in files:
        if Path(file).exists():  # one that is gone may not be needed; if it is, unpickling says so
            load_user_file(file)
    made = kind.__new__(kind)
    made.__dict__.update(pickle.loads(state))
    return made


def load_batches(
    viewed: ViewedSet,
    pairs: Iterable[list[Pair]],
    *,
    workers: int = 0,
    pin_memory: bool = False,
    start_method: str | None = None,
) -> Generator[LoadedBatch]:
    """Batches in the order of `pairs`, loaded by worker processes, which end with it.

    Faults are raised here, with their tips; so is a worker's death. Where there is no shared memory for a batch, it comes
    through a pipe instead, and that is said once.
    """
    loader: DataLoader[Any] = DataLoader(
        viewed,
        batch_sampler=pairs,  # any iterable of index lists
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        multiprocessing_context=start_method if workers else None,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_leave_signals_to_main,
        generator=torch.Generator(),  # its own: the global random state must not depend on loading
    )
    loaded = _started(loader, start_method)
    while (batch := _next(loaded, workers)) is not None:
        if isinstance(batch, _Fault):
            raise batch.error
        if isinstance(batch, LoadedBatch) and batch.by_pipe:
            warn_once(
                f"too little shared memory for batches: they come through pipes, which is slower; {MORE_SHARED_MEMORY}"
            )
        yield batch


def _started(loader: DataLoader[Any], start_method: str | None) -> Iterator[Any]:
    """The loader's batches.

    A worker's death is then told when its batch is asked for, and not by torch's own handler of SIGCHLD, wherever in
    somebody's code the process is at that moment. A worker takes no signal before it has handlers of its own.
    """
    _check_room(loader.num_workers, start_method)
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if in_main else None
    forked = multiprocessing.get_context(start_method).get_start_method() == "fork"
    early = SIGNALS if forked else (signal.SIGINT,)  # the others import torch first, and SIGTERM may end that
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, early if loader.num_workers else ())
    try:
        return iter(loader)
    finally:
        if before is not None:  # else it is none of Python's
            signal.signal(signal.SIGCHLD, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _check_room(workers: int, start_method: str | None) -> None:
    """DataError where there is no room for the queues and locks of so many workers: torch's loader would be left half made."""
    context = multiprocessing.get_context(start_method)
    try:
        queues = [context.Queue() for _ in range(workers + 1 if workers else 0)]
        if workers:
            context.Event()
    except OSError as exc:
        raise DataError(
            f"{workers} processes that load samples cannot be started: {exc}",
            tip=f"--workers 0 loads in this process; {MORE_SHARED_MEMORY}; `ulimit -n` bounds them as well",
        ) from exc
    for queue in queues:
        queue.close()


def _next(loaded: Iterator[Any], workers: int) -> Any:
    """The next batch, None behind the last one; DataError where a worker has died, or what it sent cannot be read."""
    try:
        return next(loaded, None)
    except SoftcacheError:
        raise
    except Exception as exc:  # of many kinds: a closed pipe, a lost descriptor, torch's own
        if not workers:
            raise
        raise DataError(
            f"the {workers} processes that load samples failed{_deaths(loaded)}: {exc!r}",
            tip=f"--workers 0 loads in this process; {MORE_SHARED_MEMORY}; fewer workers or a smaller batch need less memory",
        ) from exc


def _deaths(loaded: Any) -> str:
    """How the workers ended that did, as far as that can be seen."""
    codes = [process.exitcode for process in getattr(loaded, "_workers", [])]
    killed = sorted({signal.Signals(-code).name for code in codes if code is not None and code < 0})
    if killed:
        why = ", as the kernel does where memory runs out" if "SIGKILL" in killed else ""
        return f"; one was killed by {' or '.join(killed)}{why}"
    ended = sorted({code for code in codes if code})
    return f"; one ended with exit code {ended[0]}" if ended else ""


def _leave_signals_to_main(worker: int) -> None:
    """In a worker: Ctrl-C, and SIGTERM of a scheduler, go to the whole process group, and the main process heeds them.

    It may first finish what it has begun, and ends its workers then. SIGTERM ends a worker too, but not at once.
    """

    def end_later(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.alarm(LEFT_S)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_later)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    sys.excepthook = _told  # of threads that hand over what the main process no longer takes


def _told(kind: type[BaseException], exc: BaseException, where: TracebackType | None) -> None:
    if not issubclass(kind, OSError | EOFError):
        sys.__excepthook__(kind, exc, where)


def _shared(batch: LoadedBatch) -> LoadedBatch:
    """In a worker: its tensors in memory that the main process sees, now, or as bytes where there is no room for that.

    torch would share them in a thread that prints a traceback and forgets the batch, for which the main process waits for ever.
    """
    if get_worker_info() is None:
        return batch
    try:
        return replace(batch, inputs=map_tensors(batch.inputs, _in_shared_memory))
    except (RuntimeError, OSError):
        return replace(batch, inputs=_AsBytes(batch.inputs), by_pipe=True)  # type: ignore[arg-type]


class _AsBytes:
    """In a worker: becomes in the main process what it was made of, without shared memory."""

    def __init__(self, inputs: Any) -> None:
        self.data = pickle.dumps(inputs)

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (self.data,)


def _in_shared_memory(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.share_memory_() if tensor.layout == torch.strided else tensor


def _as_it_is(batch: Any) -> Any:
    return batch


def map_tensors(
    inputs: Any,
    change: Callable[[torch.Tensor], torch.Tensor],
    whole: Callable[[Any], Any] = lambda held: held,
) -> Any:
    """What a collate may give with every tensor changed, as the same kind of thing: a tensor; mappings, sequences, named
    tuples and dataclasses of them, nested as they are.

    Args:
        whole: for any other object that holds tensors. Numbers, texts and NumPy arrays stay as they are.
    """
    if isinstance(inputs, torch.Tensor):
        return change(inputs)
    again = partial(map_tensors, change=change, whole=whole)
    if type(inputs) in (dict, list, tuple):
        return _rebuilt(inputs, again)
    if not isinstance(inputs, Mapping) and _holds_tensors(inputs) and hasattr(inputs, "to"):
        return whole(inputs)  # it knows how, as a packed sequence or a batch of graphs does
    if isinstance(inputs, Mapping | tuple | list) or (is_dataclass(inputs) and not isinstance(inputs, type)):
        return _rebuilt(inputs, again)
    return whole(inputs) if _holds_tensors(inputs) else inputs


def _rebuilt(inputs: Any, change: Callable[[Any], Any]) -> Any:
    """A mapping, sequence or dataclass of the same kind, each value changed."""
    if type(inputs) is dict or (isinstance(inputs, Mapping) and not isinstance(inputs, MutableMapping)):
        return {name: change(value) for name, value in inputs.items()}
    if isinstance(inputs, Mapping):
        made = copy.copy(inputs)
        for name, value in inputs.items():
            made[name] = change(value)  # type: ignore[index]
        return made
    if isinstance(inputs, tuple | list):
        values = [change(value) for value in inputs]
        return inputs._make(values) if hasattr(inputs, "_make") else type(inputs)(values)
    made = copy.copy(inputs)
    for field in fields(inputs):
        object.__setattr__(made, field.name, change(getattr(inputs, field.name)))  # it may be frozen
    return made


def _holds_tensors(value: Any) -> bool:
    """Whether an object has tensors among its attributes, or among the items of those, or is a tuple of some."""
    if isinstance(value, torch.nn.Module | type):
        return False
    held = [*(value if isinstance(value, tuple) else ()), *getattr(value, "__dict__", {}).values()]
    held += [one for part in held if isinstance(part, Mapping | tuple | list) for one in _values(part)]
    return any(isinstance(one, torch.Tensor) for one in held)


def _values(part: Any) -> list[Any]:
    return list(part.values() if isinstance(part, Mapping) else part)


def to_device(inputs: Any, device: torch.device) -> Any:
    """A model's inputs moved to a device; DataError for what holds tensors and cannot be moved to one that is no CPU."""

    def moved(held: Any) -> Any:
        if hasattr(held, "to"):
            return held.to(device)
        if device.type == "cpu":
            return held
        raise DataError(
            f"the collate gives {type(held).__module__}.{type(held).__qualname__}, whose tensors cannot be moved to {device}",
            tip="give it a method to(device), or collate to a tensor, or a dict, tuple or dataclass of tensors",
        )

    return map_tensors(inputs, lambda tensor: tensor.to(device, non_blocking=True), moved)


def spread_items(viewed: ViewedSet, count: int = 16) -> list[Any]:
    """View 0 of that many samples, spread over the set; of all where there are fewer."""
    positions = np.unique(np.linspace(0, len(viewed) - 1, min(count, len(viewed))).astype(np.int64))
    return [viewed.render(int(position), 0) for position in positions]


def item_shape(item: Any) -> tuple[int, ...] | None:
    """The shape of a rendered item; None for a text."""
    shape = getattr(item, "shape", None)
    return None if shape is None or isinstance(item, str) else tuple(shape)


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """(count,) visiting order of one epoch, a function of (seed, epoch) alone; int32 where that suffices."""
    words = np.random.Philox(key=(seed & (2**64 - 1)) | (epoch + 1) << 64).random_raw(count)
    order = np.argsort(words, kind="stable")
    return order.astype(np.int32) if count < 2**31 else order

"""The transfer set: samples with a stable key, a label and a content digest, opened from a spec string.

    digits  digits?split=test             scikit-learn's bundled 8x8 digits
    torchvision:NAME?root=PATH&train=true torchvision's classification data sets
    imagefolder:PATH                      one folder per class
    images:PATH?labels=FILE               pictures of one folder, without classes or with labels from a table
    table:PATH?text=NAME&label=NAME       CSV, TSV, JSON lines, plain or packed; Parquet
    table:PATH?words=NAME&tags=NAME       lists of words, and a tag for each
    conll:PATH?words=0&tags=-1            a word a line with its tags; CoNLL-U
    text:PATH?tokenizer=FOLDER            texts as tokens: files, folders, JSON lines
    hf-dataset:PATH?item=NAME&label=NAME  Hugging Face's data sets
    tsv:PATH?text=0&label=1&header=true   tab-separated text, as it is
    synthetic:images?classes=10           made up, for trials; also synthetic:texts, synthetic:words
    package.module:factory?arg=1          any map-style data set; also path/file.py:factory

An item is a uint8 array (H, W) or (H, W, C), a string, a pair of strings, the
`Words` of a text with a label each, the `Tokens` of one, or whatever else a user's data set returns.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from softcache.data.classes import check_classes, class_indices, places_in
from softcache.data.conll import conll
from softcache.data.flat_images import flat_images
from softcache.data.hf_datasets import hf_dataset, is_saved
from softcache.data.identity import file_digest, item_digest
from softcache.data.label_kind import has_several, is_known
from softcache.data.map_style import from_factory, from_torchvision
from softcache.data.position_labels import PositionLabels
from softcache.data.selection import of_classes, read_keys
from softcache.data.sources import Source, StringTable, digits, imagefolder
from softcache.data.synthetic import images, texts, words
from softcache.data.text_tables import table, tsv
from softcache.data.token_texts import text
from softcache.errors import ConfigError, DataError, first_offenders, nearest
from softcache.spec import Spec, call_factory, parse_spec, quoted

FILE_SOURCES: dict[str, Callable[..., Source]] = {
    "imagefolder": imagefolder,
    "images": flat_images,
    "table": table,
    "tsv": tsv,
    "conll": conll,
    "text": text,
}
MADE_UP: dict[str, Callable[..., Source]] = {"images": images, "texts": texts, "words": words}
OTHER_WORDS = dict.fromkeys(("csv", "json", "jsonl", "ndjson", "txt", "file"), "table")  # for a source
OTHER_WORDS |= dict.fromkeys(("conllu", "conll2003", "iob", "iob2", "bio"), "conll")
OTHER_WORDS |= dict.fromkeys(("hf", "huggingface", "hf-datasets", "datasets", "dataset"), "hf-dataset")
SOURCES = ("digits", "torchvision", "synthetic", "hf-dataset", *FILE_SOURCES)


class TransferSet(Dataset[tuple[Any, Any]]):
    """Samples by position, each with a key that names it wherever it stands. Map-style; pickles; small to fork.

    Attributes:
        name: the spec without local folders.
        keys: N stable keys.
        labels: (N,) int32 class indices, -1 = none; or (N, C) bool, int8 of 1, 0 and -1 = unknown where some are.
        class_names: C names, whole even in a selection.
        values: (N, K) float64 numbers of each sample that are no classes (a score, a measure); None where there are none.
        positions: labels of each sample's words or tokens, whose `labels` are all -1; None where items are neither.
        rendering: how texts became tokens; None where items are no `Tokens`.
        whole: the set that this one was selected from; itself where it was not.
    """

    def __init__(self, name: str, source: Source) -> None:
        self.name = name
        self.keys: StringTable = source.keys
        self.labels = source.labels
        self.class_names = source.class_names
        self.values = source.values
        self.positions = source.positions
        self.rendering = source.rendering
        self._reader = source.reader
        self._rows = np.arange(len(source.keys))  # where the reader finds each sample
        self._whole: TransferSet | None = None

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def whole(self) -> TransferSet:
        return self._whole or self

    @property
    def multi_label(self) -> bool:
        """True where a sample may have several classes."""
        return has_several(self.labels)

    @property
    def labelled(self) -> int:
        """How many samples have a label; of several labels, one that is known; of words, one of them."""
        if self.positions is not None:
            return self.positions.labelled
        return int(is_known(self.labels).reshape(len(self), -1).any(axis=1).sum())

    @property
    def num_classes(self) -> int:
        """How many; of tokens how many ids there are."""
        return len(self.class_names) if self.rendering is None else self.rendering.vocabulary.count

    @property
    def digest_kind(self) -> str:
        """ "file" where contents are digested as the bytes of their files, else "item"."""
        return self._reader.digest_kind

    @property
    def sample_keys(self) -> Sequence[str]:
        """The keys, under the name by which the join asks any data set for them."""
        return self.keys

    def read(self, index: int) -> tuple[Any, bytes | None]:
        """The item, and the bytes of its file where `digest_kind` is "file"."""
        return self._reader.read(int(self._rows[index]))

    def load(self, index: int) -> tuple[Any, bytes]:
        """The item and its 16-byte content digest, from one reading of the source."""
        item, data = self.read(index)
        return item, item_digest(item) if data is None else file_digest(data)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """(item, label): the label an int, or (C,) bool, int8 with -1 = unknown where some are; of words (n,) int32; of tokens
        (n,) int32 the ids that follow the positions with a record."""
        item, _ = self.read(index)
        if self.positions is not None:
            return item, self.positions.of(index).copy()
        return item, self.labels[index].copy() if self.multi_label else int(self.labels[index])

    def select(self, indices: np.ndarray) -> TransferSet:
        """The samples at these positions, in this order: same keys, same class list."""
        taken = np.arange(len(self))[indices]
        values = None if self.values is None else self.values[taken]
        positions = None if self.positions is None else self.positions.take(taken)
        source = Source(
            self._reader,
            self.keys.take(taken),
            self.labels[taken],
            self.class_names,
            values,
            positions,
            self.rendering,
        )
        chosen = TransferSet(self.name, source)
        chosen._rows = self._rows[taken]
        chosen._whole = self.whole
        return chosen

    def with_classes(self, wanted: Sequence[int | str]) -> TransferSet:
        """The same samples under a class list of some of the classes; a sample of another class has no label.

        Args:
            wanted: classes by name, index, or range of indices (0-4), in any order: they stay in this set's order.

        Raises:
            DataError: a class that is not there.
        """
        classes = class_indices(self.class_names, wanted)
        names = [self.class_names[i] for i in classes]
        if self.multi_label:
            changed = self._relabelled(self.labels[:, classes], names)
        else:
            place = np.full(self.num_classes + 1, -1, np.int32)  # the last one is for -1
            place[classes] = np.arange(len(classes), dtype=np.int32)
            changed = self._placed(place, names)
        changed._whole = None if self._whole is None else self._whole.with_classes(wanted)
        return changed

    def under(self, class_names: Sequence[str], columns: Sequence[int]) -> TransferSet:
        """The same samples under a longer class list, of which theirs are some; not for several labels per sample.

        Args:
            class_names: the longer list.
            columns: where each of this set's classes stands in it.
        """
        place = np.append(np.asarray(columns, np.int32), np.int32(-1))  # the last one is for -1
        changed = self._placed(place, class_names)
        changed._whole = None if self._whole is None else self._whole.under(class_names, columns)
        return changed

    def _placed(self, place: np.ndarray, class_names: Sequence[str]) -> TransferSet:
        """Where label i becomes place[i]; the last of `place` is for -1."""
        positions = None if self.positions is None else self.positions.placed(place)
        return self._relabelled(place[self.labels], class_names, positions)

    def _relabelled(
        self, labels: np.ndarray, class_names: Sequence[str], positions: PositionLabels | None = None
    ) -> TransferSet:
        source = Source(self._reader, self.keys, labels, tuple(class_names), self.values, positions)
        changed = TransferSet(self.name, source)
        changed._rows = self._rows
        return changed


def open_transfer_set(
    spec: str,
    *,
    download: bool = False,
    keep_labels: Sequence[int | str] = (),
    drop_labels: Sequence[int | str] = (),
    samples: Path | None = None,
    without: Path | None = None,
) -> TransferSet:
    """The transfer set that a spec string names, with samples chosen and the class list left whole.

    Args:
        spec: see the top of this file; `rows=0-49999` among the parameters of any takes these of its samples.
        download: let torchvision fetch what is not there.
        keep_labels: classes to keep, by name, index or range of indices (0-4); unlabelled samples are left out.
        drop_labels: classes to leave out; with several labels per sample, one of these is enough.
        samples: a text file of keys, one per line. The order stays the transfer set's.
        without: likewise, of samples that are left out.

    Raises:
        ConfigError: a spec that cannot be understood.
        DataError: data that cannot be read, a class or key that is not there, or nothing left.
    """
    parsed = parse_spec(spec)
    rows = parsed.parameters.get("rows")
    source = parsed.without("rows")
    transfer_set = TransferSet(_portable_name(source), _open_source(source, download=download))
    if rows is not None:
        transfer_set = transfer_set.select(_range(rows, len(transfer_set), spec))
    if transfer_set.positions is not None and (keep_labels or drop_labels):
        raise ConfigError(
            f"{spec!r}: --keep-labels and --drop-labels choose samples by their class, and here words have classes",
            tip="--samples FILE and --without FILE choose by key",
        )
    chosen = np.ones(len(transfer_set), dtype=bool)
    if samples is not None:
        chosen &= _listed(transfer_set.keys, Path(samples))
    if without is not None:
        chosen &= ~_listed(transfer_set.keys, Path(without))
    if keep_labels:
        chosen &= of_classes(transfer_set.labels, transfer_set.class_names, keep_labels)
    if drop_labels:
        chosen &= ~of_classes(transfer_set.labels, transfer_set.class_names, drop_labels)
    if not chosen.any():
        raise DataError(
            f"{spec!r}: none of its {len(transfer_set)} samples is selected",
            tip="loosen --keep-labels, --drop-labels, --samples or --without",
        )
    return transfer_set if chosen.all() else transfer_set.select(np.flatnonzero(chosen))


def under_classes(
    transfer_set: TransferSet, class_names: Sequence[str], owner: str, classes_map: Mapping[str, str] | None = None
) -> TransferSet:
    """The set under its owner's class list: as it is, or with the classes that it lacks, which then have no samples.

    An owner without classes takes any.

    Args:
        classes_map: data's class -> owner's class, for those that are called otherwise.

    Raises:
        ClassMismatchError: it has other classes, or in another order.
    """
    if not class_names:  # the owner gives no classes: whose the labels are says nothing about it
        return transfer_set
    called = [(classes_map or {}).get(name, name) for name in transfer_set.class_names]
    places = None if transfer_set.multi_label else places_in(called, class_names)
    if places is not None:
        return transfer_set.under(class_names, places)
    check_classes(transfer_set, class_names, owner, classes_map)
    return transfer_set


def _open_source(spec: Spec, *, download: bool) -> Source:
    if not spec.scheme and spec.name == "digits":
        return _checked_call(digits, spec)
    if spec.scheme == "torchvision":
        return from_torchvision(spec, download=download)
    if spec.scheme == "synthetic":
        if spec.name not in MADE_UP:
            raise ConfigError(f"{spec.text!r}: no such synthetic data", tip=nearest(spec.name, MADE_UP))
        return _checked_call(MADE_UP[spec.name], spec)
    if spec.scheme == "hf-dataset":
        return _checked_call(hf_dataset, spec, path=spec.name, download=download)
    if spec.scheme in FILE_SOURCES:
        _refuse_unquoted(spec)
        return _checked_call(FILE_SOURCES[spec.scheme], spec, path=Path(spec.name).expanduser())
    if spec.is_factory:
        return from_factory(spec)
    path = Path(spec.name).expanduser()
    if not spec.scheme and os.path.exists(
        path
    ):  # unlike Path.exists, no error for what is longer than a file name can be
        kind = _kind_of_path(path)
        literal = f"{kind}:{quoted(spec.name, '?')}"
        raise ConfigError(f"{spec.text!r} is a path, not a source", tip=f"did you mean {literal}?")
    if spec.scheme in OTHER_WORDS:
        kind = OTHER_WORDS[spec.scheme]
        raise ConfigError(
            f"{spec.text!r}: no source is called {spec.scheme!r}",
            tip=f"did you mean {kind}:{quoted(spec.name, '?')}?",
        )
    tip = f"{nearest(spec.scheme or spec.name, SOURCES)} Your own data: package.module:factory or path/file.py:factory"
    raise ConfigError(f"{spec.text!r}: no source is called {spec.scheme or spec.name!r}", tip=tip)


def _kind_of_path(path: Path) -> str:
    """The source that reads a file or a folder as it looks."""
    if not path.is_dir():
        return "conll" if path.name.removesuffix(".gz").endswith((".conll", ".conllu", ".iob", ".bio")) else "table"
    if is_saved(path):
        return "hf-dataset"
    return "imagefolder" if any(entry.is_dir() for entry in path.iterdir()) else "images"


def _refuse_unquoted(spec: Spec) -> None:
    """Raise ConfigError where what stands before the '?' is no path, and all of it is one."""
    path = spec.text.partition(":")[2]
    if "?" in path and os.path.exists(path) and not os.path.exists(Path(spec.name).expanduser()):
        raise ConfigError(
            f"{spec.text!r}: there is no {spec.name}; {path} is there, and behind a '?' stand parameters",
            tip=f"quote the path: {spec.scheme}:{quoted(path, '?')}",
        )


def _checked_call(source: Callable[..., Source], spec: Spec, **offered: Any) -> Source:
    if clash := set(offered) & set(spec.parameters):
        raise ConfigError(f"{spec.text!r}: {clash.pop()!r} is given twice", tip=f"write {spec.scheme}:PATH")
    made: Source = call_factory(source, spec.parameters, spec.text, **offered)
    return made


def _portable_name(spec: Spec) -> str:
    """The spec without local folders: two machines that keep the same data in different places agree on it."""
    if spec.scheme in (*FILE_SOURCES, "hf-dataset"):
        spec = replace(spec, name=Path(spec.name).expanduser().resolve().name)
    if spec.scheme == "text":  # whose tokenizer the cache keeps
        spec = spec.without("tokenizer")
    return spec.without("root", "download").portable() if spec.scheme == "torchvision" else spec.portable()


def _range(text: str, count: int, spec: str) -> np.ndarray:
    """`0-49999` -> the positions from the first to the last."""
    first, dash, last = text.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal() and int(first) <= int(last) < count):
        raise ConfigError(
            f"{spec!r}: rows={text} is no range of its {count} samples", tip=f"write rows=0-{count - 1} for all of them"
        )
    return np.arange(int(first), int(last) + 1)


def _listed(keys: Sequence[str], path: Path) -> np.ndarray:
    """(N,) bool: the samples whose keys the file lists."""
    wanted = dict.fromkeys(read_keys(path))
    found = np.fromiter((key in wanted for key in keys), dtype=bool, count=len(keys))
    if int(found.sum()) < len(wanted):
        known = set(keys)
        unknown = [key for key in wanted if key not in known]
        raise DataError(
            f"{path}: {len(unknown)} of {len(wanted)} keys are not in the transfer set: "
            + first_offenders(unknown, len(unknown)),
            tip=f"take out these lines, or write the keys as this set has them, one a line: {keys[0]!r}",
        )
    return found

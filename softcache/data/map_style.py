"""Other people's map-style data sets as sources: torchvision's by name, and whatever a user's factory returns."""

from __future__ import annotations

import inspect
import pickle
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset

from softcache.data.classes import dataset_classes
from softcache.data.columns_source import source_of_columns
from softcache.data.label_column import MANY
from softcache.data.label_kind import yes_or_no
from softcache.data.sources import ArrayReader, Reader, Source, StringTable, image_array, numbered, read_idx
from softcache.data.tables import WORD_COLUMNS, is_frame, is_table, only, refuse_missing
from softcache.data.word_samples import gives_words, kept_positions, looks_like_words, tags_of, words_and_tags
from softcache.errors import (
    ConfigError,
    DataError,
    MissingExtraError,
    SoftcacheError,
    faults_explained,
    first_offenders,
    nearest,
    note_once,
    warn_once,
)
from softcache.spec import Spec, call_factory, load_factory, load_user_file

ITEM_NAMES = ("item", "image", "text")
COLUMNS = ("item", "key", "label", "words", "tags")  # of a table, as a spec may name them
IDX_SETS = ("MNIST", "FashionMNIST", "KMNIST")
NOT_BY_NAME = ("ImageFolder", "DatasetFolder", "VisionDataset")  # imagefolder: reads these; the last one is abstract
NOT_IN_A_SPEC = ("transform", "target_transform", "transforms", "loader")  # callables: views do that, and they are ours
# parameters that change which samples the positions count
SPLIT_PARAMETERS = ("split", "what", "folds", "partition", "train")


@dataclass(frozen=True)
class MapStyleReader:
    """Items of a map-style data set; images come as arrays, everything else as the data set gives it."""

    dataset: Any
    name: str
    of_words: bool = False
    digest_kind = "item"

    def read(self, row: int) -> tuple[Any, None]:
        where = f"{self.name}, sample {row}"
        if self.of_words:
            return words_and_tags(self.dataset[row], where)[0], None
        item, _ = split_sample(self.dataset[row], self.name)
        if isinstance(item, Image.Image):
            return image_array(item, where), None
        refuse_missing(item, where)
        return item, None


@dataclass(frozen=True)
class UserFileReader:
    """A reader made by a user's .py file, which a spawned worker has to import before it can unpickle it."""

    file: str
    reader: Reader

    @property
    def digest_kind(self) -> str:
        return self.reader.digest_kind

    def read(self, row: int) -> tuple[Any, bytes | None]:
        return self.reader.read(row)

    def __reduce__(self) -> tuple[Any, ...]:
        return _import_and_unpickle, (self.file, pickle.dumps(self.reader))


def _import_and_unpickle(file: str, reader: bytes) -> UserFileReader:
    load_user_file(file)
    return UserFileReader(file, pickle.loads(reader))


def from_factory(spec: Spec) -> Source:
    """What the spec's factory returns, as a source: a map-style data set, or a TransferSet (read as it is)."""
    factory = load_factory(spec)
    columns = _columns(factory, spec)
    with faults_explained(DataError, f"the data set {spec.text!r}"):
        made = call_factory(factory, spec.without(*columns).parameters, spec.text)
        source = from_dataset(made, spec.text, spec.name, columns)
    if not spec.scheme.endswith(".py"):
        return source
    return replace(source, reader=UserFileReader(str(Path(spec.scheme).resolve()), source.reader))


def _columns(factory: Callable[..., Any], spec: Spec) -> dict[str, str]:
    """Of the spec's parameters those that name columns of the table that a factory returns, and are none of its own."""
    known = inspect.signature(factory).parameters
    if any(one.kind is one.VAR_KEYWORD for one in known.values()):
        return {}
    named = [name for name in spec.parameters if name in COLUMNS and name not in known]
    return {name: spec.value(name) if name == "key" else spec.parameters[name] for name in named}


def from_dataset(dataset: Any, name: str, prefix: str, columns: Mapping[str, str] = MappingProxyType({})) -> Source:
    """A map-style data set, or a table, as a source.

    Args:
        dataset: `__len__`, and `__getitem__` giving an item, (item, label) or a dict of item (image, text) and label; of words
            a dict of words (tokens) and tags, or (words, tags) where the data set says `words = True`.
        name: for messages.
        prefix: of the keys, where the data set names no samples.
        columns: item, key, label, words and tags of a table.

    Raises:
        ConfigError: columns of what is no table.
        DataError: an iterable data set, or keys, labels or classes that do not fit one another.
    """
    is_map = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and not isinstance(dataset, Mapping)
    if isinstance(dataset, IterableDataset) or not is_map:
        raise DataError(
            f"{name}: {type(dataset).__name__} can only be iterated, so a sample cannot be found again by its key",
            tip="return a map-style data set: __len__, __getitem__(index) and, best, sample_keys",
        )
    if not len(dataset):
        raise DataError(f"{name}: the data set is empty", tip="check the factory's parameters")
    if columns and not is_table(dataset):
        raise ConfigError(
            f"{name}: {next(iter(columns))!r} is no parameter of the factory, and {type(dataset).__name__} has no columns",
            tip="item=, key=, label=, words= and tags= are of Hugging Face's data sets and of DataFrames",
        )
    if is_frame(dataset) or columns:
        return source_of_columns(dataset, name, prefix, **columns)  # type: ignore[arg-type]
    if is_table(dataset):
        if not set(ITEM_NAMES) & set(dataset.column_names) and (own := only(WORD_COLUMNS, dataset.column_names)):
            return source_of_columns(dataset, name, prefix, words=own)
        _tell_unused(dataset, name)
    dataset = _selected(dataset)
    keys = _keys(dataset, name, prefix)
    if gives_words(dataset):
        tags, class_names = tags_of(dataset, keys, name)
        none = np.full(len(keys), -1, np.int32)
        return Source(MapStyleReader(dataset, name, of_words=True), keys, none, class_names, positions=tags)
    try:
        return _one_label_each(dataset, keys, name)
    except DataError as exc:
        if looks_like_words(dataset):
            tip = "samples that are words with a tag each: let the data set say words = True, or give dicts of words and tags"
            raise DataError(exc.message, tip=tip) from None
        raise


def _selected(dataset: Any) -> Any:
    """A `Subset` of a TransferSet of words as that set selects samples itself, with their keys and tags; all else as it is."""
    if not isinstance(dataset, Subset):
        return dataset
    whole = _selected(dataset.dataset)
    known = kept_positions(whole) is not None
    return whole.select(np.asarray(dataset.indices, np.int64)) if known else dataset


def _one_label_each(dataset: Any, keys: StringTable, name: str) -> Source:
    """Samples that have one label, or one row of yes and no, or values."""
    found = _labels(dataset, name)
    values = _values(dataset, found, name)
    labels = _label_array(np.full(len(keys), -1) if values is found else found, keys, name)
    class_names = _class_names(dataset, labels, name)
    _check_classes(labels, class_names, keys, name)
    reader: Reader = (
        dataset if hasattr(dataset, "read") and hasattr(dataset, "digest_kind") else MapStyleReader(dataset, name)
    )
    return Source(reader, keys, labels, class_names, _as_values(values, keys, name), kept_positions(dataset))


def _values(dataset: Any, labels: Any, name: str) -> Any:
    """Numbers of each sample that are no classes: an attribute `values`, or labels most of which have fractions; else None."""
    own = getattr(dataset, "values", None)
    if own is not None and not callable(own) and hasattr(own, "__len__") and len(own) == len(dataset):
        return own
    if dataset_classes(dataset) is not None or isinstance(getattr(dataset, "num_classes", None), int):
        return None
    try:
        array = np.asarray(labels)
    except ValueError:
        return None
    if array.dtype.kind != "f" or array.ndim not in (1, 2):
        return None
    known = array[np.isfinite(array)]
    if array.ndim == 2 and known.size and known.min() >= 0 and known.max() <= 1:
        return None  # rows of probabilities, or of yes and no with a mistake in them
    if 2 * int((known != np.round(known)).sum()) <= known.size or not known.size:
        return None
    note_once(
        f"{name}: its labels are numbers with fractions: they are taken as values, and the samples have no classes"
    )
    return labels


def _as_values(found: Any, keys: Sequence[str], name: str) -> np.ndarray | None:
    """(N, K) float64; DataError for infinite numbers and what is none."""
    if found is None:
        return None
    try:
        values = np.asarray(found, np.float64).reshape(len(keys), -1)
    except (TypeError, ValueError):
        raise DataError(
            f"{name}: its values are no numbers", tip="give each sample one number, or a row of K"
        ) from None
    odd = np.flatnonzero(np.isinf(values).any(axis=1))
    if odd.size:
        named = first_offenders((keys[int(i)] for i in odd), odd.size)
        raise DataError(
            f"{name}: the values of {odd.size} samples are infinite: {named}", tip="mend them; NaN is not known"
        )
    return values


def _tell_unused(dataset: Any, name: str) -> None:
    """Warn of a table that is taken as unlabelled though it has columns that nobody asked for."""
    others = [one for one in dataset.column_names if one not in ITEM_NAMES]
    if others and "label" not in others:
        warn_once(
            f"{name}: no column is called 'label', so the samples have no labels, and other columns are not used: "
            f"{first_offenders(others, len(others))}; label=NAME takes one of them"
        )


def split_sample(sample: Any, name: str) -> tuple[Any, Any]:
    """(item, label or None) of what a data set returned for one index."""
    if isinstance(sample, Mapping):
        found = [key for key in ITEM_NAMES if key in sample]
        if len(found) != 1:
            raise DataError(
                f"{name}: a sample is a dict of {', '.join(map(repr, sample))}; which one is the item?",
                tip="give it exactly one of 'item', 'image' and 'text', and 'label'",
            )
        return sample[found[0]], sample.get("label")
    if isinstance(sample, tuple | list):
        if len(sample) not in (1, 2):
            raise DataError(
                f"{name}: a sample is a {type(sample).__name__} of {len(sample)}, expected (item, label)",
                tip="return (item, label), or a dict with 'item' and 'label'",
            )
        return sample[0], (sample[1] if len(sample) == 2 else None)
    return sample, None


def _keys(dataset: Any, name: str, prefix: str) -> StringTable:
    keys = getattr(dataset, "sample_keys", None)
    if callable(keys):
        keys = keys()
    if keys is None:
        return _path_keys(dataset) or numbered(prefix, range(len(dataset)))
    if len(keys) != len(dataset):
        raise DataError(
            f"{name}: {len(keys)} sample_keys for {len(dataset)} samples", tip="one key per sample, in order"
        )
    wrong = next((key for key in keys if not isinstance(key, str)), None)
    if wrong is not None:
        raise DataError(f"{name}: sample key {wrong!r} is not a string", tip="use str(...) of what names the sample")
    return StringTable(keys)


def _path_keys(dataset: Any) -> StringTable | None:
    """Relative paths of an ImageFolder-like data set: `samples` of (path, label) below `root`."""
    samples, root = getattr(dataset, "samples", None), getattr(dataset, "root", None)
    if not isinstance(samples, Sequence) or root is None or len(samples) != len(dataset):
        return None
    try:
        return StringTable(Path(path).relative_to(root).as_posix() for path, *_ in samples)
    except (TypeError, ValueError):  # not paths, or not below root
        return None


def _labels(dataset: Any, name: str) -> Any:
    """One label per sample, from an attribute, else by asking for every sample once."""
    if getattr(dataset, "target_transform", None) is None:  # it would change what the attributes say
        for attribute in ("labels", "targets", "_labels"):
            found = getattr(dataset, attribute, None)
            if found is not None and hasattr(found, "__len__") and len(found) == len(dataset):
                return found
    return [split_sample(dataset[row], name)[1] for row in range(len(dataset))]


def _label_array(labels: Any, keys: Sequence[str], name: str) -> np.ndarray:
    """(N,) int32, -1 = none; or (N, C) bool, int8 where some are unknown: -1."""
    if isinstance(labels, list | tuple):
        labels = _filled(labels)
    try:
        array = np.asarray(labels)
    except ValueError:  # shapes differ between samples
        raise DataError(
            f"{name}: labels differ in shape", tip="one class index, or one 0/1 row of C, per sample"
        ) from None
    if array.ndim not in (1, 2) or array.dtype.kind not in "biuf":
        raise DataError(
            f"{name}: labels of shape {array.shape} and type {array.dtype}, for example {array.flat[0]!r}",
            tip="labels are class indices (-1 = none), or 0/1 rows of C for several classes per sample",
        )
    if array.ndim == 2:
        return _answers(array, keys, name)
    with np.errstate(invalid="ignore"):  # NaN is refused below
        result = array.astype(np.int32)
    _refuse_others(array, result == array, keys, name, "a whole number", "repair the data set's labels")
    return result


def _filled(labels: Sequence[Any]) -> list[Any]:
    """Labels where None says that there is none: -1, and among rows NaN."""
    arrays = [None if label is None else np.asarray(label) for label in labels]
    row = next((one for one in arrays if one is not None and one.ndim == 1), None)
    none = np.asarray(-1) if row is None else np.full(len(row), np.nan)
    with_numbers = (one.astype(float) if one is not None and one.dtype == object else one for one in arrays)
    try:
        return [none if one is None else one for one in with_numbers]  # float(None) is NaN to NumPy
    except (TypeError, ValueError):  # no numbers, which is told where it is looked at
        return list(labels)


def _answers(array: np.ndarray, keys: Sequence[str], name: str) -> np.ndarray:
    """(N, C) bool of yes and no, or int8 with -1 for what is unknown: NaN, or -1 beside 0 and 1."""
    tip = "1 is yes, 0 is no, NaN or -1 what is not known"
    unknown = np.isnan(array) if array.dtype.kind == "f" else np.zeros(array.shape, bool)
    _refuse_others(array, unknown | np.isin(array, (-1, 0, 1)), keys, name, "0 or 1", tip)
    return yes_or_no(array, name)


def _refuse_others(array: np.ndarray, good: np.ndarray, keys: Sequence[str], name: str, what: str, tip: str) -> None:
    wrong = np.flatnonzero(~good.reshape(len(array), -1).all(axis=1))
    if wrong.size:
        row = int(wrong[0])
        raise DataError(f"{name}: label {array[row]} of sample {keys[row]} is not {what}", tip=tip)


def _class_names(dataset: Any, labels: np.ndarray, name: str) -> tuple[str, ...]:
    found = dataset_classes(dataset)
    if found is not None:
        return found
    count = getattr(dataset, "num_classes", None)
    if isinstance(count, int):
        return tuple(str(number) for number in range(count))
    if labels.ndim == 2:
        return tuple(str(number) for number in range(labels.shape[1]))
    known = labels[labels >= 0]
    kinds = len(np.unique(known))
    if len(known) >= MANY and kinds >= 0.9 * len(known):
        raise DataError(
            f"{name}: {kinds} different labels in {len(known)} samples, for example {known[0]}: these are no classes",
            tip="labels are class indices; if these are, give the data set class_names or num_classes",
        )
    return tuple(str(number) for number in range(int(labels.max()) + 1))


def _check_classes(labels: np.ndarray, class_names: Sequence[str], keys: Sequence[str], name: str) -> None:
    count = len(class_names)
    if len(set(class_names)) < count:
        twice = next(one for one in class_names if list(class_names).count(one) > 1)
        raise DataError(f"{name}: two classes are called {twice!r}", tip="give each class a name of its own")
    if labels.ndim == 2:
        if labels.shape[1] != count:
            raise DataError(
                f"{name}: label rows have {labels.shape[1]} columns for {count} classes", tip="make them equal"
            )
        return
    wrong = np.flatnonzero((labels < -1) | (labels >= count))
    if wrong.size:
        row = int(wrong[0])
        raise DataError(
            f"{name}: label {labels[row]} of sample {keys[row]} is outside -1..{count - 1}",
            tip="labels count from 0; -1 means none; class_names must list every class",
        )


def from_torchvision(spec: Spec, *, download: bool) -> Source:
    """A torchvision classification data set by the name of its class; MNIST and its kin straight from their IDX files.

    Keys are the split and the position: `train/000123`. Nothing is fetched without `download`.

    Raises:
        DataError: no such data set, or its files are not there.
    """
    import torchvision.datasets as zoo

    classes = {name: getattr(zoo, name) for name in zoo.__all__ if name not in NOT_BY_NAME}
    known: dict[str, Any] = {
        name: cls for name, cls in classes.items() if inspect.isclass(cls) and issubclass(cls, Dataset)
    }
    if spec.name not in known:
        raise DataError(f"torchvision has no data set {spec.name!r}", tip=nearest(spec.name, known))
    given, defaults = _arguments(known[spec.name], spec, download=download)
    prefix = _split_name(defaults | given)
    if spec.name in IDX_SETS:
        found = _idx_source(Path(given["root"]).expanduser(), spec.name, prefix, tuple(known[spec.name].classes))
        if found is not None:
            return found
    try:
        dataset = known[spec.name](**given)
    except ModuleNotFoundError as exc:
        raise MissingExtraError(
            f"{spec.text!r} needs the package {exc.name!r}", tip=f"pip install {exc.name}"
        ) from None
    except SoftcacheError:
        raise
    except Exception as exc:  # torchvision raises RuntimeError, FileNotFoundError, ValueError and others for this
        can_fetch = given.get("download") is False and not isinstance(exc, ValueError)
        tip = "add --download, or point root= at the files" if can_fetch else "check the parameters, and root="
        raise DataError(f"{spec.text!r}: {exc}", tip=tip) from exc
    return from_dataset(dataset, spec.text, prefix)


def _arguments(cls: Any, spec: Spec, *, download: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The spec's parameters, and the defaults; names and types from the class and the bases its **kwargs reach."""
    parameters: dict[str, inspect.Parameter] = {}
    hints: dict[str, Any] = {}
    for init in (vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base)):
        signature = inspect.signature(init)
        for name, parameter in list(signature.parameters.items())[1:]:
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and name not in NOT_IN_A_SPEC:
                parameters.setdefault(name, parameter.replace(kind=parameter.KEYWORD_ONLY))
        hints = typing.get_type_hints(init) | hints
        if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
            break

    def collect(**arguments: Any) -> dict[str, Any]:
        return arguments

    # to call_factory it looks like the class with every **kwargs spelled out
    collect.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    collect.__annotations__ = {name: hints[name] for name in parameters if name in hints}
    given = call_factory(collect, spec.parameters, spec.text, download=download)
    return given, {n: p.default for n, p in parameters.items() if p.default is not p.empty}


def _split_name(arguments: Mapping[str, Any]) -> str:
    """`train`, `test`, or whatever the arguments choose between: `letters/train` for EMNIST."""
    chosen = [arguments[name] for name in SPLIT_PARAMETERS if arguments.get(name) is not None]
    names = [("train" if value else "test") if isinstance(value, bool) else str(value) for value in chosen]
    return "/".join(names) or "all"


def _idx_source(root: Path, name: str, split: str, class_names: tuple[str, ...]) -> Source | None:
    """The source from IDX files in the usual folders, .gz or not; None where they are not."""
    stem = {"train": "train", "test": "t10k"}[split]
    for folder in (root / name / "raw", root / "raw", root):
        files = [_plain_or_gz(folder / f"{stem}-{part}") for part in ("images-idx3-ubyte", "labels-idx1-ubyte")]
        if files[0] is None or files[1] is None:
            continue
        images, labels = read_idx(files[0]), read_idx(files[1])
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not len(images):
            raise DataError(
                f"{files[0]}: images of shape {images.shape} for labels of shape {labels.shape} in {files[1].name}",
                tip="delete both files and fetch them again",
            )
        keys = numbered(split, range(len(images)))
        _check_classes(labels.astype(np.int32), class_names, keys, str(files[1]))
        return Source(ArrayReader(images), keys, labels.astype(np.int32), class_names)
    return None


def _plain_or_gz(path: Path) -> Path | None:
    return next((file for file in (path, path.with_name(path.name + ".gz")) if file.is_file()), None)

"""Hugging Face's `datasets` (extra `datasets`): sets saved to a disk, folders and files of Parquet or Arrow, names on the hub.

The network is used with `download` alone, and no code that a data set brings is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from softcache.data.columns_source import source_of_columns
from softcache.data.sources import Source
from softcache.errors import ConfigError, DataError, SoftcacheError, nearest, require_extra


def hf_dataset(
    path: str,
    split: str = "",
    config: str = "",
    item: str = "",
    text: str = "",
    label: str = "",
    key: str = "",
    words: str = "",
    tags: str = "",
    classes: tuple[str, ...] = (),
    empty: Literal["", "unlabelled", "class"] = "",
    download: bool = False,
) -> Source:
    """A data set of Hugging Face's, by its columns; keys are its name, its split and the row.

    Args:
        path: what save_to_disk wrote, a folder of data files, a Parquet or Arrow file, or a name on the hub.
        split: one of several; empty: the only one.
        config: of a name on the hub that has several.
        item: column of the pictures or texts, or two of pairs, "premise,hypothesis"; `text` is the same. Empty: item, image or
            text.
        label, key, words, tags, classes, empty: as of `table`; a ClassLabel brings its classes.
        download: fetch what is not there.

    Raises:
        DataError: no such data set, split or column.
        MissingExtraError: datasets is not installed.
    """
    what = f"'hf-dataset:{path}'"
    require_extra("datasets", "datasets", f"the data set {what}")
    if item and text:
        raise ConfigError(f"{what}: item={item} and text={text}", tip="keep one of them: they are the same")
    place = Path(path).expanduser()
    name = place.name.removesuffix(".parquet") if place.is_dir() else place.name
    with _quietly(offline=not download), _explained(what, download=download, is_there=place.exists()):
        found = _read(place, path, config)
    rows, chosen = _one_split(found, split, what)
    prefix = f"{name}/{chosen}" if chosen else name
    named = {"item": item or text, "label": label, "key": key, "words": words, "tags": tags}
    return source_of_columns(rows, what, prefix, **named, classes=classes, empty=empty)


def is_columns_file(path: Path) -> bool:
    """Whether it is Parquet or Arrow, by its ending, or by its first bytes."""
    if path.suffix in (".parquet", ".arrow"):
        return True
    try:
        with path.open("rb") as file:
            return file.read(6).startswith((b"PAR1", b"ARROW1"))
    except OSError:
        return False


def is_saved(folder: Path) -> bool:
    """Whether save_to_disk wrote it."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _read(place: Path, path: str, config: str) -> Any:
    import datasets

    if place.is_file():
        if place.suffix == ".arrow":
            return datasets.Dataset.from_file(str(place))
        return datasets.Dataset.from_parquet(str(place))
    if is_saved(place):
        return datasets.load_from_disk(str(place))
    return datasets.load_dataset(str(place) if place.is_dir() else path, config or None)


def _one_split(found: Any, split: str, what: str) -> tuple[Any, str]:
    """The table, and the name of its split; "" where there are none."""
    if not isinstance(found, Mapping):
        if split:
            raise DataError(f"{what}: it has no splits, and split={split} is asked for", tip="leave split= out")
        return found, ""
    if not split and len(found) > 1:
        raise DataError(
            f"{what}: it has {len(found)} splits", tip="name one: " + ", ".join(f"split={name}" for name in found)
        )
    split = split or next(iter(found))
    if split not in found:
        raise DataError(f"{what}: it has no split {split!r}", tip=nearest(split, found))
    return found[split], split


@contextmanager
def _explained(what: str, *, download: bool, is_there: bool) -> Iterator[None]:
    """Whatever datasets says of a place that it cannot read becomes one line and what to do."""
    try:
        yield
    except SoftcacheError:
        raise
    except Exception as exc:  # of many kinds, and from several libraries
        reason = f"{type(exc).__name__}: {exc}".splitlines()[0]
        if is_there:
            raise DataError(
                f"{what} cannot be read: {reason}", tip="give what save_to_disk wrote, or Parquet files"
            ) from exc
        tip = "check the name, and the network" if download else "a name on the hub needs --download; check the path"
        raise DataError(f"{what}: there is no such file or folder, and from the hub {reason}", tip=tip) from exc


@contextmanager
def _quietly(*, offline: bool) -> Iterator[None]:
    """Without progress bars, and where asked for without the hub."""
    import datasets
    from huggingface_hub import constants

    bars = datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    places: list[Any] = [datasets.config, constants]
    before = [(place, place.HF_HUB_OFFLINE) for place in places]
    for place, value in before:
        place.HF_HUB_OFFLINE = value or offline
    try:
        yield
    finally:
        for place, value in before:
            place.HF_HUB_OFFLINE = value
        if not bars:
            datasets.enable_progress_bars()

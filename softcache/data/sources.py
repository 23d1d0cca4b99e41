"""What every source gives, digits and image folders; and the reader of IDX files."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import struct
import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
from PIL import Image

from softcache.data.identity import sample_id
from softcache.data.position_labels import PositionLabels
from softcache.data.rendering import Rendering
from softcache.errors import ConfigError, DataError, require_extra, utf8_tip, warn_once

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as ImageFolder's
KEEPS_EMPTY = (".gitkeep", ".keep", ".gitignore", ".DS_Store", "Thumbs.db", "desktop.ini")
PARTS = frozenset(("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"))
DIGITS_SEED = 20260101  # part of what `digits` means: another seed is another split
DIGITS_TEST = 500
MOST_AXES = 8  # of an IDX file
PACKINGS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
MOST_UNPACKED = 2**32  # bytes that a packed file is unpacked to in memory
PACKED = 200  # so many times its size at most, beyond what is small: text packs to a tenth, a bomb to a thousandth


class Reader(Protocol):
    """Reads one item of a source. Picklable, cheap to fork."""

    @property
    def digest_kind(self) -> str: ...

    def read(self, row: int) -> tuple[Any, bytes | None]:
        """The item, and the file's bytes it was decoded from (None where `digest_kind` is "item")."""
        ...


@dataclass(frozen=True)
class Source:
    """Where a transfer set comes from.

    Attributes:
        reader: gives the items.
        keys: N keys.
        labels: (N,) int32 with -1 = none; or (N, C) bool, int8 with -1 = unknown where some are.
        class_names: C names.
        values: (N, K) float64 numbers of each sample that are no classes, NaN = not known; None where there are none.
        positions: labels of the words of each sample, or of its tokens, whose `labels` are all -1; None of anything else.
        rendering: how texts became tokens; None where items are no `Tokens`.
    """

    reader: Reader
    keys: StringTable
    labels: np.ndarray
    class_names: tuple[str, ...]
    values: np.ndarray | None = None
    positions: PositionLabels | None = None
    rendering: Rendering | None = None


class StringTable(Sequence[str]):
    """Many strings as one block of UTF-8 and an array of offsets: small, and a forked worker copies none of it."""

    def __init__(self, strings: Iterable[str]) -> None:
        blob, offsets = bytearray(), array("q", [0])
        for string in strings:  # one after the other: a list of them all would take several times their room
            blob += string.encode("utf-8")
            offsets.append(len(blob))
        self._blob = bytes(blob)
        self._offsets = np.frombuffer(offsets, np.int64)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> StringTable: ...
    def __getitem__(self, index: int | slice) -> str | StringTable:
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        row = range(len(self))[index]  # IndexError and negative positions, as a list has them
        return self._blob[self._offsets[row] : self._offsets[row + 1]].decode("utf-8")

    def take(self, rows: Iterable[int]) -> StringTable:
        """The strings at these rows, in this order."""
        return StringTable(self[int(row)] for row in rows)


def numbered(prefix: str, numbers: Iterable[int]) -> StringTable:
    """Keys by position: `prefix/000123`."""
    return StringTable(f"{prefix}/{number:06d}" for number in numbers)


@dataclass(frozen=True)
class ArrayReader:
    """Items that lie in memory as one array, (N, H, W) or (N, H, W, C) uint8."""

    items: np.ndarray
    digest_kind = "item"

    def read(self, row: int) -> tuple[np.ndarray, None]:
        return self.items[row].copy(), None  # a caller may write into its item, never into the set


@dataclass(frozen=True)
class TextReader:
    """Items that are strings."""

    texts: StringTable
    digest_kind = "item"

    def read(self, row: int) -> tuple[str, None]:
        return self.texts[row], None


@dataclass(frozen=True)
class ImageFileReader:
    """Image files below one folder, decoded from the same bytes that are digested."""

    root: str
    paths: StringTable
    digest_kind = "file"

    def read(self, row: int) -> tuple[np.ndarray, bytes]:
        path = Path(self.root, self.paths[row])
        try:
            data = path.read_bytes()
            with Image.open(io.BytesIO(data)) as image:
                return image_array(image, str(path)), data
        except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as exc:
            reason = "it holds no image that Pillow knows" if isinstance(exc, Image.UnidentifiedImageError) else exc
            tip = "repair the file, or leave it out: --without FILE"
            if isinstance(exc, Image.DecompressionBombError):
                tip += "; where such images are meant, set PIL.Image.MAX_IMAGE_PIXELS in a factory of yours"
            raise DataError(f"{path}: cannot be read as an image: {reason}", tip=tip) from exc


def image_array(image: Image.Image, where: str) -> np.ndarray:
    """uint8 (H, W) of a grey image, (H, W, 3) of any other; alpha is dropped, EXIF orientation not applied.

    Raises:
        DataError: more than 8 bits per channel.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise DataError(
            f"{where}: Pillow mode {image.mode!r} has more than 8 bits per channel, and scaling it would be a guess",
            tip="convert it to 8 bits, or give arrays of your own through package.module:factory",
        )
    if image.mode in ("1", "LA"):
        image = image.convert("L")
    elif image.mode not in ("L", "RGB"):
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # the same colours as straight to RGB, without Pillow's warning
        image = image.convert("RGB")
    return np.array(image)


def digits(split: str = "train") -> Source:
    """scikit-learn's 1,797 bundled digits, 8x8 grey, 10 classes: 1,297 to train and 500 to test, always the same ones.

    The pixels' 0..16 become 0..255, so that they are ordinary grey images. Keys: `digits/` and the row in the file.
    """
    if split not in ("train", "test"):
        raise ConfigError(f"digits has no split {split!r}", tip="digits?split=train or digits?split=test")
    require_extra("sklearn", "demo", "the data set 'digits'")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    labels = bunch.target.astype(np.int32)
    # sorted by class, inside a class by a hash; evenly spaced picks then take the same share of each class
    order = sorted(range(len(labels)), key=lambda i: (labels[i], sample_id(f"{DIGITS_SEED}/{i}")))
    test = np.array(order)[np.arange(DIGITS_TEST) * len(order) // DIGITS_TEST]
    rows = np.sort(test) if split == "test" else np.setdiff1d(np.arange(len(labels)), test)
    names = tuple(str(digit) for digit in range(10))
    return Source(ArrayReader(images[rows]), numbered("digits", rows), labels[rows], names)


def imagefolder(path: Path) -> Source:
    """Images in one sub-folder per class, in torchvision's ImageFolder order; keys are paths relative to the folder.

    Hidden files and folders are passed over. A grey file stays grey: ImageFolder would make it RGB.
    """
    if not path.is_dir():
        raise DataError(f"{path}: {no_folder(path)}", tip="imagefolder:PATH wants a folder with one folder per class")
    classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise DataError(
            f"{path}: holds no folders, so there are no classes",
            tip="put each class into its own folder; pictures without classes are images:PATH",
        )
    keys: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = [file.relative_to(path).as_posix() for file in image_files(path / name)]
        if not found and (other := _any_file(path / name)) is not None:
            raise DataError(
                f"{path / name}: holds no images, so class {name!r} has no samples; {other.name} is none",
                tip=f"remove the folder, empty it, or add images ({', '.join(IMAGE_EXTENSIONS)})",
            )
        keys += found
        labels += [label] * len(found)
    if not keys:
        raise DataError(f"{path}: none of its {len(classes)} folders holds an image", tip="put images into the folders")
    _tell_parts(path, classes)
    table = utf8_keys(path, keys)
    return Source(ImageFileReader(os.path.abspath(path), table), table, np.array(labels, np.int32), tuple(classes))


def no_folder(path: Path) -> str:
    """What is wrong with a path that is no folder."""
    return "is a file, not a folder" if path.is_file() else "there is no such folder"


def _tell_parts(path: Path, classes: Sequence[str]) -> None:
    """Warn of folders that are parts of a data set by their names and hold folders: the classes lie one deeper."""
    if (
        len(classes) > 1
        and {name.lower() for name in classes} <= PARTS
        and all(map(_holds_folders, map(path.joinpath, classes)))
    ):
        warn_once(
            f"{path}: its classes are {', '.join(map(repr, classes))}, which look like the parts of a data set; "
            f"imagefolder:{path / classes[-1]} has the classes of one part"
        )


def _holds_folders(path: Path) -> bool:
    return any(entry.is_dir() for entry in path.iterdir())


def utf8_keys(path: Path, keys: Iterable[str]) -> StringTable:
    """The keys of files below a path; DataError for a name that is not UTF-8."""
    try:
        return StringTable(keys)
    except UnicodeEncodeError as exc:
        raise DataError(f"{path}: a file name is not UTF-8: {exc.object!r}", tip=utf8_tip("rename the file")) from None


def image_files(folder: Path) -> list[Path]:
    """The pictures below a folder by their names, in order; hidden ones are passed over."""
    files: list[Path] = []
    for place, _, names in sorted(os.walk(folder, followlinks=True)):
        hidden = any(part.startswith(".") for part in Path(place).relative_to(folder).parts)
        shown = () if hidden else sorted(names)
        files += [Path(place, n) for n in shown if n.lower().endswith(IMAGE_EXTENSIONS) and not n.startswith(".")]
    return files


def _any_file(folder: Path) -> Path | None:
    """A file anywhere below; None in a folder that was left empty, or holds what keeps an empty folder."""
    return next((file for file in sorted(folder.rglob("*")) if file.is_file() and file.name not in KEEPS_EMPTY), None)


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array in an IDX file, plain or .gz (MNIST's format: magic number, big-endian sizes, C-order bytes).

    Raises:
        DataError: another file, another type than uint8, or a size that differs from the header's.
    """
    data = read_unpacked(path)
    if len(data) < 4 or data[:2] != b"\0\0":
        raise DataError(f"{path}: is not an IDX file", tip="delete it and fetch the data set again")
    kind, axes = data[2], data[3]
    if axes > MOST_AXES:
        raise DataError(f"{path}: its header says {axes} axes", tip="delete it and fetch the data set again")
    if kind != 8:
        raise DataError(f"{path}: holds IDX type 0x{kind:02x}, only uint8 (0x08) is read", tip="convert it to uint8")
    start = 4 + 4 * axes
    shape = struct.unpack(f">{axes}I", data[4:start]) if len(data) >= start else (0,)
    count = int(np.prod(shape, dtype=object))
    if len(data) != start + count:
        raise DataError(
            f"{path}: {len(data)} bytes, but its header asks for {start + count}", tip="delete it and fetch it again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def read_unpacked(path: Path) -> bytes:
    """A file's bytes, unpacked where its name ends in .gz, .bz2 or .xz; nothing is written beside it."""
    try:
        data = path.read_bytes()
        return _unpacked(data, path) if path.suffix in PACKINGS else data
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file", tip="give the path as seen from the current folder") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as exc:
        raise DataError(
            f"{path}: cannot be read: {exc}", tip="check the file; fetch it again if it is cut off"
        ) from exc


def _unpacked(data: bytes, path: Path) -> bytes:
    """What a packed file holds; DataError for far more than text packs to, or than fits into memory."""
    most = min(MOST_UNPACKED, max(2**28, PACKED * len(data)))
    found = io.BytesIO()
    with PACKINGS[path.suffix](io.BytesIO(data)) as file:
        while piece := file.read(2**20):
            found.write(piece)
            if found.tell() > most:
                raise DataError(
                    f"{path}: {len(data):,} bytes that unpack to more than {most:,}",
                    tip=f"if it is meant so, unpack it to a disk and name the file without {path.suffix}",
                )
    return found.getvalue()

"""softcache views: a picture of what the teacher saw of one sample, with what it answered to each view."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from softcache.check.inspect import row_of
from softcache.check.replay import Replay
from softcache.data.identity import pixel_digest
from softcache.errors import ConfigError, DataError
from softcache.files.durable import require_room
from softcache.targets.batch import Targets
from softcache.targets.cache import Cache

CELL = 160  # pixels, at least
SHOWN_CLASSES = 3
LINE = 13


@dataclass(frozen=True)
class Picture:
    """What a picture shows: `shown` of a sample's `views`, of which `same` render as the teacher saw them."""

    path: str
    sample: str
    shown: int
    views: int
    same: int

    def text(self) -> str:
        shown = f"{self.shown} of {self.views} views of {self.sample}"
        return f"{self.path}: {shown}; {self.same} render as the teacher saw them"


@dataclass(frozen=True)
class ShownView:
    """A view as it is drawn.

    Attributes:
        item: as it was rendered.
        as_dumped: whether its pixels are those that the teacher saw.
        lines: what is written below it.
    """

    item: Any
    as_dumped: bool
    lines: list[str]


def draw_views(
    path: Path | str, key: str, out: Path, *, data: str | None = None, allow_code: bool = False, most: int = 24
) -> Picture:
    """Write a PNG of up to `most` views of one sample.

    Args:
        path: the cache.
        key: of the sample.
        data: the transfer set; None: the one that provenance.json names, with `allow_code` only.
        allow_code: believe what the cache names: open that data set, run transforms of its views.

    Raises:
        ConfigError: it is not known which data set to render from, or `out` is no PNG.
        UntrustedError: nobody but the cache says which it was.
        DataError: the sample is not in the data set, or is no image.
    """
    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out}: the picture is a PNG", tip="give a name that ends in .png")
    replay = Replay(path, data, allow_code=allow_code)
    views = shown_views(replay, key, most)
    grid = _grid([_cell(_image(view.item, key), view.lines) for view in views])
    require_room(out.parent, 3 * grid.width * grid.height, "the picture needs")
    grid.save(out)
    cache = replay.cache
    name, same = cache.samples.key(row_of(cache, key)), sum(view.as_dumped for view in views)
    return Picture(str(out), name, len(views), cache.num_views, same)


def shown_views(replay: Replay, key: str, most: int) -> list[ShownView]:
    """The first views of a sample, at most `most`, with what is written below each of them."""
    cache, row = replay.cache, row_of(replay.cache, key)
    count = min(most, cache.num_views)
    targets = cache.gather(np.full(count, row), np.arange(count))
    stored = cache.reader.gather(None, cache.manifest.plan.views.digests[0], targets.rows, targets.views)
    views = []
    for view in range(count):
        rendered = replay.rendered(row, view)
        if rendered is None:
            name = replay.transfer_set.name
            raise DataError(
                f"{name}: has no sample {key!r}, or not the one that its view {view} is mixed with",
                tip="give --data as it was when the cache was made",
            )
        as_dumped = pixel_digest(rendered.item) == int(stored[view])
        title = f"view {view}" + ("" if as_dumped else ": NOT what the teacher saw")
        if rendered.partner_row >= 0:
            title += f", {rendered.share:.2f} of it"
        views.append(ShownView(rendered.item, as_dumped, [title, *_answers(cache, targets, view)]))
    return views


def _answers(cache: Cache, targets: Targets, view: int) -> list[str]:
    """The largest classes of the mean over the members that have some, at T=1; none where none has."""
    members = [member for member in cache.members if member not in targets.outputs]
    if not members:
        return []
    served = all(cache.codecs[member].serves(1.0) for member in members)
    probabilities = sum(
        targets.log_soft_target(member, 1.0 if served else 2.0)[view].double().exp() for member in members
    )
    assert isinstance(probabilities, Tensor)
    best = (probabilities / len(members)).topk(min(SHOWN_CLASSES, cache.num_classes))
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return [f"{100 * share:5.1f} % {cache.class_names[place]}" for share, place in pairs]


def _image(item: Any, key: str) -> Image.Image:
    array = item.permute(1, 2, 0).numpy() if isinstance(item, Tensor) and item.ndim == 3 else item
    drawable = isinstance(array, np.ndarray) and array.dtype == np.uint8 and array.ndim > 1
    if not drawable or array.shape[2:] not in ((), (1,), (3,), (4,)):
        raise DataError(f"sample {key!r} is no image", tip="softcache inspect CACHE --sample KEY shows its soft target")
    array = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
    image = Image.fromarray(array)
    factor = max(1, math.ceil(CELL / max(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _cell(image: Image.Image, lines: list[str]) -> Image.Image:
    """An image with its lines of text below it."""
    font = ImageFont.load_default(size=11)
    width = max(image.width, max(int(font.getlength(line)) + 8 for line in lines))
    cell = Image.new("RGB", (width, image.height + LINE * len(lines) + 6), "white")
    cell.paste(image, (0, 0))
    draw = ImageDraw.Draw(cell)
    for number, line in enumerate(lines):
        draw.text((4, image.height + 2 + LINE * number), line, fill="black", font=font)
    return cell


def _grid(cells: list[Image.Image]) -> Image.Image:
    """Cells side by side, in as square a grid as possible."""
    columns = math.ceil(math.sqrt(len(cells)))
    width, height = max(cell.width for cell in cells) + 8, max(cell.height for cell in cells) + 8
    grid = Image.new("RGB", (columns * width, -(-len(cells) // columns) * height), "white")
    for number, cell in enumerate(cells):
        grid.paste(cell, (number % columns * width + 4, number // columns * height + 4))
    return grid

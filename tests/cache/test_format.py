"""FORMAT.md is the format: a reader made from it alone, its test vectors, its field names, the shape of the files."""

from __future__ import annotations

import binascii
import colorsys
import hashlib
import importlib.util
import inspect
import json
import random
import re
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from math import ceil, cos, exp, floor, isqrt, log, pi, radians, sin, sqrt
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import WORLDS

import softcache
from softcache import dump
from softcache.cache.canonical import canonical_json
from softcache.cache.plan import CLASS_OUTPUTS, Plan
from softcache.cache.reader import CacheReader
from softcache.cache.samples import build_table, pack_labels, seeded_order
from softcache.codecs import CODECS, make_codec
from softcache.codecs.features import FeatureCodec
from softcache.codecs.fidelity import round_up_to_half
from softcache.codecs.packing import pack
from softcache.codecs.packing import unpack as unpack_numbers
from softcache.config import DumpConfig
from softcache.data.classes import Match
from softcache.data.identity import file_digest, item_digest, pixel_digest, sample_id
from softcache.data.philox import Draws, philox, step_key
from softcache.data.views import STEPS, Policy, make_step
from softcache.dump.teacher import Teacher
from softcache.errors import TeacherError
from softcache.features.spec import REDUCTIONS, FeatureSpec

FORMAT = (Path(softcache.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")
VECTORS = {name: json.loads(body) for name, body in re.findall(r"^```json ([\w-]+)\n(.*?)^```$", FORMAT, re.M | re.S)}
COUNT, VIEWS, PADDING, BATCH = 300, 4, 2, 100


def section(number: int) -> str:
    """The text of one numbered section of FORMAT.md."""
    found = re.search(rf"^## {number}\. .*?(?=^## |\Z)", FORMAT, re.M | re.S)
    assert found is not None
    return found[0]


def first_cells(text: str) -> list[str]:
    """The names in the first column of its tables."""
    return re.findall(r"^\| `([^`]+)` \|", text, re.M)


# --- a stranger's reader: nothing below this line up to the next one may know softcache


class StrangersReader:
    """Logits, soft targets and features by (member, key, view), read from a cache as FORMAT.md says."""

    def __init__(self, folder, id=None):
        with open(f"{folder}/{f'manifests/{id}.json' if id else 'manifest.json'}", "rb") as file:
            data = file.read()
        self.folder, self.id, self.manifest = folder, hashlib.sha256(data).hexdigest(), json.loads(data)
        if self.manifest["format"] != 1:
            raise ValueError(f"format {self.manifest['format']} is not 1")
        self.files = {entry["path"]: entry for entry in self.manifest["files"]}
        self.members = {member["name"]: member for member in self.manifest["members"]}
        self.opened = {}
        samples = self.open("samples.h5")
        self.row = {int(number): row for row, number in enumerate(samples["ids"])}
        blob, at = samples["key_bytes"].tobytes(), samples["key_offsets"].tolist()
        self.keys = [blob[at[row] : at[row + 1]].decode("utf-8") for row in range(len(self.row))]

    def open(self, path):
        if path not in self.opened:
            with open(f"{self.folder}/{path}", "rb") as file:
                if hashlib.sha256(file.read()).hexdigest() != self.files[path]["sha256"]:
                    raise ValueError(f"{path} is damaged")
            with h5py.File(f"{self.folder}/{path}", "r") as file:
                self.opened[path] = {name: file[name][...] for name in file if not name.endswith("_crc32")}
        return self.opened[path]

    def record(self, key, view, member=None):
        """Everything that is stored for one view, of a member or (None) of the view itself; its part."""
        row = self.row[int.from_bytes(hashlib.blake2b(key.encode("utf-8"), digest_size=8).digest(), "little")]
        for one in self.manifest["rounds"]:
            cut = one["layout"]
            at = view - cut["first_view"]
            if 0 <= at < cut["num_views"] and (member in one["members"] if member else one["new_views"]):
                ranges = -(-cut["num_views"] // cut["shard_views"])
                part = cut["first_part"] + row // cut["shard_rows"] * ranges + at // cut["shard_views"]
                found = self.open(f"{f'members/{member}' if member else 'views'}/part-{part:05d}.h5")
                place = (at % cut["shard_views"], row % cut["shard_rows"])
                return {name: values[place] for name, values in found.items()}, part
        raise KeyError((member, view))

    def logits(self, member, key, view):
        """(logits, eps); of topk (head's ids, their logits, tails)."""
        found, part = self.record(key, view, member)
        codec, path = self.members[member]["codec"], f"members/{member}/constants.h5"
        found |= fields(found.get("records"), codec["fields"])
        if found.get("dense"):
            row = self.open(f"members/{member}/dense-{part:05d}.h5")["logits"][found["dense"] - 1]
            return row.astype(np.float32) + found["level"], found["eps"]
        constants = self.open(path) if path in self.files else {}
        row = decode(codec["name"], codec["parameters"], len(self.manifest["class_names"]), found, constants)
        return row if codec["name"] == "topk" else (row, found["eps"])

    def feature(self, member, name, key, view):
        """(the feature as its name says, its relative error)."""
        (info,) = (feature for feature in self.members[member]["features"] if feature["name"] == name)
        found, reduction = self.record(key, view, member)[0], name.rpartition(":")[2]
        values = found[info["arrays"][0]].astype(np.float32)
        if len(info["arrays"]) > 1:
            step, offset = found[info["arrays"][1]]
            values = values * step + offset
        return restore(reduction, info["stored"], info["shapes"], values), found[info["arrays"][0] + "_error"]


def fields(record, table):
    """The parts of one record of `records`."""
    sizes = [np.dtype(part["dtype"]).itemsize * int(np.prod(part["shape"])) for part in table]
    return {
        part["name"]: record[part["offset"] : part["offset"] + size].view(part["dtype"]).reshape(part["shape"])[()]
        for part, size in zip(table, sizes, strict=True)
    }


def unpack(data, count, bits):
    """`count` numbers of `bits` bits."""
    return np.unpackbits(data, bitorder="little")[: count * bits].reshape(count, bits) @ (1 << np.arange(bits))


def decode(name, parameters, classes, found, constants):
    """One row of logits, float32; of topk (ids, logits, tails)."""
    kept, id_bits = min(int(parameters.get("k", 1)), classes), max(1, (classes - 1).bit_length())
    if name in ("float32", "float16"):
        return found["logits"].astype(np.float32)
    if name == "topk":
        below = (unpack(found["below"], kept - 1, 13) * 4).astype(np.uint16).view(np.float16).astype(np.float32)
        return unpack(found["ids"], kept, id_bits), np.append(np.float32(0), -below), found["tails"]
    if name == "lowrank":
        return lowrank(found, **constants)
    if name == "linear_head" and parameters["dtype"] == "float16":
        return constants["codec_weight"] @ found["head_input"].astype(np.float32) + constants["codec_bias"]
    codes = unpack(found["codes"], classes, int(parameters["bits"])) if name == "headtail" else found["codes"]
    row = codes.astype(np.float32) * found["step"] + found["lowest"]
    if name == "headtail":
        below = np.append(np.float16(0), found["below"]).astype(np.float32)
        row[unpack(found["ids"], kept, id_bits)] = found["largest"] - below
    return constants["codec_weight"] @ row + constants["codec_bias"] if name == "linear_head" else row


def lowrank(found, codec_mean, codec_basis, codec_step, codec_bits, **others):
    widths, pieces, at = [int(bits) for bits in codec_bits], [], 0
    for width in [min(bits, 8) for bits in widths] + [bits - 8 for bits in widths if bits > 8]:
        pieces.append(unpack(found["codes"][at : at + width], 8, width))
        at += width
    for group, upper in enumerate(pieces[len(widths) :]):
        pieces[group] = pieces[group] + 256 * upper
    numbers = np.concatenate(pieces[: len(widths)]) + 0.5 - 2.0 ** (np.repeat(widths, 8) - 1)
    matrix = codec_basis.astype(np.float32) * codec_step
    return codec_mean + matrix @ numbers.astype(np.float32) + found["level"]


def log_target(ids, logits, tails, classes, temperature):
    """What topk stores of a soft target: log-probabilities, float64."""
    head, others = logits.astype(np.float64) / temperature, classes - len(ids)
    rest = np.log(others) - between(tails, 1 / temperature) if others else -np.inf
    total = np.logaddexp(rest, np.log(np.exp(head).sum()))
    row = np.full(classes, rest - total - np.log(max(1, others)))
    row[ids] = head - total
    return row


def between(tails, b):
    nodes, values = [0, 1 / 8, 1 / 4, 1 / 2, 1], np.append(0.0, tails[::-1])
    if b in nodes:
        return values[nodes.index(b)]
    right = next(i for i, node in enumerate(nodes) if node > b)

    def line(i):  # through nodes i and i + 1
        return values[i] + (values[i + 1] - values[i]) * (b - nodes[i]) / (nodes[i + 1] - nodes[i])

    found = sum(v * np.prod([(b - o) / (n - o) for o in nodes if o != n]) for n, v in zip(nodes, values, strict=True))
    lines = [line(i) for i in (right - 2, right) if 0 <= i < 4]
    return max(min(found, *lines), line(right - 1))


def restore(reduction, stored, shapes, values):
    """A feature from its stored form."""
    if stored == "map":
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
        maps = np.split(values.ravel(), ends[:-1])
        return REDUCE[reduction](*(one.reshape(shape) for one, shape in zip(maps, shapes, strict=True)))
    if reduction == "sign":
        return unpack(values.astype(np.uint8), int(np.prod(shapes[0])), 1).reshape(shapes[0])
    if reduction in ("gram", "spatial_gram"):
        size = shapes[0][0] if reduction == "gram" else int(np.prod(shapes[0][1:]))
        square = np.zeros((size, size), np.float32)
        square[np.triu_indices(size)] = values
        return square + np.triu(square, 1).T
    return values


def flat(x):
    return x.reshape(len(x), -1).astype(np.float64)


def spatial_gram(x):
    rows = flat(x) / np.maximum(np.linalg.norm(flat(x), axis=1, keepdims=True), 1e-12)
    return rows.T @ rows / len(x)


def max_pooled(x, *sizes):
    for axis, size in enumerate(sizes, start=1):
        n = x.shape[axis]
        cells = [x.take(range(i * n // size, -(-(i + 1) * n // size)), axis).max(axis) for i in range(size)]
        x = np.stack(cells, axis)
    return x


def fsp(x, y):
    sizes = np.minimum(x.shape[1:], y.shape[1:])
    return flat(max_pooled(x, *sizes)) @ flat(max_pooled(y, *sizes)).T / np.prod(sizes)


REDUCE = {
    "map": lambda x: x,
    "flatten": np.ravel,
    "pool": lambda x: flat(x).mean(1),
    "cls": lambda x: x[0],
    "mean_tokens": lambda x: x.mean(0),
    "attention": lambda x: (x**2).mean(0),
    "gram": lambda x: flat(x) @ flat(x).T / flat(x).shape[1],
    "spatial_gram": spatial_gram,
    "fsp": fsp,
    "sign": lambda x: (x > 0) * 1,
}


# --- a stranger's renderer: likewise


def words(counter, key):
    """The four words of one block: NumPy's own Philox, whose counter is one behind."""
    start = sum(word << 64 * place for place, word in enumerate(counter)) - 1
    return [int(w) for w in np.random.Philox(counter=start % 2**256, key=key[0] | key[1] << 64).random_raw(4)]


def hash_word(text):
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def uniform(word):
    return (word >> 11) * 2.0**-53


def integer(low, high, word):
    return low + word * (high - low + 1) // 2**64


def rounded(x):
    return floor(x + 0.5)


class Stream:
    """The draws of one step, `name#occurrence`."""

    def __init__(self, seed, step, key, view):
        self.words = (
            word
            for block in range(100)
            for word in words((hash_word(key), view, block, 0), (int(seed) % 2**64, hash_word(step)))
        )

    def uniform(self):
        return uniform(next(self.words))

    def integer(self, low, high):
        return integer(low, high, next(self.words))


def window(image, dy, dx):
    height, width = image.shape[:2]
    out = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            if 0 <= y + dy < height and 0 <= x + dx < width:
                out[y, x] = image[y + dy, x + dx]
    return out


def crop_flip(image, seed, key, view, padding, flip, occurrence=0):
    draws = Stream(seed, f"crop_flip#{occurrence}", key, view)
    out = window(image, draws.integer(-padding, padding), draws.integer(-padding, padding))
    return out[:, ::-1] if draws.uniform() < flip else out


def shift(image, seed, key, view, pixels):
    draws = Stream(seed, "shift#0", key, view)
    return window(image, draws.integer(-pixels, pixels), draws.integer(-pixels, pixels))


def center_crop(image, size):
    for axis in (0, 1):
        missing = max(0, size - image.shape[axis])
        pad = [(0, 0)] * image.ndim
        pad[axis] = (missing // 2, missing - missing // 2)
        image = np.pad(image, pad)
        start = round((image.shape[axis] - size) / 2)  # Python's round: ties to even
        image = np.take(image, range(start, start + size), axis=axis)
    return image


def resample(image, axis, size):
    """One axis by the triangle filter, in float64."""
    count = image.shape[axis]
    scale = count / size
    reach = max(scale, 1.0)
    weights = np.zeros((size, count))
    for i in range(size):
        center = (i + 0.5) * scale
        for j in range(max(0, floor(center - reach + 0.5)), min(count, floor(center + reach + 0.5))):
            weights[i, j] = max(0.0, 1 - abs(j + 0.5 - center) / reach)
    weights /= weights.sum(axis=1, keepdims=True)
    return np.moveaxis(np.tensordot(weights, image.astype(np.float64), (1, axis)), 0, axis)


def resize(image, height, width):
    if image.shape[:2] == (height, width):
        return image
    return resample(resample(image, 1, width), 0, height)


def draw_box(draws, a, scale_min, scale_max, low, high):
    """(top, left, height, width) in 1/65536, or None."""
    for _ in range(10):
        s = scale_min + (scale_max - scale_min) * draws.uniform()
        r = low * (high / low) ** draws.uniform()
        w, h = rounded(65536 * sqrt(s * r / a)), rounded(65536 * sqrt(s / r * a))
        if w <= 65536 and h <= 65536:
            return [draws.integer(0, 65536 - h), draws.integer(0, 65536 - w), h, w]
    return None


def middle_box(a):
    r = min(max(a, 3 / 4), 4 / 3)
    w, h = rounded(65536 * min(1, r / a)), rounded(65536 * min(1, a / r))
    return [(65536 - h) // 2, (65536 - w) // 2, h, w]


def borders(start, length, n):
    first, last = (start * n + 32768) // 65536, ((start + length) * n + 32768) // 65536
    return [first, last] if first < last else [min(start * n // 65536, n - 1), min(start * n // 65536, n - 1) + 1]


def sampled(image, ys, xs):
    """Bilinear, zeros outside, not rounded."""
    height, width = image.shape[:2]
    out = np.zeros(image.shape)
    for dy in (0, 1):
        for dx in (0, 1):
            y, x = np.floor(ys).astype(int) + dy, np.floor(xs).astype(int) + dx
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            weight = (1 - abs(ys - y)) * (1 - abs(xs - x))
            out[inside] += weight[inside][:, None] * image[y[inside], x[inside]]
    return out


def rotated(image, d):
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    cy, cx, d = (image.shape[0] - 1) / 2, (image.shape[1] - 1) / 2, radians(d)
    ys = cy + sin(d) * (x - cx) + cos(d) * (y - cy)
    return sampled(image, ys, cx + cos(d) * (x - cx) - sin(d) * (y - cy))


def sheared(image, along_y, along_x):
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    return sampled(image, y + along_y * (x + 0.5), x + along_x * (y + 0.5))


def blend(image, other, f):
    return np.clip(f * image + (1 - f) * other, 0, 255)


def grey(image):
    return image if image.shape[2] == 1 else np.floor(image @ [0.2989, 0.587, 0.114] + 1e-6)[:, :, None]


def hue(image, h):
    out = np.zeros(image.shape)
    for place in np.ndindex(image.shape[:2] if image.shape[2] == 3 else 0):
        h0, s, v = colorsys.rgb_to_hsv(*image[place] / 255)
        out[place] = np.array(colorsys.hsv_to_rgb((h0 + h) % 1, s, v)) * 255.999
    return out if image.shape[2] == 3 else image


def smooth(image):
    out = image.astype(np.float64)
    for y in range(1, image.shape[0] - 1):
        for x in range(1, image.shape[1] - 1):
            around = image[y - 1 : y + 2, x - 1 : x + 2].astype(np.float64).sum((0, 1))
            out[y, x] = np.rint((around + 4.0 * image[y, x]) / 13)
    return out


def stretched(image):
    lo, hi = image.min((0, 1)).astype(np.float64), image.max((0, 1)).astype(np.float64)
    return np.where(hi > lo, (image - lo) * 255 / np.maximum(hi - lo, 1), image)


def equalised(image):
    out = image.copy()
    for channel in range(image.shape[2]):
        x = image[:, :, channel]
        e = (x.size - (x == x.max()).sum()) // 255
        if e:
            out[:, :, channel] = [[min(255, ((x < v).sum() + e // 2) // e) for v in row] for row in x]
    return out


COLOURS = [
    lambda x, f: blend(x, 0, f),
    lambda x, f: blend(x, grey(x).mean(), f),
    lambda x, f: blend(x, grey(x), f),
    hue,
]


def randaugmented(x, operation, s, m):
    """Not rounded."""
    f, height, width = 1 + 0.9 * s * m, *x.shape[:2]
    return [
        lambda: x,
        lambda: sheared(x, 0, 0.3 * s * m),
        lambda: sheared(x, 0.3 * s * m, 0),
        lambda: window(x, 0, -s * floor(150 / 331 * width * m)),
        lambda: window(x, -s * floor(150 / 331 * height * m), 0),
        lambda: rotated(x, 30 * s * m),
        lambda: COLOURS[0](x, f),
        lambda: COLOURS[2](x, f),
        lambda: COLOURS[1](x, f),
        lambda: blend(x, smooth(x), f) if min(height, width) > 2 else x,
        lambda: x >> rounded(4 * m) << rounded(4 * m),
        lambda: np.where(x >= 255 * (1 - m), 255 - x, x),
        lambda: stretched(x),
        lambda: equalised(x),
    ][operation]()


def beta(alpha, draws):
    if alpha > 0.5:
        u, v = draws.uniform(), draws.uniform()
        return 0.5 + 0.5 * sqrt(1 - (1 - u) ** (2 / (2 * alpha - 1))) * cos(2 * pi * v)
    while True:
        x, y = log(1 - draws.uniform()) / alpha, log(1 - draws.uniform()) / alpha
        if exp(x) + exp(y) <= 1:
            return 1 / (1 + exp(min(y - x, 700)))


def clipped(middle, side, n):
    first = middle - side // 2
    return [(min(max(end, 0), 65536) * n + 32768) // 65536 for end in (first, first + side)]


def canonical_item(item):
    def headed(*parts):
        return b"".join(struct.pack("<Q", len(part)) + part for part in parts)

    if isinstance(item, str):
        return headed(b"str", item.encode("utf-8"))
    if isinstance(item, dict):
        inner = [headed(key.encode("utf-8")) + canonical_item(item[key]) for key in sorted(item)]
        return headed(b"mapping", str(len(item)).encode()) + b"".join(inner)
    if isinstance(item, list):
        return headed(b"sequence", str(len(item)).encode()) + b"".join(map(canonical_item, item))
    if isinstance(item, bool):
        return headed(b"array", b"|b1", b"") + struct.pack("?", item)
    if isinstance(item, int):
        return headed(b"array", b"<i8", b"") + struct.pack("<q", item)
    if isinstance(item, float):
        return headed(b"array", b"<f8", b"") + struct.pack("<d", item)
    shape = ",".join(str(n) for n in item.shape).encode()
    name = {"uint8": b"|u1", "float32": b"<f4"}[item.dtype.name]
    return headed(b"array", name, shape) + b"".join(element.tobytes() for element in item.flat)


# --- from here on softcache may be known again

FEATURES = (
    "conv1:gram,conv2:map,conv2:pool,conv2:spatial_gram,conv1+conv2:fsp,point1+point2:fsp,tokens:cls,"
    "tokens:mean_tokens,conv2:attention,conv1:sign,body:flatten,point1:spatial_gram"
)
# member -> (codec, features, their dtype): each comes in a round of its own
MEMBERS = {
    "plain": ("float16", FEATURES, "float16"),
    "exact": ("float32", "", "float16"),
    "bytes": ("int8", "conv1:map,conv1:sign,conv1:attention", "int8"),
    "head": ("headtail:k=5,bits=6", "", "float16"),
    "few": ("topk:k=6", "", "float16"),
    "low": ("lowrank:max_kl=3e-4,at_temperature=2", "", "float16"),
    "input": ("linear_head", "body:map", "float16"),
    "narrow": ("linear_head:dtype=int8", "", "float16"),
}
PROMISED = "bytes"  # with a promise at T=3
ODD = "low"  # some of its rows do not lie in the basis of the others, and are kept dense
SUMMED_AT_WILL = ("lowrank", "linear_head")  # codecs whose sums may be taken in any order


@pytest.fixture(scope="module")
def wide() -> Path:
    """A user's file: colour images, and networks of 101 classes."""
    return WORLDS / "wide.py"


def teacher_of(wide: Path, member: str) -> str:
    odd = "&odd=true" if member == ODD else ""
    return f"{wide}:net?seed={list(MEMBERS).index(member)}&name={member}{odd}"


@pytest.fixture(scope="module")
def settings(toy: Path) -> DumpConfig:
    """Two members, three views."""
    teachers = (f"{toy}:exact?seed=1&name=first", f"{toy}:network?seed=2&name=second")
    config = DumpConfig(data=f"{toy}:images?count=40", teacher=teachers, out="later", policy=("crop_flip",), views=3)
    return replace(config, threads=1, workers=0, device="cpu")


@pytest.fixture(scope="module")
def ids() -> list[str]:
    """Of all manifests of the cache, filled by the fixture `cache`."""
    return []


@pytest.fixture(scope="module")
def cache(wide: Path, tmp_path_factory: pytest.TempPathFactory, ids: list[str]) -> Path:
    """Nine rounds: a member of each codec, and a fourth view of them all. 2 row ranges; the first has 2 view ranges."""
    path = tmp_path_factory.mktemp("format") / "cache"
    base = DumpConfig(data=f"{wide}:images?count={COUNT}", teacher=(), out=str(path), batch_size=BATCH)
    base = replace(base, shard_rows=256, threads=1, workers=0, device="cpu")
    for member, (codec, features, dtype) in MEMBERS.items():
        first = member == "plain"
        config = replace(base, teacher=(teacher_of(wide, member),), codec=codec, feature_dtype=dtype, extend=not first)
        config = replace(config, features=(features,) if features else ())
        if member == PROMISED:
            config = replace(config, max_kl=1.0, at_temperature=3.0)
        if first:
            config = replace(config, policy=(f"crop_flip:padding={PADDING}",), view_seed=5, views=VIEWS - 1)
        with pytest.MonkeyPatch.context() as patch:
            if first:
                patch.setattr("softcache.cache.schema.MAX_SHARD_BYTES", 2 * 256 * 700)  # two views of its records fit
            ids.append(dump.run(config, quiet=True).manifest.id)
    more = replace(base, extend=True, views=VIEWS, teacher=tuple(teacher_of(wide, m) for m in reversed(MEMBERS)))
    ids.append(dump.run(more, quiet=True).manifest.id)
    return path


@pytest.fixture(scope="module")
def user(wide: Path) -> ModuleType:
    """The user's file as a module of its own: its data set and teachers without softcache."""
    spec = importlib.util.spec_from_file_location("live_wide", wide)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def strangers_code() -> tuple[dict[str, Any], str]:
    """The reader, run where nothing but h5py, json, NumPy and hashlib can be named; and its source."""
    source = Path(__file__).read_text(encoding="utf-8").split("\n# --- a stranger's ")[1].split("\n", 2)[2]
    names: dict[str, Any] = {"h5py": h5py, "json": json, "np": np, "hashlib": hashlib}
    exec(source, names)
    return names, source


@pytest.fixture(scope="module")
def reader(cache: Path) -> Any:
    """A stranger's reader of the newest manifest."""
    return strangers_code()[0]["StrangersReader"](cache)


class Live:
    """What the teachers give for the views as a stranger renders them: (member, view) -> logits and module outputs."""

    def __init__(self, user: ModuleType) -> None:
        self.user, self.images = user, user.images(COUNT)
        self.keys = self.images.sample_keys
        self.known: dict[Any, Any] = {}

    def rendered(self, view: int) -> list[np.ndarray]:
        if view not in self.known:
            self.known[view] = [
                np.ascontiguousarray(crop_flip(self.images[i][0], 5, key, view, PADDING, 0.5))
                for i, key in enumerate(self.keys)
            ]
        return self.known[view]

    def outputs(self, member: str, view: int) -> dict[str, np.ndarray]:
        if (member, view) not in self.known:
            net, seen = self.user.net(101, seed=list(MEMBERS).index(member), odd=member == ODD), {}
            for name, module in net.named_modules():
                module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out.clone().numpy()}))
            with torch.inference_mode():
                net(net.collate(self.rendered(view)))
            self.known[member, view] = seen
        return self.known[member, view]

    def logits(self, member: str, view: int) -> np.ndarray:
        return self.outputs(member, view)[""]


@pytest.fixture(scope="module")
def live(user: ModuleType) -> Live:
    return Live(user)


def log_softmax(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    rows = rows - rows.max(axis=-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))


def test_the_strangers_reader_is_short_and_knows_only_what_it_may() -> None:
    names, source = strangers_code()
    assert "softcache" not in source
    assert len(source.splitlines()) <= 190
    assert set(names["REDUCE"]) == set(REDUCTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("member", [member for member in MEMBERS if member != "few"])
def test_the_reader_gives_the_live_teachers_logits(reader: Any, live: Live, member: str) -> None:
    assert sorted(reader.keys) == live.keys
    assert reader.keys != live.keys  # rows are permuted, so a join by position would show
    for view in range(VIEWS):
        rows = live.logits(member, view)
        found = [reader.logits(member, key, view) for key in live.keys]
        stored, eps = np.stack([row for row, _ in found]), np.array([bound for _, bound in found], np.float64)
        assert stored.dtype == np.float32
        # the last bits of live logits depend on the batch
        assert (np.abs(stored - rows).max(axis=1) <= eps + 1e-5 * np.abs(rows).max()).all()
        wrong = np.abs(stored - np.roll(rows, 1, axis=0)).max(axis=1)
        assert (wrong > 2 * eps).all()  # so the row of another sample does not fit within eps


@pytest.mark.slow
def test_the_reader_gives_topk_targets_of_the_live_teacher(reader: Any, live: Live) -> None:
    for view in range(VIEWS):
        for row, key in zip(live.logits("few", view), live.keys, strict=True):
            ids, logits, tails = reader.logits("few", key, view)
            best = np.argsort(-row, kind="stable")[: len(ids)]
            assert set(ids) == set(best) or np.abs(np.sort(row[ids]) - np.sort(row[best])).max() < 1e-5
            below = row.max() - row[ids]
            assert np.abs(logits + below).max() <= 2.5 * 2.0**-10 * below.max() + 1e-5
            for temperature in (1, 2, 4, 8):
                target = log_target(ids, logits, tails, 101, temperature)
                exact = log_softmax(row / temperature)
                assert abs(np.exp(target[ids]).sum() - np.exp(exact[ids]).sum()) < 2e-3
                assert np.exp(target).sum() == pytest.approx(1, abs=1e-9)


@pytest.mark.slow
def test_the_reader_finds_what_softcache_finds(reader: Any, cache: Path) -> None:
    opened = softcache.open(cache)
    assert reader.id == opened.id
    draw = np.random.default_rng(0)
    rows, views = draw.integers(0, COUNT, 120), draw.integers(0, VIEWS, 120)
    targets = opened.gather(rows, views)
    for member in opened.members:
        found = [reader.logits(member, reader.keys[row], view) for row, view in zip(rows, views, strict=True)]
        if not opened.codecs[member].complete:
            for temperature in (1, 1.3, 2, 3, 4, 5.5, 8):
                own = np.stack([log_target(*one, 101, temperature) for one in found])
                np.testing.assert_allclose(targets.log_probs(member, temperature), own, atol=3e-6)
            continue
        stored, ours = np.stack([row for row, _ in found]), targets.logits(member).numpy()
        if opened.codecs[member].name in SUMMED_AT_WILL:
            np.testing.assert_allclose(stored, ours, rtol=0, atol=1e-6 * np.abs(ours).max())
        else:
            np.testing.assert_array_equal(stored, ours)
        np.testing.assert_array_equal([bound for _, bound in found], opened.eps(member, rows, views))


@pytest.mark.slow
@pytest.mark.parametrize("member", ["low", "input", "narrow"])
def test_eps_counts_other_orders_of_summation(reader: Any, live: Live, member: str) -> None:
    classes, constants = 101, reader.open(f"members/{member}/constants.h5")
    dark = range(7, COUNT, 60)
    for i in sorted({*range(0, COUNT, 5), *dark}):
        row, eps = reader.logits(member, live.keys[i], 1)
        found = reader.record(live.keys[i], 1, member)[0]
        found |= fields(found.get("records"), reader.members[member]["codec"]["fields"])
        own = np.abs(row.astype(np.float64) - live.logits(member, 1)[i]).max()
        if member == "low":
            matrix, offset = constants["codec_basis"].astype(float) * constants["codec_step"], constants["codec_mean"]
            numbers_ = np.linalg.lstsq(matrix, row.astype(float) - offset - found["level"], rcond=None)[0]
        else:
            matrix, offset = constants["codec_weight"].astype(float), constants["codec_bias"]
            coded = "records" in found
            numbers_ = found["codes"] * found["step"] + found["lowest"] if coded else found["head_input"].astype(float)
        n = matrix.shape[1] + 2
        g = n * 2.0**-24 / (1 - n * 2.0**-24)
        bound = 2 * g / (1 - g) * (np.abs(matrix) @ np.abs(numbers_) + np.abs(offset)).max() + 2 * n * 2.0**-149
        bound += 2.0**-23 * (bound + np.abs(row).max()) if member == "low" else 0
        if member == "low" and found["dense"]:
            bound = 0.0
        assert matrix.shape[0] == classes
        # float16 keeps 11 bits, and live logits are those of another batch
        slack = 1e-6 * max(1.0, np.abs(row).max() / 10)
        assert (own + bound) * (1 - 1e-3) - 4 * slack <= float(eps) <= (own + bound) * (1 + 2e-3) + 4 * slack


@pytest.mark.slow
def test_dense_rows_are_among_those_read(reader: Any) -> None:
    dense = [sum(int(reader.record(key, view, "low")[0]["records"][4:8].view("<u4")[0]) > 0 for key in reader.keys)
             for view in range(VIEWS)]  # fmt: skip
    entries = [entry for entry in reader.manifest["files"] if entry["kind"] == "dense"]
    assert sum(entry["arrays"]["logits"]["shape"][0] for entry in entries) == sum(dense)
    assert {tuple(entry["views"]) for entry in entries} >= {(0, 3)}
    assert 0 < sum(dense) < COUNT


@pytest.mark.slow
def test_older_manifests_show_the_cache_as_it_was(reader: Any, cache: Path, ids: list[str]) -> None:
    kind = strangers_code()[0]["StrangersReader"]
    assert {path.stem for path in (cache / "manifests").iterdir()} == set(ids)
    assert reader.id == ids[-1]
    for number, one in enumerate(ids[:-1]):
        older = kind(cache, one)
        assert (older.id, older.manifest["views"]["count"]) == (one, VIEWS - 1)
        assert list(older.members) == list(MEMBERS)[: number + 1]
        assert older.manifest["files"] == reader.manifest["files"][: len(older.manifest["files"])]
        assert older.manifest["rounds"] == reader.manifest["rounds"][: number + 1]
        newest = list(older.members)[-1]
        for view in range(VIEWS - 1):
            then, now = (r.logits(newest, "wide/0007", view) for r in (older, reader))
            np.testing.assert_array_equal(then[0], now[0])
        with pytest.raises(KeyError):
            older.logits(newest, "wide/0007", VIEWS - 1)


@pytest.mark.slow
@pytest.mark.parametrize("member", [member for member, (_, features, _) in MEMBERS.items() if features])
def test_features_are_the_live_modules_outputs(reader: Any, cache: Path, live: Live, member: str) -> None:
    opened = softcache.open(cache)
    for info in reader.members[member]["features"]:
        layers, _, reduction = info["name"].rpartition(":")
        spec = FeatureSpec(tuple(layers.split("+")), reduction)
        outputs = live.outputs(member, VIEWS - 1)
        assert info["shapes"] == [list(outputs[layer].shape[1:]) for layer in spec.layers]
        for i in range(0, COUNT, 7):
            own = np.asarray(REDUCE[reduction](*(outputs[layer][i] for layer in spec.layers)), np.float64)
            found, error = reader.feature(member, info["name"], live.keys[i], VIEWS - 1)
            assert found.shape == own.shape
            if reduction in ("gram", "spatial_gram") and info["stored"] != "map":
                own, found = np.triu(own), np.triu(found)
            # what is made of a stored map has an error of its own: twice the map's for products of two
            allowed = (3 if info["stored"] != reduction else 1) * float(error)
            assert np.linalg.norm(found - own) <= (allowed + 2e-5) * np.linalg.norm(own)
            assert float(error) < (0.02 if info["dtype"] == "int8" else 2.0**-10)
        rows = np.arange(0, COUNT, 9)
        views = rows % VIEWS
        ours = opened.gather(rows, views, members=[member], features=[info["name"]]).feature(info["name"], member)
        own = np.stack(
            [reader.feature(member, info["name"], reader.keys[r], v)[0] for r, v in zip(rows, views, strict=True)]
        )
        np.testing.assert_allclose(ours, own, rtol=0, atol=1e-6 * max(1.0, np.abs(own).max()))


@pytest.mark.slow
def test_features_of_every_stored_form_are_in_the_cache(reader: Any) -> None:
    features = [info for member in reader.members.values() for info in member["features"]]
    assert {info["name"].rpartition(":")[2] for info in features} == set(REDUCTIONS)
    assert {(info["stored"] == "map", info["name"].endswith(":map")) for info in features} == {
        (True, True), (True, False), (False, False)}  # fmt: skip


@pytest.mark.slow
def test_constants_are_the_live_heads(reader: Any, user: ModuleType) -> None:
    for member, prefix in (("plain", "head_"), ("bytes", "head_"), ("input", "codec_"), ("narrow", "codec_")):
        head = user.net(101, seed=list(MEMBERS).index(member)).head
        found = reader.open(f"members/{member}/constants.h5")
        assert set(found) == {f"{prefix}weight", f"{prefix}bias"}
        np.testing.assert_array_equal(found[f"{prefix}weight"], head.weight.detach())
        np.testing.assert_array_equal(found[f"{prefix}bias"], head.bias.detach())
    kept = {path.split("/")[1] for path, entry in reader.files.items() if entry["kind"] == "constants"}
    assert kept == {"plain", "bytes", "low", "input", "narrow"}


@pytest.mark.slow
def test_pixel_digests_are_those_of_views_rendered_without_softcache(reader: Any, live: Live) -> None:
    for view in range(VIEWS):
        for i in range(view % 2, COUNT, 2):
            digest = hashlib.blake2b(canonical_item(live.rendered(view)[i]), digest_size=4).digest()
            found = reader.record(live.keys[i], view)[0]["pixel_digests"]
            assert found == int.from_bytes(digest, "little")


@pytest.mark.slow
def test_the_probe_holds_pixels_of_the_first_rounds_views(reader: Any, live: Live) -> None:
    probe = reader.open("probe.h5")
    count = min(64, COUNT * (VIEWS - 1))
    assert probe["rows"].tolist() == [i * COUNT // count for i in range(count)]
    assert probe["views"].tolist() == [i % (VIEWS - 1) for i in range(count)]
    at = 0
    for row, view, shape in zip(probe["rows"], probe["views"], probe["shapes"], strict=True):
        pixels = live.rendered(int(view))[live.keys.index(reader.keys[row])]
        assert shape.tolist() == list(pixels.shape)
        assert probe["pixels"][at : at + pixels.size].tobytes() == pixels.tobytes()
        at += pixels.size
    assert at == len(probe["pixels"])


def test_a_probe_of_grey_items_has_an_axis_of_0_and_texts_have_none(quick_dump: Any, tmp_path: Path) -> None:
    (file,) = quick_dump().reader.manifest.files_of("probe")
    with h5py.File(tmp_path / "cache" / file.path, "r") as opened:
        assert opened["shapes"][...].tolist() == [[8, 8, 0]] * 40
    words_ = WORLDS / "short_texts.py"
    texts = quick_dump(data=f"{words_}:data", teacher=[f"{words_}:model"], out="texts")
    assert list(texts.reader.manifest.files_of("probe")) == []


@pytest.mark.slow
def test_labels_digests_and_fingerprint_of_the_samples(reader: Any, live: Live) -> None:
    samples, info = reader.open("samples.h5"), reader.manifest["samples"]
    place = {key: i for i, key in enumerate(live.keys)}
    for row, key in enumerate(reader.keys):
        image, label = live.images[place[key]]
        assert samples["labels"][row] == label
        assert samples["digests"][row].tobytes() == hashlib.blake2b(canonical_item(image), digest_size=16).digest()
    order = sorted(range(COUNT), key=lambda row: int(samples["ids"][row]))
    joined = b"".join(samples[name][order].tobytes() for name in ("ids", "labels", "digests"))
    assert info["fingerprint"] == hashlib.sha256(joined).hexdigest()
    assert (info["count"], info["digest_kind"], info["has_keys"], info["multi_label"]) == (COUNT, "item", True, False)


@pytest.mark.slow
@pytest.mark.parametrize("member", ["bytes", "few", "low"])
def test_statistics_are_of_the_records_of_their_file(reader: Any, live: Live, member: str) -> None:
    labels = reader.open("samples.h5")["labels"]
    place = {key: i for i, key in enumerate(live.keys)}
    checked = 0
    for entry in reader.manifest["files"]:
        if (entry["kind"], entry.get("member")) != ("member", member):
            continue
        found, checked = entry["statistics"], checked + 1
        rows = list(range(*entry["rows"]))
        pairs = [(view, row) for view in range(*entry["views"]) for row in rows]
        given = np.stack([live.logits(member, view)[place[reader.keys[row]]] for view, row in pairs])
        truth = np.array([labels[row] for _, row in pairs])
        stored = [reader.logits(member, reader.keys[row], view) for view, row in pairs]
        log_p = log_softmax(given)
        assert (found["records"], found["labelled"]) == (len(pairs), int((truth >= 0).sum()))
        assert found["correct"] == int((given.argmax(axis=1) == truth).sum())
        assert float(found["entropy_sum"]) == pytest.approx(-(np.exp(log_p) * log_p).sum(), rel=1e-5)
        assert float(found["max_eps"]) == (0 if member == "few" else max(float(eps) for _, eps in stored))
        assert found["floored"] == 0
        records = np.stack([reader.record(reader.keys[row], view, member)[0]["records"] for view, row in pairs])
        assert found["dense"] == (int(records[:, 4:8].any(axis=1).sum()) if member == "low" else 0)
        # the first 32 of each batch of BATCH rows of one view
        few = [i for i in range(len(pairs)) if i % len(rows) % BATCH < 32]
        assert found["measured"] == len(few)
        promised = {"3"} if member == PROMISED else set()
        assert set(found["kl"]) == ({"1", "2", "4"} if member == "few" else {"1", "2", "4", "10", "20"}) | promised
        for text, kl in found["kl"].items():
            t = float(text)
            log_q = np.stack([
                log_target(*stored[i], 101, t) if member == "few" else log_softmax(stored[i][0] / t) for i in few
            ])  # fmt: skip
            p = log_softmax(given[few] / t)
            own = (np.exp(p) * (p - log_q)).sum(axis=1)
            assert float(kl["sum"]) == pytest.approx(own.sum(), rel=2e-3, abs=1e-9)
            assert float(kl["worst"]) == pytest.approx(own.max(), rel=2e-3, abs=1e-9)
        agreed = len(few) if member == "few" else sum(stored[i][0].argmax() == given[i].argmax() for i in few)
        assert found["agreed"] == agreed
        for name, worst in found["feature_errors"].items():
            errors = [reader.feature(member, name, reader.keys[row], view)[1] for view, row in pairs]
            assert float(worst) == float(max(errors))
    assert checked == 4  # two row ranges in each of two rounds


# --- test vectors: FORMAT.md against the code, and against an oracle that is not ours


def test_every_vector_has_a_test() -> None:
    names = re.findall(r"VECTORS\[\"([\w-]+)\"\]", Path(__file__).read_text(encoding="utf-8"))
    assert set(names) == set(VECTORS)


def test_bit_packing() -> None:
    for vector in VECTORS["bit-packing"]:
        numbers_, bits = vector["numbers"], vector["bits"]
        whole = sum(number << i * bits for i, number in enumerate(numbers_))
        data = whole.to_bytes(ceil(len(numbers_) * bits / 8), "little")
        assert data.hex() == vector["bytes"]
        packed = torch.from_numpy(np.frombuffer(data, np.uint8).copy())[None]
        assert torch.equal(pack(torch.tensor([numbers_]), bits), packed)
        assert unpack_numbers(packed, len(numbers_), bits)[0].tolist() == numbers_
        assert unpack(packed[0].numpy(), len(numbers_), bits).tolist() == numbers_


def record_of(text: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(text), np.uint8).copy()


def page_fields(vector: dict[str, Any], classes: int) -> list[dict[str, Any]]:
    """The fields of a record by the tables of the page: in their order, without gaps."""
    name, k = vector["codec"], min(int(vector["parameters"].get("k", 1)), classes)
    ids, codes = ceil(k * max(1, (classes - 1).bit_length()) / 8), [("lowest", "<f4", []), ("step", "<f4", [])]
    bits = int(vector["parameters"].get("bits", 8))
    table: list[tuple[str, str, list[int]]] = {
        "int8": [*codes, ("codes", "|u1", [classes])],
        "linear_head": [*codes, ("codes", "|u1", [len(vector.get("head_input", []))])],
        "headtail": [("largest", "<f4", []), *codes, ("below", "<f2", [k - 1]), ("ids", "|u1", [ids]),
                     ("codes", "|u1", [ceil(classes * bits / 8)])],
        "topk": [("tails", "<f2", [4 if classes > k else 0]), ("ids", "|u1", [ids]),
                 ("below", "|u1", [ceil((k - 1) * 13 / 8)])],
        "lowrank": [("level", "<f4", []), ("dense", "<u4", []),
                    ("codes", "|u1", [sum(vector.get("constants", {}).get("bits", []))])],
    }[name]  # fmt: skip
    made, offset = [], 0
    for part, dtype, shape in table:
        made.append({"name": part, "offset": offset, "dtype": dtype, "shape": shape})
        offset += np.dtype(dtype).itemsize * int(np.prod(shape))
    return made


CONSTANT_DTYPES = {"mean": np.float32, "basis": np.float16, "step": np.float32, "bits": np.uint8,
                   "weight": np.float32, "bias": np.float32}  # fmt: skip


@pytest.mark.parametrize("vector", VECTORS["records"], ids=lambda v: f"{v['codec']} {v['record'][:8]}")
def test_records(vector: dict[str, Any]) -> None:
    classes = vector.get("classes", len(vector.get("given", ())))
    constants = {name: np.array(value, CONSTANT_DTYPES[name]) for name, value in vector.get("constants", {}).items()}
    codec = make_codec(vector["codec"], vector["parameters"], classes)
    codec = codec.with_constants({name: torch.from_numpy(value) for name, value in constants.items()})
    record = record_of(vector["record"])
    table = page_fields(vector, classes)
    assert [field.to_json() for field in codec.fields] == table
    assert codec.arrays == {"records": ("|u1", (len(record),))}
    arrays = {"records": torch.from_numpy(record)[None]}
    found = fields(record, table)
    own = decode(codec.name, vector["parameters"], classes, found, {f"codec_{n}": v for n, v in constants.items()})
    if codec.name == "topk":
        ids, logits, tails = own
        assert ids.tolist() == vector["ids"] == codec.head(arrays)[0][0].tolist()
        assert logits.tolist() == vector["logits"] == codec.head(arrays)[1][0].tolist()
        for temperature, target in vector["log_targets"].items():
            made = codec.spread(arrays, float(temperature))[0]
            np.testing.assert_allclose(log_target(ids, logits, tails, classes, float(temperature)), target, atol=6e-6)
            np.testing.assert_allclose(made, target, atol=8e-6)
    else:
        np.testing.assert_array_equal(own, np.float32(vector["logits"]))
        np.testing.assert_array_equal(codec.decode(arrays)[0], np.float32(vector["logits"]))
    if "dense" in vector:
        record_of_it = record_of(vector["dense_record"])
        row = np.frombuffer(bytes.fromhex(vector["dense"]), "<f2").copy()
        kept = fields(record_of_it, table)
        assert kept["dense"] == 1
        arrays = {"records": torch.from_numpy(record_of_it)[None], "dense": torch.from_numpy(row)[None]}
        made = codec.decode(arrays | {"dense_at": torch.tensor([0])})[0]
        np.testing.assert_array_equal(made, np.float32(vector["dense_logits"]))
        np.testing.assert_array_equal(row.astype(np.float32) + kept["level"], np.float32(vector["dense_logits"]))
    if "numbers" in vector:
        bits = vector["constants"]["bits"]
        assert sorted(bits, reverse=True) == bits == [10, 3]
        first, second = (np.array(numbers_) for numbers_ in (vector["numbers"][:8], vector["numbers"][8:]))
        pieces = [(first % 256, 8), (second, 3), (first // 256, 2)]
        wholes = [sum(int(number) << i * width for i, number in enumerate(piece)) for piece, width in pieces]
        data = b"".join(whole.to_bytes(width, "little") for whole, (_, width) in zip(wholes, pieces, strict=True))
        assert data == found["codes"].tobytes()
    given = torch.tensor([vector["given"]]) if "given" in vector else None
    if given is not None:
        assert codec.encode(given)["records"][0].numpy().tobytes() == record.tobytes()
    if "head_input" in vector:
        made = codec.encode(torch.zeros(1, classes), torch.tensor([vector["head_input"]]))
        assert made["records"][0].numpy().tobytes() == record.tobytes()


@pytest.mark.parametrize("vector", VECTORS["features"], ids=lambda v: f"{v['name']} {v['dtype']}")
def test_features(vector: dict[str, Any]) -> None:
    layers, _, reduction = vector["name"].rpartition(":")
    spec, shapes = FeatureSpec(tuple(layers.split("+")), reduction), [tuple(s) for s in vector["shapes"]]
    outputs = [np.float32(values).reshape(shape) for values, shape in zip(vector["outputs"], shapes, strict=True)]
    assert spec.stored(*shapes) == vector["stored"]
    codec = FeatureCodec(vector["dtype"], vector["stored"], spec.record_shape(*shapes))
    values = spec.store(*(torch.from_numpy(output)[None] for output in outputs))
    coded = codec.encode(values)
    assert coded[""].numpy().tobytes().hex() == vector["values"]
    assert coded["_scale"][0].tolist() == pytest.approx(vector["scale"], rel=1e-7) if "_scale" in coded else True
    error = round_up_to_half(codec.error(values, codec.decode(coded)).float()).numpy()
    assert error.view("<u2")[0] == int.from_bytes(bytes.fromhex(vector["error"]), "little")
    # the stranger's
    kept = np.frombuffer(bytes.fromhex(vector["values"]), "<f2" if coded[""].dtype == torch.float16 else "|u1")
    kept = kept.astype(np.float32).reshape(codec.shape)
    if "scale" in vector:
        low, high = outputs[0].min(), outputs[0].max()
        step, offset = np.float32(vector["scale"])
        assert offset == low
        assert 0 < step / ((high - low) / 255) - 1 < 2.0**-15
        assert int(step.view(np.uint32)) % 256 == 0
        kept = kept * step + offset
    found = restore(reduction, vector["stored"], shapes, kept)
    np.testing.assert_allclose(np.ravel(found), vector["feature"], rtol=1e-6)
    np.testing.assert_allclose(spec.read(codec.decode(coded), *shapes)[0].flatten(), vector["feature"], rtol=1e-6)
    exact = REDUCE[reduction](*outputs)
    assert np.linalg.norm(found - exact) <= 3 * float(error[0]) * np.linalg.norm(exact) + 1e-6


def test_rounds() -> None:
    vector = VECTORS["rounds"]
    plan = Plan.from_json(
        {"format": 1, "license": None, "parent": None,
         "samples": dict.fromkeys(SAMPLE_FIELDS, ""), "class_names": [], "members": [],
         "views": {"count": 7, "first": 0, "root_seed": "0", "replay": "derived", "steps": []},
         "rounds": [one | {"made_with": {}} for one in vector["rounds"]]}
    )  # fmt: skip
    spans = {span.index: (one, span) for one, span in plan.spans()}
    assert list(spans) == list(range(11))
    for record in vector["records"]:
        member, row, view = record["member"], record["row"], record["view"]
        one, span = spans[record["part"]]
        assert one.new_views if member is None else member in one.members
        assert one.layout in plan.layouts_of(member)
        assert record["element"] == [view - span.view_start, row - span.row_start]
        assert row < span.row_stop
        assert view < span.view_stop
        # the stranger's
        reader = StrangersReader.__new__(StrangersReader)
        reader.manifest, reader.row, asked = vector, {hash_word("key"): row}, []

        def opened(path: str, span: Any = span, asked: list[str] = asked) -> dict[str, np.ndarray]:
            asked.append(path)
            return {"place": np.indices((span.views, span.rows)).transpose(1, 2, 0)}

        reader.open = opened
        found, part = reader.record("key", view, member)
        assert found["place"].tolist() == record["element"]
        assert part == record["part"]
        assert asked == [f"{f'members/{member}' if member else 'views'}/part-{part:05d}.h5"]


SAMPLE_FIELDS = (
    "source",
    "count",
    "fingerprint",
    "digest_kind",
    "has_keys",
    "multi_label",
    "order",
    "order_seed",
)


def image_of(height: int, width: int, channels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 256, (height, width, channels)).astype(np.uint8)


def rendered(step: str, parameters: dict[str, Any], image: np.ndarray, vector: dict[str, Any]) -> np.ndarray:
    policy = Policy((make_step(step, parameters),), int(vector["root_seed"]))
    return policy.render(image, sample_id(vector["key"]), vector["view"])


def assert_within_a_level(made: np.ndarray, exact: np.ndarray, *, nearest: bool, levels: int = 1) -> None:
    """uint8 pixels against exact values that round to the nearest, or down; a level off where rounding is not clear."""
    border = np.abs(exact - np.floor(exact) - (0.5 if nearest else 0))
    unclear = np.minimum(border, 1 - border) < 2e-3
    expected = np.rint(exact) if nearest else np.floor(exact)
    np.testing.assert_array_equal(made[~unclear], expected[~unclear])
    assert np.abs(made - expected).max(initial=0) <= levels


@pytest.mark.parametrize("vector", VECTORS["boxes"], ids=lambda v: f"{v['step']} {v['view']}")
def test_boxes(vector: dict[str, Any]) -> None:
    height, width = vector["height"], vector["width"]
    values = {name: float(text) for name, text in vector["parameters"].items()}
    draws, scales = Stream(vector["root_seed"], f"{vector['step']}#0", vector["key"], vector["view"]), []
    scales = [values["scale_min"], values["scale_max"]]
    first = draws.uniform()
    image = image_of(height, width, 3)
    low, high = (0.3, 3.3) if vector["step"] == "erase" else (3 / 4, 4 / 3)
    box = draw_box(draws, width / height, *scales, low, high)
    if vector["step"] != "erase":
        assert (box is None, first < values["flip"]) == (vector["middle"], vector["mirrored"])
        box = box or middle_box(width / height)
    assert box == vector["box"]
    rows, columns = borders(box[0], box[2], height), borders(box[1], box[3], width)
    assert [rows, columns] == [vector["rows"], vector["columns"]]
    if vector["step"] == "erase":
        assert first < values["p"]
        expected = image.copy()
        expected[slice(*rows), slice(*columns)] = 0
        np.testing.assert_array_equal(rendered("erase", vector["parameters"], image, vector), expected)
        return
    made = rendered("resized_crop_flip", {**vector["parameters"], "size": 24}, image, vector)
    exact = resize(image[slice(*rows), slice(*columns)], 24, 24)
    assert_within_a_level(made, exact[:, ::-1] if vector["mirrored"] else exact, nearest=True)


def test_a_box_keeps_at_least_one_pixel() -> None:
    assert borders(65500, 20, 4) == [3, 4]
    vector = {"root_seed": 1, "key": "k", "view": 0}
    for seed in range(20):
        vector["root_seed"] = seed
        made = rendered("erase", {"p": 1, "scale_min": 0.0, "scale_max": 0.0001}, image_of(5, 7, 1), vector)
        assert (made == 0).sum() == 1


def test_color_draws() -> None:
    jitter, augment, turn = VECTORS["color-draws"]
    for image in (image_of(9, 11, 3), image_of(9, 11, 1)):
        draws = Stream(jitter["root_seed"], "color_jitter#0", jitter["key"], jitter["view"])
        order = [0, 1, 2, 3]
        for i in (3, 2, 1):
            other = draws.integer(0, i)
            order[i], order[other] = order[other], order[i]
        values = [float(jitter["parameters"][name]) for name in ("brightness", "contrast", "saturation", "hue")]
        lows = [max(0.0, 1 - x) for x in values[:3]]
        amounts = [low + (1 + x - low) * draws.uniform() for low, x in zip(lows, values, strict=False)]
        amounts.append(values[3] * (2 * draws.uniform() - 1))
        assert (order, amounts) == (jitter["order"], [float(text) for text in jitter["amounts"]])
        made = rendered("color_jitter", jitter["parameters"], image, jitter).reshape(image.shape)
        exact = image
        for which in order:
            exact = np.floor(COLOURS[which](exact, amounts[which]) + 1e-4).astype(np.uint8)
        # a level lost early can be stretched later, and grey levels can be one off
        assert np.abs(made.astype(int) - exact).max() <= 6
        assert (made != exact).mean() < 0.05
        # one at a time: those that are left out do not shift the draws of the others
        for which, name in enumerate(("brightness", "contrast", "saturation", "hue")):
            made = rendered("color_jitter", {name: values[which]}, image, jitter).reshape(image.shape)
            assert_within_a_level(made, COLOURS[which](image, amounts[which]), nearest=False, levels=2)

        draws = Stream(augment["root_seed"], "randaugment#0", augment["key"], augment["view"])
        drawn = [[draws.integer(0, 13), -1 if draws.uniform() < 0.5 else 1] for _ in augment["operations"]]
        assert drawn == augment["operations"]
        draws = Stream(turn["root_seed"], "rotate#0", turn["key"], turn["view"])
        angle = float(turn["parameters"]["degrees"]) * (2 * draws.uniform() - 1)
        assert angle == float(turn["angle"])
        made = rendered("rotate", turn["parameters"], image, turn).reshape(image.shape)
        assert_within_a_level(made, rotated(image, angle), nearest=True)


NEAREST = (1, 2, 5)  # operations that round to the nearest level


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(12, 15, 3), (17, 9, 1), (40, 30, 3)], ids=str)
def test_operations_of_randaugment(shape: tuple[int, int, int]) -> None:
    image, seen = image_of(*shape, seed=6), set()
    image = image // 2 + 30 if shape[0] == 40 else image  # else there is nothing to stretch
    for seed in range(200):
        vector = {"root_seed": seed, "key": "k", "view": 1}
        magnitude = (4, 11, 23, 30)[seed % 4]
        draws = Stream(seed, "randaugment#0", "k", 1)
        operation, s = draws.integer(0, 13), -1 if draws.uniform() < 0.5 else 1
        made = rendered("randaugment", {"ops": 1, "magnitude": magnitude}, image, vector).reshape(shape)
        exact = randaugmented(image, operation, s, magnitude / 30)
        if operation in (0, 3, 4, 10, 11, 13):
            np.testing.assert_array_equal(made, exact)
        else:
            assert_within_a_level(made, exact, nearest=operation in NEAREST, levels=2 if operation in (7, 9) else 1)
        seen.add((operation, s))
    assert len(seen) == 28


@pytest.mark.parametrize("vector", VECTORS["mixing"], ids=lambda v: f"{v['step']} {v['view']}")
def test_mixing(vector: dict[str, Any]) -> None:
    draws = Stream(vector["root_seed"], f"{vector['step']}#0", vector["key"], vector["view"])
    policy = Policy((make_step(vector["step"], vector["parameters"]),), int(vector["root_seed"]))
    place = sample_id(vector["key"]), vector["view"]
    assert draws.integer(0, vector["count"] - 1) == vector["partner"] == policy.partner(*place, vector["count"])
    k = rounded(4096 * beta(float(vector["parameters"]["alpha"]), draws))
    assert k == vector["k"]
    height, width = vector.get("height", 6), vector.get("width", 5)
    own, other = image_of(height, width, 3, 1), image_of(height, width, 3, 2)
    mixed, weight = policy.mix(own, other, *place)
    if vector["step"] == "mixup":
        expected = (k * own.astype(int) + (4096 - k) * other.astype(int) + 2048) // 4096
        assert weight == k / 4096
    else:
        side = isqrt((4096 - k) * 2**20)
        rows = clipped(draws.integer(0, 65535), side, height)
        columns = clipped(draws.integer(0, 65535), side, width)
        assert [rows, columns] == [vector["rows"], vector["columns"]]
        expected = own.astype(int)
        expected[slice(*rows), slice(*columns)] = other[slice(*rows), slice(*columns)]
        assert weight == 1 - (rows[1] - rows[0]) * (columns[1] - columns[0]) / (height * width)
    np.testing.assert_array_equal(mixed, expected)


def test_a_mixed_cache_digests_the_blend_of_two_views(toy: Path, quick_dump: Any, tmp_path: Path) -> None:
    quick_dump(policy=("shift:pixels=1", "mixup:alpha=0.5"), views=2, view_seed=9)
    reader = StrangersReader(tmp_path / "cache")
    images = {f"toy/{i:04d}": image for i, image in enumerate(toy_images(toy))}
    blended = 0
    for key in reader.keys:
        for view in range(2):
            draws = Stream(9, "mixup#0", key, view)
            partner = reader.keys[draws.integer(0, 39)]
            k = rounded(4096 * beta(0.5, draws))
            own, other = (shift(images[name], 9, name, view, 1).astype(int) for name in (key, partner))
            seen = ((k * own + (4096 - k) * other + 2048) // 4096).astype(np.uint8)
            digest = hashlib.blake2b(canonical_item(seen), digest_size=4).digest()
            assert reader.record(key, view)[0]["pixel_digests"] == int.from_bytes(digest, "little")
            blended += key != partner and 100 < k < 3996
    assert blended > 20


def toy_images(toy: Path) -> np.ndarray:
    spec = importlib.util.spec_from_file_location("live_toy", toy)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.images().images


def test_seeded_generators(tmp_path: Path) -> None:
    vector = VECTORS["seeded"]
    draws = Stream(vector["root_seed"], f"{vector['transform']}#0", vector["key"], vector["view"])
    drawn = [next(draws.words) for _ in range(3)]
    assert drawn == [int(text, 16) for text in vector["words"]]
    assert random.Random(drawn[0]).random() == float(vector["random.random()"])
    halves = [drawn[1] % 2**32, drawn[1] // 2**32]
    assert np.random.RandomState(halves).random_sample() == float(vector["numpy.random.random()"])
    own = torch.rand(1, generator=torch.Generator().manual_seed(drawn[2]))
    assert own == torch.tensor(float(vector["torch.rand(1)"]))
    # a transform that shows what it was given: twice in one policy, so each has a stream of its own
    file = WORLDS / "shows_draws.py"
    text = f"{file}:make?scale=2"
    policy = Policy((make_step("seeded", {"transform": text}), make_step("seeded", {"transform": text})), 3)
    assert policy.replay == "seeded"
    made = policy.render(np.zeros((1, 4), np.uint8), sample_id("k"), 1)
    factory = words((0, 0, 0, 0), (0, hash_word(f"{text}#0")))
    expected = np.zeros(4, int)
    for occurrence in (0, 1):
        stream = Stream(3, f"{text}#{occurrence}", "k", 1).words
        w = [next(stream) for _ in range(3)]
        numbers_ = [
            random.Random(factory[0]).random(),
            random.Random(w[0]).random(),
            np.random.RandomState([w[1] % 2**32, w[1] // 2**32]).random_sample(),
            float(torch.rand(1, generator=torch.Generator().manual_seed(w[2]))),
        ]
        expected = (expected + 2 * np.array([int(256 * x) for x in numbers_])) % 256
    assert made[0].tolist() == expected.tolist()


def test_sample_ids() -> None:
    assert {"train/000123", "a/ü.png", ""} == set(VECTORS["sample-ids"])
    for key, number in VECTORS["sample-ids"].items():
        assert f"{sample_id(key):016x}" == number == f"{hash_word(key):016x}"


def test_content_digests() -> None:
    kinds = {"uint8": np.uint8, "float32": np.float32}
    for vector in VECTORS["content-digests"]:
        item = vector["item"]
        if vector["kind"] in kinds:
            item = np.array(item, kinds[vector["kind"]])
        assert canonical_item(item).hex() == vector["canonical"]
        digest = hashlib.blake2b(bytes.fromhex(vector["canonical"]), digest_size=16).hexdigest()
        assert item_digest(item).hex() == vector["digest"] == digest


def test_big_endian_and_strided_arrays_have_the_digest_of_the_plain_one() -> None:
    plain = np.arange(12, dtype="<f4").reshape(3, 4)
    assert item_digest(plain.astype(">f4")) == item_digest(np.asfortranarray(plain)) == item_digest(plain)
    assert item_digest(torch.from_numpy(plain)) == item_digest(plain)
    assert item_digest(plain) == hashlib.blake2b(canonical_item(plain), digest_size=16).digest()


def test_file_and_pixel_digests() -> None:
    data = VECTORS["file-digest"]["file"].encode("utf-8")
    assert (
        file_digest(data).hex() == VECTORS["file-digest"]["digest"] == hashlib.blake2b(data, digest_size=16).hexdigest()
    )
    image = np.array(VECTORS["pixel-digest"]["image"], np.uint8)
    own = int.from_bytes(hashlib.blake2b(canonical_item(image), digest_size=4).digest(), "little")
    assert pixel_digest(image) == VECTORS["pixel-digest"]["digest"] == own


def numbers(texts: list[str]) -> tuple[int, ...]:
    return tuple(int(text, 16) for text in texts)


def test_philox_words() -> None:
    for vector in VECTORS["philox"]:
        (c0, c1, c2, c3), (k0, k1) = numbers(vector["counter"]), numbers(vector["key"])
        expected = list(numbers(vector["words"]))
        assert list(philox((c0, c1, c2, c3), (k0, k1))) == expected == words((c0, c1, c2, c3), (k0, k1))


def test_draws() -> None:
    vector, block = VECTORS["draws"], VECTORS["philox"][2]
    (sample, view, *_), (seed, key) = numbers(block["counter"]), numbers(block["key"])
    uniform, integers = Draws(seed, key, sample, view), Draws(seed, key, sample, view)
    for word, text, number in zip(numbers(block["words"]), vector["uniform()"], vector["integer(-4, 4)"], strict=True):
        assert uniform.uniform() == float(text) == float(Fraction(word // 2**11, 2**53))
        assert integers.integer(-4, 4) == number == -4 + floor(Fraction(9 * word, 2**64))
    assert uniform.word() == words((sample, view, 1, 0), (seed, key))[0]  # the next block


def test_step_keys() -> None:
    for text, number in VECTORS["step-keys"].items():
        name, _, occurrence = text.partition("#")
        assert f"{step_key(name, int(occurrence)):016x}" == number == f"{hash_word(text):016x}"


def test_offsets_of_shift_and_crop_flip() -> None:
    image = np.random.default_rng(0).integers(1, 256, (9, 11)).astype(np.uint8)
    for v in VECTORS["offsets"]:
        step, seed = make_step(v["step"], v["parameters"]), int(v["root_seed"])
        moved = window(image, v["dy"], v["dx"])
        expected = moved[:, ::-1] if v["mirrored"] else moved
        if v["step"] == "shift":
            own = shift(image, seed, v["key"], v["view"], int(v["parameters"]["pixels"]))
        else:
            own = crop_flip(
                image, seed, v["key"], v["view"], int(v["parameters"]["padding"]), float(v["parameters"]["flip"])
            )
        np.testing.assert_array_equal(own, expected)
        np.testing.assert_array_equal(Policy((step,), seed).render(image, sample_id(v["key"]), v["view"]), expected)


def test_row_order() -> None:
    for vector in VECTORS["row-order"]:
        count, seed, first = vector["count"], int(vector["seed"]), vector["first"]
        raw = [words((1 + i // 4, 0, 0, 0), (seed % 2**64, 0))[i % 4] for i in range(count)]
        assert sorted(range(count), key=lambda i: raw[i])[: len(first)] == first
        assert seeded_order(count, seed)[: len(first)].tolist() == first


def test_row_order_takes_its_seed_modulo_2_to_the_64() -> None:
    assert seeded_order(50, -1).tolist() == seeded_order(50, 2**64 - 1).tolist() == seeded_order(50, 2**65 - 1).tolist()


def test_canonical_json() -> None:
    vector = VECTORS["canonical"]
    data = vector["bytes"].encode("utf-8")
    assert canonical_json(vector["value"]) == data
    assert json.loads(data) == vector["value"]
    assert hashlib.sha256(data).hexdigest() == vector["sha256"]
    for refused in (0.5, 2**53, -(2**53), {1: "x"}):
        with pytest.raises(ValueError, match=r"canonical|JSON key"):
            canonical_json([refused])


def test_crc32() -> None:
    for text, crc in VECTORS["crc32"].items():
        assert f"{binascii.crc32(text.encode()):08x}" == crc


def test_packed_labels() -> None:
    vector = VECTORS["packed-labels"]
    labels = np.zeros((1, vector["classes"]), bool)
    labels[0, vector["set"]] = True
    own = bytearray(ceil(vector["classes"] / 8))
    for c in vector["set"]:
        own[c // 8] |= 1 << c % 8
    assert pack_labels(labels).tobytes() == bytes.fromhex(vector["bytes"]) == bytes(own)


def test_fingerprint() -> None:
    vector = VECTORS["fingerprint"]
    samples = sorted((int(s["id"], 16), s["label"], bytes.fromhex(s["digest"])) for s in vector["samples"])
    own = b"".join(struct.pack("<Q", i) for i, _, _ in samples) + b"".join(struct.pack("<i", k) for _, k, _ in samples)
    own += b"".join(digest for _, _, digest in samples)
    ids, labels = np.array([i for i, _, _ in samples], np.uint64), np.array([k for _, k, _ in samples])
    digests = np.frombuffer(b"".join(d for _, _, d in samples), np.uint8).reshape(-1, 16)
    for order in ([0, 1], [1, 0]):
        table = build_table(["", ""], ids, labels, digests, 10, np.array(order), store_keys=False)
        assert table.fingerprint() == vector["fingerprint"] == hashlib.sha256(own).hexdigest()


def test_eps_is_rounded_up() -> None:
    for text, bits in VECTORS["eps"].items():
        value = np.float32(text)
        own = value.astype(np.float16)
        if float(own) < float(value):
            own = np.nextafter(own, np.float16(np.inf))
        assert (
            f"{own.view(np.uint16):04x}"
            == bits
            == f"{round_up_to_half(torch.tensor([value])).numpy().view('<u2')[0]:04x}"
        )


# --- what the steps and the logits mean


def test_steps_and_codecs_of_the_page_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (.*?) \|", section(13), re.M)
    named = {name: (int(version), set(re.findall(r"`(\w+)`", rest))) for name, version, rest in rows}
    ours = {
        name: (kind.version, set(list(inspect.signature(kind.function).parameters)[2:])) for name, kind in STEPS.items()
    }
    assert named == ours
    table = re.findall(r"^\| `(\w+)` \|(.*?)\| .* \| (yes|no) \| (yes|no) \| (yes|no) \| (.*?) \|$", section(9), re.M)
    assert {name for name, *_ in table} == {name for name, kind in CODECS.items() if kind(10).format == 1}
    for name, parameters, *flags, temperatures in table:
        kind = CODECS[name]
        assert set(re.findall(r"`(\w+)`", parameters)) == set(kind(10).parameters)
        assert [flag == "yes" for flag in flags] == [kind.complete, kind.bounded, kind.keeps_level]
        lowest, highest = kind.temperature_range or (0, 0)
        assert temperatures == (f"{lowest:g} to {highest:g}" if kind.temperature_range else "any")
    assert set(CLASS_OUTPUTS) <= set(first_cells(section(8)))
    assert set(first_cells(section(10)[: section(10).index("| data set |")])) == set(REDUCTIONS)


SIZES = [(9, 11, 3), (8, 8, 1), (5, 12, 4), (16, 7, 3)]


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_center_crop_by_its_formula(shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    for size in (3, 6, 7, 8, 9, 13):
        made = Policy((make_step("center_crop", {"size": size}),)).render(image, 1, 0)
        np.testing.assert_array_equal(made, center_crop(image, size))


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_resize_by_its_formula(shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(2).integers(0, 256, shape).astype(np.uint8)
    for size, height in ((4, 0), (7, 5), (16, 20), (shape[1], shape[0])):
        made = Policy((make_step("resize", {"size": size, "height": height}),)).render(image, 1, 0)
        assert_within_a_level(made, resize(image, height or size, size), nearest=True)


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_middle_crop_by_its_formula(shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(2).integers(0, 256, shape).astype(np.uint8)
    for size in (3, 7, 16):
        shorter = size * 8 // 7
        longer = shorter * max(shape[:2]) // min(shape[:2])
        whole = resize(image, *((shorter, longer) if shape[0] <= shape[1] else (longer, shorter)))
        made = Policy((make_step("middle_crop", {"size": size}),)).render(image, 1, 0)
        assert_within_a_level(made, center_crop(whole, size), nearest=True)


def test_to_rgb_by_its_words() -> None:
    to_rgb = Policy((make_step("to_rgb", {}),))
    image = np.random.default_rng(3).integers(0, 256, (4, 5, 4)).astype(np.uint8)
    np.testing.assert_array_equal(to_rgb.render(image, 1, 0), image[:, :, :3])
    np.testing.assert_array_equal(to_rgb.render(image[:, :, 0], 1, 0), np.stack([image[:, :, 0]] * 3, axis=2))


def test_a_step_draws_the_same_whatever_stands_before_it() -> None:
    image = np.random.default_rng(4).integers(1, 256, (10, 10)).astype(np.uint8)
    steps = [make_step(name, {}) for name in ("shift", "crop_flip", "crop_flip")]
    for view in range(4):
        expected = shift(image, 3, "k", view, 2)
        for occurrence in range(2):
            expected = crop_flip(expected, 3, "k", view, 4, 0.5, occurrence)
        np.testing.assert_array_equal(Policy(tuple(steps), 3).render(image, sample_id("k"), view), expected)


@pytest.mark.parametrize("multi_label", [False, True], ids=["one label", "several"])
@pytest.mark.parametrize("output", CLASS_OUTPUTS)
def test_what_logits_mean_by_output(output: str, multi_label: bool) -> None:
    floor_ = 2.0**-24
    probs = np.array([[0.7, 0.3 - 1e-8, 1e-8], [0.25, 0.25, 0.5], [0.125, 0.875, 0.0]])
    if output == "log_probs":
        probs = np.maximum(probs, 1e-30)
    given = {"logits": np.array([[1.5, -2.0, 0.25]] * 3), "log_probs": np.log(np.maximum(probs, 1e-30)), "probs": probs}
    match = Match((2, 0, 1), 3, "by name")
    teacher = Teacher(
        "t", "", lambda _: given[output], list, output=output, num_classes=3, multi_label=multi_label, match=match
    )
    made = teacher(None)
    log_p, log_q = np.log(np.maximum(probs, floor_)), np.log(np.maximum(1 - probs, floor_))
    if output == "logits" or (output == "log_probs" and not multi_label):
        expected, floored = given[output], 0
    elif multi_label:
        expected, floored = log_p - log_q, int((probs < floor_).sum() + (1 - probs < floor_).sum())
    else:
        expected, floored = log_p, int((probs < floor_).sum())
    np.testing.assert_allclose(made.logits.numpy(), expected[:, match.columns], rtol=1e-6)
    assert made.floored == floored


def test_probabilities_outside_0_to_1_are_refused() -> None:
    for bad in (-1e-3, 1.001):
        teacher = Teacher("t", "", lambda _, bad=bad: np.array([[bad, 0.5]]), list, output="probs", num_classes=2)
        with pytest.raises(TeacherError, match=r"outside \[0, 1\]"):
            teacher(None)


# --- names: the manifest and the files against the tables of FORMAT.md

ANY_KEY = {
    "files[].arrays": "NAME",
    "files[].statistics.kl": "T",
    "files[].statistics.feature_errors": "FEATURE",
    "views.steps[].parameters": "NAME",
    "members[].codec.parameters": "NAME",
}


def field_names(value: Any, path: str = "") -> Iterator[str]:
    """The dotted name of every field below a JSON value, as FORMAT.md writes it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            shown = ANY_KEY.get(path, key)
            name = f"{path}.{shown}" if path else shown
            yield name
            yield from field_names(inner, name)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for inner in value:
            yield from field_names(inner, f"{path}[]")


@pytest.mark.slow
def test_the_manifest_has_the_fields_of_the_page_and_no_others(cache: Path) -> None:
    data = (cache / "manifest.json").read_bytes()
    manifest = json.loads(data)
    documented = first_cells(section(4))
    assert len(documented) == len(set(documented))
    assert set(field_names(manifest)) == set(documented)
    assert data == json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    assert (cache / "manifests" / f"{hashlib.sha256(data).hexdigest()}.json").read_bytes() == data
    with_member, with_place = {"constants", "member", "dense"}, {"views", "member", "dense"}
    for entry in manifest["files"]:
        kind = entry["kind"]
        assert ("member" in entry, "rows" in entry, "views" in entry, "statistics" in entry) == (
            kind in with_member, kind in with_place, kind in with_place, kind == "member")  # fmt: skip
    kinds = re.search(r"^\| `files\[\].kind` \| string \| (.*) \|$", FORMAT, re.M)
    assert kinds is not None
    assert {entry["kind"] for entry in manifest["files"]} == set(re.findall(r"`(\w+)`", kinds[1]))


@pytest.mark.slow
def test_the_fields_and_data_sets_are_those_of_the_page(cache: Path) -> None:
    manifest = json.loads((cache / "manifest.json").read_bytes())
    for entry in manifest["files"]:
        kind, names = entry["kind"], set()
        if kind in ("member", "constants"):
            (member,) = (one for one in manifest["members"] if one["name"] == entry["member"])
            codec = member["codec"]
            assert codec["fields"] == page_fields_of(codec, manifest) if codec["fields"] else True
        if kind == "samples":
            names = set(first_cells(section(6)))
        elif kind == "probe":
            names = set(first_cells(section(14)[section(14).index("**Replaying") :]))
        elif kind == "views":
            names = {"pixel_digests"}
        elif kind == "dense":
            names = {"logits"}
        elif kind == "constants":
            names = {f"codec_{name}" for name in {"lowrank": ("mean", "basis", "step", "bits"), "linear_head":
                     ("weight", "bias")}.get(codec["name"], ())}  # fmt: skip
            names |= {"head_weight", "head_bias"} if member["features"] and codec["name"] != "linear_head" else set()
        else:
            plain = {"float32": "logits", "float16": "logits", "linear_head": "head_input"}
            names = {"records" if codec["fields"] else plain[codec["name"]]}
            names |= {"eps"} if codec["name"] != "topk" else set()
            for number, feature in enumerate(member["features"]):
                coded = feature["dtype"] == "int8" and feature["stored"] != "sign"
                assert feature["arrays"] == [f"feature{number}"] + [f"feature{number}_scale"] * coded
                names |= {*feature["arrays"], f"feature{number}_error"}
        assert set(entry["arrays"]) == names | {f"{name}_crc32" for name in names}, entry["path"]
        for name in names:
            assert f"`{re.sub('[0-9]+', 'N', name)}`" in FORMAT, name


def page_fields_of(codec: dict[str, Any], manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The fields of a member's records, by the page; a width that its constants decide is taken as it stands."""
    width = codec["fields"][-1]["shape"]
    vector = {"codec": codec["name"], "parameters": codec["parameters"]}
    return page_fields(
        vector | {"head_input": [0] * width[0], "constants": {"bits": width}}, len(manifest["class_names"])
    )


@pytest.mark.slow
def test_plan_journal_and_provenance_hold_what_the_page_says(cache: Path, ids: list[str]) -> None:
    text = section(16)
    assert {path.name for path in (cache / "dump").iterdir() if path.is_dir()} == {
        f"extend-{n}" for n in range(1, len(ids))
    }
    for number, one in enumerate(ids):
        work = cache / "dump" / (f"extend-{number}" if number else "")
        manifest = json.loads((cache / f"manifests/{one}.json").read_bytes())
        before = json.loads((cache / f"manifests/{ids[number - 1]}.json").read_bytes()) if number else {"files": []}
        plan = json.loads((work / "plan.json").read_bytes())
        assert plan["plan"] == {name: value for name, value in manifest.items() if name != "files"}
        assert plan["base"] == (ids[number - 1] if number else None)
        journal = [json.loads(line) for line in (work / "part-1-of-1.jsonl").read_bytes().splitlines()]
        layout = manifest["rounds"][-1]["layout"]
        ranges = ceil(layout["num_views"] / layout["shard_views"]) * ceil(COUNT / 256)
        assert [entry["span"] for entry in journal] == [layout["first_part"] + i for i in range(ranges)]
        written = plan["files"] + [file for entry in journal for file in entry["files"]]
        assert manifest["files"] == before["files"] + written
        provenance = json.loads((cache if not number else work).joinpath("provenance.json").read_bytes())
        for name in {*plan, *journal[0], *provenance}:
            assert f"`{name}`" in text, name
    names = {path.relative_to(cache).as_posix().split("/")[0] for path in cache.rglob("*")}
    assert names == {re.split("[/ ]", cell)[0] for cell in first_cells(section(2))}


@pytest.mark.slow
def test_files_stand_in_the_order_of_the_page(cache: Path) -> None:
    manifest = json.loads((cache / "manifest.json").read_bytes())
    there = {entry["path"]: entry for entry in manifest["files"]}
    paths, part = ["samples.h5", "probe.h5"], 0
    for number, one in enumerate(manifest["rounds"]):
        layout = one["layout"]
        assert (layout["first_part"], layout["num_rows"]) == (part, COUNT)
        assert one["new_views"] == (number in (0, len(manifest["rounds"]) - 1))
        if number < len(MEMBERS):
            paths.append(f"members/{one['members'][0]}/constants.h5")
        for first_row in range(0, COUNT, layout["shard_rows"]):
            for first in range(layout["first_view"], layout["first_view"] + layout["num_views"], layout["shard_views"]):
                paths += [f"views/part-{part:05d}.h5"] if one["new_views"] else []
                for member in one["members"]:
                    paths += [f"members/{member}/part-{part:05d}.h5", f"members/{member}/dense-{part:05d}.h5"]
                    last_view = min(first + layout["shard_views"], layout["first_view"] + layout["num_views"])
                    entry = there[f"members/{member}/part-{part:05d}.h5"]
                    assert entry["rows"] == [first_row, min(first_row + layout["shard_rows"], COUNT)]
                    assert entry["views"] == [first, last_view]
                part += 1
    assert [entry["path"] for entry in manifest["files"]] == [path for path in paths if path in there]
    assert manifest["rounds"][0]["layout"]["shard_views"] == 2
    assert manifest["rounds"][-1]["members"] == list(MEMBERS)


# --- the files


@pytest.mark.slow
def test_files_are_plain_contiguous_aligned_hdf5(cache: Path) -> None:
    for entry in json.loads((cache / "manifest.json").read_bytes())["files"]:
        data = (cache / entry["path"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
        assert data[:9] == b"\x89HDF\r\n\x1a\n\x03"  # no user block, superblock version 3: HDF5 1.10
        with h5py.File(cache / entry["path"], "r") as file:
            assert set(file.attrs) == {"softcache_format", "softcache_kind"}
            assert (file.attrs["softcache_format"], file.attrs["softcache_format"].dtype) == (1, np.dtype("<u4"))
            assert file.attrs["softcache_kind"].decode() == entry["kind"]
            assert set(file) == set(entry["arrays"])
            for name, stored in entry["arrays"].items():
                dataset = file[name]
                creation = dataset.id.get_create_plist()
                assert creation.get_layout() == h5py.h5d.CONTIGUOUS
                assert (creation.get_nfilters(), creation.get_external_count()) == (0, 0)
                assert not creation.get_obj_track_times()
                assert dataset.id.get_space_status() == h5py.h5d.SPACE_STATUS_ALLOCATED
                assert not dataset.attrs
                assert (list(dataset.shape), dataset.dtype) == (stored["shape"], np.dtype(stored["dtype"]))
                assert dataset.id.get_offset() == stored["offset"]
                assert stored["offset"] % 4096 == 0
                raw = data[stored["offset"] :][: dataset.nbytes]
                assert raw == dataset[...].tobytes()
                if not name.endswith("_crc32"):
                    blocks = [binascii.crc32(raw[i : i + 65536]) for i in range(0, len(raw), 65536)]
                    assert file[f"{name}_crc32"][...].tolist() == blocks


def test_a_block_checksum_covers_65536_bytes(toy: Path, tmp_path: Path) -> None:
    # float32, 4 classes: 4,200 records are 67,200 bytes, two blocks
    config = DumpConfig(data=f"{toy}:images?count=4200", teacher=(f"{toy}:exact",), out=str(tmp_path / "c"))
    dump.run(replace(config, codec="float32", shard_rows=4352, threads=1, workers=0, device="cpu"), quiet=True)
    with h5py.File(tmp_path / "c/members/exact/part-00000.h5", "r") as file:
        raw = file["logits"][...].tobytes()
        assert file["logits_crc32"][...].tolist() == [binascii.crc32(raw[:65536]), binascii.crc32(raw[65536:])]


def test_a_cache_without_keys_and_with_an_empty_key(quick_dump: Any) -> None:
    reader = CacheReader(quick_dump(out="nameless", no_keys=True).reader.path)
    (file,) = reader.manifest.files_of("samples")
    assert {"key_bytes", "key_offsets"}.isdisjoint(file.arrays)
    assert reader.samples.key(0) == f"{int(reader.samples.ids[0]):016x}"
    table = build_table([""], np.array([sample_id("")]), np.array([0]), np.zeros((1, 16), np.uint8), 2, np.array([0]),
                        store_keys=True)  # fmt: skip
    assert table.key(0) == ""


@pytest.mark.slow
def test_dumps_made_seconds_apart_have_equal_bytes(settings: DumpConfig, tmp_path: Path) -> None:
    started = int(time.time())
    dump.run(replace(settings, out=str(tmp_path / "a")), quiet=True)
    while int(time.time()) < started + 2:  # HDF5 would keep whole seconds
        time.sleep(0.02)
    dump.run(replace(settings, out=str(tmp_path / "b")), quiet=True)
    names = [p.relative_to(tmp_path / "a") for p in sorted((tmp_path / "a").rglob("*")) if p.suffix in (".h5", ".json")]
    equal = [name for name in names if (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()]
    assert [name.as_posix() for name in names if name not in equal] == ["provenance.json"]
    assert sum(name.suffix == ".h5" for name in equal) == 5

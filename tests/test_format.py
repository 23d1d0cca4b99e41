"""FORMAT.md is the format: a reader made from it alone, its test vectors, its field names, the shape of the files."""

from __future__ import annotations

import binascii
import hashlib
import importlib.util
import inspect
import json
import re
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from math import ceil, floor
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import softcache
from softcache import dump
from softcache.cache.manifest import canonical_json
from softcache.cache.reader import CacheReader
from softcache.cache.samples import build_table, pack_labels, seeded_order
from softcache.cache.schema import Layout
from softcache.codecs import CODECS
from softcache.codecs.floats import round_up_to_half
from softcache.config import DumpConfig
from softcache.data.identity import file_digest, item_digest, pixel_digest, sample_id
from softcache.data.philox import Draws, philox, step_key
from softcache.data.views import STEPS, Policy, make_step
from softcache.errors import TeacherError
from softcache.teacher import OUTPUTS, Teacher

FORMAT = (Path(softcache.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")
VECTORS = {name: json.loads(body) for name, body in re.findall(r"^```json ([\w-]+)\n(.*?)^```$", FORMAT, re.M | re.S)}
COUNT, VIEWS, PADDING = 600, 3, 2


def section(number: int) -> str:
    """The text of one numbered section of FORMAT.md."""
    found = re.search(rf"^## {number}\. .*?(?=^## |\Z)", FORMAT, re.M | re.S)
    assert found is not None
    return found[0]


def first_cells(text: str) -> list[str]:
    """The names in the first column of its tables."""
    return re.findall(r"^\| `([^`]+)` \|", text, re.M)


# --- a stranger's code: nothing below this line up to the next one may know softcache


class StrangersReader:
    """Logits by (member, key, view), read from a cache as FORMAT.md says."""

    def __init__(self, folder):
        with open(f"{folder}/manifest.json", "rb") as file:
            data = file.read()
        self.folder, self.id, self.manifest = folder, hashlib.sha256(data).hexdigest(), json.loads(data)
        if self.manifest["format"] != 0:
            raise ValueError(f"format {self.manifest['format']} is not 0")
        self.files = {entry["path"]: entry for entry in self.manifest["files"]}
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
                self.opened[path] = {name: file[name][...] for name in file}
        return self.opened[path]

    def record(self, folder, key, view):
        row = self.row[int.from_bytes(hashlib.blake2b(key.encode("utf-8"), digest_size=8).digest(), "little")]
        layout = self.manifest["layout"]
        view_ranges = -(-layout["num_views"] // layout["shard_views"])
        part = row // layout["shard_rows"] * view_ranges + view // layout["shard_views"]
        place = (view % layout["shard_views"], row % layout["shard_rows"])
        return {name: values[place] for name, values in self.open(f"{folder}/part-{part:05d}.h5").items()
                if not name.endswith("_crc32")}  # fmt: skip

    def logits(self, member, key, view):
        found = self.record(f"members/{member}", key, view)
        return found["logits"].astype(np.float32), float(found["eps"])


def words(counter, key):
    """The four words of one block: NumPy's own Philox, whose counter is one behind."""
    start = sum(word << 64 * place for place, word in enumerate(counter)) - 1
    return [int(w) for w in np.random.Philox(counter=start % 2**256, key=key[0] | key[1] << 64).random_raw(4)]


def hash_word(text):
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def integer(low, high, word):
    return low + word * (high - low + 1) // 2**64


def window(image, dy, dx):
    height, width = image.shape[:2]
    out = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            if 0 <= y + dy < height and 0 <= x + dx < width:
                out[y, x] = image[y + dy, x + dx]
    return out


def crop_flip(image, seed, key, view, padding, flip, occurrence=0):
    w = words((hash_word(key), view, 0, 0), (seed % 2**64, hash_word(f"crop_flip#{occurrence}")))
    out = window(image, integer(-padding, padding, w[0]), integer(-padding, padding, w[1]))
    return out[:, ::-1] if (w[2] >> 11) * 2.0**-53 < flip else out


def shift(image, seed, key, view, pixels):
    w = words((hash_word(key), view, 0, 0), (seed % 2**64, hash_word("shift#0")))
    return window(image, integer(-pixels, pixels, w[0]), integer(-pixels, pixels, w[1]))


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


@pytest.fixture(scope="module")
def settings(toy: Path) -> DumpConfig:
    """Two members, three views, 256 rows a shard."""
    teachers = (f"{toy}:exact?seed=1&name=first", f"{toy}:network?seed=2&name=second")
    policy = (f"crop_flip:padding={PADDING}",)
    config = DumpConfig(data=f"{toy}:images?count={COUNT}", teacher=teachers, out="", policy=policy, views=VIEWS)
    return replace(config, view_seed=5, shard_rows=256, threads=1, workers=0, device="cpu")


@pytest.fixture(scope="module")
def cache(settings: DumpConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 3 row ranges x 2 view ranges: shards are made to hold at most 2 views."""
    path = tmp_path_factory.mktemp("format") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        record = 4 * 2 + 2  # float16 logits of four classes, and eps
        patch.setattr("softcache.cache.schema.MAX_SHARD_BYTES", 2 * 256 * record)
        dump.run(replace(settings, out=str(path)), quiet=True)
    return path


@pytest.fixture(scope="module")
def user(toy: Path) -> ModuleType:
    """The user's file as a module of its own: its data set and teachers without softcache."""
    spec = importlib.util.spec_from_file_location("live_toy", toy)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def strangers_reader() -> tuple[Any, str]:
    """The reader's class, run where nothing but h5py, json, NumPy and hashlib can be named; and its source."""
    source = inspect.getsource(StrangersReader)
    names: dict[str, Any] = {"h5py": h5py, "json": json, "np": np, "hashlib": hashlib}
    exec(source, names)
    return names["StrangersReader"], source


def test_a_reader_of_40_lines_gives_the_live_teachers_logits(cache: Path, user: ModuleType) -> None:
    kind, source = strangers_reader()
    assert len(source.splitlines()) <= 40
    reader = kind(cache)
    dataset = user.images(COUNT)
    assert sorted(reader.keys) == dataset.sample_keys
    assert reader.keys != dataset.sample_keys  # rows are permuted, so a join by position would show
    nets = {"first": user.exact(4, (8, 8), seed=1), "second": user.network(4, (8, 8), seed=2)}
    for view in range(VIEWS):
        images = [crop_flip(dataset[i][0], 5, key, view, PADDING, 0.5) for i, key in enumerate(dataset.sample_keys)]
        batch = torch.from_numpy(np.stack(images))
        for member, net in nets.items():
            with torch.inference_mode():
                live = net(batch if member == "first" else batch.float() / 255).numpy()
            found = [reader.logits(member, key, view) for key in dataset.sample_keys]
            stored, eps = np.stack([row for row, _ in found]), np.array([bound for _, bound in found])
            error = np.abs(stored - live).max(axis=1)
            # `exact` is exact in any batch; the network's last bits depend on the batch
            slack = 0.0 if member == "first" else 1e-6 * np.abs(live).max()
            assert (error <= eps + slack).all()
            assert eps.max() < 0.01 * live.std()  # so the row of another sample or view does not fit within eps


def test_the_reader_finds_what_softcache_finds(cache: Path) -> None:
    reader = strangers_reader()[0](cache)
    opened = softcache.open(cache)
    assert (reader.id, reader.manifest["layout"]["shard_views"]) == (opened.id, 2)
    rows = np.repeat(np.arange(COUNT), VIEWS)
    views = np.tile(np.arange(VIEWS), COUNT)
    targets = opened.gather(rows, views)
    for member in opened.members:
        ours, eps = targets.logits(member).numpy(), opened.eps(member, rows, views)
        found = [reader.logits(member, reader.keys[row], view) for row, view in zip(rows, views, strict=True)]
        np.testing.assert_array_equal(np.stack([row for row, _ in found]), ours)
        np.testing.assert_array_equal([bound for _, bound in found], eps)


def test_pixel_digests_are_those_of_views_rendered_without_softcache(cache: Path, user: ModuleType) -> None:
    reader = strangers_reader()[0](cache)
    dataset = user.images(COUNT)
    for i in range(0, COUNT, 3):
        key = dataset.sample_keys[i]
        for view in range(VIEWS):
            seen = crop_flip(dataset[i][0], 5, key, view, PADDING, 0.5)
            digest = hashlib.blake2b(canonical_item(seen), digest_size=4).digest()
            assert reader.record("views", key, view)["pixel_digests"] == int.from_bytes(digest, "little")


def test_labels_digests_and_fingerprint_of_the_samples(cache: Path, user: ModuleType) -> None:
    reader = strangers_reader()[0](cache)
    dataset, samples, info = user.images(COUNT), reader.open("samples.h5"), reader.manifest["samples"]
    place = {key: i for i, key in enumerate(dataset.sample_keys)}
    for row, key in enumerate(reader.keys):
        image, label = dataset[place[key]]
        assert samples["labels"][row] == label
        assert samples["digests"][row].tobytes() == hashlib.blake2b(canonical_item(image), digest_size=16).digest()
    order = sorted(range(COUNT), key=lambda row: int(samples["ids"][row]))
    joined = b"".join(samples[name][order].tobytes() for name in ("ids", "labels", "digests"))
    assert info["fingerprint"] == hashlib.sha256(joined).hexdigest()
    assert (info["count"], info["digest_kind"], info["has_keys"], info["multi_label"]) == (COUNT, "item", True, False)


# --- test vectors: FORMAT.md against the code, and against an oracle that is not ours


def test_every_vector_has_a_test() -> None:
    names = re.findall(r"VECTORS\[\"([\w-]+)\"\]", Path(__file__).read_text(encoding="utf-8"))
    assert set(names) == set(VECTORS)


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
        with pytest.raises(AssertionError):
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


def test_layout() -> None:
    vector = VECTORS["layout"]
    fields = {name: vector[name] for name in ("num_rows", "num_views", "shard_rows", "shard_views")}
    layout = Layout(**fields)
    assert set(fields) == set(vars(layout))
    assert len(layout) == vector["parts"]
    for record in vector["records"]:
        span = layout.span(record["part"])
        assert record["element"] == [record["view"] - span.view_start, record["row"] - span.row_start]
        assert record["row"] < span.row_stop
        assert record["view"] < span.view_stop


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
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (.*?) \|", section(10), re.M)
    named = {name: (int(version), set(re.findall(r"`(\w+)`", rest))) for name, version, rest in rows}
    ours = {
        name: (kind.version, set(list(inspect.signature(kind.function).parameters)[2:])) for name, kind in STEPS.items()
    }
    assert named == ours
    codecs = re.search(r"^\| codec \|.*?\n\n", section(8), re.M | re.S)
    assert codecs is not None
    assert set(first_cells(codecs[0])) == set(CODECS)
    assert set(OUTPUTS) <= set(first_cells(section(8)))


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
        exact = resample(resample(image, 1, size), 0, height or size)
        undecided = np.abs(exact - np.floor(exact) - 0.5) < 1e-3
        np.testing.assert_array_equal(made[~undecided], np.rint(exact)[~undecided])
        assert np.abs(made - exact).max() < 0.501


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
@pytest.mark.parametrize("output", OUTPUTS)
def test_what_logits_mean_by_output(output: str, multi_label: bool) -> None:
    floor_ = 2.0**-24
    probs = np.array([[0.7, 0.3 - 1e-8, 1e-8], [0.25, 0.25, 0.5], [0.125, 0.875, 0.0]])
    if output == "log_probs":
        probs = np.maximum(probs, 1e-30)
    given = {"logits": np.array([[1.5, -2.0, 0.25]] * 3), "log_probs": np.log(np.maximum(probs, 1e-30)), "probs": probs}
    order = [2, 0, 1]
    teacher = Teacher(
        "t", "", lambda _: given[output], list, output=output, num_classes=3, multi_label=multi_label, class_order=order
    )
    made = teacher(None)
    log_p, log_q = np.log(np.maximum(probs, floor_)), np.log(np.maximum(1 - probs, floor_))
    if output == "logits" or (output == "log_probs" and not multi_label):
        expected, floored = given[output], 0
    elif multi_label:
        expected, floored = log_p - log_q, int((probs < floor_).sum() + (1 - probs < floor_).sum())
    else:
        expected, floored = log_p, int((probs < floor_).sum())
    np.testing.assert_allclose(made.logits.numpy(), expected[:, order], rtol=1e-6)
    assert made.floored == floored


def test_probabilities_outside_0_to_1_are_refused() -> None:
    for bad in (-1e-3, 1.001):
        teacher = Teacher("t", "", lambda _, bad=bad: np.array([[bad, 0.5]]), list, output="probs", num_classes=2)
        with pytest.raises(TeacherError, match=r"outside \[0, 1\]"):
            teacher(None)


# --- names: the manifest and the files against the tables of FORMAT.md

ANY_KEY = {"files[].arrays": "NAME", "statistics": "MEMBER", "views.steps[].parameters": "NAME"}


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


def test_the_manifest_has_the_fields_of_the_page_and_no_others(cache: Path) -> None:
    data = (cache / "manifest.json").read_bytes()
    manifest = json.loads(data)
    documented = first_cells(section(4))
    assert len(documented) == len(set(documented))
    assert set(field_names(manifest)) == set(documented)
    assert data == json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    assert (cache / "manifests" / f"{hashlib.sha256(data).hexdigest()}.json").read_bytes() == data


def test_the_data_sets_are_those_of_the_page(cache: Path) -> None:
    documented = {"samples": set(first_cells(section(6)))}
    for folder, name in re.findall(r"^\| `(\w+)/` \| `(\w+)` \|", section(7), re.M):
        documented.setdefault({"members": "logits"}.get(folder, folder), set()).add(name)
    for entry in json.loads((cache / "manifest.json").read_bytes())["files"]:
        names = documented[entry["kind"]]
        assert set(entry["arrays"]) == names | {f"{name}_crc32" for name in names}


def test_plan_journal_and_provenance_hold_what_the_page_says(cache: Path) -> None:
    text, manifest = section(12), json.loads((cache / "manifest.json").read_bytes())
    plan = json.loads((cache / "dump/plan.json").read_bytes())
    assert plan["plan"] == {k: v for k, v in manifest.items() if k not in ("files", "statistics")}
    assert plan["samples_file"] == manifest["files"][0]
    journal = [json.loads(line) for line in (cache / "dump/part-1-of-1.jsonl").read_bytes().splitlines()]
    assert [entry["span"] for entry in journal] == list(range(6))
    assert [file for entry in journal for file in entry["files"]] == manifest["files"][1:]
    provenance = json.loads((cache / "provenance.json").read_bytes())
    for name in {*plan, *journal[0], *provenance}:
        assert f"`{name}`" in text, name
    names = {path.relative_to(cache).as_posix().split("/")[0] for path in cache.rglob("*")}
    assert names == {re.split("[/ ]", cell)[0] for cell in first_cells(section(2))}


def test_files_stand_in_the_order_of_the_page(cache: Path) -> None:
    manifest = json.loads((cache / "manifest.json").read_bytes())
    paths = ["samples.h5"]
    for part in range(6):
        paths += [f"{folder}/part-{part:05d}.h5" for folder in ("views", "members/first", "members/second")]
    assert [entry["path"] for entry in manifest["files"]] == paths
    for part, entry in enumerate(manifest["files"][2::3]):
        first_row, first_view = part // 2 * 256, part % 2 * 2
        assert entry["rows"] == [first_row, min(first_row + 256, COUNT)]
        assert entry["views"] == [first_view, min(first_view + 2, VIEWS)]


# --- the files


def test_files_are_plain_contiguous_aligned_hdf5(cache: Path) -> None:
    for entry in json.loads((cache / "manifest.json").read_bytes())["files"]:
        data = (cache / entry["path"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
        assert data[:9] == b"\x89HDF\r\n\x1a\n\x03"  # no user block, superblock version 3: HDF5 1.10
        with h5py.File(cache / entry["path"], "r") as file:
            assert set(file.attrs) == {"softcache_format", "softcache_kind"}
            assert (file.attrs["softcache_format"], file.attrs["softcache_format"].dtype) == (0, np.dtype("<u4"))
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


def test_dumps_made_seconds_apart_have_equal_bytes(settings: DumpConfig, tmp_path: Path) -> None:
    settings = replace(settings, data=settings.data.replace(str(COUNT), "40"))
    started = int(time.time())
    dump.run(replace(settings, out=str(tmp_path / "a")), quiet=True)
    while int(time.time()) < started + 2:  # HDF5 would keep whole seconds
        time.sleep(0.02)
    dump.run(replace(settings, out=str(tmp_path / "b")), quiet=True)
    names = [p.relative_to(tmp_path / "a") for p in sorted((tmp_path / "a").rglob("*")) if p.suffix in (".h5", ".json")]
    equal = [name for name in names if (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()]
    assert [name.as_posix() for name in names if name not in equal] == ["provenance.json"]
    assert sum(name.suffix == ".h5" for name in equal) == 4

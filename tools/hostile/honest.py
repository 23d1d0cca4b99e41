"""One small honest cache, from which all hostile ones are made."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from softcache.cache.plan import FeatureInfo, MemberInfo, Plan, Round, SampleInfo, ViewInfo
from softcache.cache.samples import build_table
from softcache.cache.schema import ArraySpec, Layout, Span
from softcache.cache.statistics import MemberStatistics
from softcache.cache.write.writer import CacheWriter, Setup

ROWS, VIEWS, CLASSES = 300, 2, ("ant", "bee", "cat", "dog", "eel", "fox")
SAMPLES, PROBE = "samples.h5", "probe.h5"
CODED, DENSE, CONSTANTS = "members/coded/part-00000.h5", "members/coded/dense-00000.h5", "members/coded/constants.h5"
PLAIN, CLASSIFIER, PIXELS = "members/plain/part-00000.h5", "members/head/part-00000.h5", "views/part-00000.h5"
CODES = 4  # bytes of codes in a record of the member `coded`
CODED_BYTES, HEAD_BYTES = 8 + CODES, 21


def make_honest(path: Path) -> None:
    """600 records of three members: `coded` has records, dense rows and constants, `plain` a feature, `head` packed ids."""
    draw = np.random.default_rng(4)
    layout = Layout(num_rows=ROWS, num_views=VIEWS, shard_rows=256, shard_views=VIEWS)
    with CacheWriter(path, _plan(layout), lambda: _setup(draw)) as writer:
        for span in writer.my_spans():
            count = span.rows * span.views
            with writer.span(span, _data_sets(span)) as out:
                out.append(None, {"pixel_digests": draw.integers(0, 2**32, count, dtype="<u4")})
                out.append_dense("coded", draw.normal(size=(3, len(CLASSES))).astype("<f2"))
                for name, arrays in _records(draw, count).items():
                    out.append(name, arrays, MemberStatistics(records=count))
        assert writer.commit(lambda manifest: f"# {manifest.id}\n", {}) is not None


def _plan(layout: Layout) -> Plan:
    promise = {"max_kl": "0.0001", "at_temperature": "4.0"}
    coded = _fields([("level", "<f4", ()), ("dense", "<u4", ()), ("codes", "|u1", (CODES,))])
    head = _fields([("largest", "<f4", ()), ("lowest", "<f4", ()), ("step", "<f4", ()), ("below", "<f2", (1,))])
    head += _fields([("ids", "|u1", (1,)), ("codes", "|u1", (6,))], start=14)
    made_with = dict.fromkeys(("softcache", "torch", "torchvision", "numpy", "pillow", "hdf5"), "1.0")
    return Plan(
        samples=SampleInfo("toy", ROWS, "", "item", True, False, "natural", "0"),
        class_names=CLASSES,
        views=ViewInfo(VIEWS, 0, "0", "derived", ({"name": "shift", "version": 1, "parameters": {"pixels": "1"}},)),
        members=(
            _member("coded", "lowrank", promise, coded, promise=promise),
            _member(
                "plain", "float16", {}, [], features=[("trunk:pool", "pool", ["feature0"], "float16", [[4, 2, 2]])]
            ),
            _member("head", "headtail", {"k": "2", "bits": "8"}, head, class_order=(1, 0, 2, 3, 4, 5)),
        ),
        rounds=(
            Round(
                layout,
                ("coded", "plain", "head"),
                True,
                {**made_with, "device": "cpu", "batch_size": 256, "threads": 1, "autocast": "none"},
            ),
        ),
    )


def _member(
    name: str,
    codec: str,
    parameters: Mapping[str, str],
    fields: Sequence[Mapping[str, Any]],
    *,
    features: Sequence[tuple[Any, ...]] = (),
    class_order: Sequence[int] | None = None,
    promise: Mapping[str, str] | None = None,
) -> MemberInfo:
    stored = {"name": codec, "parameters": parameters, "fields": fields}
    described = tuple(FeatureInfo(*feature) for feature in features)
    return MemberInfo(name, "toy", "0" * 64, "logits", "float32", class_order, stored, described, promise)


def _fields(parts: list[tuple[str, str, tuple[int, ...]]], *, start: int = 0) -> list[dict[str, Any]]:
    fields = []
    for name, dtype, shape in parts:
        fields.append({"name": name, "offset": start, "dtype": dtype, "shape": list(shape)})
        start += ArraySpec(name, dtype, shape).nbytes
    return fields


def _data_sets(span: Span) -> dict[str, list[ArraySpec]]:
    place = (span.views, span.rows)
    eps = ArraySpec("eps", "<f2", place)
    feature = [ArraySpec("feature0", "<f2", (*place, 4)), ArraySpec("feature0_error", "<f2", place)]
    return {
        "coded": [ArraySpec("records", "|u1", (*place, CODED_BYTES)), eps],
        "plain": [ArraySpec("logits", "<f2", (*place, len(CLASSES))), eps, *feature],
        "head": [ArraySpec("records", "|u1", (*place, HEAD_BYTES)), eps],
    }


def _records(draw: np.random.Generator, count: int) -> dict[str, dict[str, np.ndarray]]:
    def normal(*shape: int, dtype: str = "<f2") -> np.ndarray:
        return draw.normal(size=(count, *shape)).astype(dtype)

    dense = np.zeros(count, "<u4")
    dense[[0, 7, count - 1]] = [1, 2, 3]
    codes = draw.integers(0, 256, (count, CODES), dtype=np.uint8)
    scales = np.concatenate([normal(3, dtype="<f4").view("u1"), np.abs(normal(1)).view("u1")], axis=1)
    ids = np.full((count, 1), 2 | 5 << 3, "u1")  # two ids of three bits
    head = np.concatenate([scales, ids, draw.integers(0, 256, (count, 6), dtype=np.uint8)], axis=1)
    return {
        "coded": {"records": _side_by_side(normal(1, dtype="<f4"), dense[:, None], codes), "eps": np.abs(normal())},
        "plain": {
            "logits": normal(6),
            "eps": np.abs(normal()),
            "feature0": normal(4),
            "feature0_error": np.abs(normal()),
        },
        "head": {"records": head, "eps": np.abs(normal())},
    }


def _side_by_side(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate([np.ascontiguousarray(part).view("u1") for part in parts], axis=1)


def _setup(draw: np.random.Generator) -> Setup:
    keys = [f"toy/{i:04d}" for i in range(ROWS)]
    ids = np.array([int.from_bytes(hashlib.blake2b(k.encode(), digest_size=8).digest(), "little") for k in keys], "<u8")
    labels, digests = draw.integers(-1, len(CLASSES), ROWS), draw.integers(0, 256, (ROWS, 16), dtype=np.uint8)
    samples = build_table(keys, ids, labels, digests, len(CLASSES), np.arange(ROWS), store_keys=True)
    probe = {
        "rows": np.array([3, 299], "<u8"),
        "views": np.array([0, 1], "<u4"),
        "shapes": np.array([[2, 2, 1], [2, 2, 1]], "<u4"),
        "pixels": draw.integers(0, 256, 8, dtype=np.uint8),
    }
    return Setup(samples, probe, {"coded": _constants(draw)})


def _constants(draw: np.random.Generator) -> dict[str, np.ndarray]:
    """Of `lowrank`: eight coordinates of four bits."""
    return {
        "codec_mean": draw.normal(size=len(CLASSES)).astype("<f4"),
        "codec_basis": draw.normal(size=(len(CLASSES), 8)).astype("<f2"),
        "codec_step": np.full(8, 0.25, "<f4"),
        "codec_bits": np.array([CODES], np.uint8),
    }

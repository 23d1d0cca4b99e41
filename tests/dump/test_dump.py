"""The dump: what it writes equals what the live teacher says, and no interruption, resume or split changes a byte."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORLDS, needs

import softcache
from softcache import cli, train
from softcache.cache.manifest import Manifest
from softcache.config import DumpConfig, TrainConfig
from softcache.data.views import Policy, make_step
from softcache.dump import flow as dump
from softcache.dump.made_with import made_with
from softcache.errors import (
    CodecRangeError,
    ConfigError,
    DataError,
    DiskSpaceError,
    DumpError,
    DuplicateKeyError,
    LockedError,
    ModelError,
    PlanMismatchError,
    SoftcacheError,
    TeacherError,
    UnfinishedCacheError,
)
from softcache.files import durable
from softcache.models import load_model
from softcache.version import __version__

CLASSES = ("ant", "bee", "cat", "dog")
SHARD_ROWS = 256


class World:
    """A folder with pieces.py and its arrays."""

    def __init__(self, path: Path) -> None:
        self.path = path
        generator = np.random.default_rng(3)
        self.images = generator.integers(0, 256, (1600, 8, 8), dtype=np.uint8)
        self.labels = generator.integers(-1, 4, 1600).astype(np.int32)
        self.images[::97, 0, 0] = 255
        self.images[1, 0, 0] = 255
        path.mkdir(exist_ok=True)
        shutil.copy(WORLDS / "whole_numbers.py", path / "pieces.py")
        self.save()

    def save(self) -> None:
        np.save(self.path / "images.npy", self.images)
        np.save(self.path / "labels.npy", self.labels)

    def spec(self, name: str) -> str:
        return f"{self.path}/pieces.py:{name}"

    def config(self, out: str = "cache", **settings: Any) -> DumpConfig:
        defaults: dict[str, Any] = {
            "data": "toy",
            "teacher": ("exact",),
            "codec": "float32",
            "batch_size": 64,
            "threads": 1,
            "device": "cpu",
            "shard_rows": SHARD_ROWS,
        }
        settings = {**defaults, **settings}
        settings["data"] = self.spec(settings["data"])
        settings["teacher"] = tuple(t if "/" in t else self.spec(t) for t in settings["teacher"])
        return DumpConfig(out=str(self.path / out), **settings)

    def dump(self, out: str = "cache", **settings: Any) -> Manifest:
        manifest = dump.run(self.config(out, **settings), quiet=True).manifest
        assert manifest is not None
        return manifest

    def argv(self, out: str = "cache", **settings: Any) -> list[str]:
        """The same settings as a command line."""
        argv = ["dump", "--quiet"]
        for name, value in vars(self.config(out, **settings)).items():
            if value == DumpConfig.__dataclass_fields__[name].default:
                continue
            for one in value if name in ("teacher", "policy") else [value]:
                argv += ["--" + name.replace("_", "-"), str(one)]
        return argv

    def open(self, out: str = "cache") -> softcache.Cache:
        return softcache.open(self.path / out)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("dump"))


def exact_logits(images: np.ndarray, sign: int = 1) -> np.ndarray:
    """The teacher `exact`, in whole numbers. (N, 8, 8) -> (N, 4)"""
    generator = np.random.default_rng(11)
    weight, bias = generator.integers(-3, 4, (4, 64)), generator.integers(-50, 50, 4)
    return images.reshape(len(images), -1).astype(np.int64) @ (sign * weight).T + bias


def everything(cache: softcache.Cache, member: str | None = None, view: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(N,) position in the toy set of each row, from its key; and (N, C) stored logits of one view."""
    rows = np.arange(len(cache))
    index = np.array([int(cache.samples.key(int(r))[4:8]) for r in rows])
    return index, cache.gather(rows, np.full(len(rows), view)).logits(member).numpy()


# ---- what is written ------------------------------------------------------------------------------------------------


def test_every_logit_of_every_view_and_member_is_the_live_teachers(world: World) -> None:
    policy = ("shift:pixels=2",)
    world.dump(teacher=("exact", "exact?sign=-1"), policy=policy, views=3, view_seed=5)
    cache = world.open()
    assert cache.members == ("exact", "exact-2")
    assert len(cache.manifest.plan.rounds[0].layout) == 2
    rendered = Policy((make_step("shift", {"pixels": 2}),), 5)
    for view in range(3):
        for member, sign in (("exact", 1), ("exact-2", -1)):
            index, stored = everything(cache, member, view)
            keys = [f"toy/{i:04d}.png" for i in index]
            seen = np.stack(
                [
                    rendered.render(world.images[i], blake64(key), view)
                    for i, key in zip(index.tolist(), keys, strict=True)
                ]
            )
            np.testing.assert_array_equal(stored, exact_logits(seen, sign))
            assert np.array_equal(np.sort(index), np.arange(300))
    assert not np.array_equal(everything(cache, "exact", 0)[1], everything(cache, "exact", 1)[1])


def blake64(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def test_shards_hold_a_linear_network_in_eval_mode_too(world: World) -> None:
    """BatchNorm's running statistics and switched-off dropout, not those of the batch."""
    torch.manual_seed(4)
    teacher = train.run(
        TrainConfig(
            data=world.spec("toy"),
            student="softcache:cnn?width=4",
            out=str(world.path / "run"),
            epochs=1,
            threads=1,
            device="cpu",
        ),
        quiet=True,
    )
    world.dump(teacher=(str(teacher.path),))
    index, stored = everything(world.open())
    model = load_model(str(teacher.path), num_classes=4).eval()
    with torch.no_grad():
        live = model(model.input.collate(list(world.images[index])))
    torch.testing.assert_close(torch.from_numpy(stored), live, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("codec", ["float16", "float32"])
def test_statistics_in_the_manifest_are_numpys(world: World, codec: str) -> None:
    manifest = world.dump(codec=codec, data="toy?count=520")
    statistics = manifest.statistics["exact"]
    logits, labels = exact_logits(world.images[:520]).astype(np.float64), world.labels[:520]
    shifted = logits - logits.max(axis=1, keepdims=True)
    p = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.nansum(np.where(p > 0, p * np.log(p), 0), axis=1)
    error = np.abs(logits.astype(codec) - logits).max()
    known = labels >= 0
    assert statistics.records == 520
    assert statistics.labelled == known.sum() < 520
    assert statistics.correct == (logits.argmax(axis=1) == labels)[known].sum()
    assert statistics.accuracy == pytest.approx((logits.argmax(axis=1) == labels)[known].mean())
    assert statistics.entropy == pytest.approx(entropy.mean(), abs=1e-9)
    assert statistics.floored == 0
    assert error <= statistics.max_eps <= error * (1 + 2**-9)
    assert (error > 0) == (codec == "float16")


def test_divergences_in_the_manifest_are_numpys(world: World) -> None:
    """Measured on the first 32 rows of every batch; batches end at the border of a shard."""
    manifest = world.dump(codec="float16", data="toy?count=520", teacher=("softmax_of",), batch_size=50)
    index, stored = everything(world.open())
    place = np.arange(520) % SHARD_ROWS % 50 < 32
    given = log_softmax(exact_logits(world.images[index]) / 500).astype(np.float32).astype(np.float64)[place]
    kept = stored.astype(np.float64)[place]
    statistics = manifest.statistics["softmax_of"]
    assert statistics.measured == place.sum() == 5 * 32 + 6 + 5 * 32 + 6 + 8
    assert statistics.agreed == (given.argmax(axis=1) == kept.argmax(axis=1)).sum()
    assert sorted(map(float, statistics.kl)) == [1, 2, 4, 10, 20]
    for name, found in statistics.kl.items():
        log_p, log_q = (log_softmax(logits / float(name)) for logits in (given, kept))
        rows = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
        assert found.sum == pytest.approx(rows.sum(), rel=1e-3)
        assert found.worst == pytest.approx(rows.max(), rel=1e-3)
        assert statistics.mean_kl(name) == pytest.approx(rows.mean(), rel=1e-3)
        assert rows.mean() > 1e-9  # else nothing was compared


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(N, C) float64 -> logarithms of the probabilities."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def test_float16_error_bound_of_every_record(world: World) -> None:
    world.dump(codec="float16")
    cache = world.open()
    index, stored = everything(cache)
    error = np.abs(stored - exact_logits(world.images[index])).max(axis=1)
    eps = cache.eps("exact", np.arange(300), np.zeros(300, np.int64))
    assert (error <= eps).all() and error.max() > 0
    assert (eps <= error * (1 + 2**-10) + 2**-24).all()


def test_classes_in_another_order_are_permuted(world: World) -> None:
    manifest = world.dump(teacher=("exact", "opposite"))
    cache = world.open()
    index, straight = everything(cache, "exact")
    _, turned = everything(cache, "opposite")
    np.testing.assert_array_equal(straight, exact_logits(world.images[index]))
    np.testing.assert_array_equal(turned, exact_logits(world.images[index])[:, ::-1])
    assert [m.class_order for m in manifest.plan.members] == [None, [3, 2, 1, 0]]


def test_a_run_folder_trained_with_another_class_order(world: World) -> None:
    run = train.run(
        TrainConfig(
            data=world.spec("toy?flipped=true"),
            student=world.spec("student"),
            out=str(world.path / "run"),
            epochs=1,
            threads=1,
            device="cpu",
        ),
        quiet=True,
    )
    world.dump(teacher=(f"{world.spec('student')}@{run.path}",))
    index, stored = everything(world.open())
    model = load_model(f"{world.spec('student')}@{run.path}", num_classes=4).eval()
    assert model.class_names == CLASSES[::-1]
    with torch.no_grad():
        live = model(model.input.collate(list(world.images[index]))).numpy()
    np.testing.assert_allclose(stored, live[:, ::-1], rtol=1e-5, atol=1e-5)
    assert np.abs(stored - live).max() > 1e-2


def test_scikit_learn_probabilities_with_zeros(world: World) -> None:
    neighbors = pytest.importorskip("sklearn.neighbors", reason="needs the extra softcache[demo]")

    manifest = world.dump(teacher=("neighbours",))
    index, stored = everything(world.open())
    known = np.flatnonzero(world.labels[:120] >= 0)
    oracle = neighbors.KNeighborsClassifier(3).fit(world.images[known].reshape(len(known), -1), world.labels[known])
    p = oracle.predict_proba(world.images[index].reshape(len(index), -1))
    np.testing.assert_allclose(stored, np.log(np.maximum(p, 2.0**-24)), rtol=1e-6)
    assert manifest.statistics["neighbours"].floored == (p == 0).sum() > 0
    assert manifest.plan.members[0].output == "probs"


def test_scikit_learn_decision_function_and_string_classes(world: World) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="needs the extra softcache[demo]")

    manifest = world.dump(teacher=("ridge",))
    index, stored = everything(world.open())
    known = np.flatnonzero(world.labels[:120] >= 0)
    oracle = linear_model.RidgeClassifier().fit(world.images[known].reshape(len(known), -1), world.labels[known])
    scores = oracle.decision_function(world.images[index].reshape(len(index), -1))
    np.testing.assert_allclose(stored, scores[:, ::-1], rtol=1e-4, atol=1e-4)
    assert manifest.plan.members[0].output == "logits"


@pytest.mark.parametrize("how", ["declared", "in the spec"])
@pytest.mark.parametrize("kind", ["log_probs", "probs"])
def test_probabilities_are_stored_as_their_logarithms(world: World, kind: str, how: str) -> None:
    spec = f"softmax_of?kind={kind}" + (f"&declared=false&output={kind}&name=told" if how == "in the spec" else "")
    manifest = world.dump(teacher=(spec,))
    index, stored = everything(world.open())
    logits = exact_logits(world.images[index]) / 500
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(stored, log_p if kind == "log_probs" else np.maximum(log_p, -24 * np.log(2)), atol=2e-6)
    assert manifest.plan.members[0].output == kind
    assert manifest.plan.members[0].name == ("told" if how == "in the spec" else "softmax_of")


def test_multi_label_probabilities_become_the_logits_of_each_class(world: World) -> None:
    manifest = world.dump(data="toy?multi=true", teacher=("yes_no",))
    cache = world.open()
    index, stored = everything(cache)
    p = world.images[index].reshape(len(index), -1)[:, :4] / 255
    floor = 2.0**-24
    np.testing.assert_allclose(stored, np.log(np.maximum(p, floor)) - np.log(np.maximum(1 - p, floor)), rtol=1e-6)
    assert manifest.statistics["yes_no"].floored == ((p == 0) | (p == 1)).sum() > 0
    assert manifest.statistics["yes_no"].accuracy is None
    images, labels = world.images[index], world.labels[index]
    truth = np.stack([labels == 0, labels == 1, images[:, 0, 0] > 99, images[:, 0, 1] > 200], axis=1)
    np.testing.assert_array_equal(cache.samples.labels_of(np.arange(len(cache))), truth)


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        pytest.param({"keep_labels": ("bee", "3")}, lambda y: (y == 1) | (y == 3), id="keep"),
        pytest.param({"drop_labels": ("ant", "2")}, lambda y: (y != 0) & (y != 2), id="drop"),
        pytest.param({"samples": "keys.txt"}, lambda y: np.arange(300) % 7 == 2, id="file"),
        pytest.param(
            {"samples": "keys.txt", "drop_labels": ("dog",)}, lambda y: (np.arange(300) % 7 == 2) & (y != 3), id="both"
        ),
    ],
)
def test_chosen_samples(world: World, settings: dict[str, Any], chosen: Callable[[np.ndarray], np.ndarray]) -> None:
    (world.path / "keys.txt").write_text("".join(f"toy/{i:04d}.png\n" for i in range(2, 300, 7)))
    if "samples" in settings:
        settings = {**settings, "samples": str(world.path / "keys.txt")}
    world.dump(**settings)
    cache = world.open()
    index, stored = everything(cache)
    assert np.array_equal(np.sort(index), np.flatnonzero(chosen(world.labels[:300])))
    np.testing.assert_array_equal(stored, exact_logits(world.images[index]))
    assert cache.class_names == CLASSES


def test_sizes_are_told_before_the_first_row(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes of a record: four classes and a bound of two bytes; nothing is said when nothing is wanted."""
    settings: dict[str, Any] = {"teacher": ("exact", "opposite"), "policy": ("shift",), "views": 2}
    world.dump(out="quiet", **settings)
    assert all(line.startswith("softcache: warning: ") for line in capsys.readouterr().err.splitlines())
    dump.run(world.config(out="told", codec="float16", **settings), quiet=False)
    told = capsys.readouterr().err
    assert "300 samples x 2 views, 2 parts; 12.0 kB in all" in told
    lines = {line.split()[0]: line.split() for line in told.splitlines() if line.startswith(("exact", "opposite"))}
    assert set(lines) == {"exact", "opposite"}
    for line in lines.values():
        assert line[1:] == ["float16", "10", "6.0", "kB"]


def test_no_keys_leaves_no_key_anywhere(world: World) -> None:
    world.dump(no_keys=True, out="private")
    world.dump(out="open")
    keys = [f"toy/{i:04d}.png" for i in range(300)]
    found = {
        out: [
            p
            for p in (world.path / out).rglob("*")
            if p.is_file() and any(key.encode() in p.read_bytes() for key in keys)
        ]
        for out in ("private", "open")
    }
    assert [p.name for p in found["open"]] == ["samples.h5"]
    assert found["private"] == []
    cache = world.open("private")
    assert {cache.samples.key(r) for r in range(300)} == {f"{blake64(key):016x}" for key in keys}
    joined = cache.join(_Named(world.images[:300], keys))
    targets = joined.gather_samples(np.arange(300), np.zeros(300, np.int64))
    np.testing.assert_array_equal(targets.logits().numpy(), exact_logits(world.images[:300]))


class _Named:
    def __init__(self, images: np.ndarray, keys: list[str]) -> None:
        self.images, self.sample_keys = images, keys

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images[index]


def test_row_order(world: World) -> None:
    def keys(**settings: Any) -> list[str]:
        out = "-".join(map(str, ["order", *settings.values()]))
        world.dump(out=out, **settings)
        cache = world.open(out)
        return [cache.samples.key(r) for r in range(len(cache))]

    names = np.array([f"toy/{i:04d}.png" for i in range(300)])
    assert keys(order="natural") == names.tolist()
    for seed in (0, 7):
        words = np.random.Philox(key=seed).random_raw(300)
        assert keys(order_seed=seed) == names[np.argsort(words, kind="stable")].tolist()


def test_order_of_rows_changes_neither_fingerprint_nor_targets(world: World) -> None:
    one, other = world.dump(out="a", order="natural"), world.dump(out="b")
    assert one.plan.samples.fingerprint == other.plan.samples.fingerprint
    assert one.id != other.id


def test_digests_of_contents_and_pixels(world: World) -> None:
    world.dump(policy=("shift",), views=2)
    cache = world.open()
    policy = cache.policy

    def canonical(image: np.ndarray, size: int) -> bytes:
        parts = [b"array", b"|u1", b"8,8"]
        head = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
        return hashlib.blake2b(head + image.tobytes(), digest_size=size).digest()

    rows = np.arange(len(cache))
    index = [int(cache.samples.key(int(r))[4:8]) for r in rows]
    assert [cache.samples.digests[r].tobytes() for r in rows] == [canonical(world.images[i], 16) for i in index]
    for view in (0, 1):
        stored = cache.reader.gather(None, "pixel_digests", rows, np.full(len(rows), view))
        seen = [policy.render(world.images[i], blake64(f"toy/{i:04d}.png"), view) for i in index]
        assert stored.tolist() == [int.from_bytes(canonical(image, 4), "little") for image in seen]


def test_image_files_are_digested_as_files(tmp_path: Path) -> None:
    from PIL import Image

    for i in range(8):
        path = tmp_path / "photos" / ("cat" if i % 2 else "dog") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 30 * i, np.uint8)).save(path)
    world = World(tmp_path / "toys")
    dump.run(
        DumpConfig(
            data=f"imagefolder:{tmp_path}/photos",
            teacher=(world.spec("two"),),
            out=str(world.path / "cache"),
            device="cpu",
            threads=1,
        ),
        quiet=True,
    )
    cache = world.open()
    assert cache.manifest.plan.samples.digest_kind == "file"
    for row in range(8):
        data = (tmp_path / "photos" / cache.samples.key(row)).read_bytes()
        assert cache.samples.digests[row].tobytes() == hashlib.blake2b(data, digest_size=16).digest()


def test_bf16_autocast_counts_the_rounding_of_a_half_last_layer(world: World) -> None:
    manifest = world.dump(teacher=("exact", "convolution"), autocast="bf16", codec="float32")
    cache = world.open()
    rows, views = np.arange(300), np.zeros(300, np.int64)
    linear, convolution = manifest.plan.members
    assert (linear.compute_dtype, convolution.compute_dtype) == ("float32", "bfloat16")
    index, stored = everything(cache, "exact")
    # pixels up to 255 and these weights are exact in bfloat16, so the linear layer in float32 loses nothing
    np.testing.assert_array_equal(stored, exact_logits(world.images[index]))
    assert cache.eps("exact", rows, views).max() == 0
    index, stored = everything(cache, "convolution")
    bias = np.random.default_rng(11)
    bias.integers(-3, 4, (4, 64))
    error = np.abs(stored - (exact_logits(world.images[index]) - bias.integers(-50, 50, 4))).max(axis=1)
    eps = cache.eps("convolution", rows, views)
    assert error.max() > 0
    assert (error <= eps).all()
    assert (eps <= 2.0**-8 * np.abs(stored).max(axis=1) * (1 + 2**-9)).all()
    assert manifest.statistics["convolution"].max_eps == eps.max()


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        pytest.param({"data": "toy?twice=true"}, DuplicateKeyError, r"toy/0004\.png", id="duplicate keys"),
        pytest.param({"teacher": ()}, ConfigError, "no teacher is given", id="no teacher"),
        pytest.param({"teacher": ("three",)}, TeacherError, r"\(\d+, 3\).*4 classes", id="class count"),
        pytest.param({"teacher": ("others",)}, ModelError, "'cow'", id="class names"),
        pytest.param({"views": 2}, ConfigError, "every view of this policy is the same", id="views all the same"),
        pytest.param({"views": 0}, ConfigError, "at least one view", id="no view"),
        pytest.param({"codec": "float15"}, ConfigError, "unknown codec", id="codec"),
        pytest.param({"part": "4/3"}, ConfigError, "not i/n", id="part"),
        pytest.param({"teacher": ("softmax_of?output=logits",)}, TeacherError, "log-probabilities", id="log_probs"),
        pytest.param(
            {"teacher": ("neighbours?output=logits",)},
            TeacherError,
            "probabilities",
            id="probs",
            marks=needs("sklearn", "demo"),
        ),
        pytest.param({"teacher": ("exact?output=odds",)}, ConfigError, "unknown output 'odds'", id="output"),
        pytest.param(
            {"teacher": ("bad?value=1e6",), "codec": "float16"}, CodecRangeError, "65504.*", id="float16 overflow"
        ),
    ],
)
def test_refused_before_or_while_writing(
    shared: World, tmp_path: Path, settings: dict[str, Any], error: type[SoftcacheError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        shared.dump(out=str(tmp_path / "cache"), **settings)
    assert caught.value.tip or error in (TeacherError, ModelError, ConfigError, DuplicateKeyError)
    assert not (tmp_path / "cache" / "manifest.json").exists()


@pytest.mark.parametrize("codec", ["float32", "float16"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_logits_that_are_not_finite_name_their_samples(world: World, value: str, codec: str) -> None:
    world.images[:, 0, 0] = 1
    world.images[[23, 230], 0, 0] = 255
    world.save()
    with pytest.raises(TeacherError, match=r"not finite for 1 samples of this batch: toy/0(023|230)\.png") as caught:
        world.dump(teacher=(f"bad?value={value}",), codec=codec, batch_size=8)
    assert "samples" in caught.value.tip
    assert not list(world.path.rglob("*.tmp*"))


def test_a_folder_of_somebody_else_is_refused_before_a_teacher_is_opened(world: World) -> None:
    (world.path / "cache").mkdir()
    (world.path / "cache" / "thesis.txt").write_text("years of work")
    with pytest.raises(DumpError, match="files that no dump wrote"):
        world.dump(teacher=("none_of_that_name",))
    assert [p.name for p in (world.path / "cache").iterdir()] == ["thesis.txt"]
    (world.path / "file").write_text("")
    with pytest.raises(DumpError, match="is a file"):
        world.dump(out="file")


# ---- interrupted, resumed, split ------------------------------------------------------------------------------------


def shards(cache: Path) -> dict[str, bytes]:
    return {str(p.relative_to(cache)): p.read_bytes() for p in sorted(cache.rglob("*.h5"))}


def interrupt(world: World, monkeypatch: pytest.MonkeyPatch, after: int, out: str = "cache", **settings: Any) -> None:
    """A dump that is interrupted after so many of its spans."""
    append_line, calls = durable.append_line, 0

    def counted(path: Path, line: bytes) -> None:
        nonlocal calls
        append_line(path, line)
        calls += 1
        if calls == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(durable, "append_line", counted)
        with pytest.raises(KeyboardInterrupt):
            world.dump(out=out, **settings)


SIX_SPANS: dict[str, Any] = {"data": "toy?count=1300"}


def test_an_interrupted_dump_says_how_far_it_is_and_goes_on(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = world.dump(out="whole", **SIX_SPANS)
    assert len(whole.plan.rounds[0].layout) == 6
    interrupt(world, monkeypatch, 4, **SIX_SPANS)
    with pytest.raises(UnfinishedCacheError, match=r"4 of 6 spans.*66 %") as caught:
        world.open()
    assert "softcache dump" in caught.value.tip and "resume" in caught.value.tip
    kept = {path: (world.path / "cache" / path).stat().st_ino for path in shards(world.path / "cache")}
    result = dump.run(world.config(**SIX_SPANS), quiet=False)
    assert "4 of 6 spans are there already" in capsys.readouterr().err
    assert result.manifest is not None and result.manifest.id == whole.id
    assert shards(world.path / "cache") == shards(world.path / "whole")
    # what was finished was not written again
    assert all((world.path / "cache" / path).stat().st_ino == inode for path, inode in kept.items())


def test_a_finished_dump_is_left_as_it_is(world: World) -> None:
    first = world.dump()
    before = {p: p.stat().st_mtime_ns for p in (world.path / "cache").rglob("*.h5")}
    assert world.dump().id == first.id
    assert {p: p.stat().st_mtime_ns for p in (world.path / "cache").rglob("*.h5")} == before


def test_a_damaged_shard_is_written_again_on_resume(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = world.dump(out="whole", **SIX_SPANS)
    interrupt(world, monkeypatch, 3, **SIX_SPANS)
    path = world.path / "cache/members/exact/part-00001.h5"
    path.write_bytes(path.read_bytes()[:-1])
    assert world.dump(**SIX_SPANS).id == whole.id
    assert shards(world.path / "cache") == shards(world.path / "whole")


@pytest.mark.parametrize(
    ("change", "listed"),
    [
        pytest.param({"batch_size": 32}, r"rounds\[0\]\.made_with\.batch_size was 64, is now 32", id="batch size"),
        pytest.param({"codec": "float16"}, r"members\[0\]\.codec\.name was 'float32', is now 'float16'", id="codec"),
        pytest.param({"order_seed": 1}, r"samples\.order_seed was '0', is now '1'", id="order"),
        pytest.param({"policy": ("shift",)}, r"views\.steps", id="policy"),
        pytest.param({"threads": 2}, r"rounds\[0\]\.made_with\.threads was 1, is now 2", id="threads"),
        pytest.param({"shard_rows": 512}, r"rounds\[0\]\.layout\.shard_rows was 256, is now 512", id="shard rows"),
        pytest.param({"teacher": ("exact?sign=-1",)}, r"members\[0\]\.fingerprint", id="weights"),
        pytest.param({"teacher": ("exact", "slow")}, r"members", id="one more teacher"),
        pytest.param({"no_keys": True}, r"samples\.has_keys was True, is now False", id="keys"),
        pytest.param({"data": "toy?count=1299"}, r"samples\.count was 1300, is now 1299", id="data"),
    ],
)
def test_a_changed_plan_is_refused_and_listed(
    started: World, change: dict[str, Any], listed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = shards(started.path / "cache")
    with pytest.raises(PlanMismatchError, match=listed) as caught:
        started.dump(**{**SIX_SPANS, **change})
    assert "--out" in caught.value.tip
    assert shards(started.path / "cache") == before


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A dump that stopped after two of its six spans."""
    world = World(tmp_path_factory.mktemp("started"))
    with pytest.MonkeyPatch.context() as patch:
        interrupt(world, patch, 2, **SIX_SPANS)
    return world


def test_a_dump_that_another_version_began_is_told_what_finishes_it(
    started: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To repeat the command would not help; nor would another --out in a recipe."""
    monkeypatch.setattr(dump, "made_with", lambda *given: made_with(*given) | {"softcache": "9.0", "torch": "9.1.0"})
    with pytest.raises(PlanMismatchError, match=r"made_with\.softcache was '.*', is now '9.0'") as caught:
        started.dump(**SIX_SPANS)
    wanted = f"pip install softcache=={__version__} torch=={torch.__version__.partition('+')[0]}"
    assert wanted in caught.value.tip and f"delete {started.path / 'cache'}" in caught.value.tip
    assert "repeat the command" not in caught.value.tip
    monkeypatch.setattr(dump, "made_with", lambda *given: made_with(*given) | {"softcache": "9.0", "device": "another"})
    with pytest.raises(PlanMismatchError) as caught:
        started.dump(**SIX_SPANS)
    assert "repeat the command" in caught.value.tip and "pip" not in caught.value.tip


def test_data_that_changed_since_the_kill_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = world.dump(out="whole", **SIX_SPANS)
    interrupt(world, monkeypatch, 2, **SIX_SPANS)
    order = np.argsort(np.random.Philox(key=0).random_raw(1300), kind="stable")
    victim = int(order[700])  # in the third span
    world.images[victim, 3, 3] ^= 1
    world.save()
    with pytest.raises(DataError, match=rf"1 samples changed.*toy/{victim:04d}\.png"):
        world.dump(**SIX_SPANS)
    world.images[victim, 3, 3] ^= 1
    label, world.labels[victim] = world.labels[victim], (world.labels[victim] + 1) % 4
    world.save()
    with pytest.raises(DataError, match=rf"1 labels changed.*toy/{victim:04d}\.png"):
        world.dump(**SIX_SPANS)
    world.labels[victim] = label
    world.save()
    assert world.dump(**SIX_SPANS).id == whole.id


def test_no_room_for_the_whole_is_told_before_the_first_row(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 6 spans one would fit; what is there already is not asked for again."""
    whole = world.dump(out="whole", **SIX_SPANS)
    shards = [sum(a.nbytes for a in file.arrays.values()) for file in whole.files if file.kind == "member"]
    monkeypatch.setattr(durable, "free_bytes", lambda folder: 2 * max(shards))
    with pytest.raises(DiskSpaceError, match=r"the shards to be written need \d+\.\d MB, the disk has 0\.0 MB left"):
        world.dump(**SIX_SPANS)
    assert not list((world.path / "cache").glob("members/*/*"))
    room = iter([10**9] * 5 + [0])
    monkeypatch.setattr(durable, "free_bytes", lambda folder: next(room))
    with pytest.raises(DiskSpaceError, match="the next shards need"):
        world.dump(**SIX_SPANS)
    assert len(list((world.path / "cache").glob("members/*/*"))) == 4
    monkeypatch.setattr(durable, "free_bytes", lambda folder: 3 * max(shards))  # for two, and for less than six
    assert world.dump(**SIX_SPANS).id == whole.id


def test_no_room_for_the_next_shard(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = world.dump(out="whole", **SIX_SPANS)
    room = iter([10**9, 10**9, 10**9, 10**9, 100])
    monkeypatch.setattr(durable, "free_bytes", lambda folder: next(room))
    with pytest.raises(DiskSpaceError, match=r"need \d+\.\d MB, the disk has 0\.0 MB left"):
        world.dump(**SIX_SPANS)
    monkeypatch.undo()
    assert len(list((world.path / "cache/members/exact").iterdir())) == 3
    with pytest.raises(UnfinishedCacheError, match="3 of 6"):
        world.open()
    assert world.dump(**SIX_SPANS).id == whole.id


@pytest.mark.slow
@pytest.mark.parametrize("when", np.linspace(0, 1, 12).round(2).tolist())
def test_a_disk_that_fills_up_while_writing(world: World, monkeypatch: pytest.MonkeyPatch, when: float) -> None:
    """Whichever write fails, no partial file stays, what was committed stays, and a resume gives the same cache."""
    write_at, calls, fatal = durable.write_at, 0, 10**9

    def filling(fd: int, data: bytes | memoryview, offset: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= fatal:
            write_at(fd, memoryview(data).cast("B")[: memoryview(data).nbytes // 2], offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_at(fd, data, offset)

    settings = {"data": "toy?count=600"}
    with monkeypatch.context() as patch:
        patch.setattr(durable, "write_at", filling)
        whole = world.dump(out="whole", **settings)
        calls, fatal = 0, 1 + round(when * (calls - 1))  # from the first write of a dump to its last
        with pytest.raises((DiskSpaceError, OSError), match="No space left"):
            world.dump(**settings)
    assert not [p for p in (world.path / "cache").rglob("*") if ".tmp" in p.name]
    journal = world.path / "cache/dump/part-1-of-1.jsonl"
    done = len(journal.read_text().splitlines()) if journal.exists() else 0
    assert len(list((world.path / "cache").glob("members/*/*.h5"))) == done
    assert world.dump(**settings).id == whole.id
    assert shards(world.path / "cache") == shards(world.path / "whole")


def test_a_disk_that_cannot_hold_a_whole_shard(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room is set aside before the first row is written; without it nothing of the shard stays."""
    reserve, calls = os.posix_fallocate, 0

    def refusing(fd: int, offset: int, size: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:  # samples.h5, probe.h5, the views and the member of span 0, the views of span 1, its member
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(fd, offset, size)

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", refusing)
        with pytest.raises(DiskSpaceError, match=r"part-00001\.h5\S*: No space left") as caught:
            world.dump(**SIX_SPANS)
    assert "free some space" in caught.value.tip
    assert sorted(p.name for p in (world.path / "cache").rglob("*.h5*")) == [
        "part-00000.h5",
        "part-00000.h5",
        "probe.h5",
        "samples.h5",
    ]
    assert world.dump(**SIX_SPANS).id == world.dump(out="whole", **SIX_SPANS).id


def test_parts_in_any_order_commit_when_the_last_is_done(world: World) -> None:
    whole = world.dump(out="whole", **SIX_SPANS)
    done = [dump.run(world.config(part=part, **SIX_SPANS), quiet=True).manifest for part in ("2/3", "3/3", "1/3")]
    assert done[:2] == [None, None]
    assert done[2] is not None and done[2].id == whole.id
    assert shards(world.path / "cache") == shards(world.path / "whole")
    assert (world.path / "cache/manifest.json").read_bytes() == (world.path / "whole/manifest.json").read_bytes()


def test_batches_do_not_cross_the_border_of_a_shard(world: World) -> None:
    """Rows of a shard depend on the plan alone, so the batches at its end are short ones."""
    sizes: list[int] = []
    original = dump.encode

    def noted(teacher: Any, codec: Any, inputs: Any, *rest: Any) -> Any:
        sizes.append(len(inputs))
        return original(teacher, codec, inputs, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dump, "encode", noted)
        world.dump(data="toy?count=600", batch_size=100)
    assert sizes == [100, 100, 56, 100, 100, 56, 88]


@pytest.fixture(scope="module")
def server() -> Any:
    """Processes that start at once, torch already imported; they can be killed without any chance to clean up."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["softcache.dump", "torchvision"])
    return context


def wait_for(seen: Callable[[], bool], alive: Callable[[], bool], timeout_s: float = 60) -> None:
    """Until something is seen, or the process has ended."""
    start = time.monotonic()
    while not seen() and alive():
        assert time.monotonic() - start < timeout_s, "the dump did not get there in time"
        time.sleep(0.001)


def random_moment(cache: Path, moment: random.Random) -> Callable[[], bool]:
    """A point of the dump's life: its folder, its plan, or so many finished shards."""
    stage = moment.randrange(-2, 6)
    if stage < 0:
        awaited = cache / ("dump" if stage == -2 else "dump/plan.json")
        return awaited.exists
    folder = cache / "members/slow"
    return lambda: folder.is_dir() and sum(p.suffix == ".h5" for p in folder.iterdir()) >= stage


def check_between(cache: Path, undisturbed: str) -> str:
    """What a reader meets between kill and resume: a whole cache, or a refusal that helps."""
    if not cache.exists():
        return "nothing"
    if (cache / "manifest.json").exists():
        assert softcache.open(cache).id == undisturbed
        return "complete"
    with pytest.raises(UnfinishedCacheError, match="the dump is not finished: ") as caught:
        softcache.open(cache)
    assert "run the same `softcache dump` command again to resume it" in caught.value.tip
    return caught.value.message.rpartition("finished: ")[2]


@pytest.fixture(scope="module")
def undisturbed(shared: World) -> Manifest:
    return shared.dump(out="undisturbed", teacher=("slow",), **SIX_SPANS)


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed(shared: World, undisturbed: Manifest, server: Any, tmp_path: Path) -> None:
    met = []
    for seed in range(3):
        moment, out = random.Random(seed), tmp_path / str(seed)
        process = server.Process(target=cli.main, args=(shared.argv(str(out), teacher=("slow",), **SIX_SPANS),))
        process.start()
        wait_for(random_moment(out, moment), process.is_alive)
        time.sleep(moment.uniform(0, 0.05))
        process.kill()
        process.join()
        met.append(check_between(out, undisturbed.id))
        assert shared.dump(out=str(out), teacher=("slow",), **SIX_SPANS).id == undisturbed.id
        assert shards(out) == shards(shared.path / "undisturbed")
    assert any("spans are written" in state for state in met), met


@pytest.mark.slow
@pytest.mark.parametrize("seed", [pytest.param(n, marks=[pytest.mark.whole] * (n > 4)) for n in range(20)])
def test_kill_dash_nine_of_the_command(shared: World, undisturbed: Manifest, tmp_path: Path, seed: int) -> None:
    moment, out = random.Random(1000 + seed), tmp_path / "cache"
    argv = shared.argv(str(out), teacher=("slow",), **SIX_SPANS)
    process = subprocess.Popen([sys.executable, "-m", "softcache", *argv], stderr=subprocess.PIPE)
    wait_for(random_moment(out, moment), lambda: process.poll() is None)
    time.sleep(moment.uniform(0, 0.08))
    process.kill()
    _, errors = process.communicate()
    assert all(line.startswith(b"softcache: warning: teacher 'slow' is right on") for line in errors.splitlines())
    print(f"killed with {check_between(out, undisturbed.id)}")
    assert shared.dump(out=str(out), teacher=("slow",), **SIX_SPANS).id == undisturbed.id
    assert shards(out) == shards(shared.path / "undisturbed")
    assert not list(out.rglob("*.h5.tmp*"))


@pytest.mark.slow
def test_two_dumps_at_once(shared: World, server: Any, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    argv = shared.argv(str(out), teacher=("slow?seconds=0.2",), **SIX_SPANS)
    process = server.Process(target=cli.main, args=(argv,))
    process.start()
    try:
        lock = out / "dump/part-1-of-1.lock"
        wait_for(lambda: lock.exists() and b"pid" in lock.read_bytes(), process.is_alive)
        with pytest.raises(LockedError, match=rf"part 1 of 1 .*pid {process.pid}\b") as caught:
            shared.dump(out=str(out), teacher=("slow?seconds=0.2",), **SIX_SPANS)
        assert "--part" in caught.value.tip
    finally:
        process.kill()
        process.join()
    with pytest.raises(UnfinishedCacheError):
        softcache.open(out)


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_one_process_two_ranks_and_three_parts_give_the_same_bytes(shared: World, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        **SIX_SPANS,
        "teacher": ("exact", "convolution"),
        "policy": ("crop_flip:padding=1",),
        "views": 2,
        "codec": "float16",
    }

    def start(out: str, *launcher: str, **more: Any) -> subprocess.Popen[str]:
        argv = shared.argv(str(tmp_path / out), **settings, **more)
        command = [sys.executable, *launcher, "-m", "softcache", *argv]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    assert cli.main(shared.argv(str(tmp_path / "one"), **settings)) == 0
    for processes in (
        [start("ranks", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")],
        [start("parts", part=part) for part in ("1/3", "2/3", "3/3")],  # at the same time, as a job array
    ):
        for process in processes:
            _, errors = process.communicate()
            assert process.returncode == 0, errors
    one = shards(tmp_path / "one")
    assert len([path for path in one if path.startswith("members/exact/")]) == 6
    journals = sorted(p.name for p in (tmp_path / "ranks/dump").glob("*.jsonl"))
    assert journals == ["part-1-of-2.jsonl", "part-2-of-2.jsonl"]
    for other in ("ranks", "parts"):
        assert shards(tmp_path / other) == one
        assert softcache.open(tmp_path / other).id == softcache.open(tmp_path / "one").id
    manifest = json.loads((tmp_path / "ranks/manifest.json").read_bytes())
    assert manifest["rounds"][0]["made_with"]["threads"] == 1


def test_a_teacher_that_is_given_twice_is_told(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    world.dump(teacher=("exact", "exact?name=again", "opposite"))
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "are the same" in line]
    assert "'exact' and 'again'" in line
    told = json.loads((world.open().reader.path / "provenance.json").read_text())
    assert list(told["warnings"]) == ["again"]

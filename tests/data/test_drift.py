"""When views no longer render to what the teacher saw: a rounding is one recorded warning, anything more is refused."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORLDS, QuickDump
from PIL import Image

import softcache
from softcache import cli, dump, train
from softcache.check import view_picture
from softcache.check.replay import Replay
from softcache.config import DumpConfig, TrainConfig
from softcache.data import philox, sources, views
from softcache.data.drift import PROBE_RECORDS, check_drift, make_probe
from softcache.data.identity import sample_ids
from softcache.data.images import like, to_tensor
from softcache.data.join import SPREAD
from softcache.data.transfer_set import open_transfer_set
from softcache.errors import ConfigError, ContentMismatchError, DataError, DriftError, SoftcacheError

CROP = ("crop_flip:padding=1",)
MIXUP = ("crop_flip:padding=1", "mixup:alpha=1")
CUTMIX = ("shift:pixels=1", "cutmix")
POLICIES = [pytest.param(CROP, id="crop"), pytest.param(MIXUP, id="mixup"), pytest.param(CUTMIX, id="cutmix")]


@pytest.fixture(scope="session")
def others() -> Path:
    return WORLDS / "changed_items.py"


def settings(tmp_path: Path, data: str, **more: Any) -> TrainConfig:
    defaults: dict[str, Any] = {"student": "softcache:mlp?hidden=4", "epochs": 2, "threads": 1, "workers": 0}
    defaults |= {"cache": str(tmp_path / "cache"), "out": str(tmp_path / "run"), "loss": ("kd:temperature=2",)}
    return TrainConfig(data=data, **(defaults | more))


def recorded(tmp_path: Path) -> Any:
    return json.loads((tmp_path / "run" / "run.json").read_text())["drift"]


# ---- what goes wrong with views -------------------------------------------------------------------------------------


def change_step(
    patch: pytest.MonkeyPatch, policy: tuple[str, ...], change: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """The first step of the policy renders as `change(its function)` says."""
    name = policy[0].partition(":")[0]
    kind = views.STEPS[name]
    changed = functools.wraps(kind.function)(change(kind.function))
    patch.setitem(views.STEPS, name, replace(kind, function=changed))


def round_by(apart: int) -> Callable[[pytest.MonkeyPatch, tuple[str, ...]], None]:
    """Every pixel is off by so much, as if another decoder had rounded."""

    def change(function: Callable[..., Any]) -> Callable[..., Any]:
        def rounded(image: torch.Tensor, draws: Any, **parameters: Any) -> torch.Tensor:
            made = function(image, draws, **parameters).int()
            return torch.where(made + apart <= 255, made + apart, made - apart).to(torch.uint8)

        return rounded

    return lambda patch, policy: change_step(patch, policy, change)


def round_one_pixel(patch: pytest.MonkeyPatch, policy: tuple[str, ...]) -> None:
    """One pixel in the middle is off by one."""

    def change(function: Callable[..., Any]) -> Callable[..., Any]:
        def rounded(image: torch.Tensor, draws: Any, **parameters: Any) -> torch.Tensor:
            made = function(image, draws, **parameters).clone()
            made[0, 4, 4] ^= 1
            return made

        return rounded

    change_step(patch, policy, change)


def another_crop(patch: pytest.MonkeyPatch, policy: tuple[str, ...]) -> None:
    """The first step's parameter is larger than the manifest says."""

    def change(function: Callable[..., Any]) -> Callable[..., Any]:
        def larger(image: torch.Tensor, draws: Any, **parameters: Any) -> Any:
            name = "padding" if "padding" in parameters else "pixels"
            return function(image, draws, **{**parameters, name: parameters[name] + 1})

        return larger

    change_step(patch, policy, change)


def another_generator(patch: pytest.MonkeyPatch, policy: tuple[str, ...]) -> None:
    patch.setattr(philox, "_ROUNDS", 9)


def another_arithmetic(patch: pytest.MonkeyPatch, policy: tuple[str, ...]) -> None:
    """Words become whole numbers by a remainder, as in many libraries."""
    patch.setattr(philox.Draws, "integer", lambda self, low, high: low + self.word() % (high - low + 1))


def shifted_by_a_pixel(patch: pytest.MonkeyPatch, policy: tuple[str, ...]) -> None:
    """Seeds and parameters are right, and every box lies a pixel further."""

    def change(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda image, draws, **parameters: function(image, draws, **parameters).roll(1, dims=-1)

    change_step(patch, policy, change)


def another_size(patch: pytest.MonkeyPatch, policy: tuple[str, ...]) -> None:
    def change(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda image, draws, **parameters: function(image, draws, **parameters)[:, :-1]

    change_step(patch, policy, change)


def wrong_in_view_two(patch: pytest.MonkeyPatch, policy: tuple[str, ...]) -> None:
    def change(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrong(image: torch.Tensor, draws: Any, **parameters: Any) -> Any:
            made = function(image, draws, **parameters)
            return made ^ 128 if draws._view == 2 else made

        return wrong

    change_step(patch, policy, change)


SERIOUS = [round_by(3), another_crop, another_generator, another_arithmetic, shifted_by_a_pixel, another_size]
SERIOUS_NAMES = ["three of 255", "another crop", "another generator", "another arithmetic", "a pixel further", "size"]


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("apart", [1, 2])
def test_a_rounding_is_one_recorded_warning(
    quick_dump: QuickDump,
    toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    policy: tuple[str, ...],
    apart: int,
) -> None:
    quick_dump(policy=policy, views=3)
    round_by(apart)(monkeypatch, policy)
    result = train.run(settings(tmp_path, f"{toy}:images"), quiet=True)
    assert len(result.metrics) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "differ from what the teacher saw" in line]
    (line,) = told  # once, however many views and epochs
    assert line == f"softcache: warning: {recorded(tmp_path)}; the run records it"
    checked = 40
    assert recorded(tmp_path) == (
        f"{checked} of {checked} checked views differ from what the teacher saw, by {apart} of 255"
    )


def test_a_rounding_of_few_pixels_is_one_too(
    quick_dump: QuickDump, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick_dump(policy=CROP, views=2)
    round_one_pixel(monkeypatch, CROP)
    train.run(settings(tmp_path, f"{toy}:images"), quiet=True)
    assert "by 1 of 255" in recorded(tmp_path)


def test_a_decoder_that_rounds_otherwise(
    tmp_path: Path, toy: Path, quick_dump: QuickDump, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are the same to the byte, what they decode to is not: by one a warning, by more an error."""
    draw = np.random.default_rng(0)
    for i in range(12):
        folder = tmp_path / "images" / ("ant", "bee", "cat", "dog")[i % 4]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 250, (8, 8), dtype=np.uint8)).save(folder / f"{i}.png")
    data = f"imagefolder:{tmp_path}/images"
    quick_dump(data, policy=MIXUP, views=2)
    decode = sources.image_array
    monkeypatch.setattr(sources, "image_array", lambda image, where: decode(image, where) + 1)
    train.run(settings(tmp_path, data), quiet=True)
    assert "12 of 12 checked views" in recorded(tmp_path) and "by 1 of" in recorded(tmp_path)
    monkeypatch.setattr(sources, "image_array", lambda image, where: decode(image, where) + 5)
    with pytest.raises(DriftError, match="up to 5 of 255 apart"):
        train.run(settings(tmp_path, data, out=str(tmp_path / "other")), quiet=True)


def test_without_a_difference_nothing_is_said(
    quick_dump: QuickDump, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick_dump(policy=MIXUP, views=3)
    train.run(settings(tmp_path, f"{toy}:images"), quiet=True)
    assert recorded(tmp_path) is None
    assert "warning" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("change", SERIOUS, ids=SERIOUS_NAMES)
def test_anything_more_is_an_error(
    quick_dump: QuickDump,
    toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    policy: tuple[str, ...],
    change: Callable[[pytest.MonkeyPatch, tuple[str, ...]], None],
) -> None:
    quick_dump(policy=policy, views=3)
    change(monkeypatch, policy)
    with pytest.raises(DriftError) as caught:
        train.run(settings(tmp_path, f"{toy}:images"), quiet=True)
    assert "of 40 checked views render to other pixels than the teacher saw" in caught.value.message
    apart = "(up to 3 of 255 apart)" if change is SERIOUS[0] else "of 255 apart)"
    assert apart in caught.value.message
    assert "toy/00" in caught.value.message
    for side in ("the cache was made with softcache", "here are softcache", "torchvision", "pillow"):
        assert side in caught.value.tip
    assert not (tmp_path / "run").exists()  # before anything was begun
    train.run(settings(tmp_path, f"{toy}:images", on_drift="warn"), quiet=True)
    assert "checked views differ" in recorded(tmp_path)


def test_every_view_is_looked_at(
    quick_dump: QuickDump, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checked samples take the views in turn: one wrong view of three is a third of them."""
    quick_dump(policy=CROP, views=3)
    wrong_in_view_two(monkeypatch, CROP)
    with pytest.raises(DriftError, match="13 of 40 checked views"):
        train.run(settings(tmp_path, f"{toy}:images"), quiet=True)


def test_the_versions_of_both_sides_are_named(
    quick_dump: QuickDump, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick_dump(policy=CROP, views=2)
    another_crop(monkeypatch, CROP)
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    with pytest.raises(DriftError) as caught:
        train.run(settings(tmp_path, f"{toy}:images"), quiet=True)
    made, here = caught.value.tip.split("; here are ")
    assert "torch 9.9.9" in here and "torch 9.9.9" not in made


# ---- a changed image ------------------------------------------------------------------------------------------------


def probed(cache: softcache.Cache) -> set[str]:
    """Keys of the samples that are kept in the probe."""
    return {cache.samples.key(int(row)) for row in cache.reader.probe()["rows"]}


def checked_keys(data: str) -> list[str]:
    """Keys of the samples whose views training checks: spread over the data set."""
    keys = open_transfer_set(data).keys
    return [keys[int(i)] for i in np.unique(np.linspace(0, len(keys) - 1, SPREAD).astype(int))]


def test_a_changed_image_is_found_by_its_content_first(
    quick_dump: QuickDump, others: Path, toy: Path, tmp_path: Path
) -> None:
    quick_dump(f"{others}:images", [f"{toy}:exact"], policy=CROP, views=2)
    with pytest.raises(ContentMismatchError, match="image/0"):
        train.run(settings(tmp_path, f"{others}:images?changed=0"), quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("by", [1, 99])
def test_a_changed_image_is_seen_in_its_views(
    quick_dump: QuickDump, others: Path, toy: Path, tmp_path: Path, policy: tuple[str, ...], by: int
) -> None:
    """Even where contents are not compared, and a difference of one: all else renders as it did, so this is no rounding."""
    data = f"{others}:images"
    cache = quick_dump(data, [f"{toy}:exact"], policy=policy, views=2)
    known = probed(cache) | {cache.samples.key(row) for row in _mixed_into_the_probe(cache)}
    key = next(key for key in checked_keys(data) if key not in known)
    number = key.removeprefix("image/")
    with pytest.raises(
        DriftError, match=rf"while the probe renders as it did: these samples changed: .*{key}"
    ) as caught:
        train.run(settings(tmp_path, f"{data}?changed={number}&by={by}", check_content="none"), quiet=True)
    assert "--without" in caught.value.tip
    config = settings(tmp_path, f"{data}?changed={number}&by={by}", check_content="none", on_drift="warn")
    train.run(config, quiet=True)
    assert "by 0 of" in recorded(tmp_path)


def _mixed_into_the_probe(cache: softcache.Cache) -> set[int]:
    if cache.policy.mixing is None:
        return set()
    probe = cache.reader.probe()
    places = zip(probe["rows"].tolist(), probe["views"].tolist(), strict=True)
    return {cache.policy.partner(int(cache.samples.ids[row]), view, len(cache)) for row, view in places}


def test_a_changed_image_of_the_probe(quick_dump: QuickDump, others: Path, toy: Path, tmp_path: Path) -> None:
    data = f"{others}:images"
    cache = quick_dump(data, [f"{toy}:exact"], policy=CROP, views=2)
    key = next(key for key in checked_keys(data) if key in probed(cache))
    number = key.removeprefix("image/")
    with pytest.raises(DriftError, match=rf"up to 99 of 255 apart\): .*{key}"):
        train.run(settings(tmp_path, f"{data}?changed={number}", check_content="none"), quiet=True)


# ---- without the probe's samples ------------------------------------------------------------------------------------


def without_the_probe(cache: softcache.Cache, tmp_path: Path) -> str:
    """A file of the keys that are not in the probe."""
    keys = [cache.samples.key(row) for row in range(len(cache))]
    path = tmp_path / "keys.txt"
    path.write_text("\n".join(key for key in keys if key not in probed(cache)))
    return str(path)


def test_a_subset_without_the_probes_samples(
    quick_dump: QuickDump, others: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digests still tell that views differ; by how much is not known, so that even a difference of one is an error."""
    data = f"{others}:images"
    cache = quick_dump(data, [f"{toy}:exact"], policy=CROP, views=2)
    assert len(probed(cache)) == PROBE_RECORDS
    samples = without_the_probe(cache, tmp_path)
    train.run(settings(tmp_path, data, samples=samples, out=str(tmp_path / "whole")), quiet=True)
    round_by(1)(monkeypatch, CROP)
    with pytest.raises(DriftError, match="64 of 64 checked views render to other pixels than the teacher saw: image/"):
        train.run(settings(tmp_path, data, samples=samples), quiet=True)
    train.run(settings(tmp_path, data, samples=samples, on_drift="warn"), quiet=True)
    assert "by an unknown amount" in recorded(tmp_path)


def test_a_subset_with_some_of_them(
    quick_dump: QuickDump, others: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = f"{others}:images"
    cache = quick_dump(data, [f"{toy}:exact"], policy=CROP, views=2)
    samples = without_the_probe(cache, tmp_path)
    with open(samples, "a") as file:
        file.write("\n" + sorted(probed(cache))[7])
    round_by(2)(monkeypatch, CROP)
    train.run(settings(tmp_path, data, samples=samples), quiet=True)
    assert "by 2 of" in recorded(tmp_path)


# ---- no images ------------------------------------------------------------------------------------------------------

NO_IMAGES = [
    ("texts", "lengths", "softcache:textcnn?width=2&embedding=2"),
    ("vectors", "linear", "softcache:mlp?hidden=3"),
]


@pytest.mark.parametrize(("data", "teacher", "student"), NO_IMAGES, ids=["texts", "vectors"])
def test_texts_and_float_tensors_have_digests_and_no_probe(
    quick_dump: QuickDump, others: Path, tmp_path: Path, data: str, teacher: str, student: str
) -> None:
    cache = quick_dump(f"{others}:{data}", [f"{others}:{teacher}"])
    assert cache.reader.probe() == {}
    train.run(settings(tmp_path, f"{others}:{data}", student=student), quiet=True)
    assert recorded(tmp_path) is None
    changed: dict[str, Any] = {"student": student, "check_content": "none", "out": str(tmp_path / "other")}
    with pytest.raises(DriftError, match=rf"1 of 40 checked views .* saw: {data[:-1]}/11"):
        train.run(settings(tmp_path, f"{others}:{data}?changed=11", **changed), quiet=True)
    train.run(settings(tmp_path, f"{others}:{data}?changed=11", on_drift="warn", **changed), quiet=True)


# ---- the probe itself -----------------------------------------------------------------------------------------------


def test_the_probe_holds_what_the_teacher_saw(quick_dump: QuickDump, toy: Path) -> None:
    """64 records over all rows and views; pixels are those of an independent rendering."""
    cache = quick_dump(f"{toy}:images?count=50&rgb=true", policy=MIXUP, views=3)
    probe = cache.reader.probe()
    assert (
        len(probe["rows"]) == 64 and len(set(probe["rows"].tolist())) > 48 and set(probe["views"].tolist()) == {0, 1, 2}
    )
    whole = open_transfer_set(f"{toy}:images?count=50&rgb=true")
    index = {int(ident): i for i, ident in enumerate(sample_ids(whole.keys))}
    expected = []
    for row, view in zip(probe["rows"].tolist(), probe["views"].tolist(), strict=True):
        ident = int(cache.samples.ids[row])
        other = int(cache.samples.ids[cache.policy.partner(ident, view, 50)])
        own, partner = (cache.policy.render(whole[index[i]][0], i, view) for i in (ident, other))
        expected.append(cache.policy.mix(own, partner, ident, view)[0])
    assert np.array_equal(probe["pixels"], np.concatenate([pixels.reshape(-1) for pixels in expected]))
    assert probe["shapes"].tolist() == [[8, 8, 3]] * 64


def test_images_of_many_shapes() -> None:
    """Grey and coloured, of any size, in one probe; a single changed pixel value is found in each."""
    draw = np.random.default_rng(0)
    items = [draw.integers(0, 200, (4 + i, 9 - i, 3)[: 2 + i % 2], dtype=np.uint8) for i in range(5)]
    probe = make_probe(lambda row, view: items[row], 5, 1)

    class Reader:
        samples = None
        manifest = SimpleNamespace(plan=SimpleNamespace(views=SimpleNamespace(digests=("pixel_digests",))))

        def gather(self, *_: Any) -> np.ndarray:
            return np.zeros(1, np.uint32)

        def probe(self) -> dict[str, np.ndarray]:
            return probe

    def apart(change: Callable[[int, np.ndarray], Any]) -> int | None:
        place = np.zeros(1, np.int64)
        found = check_drift(
            Reader(),  # type: ignore[arg-type]
            place,
            place,
            np.ones(1, np.uint32),
            lambda row, view: change(row, items[row]),
            on_drift="warn",
        )
        assert found is not None
        return found.apart

    assert apart(lambda row, item: item) == 0
    assert apart(lambda row, item: None) is None
    for which in range(5):
        for amount in (1, 2, 55):
            last = np.zeros_like(items[which])
            last.reshape(-1)[-1] = amount
            assert apart(lambda row, item, w=which, d=last: item + d if row == w else item) == amount  # type: ignore[misc]
        assert apart(lambda row, item, w=which: item[1:] if row == w else item) == 255  # type: ignore[misc]
        assert apart(lambda row, item, w=which: None if row == w else item) == 0  # type: ignore[misc]
    assert apart(lambda row, item: torch.from_numpy(item.copy())) == 0


def test_mixed_items_make_no_probe() -> None:
    items = [np.zeros((4, 4), np.uint8), "a text"]
    assert make_probe(lambda row, view: items[row], 2, 1) == {}


# ---- a new member ---------------------------------------------------------------------------------------------------


def add_member(tmp_path: Path, toy: Path, data: str = "") -> softcache.Cache:
    config = DumpConfig(
        data=data or f"{toy}:images",
        teacher=(f"{toy}:network",),
        out=str(tmp_path / "cache"),
        codec="int8",
        extend=True,
        threads=1,
        workers=0,
        batch_size=8,
    )
    dump.run(config, quiet=True)
    return softcache.open(tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.parametrize("change", SERIOUS, ids=SERIOUS_NAMES)
def test_a_new_member_must_see_what_the_others_saw(
    quick_dump: QuickDump,
    toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[pytest.MonkeyPatch, tuple[str, ...]], None],
) -> None:
    old = quick_dump(policy=CUTMIX, views=3).id
    with monkeypatch.context() as patch:
        change(patch, CUTMIX)
        with pytest.raises(DriftError, match="of 40 checked views render to other pixels than the teacher saw"):
            add_member(tmp_path, toy)
    assert softcache.open(tmp_path / "cache").id == old
    assert not (tmp_path / "cache" / "dump" / "extend-1").exists()
    assert add_member(tmp_path, toy).members == ("exact", "network")


def test_every_view_of_a_new_member_is_checked(
    quick_dump: QuickDump, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first two are right, the third is not."""
    old = quick_dump(policy=CUTMIX, views=3).id
    with monkeypatch.context() as patch:
        wrong_in_view_two(patch, CUTMIX)
        with pytest.raises(DriftError, match=r"8 of 8 checked views .*128 of 255"):
            add_member(tmp_path, toy)
    assert softcache.open(tmp_path / "cache").id == old
    assert add_member(tmp_path, toy).members == ("exact", "network")


def test_a_new_member_may_see_a_rounding(
    quick_dump: QuickDump,
    toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is told once; the digests stay those of the first member."""
    before = quick_dump(policy=CROP, views=3)
    round_by(1)(monkeypatch, CROP)
    after = add_member(tmp_path, toy)
    assert capsys.readouterr().err.count("differ from what the teacher saw, by 1 of") == 1
    rows, view = np.divmod(np.arange(120), 3)
    old, new = (cache.reader.gather(None, "pixel_digests", rows, view) for cache in (before, after))
    assert np.array_equal(old, new)


# ---- verify --replay ------------------------------------------------------------------------------------------------


def verify_cli(tmp_path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    capsys.readouterr()
    code = cli.main(["verify", "--allow-code", str(tmp_path / "cache"), *more])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


@pytest.mark.slow
@pytest.mark.parametrize("policy", [pytest.param((), id="none"), *POLICIES])
def test_verify_replays_views(
    quick_dump: QuickDump, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], policy: tuple[str, ...]
) -> None:
    quick_dump(policy=policy, views=3 if policy else 1)
    total = 120 if policy else 40
    code, text = verify_cli(tmp_path, capsys, "--replay", "1000")
    assert code == 0 and f"replay: {total} views render bit for bit as the teacher saw them" in text
    code, text = verify_cli(tmp_path, capsys, "--replay", "7", "--full")
    assert code == 0 and "replay: 7 views render bit for bit" in text
    code, text = verify_cli(tmp_path, capsys)
    assert code == 0 and "replay:" not in text


def test_verify_tells_a_rounding_from_damage(
    quick_dump: QuickDump,
    toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    quick_dump(policy=MIXUP, views=3)
    with monkeypatch.context() as patch:
        round_by(2)(patch, MIXUP)
        code, text = verify_cli(tmp_path, capsys, "--replay", "50")
        assert code == 0 and "whole" in text
        assert "50 of 50 checked views differ from what the teacher saw, by 2 of 255: a decoder's rounding" in text
    for change in SERIOUS:
        with monkeypatch.context() as patch:
            change(patch, MIXUP)
            code, text = verify_cli(tmp_path, capsys, "--replay", "50")
            assert code == 1 and "damaged" in text
            assert "replay: " in text and "render to other pixels than the teacher saw" in text
    code, text = verify_cli(tmp_path, capsys, "--replay", "50", "--json")
    verdict = json.loads(text)
    assert (code, verdict["state"], verdict["faults"]) == (0, "whole", []) and "bit for bit" in verdict["notes"][0]


def test_verify_with_data_of_its_own(
    quick_dump: QuickDump, others: Path, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = f"{others}:images"
    quick_dump(f"{data}?count=80", [f"{toy}:exact"], policy=CROP, views=2)
    code, text = verify_cli(tmp_path, capsys, "--replay", "160", "--data", f"{data}?count=300")
    assert code == 0 and "160 views render bit for bit" in text  # a larger set holds them all
    code, text = verify_cli(tmp_path, capsys, "--replay", "160", "--data", f"{data}?count=70")
    assert code == 0 and "140 views render bit for bit" in text
    assert "20 more need samples that" in text
    code, text = verify_cli(tmp_path, capsys, "--replay", "160", "--data", f"{data}?count=80&changed=5")
    assert code == 1 and "image/5" in text
    code, text = verify_cli(tmp_path, capsys, "--replay", "160", "--data", f"{toy}:images")
    assert code == 2 and "none of 160 views can be rendered" in text
    (tmp_path / "cache" / "provenance.json").unlink()
    code, text = verify_cli(tmp_path, capsys, "--replay", "5")
    assert code == 2 and "does not say which data set it was made from" in text and "--data" in text
    code, text = verify_cli(tmp_path, capsys, "--replay", "5", "--data", f"{data}?count=80")
    assert code == 0


def test_verify_of_a_subset_whose_partners_are_missing(
    quick_dump: QuickDump, others: Path, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mixed view cannot be rendered without its partner: it is counted as missing, not as damage."""
    data = f"{others}:images"
    cache = quick_dump(f"{data}?count=40", [f"{toy}:exact"], policy=CUTMIX, views=2)
    here = {f"image/{i}" for i in range(30)}
    rendered = 0
    for row in range(40):
        for view in range(2):
            partner = cache.policy.partner(int(cache.samples.ids[row]), view, 40)
            rendered += cache.samples.key(row) in here and cache.samples.key(partner) in here
    code, text = verify_cli(tmp_path, capsys, "--replay", "80", "--data", f"{data}?count=30")
    assert code == 0 and f"{rendered} views render bit for bit" in text
    assert f"{80 - rendered} more need samples that" in text


# ---- softcache views ------------------------------------------------------------------------------------------------


def cells_of(path: Path, images: list[np.ndarray], factor: int) -> list[tuple[int, int]]:
    """Where each image, enlarged, lies in the picture: (top, left), in the order of the images."""
    with Image.open(path) as opened:
        shown = np.asarray(opened.convert("RGB"))
    found = []
    for image in images:
        rgb = np.broadcast_to(image[:, :, None] if image.ndim == 2 else image, (*image.shape[:2], 3))
        large = rgb.repeat(factor, axis=0).repeat(factor, axis=1)
        height, width = large.shape[:2]
        corners = np.argwhere((shown[: 1 - height, : 1 - width] == large[0, 0]).all(axis=2)).tolist()
        places = [(t, c) for t, c in corners if (shown[t : t + height, c : c + width] == large).all()]
        assert len(places) == 1
        found += places
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rgb", "policy"), [(False, ("crop_flip:padding=4",)), (True, MIXUP)], ids=["grey", "mixed colours"]
)
def test_the_picture_shows_every_view(
    quick_dump: QuickDump,
    toy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rgb: bool,
    policy: tuple[str, ...],
) -> None:
    data = f"{toy}:images?rgb={str(rgb).lower()}"
    cache = quick_dump(data, policy=policy, views=5)
    out = tmp_path / "grid.png"
    assert cli.main(["views", str(tmp_path / "cache"), "--sample", "toy/0007", "--out", str(out), "--allow-code"]) == 0
    assert "5 of 5 views of toy/0007; 5 render as the teacher saw them" in capsys.readouterr().out
    whole = open_transfer_set(data)
    joined = cache.join(whole)
    images = [joined.for_view(view)[7][0][0] for view in range(5)]
    places = cells_of(out, images, view_picture.CELL // 8)
    assert [top for top, _ in places[:3]] == [places[0][0]] * 3 and places[3][0] == places[4][0] > places[0][0]
    assert [left for _, left in places[:3]] == sorted({left for _, left in places})
    with Image.open(out) as opened:
        assert opened.format == "PNG"


def test_at_most_so_many_views(quick_dump: QuickDump, toy: Path, tmp_path: Path) -> None:
    quick_dump(policy=CROP, views=4)
    told = view_picture.draw_views(tmp_path / "cache", "toy/0001", tmp_path / "few.png", allow_code=True, most=3)
    assert "3 of 4 views of toy/0001; 3 render as the teacher saw them" in told.text()


def test_the_picture_names_answers_and_shares(quick_dump: QuickDump, toy: Path, tmp_path: Path) -> None:
    cache = quick_dump(policy=MIXUP, views=3)
    lines = drawn_lines(tmp_path / "cache", "toy/0003")
    joined = cache.join(open_transfer_set(f"{toy}:images"))
    assert len(lines) == 3
    for view, (title, *answers) in enumerate(lines):
        _, record, _, share = joined.for_view(view)[3]
        assert title == f"view {view}, {share:.2f} of it"
        logits = joined.gather(torch.tensor([record])).logits()[0].double().numpy()
        shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        best = np.argsort(-shares)[: len(answers)]
        assert answers == [f"{100 * shares[i]:5.1f} % {cache.class_names[i]}" for i in best]


def drawn_lines(cache: Path, key: str) -> list[list[str]]:
    """What is written below each view of a picture."""
    return [view.lines for view in view_picture.shown_views(Replay(cache, None, allow_code=True), key, 24)]


def test_the_picture_marks_what_the_teacher_did_not_see(
    quick_dump: QuickDump, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick_dump(policy=CROP, views=4)
    wrong_in_view_two(monkeypatch, CROP)
    lines = drawn_lines(tmp_path / "cache", "toy/0001")
    told = view_picture.draw_views(tmp_path / "cache", "toy/0001", tmp_path / "grid.png", allow_code=True)
    assert "4 of 4 views of toy/0001; 3 render as the teacher saw them" in told.text()
    assert ["NOT what the teacher saw" in title for title, *_ in lines] == [False, False, True, False]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        pytest.param(["--sample", "toy/0001", "--out", "grid.jpg"], "the picture is a PNG", id="no png"),
        pytest.param(["--sample", "toy/0001", "--out", "grid"], "the picture is a PNG", id="no suffix"),
        pytest.param(["--sample", "toy/9999"], "no sample 'toy/9999'", id="unknown key"),
        pytest.param(
            ["--sample", "toy/0001", "--data", "{others}:images"], "has no sample 'toy/0001'", id="other data"
        ),
        pytest.param(["--sample", "toy/0001", "--out", "none/grid.png"], "No such file or directory", id="no folder"),
    ],
)
def test_what_the_picture_refuses(
    quick_dump: QuickDump,
    others: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    quick_dump(policy=CROP, views=2)
    before = sorted(tmp_path.iterdir())
    assert cli.main(["views", "cache", "--allow-code", *(word.format(others=others) for word in argv)]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("data", "teacher"), [row[:2] for row in NO_IMAGES], ids=["texts", "vectors"])
def test_what_is_no_image_has_no_picture(
    quick_dump: QuickDump, others: Path, tmp_path: Path, data: str, teacher: str
) -> None:
    quick_dump(f"{others}:{data}", [f"{others}:{teacher}"])
    with pytest.raises(DataError, match="is no image") as caught:
        view_picture.draw_views(tmp_path / "cache", f"{data[:-1]}/3", tmp_path / "grid.png", allow_code=True)
    assert "softcache inspect" in caught.value.tip
    assert not (tmp_path / "grid.png").exists()


def test_items_of_any_layout_are_drawn(quick_dump: QuickDump, toy: Path, tmp_path: Path) -> None:
    """A tensor C x H x W, and an array H x W x 1: as their grey pictures."""
    draw = np.random.default_rng(0)
    grey = draw.integers(0, 256, (8, 8), dtype=np.uint8)
    for item in (torch.from_numpy(grey)[None], grey[:, :, None], grey):
        image = view_picture._image(item, "key")
        assert image.mode == "L" and image.size == (160, 160)
        assert np.array_equal(np.asarray(image), grey.repeat(20, axis=0).repeat(20, axis=1))
    assert torch.equal(to_tensor(like(to_tensor(grey), grey)), torch.from_numpy(grey)[None])


def test_errors_are_ours(quick_dump: QuickDump, tmp_path: Path) -> None:
    with pytest.raises(SoftcacheError, match="there is no such folder"):
        view_picture.draw_views(tmp_path / "nothing", "toy/0001", tmp_path / "grid.png", allow_code=True)
    with pytest.raises(ConfigError):
        view_picture.draw_views(tmp_path / "nothing", "toy/0001", tmp_path / "grid.gif")

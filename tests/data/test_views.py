"""Views: the generator against NumPy's Philox, every step against NumPy slices, and the same pixels at every asking."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional
from view_oracles import (
    LAYOUTS,
    SAMPLE,
    SEED,
    TOP,
    VIEW,
    channels_last,
    image_of,
    numpy_block,
    oracle_integer,
    oracle_uniform,
    oracle_words,
    policy_of,
)

from softcache.data import views
from softcache.data.philox import Draws, philox, step_key
from softcache.data.views import STEPS, Policy, Step, make_step, parse_step
from softcache.errors import ConfigError, DataError

# -------------------------------------------------------------------------------------------- the generator, from NumPy's


COUNTERS = [
    (0, 0, 0, 0),
    (1, 0, 0, 0),
    (TOP, TOP, TOP, TOP),
    (0, 1, 0, 0),
    (TOP, 0, TOP, 0),
    (2**63, 2**32, 7, 0),
    (0, 0, 0, TOP),
]


@pytest.mark.parametrize("key", [(0, 0), (1, 2), (TOP, TOP), (TOP, 0), (0x123456789ABCDEF0, 2**63)], ids=str)
@pytest.mark.parametrize("counter", COUNTERS, ids=str)
def test_philox_is_numpys(counter: tuple[int, int, int, int], key: tuple[int, int]) -> None:
    assert list(philox(counter, key)) == numpy_block(counter, key)


def test_philox_is_numpys_at_random_places() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        words = [int(w) for w in rng.integers(0, TOP, 6, dtype=np.uint64, endpoint=True)]
        counter, key = (words[0], words[1], words[2], words[3]), (words[4], words[5])
        assert list(philox(counter, key)) == numpy_block(counter, key)


def test_a_published_vector() -> None:
    """Random123's known answers (kat_vectors): philox4x64 10, all zero."""
    wanted = (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B)
    assert philox((0, 0, 0, 0), (0, 0)) == wanted


@pytest.mark.parametrize("seed", [0, 1, TOP, -1, 2**64 + 5], ids=str)
def test_words_come_in_order_block_after_block(seed: int) -> None:
    draws = Draws(seed, step_key("shift", 1), SAMPLE, VIEW)
    wanted = list(itertools.islice(oracle_words(seed, "shift", 1, SAMPLE, VIEW), 10))
    assert [draws.word() for _ in range(10)] == wanted


def test_numbers_are_made_of_one_word_each() -> None:
    draws = Draws(SEED, step_key("crop_flip", 0), SAMPLE, VIEW)
    words = oracle_words(SEED, "crop_flip", 0, SAMPLE, VIEW)
    for low, high in [(0, 0), (-4, 4), (0, 255), (-1, 0), (5, 2**40)]:
        assert draws.integer(low, high) == oracle_integer(next(words), low, high)
        assert draws.uniform() == oracle_uniform(next(words))


class Fixed(Draws):
    """Draws that give one word again and again."""

    def __init__(self, word: int) -> None:
        self.fixed = word

    def word(self) -> int:
        return self.fixed


def test_the_ends_of_the_ranges() -> None:
    assert Fixed(0).uniform() == 0.0
    assert Fixed(TOP).uniform() == 1 - 2.0**-53
    for low, high in [(0, 0), (-4, 4), (0, 9), (0, 2**63)]:
        assert Fixed(0).integer(low, high) == low and Fixed(TOP).integer(low, high) == high


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 1), (-2, 2), (3, 12)])
def test_every_integer_is_reached_about_equally_often(low: int, high: int) -> None:
    draws = Draws(0, 1, 2, 3)
    count = 2000 * (high - low + 1)
    found = np.bincount([draws.integer(low, high) - low for _ in range(count)], minlength=high - low + 1)
    assert len(found) == high - low + 1
    assert (np.abs(found - 2000) < 5 * np.sqrt(2000)).all()


def test_uniform_numbers_are_uniform() -> None:
    draws = Draws(0, 1, 2, 3)
    numbers = np.sort([draws.uniform() for _ in range(5000)])
    assert numbers[0] >= 0 and numbers[-1] < 1
    assert np.abs(numbers - (np.arange(5000) + 0.5) / 5000).max() < 1.63 / np.sqrt(5000)  # Kolmogorov, 1 %


def test_seed_step_occurrence_sample_and_view_each_give_other_numbers() -> None:
    firsts = {
        Draws(seed, step_key(name, occurrence), sample, view).word()
        for seed in (0, 1)
        for name in ("shift", "crop_flip")
        for occurrence in (0, 1)
        for sample in (0, 1, TOP)
        for view in (0, 1, 7)
    }
    assert len(firsts) == 2 * 2 * 2 * 3 * 3


# ------------------------------------------------------------------------------------------- the steps, from NumPy slices
# Each oracle takes (H, W, C) and gives (H', W', C').


def moved(image: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """out[y, x] = image[y + dy, x + dx], zero outside: a window of the image padded with itself's size of zeros."""
    height, width, _ = image.shape
    far = abs(dy) + abs(dx) + 1
    padded = np.pad(image, ((far, far), (far, far), (0, 0)))
    return padded[far + dy : far + dy + height, far + dx : far + dx + width]


def oracle_to_rgb(image: np.ndarray, words: Iterator[int]) -> np.ndarray:
    return np.concatenate([image] * 3, axis=2) if image.shape[2] == 1 else image[:, :, :3]


def oracle_center_crop(image: np.ndarray, words: Iterator[int], *, size: int) -> np.ndarray:
    for axis in (0, 1):
        short = max(0, size - image.shape[axis])
        pads = [(0, 0)] * 3
        pads[axis] = (short // 2, short - short // 2)
        image = np.pad(image, pads)
        start = round((image.shape[axis] - size) / 2)
        image = image.take(np.arange(start, start + size), axis=axis)
    return image


def oracle_shift(image: np.ndarray, words: Iterator[int], *, pixels: int = 2) -> np.ndarray:
    dy, dx = (oracle_integer(next(words), -pixels, pixels) for _ in range(2))
    return moved(image, dy, dx)


def oracle_crop_flip(image: np.ndarray, words: Iterator[int], *, padding: int = 4, flip: float = 0.5) -> np.ndarray:
    dy, dx = (oracle_integer(next(words), -padding, padding) for _ in range(2))
    image = moved(image, dy, dx)
    return image[:, ::-1] if oracle_uniform(next(words)) < flip else image


def triangle_weights(out: int, size: int) -> np.ndarray:
    """(out, size) weights of antialiased bilinear resampling: a triangle as wide as the output's pixels."""
    scale = max(1.0, size / out)
    centres = (np.arange(out) + 0.5) * size / out
    weights = np.maximum(0.0, 1 - np.abs(np.arange(size) + 0.5 - centres[:, None]) / scale)
    return weights / weights.sum(axis=1, keepdims=True)


def oracle_resize(image: np.ndarray, words: Iterator[int], *, size: int, height: int = 0) -> np.ndarray:
    down = triangle_weights(height or size, image.shape[0])
    across = triangle_weights(size, image.shape[1])
    return np.einsum("yh,xw,hwc->yxc", down, across, image.astype(np.float64))


ORACLES = {
    "to_rgb": oracle_to_rgb,
    "resize": oracle_resize,
    "center_crop": oracle_center_crop,
    "shift": oracle_shift,
    "crop_flip": oracle_crop_flip,
}
CASES = [
    "to_rgb",
    "resize:size=8",
    "resize:size=24",
    "resize:size=9,height=5",
    "resize:size=13,height=16",
    "center_crop:size=8",
    "center_crop:size=9",
    "center_crop:size=20",
    "center_crop:size=14",
    "shift",
    "shift:pixels=0",
    "shift:pixels=5",
    "shift:pixels=40",
    "crop_flip",
    "crop_flip:padding=0",
    "crop_flip:flip=0",
    "crop_flip:flip=1,padding=2",
    "crop_flip:padding=30,flip=0.25",
]


def test_every_case_has_an_oracle() -> None:
    assert set(ORACLES) == {case.partition(":")[0] for case in CASES} <= set(STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_a_step_gives_the_oracles_pixels(case: str, layout: str) -> None:
    item, policy = image_of(layout), policy_of(case)
    (step,) = policy.steps
    for view in range(12):
        made = policy.render(item, SAMPLE, view)
        words = oracle_words(SEED, step.name, 0, SAMPLE, view)
        wanted = ORACLES[step.name](channels_last(item), words, **step.parameters)
        assert type(made) is type(item) and made.dtype == item.dtype
        assert channels_last(made).shape == wanted.shape
        if step.name == "resize":
            assert np.abs(channels_last(made) - wanted).max() <= 1.0 + 1e-9  # torchvision rounds twice, in fixed point
        else:
            np.testing.assert_array_equal(channels_last(made), wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", [(8, 8), (24, 24), (16, 13), (5, 9)], ids=str)
def test_resize_is_torchvisions_whatever_the_layout(layout: str, target: tuple[int, int]) -> None:
    item = image_of(layout)
    made = policy_of(f"resize:size={target[1]},height={target[0]}").render(item, SAMPLE, 0)
    chw = torch.from_numpy(np.ascontiguousarray(channels_last(item).transpose(2, 0, 1)))
    wanted = functional.resize(chw, list(target), antialias=True)
    np.testing.assert_array_equal(channels_last(made), wanted.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("layout", ["grey", "rgb", "tensor rgb"])
@pytest.mark.parametrize("size", [8, 9, 14, 15, 20])
def test_center_crop_is_torchvisions(layout: str, size: int) -> None:
    item = image_of(layout)
    made = policy_of(f"center_crop:size={size}").render(item, SAMPLE, 0)
    chw = torch.from_numpy(np.ascontiguousarray(channels_last(item).transpose(2, 0, 1)))
    wanted = functional.center_crop(chw, [size, size])
    np.testing.assert_array_equal(channels_last(made), wanted.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("layout", "ndim"), [("grey", 2), ("grey with a channel", 3), ("rgb", 3), ("tensor grey", 3), ("tensor rgb", 3)]
)
def test_the_layout_of_the_item_is_kept(layout: str, ndim: int) -> None:
    item = image_of(layout)
    for case in ("shift", "crop_flip", "center_crop:size=8", "resize:size=8"):
        assert policy_of(case).render(item, SAMPLE, 1).ndim == ndim


def test_grey_becomes_rgb_in_the_items_kind() -> None:
    assert policy_of("to_rgb").render(image_of("grey"), SAMPLE, 0).shape == (16, 13, 3)
    assert policy_of("to_rgb").render(image_of("tensor grey"), SAMPLE, 0).shape == (3, 16, 13)


def test_all_shifts_and_both_mirrorings_occur() -> None:
    marked = np.zeros((9, 9), np.uint8)
    marked[4, 3] = 200
    shifts = {_where(policy_of("shift:pixels=2").render(marked, SAMPLE, view)) for view in range(300)}
    assert shifts == {(4 + dy, 3 + dx) for dy in range(-2, 3) for dx in range(-2, 3)}
    crops = {_where(policy_of("crop_flip:padding=1").render(marked, SAMPLE, view)) for view in range(400)}
    assert crops == {(y, x) for y in (3, 4, 5) for x in (2, 3, 4, 6, 5)}
    still = [_where(policy_of("crop_flip:padding=0").render(marked, SAMPLE, view)) for view in range(400)]
    assert 150 < sum(where == (4, 3) for where in still) < 250 and set(still) == {(4, 3), (4, 5)}


def _where(image: np.ndarray) -> tuple[int, int]:
    ((y, x),) = np.argwhere(image)
    return int(y), int(x)


# ------------------------------------------------------------------------------------------------------------- the policy


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_view_is_the_same_every_time(layout: str) -> None:
    item = image_of(layout)
    steps = ("to_rgb", "resize:size=20", "crop_flip", "shift", "center_crop:size=18")
    first, second = policy_of(*steps), policy_of(*steps)
    seen = [channels_last(first.render(item, SAMPLE, view)).copy() for view in range(6)]
    torch.manual_seed(1)  # nobody else's generator matters
    for view in reversed(range(6)):  # nor the order
        np.testing.assert_array_equal(channels_last(second.render(item, SAMPLE, view)), seen[view])


@pytest.mark.parametrize("case", ["shift", "crop_flip"])
def test_another_view_sample_or_seed_is_another_image(case: str) -> None:
    item = image_of("rgb")
    base = [policy_of(case).render(item, SAMPLE, view) for view in range(20)]
    samples = [policy_of(case).render(item, SAMPLE + 1, view) for view in range(20)]
    seeds = [policy_of(case, seed=SEED + 1).render(item, SAMPLE, view) for view in range(20)]
    for others in (samples, seeds, base[1:] + base[:1]):
        assert sum(not np.array_equal(a, b) for a, b in zip(base, others, strict=True)) >= 15


def rendered(item: Any, *steps: str) -> list[np.ndarray]:
    return [policy_of(*steps).render(item, SAMPLE, view) for view in range(8)]


def test_adding_a_step_never_shifts_another_steps_draws() -> None:
    """After a step that changes nothing by itself, the next one does as it did alone."""
    item = image_of("rgb")
    alone = rendered(item, "shift:pixels=3")
    for before in (("to_rgb",), ("crop_flip:padding=0,flip=0",), ("crop_flip:padding=0,flip=0", "to_rgb")):
        for one, other in zip(alone, rendered(item, *before, "shift:pixels=3"), strict=True):
            np.testing.assert_array_equal(one, other)
        for one, other in zip(alone, rendered(item, "shift:pixels=3", *before), strict=True):
            np.testing.assert_array_equal(one, other)


def test_equal_steps_draw_numbers_of_their_own() -> None:
    item = image_of("rgb")
    policy = policy_of("shift:pixels=3", "to_rgb", "shift:pixels=3")
    same = 0
    for view in range(12):
        first, second = (oracle_words(SEED, "shift", occurrence, SAMPLE, view) for occurrence in (0, 1))
        wanted = oracle_shift(oracle_shift(item, first, pixels=3), second, pixels=3)
        np.testing.assert_array_equal(policy.render(item, SAMPLE, view), wanted)
        twice = oracle_shift(
            oracle_shift(item, oracle_words(SEED, "shift", 0, SAMPLE, view), pixels=3),
            oracle_words(SEED, "shift", 0, SAMPLE, view),
            pixels=3,
        )
        same += np.array_equal(wanted, twice)
    assert same < 6


def test_without_steps_a_view_is_the_item_itself() -> None:
    for item in ("a text", np.zeros(3), object()):
        assert Policy().render(item, SAMPLE, 5) is item
    assert not Policy().is_random and str(Policy()) == "the items as they are"


def test_evaluation_leaves_the_random_steps_out() -> None:
    policy = policy_of("resize:size=20", "crop_flip", "center_crop:size=16", "shift", "to_rgb")
    plain = policy.for_evaluation()
    assert [step.name for step in plain.steps] == ["resize", "center_crop", "to_rgb"]
    assert plain.root_seed == policy.root_seed
    assert policy.is_random and not plain.is_random
    item = image_of("grey")
    np.testing.assert_array_equal(plain.render(item, 1, 0), plain.render(item, 2, 9))


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_random_exactly_when_it_draws(name: str) -> None:
    drawn: list[int] = []

    class Counted(Draws):
        def word(self) -> int:
            drawn.append(1)
            return super().word()

    parameters: dict[str, Any] = {"size": 8} if name in ("resize", "center_crop") else {}
    parameters = {"transform": "torchvision.transforms:RandomInvert"} if name == "seeded" else parameters
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    STEPS[name].function((image, image) if STEPS[name].mixing else image, Counted(0, 1, 2, 3), **parameters)
    assert bool(drawn) == STEPS[name].random


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_the_item_is_never_changed(case: str, layout: str) -> None:
    item = image_of(layout)
    before = channels_last(item).copy()
    for view in range(5):
        policy_of(case).render(item, SAMPLE, view)
    np.testing.assert_array_equal(channels_last(item), before)


def test_read_only_and_strided_arrays_are_taken() -> None:
    item = image_of("rgb")
    wanted = policy_of("crop_flip").render(item, SAMPLE, 2)
    frozen = item.copy()
    frozen.setflags(write=False)
    mirrored = item[:, ::-1].copy()[:, ::-1]
    fortran = np.asfortranarray(item)
    for other in (frozen, mirrored, fortran):
        np.testing.assert_array_equal(policy_of("crop_flip").render(other, SAMPLE, 2), wanted)


def test_a_pillow_image_is_rendered_like_its_array() -> None:
    grey, rgb = image_of("grey"), image_of("rgb")
    for item in (grey, rgb):
        made = policy_of("crop_flip").render(Image.fromarray(item), SAMPLE, 2)
        np.testing.assert_array_equal(made, policy_of("crop_flip").render(item, SAMPLE, 2))
    palette = Image.fromarray(rgb).quantize(16)  # colours by number: the numbers are no grey levels
    made = policy_of("to_rgb").render(palette, SAMPLE, 0)
    np.testing.assert_array_equal(made, np.array(palette.convert("RGB")))


@pytest.mark.parametrize(
    ("item", "found"),
    [
        ("a text", "str"),
        (np.zeros((4, 4, 3), np.float32), r"ndarray float32 \(4, 4, 3\)"),
        (np.zeros(16, np.uint8), r"ndarray uint8 \(16,\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"ndarray uint8 \(2, 4, 4, 3\)"),
        (torch.zeros(3, 4, 4), r"Tensor torch.float32 \(3, 4, 4\)"),
        (torch.zeros(4, 4, dtype=torch.uint8), r"Tensor torch.uint8 \(4, 4\)"),
        (None, "NoneType"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_a_uint8_image_is_refused(item: Any, found: str) -> None:
    with pytest.raises(DataError, match=f"a view policy needs uint8 images, got {found}"):
        policy_of("shift").render(item, SAMPLE, 0)


@pytest.mark.parametrize("channels", [2, 5])
def test_to_rgb_refuses_channels_it_cannot_name(channels: int) -> None:
    with pytest.raises(DataError, match=f"1, 3 or 4 channels, this one has {channels}"):
        policy_of("to_rgb").render(np.zeros((4, 4, channels), np.uint8), SAMPLE, 0)


# ---------------------------------------------------------------------------------------------------------- names on disk


def test_a_policy_comes_back_from_json() -> None:
    policy = policy_of("to_rgb", "resize:size=40,height=30", "crop_flip:padding=2,flip=0.1", "shift", "shift:pixels=7")
    stored = json.loads(json.dumps(policy.to_json()))
    assert Policy.from_json(stored, SEED) == policy
    assert stored[1] == {"name": "resize", "version": 1, "parameters": {"height": "30", "size": "40"}}
    assert stored[3]["parameters"] == {"pixels": "2"}  # defaults are written out
    assert str(policy).startswith("to_rgb | resize:size=40,height=30 | crop_flip:padding=2,flip=0.1")


def test_every_step_comes_back_from_json() -> None:
    texts = [name for name in STEPS if name not in ("resize", "center_crop", "seeded", "mixup", "cutmix")]
    texts += [
        "resize:size=9",
        "center_crop:size=8",
        "some/where/file.py:make?strength=3",
        "package.module:make",
        "cutmix",
    ]
    policy = policy_of(*texts)
    stored = json.loads(json.dumps(policy.to_json()))
    again = Policy.from_json(stored, SEED)
    assert again == policy and str(again) == str(policy)
    assert stored[-3:] == [
        {"name": "seeded", "version": 1, "parameters": {"transform": "some/where/file.py:make?strength=3"}},
        {"name": "seeded", "version": 1, "parameters": {"transform": "package.module:make"}},
        {"name": "cutmix", "version": 1, "parameters": {"alpha": "1.0"}},
    ]
    assert all(isinstance(value, str) for entry in stored for value in entry["parameters"].values())


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("shift:pixels=3", Step("shift", {"pixels": 3})),
        ("to_rgb", Step("to_rgb", {})),
        ("a.b:make", Step("seeded", {"transform": "a.b:make"})),
        ("file.py:make?x=1,2&y=z", Step("seeded", {"transform": "file.py:make?x=1,2&y=z"})),
        ("../dir/file.py:make", Step("seeded", {"transform": "../dir/file.py:make"})),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_step_is_a_name_or_a_factory(text: str, wanted: Step) -> None:
    assert parse_step(text) == wanted
    assert parse_step(str(wanted)) == wanted
    assert Policy.parse([text, "mixup"], 5) == Policy((wanted, make_step("mixup", {})), 5)


def test_a_policy_says_how_it_is_replayed() -> None:
    assert policy_of("shift", "randaugment", "mixup").replay == Policy().replay == "derived"
    assert policy_of("shift", "a.b:make").replay == "seeded"


def test_a_step_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = policy_of("shift").to_json()
    monkeypatch.setitem(views.STEPS, "shift", replace(STEPS["shift"], version=2))
    with pytest.raises(ConfigError, match=r"'shift' is version 1 in the cache, 2 here: .*other pixels"):
        Policy.from_json(stored, SEED)


def test_an_unknown_step_in_a_cache_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown view step 'solarize'"):
        Policy.from_json([{"name": "solarize", "version": 1, "parameters": {}}], SEED)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crop_flop", r"unknown view step 'crop_flop'\n.*did you mean 'crop_flip'"),
        ("shift:pixel=2", r"view step 'shift' has no parameter 'pixel'\n.*did you mean 'pixels'"),
        ("to_rgb:size=2", "view step 'to_rgb' has no parameter 'size'"),
        ("shift:image=2", "view step 'shift' has no parameter 'image'"),
        ("resize", r"view step 'resize': parameter 'size' is missing\n.*write resize:size="),
        ("resize:size=big", "view step 'resize': size: 'big' is not a whole number"),
        ("shift:pixels=1.5", "view step 'shift': pixels: '1.5' is not a whole number"),
        ("crop_flip:flip=often", "view step 'crop_flip': flip: 'often' is not a number"),
        ("resize:size=0", "view step 'resize': size=0 must be between 1 and 16384"),
        ("center_crop:size=-3", "view step 'center_crop': size=-3 must be between 1 and 16384"),
        ("shift:pixels=-1", "view step 'shift': pixels=-1 must be between 0 and 16384"),
        ("crop_flip:flip=nan", "view step 'crop_flip': flip=nan must be between 0 and 1"),
        ("crop_flip:flip=1.5", "view step 'crop_flip': flip=1.5 must be between 0 and 1"),
        ("crop_flip:flip=-0.1", "view step 'crop_flip': flip=-0.1 must be between 0 and 1"),
        ("resize:size=8,height=-1", "view step 'resize': height=-1 must be between 0 and 16384"),
        ("resized_crop_flip:size=0", "view step 'resized_crop_flip': size=0 must be between 1 and 16384"),
        ("resized_crop_flip:scale_max=1.1", "view step 'resized_crop_flip': scale_max=1.1 must be between 0 and 1"),
        ("resized_crop_flip:scale_min=0.6,scale_max=0.5", "scale_min=0.6 must be at most scale_max=0.5"),
        ("erase:scale_min=0.5", "view step 'erase': scale_min=0.5 must be at most scale_max=0.33"),
        ("erase:p=2", "view step 'erase': p=2.0 must be between 0 and 1"),
        ("rotate:degrees=-1", "view step 'rotate': degrees=-1.0 must be between 0 and 180"),
        ("rotate:degrees=inf", "view step 'rotate': degrees=inf must be between 0 and 180"),
        ("color_jitter:hue=0.6", "view step 'color_jitter': hue=0.6 must be between 0 and 0.5"),
        ("color_jitter:contrast=-1", "view step 'color_jitter': contrast=-1.0 must be between 0 and 10"),
        ("randaugment:magnitude=31", "view step 'randaugment': magnitude=31 must be between 0 and 30"),
        ("randaugment:ops=0", "view step 'randaugment': ops=0 must be between 1 and 100"),
        ("mixup:alpha=0", "view step 'mixup': alpha=0.0 must be between 0.01 and 100"),
        ("cutmix:alpha=inf", "view step 'cutmix': alpha=inf must be between 0.01 and 100"),
        ("crop_flip:flip=1,flip=0", "'flip' is given twice"),
    ],
    ids=lambda value: value if "view step" not in value else "",
)
def test_a_step_that_makes_no_sense_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        policy_of(text)


def test_numbers_and_strings_make_the_same_step() -> None:
    assert make_step("crop_flip", {"padding": 2}) == make_step("crop_flip", {"padding": "2"})
    assert make_step("shift", {}) == Step("shift", {"pixels": 2})


# --------------------------------------------------------------------------------------------------- at another resolution


@pytest.mark.parametrize(
    ("texts", "size", "wanted"),
    [
        (["resize:size=40"], 20, ["resize:size=20"]),
        (["resize:size=40,height=30"], 20, ["resize:size=20,height=15"]),
        (["resize:size=256", "center_crop:size=224"], 112, ["resize:size=128", "center_crop:size=112"]),
        (["shift:pixels=3", "resized_crop_flip:size=8"], 16, ["shift:pixels=3", "resized_crop_flip:size=16"]),
        (
            ["resize:size=32", "crop_flip:padding=4", "shift"],
            64,
            ["resize:size=64", "crop_flip:padding=8", "shift:pixels=4"],
        ),
        (["rotate", "resized_crop_flip:size=8", "mixup"], 9, ["rotate", "resized_crop_flip:size=9", "mixup"]),
        (["center_crop:size=20", "shift", "cutmix"], 10, ["center_crop:size=20", "shift", "resize:size=10", "cutmix"]),
    ],
    ids=str,
)
def test_a_policy_at_another_size(texts: list[str], size: int, wanted: list[str]) -> None:
    assert policy_of(*texts).at_size(size) == policy_of(*wanted)


def test_a_policy_without_sizes_has_no_other_resolution() -> None:
    with pytest.raises(ConfigError, match="no step that sets a size, so it cannot render at 16 pixels"):
        policy_of("crop_flip", "rotate").at_size(16)
    with pytest.raises(ConfigError, match="size=0 must be between 1 and 16384"):
        policy_of("resize:size=8").at_size(0)


@pytest.mark.parametrize(
    "texts",
    [
        ["resized_crop_flip:size=48"],
        ["resize:size=48", "crop_flip:padding=8", "erase:p=1"],
        ["resize:size=52", "center_crop:size=48"],
        ["rotate", "center_crop:size=48", "crop_flip"],
    ],
    ids=str,
)
def test_another_resolution_shows_the_same_part_of_the_image(texts: list[str]) -> None:
    """The small view is about the large one, reduced; another view is not."""
    rng = np.random.default_rng(5)
    coarse = torch.from_numpy(rng.integers(0, 256, (1, 3, 4)).astype(np.float32))
    item = functional.resize(coarse, [60, 80], antialias=True)[0].round().byte().numpy()
    policy, gaps, others = policy_of(*texts), [], []
    for sample in range(12):
        large = torch.from_numpy(policy.render(item, sample, 0).copy())[None]
        reduced = functional.resize(large, [24, 24], antialias=True)[0].float()
        gaps.append(float((torch.from_numpy(policy.at_size(24).render(item, sample, 0)) - reduced).abs().mean()))
        others.append(float((torch.from_numpy(policy.at_size(24).render(item, sample + 1, 0)) - reduced).abs().mean()))
    assert np.mean(gaps) < 10
    assert np.mean(others) > 20 or not policy.is_random


def test_the_same_image_stored_larger_gives_the_same_view() -> None:
    rng = np.random.default_rng(6)
    small = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    large = small.repeat(8, axis=0).repeat(8, axis=1)
    policy = policy_of("resized_crop_flip:size=6,scale_min=0.4")
    for sample in range(30):
        one, other = policy.render(small, sample, 0).astype(int), policy.render(large, sample, 0).astype(int)
        assert np.abs(one - other).mean() < 20  # of 64 between two random images

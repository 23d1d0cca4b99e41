"""The steps that torchvision applies: parameters derived by hand from NumPy's Philox, pixels from NumPy or a direct call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomErasing, RandomResizedCrop, functional
from view_oracles import (
    SAMPLE,
    SEED,
    channels_last,
    image_of,
    oracle_integer,
    oracle_uniform,
    oracle_words,
    policy_of,
)

from softcache.data import view_steps
from softcache.data.color import OPERATIONS, adjust_contrast, shuffled
from softcache.data.identity import pixel_digest
from softcache.data.philox import Draws, step_key
from softcache.data.view_steps import Box, draw_box, middle_box
from softcache.data.views import STEPS
from softcache.errors import DataError

UNIT = 65536
LAYOUTS = ["grey", "rgb", "tensor rgb", "grey with a channel"]
BILINEAR = InterpolationMode.BILINEAR

# ----------------------------------------------------------------------------- oracles: (C, H, W) uint8 -> (C, H', W') uint8


def oracle_box(words: Iterator[int], shape: tuple[int, int], scales: tuple[float, float], low: float) -> Any:
    """(top, left, height, width) in 1/65536 of the image; ratios from `low` to 1 / `low`... or None after ten tries."""
    (height, width), (scale_min, scale_max) = shape, scales
    high = 10 * 0.33 if low == 0.3 else 1 / low
    for _ in range(10):
        area = (scale_min + (scale_max - scale_min) * oracle_uniform(next(words))) * height * width
        ratio = math.exp(math.log(low) + math.log(high / low) * oracle_uniform(next(words)))
        w, h = round(UNIT * math.sqrt(area * ratio) / width), round(UNIT * math.sqrt(area / ratio) / height)
        if w <= UNIT and h <= UNIT:
            top = oracle_integer(next(words), 0, UNIT - h)
            return top, oracle_integer(next(words), 0, UNIT - w), h, w
    return None


def to_pixels(start: int, length: int, pixels: int) -> slice:
    """The two edges at the nearest border between pixels."""
    first, last = (math.floor(edge * pixels / UNIT + 0.5) for edge in (start, start + length))
    return slice(first, last) if last > first else slice(start * pixels // UNIT, start * pixels // UNIT + 1)


def oracle_resized_crop_flip(
    image: Tensor, words: Iterator[int], *, size: int, scale_min: float, scale_max: float, flip: float
) -> Tensor:
    mirrored = oracle_uniform(next(words)) < flip
    _, height, width = image.shape
    box = oracle_box(words, (height, width), (scale_min, scale_max), 3 / 4)
    if box is None:  # the middle, as wide or as high as the image
        w, h = min(width, height * 4 / 3), min(height, width * 4 / 3)
        w, h = round(w / width * UNIT), round(h / height * UNIT)
        box = ((UNIT - h) // 2, (UNIT - w) // 2, h, w)
    top, left, h, w = box
    ys, xs = to_pixels(top, h, height), to_pixels(left, w, width)
    made = functional.resized_crop(image, ys.start, xs.start, ys.stop - ys.start, xs.stop - xs.start, [size, size])
    return functional.hflip(made) if mirrored else made


def oracle_rotate(image: Tensor, words: Iterator[int], *, degrees: float) -> Tensor:
    angle = -degrees + 2 * degrees * oracle_uniform(next(words))
    return functional.rotate(image, angle, BILINEAR, fill=None)


def oracle_erase(image: Tensor, words: Iterator[int], *, p: float, scale_min: float, scale_max: float) -> Tensor:
    made = image.clone()
    if oracle_uniform(next(words)) < p:
        box = oracle_box(words, (image.shape[1], image.shape[2]), (scale_min, scale_max), 0.3)
        if box is not None:
            top, left, h, w = box
            made[:, to_pixels(top, h, image.shape[1]), to_pixels(left, w, image.shape[2])] = 0
    return made


def oracle_contrast(image: Tensor, factor: float) -> Tensor:
    """f x + (1 - f) mean grey level, in float64; torchvision's numbers, with a mean of any number of pixels."""
    pixels = image.numpy().astype(np.float64)
    grey = np.floor(np.tensordot([0.2989, 0.587, 0.114], pixels, 1) + 1e-5) if len(pixels) == 3 else pixels
    return torch.from_numpy(np.clip(factor * pixels + (1 - factor) * grey.mean() + 1e-5, 0, 255).astype(np.uint8))


def oracle_color_jitter(
    image: Tensor, words: Iterator[int], *, brightness: float, contrast: float, saturation: float, hue: float
) -> Tensor:
    left, order = [0, 1, 2, 3], []
    for last in (3, 2, 1):  # from the last place down, swapping with any place up to it
        other = oracle_integer(next(words), 0, last)
        left[last], left[other] = left[other], left[last]
    order = left
    spans = [(max(0, 1 - x), 1 + x) for x in (brightness, contrast, saturation)] + [(-hue, hue)]
    factors = [low + (high - low) * oracle_uniform(next(words)) for low, high in spans]
    changes: list[Callable[[Tensor, float], Tensor]] = [
        functional.adjust_brightness,
        oracle_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    ]
    for which in order:
        if (brightness, contrast, saturation, hue)[which] > 0:
            image = changes[which](image, factors[which])
    return image


def oracle_randaugment(image: Tensor, words: Iterator[int], *, ops: int, magnitude: int) -> Tensor:
    for _ in range(ops):
        which = oracle_integer(next(words), 0, 13)
        sign = -1 if oracle_uniform(next(words)) < 0.5 else 1
        image = oracle_operation(image, which, magnitude, sign)
    return image


def oracle_operation(image: Tensor, which: int, magnitude: int, sign: int) -> Tensor:
    """The table of RandAugment, with the strengths of torchvision's class of that name."""

    def strength(low: float, high: float) -> float:
        return float(np.linspace(low, high, 31)[magnitude])

    def affine(translate: list[int], shear: list[float], center: list[int] | None) -> Tensor:
        return functional.affine(image, 0.0, translate, 1.0, shear, BILINEAR, None, center)

    _, height, width = image.shape
    shear = math.degrees(math.atan(sign * strength(0, 0.3)))
    factor = 1 + sign * strength(0, 0.9)
    bits = 8 - int(np.round(np.arange(31) / 7.5)[magnitude])
    table: list[Callable[[], Tensor]] = [
        lambda: image,
        lambda: affine([0, 0], [shear, 0.0], [0, 0]),
        lambda: affine([0, 0], [0.0, shear], [0, 0]),
        lambda: affine([sign * int(strength(0, 150 / 331 * width)), 0], [0.0, 0.0], None),
        lambda: affine([0, sign * int(strength(0, 150 / 331 * height))], [0.0, 0.0], None),
        lambda: functional.rotate(image, sign * strength(0, 30), BILINEAR),
        lambda: functional.adjust_brightness(image, factor),
        lambda: functional.adjust_saturation(image, factor),
        lambda: oracle_contrast(image, factor),
        lambda: functional.adjust_sharpness(image, factor),
        lambda: functional.posterize(image, bits),
        lambda: functional.solarize(image, strength(255, 0)),
        lambda: functional.autocontrast(image),
        lambda: functional.equalize(image),
    ]
    return table[which]()


ORACLES: dict[str, Callable[..., Tensor]] = {
    "resized_crop_flip": oracle_resized_crop_flip,
    "rotate": oracle_rotate,
    "erase": oracle_erase,
    "color_jitter": oracle_color_jitter,
    "randaugment": oracle_randaugment,
}
CASES = [
    "resized_crop_flip:size=24",
    "resized_crop_flip:size=7,scale_min=0.5,scale_max=0.9,flip=0",
    "resized_crop_flip:size=9,scale_min=0,scale_max=0.01,flip=1",
    "resized_crop_flip:size=9,scale_min=1,scale_max=1",
    "rotate",
    "rotate:degrees=180",
    "rotate:degrees=0",
    "erase",
    "erase:p=1",
    "erase:p=1,scale_min=0,scale_max=0",
    "erase:p=0",
    "color_jitter",
    "color_jitter:brightness=0.4,contrast=0.4,saturation=0.4,hue=0.1",
    "color_jitter:contrast=2",
    "color_jitter:hue=0.5,brightness=1.5",
    "randaugment",
    "randaugment:ops=1,magnitude=30",
    "randaugment:ops=4,magnitude=17",
    "randaugment:ops=1,magnitude=0",
]
# steps whose oracle is in a test of their own: in cache/test_format.py, in test_replay.py
ELSEWHERE = {"middle_crop", "seeded"}


def test_every_step_has_an_oracle() -> None:
    """In one of three tables: of NumPy slices in test_views.py, of torchvision here, of pairs in test_mixing.py."""
    import test_mixing
    import test_views

    assert {*ORACLES, *test_views.ORACLES, *test_mixing.ORACLES, *ELSEWHERE} == set(STEPS)
    assert {case.partition(":")[0] for case in CASES} == set(ORACLES)


def channels_first(item: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(channels_last(item).transpose(2, 0, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_a_step_gives_the_oracles_pixels(case: str, layout: str) -> None:
    item, policy = image_of(layout), policy_of(case)
    before = channels_last(item).copy()
    (step,) = policy.steps
    for view in range(12):
        made = policy.render(item, SAMPLE, view)
        words = oracle_words(SEED, step.name, 0, SAMPLE, view)
        wanted = ORACLES[step.name](channels_first(item), words, **step.parameters)
        assert type(made) is type(item) and made.dtype == item.dtype and made.ndim == item.ndim
        np.testing.assert_array_equal(channels_last(made), wanted.permute(1, 2, 0).numpy())
    np.testing.assert_array_equal(channels_last(item), before)  # the item itself never changes


@pytest.mark.parametrize("case", ["rotate:degrees=90", "randaugment:ops=3", "color_jitter:hue=0.2,contrast=1"])
def test_another_view_sample_or_seed_is_another_image(case: str) -> None:
    item = image_of("rgb")
    base = [policy_of(case).render(item, SAMPLE, view) for view in range(20)]
    samples = [policy_of(case).render(item, SAMPLE + 1, view) for view in range(20)]
    seeds = [policy_of(case, seed=SEED + 1).render(item, SAMPLE, view) for view in range(20)]
    for others in (samples, seeds, base[1:] + base[:1]):
        assert sum(not np.array_equal(a, b) for a, b in zip(base, others, strict=True)) >= 15


@pytest.mark.parametrize(
    ("case", "other"),
    [
        ("resized_crop_flip:size=9", "resized_crop_flip:size=9,scale_min=0.09"),
        ("resized_crop_flip:size=9", "resized_crop_flip:size=9,scale_max=0.9"),
        ("resized_crop_flip:size=9,flip=0.4", "resized_crop_flip:size=9,flip=0.6"),
        ("rotate:degrees=15", "rotate:degrees=16"),
        ("erase:p=1", "erase:p=1,scale_max=0.25"),
        ("color_jitter:brightness=0.4", "color_jitter:brightness=0.5"),
        ("color_jitter:hue=0.1", "color_jitter:hue=0.2"),
        ("randaugment:magnitude=9", "randaugment:magnitude=12"),
        ("randaugment:ops=2", "randaugment:ops=3"),
    ],
)
def test_one_parameter_changes_pixels(case: str, other: str) -> None:
    item = image_of("rgb", height=40, width=32)
    changed = [
        not np.array_equal(policy_of(case).render(item, sample, 0), policy_of(other).render(item, sample, 0))
        for sample in range(30)
    ]
    assert any(changed)


# ---------------------------------------------------------------------------------------------- geometry, from NumPy alone


def rotated_by_numpy(image: np.ndarray, degrees: float) -> np.ndarray:
    """(H, W) float64: counter-clockwise about the middle, bilinear, zero outside."""
    height, width = image.shape
    y, x = np.mgrid[:height, :width] - np.array([(height - 1) / 2, (width - 1) / 2])[:, None, None]
    angle = math.radians(degrees)
    source_x = x * math.cos(angle) - y * math.sin(angle) + (width - 1) / 2
    source_y = x * math.sin(angle) + y * math.cos(angle) + (height - 1) / 2
    padded = np.pad(image.astype(np.float64), 40)
    left, top = np.floor(source_x).astype(int), np.floor(source_y).astype(int)
    across, down = source_x - left, source_y - top
    corners = [
        ((1 - down) * (1 - across), 0, 0),
        ((1 - down) * across, 0, 1),
        (down * (1 - across), 1, 0),
        (down * across, 1, 1),
    ]
    return sum(weight * padded[top + 40 + dy, left + 40 + dx] for weight, dy, dx in corners)  # type: ignore[return-value]


def test_rotation_is_bilinear_about_the_middle_with_zero_fill() -> None:
    item, policy = image_of("grey", height=25, width=18), policy_of("rotate:degrees=120")
    for view in range(10):
        angle = 120 * (2 * oracle_uniform(next(oracle_words(SEED, "rotate", 0, SAMPLE, view))) - 1)
        wanted = rotated_by_numpy(item, angle)
        assert np.abs(policy.render(item, SAMPLE, view) - wanted).max() < 0.51


def test_translation_is_by_whole_pixels_with_zero_fill() -> None:
    item = channels_first(image_of("rgb", height=40, width=33))
    for strength in (0.1, 0.5, 1.0):
        for sign in (-1, 1):
            dx, dy = (sign * int(150 / 331 * length * strength) for length in (33, 40))
            np.testing.assert_array_equal(OPERATIONS[3](item, strength, sign), view_steps.window(item, 0, -dx))
            np.testing.assert_array_equal(OPERATIONS[4](item, strength, sign), view_steps.window(item, -dy, 0))


def test_every_operation_of_randaugment_does_something_of_its_own() -> None:
    image = channels_first(image_of("rgb", height=24, width=24)) // 2 + 20
    made = {operation(image, 0.5, 1).numpy().tobytes() for operation in OPERATIONS}
    assert len(OPERATIONS) == len(made) == 14
    mirrored = [not torch.equal(operation(image, 0.5, 1), operation(image, 0.5, -1)) for operation in OPERATIONS]
    assert (
        mirrored == [False] + [True] * 9 + [False] * 4
    )  # posterize, solarize, autocontrast, equalize have no direction


def test_operations_at_every_strength() -> None:
    image = channels_first(image_of("rgb", height=23, width=27))
    for which, operation in enumerate(OPERATIONS):
        for magnitude in range(31):
            wanted = oracle_operation(image, which, magnitude, -1)
            difference = (operation(image, magnitude / 30, -1).int() - wanted.int()).abs()
            assert difference.max() <= 1 and (difference > 0).sum() <= 2, (
                which,
                magnitude,
            )  # strengths: equal but for ulps


@pytest.mark.parametrize("step", ["color_jitter", "randaugment"])
def test_colours_of_other_images_are_refused(step: str) -> None:
    with pytest.raises(DataError, match=rf"{step} takes grey or RGB images, this one has 4 channels\n.*to_rgb"):
        policy_of(step).render(image_of("rgba"), SAMPLE, 0)


def test_saturation_and_hue_leave_grey_images_alone() -> None:
    item, policy = image_of("grey"), policy_of("color_jitter:saturation=0.9,hue=0.5")
    for view in range(10):
        np.testing.assert_array_equal(policy.render(item, SAMPLE, view), item)


def test_all_orders_of_color_jitter_occur_equally_often() -> None:
    key = step_key("color_jitter", 0)
    orders = [tuple(shuffled(4, Draws(0, key, sample, 0))) for sample in range(2400)]
    found = np.array([orders.count(order) for order in set(orders)])
    assert len(found) == 24 and np.abs(found - 100).max() < 5 * math.sqrt(100)


def test_contrast_takes_the_exact_mean_of_a_large_image() -> None:
    """A float32 sum of 4 million levels would be off, and by the number of threads."""
    image = torch.full((1, 2048, 2048), 201, dtype=torch.uint8)
    image[0, ::2, ::2] = 100
    mean = (201 * 3 + 100) / 4
    made = adjust_contrast(image, 0.5).unique().tolist()
    assert made == [int(0.5 * 100 + 0.5 * mean), int(0.5 * 201 + 0.5 * mean)]


def test_contrast_is_torchvisions_on_small_images() -> None:
    image = channels_first(image_of("rgb", height=64, width=64))
    for factor in (0.0, 0.3, 0.77, 1.0, 1.6, 3.0):
        difference = adjust_contrast(image, factor).int() - functional.adjust_contrast(image, factor).int()
        assert difference.abs().max() <= 1 and (difference != 0).float().mean() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["resized_crop_flip", "rotate", "color_jitter:contrast=1,hue=0.2", "randaugment:ops=3"]
)
def test_the_number_of_threads_changes_no_pixel(case: str) -> None:
    item, policy, before = image_of("rgb", height=500, width=375), policy_of(case), torch.get_num_threads()
    try:
        for view in range(6):
            made = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                made.append(policy.render(item, SAMPLE, view))
            assert np.array_equal(made[0], made[1]) and np.array_equal(made[0], made[2])
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------------------ boxes


def drawn_boxes(count: int, aspect: float, *limits: float, name: str = "resized_crop_flip") -> list[Box | None]:
    return [draw_box(Draws(0, step_key(name, 0), sample, 0), aspect, *limits) for sample in range(count)]


def furthest_apart(one: Sequence[float], other: Sequence[float]) -> float:
    """The Kolmogorov-Smirnov statistic of two samples: how far their distribution functions are apart."""
    points = np.sort([*one, *other])
    shares = [np.searchsorted(np.sort(sample), points, side="right") / len(sample) for sample in (one, other)]
    return float(np.abs(shares[0] - shares[1]).max())


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(300, 400), (500, 500), (1000, 9000)])
def test_boxes_are_distributed_like_torchvisions(height: int, width: int) -> None:
    ours = [
        (box.height * box.width / UNIT**2, box.width / box.height, box.top / (UNIT - box.height + 1), box.left)
        for box in drawn_boxes(3000, width / height, 0.08, 1.0, 3 / 4, 4 / 3)
        if box is not None
    ]
    image = torch.zeros(1, height, width)
    theirs = []
    torch.manual_seed(0)
    for _ in range(3000):
        top, left, h, w = RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
        if (h, w) != (height, width) and not (top == (height - h) // 2 and h == height):  # not the way out
            theirs.append((h * w / height / width, w / h * height / width, top / (height - h + 1), left / width * UNIT))
    for mine, other in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        assert furthest_apart(mine, other) < 1.95 * math.sqrt(1 / len(ours) + 1 / len(theirs)) + 0.01


def test_erased_areas_are_distributed_like_torchvisions() -> None:
    image = torch.ones(1, 200, 300)
    ours = [box.height * box.width / UNIT**2 for box in drawn_boxes(3000, 1.5, 0.02, 0.33, 0.3, 3.3) if box is not None]
    torch.manual_seed(0)
    theirs = [RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])[2:4] for _ in range(3000)]
    assert furthest_apart(ours, [h * w / 60000 for h, w in theirs]) < 1.95 * math.sqrt(2 / 3000) + 0.01


def test_erase_happens_with_its_probability() -> None:
    item = np.full((20, 20), 9, np.uint8)
    policy = policy_of("erase:p=0.25")
    erased = sum(bool((policy.render(item, sample, 0) == 0).any()) for sample in range(2000))
    assert abs(erased - 500) < 4 * math.sqrt(2000 * 0.25 * 0.75)


@pytest.mark.parametrize("aspect", [4 / 3, 1.0, 0.4, 9.0])
def test_the_same_box_at_any_resolution(aspect: float) -> None:
    for box in filter(None, drawn_boxes(300, aspect, 0.08, 1.0, 3 / 4, 4 / 3)):
        small, large = box.pixels(36, 48), box.pixels(360, 480)
        assert all(abs(10 * one - other) <= 5 for one, other in zip(small, large, strict=True))
        assert 0 <= small[0] < small[1] <= 36 and 0 <= small[2] < small[3] <= 48


def test_ten_boxes_are_tried() -> None:
    key = step_key("erase", 0)
    draws, words = Draws(0, key, 1, 2), Draws(0, key, 1, 2)
    assert draw_box(draws, 1.0, 2.0, 2.0, 1.0, 1.0) is None
    assert draws.word() == [words.word() for _ in range(21)][-1]


def test_a_box_has_a_pixel_at_least() -> None:
    for start in (0, 1, UNIT // 2, UNIT - 1, UNIT):
        top, bottom, left, right = Box(start, start, 0, 0).pixels(5, 1)
        assert 0 <= top < bottom <= 5 and (left, right) == (0, 1)


@pytest.mark.parametrize(
    ("height", "width", "wanted"),
    [(300, 400, (0, 300, 0, 400)), (100, 400, (0, 100, 133, 267)), (400, 90, (140, 260, 0, 90))],
)
def test_the_way_out_is_the_largest_allowed_box_in_the_middle(height: int, width: int, wanted: tuple[int, ...]) -> None:
    assert middle_box(width / height, 3 / 4, 4 / 3).pixels(height, width) == wanted
    torch.manual_seed(0)
    top, left, h, w = RandomResizedCrop.get_params(torch.zeros(1, height, width), [2.0, 2.0], [3 / 4, 4 / 3])
    theirs = (top, top + h, left, left + w)
    assert all(abs(one - other) <= 1 for one, other in zip(wanted, theirs, strict=True))


# ------------------------------------------------------------------------------------------------- numbers that never change


def test_draws_of_steps_never_change() -> None:
    """Pinned: an accidental change of the arithmetic would be a new version of the step."""
    boxes = [
        draw_box(Draws(17, step_key("resized_crop_flip", 0), SAMPLE, view), 1.25, 0.08, 1.0, 3 / 4, 4 / 3)
        for view in range(2)
    ]
    assert boxes == [
        Box(top=19557, left=23314, height=41984, width=33309),
        Box(top=12491, left=17424, height=32829, width=32819),
    ]
    orders = [shuffled(4, Draws(17, step_key("color_jitter", 0), SAMPLE, view)) for view in range(3)]
    assert orders == [[3, 1, 2, 0], [1, 2, 3, 0], [3, 2, 1, 0]]


def test_pixels_of_our_own_arithmetic_never_change() -> None:
    wanted = {
        "shift:pixels=3": ["1f9c8cfd", "096e0279"],
        "crop_flip": ["a3e80f45", "377cf9e4"],
        "erase:p=1": ["793383eb", "d2970685"],
    }
    image = np.arange(20 * 24 * 3, dtype=np.int64).reshape(20, 24, 3) * 7 % 256
    digests = {
        case: [f"{pixel_digest(policy_of(case).render(image.astype(np.uint8), SAMPLE, view)):08x}" for view in (0, 1)]
        for case in wanted
    }
    assert digests == wanted


@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (120, 120), (31, 90)])
def test_students_of_random_crops_are_evaluated_on_the_middle(shape: tuple[int, int]) -> None:
    image = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (3, *shape)).astype(np.uint8))
    plain = policy_of("to_rgb", "resized_crop_flip:size=56", "color_jitter:brightness=0.4").for_evaluation()
    shorter_to_64 = functional.resize(image, [64], antialias=True)
    wanted = functional.center_crop(shorter_to_64, [56, 56])
    assert torch.equal(plain.render(image, 1, 0), wanted)
    assert [step.name for step in plain.steps] == ["to_rgb", "middle_crop"]

"""A view: one augmentation of a sample, replayed bit for bit from (root seed, sample id, view index).

A policy is a list of steps. A step's parameters are derived from the counter-based generator, never stored, so a view costs
nothing on disk and the student sees exactly the pixels the teacher saw. Images are uint8: NumPy H x W or H x W x C, or
tensors C x H x W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from softcache.cache.plan import ViewInfo
from softcache.data.color import color_jitter, randaugment
from softcache.data.images import describe, like, to_tensor
from softcache.data.mixing import cutmix, draw_partner, mixup
from softcache.data.philox import Draws, step_key
from softcache.data.seeded_transform import seeded
from softcache.data.step_parameters import read_parameters
from softcache.data.view_steps import (
    center_crop,
    crop_flip,
    erase,
    middle_crop,
    resize,
    resized_crop_flip,
    rotate,
    shift,
    to_rgb,
)
from softcache.errors import ConfigError, DataError, nearest
from softcache.spec import parse_spec, split_term


@dataclass(frozen=True)
class StepKind:
    """One kind of step: `function(image, draws, **parameters)` on a uint8 tensor (C, H, W).

    Attributes:
        version: part of a cache's identity; raised when the same parameters would give other pixels.
        random: it draws numbers; left out when a student is evaluated.
        mixing: takes a pair of images, the view and its partner, and gives (image, weight of the view's own label).
        evaluated: the step of the same size that stands in for a random one when a student is evaluated.
    """

    function: Callable[..., Any]
    version: int
    random: bool
    mixing: bool = False
    evaluated: str = ""


STEPS: dict[str, StepKind] = {
    "to_rgb": StepKind(to_rgb, version=1, random=False),
    "resize": StepKind(resize, version=1, random=False),
    "center_crop": StepKind(center_crop, version=1, random=False),
    "middle_crop": StepKind(middle_crop, version=1, random=False),
    "shift": StepKind(shift, version=1, random=True),
    "crop_flip": StepKind(crop_flip, version=1, random=True),
    "resized_crop_flip": StepKind(resized_crop_flip, version=1, random=True, evaluated="middle_crop"),
    "rotate": StepKind(rotate, version=1, random=True),
    "color_jitter": StepKind(color_jitter, version=1, random=True),
    "randaugment": StepKind(randaugment, version=1, random=True),
    "erase": StepKind(erase, version=1, random=True),
    "seeded": StepKind(seeded, version=1, random=True),
    "mixup": StepKind(mixup, version=1, random=True, mixing=True),
    "cutmix": StepKind(cutmix, version=1, random=True, mixing=True),
}


@dataclass(frozen=True)
class Step:
    """A step with all its parameters, as a policy names it."""

    name: str
    parameters: Mapping[str, Any]

    @property
    def kind(self) -> StepKind:
        return STEPS[self.name]

    @property
    def stream(self) -> str:
        """What names the step's draws: its name; of a seeded step the transform, so that two of them never share numbers."""
        return str(self.parameters["transform"]) if self.name == "seeded" else self.name

    def __str__(self) -> str:
        if self.name == "seeded":
            return self.stream
        values = ",".join(f"{key}={value}" for key, value in self.parameters.items())
        return f"{self.name}:{values}" if values else self.name

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "version": self.kind.version,
            "parameters": {key: str(value) for key, value in sorted(self.parameters.items())},
        }


def make_step(name: str, parameters: Mapping[str, Any]) -> Step:
    """A checked step; parameters may be strings. ConfigError for an unknown step or parameter, or a value that it cannot be."""
    if name not in STEPS:
        tip = f"{nearest(name, STEPS)} Your own transform: package.module:factory or path/file.py:factory"
        raise ConfigError(f"unknown view step {name!r}", tip=tip)
    return Step(name, read_parameters(STEPS[name].function, name, parameters))


def parse_step(text: str) -> Step:
    """A step as it is written on the command line.

    `name:key=value,key=value` is one of STEPS; `package.module:factory?arg=1` or `path/file.py:factory` gives a transform of
    the user's, image -> image, replayed by seeding. The factory is called when the first view is rendered.
    """
    if parse_spec(text).is_factory:
        return make_step("seeded", {"transform": text})
    return make_step(*split_term(text, "--policy"))


@dataclass(frozen=True)
class Policy:
    """An ordered list of steps and the root seed of their draws. Without steps, a view is the item itself.

    Attributes:
        first_view: what view 0 is called in the draws: a cache taken out of another one, or so dumped, begins with a later view.
        allow_code: whether transforms that it names may be called: not where a cache names them and nobody said so.

    Raises:
        ConfigError: a mixing step that is not the last one.
    """

    steps: tuple[Step, ...] = ()
    root_seed: int = 0
    first_view: int = 0
    allow_code: bool = field(default=True, compare=False)

    def __post_init__(self) -> None:
        for step in self.steps[:-1]:
            if step.kind.mixing:
                raise ConfigError(
                    f"view step {step.name!r} must be the last step of a policy, and the only one that mixes",
                    tip=f"this policy is {self}",
                )

    @classmethod
    def parse(cls, texts: Iterable[str], root_seed: int) -> Policy:
        """The policy of steps as they are written on the command line, see `parse_step`."""
        return cls(tuple(parse_step(text) for text in texts), root_seed)

    @property
    def mixing(self) -> Step | None:
        """The step that blends a view with its partner's: the last one, where there is one."""
        return self.steps[-1] if self.steps and self.steps[-1].kind.mixing else None

    @property
    def is_random(self) -> bool:
        """Whether views of different index differ."""
        return any(step.kind.random for step in self.steps)

    @property
    def replay(self) -> Literal["derived", "seeded"]:
        """How sure a replay is: "derived" from our own draws alone, or weaker, by seeding the generators of others."""
        return "seeded" if any(step.name == "seeded" for step in self.steps) else "derived"

    def render(self, item: Any, sample_id: int, view: int) -> Any:
        """The pixels of one view before mixing: a uint8 array or tensor in the item's own layout.

        Where no step but a mixing one is there, the item as it is.

        Raises:
            ConfigError: a step is code that may not be called.
            DataError: the policy has steps and the item is not a uint8 image.
        """
        if not self._keyed:
            return item
        image = to_tensor(item)
        for step, key in self._keyed:
            if step.name == "seeded" and not self.allow_code:
                raise ConfigError(
                    f"the views of this cache are made by code that it names: {step.stream}",
                    tip="if you know that code and trust it: --allow-code, or open(path, allow_code=True)",
                )
            image = step.kind.function(image, self._draws(key, sample_id, view), **step.parameters)
        return like(image, item)

    def partner(self, sample_id: int, view: int, count: int) -> int:
        """The row of a view's partner in a sample table of `count` rows; it may be the sample's own."""
        return draw_partner(self._mixing_draws(sample_id, view), count)

    def mix(self, image: Any, partner_image: Any, sample_id: int, view: int) -> tuple[Any, float]:
        """A rendered view blended with its partner, in its own layout, and the weight of its own label in [0, 1].

        Args:
            image, partner_image: from `render`, at the same view index.

        Raises:
            DataError: the two differ in size or channels.
        """
        step = self.mixing
        assert step is not None
        own, partner = to_tensor(image), to_tensor(partner_image)
        if own.shape != partner.shape:
            raise DataError(
                f"{step.name} needs images of one size, got {describe(image)} and its partner {describe(partner_image)}",
                tip="put resize or center_crop before it (to_rgb where some images are grey)",
            )
        draws = self._mixing_draws(sample_id, view)
        draws.word()  # the partner's
        mixed, share = step.kind.function((own, partner), draws, **step.parameters)
        return like(mixed, image), share

    def for_evaluation(self) -> Policy:
        """The same policy without its random steps; one that sets a size gives way to the step that sets it in the middle."""
        steps = []
        for step in self.steps:
            if not step.kind.random:
                steps.append(step)
            elif step.kind.evaluated:
                steps.append(make_step(step.kind.evaluated, {"size": step.parameters["size"]}))
        return replace(self, steps=tuple(steps))

    def at_size(self, size: int) -> Policy:
        """The same views, `size` pixels wide: the same draws and the same parts of the image, at another resolution.

        The last step with a size gets this one, those before it grow alike, and so do the pixels of steps behind the first of
        them. Where that first one is center_crop, whose box is in pixels of the item, all steps stay and a resize is added.

        Raises:
            ConfigError: no step has a size, so views have the size of their items.
        """
        sized = [step for step in self.steps if "size" in step.parameters]
        if not sized:
            raise ConfigError(
                f"the policy ({self}) has no step that sets a size, so it cannot render at {size} pixels",
                tip="the student must take the items' own size, or the data set give items of another one",
            )
        first, old = self.steps.index(sized[0]), sized[-1].parameters["size"]
        if sized[0].name == "center_crop":
            height = round(size * sized[-1].parameters.get("height", 0) / old)
            last = make_step("resize", {"size": size, "height": height})
            cut = len(self.steps) - (self.mixing is not None)
            return replace(self, steps=(*self.steps[:cut], last, *self.steps[cut:]))
        scaled = tuple(_scaled(step, size, old) for step in self.steps[first:])
        return replace(self, steps=self.steps[:first] + scaled)

    def to_json(self) -> list[dict[str, Any]]:
        return [step.to_json() for step in self.steps]

    @classmethod
    def from_json(cls, steps: Iterable[Mapping[str, Any]], root_seed: int, first_view: int = 0) -> Policy:
        """The policy a manifest or a run folder names; ConfigError when this version renders a step differently."""
        made = []
        for entry in steps:
            step = make_step(str(entry["name"]), entry["parameters"])
            if step.kind.version != entry["version"]:
                raise ConfigError(
                    f"view step {step.name!r} is version {entry['version']} in the cache, {step.kind.version} here: "
                    "it would render other pixels than the teacher saw",
                    tip="install the softcache that made the cache, or dump again",
                )
            made.append(step)
        return cls(tuple(made), root_seed, first_view)

    @classmethod
    def of_cache(cls, views: ViewInfo, *, allow_code: bool = False) -> Policy:
        """The policy that a manifest names."""
        return replace(cls.from_json(views.steps, int(views.root_seed), views.first), allow_code=allow_code)

    def __str__(self) -> str:
        return " | ".join(map(str, self.steps)) or "the items as they are"

    @cached_property
    def _keyed(self) -> tuple[tuple[Step, int], ...]:
        """The steps before mixing, each with the key of its draws."""
        names = [step.stream for step in self.steps if not step.kind.mixing]
        keys = [step_key(name, names[:place].count(name)) for place, name in enumerate(names)]
        return tuple(zip(self.steps, keys, strict=False))

    def _mixing_draws(self, sample_id: int, view: int) -> Draws:
        step = self.mixing
        if step is None:
            raise ConfigError(f"the policy ({self}) mixes nothing", tip="end it with mixup or cutmix")
        return self._draws(step_key(step.name, 0), sample_id, view)

    def _draws(self, key: int, sample_id: int, view: int) -> Draws:
        return Draws(self.root_seed, key, sample_id, self.first_view + view)


PIXEL_PARAMETERS = ("size", "height", "pixels", "padding")


def _scaled(step: Step, size: int, old: int) -> Step:
    scaled = {key: round(step.parameters[key] * size / old) for key in PIXEL_PARAMETERS if key in step.parameters}
    return make_step(step.name, {**step.parameters, **scaled})

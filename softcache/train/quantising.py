"""`--quantise int8`: from a stage on a student learns as the int8 program that it becomes. How: `models/fake_quantise.py`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from softcache.errors import ConfigError, first_offenders
from softcache.models import Model, Shrunk
from softcache.models.fake_quantise import Quantised, loosen
from softcache.models.int8_layers import begin_int8, fix_int8, observe, plan_int8
from softcache.train.stages import Stage

INT8 = "int8"


@dataclass(frozen=True)
class Quantising:
    """How the student of a run is quantised.

    Attributes:
        plan: its layers, as they learn.
        first: the stage from which on they do.
        loaded: the student came quantised: its ends stay as they are, and its scales follow its weights.
        told: what stays in floats.
    """

    plan: Mapping[str, Quantised]
    first: int = 0
    loaded: bool = False
    told: tuple[str, ...] = ()

    @classmethod
    def of(cls, stages: Sequence[Stage], model: Model, text: str, sample: Any) -> Quantising | None:
        """What the stages ask for, or what the student is already; None where it stays in floats.

        Args:
            model: on the CPU; a student that came quantised is made one that learns.
            text: the student as the user named it.
            sample: collated.

        Raises:
            ConfigError: asked for of a quantised student, or of one without layers that could be quantised.
        """
        asked = [number for number, stage in enumerate(stages) if stage.config.quantise]
        if model.shrunk is not None and model.shrunk.quantised:
            if asked:
                raise ConfigError(
                    f"--quantise {INT8}: {text} is quantised already, and learns as such", tip="leave --quantise out"
                )
            loosen(model.net)
            return cls({name: replace(how, norm=None) for name, how in model.shrunk.quantised.items()}, loaded=True)
        if not asked:
            return None
        if model.graft is not None:
            raise ConfigError(
                f"--quantise {INT8}: the student answers by its teacher's classifier (simkd), which stays in floats",
                tip="learn by other terms than simkd, or leave --quantise out",
            )
        plan, floats = plan_int8(model.net, lambda: model(sample))
        if not plan:
            raise ConfigError(
                f"--quantise {INT8}: {text} has no nn.Conv2d and no nn.Linear that could be quantised",
                tip="leave --quantise out, or choose another student",
            )
        names = [name or "the network itself" for name in floats]
        left = f"--quantise {INT8}: {len(names)} modules with weights stay floats: {first_offenders(names, len(names))}"
        return cls(plan, asked[0], told=(left,) if names else ())

    def begin(self, stage: int, models: Sequence[Model]) -> None:
        """Before a stage: where it is the first of those, the layers of the student, and of its average, learn as int8."""
        if stage == self.first and not self.loaded:
            for model in models:
                begin_int8(model.net, self.plan)

    def observe(self, model: Model, stage: int) -> None:
        """Before an epoch: in the stage in which it begins the ends follow the activations; in later ones they stay."""
        observe(model.net, on=stage == self.first and not self.loaded)

    def rest(self, model: Model) -> None:
        """After an epoch: what the student is evaluated on moves nothing."""
        observe(model.net, on=False)

    def fix(self, model: Model) -> None:
        """Make the student what is saved: whole numbers with scales, BatchNorm folded."""
        fix_int8(model.net, self.plan)
        if not self.loaded:
            record = Shrunk(quantised=self.plan)
            model.shrunk = record if model.shrunk is None else model.shrunk.then(record)

    def fixed(self, model: Model, stage: int) -> Model:
        """The student as it is saved after an epoch of a stage; itself where it is still in floats."""
        if stage < self.first:
            return model
        saved = copy.deepcopy(model)
        self.fix(saved)
        return saved

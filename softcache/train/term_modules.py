"""What a loss term has of its own: adapters between the student's layers and the teacher's, learned parts, memories."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from softcache.data.class_counts import counted_labels
from softcache.data.transfer_set import TransferSet
from softcache.errors import CacheError, LossError
from softcache.features.spec import FeatureSpec
from softcache.losses import CLASS_WEIGHTS, OUTPUT, Loss, LossTerm
from softcache.losses.adapters import make_adapter
from softcache.targets.batch import Targets
from softcache.targets.output_scale import scaled
from softcache.targets.teacher import CachedTeacher
from softcache.train.class_weights import class_weights
from softcache.train.pairs import SIZED, Pair


@dataclass(frozen=True)
class Sizes:
    """What learned parts and memories are made for.

    Attributes:
        num_samples: of the transfer set.
        num_classes: C of the student.
        sample_labels: (num_samples,) int64, -1 = none; or where samples have several answers one for each of these.
        seed: of the run.
        class_names: of the student's classes.
    """

    num_samples: int = 0
    num_classes: int = 0
    sample_labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    seed: int = 0
    class_names: tuple[str, ...] = ()

    @classmethod
    def of(cls, transfer_set: TransferSet, seed: int) -> Sizes:
        """Of a run on these samples."""
        labels, count = torch.from_numpy(counted_labels(transfer_set)), len(transfer_set)
        single = labels.long() if labels.ndim == 1 else torch.full((count,), -1)
        return cls(count, transfer_set.num_classes, single, seed, tuple(transfer_set.class_names))


class TermModules(nn.Module):
    """What a term has of its own: an adapter for each pair of layers, scales, and the loss's module where it has state.

    Raises:
        LossError: widths or sizes that do not fit.
    """

    def __init__(
        self,
        term: LossTerm,
        pairs: Sequence[Pair] = (),
        sizes: Sizes = Sizes(),
        teacher: CachedTeacher | None = None,
    ) -> None:
        super().__init__()
        loss = term.loss
        self.pairs = tuple(pairs)
        self._joint = joint = loss.needs("student_maps")
        if joint and len(self.pairs) < loss.least_maps:
            raise LossError(
                f"loss {term.name!r} takes {loss.least_maps} maps or more, and is given {self.pairs[0].stored} alone",
                tip=f"softcache dump --for {term.name} keeps the last map of each size; layer=NAME/NAME chooses",
            )
        self.adapters = nn.ModuleList()
        shapes = []
        for pair in self.pairs:
            # what a student gives is used as it is: an adapter behind it would be left out of its export
            default = "identity" if pair.student == (OUTPUT,) else loss.adapter
            kind = term.placement.get("adapter", default)
            try:
                adapter = _adapter(loss, kind, pair)
                shapes.append(_adapted_shape(pair, adapter))
            except LossError as exc:
                exc.add_note(
                    f"loss {term.name!r}: layer {'+'.join(pair.student)} of the student, {pair.stored} of the teacher "
                    f"{pair.member!r}"
                )
                raise
            self.adapters.append(adapter)
        self._both = loss.widths
        self.scales = nn.ModuleList(_scale(term, pair, teacher) for pair in self.pairs if "scale" in term.placement)
        asked = term.settings.get(CLASS_WEIGHTS)
        weights = class_weights(asked, sizes.sample_labels, sizes.class_names) if asked else None
        self.register_buffer(CLASS_WEIGHTS, weights, persistent=False)
        self._function = loss.function
        self.cores = nn.ModuleList()
        if loss.module is not None:
            each: list[tuple[tuple[int, ...] | None, Pair | None]] = [(None, None)]
            if pairs and not joint:
                each = list(zip(shapes, pairs, strict=True))
            for one in each:
                self.cores.append(_core(term, *one, shapes, self.pairs, sizes))
        elif not joint:
            for own, pair in zip(shapes, pairs, strict=True):
                if (loss.widths or not pair.is_vector) and own != pair.teacher_shape:
                    raise LossError(
                        f"loss {term.name!r}: layer {'+'.join(pair.student)} of the student gives {own}, "
                        f"{pair.stored} of the teacher {pair.teacher_shape}",
                        tip="name layers that fit: layer=, student="
                        + ("" if len(pair.student) > 1 else "; or add adapter=linear"),
                    )
        if loss.needs("classifier_weight", "classifier_bias"):
            assert teacher is not None
            weight, bias = teacher.classifier()
            for pair in self.pairs:
                if pair.teacher_shape != weight.shape[1:]:
                    raise LossError(
                        f"loss {term.name!r}: {pair.stored} of the teacher is {pair.teacher_shape}, its classifier takes "
                        f"{weight.shape[1]} numbers",
                        tip="it needs what the final linear layer takes: dump --codec linear_head, or the features before it",
                    )
            self.register_buffer("classifier_weight", weight, persistent=False)
            self.register_buffer("classifier_bias", bias, persistent=False)

    def calls(
        self, outputs: Mapping[str, Tensor], targets: Targets | None
    ) -> list[tuple[Callable[..., Tensor], dict[str, Any]]]:
        """How often the loss is called on a batch, each time with which function or module and with which features.

        Args:
            outputs: the student's layers -> (B, ...).
            targets: of the batch.
        """
        functions: list[Callable[..., Any]] = list(self.cores)
        functions = functions or [self._function] * max(1, len(self.pairs))
        if not self.pairs:
            return [(functions[0], {})]
        assert targets is not None
        student = [self.student_tensor(index, outputs) for index in range(len(self.pairs))]
        teacher = [pair.teacher_tensor(targets) for pair in self.pairs]
        for index, scale in enumerate(self.scales):
            teacher[index] = scale(teacher[index])
            student[index] = scale(student[index]) if self._both else student[index]
        if self._joint:
            return [(functions[0], {"student_maps": student, "teacher_maps": teacher})]
        classifier = dict(self.named_buffers(recurse=False))
        return [
            (function, {"student_features": own, "teacher_features": other, **classifier})
            for function, own, other in zip(functions, student, teacher, strict=True)
        ]

    def student_tensor(self, index: int, outputs: Mapping[str, Tensor]) -> Tensor:
        """(B, ...) of one pair, as the loss gets it: a map is adapted, then reduced; a vector the other way round."""
        pair = self.pairs[index]
        raw = [outputs[layer] for layer in pair.student]
        if pair.is_vector:
            return self.adapters[index](pair.student_vector(raw[0]))
        maps = [self.adapters[index](raw[0])] if len(raw) == 1 else raw
        return FeatureSpec(pair.student, pair.student_reduction).reduce(*maps)


class _Scale(nn.Module):
    """(B, W) numbers at the scale of a member; it learns nothing and is no part of a checkpoint, since the cache has it."""

    def __init__(self, mean: Tensor, factor: Tensor) -> None:
        super().__init__()
        self.mean: Tensor
        self.factor: Tensor
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("factor", factor, persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        return scaled(values, self.mean, self.factor)


def _scale(term: LossTerm, pair: Pair, teacher: CachedTeacher | None) -> nn.Module:
    """What brings both sides of a comparison number by number to the member's scale, and of relations the teacher's side."""
    assert teacher is not None
    kind = term.placement["scale"]
    if pair.stored != OUTPUT:
        raise LossError(
            f"loss {term.name!r}: scale={kind} is of what a member gave, an embedding or values, and {pair.stored} of member "
            f"{pair.member!r} is a layer",
            tip="leave scale= out, or dump the layer as an output: head=none is the input of the last one",
        )
    try:
        return _Scale(*teacher.cache.output_scale(pair.member, kind))
    except CacheError as exc:
        raise LossError(f"loss {term.name!r}: scale={kind}: {exc.message}", tip=exc.tip) from exc


def _adapter(loss: Loss, kind: str, pair: Pair) -> nn.Module:
    """Between a student's layer and the teacher's: to its width where that matters, to its size where that does."""
    if len(pair.student) > 1:
        return nn.Identity()
    own = pair.student_shapes[0]
    if pair.is_vector:
        if not loss.widths and kind == "identity":
            return nn.Identity()
        vector = pair.student_vector(torch.empty(0, *own))
        return make_adapter(kind, tuple(vector.shape[1:]), pair.teacher_shape)
    teacher = pair.teacher_shapes[0]
    if len(own) != len(teacher):
        raise LossError(f"it gives {own}, the teacher's layer {teacher}", tip="name another layer: student=LAYER")
    if len(own) < 3:
        return make_adapter(kind, own, teacher) if loss.widths else nn.Identity()
    width = teacher[0] if loss.widths or kind != "identity" else own[0]
    size = teacher[1:] if pair.reduction in SIZED else own[1:]
    return make_adapter(kind, own, (width, *size))


def _adapted_shape(pair: Pair, adapter: nn.Module) -> tuple[int, ...]:
    """Of one record of a student's layer as the loss gets it."""
    shapes = pair.student_shapes
    with torch.no_grad():
        if pair.is_vector:
            return tuple(adapter(pair.student_vector(torch.zeros(2, *shapes[0]))).shape[1:])
        if len(shapes) == 1:
            shapes = (tuple(adapter(torch.zeros(2, *shapes[0])).shape[1:]),)
    return FeatureSpec(pair.student, pair.student_reduction).reduced_shape(*shapes)


def _core(
    term: LossTerm,
    own: tuple[int, ...] | None,
    pair: Pair | None,
    shapes: Sequence[tuple[int, ...]],
    pairs: Sequence[Pair],
    sizes: Sizes,
) -> nn.Module:
    """The module of a loss that has state, built for the shapes it will see."""
    known: dict[str, Any] = {
        "student_shape": own,
        "teacher_shape": None if pair is None else pair.teacher_shape,
        "student_shapes": list(shapes),
        "teacher_shapes": [one.teacher_shape for one in pairs],
        **vars(sizes),
    }
    module = term.loss.module
    assert module is not None
    fixed = {name: term.settings[name] for name in term.loss.fixed}
    try:
        return module(**{name: known[name] for name in term.loss.sizes}, **fixed)
    except ValueError as exc:
        raise LossError(f"loss {term.name!r}: {exc}") from exc

"""Which layer of the student learns from which stored layer of the teacher, for losses on features."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from typing import Any, Self

from torch import Tensor, nn

from softcache.cache.plan import OTHER_OUTPUTS
from softcache.errors import LossError, nearest
from softcache.features.spec import FeatureSpec, Shape
from softcache.features.taps import (
    ClassifierTap,
    ModuleShape,
    Taps,
    classifier_feature,
    classifier_of,
    list_modules,
    map_ends,
    shapes_of,
)
from softcache.losses import CLASSIFIER, OUTPUT, VECTORS, LossTerm, middle
from softcache.losses.adapters import fit_map
from softcache.targets.batch import Targets
from softcache.targets.cache import Cache

SIZED = ("map", "attention", "spatial_gram", "sign")  # reductions whose shape goes by the size of the map
SEPARATOR = "/"  # between layers: layer=layer1/layer2/layer3


@dataclass(frozen=True)
class Pair:
    """A layer of the student and the stored feature of the teacher that it learns from.

    Attributes:
        member: whose.
        stored: the feature's name in the cache, or CLASSIFIER: what a linear_head codec keeps; or OUTPUT: the member's embedding
            or values.
        reduction: what the loss gets of the teacher's layer.
        teacher_shapes: of one record of the teacher's layers, before the reduction, after `fit`.
        teacher_shape: of one record as the loss gets it.
        student: the student's layers (two for fsp); (CLASSIFIER,) is the input of its final linear layer, (OUTPUT,) its output.
        student_reduction: what the loss gets of the student's.
        student_shapes: of one record of its layers.
        fit: size to which a stored map of the teacher is averaged down before it is reduced, as the student's is smaller.
    """

    member: str
    stored: str
    reduction: str
    teacher_shapes: tuple[Shape, ...]
    teacher_shape: Shape
    student: tuple[str, ...]
    student_reduction: str
    student_shapes: tuple[Shape, ...]
    fit: tuple[int, ...] | None = None

    @property
    def is_vector(self) -> bool:
        """The loss compares vectors, whatever the layers give."""
        return self.reduction in VECTORS

    def student_vector(self, output: Tensor) -> Tensor:
        """(B, D) of a student's (B, ...) layer, before an adapter; of pairs that compare vectors."""
        whole = self.student in ((CLASSIFIER,), (OUTPUT,))
        return output if whole else FeatureSpec(("",), self.student_reduction).reduce(output)

    def teacher_tensor(self, targets: Targets) -> Tensor:
        """(B, *teacher_shape) float32 of a batch of targets."""
        if self.stored == CLASSIFIER:
            return targets.classifier_input(self.member)
        if self.stored == OUTPUT:
            return targets.output(self.member)
        value = targets.feature(self.stored, self.member)
        if self.fit is not None:
            value = fit_map(value, self.fit)
        if self.stored.endswith(f":{self.reduction}"):
            return value
        return FeatureSpec(("",), self.reduction).reduce(value)


class Student:
    """A student's network as far as pairing needs it: what its modules give for a batch like those to come.

    Attributes:
        width: how many numbers it gives, where these are an embedding or values; None where they are logits.
    """

    def __init__(self, net: nn.Module, inputs: Any, width: int | None = None) -> None:
        self.net, self.width = net, width
        self.modules: list[ModuleShape] = list_modules(net, inputs)
        self.map_ends = map_ends(net, inputs)
        self.classifier = classifier_of(net, inputs)
        pooled = None if self.classifier is None else classifier_feature(net, inputs, self.classifier, of_map=True)
        self.classifier_map = None if pooled is None else pooled.layers[0]  # of which the classifier takes the average

    @property
    def classifier_name(self) -> str:
        """The final linear layer's, in `named_modules()`; LossError where there is none."""
        self.shape((CLASSIFIER,))
        return next(name for name, module in self.net.named_modules() if module is self.classifier)

    def shape(self, layers: tuple[str, ...]) -> tuple[Shape, ...]:
        """Of one record of these layers' outputs; LossError or ConfigError where there is no such layer."""
        if layers == (OUTPUT,):
            if self.width is None:
                raise LossError(
                    "the student gives classes, and its output is compared with an embedding or values",
                    tip="leave the losses on classes out, and it gives what the member gives; or name a layer: student=head",
                )
            return ((self.width,),)
        if layers != (CLASSIFIER,):
            known = {module.name for module in self.modules}
            for layer in layers:
                if layer not in known:
                    shown = [module.name for module in self.map_ends] or sorted(known)
                    raise LossError(f"the student has no module {layer!r}", tip=nearest(layer, shown))
            return shapes_of(FeatureSpec(layers, "fsp" if len(layers) == 2 else "map"), self.modules)
        if self.classifier is None:
            raise LossError(
                "the student has no final nn.Linear whose input could be compared with the teacher's",
                tip="name a layer of the student: student=LAYER",
            )
        return ((self.classifier.in_features,),)


class StudentTaps:
    """While it is entered, a forward pass of the network leaves what the pairs ask for: `outputs()`."""

    def __init__(self, student: Student, pairs: Sequence[Pair]) -> None:
        layers = dict.fromkeys(layer for pair in pairs for layer in pair.student)
        specs = [FeatureSpec((layer,)) for layer in layers if layer not in (CLASSIFIER, OUTPUT)]
        self._net = student.net
        self._taps = Taps(student.net, specs, detach=False) if specs else None
        self._classifier = (
            ClassifierTap(student.classifier, detach=False)
            if CLASSIFIER in layers and student.classifier is not None
            else None
        )
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        if self._taps is not None:
            self._hooks.enter_context(self._taps)
        if self._classifier is not None:
            tap = self._hooks.enter_context(self._classifier)
            # evaluation runs the network too, and takes nothing
            self._hooks.enter_context(self._net.register_forward_pre_hook(lambda *_: tap.forget()))
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def outputs(self) -> dict[str, Tensor]:
        """Layer -> (B, ...) at least float32, with gradients; then forgotten."""
        found = {} if self._taps is None else self._taps.reduced()
        values = {name.rpartition(":")[0]: value for name, value in found.items()}
        return values if self._classifier is None else values | {CLASSIFIER: self._classifier.value()}


def pairs_of(
    term: LossTerm, cache: Cache, members: Sequence[str], student: Student, *, layer: str | None = None
) -> list[Pair]:
    """The pairs of layers that a loss on features compares, as the term says or as the two networks suggest.

    Args:
        layer: the student's, whatever the term says: where a projector was built in.

    Raises:
        LossError: the cache does not hold what the loss needs, or it is not clear which layer is meant.
    """
    loss, said = term.loss, term.placement
    member, names = _teacher_layers(term, cache, members)
    given = layer or said.get("student", "")
    are_vectors = CLASSIFIER in loss.features and all(_positions(cache, member, name) == 1 for name in names)
    alone = cache.member(member).output is None and are_vectors  # then these are what a student without classes gives
    if not given and student.width is not None and (names == [OUTPUT] or alone):
        given = OUTPUT
    layers = _layers(given) if given else _student_layers(term, names, student, are_vectors=are_vectors)
    if len(layers) != len(names):
        raise LossError(
            f"loss {term.name!r}: {len(layers)} layers of the student for {len(names)} of the teacher ({', '.join(names)})",
            tip="name one for each: student=layer1/layer2",
        )
    pairs = []
    for name, own in zip(names, layers, strict=True):
        own_shapes = student.shape(own)
        reduction, shapes = _as_needed(term, cache, member, name)
        fit = _smaller_size(name, reduction, shapes, own_shapes)
        if fit is not None:
            shapes = ((shapes[0][0], *fit),)
        layers_of = tuple(name.rpartition(":")[0].split("+"))
        shape = (
            shapes[0] if reduction in (CLASSIFIER, OUTPUT) else FeatureSpec(layers_of, reduction).reduced_shape(*shapes)
        )
        own_reduction = loss.reduction or (_vector(reduction, own_shapes[0]) if reduction in VECTORS else reduction)
        if own not in ((CLASSIFIER,), (OUTPUT,)):
            FeatureSpec(own, own_reduction).check(*own_shapes)
        pairs.append(Pair(member, name, reduction, shapes, shape, own, own_reduction, own_shapes, fit))
    return pairs


def _teacher_layers(term: LossTerm, cache: Cache, members: Sequence[str]) -> tuple[str, list[str]]:
    """The member and the stored features that a term compares with."""
    loss, said = term.loss, term.placement
    if "member" in said and said["member"] not in members:
        raise LossError(f"loss {term.name!r}: no member {said['member']!r}", tip=nearest(said["member"], members))
    holders: dict[str, list[str]] = {}
    for member in [said["member"]] if "member" in said else members:
        serving = _serving(term, cache, member)
        if serving:
            holders[member] = serving
    if not holders:
        held = sorted({name for member in members for name in cache.features[member]})
        wanted = [f"LAYER:{kind}" for kind in loss.features if kind not in (CLASSIFIER, OUTPUT)]
        if not wanted:
            given = ", ".join(f"{member!r} {cache.member(member).output or 'features alone'}" for member in members)
            raise LossError(
                f"loss {term.name!r} is of members that gave an embedding or values; here gave {given}",
                tip="use kd, or dump a teacher with output=values or output=embedding",
            )
        raise LossError(
            f"loss {term.name!r} needs a feature of the teacher as {' or '.join(wanted)}; "
            f"the cache holds {', '.join(held) or 'none'}",
            tip=f"softcache dump --for {term.name} ... stores the cheapest; --features {wanted[-1]} chooses",
        )
    if len(holders) > 1:
        raise LossError(
            f"loss {term.name!r} compares with one teacher, and these have such features: {', '.join(holders)}",
            tip="name it: member=NAME",
        )
    ((member, names),) = holders.items()
    if "layer" in said:
        return member, [_named(term, text, names) for text in said["layer"].split(SEPARATOR)]
    layers: dict[str, str] = {}  # -> the cheapest that serves of each
    for name in names:
        layers.setdefault(name.rpartition(":")[0] or name, name)
    chosen = sorted(layers.values(), key=lambda name: -_positions(cache, member, name))  # early to late
    if loss.layers != "map_ends":
        return member, [_likely(term, cache, member, chosen)]
    ends: dict[Any, str] = {}  # of maps of one size the first: a later one is there for the classifier's sake
    for name in chosen:
        ends.setdefault(_positions(cache, member, name) if name.count("+") == 0 else name, name)
    return member, list(ends.values())


def _serving(term: LossTerm, cache: Cache, member: str) -> list[str]:
    """The member's features that serve a term, cheapest kind first."""
    codec, found = cache.codecs.get(member), {}
    if codec is not None and codec.needs_classifier:
        found[CLASSIFIER] = [CLASSIFIER]
    if cache.member(member).output in OTHER_OUTPUTS:
        found[OUTPUT] = [OUTPUT]
    for name in cache.features[member]:
        found.setdefault(name.rpartition(":")[2], []).append(name)
    return [name for kind in term.loss.features for name in found.get(kind, ())]


def _positions(cache: Cache, member: str, name: str) -> int:
    """H W of the map that a feature is made of; 1 for all else."""
    shape = cache.features[member][name].shapes[0] if name not in (CLASSIFIER, OUTPUT) else ()
    return prod(shape[1:]) if len(shape) == 3 else 1


def _likely(term: LossTerm, cache: Cache, member: str, names: Sequence[str]) -> str:
    """The layer that a loss on one layer means: the classifier's input, the middle or the last map; LossError if unclear."""
    if len(names) == 1:
        return names[0]
    if OUTPUT in names:
        return OUTPUT
    if term.loss.layers != CLASSIFIER:
        maps = [name for name in names if _positions(cache, member, name) > 1]
        return middle(maps) if maps and term.loss.layers == "middle" else (maps or names)[-1]
    if CLASSIFIER in names:
        return CLASSIFIER
    layer = cache.classifier(member)
    width = None if layer is None else (layer[0].shape[1],)
    features = cache.features[member]
    fitting = [name for name in names if features[name].spec.reduced_shape(*features[name].shapes) == width]
    fitting = [name for name in fitting if _positions(cache, member, name) == 1] or fitting
    if len(fitting) == 1:
        return fitting[0]
    raise LossError(
        f"loss {term.name!r} compares one layer, and the cache holds {', '.join(names)}",
        tip=f"name it: layer={names[-1].rpartition(':')[0]}; several with / between them are summed",
    )


def _named(term: LossTerm, text: str, names: Sequence[str]) -> str:
    """The feature that `layer3` or `layer3:map` means, of the cheapest kind that serves."""
    for name in names:
        if text in (name, name.rpartition(":")[0]):
            return name
    raise LossError(f"loss {term.name!r}: the cache holds no layer {text!r} that serves it", tip=nearest(text, names))


def _as_needed(term: LossTerm, cache: Cache, member: str, name: str) -> tuple[str, tuple[Shape, ...]]:
    """What a loss gets of a stored feature: its reduction, and the shapes of the layers it is made of."""
    if name == CLASSIFIER:
        layer = cache.classifier(member)
        assert layer is not None
        return CLASSIFIER, ((layer[0].shape[1],),)
    if name == OUTPUT:
        return OUTPUT, ((cache.codecs[member].num_classes,),)
    feature = cache.features[member][name]
    reduction = feature.spec.reduction
    if reduction == "map" and term.loss.features[0] != "map":
        # what is cheaper to store is made of the map
        wanted = "pool" if term.loss.features[0] == CLASSIFIER else term.loss.features[0]
        reduction = "flatten" if wanted == "pool" and len(feature.shapes[0]) == 1 else wanted
    return reduction, feature.shapes


def _smaller_size(
    name: str, reduction: str, teacher: tuple[Shape, ...], own: tuple[Shape, ...]
) -> tuple[int, ...] | None:
    """The size that both maps are brought to, where the teacher's is stored as a map and is larger somewhere."""
    if not name.endswith(":map") or reduction not in SIZED or len(teacher[0]) != 3 or len(own[0]) != 3:
        return None
    size = tuple(min(pair) for pair in zip(teacher[0][1:], own[0][1:], strict=True))
    return None if size == teacher[0][1:] else size


def _student_layers(
    term: LossTerm, names: Sequence[str], student: Student, *, are_vectors: bool
) -> list[tuple[str, ...]]:
    """By default: the input of the final linear layer for vectors, layers of the same names, or the last map ends."""
    if are_vectors or term.loss.layers == CLASSIFIER:
        return [(CLASSIFIER,)] * len(names)
    if term.loss.graft and student.classifier_map is not None:
        return [(student.classifier_map,)] * len(names)
    layers = [tuple(name.rpartition(":")[0].split("+")) for name in names]
    ends = [module.name for module in student.map_ends]
    if all(layer in ends for pair in layers for layer in pair):
        return layers
    if term.loss.layers in ("last", "middle") and len(names) == 1 and ends:
        return [(ends[-1] if term.loss.layers == "last" else middle(ends),)]
    teacher = list(dict.fromkeys(layer for pair in layers for layer in pair))
    if term.loss.layers == "map_ends" and len(ends) >= len(teacher):
        match = dict(zip(teacher, ends[-len(teacher) :], strict=True))
        return [tuple(match[layer] for layer in pair) for pair in layers]
    raise LossError(
        f"loss {term.name!r}: which layers of the student go with {', '.join(names)} of the teacher is not clear",
        tip=f"say so: student=LAYER; its maps end at {', '.join(ends) or 'not maps'}",
    )


def _layers(text: str) -> list[tuple[str, ...]]:
    return [tuple(one.split("+")) for one in text.split(SEPARATOR)]


def _vector(teacher_reduction: str, shape: Shape) -> str:
    """How a student's layer becomes a vector: as the teacher's does, where it can."""
    if len(shape) == 1:
        return "flatten"
    if len(shape) == 3:
        return teacher_reduction if teacher_reduction in ("pool", "flatten") else "pool"
    return teacher_reduction if teacher_reduction in ("cls", "mean_tokens", "flatten") else "mean_tokens"

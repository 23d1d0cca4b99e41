"""What named modules give in a forward pass: for the teacher at dump, for the student in training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Self

import torch
from torch import Tensor, nn

from softcache.errors import ConfigError
from softcache.features.spec import REDUCTIONS, FeatureSpec, Shape, require_known

MAP_ENDS = 4  # at most: the map of a large image's stem costs more than all others


@dataclass(frozen=True)
class ModuleShape:
    """What one named module gave for one batch.

    Attributes:
        name: in `named_modules()`.
        kind: its class.
        shape: of the tensor, with the batch axis, at its first call; None where there is none.
        gives: "Tensor"; or which tensor of something else is taken, as `tuple[0]`, `dict['logits']`; or the class of what
            has none; "nothing" where it was not called.
        calls: how often it was called in the pass; a feature needs 1.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None
    gives: str
    calls: int


def list_modules(model: nn.Module, inputs: Any) -> list[ModuleShape]:
    """Every named module below `model`, in order, with what it gives in `model(inputs)`, in eval mode without gradients."""
    seen: dict[str, list[Any]] = {}

    def note(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        tensor, gives = _first_tensor(output)
        shape = None if tensor is None else tuple(tensor.shape)
        seen.setdefault(name, []).append((shape, gives))

    modules = {name: module for name, module in model.named_modules() if name}
    with ExitStack() as hooks, _evaluating(model):
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(partial(note, name)))
        model(inputs)
    found = []
    for name, module in modules.items():
        calls = seen.get(name, [])
        shape, gives = calls[0] if calls else (None, "nothing")
        found.append(ModuleShape(name, type(module).__name__, shape, gives, len(calls)))
    return found


@dataclass(frozen=True)
class _Call:
    """One call of a named module: the shapes of what it took and gave, None where that was no tensor."""

    name: str
    took: tuple[int, ...] | None
    gave: tuple[int, ...] | None


def map_ends(model: nn.Module, inputs: Any) -> list[ModuleShape]:
    """The modules that end the last four sizes of map in a network of maps, early to late; none where it is no such network.

    An end is the last module, between two reductions of the map's size, to give a map of that size:
    of those outside the blocks that reduce it, where there are any. Left out are maps of one position, as pooling gives;
    those with channels last, of which a linear layer gives or takes such; parts of a block, which are smaller in some
    direction than what the block gives; and maps that are larger in some direction than the one before, as a decoder's. A
    network that goes on with tokens behind its last map, as a vision transformer does, has none.

    The model is run once, in eval mode without gradients.
    """
    calls, batch = _calls(model, inputs)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    times = Counter(call.name for call in calls)
    in_tokens = {call.name for call in calls if _are_tokens(call.took) and _are_tokens(call.gave)}
    channels_last = {shape for call in calls if kinds[call.name] == "Linear" for shape in (call.took, call.gave)}
    sizes = {call.name: () if call.gave in channels_last else _size(call.gave) for call in calls}
    reducing: dict[tuple[int, ...], set[str]] = {}  # size -> blocks that take a map of it and give none
    for call in calls:
        if kinds[call.name] != "Sequential" and _size(call.took) not in ((), sizes[call.name]):
            reducing.setdefault(_size(call.took), set()).add(call.name)

    ends: dict[tuple[int, ...], _Call] = {}
    for call in calls:
        size, around = sizes[call.name], _around(call.name)
        if not size or call.gave is None or call.gave[0] != batch or times[call.name] > 1 or around & in_tokens:
            continue
        if not all(_fits(sizes[name], size) for name in around & sizes.keys()):
            continue
        blocks = reducing.get(size, set())
        if size not in ends or len(around & blocks) <= len(_around(ends[size].name) & blocks):
            ends[size] = call
    found: list[_Call] = []
    for call in sorted(ends.values(), key=calls.index):
        if not found or _fits(sizes[call.name], sizes[found[-1].name]):
            found.append(call)
    if not found:
        return []
    behind = {call.name for call in calls[calls.index(found[-1]) :] if _are_tokens(call.gave)}
    if len(behind) > sum(map(bool, sizes.values())):
        return []
    return [ModuleShape(call.name, kinds[call.name], call.gave, "Tensor", 1) for call in found[-MAP_ENDS:]]


def _calls(model: nn.Module, inputs: Any) -> tuple[list[_Call], int | None]:
    """Every call of a named module in `model(inputs)`, a module after those inside it; and the number of records, if known."""
    calls: list[_Call] = []

    def note(name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        took, gave = (_first_tensor(value)[0] for value in ((*args, *kwargs.values()), output))
        shapes = (None if tensor is None else tuple(tensor.shape) for tensor in (took, gave))
        calls.append(_Call(name, *shapes))

    with ExitStack() as hooks, _evaluating(model):
        for name, module in model.named_modules():
            if name:
                hooks.enter_context(module.register_forward_hook(partial(note, name), with_kwargs=True))
        result, _ = _first_tensor(model(inputs))
    return calls, None if result is None or not result.ndim else len(result)


def _around(name: str) -> set[str]:
    """The modules that a named module is inside of, itself included."""
    parts = name.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts) + 1)}


def _size(shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """(H, W) of a map (B, C, H, W) of more than one position; () for everything else."""
    return shape[2:] if shape is not None and len(shape) == 4 and prod(shape[2:]) > 1 else ()


def _fits(size: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether a map is in no direction larger than another one."""
    return all(n <= m for n, m in zip(size, other, strict=False))


def _are_tokens(shape: tuple[int, ...] | None) -> bool:
    return shape is not None and len(shape) == 3


def shapes_of(spec: FeatureSpec, modules: Iterable[ModuleShape]) -> tuple[Shape, ...]:
    """The record shape of each of a feature's layers, as its methods want them.

    Raises:
        ConfigError: a module that does not give one tensor once, or of which the reduction cannot be made.
    """
    by_name = {module.name: module for module in modules}
    shapes = []
    for layer in spec.layers:
        module = by_name[layer]
        if module.calls != 1:
            raise _called(f"module {layer!r}", module.calls)
        if module.shape is None:
            raise _without_tensor(layer, module.gives)
        shapes.append(module.shape[1:])
    spec.check(*shapes)
    return tuple(shapes)


def classifier_of(model: nn.Module, inputs: Any) -> nn.Linear | None:
    """The nn.Linear whose output is `model(inputs)`, value for value; None where there is no such layer.

    The model is run once, in eval mode without gradients.
    """
    outputs: dict[nn.Linear, list[Tensor]] = {}

    def note(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        assert isinstance(module, nn.Linear)
        outputs.setdefault(module, []).append(output.clone())  # what follows may change it in place

    with ExitStack() as hooks, _evaluating(model):
        for module in model.modules():
            if isinstance(module, nn.Linear):
                hooks.enter_context(module.register_forward_hook(note))
        logits = model(inputs)
    found = [m for m, calls in outputs.items() if len(calls) == 1 and _same(calls[0], logits)]
    return found[-1] if found else None


def classifier_feature(model: nn.Module, inputs: Any, linear: nn.Linear, *, of_map: bool = False) -> FeatureSpec | None:
    """The named layer and reduction that give what `linear` takes; of several the last module. None where none does.

    The model is run once, in eval mode without gradients.

    Args:
        of_map: only layers that give a map of more than one position, of which `linear` takes the average.
    """
    found: list[tuple[FeatureSpec, Tensor]] = []
    calls: Counter[str] = Counter()

    def note(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        calls[name] += 1
        tensor, _ = _first_tensor(output)
        if tensor is None or not tensor.is_floating_point():
            return
        if of_map and (tensor.ndim != 4 or tensor.shape[2:].numel() == 1):
            return
        for reduction in ("pool",) if of_map else ("mean_tokens", "cls", "pool", "flatten"):
            spec = FeatureSpec((name,), reduction)
            fits = tensor.ndim in REDUCTIONS[reduction].axes
            if fits and spec.reduced_shape(tensor.shape[1:]) == (linear.in_features,):
                found.append((spec, spec.reduce(tensor)))

    with ExitStack() as hooks, _evaluating(model):
        for name, module in model.named_modules():
            if name and module is not linear:
                hooks.enter_context(module.register_forward_hook(partial(note, name)))
        taken = hooks.enter_context(ClassifierTap(linear))
        model(inputs)
        wanted = taken.value()
    same = [
        spec
        for spec, value in found
        if calls[spec.layers[0]] == 1
        and value.shape == wanted.shape
        and torch.allclose(value, wanted.to(value.dtype), rtol=1e-4, atol=1e-5 * float(wanted.abs().amax()))
    ]
    return same[-1] if same else None


class Taps:
    """While it is entered, a forward pass of `model`, or of one around it, leaves the features behind.

        with Taps(model, features) as taps:
            logits = model(x)
            values = taps.values()

    An output is reduced as soon as it is there, from a copy, so that later operations in place do not reach it.

    Args:
        model: in whose `named_modules()` the layers are.
        features: distinct.
        detach: False lets gradients flow, for a student.

    Raises, in the forward pass or in `values`:
        ConfigError: a module that was called more than once or not at all, gave no tensor of floating-point numbers, has
            something else than the batch as its first axis, or of whose output the reduction cannot be made.
    """

    def __init__(self, model: nn.Module, features: Sequence[FeatureSpec], *, detach: bool = True) -> None:
        self.features, self.detach = tuple(features), detach
        known = dict(model.named_modules())
        layers = dict.fromkeys(layer for spec in self.features for layer in spec.layers)
        for layer in layers:
            require_known(layer, [name for name in known if name])
        self._model, self._modules = model, {layer: known[layer] for layer in layers}
        self._hooks = ExitStack()
        self._forget()

    def __enter__(self) -> Self:
        self._hooks.enter_context(self._model.register_forward_pre_hook(self._begin))
        for layer, module in self._modules.items():
            self._hooks.enter_context(module.register_forward_hook(partial(self._take, layer)))
        self._hooks.enter_context(self._model.register_forward_hook(self._finish))
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()
        self._forget()

    def values(self) -> dict[str, Tensor]:
        """Feature -> (B, *record_shape) as it is stored, float32 (float64 of float64, uint8 for sign bits), then forgotten."""
        self._check()
        values = {
            str(spec): self._stored[spec] if spec in self._stored else spec.store(*(self._held[k] for k in spec.layers))
            for spec in self.features
        }
        self._forget()
        return values

    def reduced(self) -> dict[str, Tensor]:
        """Feature -> (B, *reduced_shape) as a loss sees it and as it is read from a cache; then forgotten."""
        shapes = self._shapes
        values = self.values()
        return {
            str(spec): spec.read(values[str(spec)], *(shapes[layer][1:] for layer in spec.layers))
            for spec in self.features
        }

    def _forget(self) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._stored: dict[FeatureSpec, Tensor] = {}
        self._held: dict[str, Tensor] = {}  # outputs that wait for a second one
        self._batch: int | None = None

    def _begin(self, _module: nn.Module, _inputs: Any) -> None:
        self._forget()

    def _finish(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        tensor, _ = _first_tensor(output)
        self._batch = len(tensor) if tensor is not None and tensor.ndim else None

    def _take(self, layer: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if layer in self._shapes:
            raise _called(f"module {layer!r}", 2)
        tensor, gives = _first_tensor(output)
        if tensor is None or not tensor.is_floating_point():
            raise _without_tensor(layer, gives if tensor is None else f"{gives} of {tensor.dtype}")
        tensor = tensor.detach() if self.detach else tensor
        own = tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
        self._shapes[layer] = tuple(own.shape)
        for spec in self.features:
            if spec.layers == (layer,):
                self._stored[spec] = spec.store(own)
            elif layer in spec.layers:
                self._held[layer] = own

    def _check(self) -> None:
        for layer in self._modules:
            if layer not in self._shapes:
                raise _called(f"module {layer!r}", 0)
            shape = self._shapes[layer]
            if self._batch is not None and shape[0] != self._batch:
                raise ConfigError(
                    f"module {layer!r} gives {shape}, but the batch has {self._batch} records: "
                    "its first axis is not the batch",
                    tip="tap a module around it; a transformer built with batch_first=True puts the batch first",
                )


class ClassifierTap:
    """While it is entered, a forward pass leaves the input of the final linear layer behind: `value()`.

    Args:
        linear: the layer.
        detach: False lets gradients flow, for a student.

    Raises, in the forward pass or in `value`:
        ConfigError: the layer was called more than once or not at all, or its input is not (B, D).
    """

    def __init__(self, linear: nn.Linear, *, detach: bool = True) -> None:
        self._linear, self._detach = linear, detach
        self._inputs: list[Tensor] = []
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        self._hooks.enter_context(self._linear.register_forward_pre_hook(self._take, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()
        self.forget()

    def value(self) -> Tensor:
        """(B, D) at least float32 on the layer's device; then forgotten."""
        if len(self._inputs) != 1:
            raise _called("the final linear layer", len(self._inputs))
        return self._inputs.pop()

    def forget(self) -> None:
        """Before a forward pass whose input is wanted, where others went before."""
        self._inputs.clear()

    def _take(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given: Tensor = args[0] if args else kwargs["input"]
        if given.ndim != 2:
            raise ConfigError(
                f"the final linear layer is given {tuple(given.shape)}; its input can be stored where it is (B, D)",
                tip="use another codec",
            )
        given = given.detach() if self._detach else given
        self._inputs.append(given.to(torch.promote_types(given.dtype, torch.float32), copy=True))


def _first_tensor(output: Any) -> tuple[Tensor | None, str]:
    """The tensor that a module's output stands for, and what to call it."""
    kind = type(output).__name__
    if isinstance(output, Tensor):
        return output, "Tensor"
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(output, Mapping):
        items = output.items()
    elif isinstance(output, (tuple, list)):
        items = enumerate(output)
    return next(((value, f"{kind}[{key!r}]") for key, value in items if isinstance(value, Tensor)), (None, kind))


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """While it is entered, BatchNorm learns nothing and no dropout is drawn; then every module is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients, and eval mode."""
    with torch.no_grad(), eval_mode(model):
        yield


def _same(output: Tensor, logits: Any) -> bool:
    return isinstance(logits, Tensor) and output.dtype == logits.dtype and torch.equal(output, logits)


def _called(what: str, calls: int) -> ConfigError:
    if calls == 0:
        return ConfigError(
            f"{what} was not called in the forward pass",
            tip="name a module that is; --list-modules prints what each gives",
        )
    return ConfigError(
        f"{what} was called more than once in a forward pass: which of its outputs is meant is not clear",
        tip="name a module around it that is called once; --list-modules prints how often each is called",
    )


def _without_tensor(layer: str, gives: str) -> ConfigError:
    return ConfigError(
        f"module {layer!r} gives {gives}, not a tensor of floating-point numbers",
        tip="name another module; --list-modules prints what each gives",
    )

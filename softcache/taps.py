"""What named modules give in a forward pass, and how it is reduced: for the teacher at dump, for the student in training.

A feature is written `layer3:pool`, or `layer1+layer2:fsp`. Shapes are channels first: a map is (B, C, H, W), tokens are
(B, L, D), a vector is (B, D); which of them an output is, its number of axes says.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softcache.errors import ConfigError, nearest

Shape = tuple[int, ...]  # of one record, without the batch axis


# ----------------------------------------------------------------------------------------------------------- reductions


def as_it_is(x: Tensor) -> Tensor:
    """(B, ...) unchanged."""
    return x


def pool(x: Tensor) -> Tensor:
    """(B, C) mean over the spatial axes of (B, C, H, W) or (B, C, T, H, W)."""
    return x.flatten(2).mean(dim=2)


def flatten(x: Tensor) -> Tensor:
    """(B, n) of (B, ...)."""
    return x.flatten(1)


def cls(tokens: Tensor) -> Tensor:
    """(B, D) first token of (B, L, D)."""
    return tokens[:, 0]


def mean_tokens(tokens: Tensor) -> Tensor:
    """(B, D) mean of all tokens of (B, L, D), padding included."""
    return tokens.mean(dim=1)


def attention(x: Tensor) -> Tensor:
    """(B, H, W) mean over channels of the squares of (B, C, H, W); not normalised, as a loss does that its own way.

    Source: Zagoruyko, Komodakis, "Paying More Attention to Attention" (2017), section 3.1 (F_sum^2 over C).
    """
    return x.square().mean(dim=1)


def gram(x: Tensor) -> Tensor:
    """(B, C, C) inner products of the channels of (B, C, H, W), over H W; symmetric.

    Source: Liu et al., "Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation" (2021).
    """
    rows = x.flatten(2)  # (B, C, HW)
    return rows @ rows.mT / rows.shape[2]


def spatial_gram(x: Tensor) -> Tensor:
    """(B, HW, HW) inner products of the positions of (B, C, H, W), each channel first scaled to length 1; over C; symmetric.

    Source: Huang, Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer" (2017), section 4.2.
    """
    rows = F.normalize(x.flatten(2), dim=2)  # (B, C, HW)
    return rows.mT @ rows / rows.shape[1]


def fsp(first: Tensor, second: Tensor) -> Tensor:
    """(B, C1, C2) inner products of the channels of two maps, over H W; the larger map is max-pooled to the smaller.

    Source: Yim, Joo, Bae, Kim, "A Gift from Knowledge Distillation" (2017), equation 1.
    """
    size = [min(pair) for pair in zip(first.shape[2:], second.shape[2:], strict=True)]
    rows1, rows2 = (F.adaptive_max_pool2d(x, size).flatten(2) for x in (first, second))  # (B, C1, HW), (B, C2, HW)
    return rows1 @ rows2.mT / rows1.shape[2]


def sign(x: Tensor) -> Tensor:
    """(B, ...) 1 where a value is positive, else 0: which units are active.

    Source: Heo, Lee, Yun, Choi, "Knowledge Transfer via Distillation of Activation Boundaries" (2019), equation 2.
    """
    return (x > 0).to(x.dtype)


@dataclass(frozen=True)
class Reduction:
    """What is made of an output, and of which outputs it can be made.

    Attributes:
        function: one tensor per layer, (B, ...) at least float32 -> (B, ...) of that dtype: what a loss sees.
        axes: how many axes an output may have, the batch's included.
        wants: the same in words.
        symmetric: the result is a symmetric matrix, of which the upper triangle is stored.
        layers: how many modules it takes.
    """

    function: Callable[..., Tensor]
    axes: tuple[int, ...]
    wants: str
    symmetric: bool = False
    layers: int = 1


ANY, MAP, TOKENS = "any output", "a map (B, C, H, W)", "tokens (B, L, D)"

REDUCTIONS: dict[str, Reduction] = {
    "map": Reduction(as_it_is, (2, 3, 4, 5), ANY),
    "pool": Reduction(pool, (4, 5), MAP),
    "flatten": Reduction(flatten, (2, 3, 4, 5), ANY),
    "cls": Reduction(cls, (3,), TOKENS),
    "mean_tokens": Reduction(mean_tokens, (3,), TOKENS),
    "attention": Reduction(attention, (4,), MAP),
    "gram": Reduction(gram, (4,), MAP, symmetric=True),
    "spatial_gram": Reduction(spatial_gram, (4,), MAP, symmetric=True),
    "fsp": Reduction(fsp, (4,), MAP, layers=2),
    "sign": Reduction(sign, (2, 3, 4, 5), ANY),
}


def upper_triangle(matrices: Tensor) -> Tensor:
    """(B, n (n + 1) / 2) of symmetric (B, n, n): row by row from the diagonal on."""
    rows, columns = torch.triu_indices(matrices.shape[1], matrices.shape[2], device=matrices.device)
    return matrices[:, rows, columns]


def from_upper_triangle(triangles: Tensor, n: int) -> Tensor:
    """(B, n, n) symmetric matrices; the inverse of `upper_triangle`."""
    rows, columns = torch.triu_indices(n, n, device=triangles.device)
    place = torch.empty(n, n, dtype=torch.int64, device=triangles.device)
    place[rows, columns] = place[columns, rows] = torch.arange(len(rows), device=triangles.device)
    return triangles[:, place]


def pack_bits(bits: Tensor) -> Tensor:
    """(B, ceil(n / 8)) uint8 of (B, ...) zeros and ones: value i is bit i % 8 of byte i // 8, counted from the lowest."""
    flat = bits.flatten(1).to(torch.uint8)
    flat = F.pad(flat, (0, -flat.shape[1] % 8)).unflatten(1, (-1, 8))
    return (flat << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(dim=2, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: Shape) -> Tensor:
    """(B, *shape) float32 zeros and ones; the inverse of `pack_bits`."""
    bits = packed.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten(1)[:, : prod(shape)].reshape(-1, *shape).float()


# ------------------------------------------------------------------------------------------------------------- features


@dataclass(frozen=True)
class FeatureSpec:
    """One feature: the module it comes from (two for `fsp`) and the reduction. `str` gives `layer3:pool`.

    Every `shape` below is that of one record of a layer's output, one for each layer, without the batch axis.
    """

    layers: tuple[str, ...]
    reduction: str = "map"

    def __str__(self) -> str:
        return f"{'+'.join(self.layers)}:{self.reduction}"

    def check(self, *shapes: Shape) -> None:
        """Raise ConfigError, with the reductions that fit, unless this one can be made of such outputs."""
        wanted = REDUCTIONS[self.reduction]
        for layer, shape in zip(self.layers, shapes, strict=True):
            axes = len(shape) + 1
            if axes not in wanted.axes:
                fitting = [name for name, r in REDUCTIONS.items() if axes in r.axes and r.layers == 1]
                raise ConfigError(
                    f"{self}: {self.reduction!r} wants {wanted.wants}; module {layer!r} gives {_batch_of(shape)}",
                    tip=f"reductions that fit: {', '.join(fitting)}" if fitting else "name another module",
                )

    def reduce(self, *outputs: Tensor) -> Tensor:
        """What a loss sees, of one (B, ...) output per layer: float32, or float64 of float64, also within autocast."""
        self.check(*(output.shape[1:] for output in outputs))
        with torch.autocast(outputs[0].device.type, enabled=False):
            return REDUCTIONS[self.reduction].function(*map(_at_least_float32, outputs))

    def reduced_shape(self, *shapes: Shape) -> Shape:
        """Of one record, as a loss sees it."""
        return tuple(self.reduce(*(torch.empty(0, *shape) for shape in shapes)).shape[1:])

    def stored(self, *shapes: Shape) -> str:
        """ "map" or the reduction, whichever takes fewer bytes in one dtype; the reduction where both take the same."""
        of_reduction = prod(self._packed_shape(*shapes))
        return "map" if sum(map(prod, shapes)) < of_reduction else self.reduction

    def record_shape(self, *shapes: Shape) -> Shape:
        """Of one record, as it is stored; two maps are stored flat, one after the other."""
        if self.stored(*shapes) != "map":
            return self._packed_shape(*shapes)
        return shapes[0] if len(shapes) == 1 else (sum(map(prod, shapes)),)

    def store(self, *outputs: Tensor) -> Tensor:
        """(B, *record_shape) of one (B, ...) output per layer: the map, the reduction, its upper triangle, or its bits."""
        shapes = [tuple(output.shape[1:]) for output in outputs]
        if self.stored(*shapes) == "map" and self.reduction != "map":
            whole = [_at_least_float32(output) for output in outputs]
            return whole[0] if len(whole) == 1 else torch.cat([output.flatten(1) for output in whole], dim=1)
        reduced = self.reduce(*outputs)
        if self.reduction == "sign":
            return pack_bits(reduced)
        return upper_triangle(reduced) if REDUCTIONS[self.reduction].symmetric else reduced

    def read(self, values: Tensor, *shapes: Shape) -> Tensor:
        """(B, *reduced_shape) of what `store` gave: a map is reduced now, a triangle and bits are restored."""
        if self.stored(*shapes) == "map":
            parts = values.flatten(1).split([prod(shape) for shape in shapes], dim=1)
            return self.reduce(*(part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)))
        if self.reduction == "sign":
            return unpack_bits(values, shapes[0])
        if REDUCTIONS[self.reduction].symmetric:
            return from_upper_triangle(values, self.reduced_shape(*shapes)[0])
        return values

    def _packed_shape(self, *shapes: Shape) -> Shape:
        shape = self.reduced_shape(*shapes)
        if self.reduction == "sign":
            return (-(-prod(shape) // 8),)
        return (shape[0] * (shape[0] + 1) // 2,) if REDUCTIONS[self.reduction].symmetric else shape


def parse_features(texts: Iterable[str], model_names: Iterable[str]) -> tuple[FeatureSpec, ...]:
    """The features named by `layer3:pool,layer4:attention`, `layer1+layer2:fsp`; `layer3` alone is `layer3:map`.

    Args:
        texts: comma-separated lists; several are taken as one.
        model_names: of `named_modules()`.

    Raises:
        ConfigError: an unknown module or reduction (with near names), a feature twice, a wrong number of modules.
    """
    names = [name for name in model_names if name]
    specs: list[FeatureSpec] = []
    for text in (part.strip() for whole in texts for part in whole.split(",")):
        head, colon, reduction = text.rpartition(":")
        spec = FeatureSpec(tuple(head.split("+")), reduction) if colon else FeatureSpec(tuple(text.split("+")))
        if spec.reduction not in REDUCTIONS:
            raise ConfigError(f"{text!r}: unknown reduction {reduction!r}", tip=nearest(reduction, REDUCTIONS))
        for layer in spec.layers:
            _require_known(layer, names)
        wanted = REDUCTIONS[spec.reduction].layers
        if len(spec.layers) != wanted:
            raise ConfigError(
                f"{text!r}: {spec.reduction!r} takes {wanted} module{'s' if wanted > 1 else ''}, got {len(spec.layers)}",
                tip="write layer1+layer2:fsp, or layer3:pool,layer4:pool for two features",
            )
        if spec in specs:
            raise ConfigError(f"the feature {str(spec)!r} is named twice")
        specs.append(spec)
    return tuple(specs)


# -------------------------------------------------------------------------------------------------------------- modules


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


def head_of(model: nn.Module, inputs: Any) -> nn.Linear | None:
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
    heads = [m for m, calls in outputs.items() if len(calls) == 1 and _same(calls[0], logits)]
    return heads[-1] if heads else None


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
            _require_known(layer, [name for name in known if name])
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


class HeadTap:
    """While it is entered, a forward pass leaves the input of the final linear layer behind: `value()`.

    Raises, in the forward pass or in `value`:
        ConfigError: the layer was called more than once or not at all, or its input is not (B, D).
    """

    def __init__(self, linear: nn.Linear) -> None:
        self._linear = linear
        self._inputs: list[Tensor] = []
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        self._hooks.enter_context(self._linear.register_forward_pre_hook(self._take, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()
        self._inputs.clear()

    def value(self) -> Tensor:
        """(B, D) float32 on the layer's device, detached; then forgotten."""
        if len(self._inputs) != 1:
            raise _called("the final linear layer", len(self._inputs))
        return self._inputs.pop()

    def _take(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given: Tensor = args[0] if args else kwargs["input"]
        if given.ndim != 2:
            raise ConfigError(
                f"the final linear layer is given {tuple(given.shape)}; its input can be stored where it is (B, D)",
                tip="use another codec",
            )
        self._inputs.append(given.detach().to(torch.float32, copy=True))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients, and eval mode, so that BatchNorm learns nothing; every module is put back as it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


def _same(output: Tensor, logits: Any) -> bool:
    return isinstance(logits, Tensor) and output.dtype == logits.dtype and torch.equal(output, logits)


def _batch_of(shape: Shape) -> str:
    return f"({', '.join(map(str, ('B', *shape)))})"


def _require_known(layer: str, names: Sequence[str]) -> None:
    if layer not in names:
        near = difflib.get_close_matches(layer, names, cutoff=0.5)
        outermost = [name for name in names if "." not in name]  # all of them would be hundreds
        raise ConfigError(
            f"the model has no module {layer!r}",
            tip=f"{nearest(layer, near or outermost)}; --list-modules prints all with their output shapes",
        )


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

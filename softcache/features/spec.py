"""What a feature is: the output of a named module, how it is reduced, and in which form it is stored.

A feature is written `layer3:pool`, or `layer1+layer2:fsp`. Shapes are channels first: a map is (B, C, H, W), tokens are
(B, L, D), a vector is (B, D); which of them an output is, its number of axes says.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from softcache.errors import ConfigError, nearest

Shape = tuple[int, ...]  # of one record, without the batch axis
SCALES = ("member", "each", "whiten")  # to which an output without classes may be brought


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
            require_known(layer, names)
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


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _batch_of(shape: Shape) -> str:
    return f"({', '.join(map(str, ('B', *shape)))})"


def require_known(layer: str, names: Sequence[str]) -> None:
    if layer not in names:
        near = difflib.get_close_matches(layer, names, cutoff=0.5)
        outermost = [name for name in names if "." not in name]  # all of them would be hundreds
        raise ConfigError(
            f"the model has no module {layer!r}",
            tip=f"{nearest(layer, near or outermost)}; --list-modules prints all with their output shapes",
        )

"""Which channels of a network belong together: what is left out in one place has to be left out in all of them.

Found by running the network, not by reading its code: NaN is put into some channels of what one layer gives, every other layer
with weights answers as it did without, and wherever NaN arrives those channels go: through BatchNorm, activations, poolings,
additions, concatenations and gates alike. Each row of one batch has NaN in other channels, so that one pass tells of each input
channel of each layer which output channel it comes from.

Channels that reach the logits, or a layer that mixes them without being a convolution or a linear layer (LayerNorm, attention, a
convolution of groups, weights of a module's own), are left whole.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softcache.features.taps import eval_mode
from softcache.models.norms import is_batch_norm, width_of
from softcache.models.shrunk import DENSE, FIRST, Factored, is_depthwise, is_plain

Side = tuple[str, str]  # a module's name, and "in" or "out"
Element = tuple[str, str, int]
Run = Callable[[int], Any]  # the network on so many equal samples: its logits


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that may be left out, one by one.

    Attributes:
        sides: which modules have them, and on which side.
        units: of each channel, its places on each of these sides.
    """

    sides: tuple[Side, ...]
    units: tuple[Mapping[Side, tuple[int, ...]], ...]

    @property
    def name(self) -> str:
        """The first layer that gives these channels."""
        return next(name for name, side in self.sides if side == "out")


class _Joined:
    """Sets of elements that belong together."""

    def __init__(self) -> None:
        self.parent: dict[Element, Element] = {}

    def find(self, one: Element) -> Element:
        while self.parent.setdefault(one, one) != one:
            self.parent[one] = self.parent[self.parent[one]]
            one = self.parent[one]
        return one

    def join(self, a: Element, b: Element) -> None:
        self.parent[self.find(a)] = self.find(b)


def channel_groups(net: nn.Module, run: Run) -> list[Group]:
    """The channels that may be left out, in groups of those that are in the same layers.

    Args:
        net: called by `run`; as it was afterwards.
        run: calls it on a batch of so many equal samples.
    """
    with eval_mode(net), torch.no_grad():
        probe = _Probe(net, run)
        joined, blocked = _Joined(), set[Element]()
        for name in probe.dense:
            _follow(probe, name, joined, blocked)
        for name in probe.others:
            for element in probe.reached(name):
                blocked.add(element)
    return _grouped(joined, blocked)


def _follow(probe: _Probe, name: str, joined: _Joined, blocked: set[Element]) -> None:
    """Where the channels go that one layer gives."""
    count = probe.dense[name].weight.shape[0]
    own = [(name, "out", channel) for channel in range(count)]
    for element in own:
        joined.find(element)
    tainted, leaves = probe.taint(name, count)
    mixed = leaves
    for (other, side), rows in tainted.items():
        set_, clear = rows[0::2], rows[1::2]  # (bits, channels) each
        touched = (set_ | clear).any(0)
        if (set_ & clear).any():
            mixed = True
            blocked.update((other, side, place) for place in touched.nonzero().flatten().tolist())
            continue
        weights = 2 ** torch.arange(len(set_))[:, None]
        channels = (set_ * weights).sum(0)
        for place in touched.nonzero().flatten().tolist():
            joined.join((other, side, place), own[int(channels[place])])
    if mixed:
        blocked.update(own)


def _grouped(joined: _Joined, blocked: set[Element]) -> list[Group]:
    closed = {joined.find(element) for element in blocked}
    sets: dict[Element, dict[Side, list[int]]] = {}
    for element in list(joined.parent):
        root = joined.find(element)
        if root not in closed:
            sets.setdefault(root, {}).setdefault(element[:2], []).append(element[2])
    groups: dict[tuple[Any, ...], list[dict[Side, tuple[int, ...]]]] = {}
    for sides in sets.values():
        kind = tuple((side, len(places)) for side, places in sorted(sides.items()))
        groups.setdefault(kind, []).append({side: tuple(sorted(places)) for side, places in sides.items()})
    return [
        Group(tuple(side for side, _ in kind), tuple(sorted(units, key=lambda unit: sorted(unit.items()))))
        for kind, units in groups.items()
        if any(side == "in" for (_, side), _ in kind)
    ]


class _Probe:
    """A network whose layers with weights answer as they did once, so that a pass costs next to nothing.

    Attributes:
        dense: convolutions of one group and linear layers that are called once.
        through: BatchNorm and depthwise convolutions, whose channels go through.
        others: further modules with weights of their own.
    """

    def __init__(self, net: nn.Module, run: Run) -> None:
        self.run = run
        calls: Counter[str] = Counter()
        self.clean: dict[str, Tensor] = {}

        def note(name: str, output: Any) -> None:
            calls[name] += 1
            if isinstance(output, Tensor):
                self.clean[name] = output.clone()

        weighty = {
            n: m
            for n, m in net.named_modules()
            if is_batch_norm(m) or any(p is not None for p in m._parameters.values())
        }
        with ExitStack() as hooks:
            for name, module in weighty.items():
                hook = module.register_forward_hook(lambda _m, _i, output, name=name: note(name, output))
                hooks.callback(hook.remove)
            run(1)
        weighty = {name: module for name, module in weighty.items() if calls[name]}
        between = {f"{name}.{FIRST}" for name, module in net.named_modules() if isinstance(module, Factored)}
        once = {name: m for name, m in weighty.items() if calls[name] == 1 and name in self.clean and is_plain(m)}
        self.through = {n: m for n, m in once.items() if is_batch_norm(m) or is_depthwise(m)}
        self.dense: dict[str, Any] = {
            n: m for n, m in once.items() if isinstance(m, DENSE) and getattr(m, "groups", 1) == 1 and n not in between
        }
        self.others = {n: m for n, m in weighty.items() if n not in self.dense and n not in self.through}

    def taint(self, name: str, count: int) -> tuple[dict[Side, Tensor], bool]:
        """Where NaN arrives that is put into the output channels of one layer: (2 bits, channels) of each, and if in the logits.

        Row 2 i has NaN in the channels whose number has bit i, row 2 i + 1 in the others.
        """
        bits = max(1, (count - 1).bit_length())
        numbers = torch.arange(count)
        rows = torch.stack([(numbers >> i) & 1 == wanted for i in range(bits) for wanted in (1, 0)])  # (2 bits, count)
        return self._pass(name, rows)

    def reached(self, name: str) -> Iterator[Element]:
        """The places in which NaN arrives that one module gives."""
        found, _ = self._pass(name, None)
        for (other, side), rows in found.items():
            yield from ((other, side, place) for place in rows.any(0).nonzero().flatten().tolist())

    def _pass(self, name: str, rows: Tensor | None) -> tuple[dict[Side, Tensor], bool]:
        """One run with NaN in some channels (None: in all) of what a module gives."""
        count = 1 if rows is None else len(rows)
        found: dict[Side, Tensor] = {}
        blocks: list[str] = []

        def note(other: str, module: nn.Module, values: Tensor) -> None:
            rows_of = values.isnan().unflatten(0, (count, -1))  # windows of a picture lie in its first axis
            axis = rows_of.ndim - 1 if isinstance(module, nn.Linear) else 2
            hit = rows_of.movedim(axis, 1).flatten(2).any(2).cpu()  # (count, channels)
            found[other, "in" if other in self.dense else "out"] = hit

        def block(other: str, values: Any) -> None:
            if other != name and any(
                isinstance(one, Tensor) and one.is_floating_point() and one.isnan().any() for one in values
            ):
                blocks.append(other)

        with ExitStack() as hooks:
            for other, module in {**self.dense, **self.through}.items():
                hook: Any = module.register_forward_pre_hook(lambda m, args, other=other: note(other, m, args[0]))
                hooks.callback(hook.remove)
            for other, module in self.others.items():
                hook = module.register_forward_pre_hook(
                    lambda _m, args, kwargs, other=other: block(other, [*args, *kwargs.values()]), with_kwargs=True
                )
                hooks.callback(hook.remove)
                if other == name:
                    hook = module.register_forward_hook(lambda _m, _i, output: _all_nan(output))
                    hooks.callback(hook.remove)
            for other, module in self.dense.items():
                hooks.enter_context(_answering(module, self.clean[other], count, rows if other == name else None))
            logits = self.run(count)
        return found, bool(blocks) or bool(logits.isnan().any())


def _all_nan(output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(map(_all_nan, output))
    return torch.full_like(output, math.nan) if isinstance(output, Tensor) and output.is_floating_point() else output


@contextmanager
def _answering(module: nn.Module, clean: Tensor, count: int, rows: Tensor | None) -> Iterator[None]:
    """While it is entered, a module gives what it gave for one sample, so many times, with NaN in some channels of each."""

    def answer(*_args: Any, **_kwargs: Any) -> Tensor:
        output = clean.repeat(count, *[1] * (clean.ndim - 1))
        if rows is not None:
            axis = clean.ndim - 1 if isinstance(module, nn.Linear) else 1
            by_row = output.unflatten(0, (count, -1)).movedim(axis + 1, 1)  # (count, channels, ...): a view
            by_row[rows.to(output.device)] = math.nan
        return output

    module.forward = answer
    try:
        yield
    finally:
        del module.forward


def kept_without(
    net: nn.Module, dropped: Sequence[Mapping[Side, tuple[int, ...]]]
) -> dict[str, dict[str, tuple[int, ...]]]:
    """What `Shrunk.kept` says of a network without these channels."""
    gone: dict[Side, set[int]] = {}
    for unit in dropped:
        for side, places in unit.items():
            gone.setdefault(side, set()).update(places)
    kept: dict[str, dict[str, tuple[int, ...]]] = {}
    for (name, where), lost in gone.items():
        module: Any = net.get_submodule(name)
        count = width_of(module) if is_batch_norm(module) else module.weight.shape[0 if where == "out" else 1]
        kept.setdefault(name, {})[where] = tuple(i for i in range(count) if i not in lost)
    return kept


@contextmanager
def without_effect(net: nn.Module, dropped: Sequence[Mapping[Side, tuple[int, ...]]]) -> Iterator[None]:
    """While it is entered, these channels are there and change nothing: whoever takes them has a weight of 0 for them."""
    taken: dict[str, list[int]] = {}
    for unit in dropped:
        for (name, side), places in unit.items():
            if side == "in":
                taken.setdefault(name, []).extend(places)
    weights: dict[str, Any] = {name: net.get_submodule(name).weight for name in taken}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    with torch.no_grad():
        for name, inputs in taken.items():
            weights[name][:, inputs] = 0.0
    try:
        yield
    finally:
        with torch.no_grad():
            for name, saved in before.items():
                weights[name].copy_(saved)

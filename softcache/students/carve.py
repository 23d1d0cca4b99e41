"""A student cut out of its teacher: fewer blocks of each repeated stack, fewer channels, without a look at the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from softcache.errors import ConfigError, ModelError, first_offenders
from softcache.models.norms import is_batch_norm, width_of
from softcache.models.shrunk import Factored, Shrunk, is_below, is_plain, shrink_by
from softcache.students.channels import Group
from softcache.students.prune import Cut, free_groups, leave_channels
from softcache.students.samples import Samples


def carve(
    net: nn.Module,
    samples: Samples,
    *,
    depth: float | None = None,
    width: float | None = None,
    keep: tuple[str, ...] = (),
) -> tuple[Shrunk, str]:
    """Cut blocks, or channels, out of a network; what is left keeps names and weights.

    Args:
        net: changed in place.
        depth: share of the blocks of each repeated stack that stays, the first and, where two or more stay, the last among them.
        width: share of the channels that stays, evenly spread.
        keep: modules whose blocks stay; all other blocks go, and what is no block of a repeated stack stays.

    Raises:
        ConfigError: not one of the three, one out of range, a module that is not there, or nothing to cut.
        ModelError: what is left does not work.

    Sources: Sanh, Debut, Chaumond, Wolf, "DistilBERT" (2019), which begins with every second layer of its teacher.
    """
    check_carve(depth=depth, width=width, keep=keep)
    if width is not None:
        what = f"carve:width={width:g}"
        return leave_channels(net, samples, free_groups(net, samples, (), what), Cut(1 - width, _spread_channels), what)
    stacks = find_stacks(net, samples)
    if not stacks:
        raise ModelError(
            f"carve: {samples.what} has no repeated blocks: modules of one kind, one behind the other in an nn.Sequential or "
            "nn.ModuleList, that give what they take",
            tip="carve:width, lowrank and prune need none",
        )
    return _cut_depth(net, samples, stacks, depth) if depth is not None else _cut_all_but(net, samples, stacks, keep)


def check_carve(*, depth: float | None = None, width: float | None = None, keep: tuple[str, ...] = ()) -> None:
    """Raise ConfigError for settings of `carve` that make no sense, whatever the network."""
    given = [name for name, value in (("depth", depth), ("width", width), ("keep", keep or None)) if value is not None]
    if len(given) != 1:
        raise ConfigError(
            f"carve wants one of depth, width and keep, and got {' and '.join(given) or 'none'}",
            tip="--by carve:depth=0.5, --by carve:width=0.5 or --by carve:keep=layer1,layer2; several are several --by",
        )
    for name, share in (("depth", depth), ("width", width)):
        if share is not None and not 0 < share < 1:
            raise ConfigError(
                f"carve:{name}={share:g}: {name} is the share that stays, more than 0 and less than 1",
                tip=f"carve:{name}=0.5",
            )


def _spread_channels(group: Group, count: int) -> list[int]:
    return [i * len(group.units) // count for i in range(count)]


@dataclass(frozen=True)
class Stack:
    """Blocks of one kind, one behind the other: the first may change the shape, the others give what they take.

    Attributes:
        blocks: their names.
    """

    blocks: tuple[str, ...]

    @property
    def parent(self) -> str:
        return self.blocks[0].rpartition(".")[0]


def find_stacks(net: nn.Module, samples: Samples) -> list[Stack]:
    """The stacks of a network, in its order, of the kinds of block of which there are several; a single block is one too."""
    containers = {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, nn.Sequential | nn.ModuleList) and not isinstance(module, Factored)
    }
    blocks = {
        f"{name}.{child}" if name else child: block
        for name, module in containers.items()
        for child, block in module.named_children()
        if _is_block(block)
    }
    shapes = _shapes(blocks, samples)
    stacks: list[Stack] = []
    for name, container in containers.items():
        run: list[str] = []
        kind: type | None = None
        for child, block in container.named_children():
            own = f"{name}.{child}" if name else child
            if own not in shapes:
                stacks += [Stack(tuple(run))] if run else []
                run, kind = [], None
                continue
            taken, given = shapes[own]
            if run and type(block) is kind and taken == given:
                run.append(own)
            else:
                stacks += [Stack(tuple(run))] if run else []
                run, kind = [own], type(block)
        stacks += [Stack(tuple(run))] if run else []
    kinds = [type(net.get_submodule(stack.blocks[0])) for stack in stacks]
    repeated = {kind for kind, stack in zip(kinds, stacks, strict=True) if len(stack.blocks) > 1}
    repeated = repeated or {kind for kind in kinds if kinds.count(kind) > 1}
    found = [stack for kind, stack in zip(kinds, stacks, strict=True) if kind in repeated]
    inner = [block for stack in found for block in stack.blocks]
    return [stack for stack in found if not is_below(stack.parent, inner)]  # what is inside a block belongs to it


def _is_block(module: nn.Module) -> bool:
    """Whether it is a module of several with weights, and no mere container of such."""
    if isinstance(module, Factored) or not list(module.children()) or not list(module.parameters()):
        return False
    return type(module) not in (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _shapes(blocks: dict[str, nn.Module], samples: Samples) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Of each block that is called once, the shapes that it takes and gives."""
    calls: dict[str, list[tuple[torch.Size, torch.Size]]] = {}

    def note(name: str, taken: Any, given: Any) -> None:
        shapes = [_shape(taken), _shape(given)]
        if None not in shapes:
            calls.setdefault(name, []).append(shapes)  # type: ignore[arg-type]

    with ExitStack() as hooks:
        for name, block in blocks.items():
            hook = block.register_forward_hook(
                lambda _m, args, kwargs, output, name=name: note(name, [*args, *kwargs.values()], output),
                with_kwargs=True,
            )
            hooks.callback(hook.remove)
        samples.run(1)
    return {name: found[0] for name, found in calls.items() if len(found) == 1}


def _shape(value: Any) -> torch.Size | None:
    """Of the first tensor of arguments, or of what is given."""
    if isinstance(value, list | tuple):
        value = next((one for one in value if isinstance(one, Tensor)), None)
    return value.shape if isinstance(value, Tensor) else None


def spread_blocks(count: int, share: float) -> list[int]:
    """The positions that stay of so many blocks: evenly spread from the first to the last; of one that stays, the first."""
    left = max(1, math.floor(share * count + 0.5))
    return [0] if left == 1 else [math.floor(i * (count - 1) / (left - 1) + 0.5) for i in range(left)]


def _cut_depth(net: nn.Module, samples: Samples, stacks: Sequence[Stack], depth: float) -> tuple[Shrunk, str]:
    cut = []
    for stack in stacks:
        left = spread_blocks(len(stack.blocks), depth)
        cut += [block for i, block in enumerate(stack.blocks) if i not in left]
    if not cut:
        longest = max(len(stack.blocks) for stack in stacks)
        raise ConfigError(
            f"carve:depth={depth:g} cuts nothing: the longest of {len(stacks)} stacks has {longest} blocks",
            tip="a smaller depth, or carve:keep=NAMES to cut whole stacks",
        )
    record = Shrunk(cut=tuple(cut))
    shrink_by(net, record)
    _check_runs(net, samples, f"carve:depth={depth:g}")
    return record, f"{len(cut)} of {sum(len(s.blocks) for s in stacks)} blocks cut: {first_offenders(cut, len(cut))}"


def _cut_all_but(net: nn.Module, samples: Samples, stacks: Sequence[Stack], keep: Sequence[str]) -> tuple[Shrunk, str]:
    blocks = [block for stack in stacks for block in stack.blocks]
    holding = [block for block in blocks if is_below(block, keep) or any(is_below(name, [block]) for name in keep)]
    if not holding or len(holding) == len(blocks):
        parents = dict.fromkeys(stack.parent for stack in stacks)
        raise ConfigError(
            f"carve:keep={','.join(keep)}: {'no' if not holding else 'every'} block of the repeated stacks is among them",
            tip=f"blocks lie in {first_offenders(parents, len(parents))}; what is no block stays anyway",
        )
    cut = tuple(block for block in blocks if block not in holding)
    record = Shrunk(cut=cut)
    shrink_by(net, record)
    narrowed: list[str] = []
    while (misfit := _first_misfit(net, samples)) is not None:
        name, given = misfit
        module: Any = net.get_submodule(name)
        is_last = module is samples.classifier
        if given >= _taken(module) or name in narrowed or not (is_last or is_batch_norm(module)):
            raise ModelError(
                f"carve:keep={','.join(keep)}: {name} takes {_taken(module):,} channels and would be given {given:,}",
                tip="keep the layers before it too: a stack begins with what the one before it gives",
            )
        narrower = Shrunk(kept={name: {"in" if is_last else "out": tuple(range(given))}})
        shrink_by(net, narrower)
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        record, narrowed = record.then(narrower), [*narrowed, name]
    _check_runs(net, samples, f"carve:keep={','.join(keep)}")
    anew = f"; {' and '.join(narrowed)} begins anew at another width: heal it" if narrowed else ""
    return record, f"{len(cut)} of {len(blocks)} blocks cut: {first_offenders(cut, len(cut))}{anew}"


def _taken(module: Any) -> int:
    taken: int = width_of(module) if is_batch_norm(module) else module.weight.shape[1]
    return taken


class _Misfit(Exception):
    pass


def _first_misfit(net: nn.Module, samples: Samples) -> tuple[str, int] | None:
    """The first layer that is given another number of channels than it takes, and that number."""

    def check(name: str, module: Any, args: tuple[Any, ...]) -> None:
        given = args[0].shape[-1] if isinstance(module, nn.Linear) else args[0].shape[1]
        if getattr(module, "groups", 1) == 1 and given != _taken(module):
            raise _Misfit(name, given)

    with ExitStack() as hooks:
        for name, module in net.named_modules():
            if is_plain(module):
                hook = module.register_forward_pre_hook(lambda m, args, name=name: check(name, m, args))
                hooks.callback(hook.remove)
        try:
            samples.run(2)
        except _Misfit as found:
            return found.args
        except Exception:  # of somebody else's code: told by the next run
            return None
    return None


def _check_runs(net: nn.Module, samples: Samples, what: str) -> None:
    try:
        samples.run(2)
    except Exception as exc:  # of somebody else's code
        reason = next(filter(None, str(exc).splitlines()), type(exc).__name__)
        raise ModelError(
            f"{what}: {samples.what} does not work without these blocks: {reason}",
            tip="its code counts on them; other blocks (keep=), or lowrank and prune",
        ) from None

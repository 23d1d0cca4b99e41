"""Where the tensors go that a network's layers give: seen by running it once, not by reading its code.

Every operator that runs is noted with the tensors that it takes and gives, and with the layer in which it runs. So it does not
matter how a network is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# what an integer program computes on the numbers of 8 bits as they are, or in one step with the layer before
PASSED_ON = (
    "relu", "relu_", "hardtanh", "hardtanh_", "max_pool2d_with_indices", "view", "_unsafe_view", "permute", "t", "transpose",
    "squeeze", "unsqueeze", "clone",
)  # fmt: skip


@dataclass(frozen=True)
class Use:
    """An operator that takes a tensor.

    Attributes:
        operator: its name, without its overload.
        layer: the watched layer in which it runs; None outside of them.
        given: numbers of the tensors that it gives.
    """

    operator: str
    layer: str | None
    given: tuple[int, ...]


@dataclass
class Flow:
    """One run of a network.

    Attributes:
        taken, given: of each watched layer, call by call the numbers of the tensor that it takes first and of the one it gives.
        uses: of each tensor's number, who takes it.
    """

    taken: dict[str, list[int]] = field(default_factory=dict)
    given: dict[str, list[int]] = field(default_factory=dict)
    uses: dict[int, list[Use]] = field(default_factory=dict)

    def follows(self, layer: str, norm: str) -> bool:
        """Whether `norm` alone takes what `layer` gives, and each is called once."""
        given, taken = self.given.get(layer, []), self.taken.get(norm, [])
        if len(given) != 1 or given != taken:
            return False
        return all(use.layer == norm for use in self.uses.get(given[0], []))

    def is_taken_only_by(self, numbers: Iterable[int], others: Iterable[str]) -> bool:
        """Whether these tensors reach nobody but these layers (or the end), as they are or through `PASSED_ON`."""
        return all(self._reaches_only(number, set(others)) for number in numbers)

    def _reaches_only(self, number: int, layers: set[str]) -> bool:
        return all(
            use.layer in layers
            or (use.operator in PASSED_ON and all(self._reaches_only(one, layers) for one in use.given))
            for use in self.uses.get(number, [])
        )


def flow_of(net: nn.Module, watched: Iterable[str], run: Callable[[], Any]) -> Flow:
    """What one run does with tensors.

    Args:
        net: as it was afterwards.
        watched: names of layers.
        run: calls the network, without gradients.
    """
    watcher = _Watcher()
    with ExitStack() as hooks:
        for name in watched:
            module = net.get_submodule(name)
            before = module.register_forward_pre_hook(lambda _m, args, name=name: watcher.enter(name, args))
            after = module.register_forward_hook(lambda _m, _args, output, name=name: watcher.leave(name, output))
            hooks.callback(before.remove)
            hooks.callback(after.remove)
        with torch.no_grad(), watcher:
            run()
    return watcher.flow


class _Watcher(TorchDispatchMode):
    """Notes every operator, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = Flow()
        self._held: list[Tensor] = []  # so that no two tensors have one identity
        self._numbers: dict[int, int] = {}  # of a tensor's identity; another one after it was changed in place
        self._inside: list[str] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled while it is entered, and torch's compiler takes seconds to be imported

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        taken = [self._number(tensor) for tensor in _tensors((args, kwargs or {}))]
        output = func(*args, **(kwargs or {}))
        given = tuple(self._anew(tensor) for tensor in _tensors(output))
        use = Use(func.overloadpacket.__name__, self._inside[-1] if self._inside else None, given)
        for number in dict.fromkeys(taken):
            self.flow.uses.setdefault(number, []).append(use)
        return output

    def enter(self, name: str, args: tuple[Any, ...]) -> None:
        self.flow.taken.setdefault(name, []).append(self._first(args))
        self._inside.append(name)

    def leave(self, name: str, output: Any) -> None:
        self._inside.pop()
        self.flow.given.setdefault(name, []).append(self._first(output))

    def _first(self, values: Any) -> int:
        return next((self._number(tensor) for tensor in _tensors(values)), -1)

    def _number(self, tensor: Tensor) -> int:
        return self._numbers[id(tensor)] if id(tensor) in self._numbers else self._anew(tensor)

    def _anew(self, tensor: Tensor) -> int:
        self._held.append(tensor)
        self._numbers[id(tensor)] = len(self._held)
        return len(self._held)


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))

"""Which layers of a network are quantised and how, and a whole network on its way from floats to int8."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from softcache.features.taps import eval_mode
from softcache.models.data_flow import Flow, flow_of
from softcache.models.fake_quantise import KINDS, NORMS, OBSERVED, Quantised, fix, learn
from softcache.models.shrunk import is_below, put

CLOSE = 1e-3  # of the largest logit: what a folded BatchNorm may change in floats

Plan = Mapping[str, Quantised]


def plan_int8(
    net: nn.Module, run: Callable[[], Tensor], keep: Sequence[str] = ()
) -> tuple[dict[str, Quantised], list[str]]:
    """How each convolution and linear layer is quantised, and the names of those layers with weights that stay floats.

    Quantised are nn.Conv2d and nn.Linear themselves, where they are called and share no weight. A BatchNorm is folded where it
    alone takes what a layer gives. A convolution's answers are rounded too where somebody else takes them than quantised layers.

    Args:
        net: in floats, in eval mode; as it was afterwards.
        run: calls it, without gradients: its logits.
        keep: names of modules that stay floats.
    """
    with eval_mode(net), torch.no_grad():
        return _plan(net, run, keep)


def _plan(net: nn.Module, run: Callable[[], Tensor], keep: Sequence[str]) -> tuple[dict[str, Quantised], list[str]]:
    shared = _shared_weights(net)
    able = [
        n for n, m in net.named_modules() if type(m) in KINDS and id(m.weight) not in shared and not is_below(n, keep)
    ]
    norms = [name for name, m in net.named_modules() if type(m) in NORMS and m.running_mean is not None]
    flow = flow_of(net, [*able, *norms], run)
    called = [name for name in able if name in flow.given]
    folded = _folded(net, run, {layer: norm for norm in norms for layer in called if flow.follows(layer, norm)})
    plan = {
        name: Quantised(folded.get(name), _is_heard_elsewhere(net, flow, name, folded.get(name), called))
        for name in called
    }
    done = {*plan, *folded.values()}
    return plan, [name for name, module in net.named_modules() if name not in done and _has_matrix(module)]


def _has_matrix(module: nn.Module) -> bool:
    return any(p is not None and p.ndim > 1 for p in module._parameters.values())


def _shared_weights(net: nn.Module) -> set[int]:
    """Identities of the weights that several modules have."""
    seen: list[int] = [id(p) for m in net.modules() for p in m._parameters.values() if p is not None]
    return {one for one in seen if seen.count(one) > 1}


def _is_heard_elsewhere(net: nn.Module, flow: Flow, layer: str, norm: str | None, quantised: Sequence[str]) -> bool:
    """Whether a convolution's answers, behind its BatchNorm, reach others than quantised layers."""
    # a linear layer multiplies int8 and gives floats in one step
    return isinstance(net.get_submodule(layer), nn.Conv2d) and not flow.is_taken_only_by(norm or layer, quantised)


def _folded(net: nn.Module, run: Callable[[], Tensor], pairs: Mapping[str, str]) -> dict[str, str]:
    """Those of the pairs of a layer and its BatchNorm that may be one layer, for the logits are the same: mostly all."""
    expected = run()
    if _same(net, run, pairs, expected):
        return dict(pairs)
    return {layer: norm for layer, norm in pairs.items() if _same(net, run, {layer: norm}, expected)}


def _same(net: nn.Module, run: Callable[[], Tensor], pairs: Mapping[str, str], expected: Tensor) -> bool:
    whole: dict[str, Any] = {name: net.get_submodule(name) for pair in pairs.items() for name in pair}
    try:
        for layer, norm in pairs.items():
            fuse: Any = fuse_conv_bn_eval if isinstance(whole[layer], nn.Conv2d) else fuse_linear_bn_eval
            put(net, layer, fuse(whole[layer], whole[norm]))
            put(net, norm, nn.Identity())
        found = run()
    finally:
        for name, module in whole.items():
            put(net, name, module)
    return torch.allclose(found, expected, rtol=CLOSE, atol=CLOSE * float(expected.abs().max()))


def begin_int8(net: nn.Module, plan: Plan) -> None:
    """Let a network's layers learn as quantised ones, in place; nothing was observed yet."""
    for name, how in plan.items():
        learn(net, name, how)


def observe(net: nn.Module, *, on: bool) -> None:
    """Let the ends of activations follow what their modules are given from now on, or stay."""
    for module in net.modules():
        if getattr(module, OBSERVED, None) is not None:
            module.observes = on  # type: ignore[assignment]


def fix_int8(net: nn.Module, plan: Plan) -> None:
    """End their learning, in place: BatchNorm is folded, and what is saved and loaded again computes the same."""
    for name, how in plan.items():
        fix(net, name, how)
    for how in plan.values():
        if how.norm is not None:
            put(net, how.norm, nn.Identity())

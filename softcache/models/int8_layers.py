"""Which layers of a network are quantised and how, and a whole network on its way from floats to int8."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from softcache.features.taps import eval_mode
from softcache.models.data_flow import flow_of
from softcache.models.fake_quantise import KINDS, OBSERVED, Quantised, fix, kind_of, learn
from softcache.models.norms import has_statistics, what_follows, without_normalising
from softcache.models.shrunk import is_below, put

CLOSE = 1e-3  # of the largest logit: what a folded BatchNorm may change in floats

Plan = Mapping[str, Quantised]


def plan_int8(
    net: nn.Module, run: Callable[[], Tensor], keep: Sequence[str] = ()
) -> tuple[dict[str, Quantised], list[str]]:
    """How each convolution and linear layer is quantised, and the names of those layers with weights that stay floats.

    Quantised are nn.Conv2d and nn.Linear, and a library's kinds that answer as these do, where they are called and share no
    weight. A BatchNorm is folded where it alone takes what a layer gives; what follows in it stays. A convolution's answers are
    rounded too where somebody else takes them than quantised layers.

    Args:
        net: in floats, in eval mode; as it was afterwards.
        run: calls it, without gradients: its logits.
        keep: names of modules that stay floats.
    """
    with eval_mode(net), torch.no_grad():
        return _plan(net, run, keep)


def _plan(net: nn.Module, run: Callable[[], Tensor], keep: Sequence[str]) -> tuple[dict[str, Quantised], list[str]]:
    shared = _shared_weights(net)
    able = {n: m for n, m in net.named_modules() if kind_of(m) and id(m.weight) not in shared and not is_below(n, keep)}
    names = {id(module): name for name, module in net.named_modules()}
    norms = {name: names.get(id(what_follows(m))) for name, m in net.named_modules() if has_statistics(m)}
    flow = flow_of(net, [*able, *norms, *filter(None, norms.values())], run)
    # what each has normalised, once: what it gives, or what follows in it takes
    normalised = {
        norm: flow.given.get(norm, []) if after is None else flow.taken.get(after, []) for norm, after in norms.items()
    }
    called = _as_torchs_own({name: module for name, module in able.items() if name in flow.given}, run)
    once = [norm for norm, numbers in normalised.items() if len(numbers) == 1]
    folded = _folded(net, run, {layer: norm for norm in once for layer in called if flow.follows(layer, norm)})
    plan = {}
    for name in called:
        given = normalised[folded[name]] if name in folded else flow.given[name]
        # a linear layer multiplies int8 and gives floats in one step
        heard = isinstance(able[name], nn.Conv2d) and not flow.is_taken_only_by(given, called)
        plan[name] = Quantised(folded.get(name), heard)
    done = {*plan, *folded.values()}
    return plan, [name for name, module in net.named_modules() if name not in done and _has_matrix(module)]


def _has_matrix(module: nn.Module) -> bool:
    return any(p is not None and p.ndim > 1 for p in module._parameters.values())


def _shared_weights(net: nn.Module) -> set[int]:
    """Identities of the weights that several modules have."""
    seen: list[int] = [id(p) for m in net.modules() for p in m._parameters.values() if p is not None]
    return {one for one in seen if seen.count(one) > 1}


def _as_torchs_own(layers: Mapping[str, Any], run: Callable[[], Tensor]) -> list[str]:
    """Those of the layers that answer as torch's own kind does; of a library's kinds it is tried."""
    odd = [name for name, layer in layers.items() if type(layer) not in KINDS]
    if not odd:
        return list(layers)
    expected = run()

    def same(*names: str) -> bool:
        kinds = {name: type(layers[name]) for name in names}
        try:
            for name in names:
                layers[name].__class__ = kind_of(layers[name])
            return torch.equal(run(), expected)
        except Exception:  # of somebody else's code
            return False
        finally:
            for name, kind in kinds.items():
                layers[name].__class__ = kind

    return list(layers) if same(*odd) else [name for name in layers if name not in odd or same(name)]


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
            put(net, norm, without_normalising(whole[norm]))
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
            put(net, how.norm, without_normalising(net.get_submodule(how.norm)))

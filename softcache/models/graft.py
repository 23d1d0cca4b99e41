"""A student that answers with its teacher's final linear layer, through a learned projector.

Source: Chen et al., "Knowledge Distillation with the Reused Teacher Classifier" (2022).
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from softcache.errors import ConfigError, ModelError, SoftcacheError, nearest
from softcache.features.taps import classifier_of, eval_mode
from softcache.models.model import Model
from softcache.models.projector import Graft, Projector


def graft(
    model: Model,
    layer: str,
    projector: Projector,
    classifier_weight: Tensor,
    classifier_bias: Tensor | None,
    inputs: Any,
) -> None:
    """Put `projector` behind `layer` and the teacher's final linear layer, frozen, in the place of the student's.

    In the network's names: `layer` becomes a chain of `layer.body` and `layer.projector`. Where `layer` is the student's
    final linear layer itself, the projector stands right in front of it: `layer.projector`, `layer.classifier`. What was
    done is in `model.graft`; a model that is refused is left as it was.

    Args:
        model: changed in place; tapping `model.graft.features` gives what is compared with the teacher's features.
        layer: a module of `model.net` that gives the last map or vector, or the final linear layer.
        projector: from what `layer` gives (or the final linear layer takes) to the teacher's features.
        classifier_weight: (C, D), of the teacher.
        classifier_bias: (C,), or None.
        inputs: a collated batch on the model's device, to see that the whole still works.

    Raises:
        ConfigError: no such layer, or one that cannot be grafted.
        ModelError: a network without a final linear layer, other classes, or a network whose layers behind `layer` were
            made for one width.
    """
    if model.graft is not None:
        raise ConfigError(f"the student has been grafted already, at {model.graft.layer!r}")
    classes, width = classifier_weight.shape
    if classes != model.num_classes:
        raise ModelError(
            f"the teacher's final linear layer has {classes} classes, the student {model.num_classes}",
            tip="a reused classifier needs the teacher's class list",
        )
    prepared = model.input.prepare(inputs)
    found = classifier_of(model.net, prepared)
    if found is None:
        raise ModelError(
            f"{model.spec}: its logits do not come from an nn.Linear, so that there is none to replace",
            tip="use a student that ends with a linear layer",
        )
    plan = Graft(layer, _name_of(model, found), projector.describe(), classes, width, classifier_bias is not None)
    before = _check_layer(model, plan)
    _build_in(model, plan, projector)
    classifier: Any = _classifier(model, plan)
    with torch.no_grad():
        classifier.weight.copy_(classifier_weight)
        if classifier_bias is not None:
            classifier.bias.copy_(classifier_bias)
    try:
        _check_whole(model, plan, prepared)
    except Exception:
        model.graft = None
        for name, module in before.items():
            _set(model.net, name, module)
        raise


def regraft(model: Model, plan: Graft, *, most: int) -> None:
    """The same layers as `graft` made, with weights that are still to be loaded.

    Args:
        most: how many numbers there are to be loaded in all: no layer is made of more.

    Raises:
        ModelError: the network has no such layers, or they would have more numbers.
    """
    try:
        with torch.device("meta"):
            size = sum(tensor.numel() for tensor in Projector(**plan.projector).state_dict().values())
        if max(size, plan.classes * plan.width) > most or min(plan.classes, plan.width) < 1:
            raise ConfigError(f"its layers would have more numbers than there are weights ({most:,})")
        projector = Projector(**plan.projector)
        if not isinstance(_check_layer(model, plan)[plan.head], nn.Linear):
            raise ConfigError(f"{plan.head!r} is no linear layer")
    except (ConfigError, TypeError, RuntimeError) as exc:
        raise ModelError(
            f"{model.spec} cannot be grafted at {plan.layer!r} and {plan.head!r} as the weights were: {exc}",
            tip="check that the model's name and parameters are those the weights were made with",
        ) from None
    _build_in(model, plan, projector)


def _build_in(model: Model, plan: Graft, projector: Projector) -> None:
    old: Any = model.net.get_submodule(plan.head)
    where = {"device": old.weight.device, "dtype": old.weight.dtype}
    classifier = nn.Linear(plan.width, plan.classes, bias=plan.bias, **where).requires_grad_(False)
    projector.to(**where)
    if plan.layer == plan.head:
        _set(model.net, plan.head, nn.Sequential(OrderedDict(projector=projector, classifier=classifier)))
    else:
        body = model.net.get_submodule(plan.layer)
        _set(model.net, plan.layer, nn.Sequential(OrderedDict(body=body, projector=projector)))
        _set(model.net, plan.head, classifier)
    model.graft = plan


def _classifier(model: Model, plan: Graft) -> nn.Module:
    inside = ".classifier" if plan.layer == plan.head else ""
    return model.net.get_submodule(plan.head + inside)


def _check_layer(model: Model, plan: Graft) -> dict[str, nn.Module]:
    """The modules that are going to be replaced, by name."""
    names = {name: module for name, module in model.net.named_modules(remove_duplicate=False) if name}
    for name in (plan.layer, plan.head):
        if name not in names:
            raise ConfigError(f"the student has no module {name!r}", tip=nearest(name, names))
        again = [other for other, module in names.items() if module is names[name] and other != name]
        if again:
            raise ConfigError(f"module {name!r} is also {again[0]!r}", tip="name a module that is used in one place")
    if plan.head.startswith(f"{plan.layer}."):
        raise ConfigError(
            f"module {plan.layer!r} contains the final linear layer {plan.head!r}",
            tip=f"name a module before it, or {plan.head!r} for a projector right in front of it",
        )
    return {name: names[name] for name in (plan.layer, plan.head)}


def _check_whole(model: Model, plan: Graft, prepared: Any) -> None:
    """One forward pass: the projector and the teacher's layer are called once each, and the logits are the latter's."""
    projector, head = model.net.get_submodule(plan.features), _classifier(model, plan)
    taken: list[Any] = []
    projected: list[Any] = []
    try:
        with ExitStack() as hooks, torch.no_grad(), eval_mode(model.net):
            hooks.enter_context(projector.register_forward_pre_hook(lambda _m, args: projected.append(args[0])))
            hooks.enter_context(head.register_forward_pre_hook(lambda _m, args: taken.append(args[0])))
            logits = model.net(prepared)
    except (RuntimeError, TypeError, AttributeError, ValueError) as exc:
        raise _misfit(plan, projected, taken, str(exc)) from None
    given = tuple(projected[0].shape[1:]) if projected else ()
    wanted = tuple(plan.projector["student_shape"])
    if len(projected) != 1 or given != wanted or logits.shape != (len(taken[0]), plan.classes):
        raise _misfit(plan, projected, taken, f"the logits have shape {tuple(logits.shape)}")


def _misfit(plan: Graft, projected: list[Any], taken: list[Any], reason: str) -> SoftcacheError:
    if len(projected) > 1 or (taken and not projected):
        return ConfigError(
            f"module {plan.layer!r} is called {len(projected)} times before the final linear layer; it must be once",
            tip="name a module whose output leads to the logits, once",
        )
    given = tuple(projected[0].shape[1:]) if projected and isinstance(projected[0], Tensor) else None
    wanted = tuple(plan.projector["student_shape"])
    if given is not None and given != wanted:
        return ModelError(
            f"the projector takes {wanted}, module {plan.layer!r} gives it {given}",
            tip="make the projector for this module's output",
        )
    if taken and taken[0].shape[-1] != plan.width:
        return ModelError(
            f"the teacher's final linear layer takes {plan.width} numbers, behind {plan.layer!r} the student gives it "
            f"{tuple(taken[0].shape[1:])}: what lies between does not average maps away",
            tip=f"use a student with global average pooling, or put the projector right in front of {plan.head!r}",
        )
    reason = next(filter(None, reason.splitlines()), "")
    return ModelError(
        f"the student does not work with a projector behind {plan.layer!r}: {reason}",
        tip=f"what follows that module is made for its width; name a later one, or {plan.head!r}",
    )


def _name_of(model: Model, module: nn.Module) -> str:
    return next(name for name, other in model.net.named_modules() if other is module)


def _set(net: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(net.get_submodule(parent), child, module)

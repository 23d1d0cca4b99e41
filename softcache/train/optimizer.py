"""What learns in a stage, and what makes its steps."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from softcache.config import TrainConfig
from softcache.errors import ConfigError, nearest
from softcache.models import Model
from softcache.train.objective import Objective
from softcache.train.stages import Stage


def freeze_for(stage: Stage, model: Model, objective: Objective, fixed: Collection[str]) -> list[nn.Parameter]:
    """The parameters that a stage trains, after freezing the others.

    Args:
        fixed: parameters of the student that are frozen for good.

    Raises:
        ConfigError: a pattern that names nothing, or nothing is left to train.
    """
    freeze(model.net, stage.config.freeze, fixed)
    learned = [p for p in (*model.parameters(), *objective.parameters()) if p.requires_grad]
    if not learned:
        raise ConfigError(
            "every parameter is frozen, so there is nothing to train",
            tip="freeze less, or add a loss with an adapter",
        )
    return learned


def make_optimizer(parameters: Sequence[Tensor], config: TrainConfig) -> torch.optim.Optimizer:
    """SGD, Adam or AdamW, a step of all parameters in one pass where the device has that."""
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            fused=fused,
        )
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=fused)


def freeze(net: nn.Module, patterns: Sequence[str], fixed: Collection[str] = ()) -> None:
    """Switch gradients off for the parameters that the patterns name and those that are fixed for good, on for the others.

    A module of which every parameter is frozen is to stay in eval mode while training (see `train_mode`), so that BatchNorm
    learns nothing either.

    Raises:
        ConfigError: a pattern that names nothing.
    """
    names = [name for name, _ in net.named_parameters()]
    frozen = set(fixed)
    for pattern in patterns:
        named = [name for name in names if name.startswith(f"{pattern}.") or fnmatch.fnmatchcase(name, pattern)]
        if not named:
            layers = [name for name, module in net.named_modules() if name and any(True for _ in module.parameters())]
            raise ConfigError(f"--freeze {pattern}: the student has no parameters there", tip=nearest(pattern, layers))
        frozen |= set(named)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name not in frozen)


def train_mode(net: nn.Module) -> None:
    """Train mode, but for modules of which every parameter is frozen."""
    net.train()
    for module in net.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()

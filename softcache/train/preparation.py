"""A run made ready: everything opened, built and tried on a few samples, and nothing learned or written yet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from softcache.config import TrainConfig
from softcache.data.loading import LoadedBatch
from softcache.losses.schedules import Moment
from softcache.machine import pick_device, pick_threads
from softcache.models.masks import Masks
from softcache.train.batches import open_material, views_of
from softcache.train.checkpoint import (
    seed_all,
)
from softcache.train.learner import Learner, tapped
from softcache.train.objective import Given, Objective, build_objectives
from softcache.train.optimizer import freeze_for
from softcache.train.outlook import outlook, reach_of, single_samples
from softcache.train.quantising import Quantising
from softcache.train.ranks import ALONE, Ranks
from softcache.train.refuse import check_last_batch, lone_sample_explained, smallest_piece
from softcache.train.session import Prepared
from softcache.train.stages import parse_stages
from softcache.train.student import build_student
from softcache.train.term_modules import Sizes


def prepare(config: TrainConfig, ranks: Ranks = ALONE, *, quiet: bool = True) -> Prepared:
    """Open data and cache, build the student and what each stage asks of it; nothing is written."""
    torch.set_num_threads(pick_threads(config.threads))
    stages, device = parse_stages(config), pick_device(config.device)
    material = open_material(config, [term for stage in stages for term in stage.terms], quiet=quiet)
    if ranks.first:
        material.tell(quiet=quiet)
    check_last_batch(len(material.transfer_set), config.batch_size, ranks)
    seed_all(config.seed)
    model, sample, initialised = build_student(config, material)
    sizes = Sizes.of(material.transfer_set, config.seed)
    objectives, student = build_objectives(stages, model, sample, material.teacher, sizes, ranks)
    fixed = [name for name, parameter in model.net.named_parameters() if not parameter.requires_grad]
    quantising = Quantising.of(stages, model, config.student, sample)
    if config.sync_bn:
        model.net = nn.SyncBatchNorm.convert_sync_batchnorm(model.net)
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    modules = nn.ModuleList(dict.fromkeys(own for objective in objectives for own in objective.term_modules))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema)) if config.ema is not None else None
    averaged: Any = None if average is None else average.module
    masks = Masks(model.net, averaged and averaged.net) if any(stage.pruning for stage in stages) else None
    return Prepared(
        config, stages, device, ranks, quiet, material, model, initialised, sample, student, objectives,
        modules.to(device), fixed, average, masks, quantising,
    )  # fmt: skip


def rehearse(prepared: Prepared) -> tuple[str, ...]:
    """Every stage on two samples, and on one where training will: what does not fit is refused before anything is learned.

    Returns:
        What the run will learn little by.
    """
    config, material, ranks = prepared.config, prepared.material, prepared.ranks
    collate, view = prepared.model.input.collate, views_of(0, material.cache, config)[0]
    few, lone = material.few(collate, view), material.few(collate, view, 1)
    least = smallest_piece(prepared.count, config.batch_size, ranks, config.accumulate) * config.views_per_visit
    reaches, prunings = [], [stage.pruning for stage in prepared.stages]
    for number, (stage, objective) in enumerate(zip(prepared.stages, prepared.objectives, strict=True)):
        freeze_for(stage, prepared.model, objective, prepared.fixed)
        if stage.pruning is not None and prepared.masks is not None:
            stage.pruning.check(prepared.masks, prepared.model.net, prunings[:number])
        steps, epochs = prepared.steps, stage.config.epochs
        first, last = Moment(0, 0, steps, epochs), Moment(epochs - 1, steps - 1, steps, epochs)
        with tapped(prepared.student, objective) as taps:
            learner = Learner(prepared.model, objective, taps, autocast=prepared.autocast)
            values = learner.rehearse(*_given(prepared, objective, few), [first, last])
            single = learner.rehearse(*_given(prepared, objective, lone), [last]) if single_samples(prepared) else {}
            reaches.append(reach_of(prepared.model.net, objective.terms, values, single))
            if least == 1:
                with lone_sample_explained(config, prepared.count, ranks):
                    learner.rehearse_in_training(*_given(prepared, objective, lone), first)
    return (*outlook(prepared, reaches), *(prepared.quantising.told if prepared.quantising is not None else ()))


def _given(prepared: Prepared, objective: Objective, few: LoadedBatch) -> tuple[Any, Given]:
    """Inputs, and what the terms are given, of some samples that every rank has."""
    batch = prepared.material.batch(few, prepared.config, objective.feature_names, prepared.device)
    count = len(few.index) if batch.records is None else int(batch.records.sum())
    return batch.inputs, replace(batch.given, counts=(count,) * prepared.ranks.size)

"""How good a model is: accuracy, likelihood, calibration, and how close it comes to a cache's soft targets."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softcache.config import EvalConfig
from softcache.data.classes import class_indices, dataset_classes, match_classes, places_in, read_classes_map
from softcache.data.join import batches
from softcache.data.loading import Partners, ViewedSet, item_shape, load_batches, spread_items, to_device
from softcache.data.transfer_set import TransferSet, open_transfer_set, under_classes
from softcache.data.views import Policy
from softcache.errors import CacheError, ConfigError, ModelError, faults_explained, note_once
from softcache.evaluate.bias import best_shift, parse_bias
from softcache.evaluate.evaluation import Evaluation
from softcache.evaluate.outputs import Beside, evaluate_member, evaluate_outputs, has_classes, member_of
from softcache.evaluate.sums import Sums, labels_of
from softcache.machine import as_fresh, autocast_dtype, pick_device, pick_threads, pick_workers
from softcache.models import (
    Model,
    load_json,
    load_model,
    own_classes,
    path_alone,
    path_and_choice,
    read_metadata,
    split_weights,
)
from softcache.models.item_range import check_scale
from softcache.report.progress import track
from softcache.targets.cache import Cache, Joined, is_cache
from softcache.targets.cache import open as open_cache
from softcache.targets.ensemble import parse_members
from softcache.targets.teacher import CachedTeacher

TOO_SMALL = "do the items have the size that it takes? --policy resize:size=N; what its code needs is for it to say"


@torch.inference_mode()
def evaluate(
    model: Model,
    transfer_set: TransferSet,
    policy: Policy,
    *,
    device: torch.device,
    batch_size: int = 512,
    workers: int = 0,
    autocast: torch.dtype | None = None,
    joined: Joined | None = None,
    combine: str = "mean_logits",
    weights: Mapping[str, float] | None = None,
    temperature: float = 1.0,
    bias: Mapping[str, float] | None = None,
    order: Sequence[int] | None = None,
    progress: bool = False,
) -> Evaluation:
    """Run a model over a data set, at view 0 of the policy. The model's train or eval mode is put back afterwards.

    Args:
        transfer_set: of the model's classes.
        joined: the same samples joined to a cache, to compare with its soft targets at `temperature`; where the model has
            only some of the cache's classes, with those among them.
        combine, weights: how the cache's members combine, and which with what weight; None for all equally.
        bias: class -> what to add to its logits first.
        order: the model's output for each class; None: in the data's order.
    """
    if not model.has_classes:
        beside = None if joined is None else Beside(joined, member_of(joined.cache, weights, model.output))
        return evaluate_outputs(
            model, transfer_set, policy, device=device, batch_size=batch_size, workers=workers, autocast=autocast,
            beside=beside, progress=progress,
        )  # fmt: skip
    started, was_training = time.monotonic(), model.training
    model.eval()
    count = len(transfer_set)
    sums = Sums.of(transfer_set)
    bias = bias or {}
    added = torch.tensor([bias.get(name, 0.0) for name in transfer_set.class_names], device=device)
    partners = joined.partners if joined is not None else None
    teacher = None if joined is None else teacher_of(joined, transfer_set, combine, weights)
    viewed = ViewedSet(transfer_set, policy, [model.input.collate], partners=partners)
    pairs = batches(np.arange(count), 0, batch_size)
    loaded = load_batches(viewed, pairs, workers=workers, pin_memory=device.type == "cuda")
    for batch in track(loaded, "eval", -(-count // batch_size), unit="batches", quiet=not progress):
        labels, counts = labels_of(transfer_set, batch.index)
        if not len(labels):  # samples without a word, which no model need be able to take
            sums.add(torch.empty(0, transfer_set.num_classes), labels, counts)
            continue
        with (
            faults_explained(ModelError, f"the model {model.spec!r}", tip=TOO_SMALL),
            torch.autocast(device.type, dtype=autocast, enabled=autocast is not None),
        ):
            logits = model(to_device(batch.inputs[0], device))
        rows = f"{len(labels)} {'samples' if counts is None else 'words'}"
        _check_rows(model, logits, len(labels), rows, transfer_set.num_classes if order is None else None)
        _check_finite(logits, rows)
        logits = (logits if order is None else logits[:, list(order)]).float() + added
        sums.add(logits, labels, counts)
        if joined is not None and teacher is not None:
            targets = joined.gather_samples(batch.index, batch.views, members=teacher.members).to(device)
            if counts is not None and teacher.index is not None:
                logits = logits[torch.from_numpy(targets.positions[teacher.index].among(counts)).to(device)]
            sums.add_targets(logits, teacher.logits(targets, temperature), temperature)
    model.train(was_training)
    result = sums.result(count, time.monotonic() - started, temperature, transfer_set.class_names)
    return replace(result, bias=bias)


def teacher_of(
    joined: Joined,
    transfer_set: TransferSet,
    combine: str = "mean_logits",
    weights: Mapping[str, float] | None = None,
) -> CachedTeacher:
    """The cache's members as one teacher of the data's classes."""
    classes = class_indices(_cached_names(joined), transfer_set.class_names)
    return CachedTeacher(joined.cache, combine, weights, classes=tuple(classes)).answering(transfer_set)


def _check_rows(model: Model, logits: Tensor, count: int, rows: str, classes: int | None) -> None:
    """ModelError for logits that are not one row a sample or a word, with at least a number for each class.

    Args:
        rows: how many there should be of what, for the message.
    """
    if logits.ndim != 2 or len(logits) != count or (classes is not None and logits.shape[1] != classes):
        raise ModelError(
            f"the model {model.spec!r} gives {tuple(logits.shape)} for {rows}"
            + (f" of {classes} classes" if classes is not None else ""),
            tip="a model's output must be logits of shape (batch, classes)",
        )


def _cached_names(joined: Joined) -> Sequence[str]:
    """What the joined data calls the cache's classes, in the cache's order."""
    return dataset_classes(joined.dataset) or joined.cache.class_names


def _check_finite(logits: Tensor, rows: str) -> None:
    bad = int((~logits.isfinite().all(dim=1)).sum())
    if bad:
        raise ModelError(
            f"the model's logits are not finite for {bad} of {rows}: its weights are not, or its numbers overflow",
            tip="if it was being trained: a lower --lr, or --clip-norm 1; if it computes in a half type: --autocast none",
        )


def evaluate_cache(
    joined: Joined,
    transfer_set: TransferSet,
    *,
    combine: str = "mean_logits",
    weights: Mapping[str, float] | None = None,
    batch_size: int = 512,
    bias: Mapping[str, float] | None = None,
    progress: bool = False,
) -> Evaluation:
    """How good the combined soft targets of a cache are, at view 0: its teachers together, without running them.

    Args:
        joined: the samples of `transfer_set` joined to the cache; the labels are the transfer set's.
        weights: member -> weight, for the members to use; None for all equally.
        bias: class -> what to add to its combined logits first.
    """
    started, bias = time.monotonic(), bias or {}
    sums = Sums.of(transfer_set)
    teacher = CachedTeacher(joined.cache, combine, weights).answering(transfer_set)
    added = torch.tensor([bias.get(name, 0.0) for name in transfer_set.class_names])
    pieces = np.array_split(np.arange(len(transfer_set)), -(-len(transfer_set) // batch_size))
    for index in track(pieces, "eval", len(pieces), unit="batches", quiet=not progress):
        targets = joined.gather_samples(index, np.zeros_like(index), members=teacher.members)
        labels, counts = labels_of(transfer_set, index)
        if counts is not None and teacher.index is not None:  # of the words that are in the cache
            at = targets.positions[teacher.index]
            labels, counts = labels[at.among(counts)], at.counts
        sums.add(teacher.logits(targets, 1.0) + added, labels, counts)
    result = sums.result(len(transfer_set), time.monotonic() - started, 1.0, transfer_set.class_names)
    result = replace(result, bias=bias)
    if combine == "vote":  # which has no likelihood
        return replace(result, nll=None, calibration_error=None)
    return result


@as_fresh()
def run(model_text: str, config: EvalConfig, *, quiet: bool = False) -> Evaluation:
    """softcache eval: load a model or a run folder, render the data as the run's students saw it, measure; or a cache.

    A student of some of the data's classes is measured on those: samples of the others count as unlabelled.
    """
    check(config)
    torch.set_num_threads(pick_threads(config.threads))
    transfer_set = open_transfer_set(config.data, **config.selection())
    classes_map = read_classes_map(config.classes_map)
    if is_cache(model_text, finished=False):
        return _run_cache(model_text, transfer_set, config, classes_map, quiet=quiet)
    if config.members and config.cache is None:
        raise ConfigError(
            "--members needs a cache", tip="name one in place of the model, or compare with one: --cache DIR"
        )
    joined = None
    if config.cache is not None:
        joined = _joined(config.cache, transfer_set, config, classes_map, quiet=quiet)
        transfer_set = joined.dataset
        if config.policy:
            raise ConfigError("--policy and --cache cannot be given together", tip="the cache brings its own policy")
        policy = joined.cache.policy
    elif config.policy:
        policy = Policy.parse(config.policy, 0)
    else:
        policy = run_policy(model_text).for_evaluation()
    transfer_set = _with_classes_of(model_text, transfer_set, classes_map, compared=joined is not None)
    model = _load(model_text, transfer_set, policy, joined.partners if joined else None, config)
    if (config.bias or config.fit_bias) and not model.has_classes:
        raise ConfigError(f"--bias is of classes, and the model gives {model.output}", tip="leave it out")
    bias = parse_bias(config.bias, transfer_set.class_names)
    if config.fit_bias:
        bias |= _fitted_bias(model_text, model, transfer_set, policy, bias, config)
    return evaluate(
        model,
        transfer_set,
        policy,
        **_how(config),
        joined=joined,
        combine=config.combine,
        weights=parse_members(config.members),
        temperature=config.temperature,
        bias=bias,
        order=_order(model_text, model, transfer_set, classes_map),
        progress=not quiet,
    )


def _open_cache(path: str, config: EvalConfig, *, quiet: bool) -> Cache:
    return open_cache(path, check_files=config.check_files == "yes", allow_code=config.allow_code, quiet=quiet)


def check(config: EvalConfig) -> None:
    """Refuse numbers and combinations that cannot be."""
    if not config.temperature > 0:
        raise ConfigError(f"--temperature {config.temperature}: must be > 0")
    if config.batch_size < 1:
        raise ConfigError(f"--batch-size {config.batch_size}: must be at least 1")
    if not config.fit_bias and (config.bias_data or config.bias_model):
        raise ConfigError(
            "--bias-data and --bias-model need --fit-bias", tip="say whose bias is to be found: --fit-bias 3"
        )
    if config.fit_bias and config.bias_data is None:
        raise ConfigError("--fit-bias needs --bias-data", tip="give data that the model was not trained on")


def _load(
    model_text: str, transfer_set: TransferSet, policy: Policy, partners: Partners | None, config: EvalConfig
) -> Model:
    """ModelError also for a model whose weights lack something."""
    items = spread_items(ViewedSet(transfer_set, policy, (), partners=partners))
    own, names = own_classes(model_text, transfer_set.num_classes), transfer_set.class_names
    if own is not None and len(own) > len(names):
        names = own  # of which the data's are chosen
    with faults_explained(ModelError, f"building the model {model_text!r}"):
        model = load_model(
            model_text,
            num_classes=len(names),
            class_names=names,
            input_shape=item_shape(items[0]),
            device=str(pick_device(config.device)),
            allow_code=config.allow_code,
        )
    model.check_gives("sample" if transfer_set.positions is None else transfer_set.positions.kind, transfer_set.name)
    model.check_trained(repr(model_text))
    check_scale(model, model_text, items)
    return model


def _order(
    model_text: str, model: Model, transfer_set: TransferSet, classes_map: Mapping[str, str]
) -> Sequence[int] | None:
    return match_classes(repr(model_text), model.declared_classes, transfer_set.class_names, classes_map).columns


def _joined(
    path: str, transfer_set: TransferSet, config: EvalConfig, classes_map: Mapping[str, str], *, quiet: bool
) -> Joined:
    members = tuple(parse_members(config.members) or ())
    return join_whole(_open_cache(path, config, quiet=quiet), transfer_set, members, classes_map)


def join_whole(
    cache: Cache, transfer_set: TransferSet, members: Sequence[str], classes_map: Mapping[str, str]
) -> Joined:
    """The data under the cache's class list, joined to it.

    Args:
        members: those that are to be used; empty: all.

    Raises:
        CacheError: no such member, or one that has no whole soft target.
    """
    for name in members or cache.members:
        codec = None if cache.member(name).output is None else cache.codecs[name]
        if codec is not None and not codec.complete:
            raise CacheError(
                f"member {name!r} is stored by codec {codec.name!r}, which keeps some classes only: it has no whole "
                "soft target to measure",
                tip="take other members (--members), or dump with --codec headtail or int8, which keep every class",
            )
    transfer_set = under_classes(transfer_set, cache.class_names, "the cache", classes_map)
    return cache.join(transfer_set, classes_map=None if transfer_set.class_names == cache.class_names else classes_map)


def _how(config: EvalConfig) -> dict[str, Any]:
    """On what, and in what portions."""
    device = pick_device(config.device)
    return {
        "device": device,
        "batch_size": config.batch_size,
        "workers": pick_workers(config.workers, device),
        "autocast": autocast_dtype(config.autocast, device),
    }


def _run_cache(
    path: str, transfer_set: TransferSet, config: EvalConfig, classes_map: Mapping[str, str], *, quiet: bool
) -> Evaluation:
    """A cache in the place of a model."""
    told = {"--cache": config.cache, "--policy": config.policy, "--fit-bias": config.fit_bias}
    for flag, given in told.items():
        if given:
            raise ConfigError(f"{flag} is of models; {path} is a cache", tip="leave it out, or name a model")
    if config.bias and config.combine == "vote":
        raise ConfigError("--bias is of models; votes have no logits", tip="leave it out, or name a model")
    joined = _joined(path, transfer_set, config, classes_map, quiet=quiet)
    transfer_set = joined.dataset
    weights = parse_members(config.members)
    if not has_classes(joined.cache, weights):
        if config.bias:
            raise ConfigError("--bias is of classes, and the cache holds none", tip="leave it out")
        return evaluate_member(Beside(joined, member_of(joined.cache, weights)), transfer_set)
    bias = parse_bias(config.bias, transfer_set.class_names)
    return evaluate_cache(
        joined,
        transfer_set,
        combine=config.combine,
        weights=weights,
        batch_size=config.batch_size,
        bias=bias,
        progress=not quiet,
    )


def _fitted_bias(
    model_text: str,
    model: Model,
    transfer_set: TransferSet,
    policy: Policy,
    given: Mapping[str, float],
    config: EvalConfig,
) -> dict[str, float]:
    """The one number for all of the classes of --fit-bias that makes fewest errors on the held-out data.

    Args:
        given: class -> bias that is added before; of other classes.
    """
    assert config.bias_data is not None
    held_out = open_transfer_set(config.bias_data, download=config.download)
    held_out = under_classes(held_out, transfer_set.class_names, transfer_set.name)
    classes = class_indices(transfer_set.class_names, config.fit_bias)
    twice = [name for name in given if transfer_set.class_names.index(name) in classes]
    if twice:
        raise ConfigError(f"--bias and --fit-bias both name class {twice[0]!r}", tip="leave it out of one of them")
    if config.bias_model not in (None, model_text):
        model_text = config.bias_model
        policy = policy if config.policy else run_policy(model_text).for_evaluation()
        model = _load(model_text, held_out, policy, None, config)
    rows: list[Tensor] = []
    hook = model.register_forward_hook(lambda _model, _inputs, logits: rows.append(logits.detach().float().cpu()))
    order = _order(model_text, model, held_out, read_classes_map(config.classes_map))
    try:
        evaluate(model, held_out, policy, **_how(config), order=order)
    finally:
        hook.remove()
    logits = torch.cat(rows) if order is None else torch.cat(rows)[:, list(order)]
    added = torch.tensor([given.get(name, 0.0) for name in transfer_set.class_names])
    labels, _ = labels_of(held_out, np.arange(len(held_out)))
    shift = best_shift(logits + added, torch.from_numpy(labels), classes)
    return {transfer_set.class_names[i]: shift for i in classes}


def run_policy(model_text: str) -> Policy:
    """The view policy a run folder was trained with; no steps for a model that does not come from a run."""
    weights = _student_file(model_text)
    stored = None if weights is None else read_metadata(weights).get("softcache_policy")
    if weights is None or stored is None:
        return Policy()
    try:
        steps = load_json(stored)
        if not isinstance(steps, list):
            raise TypeError("no list of steps")
        return replace(Policy.from_json(steps, 0), allow_code=False)
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ModelError(
            f"{weights}: its view policy cannot be understood: {exc!r}", tip="say how its items are seen: --policy STEP"
        ) from None


def _with_classes_of(
    model_text: str, transfer_set: TransferSet, classes_map: Mapping[str, str], *, compared: bool
) -> TransferSet:
    """The data under the class list of a model that has some of its classes, in the same order, or more; else as it is.

    Args:
        compared: with a cache, whose classes are the data's: then a model's outputs are chosen instead.
    """
    own, names = own_classes(model_text, transfer_set.num_classes), transfer_set.class_names
    if own is None or own == names:
        return transfer_set
    if len(own) < len(names):
        common = tuple(name for name in names if name in own)
        return transfer_set.with_classes(common) if common and common == own else transfer_set
    if len(own) == len(names) or compared or transfer_set.multi_label:
        return transfer_set
    columns = places_in(names, own) or match_classes(repr(model_text), own, names, classes_map).columns
    note_once(f"the data has {len(names):,} of the model's {len(own):,} classes; it is measured over all of them")
    return transfer_set.under(own, columns or range(len(names)))


def _student_file(model_text: str) -> Path | None:
    """The run folder or safetensors file that a model's text names; None where there is none."""
    text = path_alone(model_text) or split_weights(model_text)[1]
    path = Path(path_and_choice(text)[0])
    if not text or not os.path.exists(path):
        return None
    return None if path.is_file() and path.suffix != ".safetensors" else path

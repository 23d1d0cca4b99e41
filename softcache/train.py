"""The training recipe: cache + transfer set -> student. Read it top to bottom.

    cache + transfer set -> join -> loader of items -> one gather of the batch's targets -> device -> decode -> losses -> step

Without a cache the same recipe trains on hard labels: that is how teachers and baselines are made.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import softcache
from softcache.checkpoint import resume_run, save_run
from softcache.config import TrainConfig
from softcache.data.identity import sample_ids
from softcache.data.join import SPREAD, batches
from softcache.data.loading import LoadedBatch, Partners, ViewedSet, epoch_order, load_batches, to_device
from softcache.data.transfer_set import TransferSet, open_transfer_set
from softcache.data.views import Policy
from softcache.errors import CacheError, ConfigError, LossError, TrainingError
from softcache.evaluate import Evaluation, check_same_classes, evaluate, item_shape
from softcache.losses import LossTerm
from softcache.losses.schedules import check_schedule, scheduled
from softcache.machine import autocast_dtype, pick_device, pick_threads, pick_workers
from softcache.models import Model, build_vocabulary, load_model, save_student
from softcache.objective import Labels, check_mixed, check_term, loss_parts, parse_members, parse_terms, total_loss
from softcache.run_folder import (
    STUDENT,
    check_same_data,
    claim_folder,
    data_fingerprint,
    describe_run,
    locked,
    pinned_cache,
    write_metrics,
)
from softcache.targets import Cache, Joined
from softcache.targets import open as open_cache


@dataclass(frozen=True)
class TrainResult:
    """A finished run: its folder, one dict of metrics per epoch, and the last evaluation (None without eval data)."""

    path: Path
    metrics: list[dict[str, Any]]
    evaluation: Evaluation | None
    parameters: int


def run(config: TrainConfig, *, quiet: bool = False) -> TrainResult:
    """Train a student; resumes a run that was interrupted, and returns a finished one as it is.

    Raises:
        SoftcacheError: and its children, before the first step wherever that is possible.
    """
    _check_numbers(config)
    out = claim_folder(config)
    with locked(out):
        return _train(config, out, quiet=quiet)


def _train(config: TrainConfig, out: Path, *, quiet: bool) -> TrainResult:
    device = pick_device(config.device)
    torch.set_num_threads(pick_threads(config.threads))
    workers, autocast = pick_workers(config.workers, device), autocast_dtype(config.autocast)

    transfer_set = open_transfer_set(config.data, **config.selection())
    eval_set = open_transfer_set(config.eval_data, download=config.download) if config.eval_data else None
    if eval_set is not None:
        check_same_classes(eval_set, transfer_set)

    terms = parse_terms(config.loss, has_cache=config.cache is not None)
    cache = _open_cache(config, out)
    weights = parse_members(config.members)
    joined = _join(cache, transfer_set, config) if cache is not None else None
    if cache is not None:
        for term in terms:
            check_term(cache, term, config.combine, weights)
        members: Sequence[str] | None = list(weights) if weights else None
    labelled = _check_labels(terms, transfer_set)
    policy = _policy(config, cache)
    if policy.mixing is not None:
        check_mixed(terms, str(policy))
    partners = joined.partners if joined else Partners(transfer_set.whole, np.arange(len(transfer_set.whole)))
    ids = joined.cache.samples.ids[joined.rows] if joined is not None else None
    drift = None
    if joined is not None and not config.augment:
        as_cached = ViewedSet(transfer_set, joined.cache.policy, (), partners=partners, ids=ids)
        drift = _check_views(joined, as_cached, config)
    item = ViewedSet(transfer_set, policy, (), partners=partners, ids=ids).render(0, 0)[0]

    torch.manual_seed(config.seed)
    model = load_model(
        config.student,
        num_classes=transfer_set.num_classes,
        class_names=transfer_set.class_names,
        input_shape=item_shape(item),
        vocabulary=build_vocabulary(transfer_set.load(i)[0] for i in range(len(transfer_set)))
        if isinstance(item, str)
        else None,
    ).to(device)
    optimizer = make_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=config.autocast == "fp16")
    viewed = ViewedSet(transfer_set, policy, [model.input.collate], partners=partners, ids=ids)
    count, steps = len(transfer_set), -(-len(transfer_set) // config.batch_size)

    vocabulary = getattr(model.input, "vocabulary", ())
    data = data_fingerprint(sample_ids(transfer_set.keys), transfer_set.labels, tuple(vocabulary))
    check_same_data(out, data)
    state = resume_run(out, model, optimizer, scaler)
    metrics: list[dict[str, Any]] = state["metrics"]
    evaluation = None
    describe_run(
        out,
        config,
        terms,
        cache_id=cache.id if cache is not None else None,
        data=data,
        samples=count,
        labelled=labelled,
        labels_changed=joined.labels_changed if joined is not None else 0,
        drift=drift,
    )

    for epoch in range(state["epoch"], config.epochs):
        model.train()
        first_step = state["step"] if epoch == state["epoch"] else 0
        sums: dict[str, Any] = state["sums"] if first_step else {}
        order = epoch_order(count, config.seed, epoch)
        view, target_view = _views_of(epoch, cache, config)
        started = time.monotonic()
        loaded = load_batches(
            viewed,
            batches(order, view, config.batch_size, start=first_step),
            workers=workers,
            pin_memory=device.type == "cuda",
        )
        bar = _bar(loaded, epoch, config.epochs, first_step, steps, quiet)
        for step, batch in enumerate(bar, start=first_step):
            position = epoch + step / steps
            factor = scheduled(
                config.schedule,
                position + (1 / steps if position < config.warmup_epochs else 0.0),  # never a step at zero
                config.epochs,
                warmup_epochs=config.warmup_epochs,
                milestones=config.milestones,
                gamma=config.gamma,
            )
            for group in optimizer.param_groups:
                group["lr"] = config.lr * factor

            inputs = to_device(batch.inputs[0], device)
            labels = _labels(transfer_set, partners, batch, device)
            targets = None
            if joined is not None:
                views = np.full(len(batch.index), target_view, np.int64)
                targets = joined.gather_samples(batch.index, views, members=members).to(device)

            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                student_logits = model(inputs)
            parts = loss_parts(terms, student_logits, labels, targets, config.combine, weights, config.seed)
            loss = total_loss(terms, parts)

            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

            for name, value in {**parts, "loss": loss}.items():
                sums[name] = sums.get(name, 0.0) + value.detach().double()  # stays on the device: no wait for it
            if step % 20 == 0 or step == steps - 1:
                _check_finite(sums["loss"], epoch, step)
                bar.set_postfix_str(f"loss {sums['loss'].item() / (step + 1):.4f}")
            if config.checkpoint_every and (step + 1) % config.checkpoint_every == 0 and step + 1 < steps:
                save_run(out, model, optimizer, scaler, epoch, step + 1, sums, metrics)

        row: dict[str, Any] = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"], "view": view}
        row |= {name: value.item() / steps for name, value in sums.items()}
        if eval_set is not None:
            evaluation = evaluate(
                model, eval_set, policy.for_evaluation(), device=device, workers=workers, autocast=autocast
            )
            row |= {"eval_top1": evaluation.top1, "eval_nll": evaluation.nll, "eval_errors": evaluation.errors}
        row["seconds"] = round(time.monotonic() - started, 3)
        metrics.append(row)
        write_metrics(out, metrics)  # before the checkpoint: a run killed in between does this epoch again
        save_run(out, model, optimizer, scaler, epoch + 1, 0, {}, metrics)

    if evaluation is None and eval_set is not None:
        evaluation = evaluate(
            model, eval_set, policy.for_evaluation(), device=device, workers=workers, autocast=autocast
        )
    metadata = {
        "softcache_policy": json.dumps(policy.to_json()),
        "softcache_cache": cache.id if cache is not None else "",
        "softcache_version": softcache.__version__,
    }
    save_student(model, out / STUDENT, metadata=metadata)
    parameters = sum(p.numel() for p in model.net.parameters())
    return TrainResult(out, metrics, evaluation, parameters)


def make_optimizer(model: Model, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD, Adam or AdamW over all parameters of the student."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=config.lr, weight_decay=config.weight_decay)


def _check_numbers(config: TrainConfig) -> None:
    for name, lowest in (("epochs", 1), ("batch_size", 1)):
        if getattr(config, name) < lowest:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least {lowest}")
    for name in ("weight_decay", "warmup_epochs", "momentum"):
        if not 0 <= getattr(config, name) < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least 0")
    if config.checkpoint_every is not None and config.checkpoint_every < 1:
        raise ConfigError(f"--checkpoint-every {config.checkpoint_every}: must be at least 1")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("training runs on one process", tip="start it without torchrun; dumping runs on several")
    if not config.lr > 0:
        raise ConfigError(f"--lr {config.lr}: must be > 0")
    check_schedule(config.schedule)
    if config.cache is not None and config.policy:
        raise ConfigError(
            "--policy and --cache cannot be given together",
            tip="the student sees the cache's own views; leave --policy out",
        )
    for name in ("members", "cache_id", "view", "size", "augment"):
        if config.cache is None and getattr(config, name) not in (None, ()):
            raise ConfigError(f"--{name.replace('_', '-')} needs --cache")
    if config.augment and config.size is not None:
        raise ConfigError("--size and --augment cannot be given together", tip="--augment sets its own size")


def _open_cache(config: TrainConfig, out: Path) -> Cache | None:
    """The cache to learn from; a run that is resumed stays with the manifest it began with."""
    if config.cache is None:
        return None
    before = pinned_cache(out)
    try:
        cache = open_cache(
            config.cache,
            id=before or config.cache_id,
            mode=config.read,  # type: ignore[arg-type]
            check_blocks=config.check_blocks,  # type: ignore[arg-type]
            allow_code=config.allow_code,
        )
    except CacheError as exc:
        if before is not None:
            exc.add_note(f"{out} began with cache {before}; another one needs another --out")
        raise
    if config.view is not None and not 0 <= config.view < cache.num_views:
        raise ConfigError(f"--view {config.view}: the cache has views 0 to {cache.num_views - 1}")
    return cache


def _join(cache: Cache, transfer_set: TransferSet, config: TrainConfig) -> Joined:
    return cache.join(
        transfer_set,
        by=config.join,  # type: ignore[arg-type]
        labels=config.labels,  # type: ignore[arg-type]
        check_content=config.check_content,  # type: ignore[arg-type]
    )


def _check_labels(terms: Sequence[LossTerm], transfer_set: TransferSet) -> int:
    """How many samples are labelled; LossError when a hard-label term has none at all."""
    labels = transfer_set.labels
    labelled = len(labels) if transfer_set.multi_label else int((labels >= 0).sum())
    for term in terms:
        if term.loss.target == "labels" and term.weight and not labelled:
            raise LossError(
                f"loss {term.name!r} needs labels, and no sample of {transfer_set.name} has one",
                tip="leave the term out: soft targets need no labels",
            )
    return labelled


def _policy(config: TrainConfig, cache: Cache | None) -> Policy:
    """What the student sees: the cache's own views, at its own size if asked; or others, which the targets do not fit."""
    if cache is None or config.augment:
        return Policy.parse(config.augment or config.policy, config.view_seed)
    return cache.policy if config.size is None else cache.policy.at_size(config.size)


def _labels(transfer_set: TransferSet, partners: Partners, batch: LoadedBatch, device: torch.device) -> Labels:
    def on_device(labels: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(labels).to(device)
        return tensor if tensor.ndim == 2 else tensor.long()

    own = on_device(transfer_set.labels[batch.index])
    if batch.partner_rows is None or batch.shares is None:
        return Labels(own)
    others = partners.transfer_set.labels[partners.index_of_row[batch.partner_rows]]
    return Labels(own, on_device(others), torch.from_numpy(batch.shares).to(device))


def _views_of(epoch: int, cache: Cache | None, config: TrainConfig) -> tuple[int, int]:
    """The student's view and the targets': with a cache e mod V, or the pinned one; of the student's own a fresh one."""
    if cache is None:
        return epoch, epoch
    target_view = config.view if config.view is not None else epoch % cache.num_views
    return epoch if config.augment else target_view, target_view


def _check_views(joined: Joined, viewed: ViewedSet, config: TrainConfig) -> str | None:
    """Some records, spread over samples and views, must render to the pixels the teacher saw; a rounding is told once."""
    cache, count = joined.cache, len(joined)
    index_of_row = Partners.of(viewed.transfer_set, joined.rows, len(cache)).index_of_row

    def render(row: int, view: int) -> Any:
        index = int(index_of_row[row])
        return None if index < 0 else viewed.render(index, view)[0]

    index = np.unique(np.linspace(0, count - 1, min(SPREAD, count)).astype(np.int64))
    views = np.arange(len(index), dtype=np.int64) % cache.num_views
    items = [viewed.render(int(i), int(v))[0] for i, v in zip(index, views, strict=True)]
    drift = cache.check_pixels(items, joined.rows[index].astype(np.int64), views, render, on_drift=config.on_drift)
    if drift is None:
        return None
    print(f"softcache: warning: {drift}; the run records it", file=sys.stderr)
    return str(drift)


def _check_finite(loss: Tensor, epoch: int, step: int) -> None:
    if not bool(loss.isfinite()):
        raise TrainingError(
            f"the loss is not finite in epoch {epoch}, step {step}",
            tip="lower --lr, add --warmup-epochs, or use --autocast bf16 instead of fp16",
        )


def _bar(loaded: Any, epoch: int, epochs: int, first: int, steps: int, quiet: bool) -> Any:
    return tqdm(
        loaded,
        total=steps,
        initial=first,
        desc=f"epoch {epoch + 1}/{epochs}",
        unit="step",
        disable=quiet or None,
        leave=False,
        file=sys.stderr,
    )

"""The training recipe: cache + transfer set -> student. Read it top to bottom.

    cache + transfer set -> join -> loader of items -> one gather of the batch's targets -> device -> decode -> losses -> step

Without a cache the same recipe trains on hard labels: that is how teachers and baselines are made. Under torchrun every
process computes its share of each batch, and the first one evaluates and writes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from softcache.config import TrainConfig
from softcache.data.loading import epoch_order, load_batches, to_device
from softcache.data.selection import class_order
from softcache.errors import ConfigError, MissingExtraError, TrainingError
from softcache.evaluate.measure import Evaluation, evaluate, item_shape
from softcache.files.durable import require_room
from softcache.losses.schedules import Moment
from softcache.machine import autocast_dtype, pick_device, pick_threads, pick_workers
from softcache.models import Model, build_vocabulary, load_model, load_weights, save_student
from softcache.models.initialise import Initialised, initialise, reorder_classes
from softcache.report.progress import Progress
from softcache.train.batches import Material, open_material, views_of, visits
from softcache.train.checkpoint import Trained, bytes_of, read_progress, restore, save_progress
from softcache.train.learner import Learner, build_objectives, freeze_for, make_optimizer, over_ranks
from softcache.train.objective import Given, Objective
from softcache.train.pairs import Student, StudentTaps
from softcache.train.ranks import Ranks, joined_ranks
from softcache.train.run_folder import (
    BEST,
    STUDENT,
    TENSORBOARD,
    check_same_data,
    claim_folder,
    data_fingerprint,
    describe_run,
    locked,
    write_metrics,
)
from softcache.train.stages import Stage, parse_stages, train_mode
from softcache.train.term_modules import Sizes
from softcache.version import __version__


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
    _check(config)
    stages = parse_stages(config)  # before the folder: a mistake is told as such, not as another run's setting
    out = claim_folder(config)
    device = pick_device(config.device)
    with joined_ranks(device) as ranks:
        ranks.everyone(out)  # nobody writes before all have looked
        with locked(out) if ranks.first else nullcontext():
            return _train(config, stages, out, device, ranks, quiet=quiet or not ranks.first)


def _train(
    config: TrainConfig, stages: Sequence[Stage], out: Path, device: torch.device, ranks: Ranks, *, quiet: bool
) -> TrainResult:
    torch.set_num_threads(pick_threads(config.threads))
    workers, autocast = pick_workers(config.workers, device), autocast_dtype(config.autocast)

    terms = [term for stage in stages for term in stage.terms]
    material = open_material(config, terms, out)
    transfer_set, eval_set = material.transfer_set, material.eval_set
    count, steps = len(transfer_set), -(-len(transfer_set) // config.batch_size)
    _check_last_batch(count, config.batch_size, ranks)

    torch.manual_seed(config.seed)
    item = material.viewed().render(0, 0)
    model = load_model(
        config.student,
        num_classes=transfer_set.num_classes,
        class_names=transfer_set.class_names,
        input_shape=item_shape(item),
        vocabulary=build_vocabulary(transfer_set.load(i)[0] for i in range(count)) if isinstance(item, str) else None,
    )
    sample = model.input.collate([item, item])
    outputs = _data_order(model, transfer_set.class_names)
    if outputs is not None:
        reorder_classes(model, outputs, transfer_set.class_names, sample)
    initialised = initialise(model, config.init_from, config.init_map) if config.init_from else None
    labels = torch.from_numpy(transfer_set.labels)
    single = labels.long() if labels.ndim == 1 else torch.full((count,), -1)
    sizes = Sizes(count, transfer_set.num_classes, single, config.seed)
    objectives, student = build_objectives(stages, model, sample, material.teacher, sizes, ranks)
    fixed = [name for name, parameter in model.net.named_parameters() if not parameter.requires_grad]
    if config.sync_bn:
        if device.type != "cuda":
            raise ConfigError(f"--sync-bn works on GPUs, this is {device.type}", tip="leave it out")
        model.net = nn.SyncBatchNorm.convert_sync_batchnorm(model.net)
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    parts = nn.ModuleList(dict.fromkeys(part for objective in objectives for part in objective.parts)).to(device)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema)) if config.ema is not None else None
    # whose weights are evaluated and saved
    kept: Model = model if average is None else average.module  # type: ignore[assignment]
    seen = material.policy.for_evaluation()
    measure = partial(evaluate, kept, policy=seen, device=device, workers=workers, autocast=autocast)

    # a rehearsal of every stage: what does not fit is refused before anything is learned or written
    few = material.few(model.input.collate, views_of(0, material.cache, config)[0])
    for stage, objective in zip(stages, objectives, strict=True):
        freeze_for(stage, model, objective, fixed)
        batch = material.batch(few, config, objective.feature_names, device)
        given = Given(batch.labels, batch.targets, batch.samples, batch.sample_ids, 0, (len(few.index),) * ranks.size)
        last = Moment(stage.config.epochs - 1, steps - 1, steps, stage.config.epochs)
        with _tapped(student, objective) as taps:
            learner = Learner(model, objective, taps, autocast=autocast)
            learner.rehearse(batch.inputs, given, [Moment(0, 0, steps, stage.config.epochs), last])

    data = data_fingerprint(material.sample_ids, transfer_set.labels, getattr(model.input, "vocabulary", ()))
    check_same_data(out, data)
    progress, saved = read_progress(out, ranks)
    metrics, evaluation = progress.metrics, None
    if ranks.first:
        require_room(out, bytes_of(model, parts, average, config), "checkpoints and student weights")
        describe_run(out, config, stages, _facts(config, material, data, initialised))
    if ranks.size > 1:
        torch.manual_seed(config.seed + 1_000_003 * ranks.rank)  # dropout of its own on every rank
    board = _board(out, len(metrics)) if config.tensorboard and ranks.first else None
    viewed = material.viewed([model.input.collate])
    all_steps = steps * sum(stage.config.epochs for stage in stages)
    begun = steps * len(metrics) + progress.step
    shown = Progress(f"train {out}", all_steps, unit="step", done=begun, quiet=quiet)

    for number, (stage, objective) in enumerate(zip(stages, objectives, strict=True)):
        if number < progress.stage:
            continue
        settings = stage.config
        learned = freeze_for(stage, model, objective, fixed)
        trained = Trained(
            model.net,
            parts,
            make_optimizer(learned, settings),
            torch.amp.GradScaler(device.type, enabled=config.autocast == "fp16"),
            average,
        )
        if saved and number == progress.stage:
            restore(out, trained, saved, ranks)
        if number > progress.stage:
            progress.stage, progress.epoch, progress.step, progress.sums = number, 0, 0, {}
        optimizer, scaler = trained.optimizer, trained.scaler
        with _tapped(student, objective) as taps:
            learner = Learner(model, objective, taps, autocast=autocast, compiled=config.compile)
            shared = over_ranks(learner, ranks, device, to_device(sample, device))

            for epoch in range(progress.epoch, settings.epochs):
                train_mode(model.net)
                parts.train()
                sums, first_step = progress.sums, progress.step
                views = views_of(len(metrics), material.cache, config)
                order = epoch_order(count, config.seed, len(metrics))
                pairs = visits(order, views, config.batch_size, ranks, start=first_step)
                loaded = load_batches(viewed, pairs, workers=workers, pin_memory=device.type == "cuda")
                started = time.monotonic()
                for step, loaded_batch in enumerate(shown.over(loaded), start=first_step):
                    moment = Moment(epoch, step, steps, settings.epochs)
                    for group in optimizer.param_groups:
                        group["lr"] = stage.rate(moment)
                    batch = material.batch(loaded_batch, config, objective.feature_names, device)
                    total = min(config.batch_size, count - step * config.batch_size)
                    number_of_step = len(metrics) * steps + step
                    divided = batch.parts(
                        total, config.accumulate, number_of_step, ranks, over_labels=objective.over_labels
                    )
                    optimizer.zero_grad(set_to_none=True)
                    for name, value in _backward(shared, objective, list(divided), scaler, moment).items():
                        sums[name] = sums.get(name, 0.0) + value  # stays on the device: no wait for it
                    if config.clip_norm is not None:
                        scaler.unscale_(optimizer)
                        nn.utils.clip_grad_norm_(learned, config.clip_norm)
                    scaler.step(optimizer)
                    scaler.update()
                    if average is not None:
                        average.update_parameters(model)

                    if step % 20 == 0 or step == steps - 1:
                        _check_finite(sums["loss"], len(metrics), step)
                        shown.note(f"epoch {len(metrics) + 1}, loss {sums['loss'].item() / (step + 1):.4f}")
                    if config.checkpoint_every and (step + 1) % config.checkpoint_every == 0 and step + 1 < steps:
                        progress.epoch, progress.step, progress.sums = epoch, step + 1, sums
                        save_progress(out, trained, progress, ranks)

                row: dict[str, Any] = {"epoch": len(metrics)} | ({"stage": number} if len(stages) > 1 else {})
                row["lr"] = optimizer.param_groups[0]["lr"]
                row |= {"view": views[0], **objective.scalars(moment)}
                row |= {name: ranks.total(value).item() / ranks.size / steps for name, value in sums.items()}
                due = (len(metrics) + 1) % config.eval_every == 0 or epoch + 1 == settings.epochs
                if eval_set is not None and due:
                    evaluation = ranks.agree(measure(eval_set) if ranks.first else None)
                    row |= {"eval_top1": evaluation.top1, "eval_nll": evaluation.nll, "eval_errors": evaluation.errors}
                row["seconds"] = round(time.monotonic() - started, 3)
                is_best = "eval_top1" in row and all(
                    (row["eval_top1"] or 0) > (past.get("eval_top1") or 0) for past in metrics
                )
                metrics.append(row)
                ended = "eval_top1" in row and _is_stale(metrics, settings.patience, number)
                progress.epoch, progress.step, progress.sums = settings.epochs if ended else epoch + 1, 0, {}
                if ranks.first:
                    write_metrics(out, metrics)  # before the checkpoint: a run killed in between does this epoch again
                    if is_best and config.keep == "best":
                        save_student(kept, out / BEST, metadata=_metadata(material))
                    if board is not None:
                        _note(board, row)
                save_progress(out, trained, progress, ranks)
                if ended:
                    break

    shown.close()
    if config.keep == "best":
        load_weights(kept, str(out / BEST))
    if ranks.first:
        if eval_set is not None and (evaluation is None or config.keep == "best"):
            evaluation = measure(eval_set)
        save_student(kept, out / STUDENT, metadata=_metadata(material))
    if board is not None:
        board.close()
    return TrainResult(out, metrics, evaluation, sum(p.numel() for p in model.net.parameters()))


def _tapped(student: Student | None, objective: Objective) -> AbstractContextManager[StudentTaps | None]:
    """What an objective needs of the student's layers, while it is entered."""
    return nullcontext() if student is None or not objective.pairs else StudentTaps(student, objective.pairs)


def _backward(
    learner: nn.Module,
    objective: Objective,
    parts: Sequence[tuple[Any, Given]],
    scaler: torch.amp.GradScaler,
    moment: Moment,
) -> dict[str, Tensor]:
    """Add up the gradients of a batch, part by part; the value of each term, and of their sum, on this rank."""
    values: dict[str, Tensor] = {}
    for number, (inputs, given) in enumerate(parts, start=1):
        # gradients go over the ranks once, with the last part
        alone = number < len(parts) and isinstance(learner, DistributedDataParallel)
        with learner.no_sync() if alone else nullcontext():  # type: ignore[operator]
            found = learner(inputs, given, moment)
            loss = objective.total(found, moment)
            scaler.scale(loss).backward()
        for name, value in {**found, "loss": loss}.items():
            values[name] = values.get(name, 0.0) + value.detach().double()
    return values


def _check(config: TrainConfig) -> None:
    """Refuse numbers and combinations that cannot be; what may differ between stages is checked with them."""
    for name in ("batch_size", "accumulate", "views_per_visit", "eval_every"):
        if getattr(config, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least 1")
    if not 0 <= config.seed < 2**32:
        raise ConfigError(f"--seed {config.seed}: must be between 0 and 4294967295")
    if config.checkpoint_every is not None and config.checkpoint_every < 1:
        raise ConfigError(f"--checkpoint-every {config.checkpoint_every}: must be at least 1")
    if config.clip_norm is not None and not config.clip_norm > 0:
        raise ConfigError(f"--clip-norm {config.clip_norm}: must be > 0")
    if config.ema is not None and not 0 < config.ema < 1:
        raise ConfigError(f"--ema {config.ema}: must be between 0 and 1", tip="0.999 averages about a thousand steps")
    if config.keep == "best" and not config.eval_data:
        raise ConfigError("--keep best needs --eval-data", tip="add it, or leave --keep out")
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
    if config.view is not None and config.views_per_visit > 1:
        raise ConfigError("--view and --views-per-visit cannot be given together")
    if config.init_map and not config.init_from:
        raise ConfigError("--init-map needs --init-from", tip="--init-from MODEL@WEIGHTS, or a run folder")
    if config.tensorboard:
        _summary_writer()


def _data_order(model: Model, class_names: Sequence[str]) -> list[int] | None:
    """The student's outputs in the data's order, where it knows the same classes in another; None: as they are."""
    declared = model.declared_classes
    known = declared is not None and set(declared) == set(class_names)
    return class_order(model.spec, declared, class_names) if known else None


def _check_last_batch(count: int, batch_size: int, ranks: Ranks) -> None:
    def last(size: int) -> int:
        return count % size or size

    if last(batch_size) < ranks.size:
        better = next((size for size in range(batch_size + 1, count + 1) if last(size) >= ranks.size), None)
        raise ConfigError(
            f"the last of {count} samples in batches of {batch_size} are {last(batch_size)}, fewer than the {ranks.size} "
            "processes",
            tip=f"choose another --batch-size, such as {better}" if better else "start fewer processes",
        )


def _facts(config: TrainConfig, material: Material, data: str, initialised: Initialised | None) -> dict[str, Any]:
    """What a run records of its data."""
    cached = material.cache is not None
    return {
        "cache": material.cache.id if material.cache is not None else None,
        "data": data,
        "targets": ("mismatched" if config.augment else "matched") if cached else None,
        "drift": material.drift,
        "initialised": None if initialised is None else initialised.text(),
        "samples": len(material.transfer_set),
        "labelled": material.labelled,
        "labels_changed": material.joined.labels_changed if material.joined is not None else 0,
    }


def _metadata(material: Material) -> dict[str, str]:
    return {
        "softcache_policy": json.dumps(material.policy.to_json()),
        "softcache_cache": material.cache.id if material.cache is not None else "",
        "softcache_version": __version__,
    }


def _is_stale(metrics: list[dict[str, Any]], patience: int | None, stage: int) -> bool:
    """Whether the best evaluation of a stage is `patience` epochs old."""
    if patience is None:
        return False
    scores = [row.get("eval_top1") or 0.0 for row in metrics if row.get("stage", 0) == stage]
    return len(scores) - 1 - scores.index(max(scores)) >= patience


def _board(out: Path, epochs: int) -> Any:
    """Where TensorBoard finds the metrics; epochs from `epochs` on are written anew."""
    return _summary_writer()(str(out / TENSORBOARD), purge_step=epochs)


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtraError(
            "--tensorboard needs the package tensorboard", tip="pip install 'softcache[tensorboard]'"
        ) from None
    return SummaryWriter


def _note(board: Any, row: dict[str, Any]) -> None:
    for name, value in row.items():
        if name != "epoch" and isinstance(value, int | float):
            board.add_scalar(name, value, row["epoch"])
    board.flush()


def _check_finite(loss: Tensor, epoch: int, step: int) -> None:
    if not bool(loss.isfinite()):
        raise TrainingError(
            f"the loss is not finite in epoch {epoch}, step {step}",
            tip="lower --lr, add --clip-norm 1, warm up (--schedule 'warmup(5, cosine)'), or use bf16 instead of fp16",
        )

"""The training flow: cache + transfer set -> student. Read it top to bottom.

    cache + transfer set -> join -> loader of items -> one gather of the batch's targets -> device -> decode -> losses -> step

Without a cache the same flow trains on hard labels: that is how teachers and baselines are made. Under torchrun every
process computes its share of each batch, and the first one evaluates and writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor, nn

from softcache.config import TrainConfig
from softcache.data.class_counts import counted_labels
from softcache.data.loading import LoadedBatch, to_device
from softcache.errors import warn
from softcache.files.durable import require_room
from softcache.losses.schedules import Moment
from softcache.machine import as_fresh, pick_device
from softcache.models import load_weights, save_student
from softcache.train.checkpoint import (
    Trained,
    read_progress,
    restore,
    save_progress,
)
from softcache.train.learner import Learner, backward, over_ranks, tapped
from softcache.train.metrics import best_epoch, epoch_row, is_stale, kept_student, score_of
from softcache.train.more_epochs import as_in_the_longer, claimed
from softcache.train.optimizer import freeze_for, make_optimizer, train_mode
from softcache.train.preparation import prepare, rehearse
from softcache.train.ranks import ALONE, Ranks, joined_ranks
from softcache.train.refuse import check, check_finite
from softcache.train.run_folder import (
    BEST,
    STUDENT,
    check_same_data,
    data_fingerprint,
    describe_run,
    only_writer,
    write_metrics,
)
from softcache.train.session import LiveStage, Prepared, Session, TrainResult, bytes_of, epoch_batches, evaluated
from softcache.train.stop import Asked, Stop, told_where_it_stands
from softcache.train.tensorboard import Board


@as_fresh()
def run(config: TrainConfig, *, quiet: bool = False) -> TrainResult:
    """Train a student; resumes a run that was interrupted, and returns a finished one as it is.

    What does not fit is refused before the first step. Torch's settings and random states are afterwards as they were.

    Args:
        config: what `softcache train` has as flags.
        quiet: no progress on stderr.

    Raises:
        ConfigError, DataError, ModelError, CacheError: settings, data, student or cache that cannot be used.
        JoinError, DriftError: data that is not what the teacher saw.
        LossError: a term that cannot be, or that the cache cannot serve.
        TrainingError: a loss that is not finite, or a run folder of another run.
        LockedError: another process trains in this folder.

    Example:
        >>> from softcache import train
        >>> from softcache.config import TrainConfig
        >>> config = TrainConfig(
        ...     cache="caches/a", data="synthetic:images?count=64", student="softcache:mlp?hidden=8", epochs=1,
        ...     loss=("kd:temperature=4,weight=0.9", "ce:weight=0.1"), out="runs/student",
        ... )
        >>> result = train.run(config, quiet=True)
        >>> sorted(result.metrics[0])
        ['ce', 'epoch', 'kd', 'loss', 'lr', 'seconds', 'view']
    """
    check(config)
    config = claimed(config)
    out, device = Path(config.out), pick_device(config.device)
    with told_where_it_stands(out), joined_ranks(device) as ranks, only_writer(out, ranks):
        return learn(config, ranks, quiet=quiet or not ranks.first)


def learn(config: TrainConfig, ranks: Ranks = ALONE, *, quiet: bool = True) -> TrainResult:
    """The whole of a run in a folder that is ours, from its beginning or from where it stopped."""
    prepared = prepare(config, ranks, quiet=quiet)
    session = begin(prepared, rehearse(prepared))
    with session.meter, closing(session.batches), session.stop:
        for live in stages_to_do(session):
            while session.progress.epoch < live.stage.config.epochs:
                try:
                    one_epoch(session, live)
                except Asked:
                    save_progress(prepared.out, live.trained, session.progress, ranks)
                    session.stop.leave(f"{prepared.out} is saved {session.place}: the same command goes on from there")
    return finish(session)


def begin(prepared: Prepared, told: Sequence[str] = ()) -> Session:
    """Look where an earlier start of this run stopped, and write down what the run is.

    Args:
        told: what is said before the first step, and recorded.
    """
    material, ranks = prepared.material, prepared.ranks
    vocabulary = getattr(prepared.model.input, "vocabulary", ())
    data = data_fingerprint(material.sample_ids, counted_labels(material.transfer_set), vocabulary)
    weights = [one.class_weights for one in prepared.objectives]
    weights = weights if any(weights) else []
    check_same_data(prepared.out, data, weights)
    session = Session(prepared, *read_progress(prepared.out, ranks), stop=Stop(ranks))
    as_in_the_longer(session.progress, prepared)
    if ranks.first:
        require_room(prepared.out, bytes_of(prepared), "checkpoints and student need")
        published = prepared.model.weights_told
        starts = [f"{prepared.config.student}: {published}"] if published else []
        starts += [] if prepared.initialised is None else [prepared.initialised.text()]
        initialised = "; ".join(starts) or None
        facts = material.facts(prepared.config, data, initialised)
        for line in told:
            warn(line)
        facts |= {"warnings": list(told)} | ({"class_weights": weights} if weights else {})
        facts |= material.left_out(prepared.model.input, quiet=prepared.quiet)
        describe_run(prepared.out, prepared.config, prepared.stages, facts)
        session.board = Board(prepared.out, len(session.progress.metrics)) if prepared.config.tensorboard else None
    if ranks.size > 1:
        torch.manual_seed(prepared.config.seed + 1_000_003 * ranks.rank)  # dropout of its own on every rank
    return session


def stages_to_do(session: Session) -> Iterator[LiveStage]:
    """The stages that are not finished, each ready for its next epoch or step."""
    prepared, progress = session.prepared, session.progress
    config, model, device = prepared.config, prepared.model, prepared.device
    for number, (stage, objective) in enumerate(zip(prepared.stages, prepared.objectives, strict=True)):
        if prepared.quantising is not None:
            prepared.quantising.begin(number, prepared.both)
        if number < progress.stage:
            continue
        learned = freeze_for(stage, model, objective, prepared.fixed)
        scaler = torch.amp.GradScaler(device.type, enabled=config.autocast == "fp16")
        optimizer = make_optimizer(learned, stage.config)
        trained = Trained(model.net, prepared.term_modules, optimizer, scaler, prepared.average, prepared.masks)
        if session.saved and number == progress.stage:
            restore(prepared.out, trained, session.saved, prepared.ranks)
        if number > progress.stage:
            progress.stage, progress.epoch, progress.step, progress.sums = number, 0, 0, {}
        with tapped(prepared.student, objective) as taps:
            learner = Learner(model, objective, taps, autocast=prepared.autocast, compiled=config.compile)
            whole = over_ranks(learner, prepared.ranks, device, to_device(prepared.sample, device))
            yield LiveStage(number, stage, objective, whole, trained, learned)


def one_epoch(session: Session, live: LiveStage, *, step: Callable[..., dict[str, Tensor]] | None = None) -> None:
    """The rest of an epoch, step by step (`one_step`, or another in its place), and what is due at its end."""
    prepared, progress, stop = session.prepared, session.progress, session.stop
    steps, every, started = prepared.steps, prepared.config.checkpoint_every, time.monotonic()
    train_mode(prepared.model.net)
    prepared.term_modules.train()
    if prepared.quantising is not None:
        prepared.quantising.observe(prepared.model, live.number)
    with stop.opened(prepared.ranks.size == 1):
        for loaded, moment, number in epoch_batches(session, live):
            with stop.held():
                for name, value in (step or one_step)(prepared, live, loaded, moment, number).items():
                    progress.sums[name] = progress.sums.get(name, 0.0) + value  # stays on the device: no wait for it
                done = progress.step = moment.step + 1
            look = done % 20 == 1 or done == steps  # not at each step: the host would wait for a GPU
            if look:
                check_finite(progress.sums["loss"], len(progress.metrics), moment.step, prepared.material.transfer_set)
                session.meter.note(f"epoch {len(progress.metrics) + 1}, loss {progress.sums['loss'].item() / done:.4f}")
            session.meter.add()
            if every and done % every == 0 and done < steps:
                with stop.held():
                    save_progress(prepared.out, live.trained, progress, prepared.ranks)
            if look or prepared.device.type == "cpu":
                stop.together()
    if prepared.quantising is not None:
        prepared.quantising.rest(prepared.model)
    end_epoch(session, live, started)


def one_step(
    prepared: Prepared, live: LiveStage, loaded: LoadedBatch, moment: Moment, number: int
) -> dict[str, Tensor]:
    """One optimiser step on a global batch, the run's `number`th: each term's value and their sum on this rank, on its device."""
    config, trained, objective, masks = prepared.config, live.trained, live.objective, prepared.masks
    for group in trained.optimizer.param_groups:
        group["lr"] = live.stage.rate(moment)
    if masks is not None and live.stage.pruning is not None:
        live.stage.pruning.before(masks, moment)
    batch = prepared.material.batch(loaded, config, objective.feature_names, prepared.device)
    total = min(config.batch_size, prepared.count - moment.step * config.batch_size)
    pieces = batch.pieces(total, config.accumulate, number, prepared.ranks, over_labels=objective.over_labels)
    trained.optimizer.zero_grad(set_to_none=True)
    values = backward(live.learner, objective, list(pieces), trained.scaler, moment)
    if masks is not None:
        masks.apply_to_gradients()
    if config.clip_norm is not None:
        trained.scaler.unscale_(trained.optimizer)
        nn.utils.clip_grad_norm_(live.learned, config.clip_norm)
    trained.scaler.step(trained.optimizer)
    trained.scaler.update()
    if prepared.average is not None:
        prepared.average.update_parameters(prepared.model)
    if masks is not None:
        masks.apply()
    return values


def end_epoch(session: Session, live: LiveStage, started: float) -> None:
    """Evaluate where that is due, write the epoch's row and the checkpoint; a stage that no longer gains ends here."""
    prepared, progress, ranks = session.prepared, session.progress, session.prepared.ranks
    config, settings, metrics = prepared.config, live.stage.config, progress.metrics
    row = epoch_row(
        prepared, live, progress, Moment(progress.epoch, prepared.steps - 1, prepared.steps, settings.epochs)
    )
    due = (len(metrics) + 1) % config.eval_every == 0 or progress.epoch + 1 == settings.epochs
    if prepared.material.eval_set is not None and due:
        session.evaluation = found = evaluated(session, prepared.material.eval_set)
        row |= found.columns()
    row["seconds"] = round(time.monotonic() - started, 3)
    metrics.append(row)
    ended = score_of(row) is not None and is_stale(metrics, settings.patience, live.number)
    progress.epoch, progress.step, progress.sums = settings.epochs if ended else progress.epoch + 1, 0, {}
    if ranks.first:
        write_metrics(prepared.out, metrics)  # before the checkpoint: a run killed in between does this epoch again
        if config.keep == "best" and best_epoch(metrics) == len(metrics) - 1:
            student = prepared.saved(live.number)
            save_student(student, prepared.out / BEST, metadata=prepared.material.metadata(prepared.model.input))
        if session.board is not None:
            session.board.note(row)
    save_progress(prepared.out, live.trained, progress, ranks)


def finish(session: Session) -> TrainResult:
    """Save the student that is kept, evaluated as it is saved."""
    prepared, eval_set = session.prepared, session.prepared.material.eval_set
    kept = kept_student(prepared.out, session.progress.metrics, prepared.config.keep)
    if prepared.quantising is not None:
        prepared.quantising.fix(prepared.kept)
        session.evaluation = None  # of what learned, and not of what is saved
    if best := kept.path is not None:
        load_weights(prepared.kept, kept.path)
    if prepared.ranks.first:
        if kept.told:
            warn(kept.told)
        if eval_set is not None and (session.evaluation is None or best):
            session.evaluation = prepared.measure(eval_set)
        save_student(prepared.kept, prepared.out / STUDENT, metadata=prepared.material.metadata(prepared.model.input))
    if session.board is not None:
        session.board.close()
    parameters = sum(p.numel() for p in prepared.model.net.parameters())
    return TrainResult(prepared.out, session.progress.metrics, session.evaluation, parameters, kept.epoch)

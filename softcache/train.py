"""The training recipe: cache + transfer set -> student. Read it top to bottom.

    cache + transfer set -> join -> loader of items -> one gather of the batch's targets -> device -> decode -> losses -> step

Without a cache the same recipe trains on hard labels: that is how teachers and baselines are made.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import softcache
from softcache.checkpoint import load_checkpoint, save_checkpoint
from softcache.config import TrainConfig, split_term, to_toml
from softcache.data.join import SPREAD, batches
from softcache.data.loading import ViewedSet, epoch_order, load_batches, to_device
from softcache.data.transfer_set import TransferSet, open_transfer_set
from softcache.data.views import Policy, make_step
from softcache.ensemble import KEEPS_LEVEL, check_rule
from softcache.errors import CacheError, ConfigError, LossError, TrainingError
from softcache.evaluate import Evaluation, check_same_classes, evaluate, item_shape
from softcache.losses import LossTerm, make_term
from softcache.losses.schedules import check_schedule, scheduled
from softcache.machine import autocast_dtype, pick_device, pick_threads, pick_workers
from softcache.models import Model, build_vocabulary, load_model, save_student
from softcache.targets import Cache, Joined, Targets
from softcache.targets import open as open_cache

STUDENT, CHECKPOINT, RUN, CONFIG = "student.safetensors", "checkpoint.pt", "run.json", "config.toml"
METRICS_JSONL, METRICS_CSV = "metrics.jsonl", "metrics.csv"

# settings that may differ between a run and its resume: they do not belong to what is computed
FREE_TO_CHANGE = ("out", "workers", "threads", "device", "checkpoint_every", "download", "read", "check_content")


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
    device = pick_device(config.device)
    torch.set_num_threads(pick_threads(config.threads))
    workers, autocast = pick_workers(config.workers, device), autocast_dtype(config.autocast)
    _check_numbers(config)
    out = _claim_folder(config)

    transfer_set = open_transfer_set(
        config.data,
        download=config.download,
        keep_labels=config.keep_labels,
        drop_labels=config.drop_labels,
        samples=Path(config.samples) if config.samples else None,
    )
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
    viewed = ViewedSet(transfer_set, policy, ())
    item = viewed.render(0, 0)[0]
    if joined is not None:
        _check_views(joined, viewed, config)

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
    viewed = ViewedSet(transfer_set, policy, [model.input.collate])
    count, steps = len(transfer_set), -(-len(transfer_set) // config.batch_size)

    state = _resume(out, model, optimizer, scaler, device)
    metrics: list[dict[str, Any]] = state["metrics"]
    evaluation = None
    _describe_run(out, config, cache, labelled, count, joined)

    for epoch in range(state["epoch"], config.epochs):
        model.train()
        first_step = state["step"] if epoch == state["epoch"] else 0
        sums: dict[str, Any] = state["sums"] if first_step else {}
        order = epoch_order(count, config.seed, epoch)
        view = _view_of(epoch, cache, config)
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
            labels = torch.from_numpy(transfer_set.labels[batch.index]).to(device)
            labels = labels if labels.ndim == 2 else labels.long()
            targets = None
            if joined is not None:
                targets = joined.gather_samples(batch.index, batch.views, members=members).to(device)

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
                _save(out, model, optimizer, scaler, epoch, step + 1, sums, metrics)

        row: dict[str, Any] = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"], "view": view}
        row |= {name: value.item() / steps for name, value in sums.items()}
        if eval_set is not None:
            evaluation = evaluate(
                model, eval_set, policy.for_evaluation(), device=device, workers=workers, autocast=autocast
            )
            row |= {"eval_top1": evaluation.top1, "eval_nll": evaluation.nll, "eval_errors": evaluation.errors}
        row["seconds"] = round(time.monotonic() - started, 3)
        metrics.append(row)
        _write_metrics(out, metrics)  # before the checkpoint: a run killed in between does this epoch again
        _save(out, model, optimizer, scaler, epoch + 1, 0, {}, metrics)

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


def loss_parts(
    terms: Sequence[LossTerm],
    student_logits: Tensor,
    labels: Tensor,
    targets: Targets | None,
    combine: str,
    weights: Mapping[str, float] | None,
    draw_seed: int = 0,
) -> dict[str, Tensor]:
    """The unweighted value of each term on one batch, by the term's name in the run (kd, ce, kd-2, ...)."""
    teachers: dict[tuple[float, str], Tensor] = {}
    parts: dict[str, Tensor] = {}
    for name, term in named_terms(terms):
        if term.loss.target == "labels":
            parts[name] = term(student_logits, labels)
            continue
        assert targets is not None
        asked = (term.temperature, term.loss.link)
        if asked not in teachers:
            teachers[asked] = targets.combined(
                combine, weights=weights, temperature=term.temperature, link=term.loss.link, draw_seed=draw_seed
            )
        parts[name] = term(student_logits, teachers[asked])
    return parts


def total_loss(terms: Sequence[LossTerm], parts: Mapping[str, Tensor]) -> Tensor:
    """The weighted sum of the terms."""
    return torch.stack([term.weight * parts[name] for name, term in named_terms(terms)]).sum()


def named_terms(terms: Sequence[LossTerm]) -> Iterator[tuple[str, LossTerm]]:
    """Each term with a name of its own: a second `kd` is `kd-2`."""
    seen: dict[str, int] = {}
    for term in terms:
        seen[term.name] = number = seen.get(term.name, 0) + 1
        yield (term.name if number == 1 else f"{term.name}-{number}"), term


def parse_terms(texts: Sequence[str], *, has_cache: bool) -> list[LossTerm]:
    """`kd:temperature=4,weight=0.9` strings -> checked terms; by default kd at 4 with a cache, ce without."""
    if not texts:
        texts = ["kd:temperature=4"] if has_cache else ["ce"]
    terms = []
    for text in texts:
        name, values = split_term(text, "--loss")
        term = make_term(name, **values)
        if term.loss.target == "teacher" and not has_cache:
            raise LossError(
                f"loss {name!r} learns from a teacher's logits, and there is no cache",
                tip="add --cache DIR, or train on hard labels with --loss ce",
            )
        terms.append(term)
    return terms


def parse_members(texts: Sequence[str]) -> dict[str, float] | None:
    """`a=0.7`, `b` -> {member: weight}, 1 where none is given; None for all members equally."""
    weights: dict[str, float] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            weights[name] = float(value) if equals else 1.0
        except ValueError:
            raise ConfigError(f"--members {text!r}: {value!r} is not a number") from None
        if weights[name] < 0:
            raise ConfigError(f"--members {text!r}: a weight cannot be negative")
    if weights and not sum(weights.values()):
        raise ConfigError("--members: all weights are zero")
    return weights or None


def check_term(cache: Cache, term: LossTerm, rule: str, weights: Mapping[str, float] | None = None) -> None:
    """Raise LossError when a cache cannot serve a loss term under a combination rule."""
    check_rule(rule)
    chosen = cache.members if weights is None else tuple(weights)
    for name in chosen:
        info = cache.member(name)  # an unknown member is refused here, whatever the term
        if term.loss.target != "teacher":
            continue
        codec = cache.codecs[name]
        if codec.temperatures is not None and term.temperature not in codec.temperatures:
            raise LossError(
                f"codec {codec.name!r} of member {name!r} serves the temperatures {codec.temperatures}, "
                f"{term.name} asks for {term.temperature}"
            )
        has_level = codec.keeps_level and (info.output == "logits" or cache.manifest.plan.samples.multi_label)
        if term.loss.needs_level and not has_level:
            raise LossError(
                f"loss {term.name!r} needs the level of the logits; member {name!r} gave {info.output}, "
                "which do not have one",
                tip="use kd or soft_ce, or dump a teacher that gives logits",
            )
    if term.loss.needs_level and term.loss.link == "softmax" and rule not in KEEPS_LEVEL and len(chosen) > 1:
        raise LossError(
            f"loss {term.name!r} needs the level of the logits, which the rule {rule!r} does not keep",
            tip=f"combine with one of {', '.join(KEEPS_LEVEL)}, or use kd",
        )


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
    if not config.lr > 0:
        raise ConfigError(f"--lr {config.lr}: must be > 0")
    check_schedule(config.schedule)
    if config.cache is not None and config.policy:
        raise ConfigError(
            "--policy and --cache cannot be given together",
            tip="the student sees the cache's own views; leave --policy out",
        )
    for name in ("members", "cache_id", "view"):
        if config.cache is None and getattr(config, name) not in (None, ()):
            raise ConfigError(f"--{name.replace('_', '-')} needs --cache")


def _claim_folder(config: TrainConfig) -> Path:
    """The run folder, refused when it holds another run or foreign files."""
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise TrainingError(f"{out}: is a file", tip="choose another --out")
    if (out / RUN).is_file():
        before = json.loads((out / RUN).read_text())["config"]
        now = json.loads(json.dumps(_comparable(config)))
        changed = [key for key in now if now[key] != before.get(key)]
        if changed:
            listing = "; ".join(f"{key} was {before.get(key)!r}, is now {now[key]!r}" for key in changed[:6])
            raise TrainingError(
                f"{out}: holds a run with other settings: {listing}",
                tip="choose another --out; the same settings resume the run",
            )
    elif out.is_dir() and any(path.name != f"{RUN}.tmp" for path in out.iterdir()):
        raise TrainingError(f"{out}: holds files that are no run", tip="choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    return out


def _open_cache(config: TrainConfig, out: Path) -> Cache | None:
    """The cache to learn from; a run that is resumed stays with the manifest it began with."""
    if config.cache is None:
        return None
    before = json.loads((out / RUN).read_text())["cache"] if (out / RUN).is_file() else None
    try:
        return open_cache(config.cache, id=before or config.cache_id, mode=config.read)  # type: ignore[arg-type]
    except CacheError as exc:
        if before is not None:
            exc.add_note(f"{out} began with cache {before}; another one needs another --out")
        raise


def _comparable(config: TrainConfig) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name not in FREE_TO_CHANGE}


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
    if cache is not None:
        return cache.policy
    return Policy(tuple(make_step(*split_term(step, "--policy")) for step in config.policy), config.view_seed)


def _view_of(epoch: int, cache: Cache | None, config: TrainConfig) -> int:
    """With a cache, epoch e sees view e mod V, or the pinned one; without, a fresh view every epoch."""
    if cache is None:
        return epoch
    return config.view if config.view is not None else epoch % cache.num_views


def _check_views(joined: Joined, viewed: ViewedSet, config: TrainConfig) -> None:
    """Some records, spread over samples and views, must render to the pixels the teacher saw."""
    cache, count = joined.cache, len(joined)
    if config.view is not None and not 0 <= config.view < cache.num_views:
        raise ConfigError(f"--view {config.view}: the cache has views 0 to {cache.num_views - 1}")
    index = np.unique(np.linspace(0, count - 1, min(SPREAD, count)).astype(np.int64))
    views = np.arange(len(index), dtype=np.int64) % cache.num_views
    items = [viewed.render(int(i), int(v))[0] for i, v in zip(index, views, strict=True)]
    cache.check_pixels(items, joined.rows[index].astype(np.int64), views)


def _resume(
    out: Path, model: Model, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, device: torch.device
) -> dict[str, Any]:
    """Where to go on: the checkpoint's state put back, or the beginning."""
    path = out / CHECKPOINT
    if not path.is_file():
        return {"epoch": 0, "step": 0, "sums": {}, "metrics": []}
    state = load_checkpoint(path, device)
    model.net.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    return state


def _save(
    out: Path,
    model: Model,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    epoch: int,
    step: int,
    sums: dict[str, Tensor],
    metrics: list[dict[str, Any]],
) -> None:
    state = {
        "epoch": epoch,
        "step": step,
        "sums": {name: value.cpu() for name, value in sums.items()},
        "metrics": metrics,
        "model": model.net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
    }
    save_checkpoint(out / CHECKPOINT, state)


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


def _describe_run(
    out: Path, config: TrainConfig, cache: Cache | None, labelled: int, count: int, joined: Joined | None
) -> None:
    """run.json and config.toml: what this run is, and the file that repeats it."""
    terms = parse_terms(config.loss, has_cache=cache is not None)
    about = {
        "config": _comparable(config),
        "cache": cache.id if cache is not None else None,
        "targets": "matched" if cache is not None else None,
        "samples": count,
        "labelled": labelled,
        "labels_changed": joined.labels_changed if joined is not None else 0,
        "losses": [{"name": t.name, "weight": t.weight, **t.parameters} for t in terms],
        "softcache": softcache.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": sys.version.split()[0],
    }
    _write_aside(out / RUN, json.dumps(about, indent=1) + "\n")
    _write_aside(out / CONFIG, to_toml(config))


def _write_metrics(out: Path, metrics: Sequence[Mapping[str, Any]]) -> None:
    _write_aside(out / METRICS_JSONL, "".join(json.dumps(row) + "\n" for row in metrics))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(metrics[0]))
    writer.writeheader()
    writer.writerows(metrics)
    _write_aside(out / METRICS_CSV, text.getvalue())


def _write_aside(path: Path, text: str) -> None:
    """After a kill there is the old file or the new one, never a part of it."""
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_bytes(text.encode("utf-8"))
    os.replace(aside, path)

"""How good a model is: accuracy, likelihood, calibration, and how close it comes to a cache's soft targets."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from softcache.config import EvalConfig
from softcache.data.classes import class_indices, dataset_classes, match_classes, places_in, read_classes_map
from softcache.data.join import batches
from softcache.data.loading import Partners, ViewedSet, item_shape, load_batches, spread_items, to_device
from softcache.data.transfer_set import TransferSet, open_transfer_set, under_classes
from softcache.data.views import Policy
from softcache.errors import ConfigError, ModelError, faults_explained, note_once
from softcache.evaluate.bias import best_shift, parse_bias
from softcache.machine import autocast_dtype, pick_device, pick_threads, pick_workers
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
from softcache.report.tables import percent, table
from softcache.targets.cache import Cache, Joined, is_cache
from softcache.targets.cache import open as open_cache

CALIBRATION_BINS = 15
TOO_SMALL = "do the items have the size that it takes? --policy resize:size=N; what its code needs is for it to say"


@dataclass(frozen=True)
class Evaluation:
    """Measured over one data set; shares are of 1, `nll` and `kl` in nats. None where it does not apply.

    Attributes:
        samples, labelled: how many there were.
        top1, top5: share of labelled samples whose label is the largest, or among the five largest. Multi-label data: `top1`
            is the share of single yes/no labels that are right.
        nll: mean negative log-likelihood of the label.
        calibration_error: expected calibration error in 15 equal bins of confidence (Guo et al. 2017).
        agreement: share of samples where the largest class is the cache's.
        kl: mean KL(cache || model) at `temperature`, not scaled by T**2.
        bias: class -> what was added to its logits.
        class_errors: class -> (errors, samples) of those with this label; empty for multi-label data.
    """

    samples: int
    labelled: int
    seconds: float
    top1: float | None = None
    top5: float | None = None
    nll: float | None = None
    calibration_error: float | None = None
    agreement: float | None = None
    kl: float | None = None
    temperature: float = 1.0
    bias: Mapping[str, float] = field(default_factory=dict)
    class_errors: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def errors(self) -> int | None:
        return None if self.top1 is None else round((1 - self.top1) * self.labelled)

    def rows(self) -> list[tuple[str, str]]:
        """(name, value) lines for a table, without what does not apply."""
        facts = [
            ("samples", f"{self.samples:,}"),
            ("with a label", None if self.labelled in (0, self.samples) else f"{self.labelled:,}"),
            ("top-1", None if self.top1 is None else f"{percent(self.top1)} ({self.errors:,} errors)"),
            ("top-5", None if self.top5 is None else percent(self.top5)),
            ("NLL", None if self.nll is None else f"{self.nll:.4f} nats"),
            ("calibration error", None if self.calibration_error is None else percent(self.calibration_error)),
            ("agreement with the cache", None if self.agreement is None else percent(self.agreement)),
            (f"KL to the cache at T={self.temperature:g}", None if self.kl is None else f"{self.kl:.5f} nats"),
            ("bias", ", ".join(f"{name} {value:+g}" for name, value in self.bias.items()) or None),
            ("seconds", f"{self.seconds:.1f}"),
        ]
        return [(name, value) for name, value in facts if value is not None]


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
        bias: class -> what to add to its logits first.
        order: the model's output for each class; None: in the data's order.
    """
    started, was_training = time.monotonic(), model.training
    model.eval()
    count = len(transfer_set)
    sums = Sums(transfer_set.num_classes)
    bias = bias or {}
    added = torch.tensor([bias.get(name, 0.0) for name in transfer_set.class_names], device=device)
    partners = joined.partners if joined is not None else None
    classes = class_indices(_cached_names(joined), transfer_set.class_names) if joined is not None else []
    viewed = ViewedSet(transfer_set, policy, [model.input.collate], partners=partners)
    pairs = batches(np.arange(count), 0, batch_size)
    loaded = load_batches(viewed, pairs, workers=workers, pin_memory=device.type == "cuda")
    for batch in track(loaded, "eval", -(-count // batch_size), unit="batches", quiet=not progress):
        with (
            faults_explained(ModelError, f"the model {model.spec!r}", tip=TOO_SMALL),
            torch.autocast(device.type, dtype=autocast, enabled=autocast is not None),
        ):
            logits = model(to_device(batch.inputs[0], device))
        _check_rows(model, logits, len(batch.index), transfer_set.num_classes if order is None else None)
        _check_finite(logits, batch.index)
        logits = (logits if order is None else logits[:, list(order)]).float() + added
        sums.add_labels(logits, torch.from_numpy(transfer_set.labels[batch.index]).to(device))
        if joined is not None:
            targets = joined.gather_samples(batch.index, batch.views).to(device)
            teacher_logits = targets.combined(combine, temperature=temperature)[:, classes]
            sums.add_targets(logits, teacher_logits, temperature)
    model.train(was_training)
    return _result(sums, transfer_set, started, temperature, bias)


def _check_rows(model: Model, logits: Tensor, count: int, classes: int | None) -> None:
    """ModelError for logits that are not one row a sample, with at least a number for each class."""
    if logits.ndim != 2 or len(logits) != count or (classes is not None and logits.shape[1] != classes):
        raise ModelError(
            f"the model {model.spec!r} gives {tuple(logits.shape)} for {count} samples"
            + (f" of {classes} classes" if classes is not None else ""),
            tip="a model's output must be logits of shape (batch, classes)",
        )


def _cached_names(joined: Joined) -> Sequence[str]:
    """What the joined data calls the cache's classes, in the cache's order."""
    return dataset_classes(joined.dataset) or joined.cache.class_names


def _check_finite(logits: Tensor, index: np.ndarray) -> None:
    bad = int((~logits.isfinite().all(dim=1)).sum())
    if bad:
        raise ModelError(
            f"the model's logits are not finite for {bad} of {len(index)} samples: its weights are not, or its numbers overflow",
            tip="if it was being trained: a lower --lr, or --clip-norm 1; if it computes in a half type: --autocast none",
        )


def evaluate_cache(
    joined: Joined,
    transfer_set: TransferSet,
    *,
    combine: str = "mean_logits",
    batch_size: int = 512,
    bias: Mapping[str, float] | None = None,
    progress: bool = False,
) -> Evaluation:
    """How good the combined soft targets of a cache are, at view 0: its teachers together, without running them.

    Args:
        joined: the samples of `transfer_set` joined to the cache; the labels are the transfer set's.
        bias: class -> what to add to its combined logits first.
    """
    started, bias = time.monotonic(), bias or {}
    sums = Sums(transfer_set.num_classes)
    added = torch.tensor([bias.get(name, 0.0) for name in transfer_set.class_names])
    pieces = np.array_split(np.arange(len(transfer_set)), -(-len(transfer_set) // batch_size))
    for index in track(pieces, "eval", len(pieces), unit="batches", quiet=not progress):
        logits = joined.gather_samples(index, np.zeros_like(index)).combined(combine, temperature=1.0)
        sums.add_labels(logits + added, torch.from_numpy(transfer_set.labels[index]))
    result = _result(sums, transfer_set, started, 1.0, bias)
    if combine == "vote":  # which has no likelihood
        return replace(result, nll=None, calibration_error=None)
    return result


def _result(
    sums: Sums, transfer_set: TransferSet, started: float, temperature: float, bias: Mapping[str, float]
) -> Evaluation:
    rows = [] if sums.multi_label else zip(transfer_set.class_names, sums.of_class.tolist(), strict=True)
    counts = {name: (errors, samples) for name, (errors, samples) in rows}
    result = sums.result(len(transfer_set), time.monotonic() - started, temperature)
    return replace(result, bias=bias, class_errors=counts)


class Sums:
    """Running sums in float64 over the batches of one evaluation."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes, self.multi_label = num_classes, False
        self.labelled = self.top1 = self.top5 = self.nll = self.agreement = self.kl = 0.0
        self.compared = 0
        self.bins = np.zeros((CALIBRATION_BINS, 3))  # count, confidence, correct
        self.of_class = np.zeros((num_classes, 2), np.int64)  # errors, samples

    def add_labels(self, logits: Tensor, labels: Tensor) -> None:
        if labels.ndim == 2:
            self.multi_label = True
            self.labelled += len(labels)
            self.top1 += float(((logits > 0) == labels).double().mean(dim=1).sum())
            losses = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
            self.nll += float(losses.double().mean(dim=1).sum())
            return
        known = labels >= 0
        logits, labels = logits[known], labels[known].long()
        if not len(labels):
            return
        confidence, predicted = logits.softmax(dim=1).max(dim=1)
        correct = predicted == labels
        self.labelled += len(labels)
        self.top1 += float(correct.sum())
        own, wrong = labels.cpu().numpy(), (~correct).cpu().numpy()
        self.of_class[:, 0] += np.bincount(own, wrong, self.num_classes).astype(np.int64)
        self.of_class[:, 1] += np.bincount(own, minlength=self.num_classes)
        if self.num_classes > 5:
            self.top5 += float((logits.topk(5, dim=1).indices == labels[:, None]).any(dim=1).sum())
        self.nll += float(F.cross_entropy(logits, labels, reduction="none").double().sum())
        place = (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1).cpu().numpy()
        for column, values in enumerate((torch.ones_like(confidence), confidence, correct)):
            self.bins[:, column] += np.bincount(place, values.double().cpu().numpy(), minlength=CALIBRATION_BINS)

    def add_targets(self, logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
        self.compared += len(logits)
        self.agreement += float((logits.argmax(dim=1) == teacher_logits.argmax(dim=1)).sum())
        log_p = (teacher_logits.double() / temperature).log_softmax(dim=1)
        log_q = (logits.double() / temperature).log_softmax(dim=1)
        self.kl += float((log_p.exp() * (log_p - log_q)).sum())

    def result(self, samples: int, seconds: float, temperature: float) -> Evaluation:
        n, single = self.labelled, not self.multi_label
        filled = self.bins[:, 0] > 0
        gaps = np.abs(self.bins[filled, 1] - self.bins[filled, 2])
        return Evaluation(
            samples=samples,
            labelled=int(n),
            seconds=seconds,
            top1=self.top1 / n if n else None,
            top5=self.top5 / n if n and single and self.num_classes > 5 else None,
            nll=self.nll / n if n else None,
            calibration_error=float(gaps.sum() / n) if n and single else None,
            agreement=self.agreement / self.compared if self.compared else None,
            kl=self.kl / self.compared if self.compared else None,
            temperature=temperature,
        )


def run(model_text: str, config: EvalConfig, *, quiet: bool = False) -> Evaluation:
    """softcache eval: load a model or a run folder, render the data as the run's students saw it, measure; or a cache.

    A student of some of the data's classes is measured on those: samples of the others count as unlabelled.
    """
    _check(config)
    torch.set_num_threads(pick_threads(config.threads))
    transfer_set = open_transfer_set(config.data, **config.selection())
    classes_map = read_classes_map(config.classes_map)
    if is_cache(model_text, finished=False):
        return _run_cache(model_text, transfer_set, config, classes_map, quiet=quiet)
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
        temperature=config.temperature,
        bias=bias,
        order=_order(model_text, model, transfer_set, classes_map),
        progress=not quiet,
    )


def _open_cache(path: str, config: EvalConfig, *, quiet: bool) -> Cache:
    return open_cache(path, check_files=config.check_files == "yes", allow_code=config.allow_code, quiet=quiet)


def _check(config: EvalConfig) -> None:
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
    own, names = own_classes(model_text), transfer_set.class_names
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
    """The data under the cache's class list, joined to it."""
    cache = _open_cache(path, config, quiet=quiet)
    transfer_set = under_classes(transfer_set, cache.class_names, "the cache", classes_map)
    return cache.join(transfer_set, classes_map=None if transfer_set.class_names == cache.class_names else classes_map)


def _how(config: EvalConfig) -> dict[str, Any]:
    """On what, and in what portions."""
    device = pick_device(config.device)
    return {
        "device": device,
        "batch_size": config.batch_size,
        "workers": pick_workers(config.workers, device),
        "autocast": autocast_dtype(config.autocast),
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
    bias = parse_bias(config.bias, transfer_set.class_names)
    return evaluate_cache(
        joined, transfer_set, combine=config.combine, batch_size=config.batch_size, bias=bias, progress=not quiet
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
    try:
        evaluate(model, held_out, policy, **_how(config))
    finally:
        hook.remove()
    order = _order(model_text, model, held_out, read_classes_map(config.classes_map))
    logits = torch.cat(rows) if order is None else torch.cat(rows)[:, list(order)]
    added = torch.tensor([given.get(name, 0.0) for name in transfer_set.class_names])
    shift = best_shift(logits + added, torch.from_numpy(held_out.labels).long(), classes)
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
    own, names = own_classes(model_text), transfer_set.class_names
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


def summary(title: str, result: Evaluation) -> str:
    """The readable table of one evaluation."""
    return table([title, ""], result.rows())


def class_table(result: Evaluation) -> str:
    """The errors on each class."""
    rows = [
        [name, samples, errors, percent(errors / samples) if samples else "-"]
        for name, (errors, samples) in result.class_errors.items()
    ]
    return table(["class", "samples", "errors", "share"], rows)

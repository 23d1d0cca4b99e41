"""What a trained model is made smaller with: the model itself, and samples that it is run on, with what is known of them."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softcache.config import ShrinkConfig
from softcache.data.classes import read_classes_map
from softcache.data.label_kind import log_soft_target
from softcache.data.loading import ViewedSet, item_shape, spread_items
from softcache.data.transfer_set import TransferSet, open_transfer_set
from softcache.data.views import Policy
from softcache.errors import ConfigError, ModelError, faults_explained
from softcache.evaluate.measure import join_whole, run_policy, teacher_of
from softcache.machine import pick_device, pick_threads
from softcache.models import load_model, read_saved
from softcache.models.item_range import check_scale
from softcache.students.export import of_its_classes, refuse_untrained, weights_of
from softcache.students.samples import Samples
from softcache.targets.cache import Joined
from softcache.targets.cache import open as open_cache

LOOKED_AT = 2048  # samples of a data set, spread over it
TEMPERATURE, DRAWN_AT_ONCE = 4.0, 256  # of the soft targets of which classes are drawn


@dataclass(frozen=True)
class Opened:
    """A model and the data that it is run on.

    Attributes:
        policy: as which the evaluation data are seen; and others, where no cache brings its own.
        eval_set: None without --eval-data.
        samples: of --data, with the model.
        multi_label: whether a sample may have several classes.
    """

    policy: Policy
    eval_set: TransferSet | None
    samples: Samples
    device: torch.device
    multi_label: bool


def open_all(config: ShrinkConfig, *, quiet: bool) -> Opened:
    """Open and check everything that goes in; torch computes on the config's device, threads and seed from then on."""
    if config.batch_size < 1:
        raise ConfigError(f"--batch-size {config.batch_size}: must be at least 1")
    refuse_untrained(config.model)
    device = pick_device(config.device)
    torch.set_num_threads(pick_threads(config.threads))
    torch.manual_seed(config.seed)
    policy = Policy.parse(config.policy, 0) if config.policy else run_policy(config.model).for_evaluation()
    data, eval_set = (
        None if text is None else open_transfer_set(text, download=config.download)
        for text in (config.data, config.eval_data)
    )
    classes_map, joined = read_classes_map(config.classes_map), None
    if config.cache is not None and data is not None:
        cache = open_cache(config.cache, allow_code=config.allow_code, quiet=quiet)
        joined = join_whole(cache, data, (), classes_map)
        data = joined.dataset
    data, eval_set = (one and of_its_classes(one, config.model, classes_map) for one in (data, eval_set))
    samples = _samples(config, data, joined, eval_set, policy, device)
    return Opened(
        policy, eval_set, samples, device, any(one.multi_label for one in (data, eval_set) if one is not None)
    )


def _samples(
    config: ShrinkConfig,
    data: TransferSet | None,
    joined: Joined | None,
    eval_set: TransferSet | None,
    policy: Policy,
    device: torch.device,
) -> Samples:
    """The model, and what it is run on: --data, else an item of --eval-data, else what its file says of one."""
    viewed = None if data is None else _viewed(data, joined, policy)
    shown = viewed or (ViewedSet(eval_set, policy, ()) if eval_set is not None else None)
    known = data if data is not None else eval_set
    if shown is not None and known is not None:
        items = spread_items(shown)
        items = [shown.render(int(_askable(known)[0]), 0), *items[1:]]
        example, num_classes, class_names = items[0], known.num_classes, known.class_names
    else:
        items = []
        example, num_classes, class_names = _made_up(config.model)
    with faults_explained(ModelError, f"building the model {config.model!r}"):
        model = load_model(
            config.model,
            num_classes=num_classes,
            class_names=class_names,
            input_shape=item_shape(example),
            allow_code=config.allow_code,
            device=str(device),
        ).eval()
    model.check_trained(repr(config.model))
    if model.graft is not None:
        raise ModelError(
            f"{config.model}: answers by its teacher's classifier behind a projector, and is not made smaller",
            tip="make the student smaller first, and then train it with simkd",
        )
    if model.shrunk is not None and model.shrunk.quantised:
        raise ModelError(
            f"{config.model}: is quantised already, and of int8 weights nothing more can be cut",
            tip="shrink the model that it was made of, with quantise:int8 as the last --by",
        )
    if items:
        check_scale(model, config.model, items)
    places = spread_over(data)
    render = viewed.render if viewed is not None else (lambda _i, _view: example)
    answers = None if data is None else _answers(data, joined, places, config.seed)
    with faults_explained(ModelError, f"the model {config.model!r} on a sample"):
        made = Samples.of(
            model, config.model, example, len(places), lambda i: render(int(places[i]), 0), config.batch_size
        )
    return replace(made, answers=answers)


def spread_over(data: TransferSet | None) -> np.ndarray:
    """Where the samples lie in the data that are looked at."""
    if data is None:
        return np.zeros(0, np.int64)
    found = _askable(data)
    return found[np.linspace(0, len(found) - 1, min(LOOKED_AT, len(found))).astype(np.int64)]


def _askable(data: TransferSet) -> np.ndarray:
    """Where the samples lie that a model answers about: of words, those that have some."""
    return np.arange(len(data)) if data.positions is None else np.flatnonzero(data.positions.counts)


def _viewed(data: TransferSet, joined: Joined | None, policy: Policy) -> ViewedSet:
    """The data, with a cache as its teacher saw the first view of them."""
    if joined is None:
        return ViewedSet(data, policy, ())
    ids = joined.cache.samples.ids[joined.rows]
    return ViewedSet(data, joined.cache.policy, (), partners=joined.partners, ids=ids)


def _answers(data: TransferSet, joined: Joined | None, places: np.ndarray, seed: int) -> Tensor | None:
    """What each sample is: its label, or with a cache a class drawn from its soft target; None where nobody knows any.

    None for words too, of which a sample has several.
    """
    if data.positions is not None:
        return None
    if joined is None:
        labels = torch.from_numpy(np.array(data.labels[places], dtype=np.int64))
        return labels if bool((labels >= 0).any()) else None
    teacher, draw, drawn = teacher_of(joined, data), torch.Generator().manual_seed(seed), []
    for at in np.array_split(places, -(-len(places) // DRAWN_AT_ONCE)):
        targets = joined.gather_samples(at, np.zeros_like(at), members=teacher.members)
        logits = teacher.logits(targets, TEMPERATURE).float()
        chances = log_soft_target(logits, TEMPERATURE, multi_label=data.multi_label).exp()
        one_of = (
            torch.bernoulli if data.multi_label else lambda p, generator: p.multinomial(1, generator=generator)[:, 0]
        )
        drawn.append(one_of(chances, generator=draw).long())
    return torch.cat(drawn)


def _made_up(model_text: str) -> tuple[Any, int, tuple[str, ...]]:
    """An item of the shape that a run's file tells, and its classes."""
    weights = weights_of(model_text)
    saved = read_saved(weights) if os.path.exists(weights) else None
    if saved is None or (saved.input_shape is None and saved.input["kind"] not in ("text", "tokenizer")):
        raise ConfigError(
            f"{model_text}: says nothing of the items that it takes", tip="--data DATA: some samples to run it on"
        )
    if saved.input_shape is None:
        return "a text of some words", saved.num_classes, saved.class_names
    pixels = np.random.default_rng(0).integers(0, 256, saved.input_shape, dtype=np.uint8)
    is_tensor = len(saved.input_shape) == 3 and saved.input_shape[0] < saved.input_shape[-1]
    return (torch.from_numpy(pixels) if is_tensor else pixels), saved.num_classes, saved.class_names

"""All steps of a recipe, checked before the first is done: what a later one would refuse after hours is refused now."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from softcache.config import DumpConfig, EvalConfig, ShrinkConfig, TrainConfig, resolve
from softcache.data.classes import class_indices
from softcache.data.loading import ViewedSet, item_shape
from softcache.data.transfer_set import TransferSet
from softcache.data.views import Policy
from softcache.dump.features_for import check_names
from softcache.dump.job import new_job
from softcache.dump.layout import asked_codec, promise_of
from softcache.errors import ConfigError, DataError, ModelError, faults_explained, nearest
from softcache.evaluate import measure
from softcache.evaluate.bias import parse_bias
from softcache.models import Model, build_vocabulary, load_model, own_classes, split_weights
from softcache.models.class_names import gives_classes
from softcache.models.inputs import has_vocabulary
from softcache.reproduce.recipe import DATA, STUDENT, Recipe, Step
from softcache.reproduce.steps import Bench, Data, settings_of
from softcache.spec import parse_spec
from softcache.students import shrink
from softcache.students.low_rank import SavesNothing
from softcache.students.samples import Samples
from softcache.targets.ensemble import parse_members
from softcache.train import refuse
from softcache.train.optimizer import freeze
from softcache.train.stages import parse_stages
from softcache.train.student import try_student


@dataclass(frozen=True)
class Tried:
    """What a step that was checked would leave, on random weights.

    Attributes:
        model: a network; whoever changes it takes a copy.
        item: one that it takes.
        views: what its items went through.
    """

    model: Model
    item: Any
    views: Policy


KINDS: dict[str, type[Any]] = {"train": TrainConfig, "dump": DumpConfig, "shrink": ShrinkConfig, "eval": EvalConfig}


def check_step(step: Step, seeds: Sequence[int], bench: Bench, tried: dict[str, Tried]) -> None:
    """Refuse what its verb would refuse: settings, contradictions, data, classes, students, and losses that its cache lacks.

    Args:
        tried: of the steps before it, by name, those whose models others learn with or make smaller; its own is added.

    Raises:
        SoftcacheError: as the verb raises it.
    """
    settings = {key: value for key, value in step.settings.items() if key not in ("run", "bias_model")}
    kind = KINDS[step.kind]
    config = resolve(kind, flags=settings if step.kind == "eval" else {**settings, "out": "."}).config
    data = {key: bench.data_of(_spec(getattr(config, key), bench)) for key in DATA if getattr(config, key, None)}
    if step.kind == "shrink":
        _check_shrink(step, config, data, bench, tried)
        return
    some = data["data"].some
    for key in ("keep_labels", "drop_labels", "classes", "fit_bias"):
        class_indices(some.class_names, getattr(config, key, ()))
    if step.kind == "dump":
        _check_dump(config, some, bench.recipe)
        return
    if step.kind == "eval":
        measure.check(config)
        Policy.parse(config.policy, 0)
        parse_bias(config.bias, some.class_names)
    else:
        for seed in seeds if step.seeded else (config.seed,):
            refuse.check(replace(config, seed=seed))
        _check_train(step, config, some, bench, tried)
    judged = data.get("eval_data" if step.kind == "train" else "data")
    if judged is not None:
        _check_judged(step, judged.some, judged.labelled)


def _spec(name: str, bench: Bench) -> str:
    return bench.specs.get(name, name)


def _check_judged(step: Step, data: TransferSet, labelled: int) -> None:
    """The row of a step can be counted on what it is judged by."""
    if not labelled:
        raise ConfigError(
            f"{data.name} has no labels, so that nothing can be counted", tip="evaluate on data with labels"
        )
    if step.metric == "class_errors":
        class_indices(data.class_names, [step.of_class])


def _check_dump(config: DumpConfig, data: TransferSet, recipe: Recipe) -> None:
    new_job(config, data)
    promise = promise_of(config, multi_label=data.multi_label)
    if config.codec is not None:
        asked_codec(config.codec, data.num_classes, promise)
    check_names(config.for_)
    steps = {step.name for step in recipe.steps}
    for text in config.teacher:
        if text not in steps:
            parse_spec(split_weights(text)[0])


def _check_shrink(
    step: Step, config: ShrinkConfig, data: Mapping[str, Data], bench: Bench, tried: dict[str, Tried]
) -> None:
    """Its methods are known, and do to a network of random weights what they would do to a trained one."""
    if "eval_data" in data:
        _check_judged(step, data["eval_data"].some, data["eval_data"].labelled)
    if not config.by:
        raise ConfigError("a step that shrinks says how", tip='by = ["prune:structured,amount=0.3"]')
    methods = [shrink.Method.parse(text) for text in config.by]
    shrink.check_order(methods)
    before = tried.get(config.model)
    views = Policy.parse(config.policy, 0) if config.policy or before is None else before.views
    if before is None:  # a model that is there already
        return
    shown = data.get("data", data.get("eval_data"))
    viewed = None if shown is None else ViewedSet(shown.some, views.for_evaluation(), ())
    items = [before.item] if viewed is None else [viewed.render(i, 0) for i in range(len(viewed.transfer_set))]
    model = copy.deepcopy(before.model).eval()
    count = len(items) if "data" in data else 0
    samples = Samples.of(model, config.model, items[0], count, items.__getitem__, config.batch_size)
    if "data" in data:
        labels = data["data"].some.labels
        samples = replace(samples, answers=torch.zeros((count, *labels.shape[1:]), dtype=torch.int64))
    for method in methods:
        with suppress(SavesNothing):  # of weights that are learned it may
            method.apply(samples)
    _keep(step, Tried(model, items[0], views), bench, tried)


def _keep(step: Step, made: Tried, bench: Bench, tried: dict[str, Tried]) -> None:
    named = {name for one in bench.recipe.steps for key, name in one.named() if key in (STUDENT, "model")}
    if step.name in named:
        tried[step.name] = made


def _check_train(step: Step, config: TrainConfig, data: TransferSet, bench: Bench, tried: dict[str, Tried]) -> None:
    """Its student can be built, has the layers that are named and takes the items; its cache keeps what its losses need."""
    source = next((one for one in bench.recipe.steps if one.name == step.settings.get("cache")), None)
    policy: Sequence[str] = config.augment or config.policy
    if source is not None:
        _check_kept(config, source, bench.recipe)
        policy = config.augment or resolve(DumpConfig, flags={**source.settings, "out": "."}).config.policy
    views = Policy.parse(policy, 0)
    views = views if config.size is None else views.at_size(config.size)
    item = ViewedSet(data, views.for_evaluation(), ()).render(0, 0)
    if config.classes:
        data = data.with_classes(config.classes)
    model, given = config.student, bench.models.get(step.name)
    names: Sequence[str] = data.class_names
    if given is not None:
        model, names = given, own_classes(given) or names
    with faults_explained(DataError, f"reading the texts of {data.name}"):
        vocabulary = build_vocabulary(data.load(i)[0] for i in range(len(data))) if has_vocabulary(item) else None
    if model in tried:
        made = copy.deepcopy(tried[model].model)
    else:
        with faults_explained(ModelError, f"building {model!r}"):
            made = load_model(
                model,
                num_classes=len(names),
                class_names=names,
                input_shape=item_shape(item),
                vocabulary=vocabulary,
                allow_code=bench.allow_code,
            )
    with faults_explained(DataError, f"the collate of {model!r}"):
        sample = made.input.collate([item, item])
    try_student(made, model, sample, item_shape(item))
    _keep(step, Tried(made, item, views), bench, tried)
    stages = parse_stages(config) if given is None else []
    if not any(term.loss.graft for stage in stages for term in stage.terms):  # which brings layers of its own
        for stage in stages:
            freeze(made.net, stage.config.freeze)


def _check_kept(config: TrainConfig, source: Step, recipe: Recipe) -> None:
    """The cache that a step of the recipe dumps has the members and the kind of records that a step learns from."""
    kept: Mapping[str, Any] = source.settings
    without_classes = not all(map(gives_classes, settings_of(source, "teacher")))
    for term in (term for stage in parse_stages(config) for term in stage.terms):
        features = kept.get("features") or kept.get("for") or kept.get("for_")
        if without_classes and term.loss.reads_output:
            continue  # the member's output is its record
        if term.loss.has_features and not features and not str(kept.get("codec", "")).startswith("linear_head"):
            raise ConfigError(
                f"loss {term.name!r} learns from features, and step {source.name!r} keeps none",
                tip=f'add `for = ["{term.name}"]` to that step\'s dump',
            )
    teachers = kept.get("teacher", ())
    teachers = [teachers] if isinstance(teachers, str) else list(teachers)
    if set(teachers) <= {step.name for step in recipe.steps}:
        for name in parse_members(config.members) or ():
            if name not in teachers:
                raise ConfigError(f"members: step {source.name!r} has no teacher {name!r}", tip=nearest(name, teachers))

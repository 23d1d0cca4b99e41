"""The student's network as a run begins with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from softcache.config import TrainConfig
from softcache.data.classes import match_classes, read_classes_map
from softcache.data.loading import ViewedSet, item_shape, spread_items
from softcache.data.transfer_set import TransferSet
from softcache.errors import ConfigError, DataError, ModelError, faults_explained, first_offenders, note_once
from softcache.features.taps import eval_mode
from softcache.models import Initialised, Model, build_vocabulary, load_model, path_alone, read_saved, split_weights
from softcache.models.initialise import initialise, reorder_classes
from softcache.models.inputs import has_vocabulary
from softcache.models.item_range import check_same_scale, check_scale
from softcache.spec import parse_spec
from softcache.train.batches import Material
from softcache.train.run_folder import RUN


def build_student(config: TrainConfig, material: Material) -> tuple[Model, Any, Initialised | None]:
    """The network on the CPU, two samples as it collates them, and what it took from other weights (None: nothing).

    Raises:
        ModelError: no such model, or weights that do not fit.
    """
    transfer_set = material.transfer_set
    item = material.viewed().render(0, 0)
    texts = (transfer_set.load(i)[0] for i in range(len(transfer_set)))
    with faults_explained(DataError, f"reading the texts of {transfer_set.name}"):
        vocabulary = build_vocabulary(texts) if has_vocabulary(item) else None
    given = material.given
    text, width = (config.student, given.width) if given.has_classes else split_width(config.student, given.width)
    with faults_explained(ModelError, f"building the student {config.student!r}"):
        model = load_model(
            text,
            num_classes=width,
            class_names=transfer_set.class_names if given.has_classes else (),
            input_shape=item_shape(item),
            vocabulary=vocabulary,
            allow_code=config.allow_code,
        )
    model.check_gives("sample" if transfer_set.positions is None else transfer_set.positions.kind, transfer_set.name)
    if not given.has_classes:
        model.output = given.kind
        model.value_names = given.value_names if width == given.width else ()
    began = Path(config.out, RUN).is_file()  # what an older version began, it may go on with
    check_scale(model, config.student, material.some_items, learns=True, lenient=began)
    if material.eval_set is not None and not began:
        evaluated = spread_items(ViewedSet(material.eval_set, material.policy.for_evaluation(), ()))
        check_same_scale(model.input, material.some_items, evaluated)
    if transfer_set.positions is not None and model.gives == "words":
        for one in filter(None, (transfer_set, material.eval_set)):
            refuse_unfit(model, one)
    with faults_explained(DataError, f"the collate of the student {config.student!r}"):
        sample = model.input.collate([item, item])
    try_student(model, config.student, sample, item_shape(item))
    order = _data_order(model, transfer_set.class_names, read_classes_map(config.classes_map))
    if order is not None:
        reorder_classes(model, order, transfer_set.class_names, sample)
    taken = initialise(model, config.init_from, config.init_map) if config.init_from else None
    return model, sample, taken


def refuse_unfit(model: Model, transfer_set: TransferSet) -> None:
    """Raise DataError, naming them, where some samples have words that the student cannot answer about."""
    faults: dict[str, DataError] = {}
    for index, key in enumerate(transfer_set.keys):
        try:
            model.input.collate([transfer_set.read(index)[0]])
        except DataError as exc:
            faults[key] = exc
    if faults:
        first = next(iter(faults.values()))
        raise DataError(
            f"{transfer_set.name}: {len(faults):,} of {len(transfer_set):,} samples do not fit the student: "
            f"{first_offenders(faults, len(faults))}. "
            f"For example: {first.message}",
            tip=first.tip,
        )


def split_width(text: str, width: int) -> tuple[str, int]:
    """The student without the parameter `outputs=`, and how many numbers it gives: so many, else as many as the member.

    A run folder has its own.
    """
    run = path_alone(text)
    if run is not None:
        saved = read_saved(run)
        return text, width if saved is None else saved.num_classes
    head, weights = split_weights(text)
    spec = parse_spec(head)
    said = spec.value("outputs", str(width))
    if not said.isdecimal() or not int(said):
        raise ConfigError(f"{text!r}: outputs={said}", tip="write how many numbers the student is to give: outputs=64")
    bare = spec.without("outputs").text if "outputs" in spec.parameters else head
    return bare + (f"@{weights}" if weights else ""), int(said)


def try_student(model: Model, text: str, sample: Any, shape: tuple[int, ...] | None) -> None:
    """Run the network once, on the CPU: a fault of its own is told with its place, and before anything else asks it."""
    size = "" if shape is None else f" on items of shape {shape}"
    tip = "pictures may be too small for it: the view step `resize:size=N` makes them larger, or another student takes them"
    with eval_mode(model), torch.no_grad(), faults_explained(ModelError, f"the student {text!r}{size}", tip=tip):
        model(sample)


def _data_order(model: Model, class_names: Sequence[str], classes_map: Mapping[str, str]) -> Sequence[int] | None:
    """The student's outputs in the data's order, where it knows the same classes in another; None: as they are.

    A start that knows other classes is as good as another: its last layer learns the data's, which is said.
    """
    declared = model.declared_classes
    if declared is None:
        return None
    try:
        return match_classes(model.spec, declared, class_names, classes_map).columns
    except ModelError as exc:
        if classes_map and set(classes_map.values()) & set(declared):
            raise
        note_once(f"{exc.message}; its last layer begins with what it learned of those")
        return None

"""From spec strings to teachers that were looked at hard: built, matched with the data's classes, and asked once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from softcache.cache.schema import member_name
from softcache.config import StorageOptions
from softcache.data.classes import Match, match_classes, read_classes_map
from softcache.data.rendering import Rendering
from softcache.data.transfer_set import TransferSet
from softcache.dump.batch_composition import check_batch_composition
from softcache.dump.choose_codec import Prober
from softcache.dump.teacher import Teacher
from softcache.dump.token_teachers import (
    check_alone,
    check_vocabulary,
    match_tokens,
    spec_of_tokens,
    surplus,
)
from softcache.errors import ConfigError, DataError, ModelError, faults_explained, warn_once
from softcache.features.taps import classifier_of
from softcache.machine import autocast_dtype
from softcache.models import Model, build, load_model, own_classes, path_alone
from softcache.models import split_weights as split_model
from softcache.models.class_names import gives_classes
from softcache.models.estimators import callee_of
from softcache.models.inputs import is_text
from softcache.models.item_range import check_scale
from softcache.models.language_model import Engine
from softcache.models.left_out import LOOKED_AT, LeftOut, left_out
from softcache.models.model import CLASS_OUTPUTS, FEATURES, OTHER_OUTPUTS
from softcache.spec import Spec, parse_spec, split_list

OF_TEACHERS = ("name", "output", "decides")  # parameters of a spec that are no model's
NO_MATCH = Match(None, None, "not at all: its outputs are no classes")


def open_teachers(
    config: StorageOptions, prober: Prober, transfer_set: TransferSet, device: torch.device, *, again: bool = False
) -> list[Teacher]:
    """The teachers of the config, each checked on the first batch of the cache's rows.

    Args:
        again: they made a cache that is there, to whose records more of the same is written: what an older version let pass
            is told, and not refused.
    """
    teachers = build_teachers(config, prober, transfer_set, device, again=again)
    check_teachers(teachers, prober, again=again)
    return teachers


def build_teachers(
    config: StorageOptions, prober: Prober, transfer_set: TransferSet, device: torch.device, *, again: bool = False
) -> list[Teacher]:
    """The teachers of the config, with weights and with items in the scale that they take; not yet asked."""
    if not config.teacher and not again:
        raise ConfigError("no teacher is given", tip="MODEL@WEIGHTS or a run folder; several for an ensemble")
    (item,) = prober.items(0, 1)
    shape = None if isinstance(item, str) else tuple(getattr(item, "shape", ())) or None
    classes_map = read_classes_map(config.classes_map)
    teachers: list[Teacher] = []
    for text in config.teacher:
        teacher = open_teacher(
            text,
            taken=[t.name for t in teachers],
            num_classes=transfer_set.num_classes,
            class_names=transfer_set.class_names,
            multi_label=transfer_set.multi_label,
            input_shape=shape,
            device=str(device),
            autocast=autocast_dtype(config.autocast, device),
            allow_code=config.allow_code,
            classes_map=classes_map,
            items=prober.first_items,
            rendering=transfer_set.rendering,
        )
        teacher.index = None if transfer_set.positions is None else transfer_set.positions.kind
        if not teacher.has_weights:
            raise ModelError(
                f"teacher {text!r} has no weights: what it gives would be random numbers",
                tip=f"write {text}@WEIGHTS, or name a run folder",
            )
        if isinstance(teacher.network, Model):
            told = check_scale(teacher.network, text, prober.first_items(), lenient=again)
            teacher.warnings += [told] if told is not None else []
        teachers.append(teacher)
    return teachers


def check_teachers(teachers: Sequence[Teacher], prober: Prober, *, again: bool = False) -> None:
    """Ask each about the first batch, twice and in another composition."""
    for teacher in teachers:
        teacher.check_first_batch(prober.first_batch(teacher))
        if not again:
            check_batch_composition(teacher, prober.first_items())
            if teacher.index == "tokens":
                _check_tokens(teacher, prober.first_items())
            _tell_twins(teacher, teachers)


def _check_tokens(teacher: Teacher, items: Sequence[Any]) -> None:
    """What is asked of teachers of tokens alone, and told of them."""
    apart, unused = check_alone(teacher, items), surplus(teacher, teacher.num_classes)
    teacher.told["noise_floor"] = apart
    if unused is not None:
        teacher.told["unused_ids"] = unused


def _tell_twins(teacher: Teacher, teachers: Sequence[Teacher]) -> None:
    """Warn, at the later one, of two members of equal weights: they cost twice the room and count twice in every mean."""
    earlier = next(one for one in teachers if one.fingerprint == teacher.fingerprint)
    if earlier is not teacher:
        told = f"teachers {earlier.name!r} and {teacher.name!r} are the same: it is asked and stored twice, and counts twice"
        warn_once(told)
        teacher.warnings.append(told)


def left_out_of(teachers: Sequence[Teacher], prober: Prober) -> dict[str, LeftOut]:
    """What each teacher leaves out of the first texts, which in a permuted order are a fair sample; where it is worth telling."""
    found = {}
    for teacher in teachers:
        if isinstance(teacher.network, Model) and is_text(prober.items(0, 1)[0]):
            one = left_out(teacher.network.input, prober.items(0, LOOKED_AT))
            if one is not None and one.is_worth_telling:
                found[teacher.name] = one
    return found


def open_teacher(
    text: str,
    *,
    taken: Sequence[str],
    num_classes: int,
    class_names: Sequence[str],
    multi_label: bool,
    input_shape: tuple[int, ...] | None,
    device: str,
    autocast: torch.dtype | None,
    allow_code: bool = False,
    classes_map: Mapping[str, str] | None = None,
    items: Callable[[], Sequence[Any]] = tuple,
    rendering: Rendering | None = None,
) -> Teacher:
    """The teacher behind `MODEL@WEIGHTS`, a run folder, or a factory (torch module, scikit-learn estimator, callable).

    The parameters `name=` (of the member), `output=` (logits, log_probs, probs; embedding, values; features: no output is kept),
    `names=` (of its values), `head=none` (an embedding: what its final linear layer takes) and `decides=own` (its own `predict`
    may decide otherwise than its largest column) belong to the teacher, the rest to the model.

    Args:
        taken: member names that are in use already.
        items: some samples, by which a final linear layer is found.
        allow_code: call the factory that a run folder names.
        classes_map: data's class -> teacher's class.
        rendering: how texts became tokens, where samples are tokens.

    Raises:
        ModelError: it cannot be built, has other classes, or gives something else.
    """
    head, weights = (text, "") if os.path.exists(text) else split_model(text)
    spec = Spec(text, "", text) if os.path.exists(text) else parse_spec(head)
    headless = _is_headless(spec, text)
    # of a factory of the user `head` and `names` may be parameters of its own
    own_words = [*(["head"] if headless else []), *(["names"] if spec.value("output") == "values" else [])]
    bare = spec.without(*OF_TEACHERS, *own_words)
    bare = bare if rendering is None else spec_of_tokens(bare)
    decides = spec.value("decides") or None
    if decides not in (None, "own"):
        raise ConfigError(f"{text!r}: decides={decides}", tip="decides=own, or leave it out")
    said_output = "embedding" if headless else spec.value("output")
    run = path_alone(bare.text)  # a run folder, or its student.safetensors
    is_run = run is not None
    chosen_name = spec.value("name")
    wanted_name = chosen_name or Path(run or spec.name).name
    name = member_name(wanted_name, taken)
    what, model_text = f"teacher {name!r}", bare.text + (f"@{weights}" if weights else "")
    shape: dict[str, Any] = {"num_classes": num_classes, "class_names": tuple(class_names), "input_shape": input_shape}
    own = None if rendering is not None else own_classes(model_text, num_classes)
    more = own if own is not None and len(own) > num_classes else None  # of which the data's are chosen
    if not gives_classes(text):
        shape |= {"num_classes": len(own or ()) or max(1, num_classes), "class_names": own or tuple(class_names)}
    elif more is not None:
        match_classes(what, more, class_names, classes_map)  # refused before it is built, or fetched
        shape |= {"num_classes": len(more), "class_names": more}
    made: Any = None
    network: Any
    collate: Callable[[Sequence[Any]], Any]
    if bare.is_factory and not is_run:
        with faults_explained(ModelError, f"building the teacher {text!r}"):
            made = build(bare, **shape)
    if decides is not None and (made is None or isinstance(made, nn.Module)):
        raise ConfigError(f"{text!r}: decides=own is of objects with a predict of their own", tip="leave it out")
    if made is None or isinstance(made, nn.Module):
        with faults_explained(ModelError, f"building the teacher {text!r}"):
            model = load_model(model_text, **shape, allow_code=allow_code)
        declared, output, portable = model.declared_classes or more, model.output, model.spec
        network, collate, decide = model, model.input.collate, None
        if headless:
            with faults_explained(ModelError, f"the teacher {text!r}"):
                _take_head_off(model, text, items())
            portable = parse_spec(model.spec).having(head="none").portable()
        if rendering is not None:
            model.check_gives("tokens", "the data")
            check_vocabulary(model, rendering, text)
        model.check_trained(f"teacher {text!r}")
    elif headless:
        raise ConfigError(
            f"{text!r}: head=none is of torch modules", tip="leave it out: output=embedding says what it gives"
        )
    elif weights:
        raise ModelError(f"{text!r}: weights can only be loaded into a torch module")
    elif rendering is not None:
        if not callable(made):
            raise ModelError(
                f"{text!r} returned {type(made).__name__}, which cannot be called", tip="return a function"
            )
        check_vocabulary(made, rendering, text)
        network, output, declared, decide = (
            Engine(made, f"teacher {text!r}"),
            getattr(made, "output", "logits"),
            None,
            None,
        )
        collate, portable = network.collate, bare.portable()
    else:
        callee = callee_of(made, text, output=spec.value("output") or None, multi_label=multi_label)
        network, collate, output, declared = callee.run, callee.collate, callee.output, callee.classes
        decide = callee.decide if decides is None else None
        portable = (bare if decides is None else bare.having(decides="own")).portable()
    output = said_output or output
    if output not in (*OTHER_OUTPUTS, FEATURES) and not num_classes:
        raise _no_classes(text)
    if rendering is not None:
        match = match_tokens(rendering)
    else:
        match = match_classes(what, declared, class_names, classes_map) if output in CLASS_OUTPUTS else NO_MATCH
    told_input = dict(getattr(network, "told_input", {})) | ({"head": "none"} if headless else {})
    teacher = Teacher(
        name,
        portable,
        network,
        collate,
        output=output,
        num_classes=num_classes,
        multi_label=multi_label,
        match=match,
        decide=decide,
        device=device,
        autocast=autocast,
        value_names=_value_names(spec, text, output, getattr(network, "value_names", ()) or declared or ()),
        told_input=told_input,
    )
    teacher.wanted_name, teacher.is_named = wanted_name, bool(chosen_name)
    teacher.has_weights = bool(
        is_run or bare.is_factory or weights or bare.scheme == "hf" or "weights" in bare.parameters
    )
    return teacher


def _is_headless(spec: Spec, text: str) -> bool:
    """Whether `head=none` asks for what the final linear layer takes; ConfigError for what does not go with it."""
    if spec.value("head") != "none":
        return False
    output = spec.value("output", "embedding")
    if output != "embedding":
        raise ConfigError(
            f"{text!r}: head=none gives an embedding, and output={output} is asked for", tip="leave one of them out"
        )
    return True


def _take_head_off(model: Model, text: str, items: Sequence[Any]) -> None:
    """Let the network end with the input of its final linear layer."""
    batch = model.input.prepare(model.input.collate(list(items)[:2]))
    final = classifier_of(model.net, batch)
    name = next((name for name, module in model.net.named_modules() if module is final and final is not None), "")
    if not name:
        raise ModelError(
            f"{text!r}: head=none, and it does not end with an nn.Linear that gives its output",
            tip="let a factory of yours return the module that gives the embedding, and say output=embedding",
        )
    holder, _, last = name.rpartition(".")
    setattr(model.net.get_submodule(holder), last, nn.Identity())
    model.output, model.untrained = "embedding", tuple(one for one in model.untrained if not one.startswith(f"{name}."))


def _value_names(spec: Spec, text: str, output: str, own: Sequence[str]) -> tuple[str, ...]:
    """Of the output `values`: those of `names=`, else the network's own, of its classes too; none of another output."""
    if output != "values":
        return ()
    said = split_list(spec.parameters.get("names", ""))
    if len(set(said)) < len(said):
        raise ConfigError(f"{text!r}: names= has a name twice", tip="give each value a name of its own")
    return said or tuple(own)


def _no_classes(text: str) -> DataError:
    return DataError(
        f"the data has no classes, and teacher {text!r} gives some",
        tip="say how many it has, or their names, in its order: classes=10, or classes=cat,dog,...; a teacher that gives an "
        "embedding or scores says so: output=embedding, output=values, head=none",
    )

"""A student that begins with weights of another network: by name, and by a map of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from softcache.errors import ConfigError, ModelError, first_offenders, nearest
from softcache.models.checkpoints import State
from softcache.models.fake_quantise import unpacked
from softcache.models.from_torchvision import torchvision_weights
from softcache.models.from_transformers import TokenizerInput
from softcache.models.inputs import TextInput
from softcache.models.model import Model, final_linear
from softcache.models.weights import (
    SavedModel,
    names_torchvision_weights,
    path_alone,
    read_saved,
    split_weights,
    state_of,
)
from softcache.models.word_input import WordInput
from softcache.models.word_pieces import PieceInput
from softcache.spec import parse_spec


@dataclass(frozen=True)
class Initialised:
    """What became of a student's tensors.

    Attributes:
        source: where the weights came from.
        copied: names of the student's tensors that were.
        left: those that keep their own values, with the reason where the source has a tensor of that name.
        unused: names of the source that nothing was taken from.
        taken, numbers: of the student's numbers, those that were copied, and all.
    """

    source: str
    copied: tuple[str, ...]
    left: Mapping[str, str]
    unused: tuple[str, ...]
    taken: int
    numbers: int

    def text(self) -> str:
        """One line for people."""
        said = f"{len(self.copied)} of {len(self.copied) + len(self.left)} tensors initialised from {self.source}"
        if self.left:
            reasons = [f"{name} ({why})" for name, why in self.left.items() if why]
            reasons += [name for name, why in self.left.items() if not why]
            said += f"; left as they were: {first_offenders(reasons, len(reasons))}"
        if self.unused:
            said += f"; not used of the source: {first_offenders(self.unused, len(self.unused))}"
        return said


def initialise(model: Model, text: str, entries: Sequence[str] = ()) -> Initialised:
    """Copy weights into a student.

    Args:
        model: the student, changed in place.
        text: `MODEL@WEIGHTS`, a run folder or a weights file. Of MODEL only torchvision's need be named rightly; the
            tensors are taken from the weights as they are named there, whatever the number of classes.
        entries: `student.prefix=source.prefix`, see `init_from`.

    Raises:
        ConfigError: a map that does not fit, nothing to copy, or a text model with another vocabulary.
        ModelError: weights that are not there or cannot be read.
    """
    source, saved = _read_source(model, text)
    state = unpacked(source.tensors)
    if model.shrunk is not None:
        state = model.shrunk.of_whole(state, None if saved is None else saved.shrunk)
    layer_map, left = parse_layer_map(entries), set()
    if saved is not None:
        if isinstance(model.input, TextInput | WordInput) and saved.vocabulary not in (None, model.input.vocabulary):
            raise ConfigError(
                f"{text} was trained with another vocabulary: its embedding is of other words",
                tip="name the student with vocabulary=FILE of the same tokens, or leave --init-from out",
            )
        tokenizer = saved.input.get("definition")
        if isinstance(model.input, TokenizerInput | PieceInput) and tokenizer not in (
            None,
            model.input.describe()["definition"],
        ):
            raise ConfigError(
                f"{text} was trained with another tokenizer: its embedding is of other words",
                tip="choose a student with the same tokenizer, or leave --init-from out",
            )
        names = saved.class_names
        if names and model.data_class_names and names != model.data_class_names:
            left = _head_tensors(model, layer_map) & set(state)
    done = init_from(model.net, {k: v for k, v in state.items() if k not in left}, layer_map, text)
    why = dict.fromkeys(sorted(left), "of another class list")
    where = f"{text} ({source.told})" if source.told else text
    return replace(done, source=where, left={**done.left, **why}, unused=(*done.unused, *why))


def init_from(net: nn.Module, source: Mapping[str, Tensor], layer_map: Mapping[str, str], where: str) -> Initialised:
    """Copy every tensor of the same name and shape, and under the prefixes of the map those of the other name.

    Args:
        net: changed in place; its dtypes and device stay.
        source: a state dict.
        layer_map: prefix in the student -> prefix in the source; the longest that fits a name counts. A prefix is a whole
            module or tensor name: `layers.1` is not `layers.10`.
        where: what the source is called in messages.

    Raises:
        ConfigError: an entry of the map that matches nothing, or tensors of another shape; nothing to copy at all.
    """
    own = net.state_dict()
    copied: dict[str, str] = {}  # name in the student -> name in the source
    left: dict[str, str] = {}
    for name, tensor in own.items():
        prefix = max((p for p in layer_map if _is_under(name, p)), key=len, default=None)
        other = name if prefix is None else layer_map[prefix] + name.removeprefix(prefix)
        if other not in source:
            left[name] = ""
        elif source[other].shape == tensor.shape:
            copied[name] = other
        elif prefix is None:
            left[name] = f"{tuple(source[other].shape)} there, {tuple(tensor.shape)} here"
        else:
            raise ConfigError(
                f"--init-map {prefix}={layer_map[prefix]}: {name} is {tuple(tensor.shape)} in the student, {other} is "
                f"{tuple(source[other].shape)} in {where}",
                tip="map layers of the same widths, or leave this one out",
            )
    for prefix, other in layer_map.items():
        _check_used(prefix, other, own, source, copied, where)
    if not any(own[name].ndim for name in copied):  # BatchNorm's counters fit everywhere
        if left:
            name, why = next(((n, w) for n, w in left.items() if w), (next(iter(left)), ""))
            if why:
                raise ConfigError(
                    f"{where}: no tensor of the student's names has its shape there: {name} is {why}",
                    tip="start from a network of the same widths, or leave --init-from out",
                )
        raise ConfigError(
            f"{where}: none of its {len(source)} tensors has the name and shape of one of the student's {len(own)}",
            tip=f"the student has {next(iter(own), 'nothing')!r}: {nearest(next(iter(own), ''), source)}; map them with "
            "--init-map student.prefix=source.prefix",
        )
    with torch.no_grad():
        for name, other in copied.items():
            own[name].copy_(source[other])
    used = set(copied.values())
    unused = tuple(name for name in source if name not in used)
    taken, numbers = (sum(own[name].numel() for name in names) for names in (copied, own))
    return Initialised(where, tuple(copied), left, unused, taken, numbers)


def reorder_classes(model: Model, order: Sequence[int], class_names: Sequence[str], batch: Any) -> None:
    """Bring the rows of a classifier that has learned the data's classes in another order into the data's.

    Args:
        model: changed in place; on the CPU.
        order: the output that becomes the first, the second, and so on.
        class_names: in the new order.
        batch: a collated one, on which the logits before and after are compared.

    Raises:
        ModelError: the model ends in no nn.Linear whose rows are its classes.
    """
    was_training = model.training
    model.eval()
    with torch.no_grad():
        before = model(batch)
        linear = final_linear(model.net, len(order))
        for tensor in () if linear is None else (linear.weight, linear.bias):
            if tensor is not None:
                tensor.copy_(tensor[list(order)])
        fits = torch.allclose(model(batch), before[:, list(order)], rtol=1e-3, atol=1e-5)
    model.train(was_training)
    if not fits:
        raise ModelError(
            f"{model.spec} knows the data's classes in another order, and ends in no nn.Linear whose rows could be exchanged",
            tip="give the data set the model's class order, or begin without its classifier: --init-from",
        )
    model.class_names = tuple(class_names)


def parse_layer_map(entries: Sequence[str]) -> dict[str, str]:
    """`student.prefix=source.prefix` strings -> a map; ConfigError for one that is not that, or a prefix given twice."""
    layer_map: dict[str, str] = {}
    for entry in entries:
        mine, equals, other = entry.partition("=")
        if not (mine and equals and other):
            raise ConfigError(
                f"--init-map {entry!r} is not student.prefix=source.prefix", tip="layers.0=layers.0,layers.1=layers.2"
            )
        if mine in layer_map:
            raise ConfigError(f"--init-map names {mine!r} twice", tip="keep one of them")
        layer_map[mine] = other
    return layer_map


def _check_used(
    prefix: str,
    other: str,
    own: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    copied: Mapping[str, str],
    where: str,
) -> None:
    entry = f"--init-map {prefix}={other}"
    if not any(_is_under(name, prefix) for name in own):
        raise ConfigError(f"{entry}: the student has no {prefix!r}", tip=nearest(prefix, _modules_of(own)))
    if not any(_is_under(name, other) for name in source):
        raise ConfigError(f"{entry}: {where} has no {other!r}", tip=nearest(other, _modules_of(source)))
    if not any(_is_under(name, prefix) and _is_under(taken, other) for name, taken in copied.items()):
        raise ConfigError(
            f"{entry}: no tensor below one has the name of one below the other",
            tip="map modules of the same kind",
        )


def _modules_of(state: Mapping[str, Tensor]) -> set[str]:
    return {name.rpartition(".")[0] or name for name in state}


def _is_under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _read_source(model: Model, text: str) -> tuple[State, SavedModel | None]:
    path = path_alone(text)
    head, weights = split_weights(text) if path is None else ("", path)
    if not weights:
        raise ConfigError(
            f"--init-from {text}: is neither a run folder nor MODEL@WEIGHTS",
            tip="name a run folder that exists, or weights behind an '@'",
        )
    if head:
        spec = parse_spec(head)
        if names_torchvision_weights(spec, weights):
            entry = torchvision_weights(spec.name, weights)
            return State(entry.get_state_dict(progress=False, check_hash=True)), None
    return state_of(model, weights), read_saved(weights)


def _head_tensors(model: Model, layer_map: Mapping[str, str]) -> set[str]:
    """The tensors of the student's final linear layer, where the map does not ask for them."""
    final = final_linear(model.net, model.num_classes)
    name = next((name for name, module in model.net.named_modules() if module is final and name), None)
    names = [n for n in model.net.state_dict() if name is not None and _is_under(n, name)]
    return {n for n in names if not any(_is_under(n, prefix) for prefix in layer_map)}

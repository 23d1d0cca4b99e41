"""A teacher: anything that maps a batch to logits, frozen and checked, with its classes in the transfer set's order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from softcache.data.classes import Match
from softcache.data.loading import to_device
from softcache.dump.half_types import HALF_ROUNDING, HalfInputs, half_type, last_in_float32, last_layer
from softcache.dump.results import described, likely_meant, numbers, place_of
from softcache.dump.teacher_state import StandsStill, fingerprint
from softcache.errors import (
    ConfigError,
    ModelError,
    SoftcacheError,
    TeacherError,
    faults_explained,
    nearest,
)
from softcache.features.spec import FeatureSpec, parse_features
from softcache.features.taps import (
    ClassifierTap,
    ModuleShape,
    Taps,
    classifier_feature,
    classifier_of,
    list_modules,
    map_ends,
)
from softcache.models import Model
from softcache.models.model import CLASS_OUTPUTS, FEATURES, OTHER_OUTPUTS, OUTPUTS

WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)  # counts, as of votes
ASKED_ROWS = 512  # of the first batches, on which an object's own `predict` is asked
PROBABILITY_FLOOR = 2.0**-24  # a probability of exactly zero is stored as the logarithm of this


@dataclass
class TeacherOutput:
    """One batch of logits, (B, C) float32 in the cache's class order; or of an output without classes, as it was given.

    Of a teacher whose features alone are kept (B, 0).

    Attributes:
        rounding: (B,) bound on what the last layer's own dtype may have cost, 0 for float32.
        floored: how many probabilities of exactly zero were raised to the floor.
        classifier_input: (B, D) float32 input of the final linear layer, where it is tapped.
        features: feature -> (B, ...) in the form that is stored, where tapped.
        whole: (B, K) of all that the teacher gave, of which some columns are taken; None where all are.
    """

    logits: Tensor
    rounding: Tensor
    floored: int
    classifier_input: Tensor | None = None
    features: Mapping[str, Tensor] = field(default_factory=dict)
    whole: Tensor | None = None


class Teacher:
    """One member of the ensemble.

    Attributes:
        name: of the member.
        wanted_name: the same before a number was added to tell it from others; `is_named` where the user chose it.
        model_spec: portable spec string.
        collate: items -> batch, for the loader's workers.
        output: what the teacher gives: "logits", "log_probs" or "probs"; "embedding" or "values"; "features": what it gives is
            not kept.
        value_names: of the output "values"; empty until the first batch where nobody named them.
        told_input: what it alone does to its inputs and outputs, for the manifest.
        fingerprint: sha256 of weights and preprocessing; None until the first batch for a teacher without weights.
        match: which of its outputs belongs to which class.
        class_order: permutation that brings its outputs into the cache's order; None when they stand so already, and where
            some of them are chosen.
        decide: asks its own `predict`, (B,) columns; None where it has none, or where it may decide otherwise.
        compute_dtype: of the last layer; known after the first batch.
        has_weights: False for one of our models, or torchvision's, that was named without any.
        features: what is tapped at each call.
        classifier: the final linear layer, where its input is tapped at each call.
        warnings: what was told of it, for provenance.
        told: of a teacher of tokens `noise_floor`, how far its logits for a text alone and beside others are apart, of the
            largest one; and `unused_ids`, the mean probability that its head gives to ids that are not in use, where there are.
        index: "words" or "tokens" where it gives a row for each of a sample; None: one for each sample.
        first_batch: the inputs that `check_first_batch` saw, and its logits; None before.
    """

    def __init__(
        self,
        name: str,
        model_spec: str,
        network: Any,
        collate: Callable[[Sequence[Any]], Any],
        *,
        output: str,
        num_classes: int,
        multi_label: bool = False,
        match: Match | None = None,
        decide: Callable[[Any], np.ndarray | None] | None = None,
        device: str = "cpu",
        autocast: torch.dtype | None = None,
        value_names: Sequence[str] = (),
        told_input: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        if output not in (*OUTPUTS, FEATURES):
            raise ConfigError(f"teacher {name!r}: unknown output {output!r}", tip=nearest(output, (*OUTPUTS, FEATURES)))
        self.value_names, self.told_input = tuple(value_names), dict(told_input)
        self._width: int | None = None  # of an output without classes, once it was seen
        self.name, self.model_spec, self.network, self.collate = name, model_spec, network, collate
        self.wanted_name, self.is_named = name, False
        self.output, self.num_classes, self.multi_label = output, num_classes, multi_label
        self.match = match or Match(None, num_classes, "as declared")
        self.class_order, self.decide, self._asked = self.match.permutation, decide, 0
        self.device, self.autocast = torch.device(device), autocast
        self.compute_dtype = "float32"
        self.fingerprint: str | None = None
        self.has_weights = True
        self.features: tuple[FeatureSpec, ...] = ()
        self.classifier: nn.Linear | None = None
        self.warnings: list[str] = []
        self.told: dict[str, float] = {}
        self.index: str | None = None
        self.first_batch: tuple[Any, Tensor] | None = None
        self._half: torch.dtype | None = None
        self._last: nn.Linear | None = None
        if isinstance(network, nn.Module):
            with faults_explained(ModelError, f"teacher {name!r}: moving it to {device}"):
                network.eval().requires_grad_(False).to(self.device)
            taken = network.input.describe() if isinstance(network, Model) else ""
            described = f"{model_spec} {output} {taken}{self._taken}"
            state = fingerprint(network)
            if state is not None:
                self.fingerprint = hashlib.sha256(f"{state} {described}".encode()).hexdigest()
            self._half = half_type(network)
            self._state = StandsStill(network)

    @torch.inference_mode()
    def __call__(self, batch: Any) -> TeacherOutput:
        """The teacher's logits of one collated batch.

        Raises:
            TeacherError: a result of another shape, or a fault inside the teacher.
        """
        with self._faults_explained(batch):
            raw, classifier_input, features = self._run_tapped(batch)
        if not self.has_output:
            count = len(next(iter(features.values()))) if features else _count(batch)
            return TeacherOutput(torch.empty(count, 0, device=self.device), torch.zeros(0), 0, None, features)
        raw = self._as_rows(raw)
        self.compute_dtype = str(raw.dtype).removeprefix("torch.")
        relative = HALF_ROUNDING.get(raw.dtype, 0.0)
        if not self.has_classes:
            given = raw.float()
            return TeacherOutput(given, relative * given.abs().amax(dim=1), 0, classifier_input, features)
        if relative and self.output != "logits":
            raise TeacherError(
                f"teacher {self.name!r} gave {self.output} in {self.compute_dtype}: small probabilities are lost in it",
                tip="let it return logits, or take its softmax in float32",
            )
        # a class's log-odds need 1 - p as well, so log-probabilities of several labels go through the probabilities
        through_probs = self.output == "probs" or (self.output == "log_probs" and self.multi_label)
        values = raw.double() if raw.dtype == torch.float64 or through_probs else raw.float()
        floored = 0
        if through_probs:
            values, floored = self._log(values if self.output == "probs" else values.exp())
        whole = values.float()
        self._refuse_other_decision(batch, whole)
        if self.match.columns is None:
            return TeacherOutput(whole, relative * whole.abs().amax(dim=1), floored, classifier_input, features)
        if isinstance(self.match.columns, range):  # of ids
            logits = whole[:, : len(self.match.columns)]
        else:
            logits = whole[:, torch.tensor(self.match.columns, device=whole.device)]
        rounding = relative * logits.abs().amax(dim=1)
        return TeacherOutput(logits, rounding, floored, classifier_input, features, whole)

    @property
    def has_classes(self) -> bool:
        """Whether each of its outputs is of a class."""
        return self.output in CLASS_OUTPUTS

    @property
    def asked(self) -> str:
        """What each of its rows is of, in words for people."""
        return "samples" if self.index is None else self.index

    def check_rows(self, found: int, wanted: int) -> None:
        """TeacherError unless it gave a row for each sample, or for each word."""
        if found == wanted:
            return
        tip = "one row of logits per sample, in their order"
        if self.index is not None:
            tip = "a row for each word, sample after sample, and none for padding: logits[mask]"
        if self.index == "tokens":
            tip = "a row for each position that is listed, sample after sample: logits[batch['listed']]"
        raise TeacherError(
            f"teacher {self.name!r} gave {found} rows for {wanted} {self.asked}{place_of(self.function)}", tip=tip
        )

    @property
    def has_output(self) -> bool:
        """Whether what it gives is kept, or features alone."""
        return self.output != FEATURES

    @property
    def width(self) -> int:
        """How many numbers are kept of its answer: C; of an output without classes known after the first batch."""
        if not self.has_output:
            return 0
        if self.has_classes:
            return self.num_classes
        assert self._width is not None, "its first batch tells how wide it is"
        return self._width

    @property
    def _taken(self) -> str:
        """What its fingerprint says of columns that were chosen, or that a map declares."""
        match = self.match
        if isinstance(match.columns, range):
            return f" tokens {len(match.columns)}"
        return f" columns {list(match.columns)}" if match.columns and (match.declared or match.is_choice) else ""

    def _check_width(self, raw: Tensor) -> None:
        """TeacherError unless an output without classes is a row for each sample, as wide as ever and as its names say."""
        wanted = self._width or (len(self.value_names) or None)
        if raw.ndim != 2 or raw.shape[1] == 0 or wanted not in (None, raw.shape[1]):
            named = f" ({', '.join(self.value_names)})" if self.value_names else ""
            numbers = f"{wanted:,}{named}" if wanted else "D"
            raise TeacherError(
                f"teacher {self.name!r} gave a result of shape {tuple(raw.shape)}; output={self.output} takes (batch, {numbers})"
                + place_of(self.function),
                tip="name as many values as it gives: names=a,b"
                if self.output == "values"
                else "reduce it to one vector a sample: an average over positions (pooling=mean), or the input of its last layer "
                "(head=none)",
            )
        self._width = raw.shape[1]
        if self.output == "values" and not self.value_names:
            self.value_names = ("value",) if self._width == 1 else tuple(f"value{i}" for i in range(self._width))

    def _check_shape(self, raw: Tensor) -> None:
        outputs = self.match.outputs
        if outputs is None and raw.ndim == 2 and raw.shape[1] > max(self.match.columns or (0,)):
            columns = self.match.columns
            if isinstance(columns, range) and len(columns) == raw.shape[1]:
                columns = None  # each output is an id in use
            # it names no classes: what it has is seen now
            self.match = replace(self.match, outputs=raw.shape[1], columns=columns)
            self.class_order = self.match.permutation
            return
        if raw.ndim == 2 and raw.shape[1] == outputs:
            return
        wanted = max(self.match.columns or (0,)) + 1 if outputs is None else outputs
        raise TeacherError(
            f"teacher {self.name!r} gave a result of shape {tuple(raw.shape)}; "
            + (
                f"the transfer set has {self.num_classes} classes, so (batch, {self.num_classes}) is needed"
                if wanted == self.num_classes
                else f"its classes, or the map of them, ask for (batch, {wanted})"
            )
            + place_of(self.function),
            tip="one number a sample is no row of logits: for two classes give (0, z)"
            if raw.ndim == 1 and self.num_classes == 2
            else "use a teacher trained for these classes, or the data set it was trained on; one that has more classes can say "
            "which of its outputs are these: --classes-map FILE",
        )

    def _refuse_other_decision(self, batch: Any, whole: Tensor) -> None:
        """TeacherError where its own `predict` decides for another column than the largest, in the first batches."""
        if self.decide is None or self._asked >= ASKED_ROWS:
            return
        self._asked += len(whole)
        with self._faults_explained(batch):
            said = self.decide(batch)
        if said is None or len(said) != len(whole) or not ((said >= 0) & (said < whole.shape[1])).all():
            return
        of_said = whole.gather(1, torch.from_numpy(said).to(whole.device)[:, None])[:, 0]
        largest = whole.amax(dim=1)
        other = (of_said < largest - 1e-5 * largest.abs().clamp(min=1.0)).nonzero()[:, 0].tolist()
        if other:
            row = other[0]
            raise TeacherError(
                f"teacher {self.name!r}: its own predict decides otherwise than its largest column for {len(other)} of "
                f"{len(whole)} samples; in row {row} for column {int(said[row])}, where {int(whole[row].argmax())} is largest",
                tip="its columns may stand in another order than it says; if both are meant (a threshold, calibrated "
                "probabilities), add decides=own to the teacher's spec",
            )

    @contextmanager
    def _faults_explained(self, batch: Any) -> Iterator[None]:
        """Whatever goes wrong in somebody else's code is told with the place where it did."""
        try:
            yield
        except SoftcacheError:
            raise
        except Exception as exc:
            if _is_out_of_memory(exc):
                count = _count(batch)
                raise TeacherError(
                    f"teacher {self.name!r} ran out of memory at batch size {count}",
                    tip=f"try --batch-size {max(1, count // 2)} in a new --out: the batch size is part of the plan",
                ) from exc
            with faults_explained(
                TeacherError,
                f"teacher {self.name!r}",
                tip="it is called with what its collate makes of the items, in eval mode and without gradients",
            ):
                raise

    def collated(self, items: Sequence[Any]) -> Any:
        """Items as the batch it takes, in this process; TeacherError for a fault in its collate."""
        with faults_explained(TeacherError, f"the collate of teacher {self.name!r}"):
            return self.collate(items)

    def _as_rows(self, raw: Any) -> Tensor:
        """What it gave as (B, C) on its device; TeacherError for anything that is no such numbers."""
        rows = raw if isinstance(raw, Tensor) else numbers(raw)
        if rows is None or rows.layout != torch.strided or not (rows.is_floating_point() or rows.dtype in WHOLE):
            raise TeacherError(
                f"teacher {self.name!r} gave {described(raw)}, not {self._wanted}{place_of(self.function)}",
                tip=f"wrap it: file.py:factory may return a function or module that gives {likely_meant(raw)} alone",
            )
        if self.has_classes:
            self._check_shape(rows)
        else:
            rows = rows[:, None] if self.output == "values" and rows.ndim == 1 else rows
            self._check_width(rows)
        if rows.dtype.itemsize < 2 and rows.is_floating_point():
            raise TeacherError(
                f"teacher {self.name!r} gave {str(rows.dtype).removeprefix('torch.')}, of whose rounding nothing is known",
                tip="let it return float32, or float16 or bfloat16",
            )
        return rows.to(self.device)

    @property
    def _wanted(self) -> str:
        return (
            f"logits (batch, {self.num_classes})" if self.has_classes else f"one tensor (batch, D), its {self.output}"
        )

    @property
    def function(self) -> Any:
        """What a user wrote, to name the place of."""
        return self._net.forward if isinstance(self.network, nn.Module) else self.network

    def answers(self, batch: Any) -> Tensor:
        """(B, n) what must be the same whenever the samples are asked again: its output; else the features that are tapped."""
        return self._answers_of(self(batch))

    def _answers_of(self, output: TeacherOutput) -> Tensor:
        if self.has_output:
            return output.logits
        tapped = [value.flatten(1).float() for value in output.features.values()]
        return torch.cat([output.logits, *(one.to(self.device) for one in tapped)], dim=1)

    def _run_tapped(self, batch: Any) -> tuple[Any, Tensor | None, dict[str, Tensor]]:
        if self.autocast is not None and self._last is None and isinstance(self.network, nn.Module):
            # a run of its own, before anything is tapped
            self._last = last_layer(self.network, to_device(batch, self.device))
        with ExitStack() as stack:
            taps = stack.enter_context(Taps(self._net, self.features)) if self.features else None
            tap = stack.enter_context(ClassifierTap(self.classifier)) if self.classifier is not None else None
            raw = self._run(batch)
            return raw, tap.value() if tap is not None else None, taps.values() if taps is not None else {}

    @property
    def _net(self) -> nn.Module:
        """The network whose modules have the names that users know."""
        if not isinstance(self.network, nn.Module):
            raise ModelError(
                f"teacher {self.name!r} is no torch module: it has no layers to look at",
                tip="features and linear_head need a torch module",
            )
        return self.network.net if isinstance(self.network, Model) else self.network

    def parse_features(self, texts: Sequence[str]) -> tuple[FeatureSpec, ...]:
        """`layer3:pool`, ... as features of this teacher; ConfigError with near names for an unknown module."""
        return parse_features(texts, (name for name, _ in self._net.named_modules()))

    def list_modules(self, batch: Any) -> list[ModuleShape]:
        """Its modules with their output shapes on one collated batch."""
        return list_modules(self._net, self._prepared(batch))

    def map_ends(self, batch: Any) -> list[str]:
        """The modules that end its stages, early to late: the last to give a map of each size."""
        return [module.name for module in map_ends(self._net, self._prepared(batch))]

    def classifier_feature(self, batch: Any, *, of_map: bool = False) -> FeatureSpec | None:
        """The layer and reduction that give the input of the final linear layer, of a map only if asked; None: none does."""
        found = self.find_classifier(batch)
        return None if found is None else classifier_feature(self._net, self._prepared(batch), found, of_map=of_map)

    def _prepared(self, batch: Any) -> Any:
        """A collated batch as the network with the known module names takes it."""
        inputs = to_device(batch, self.device)
        return self.network.input.prepare(inputs) if isinstance(self.network, Model) else inputs

    def find_classifier(self, batch: Any) -> nn.Linear | None:
        """The linear layer whose output is the logits; None where there is none, or where it gives no logits."""
        if not isinstance(self.network, nn.Module) or self.output not in ("logits", *OTHER_OUTPUTS, FEATURES):
            return None
        return classifier_of(self.network, to_device(batch, self.device))

    def classifier_constants(self, classifier: nn.Linear) -> tuple[Tensor, Tensor | None]:
        """(C, D) float32 weight and (C,) bias of the final layer, on the CPU, classes in the cache's order."""
        weight = classifier.weight.detach().float().cpu()
        bias = None if classifier.bias is None else classifier.bias.detach().float().cpu()
        if self.match.columns is not None:
            order = torch.tensor(self.match.columns)
            weight, bias = weight[order], None if bias is None else bias[order]
        return weight.contiguous(), bias

    def _run(self, batch: Any) -> Any:
        if not isinstance(self.network, nn.Module):
            return self.network(batch)
        inputs = to_device(batch, self.device)
        if self.autocast is None:
            return self._run_module(inputs)
        with torch.autocast(self.device.type, dtype=self.autocast), last_in_float32(self._last):
            return self._run_module(inputs)

    def _run_module(self, inputs: Any) -> Any:
        """The module is asked with float32; one in a half type that cannot take it, with its own type from then on."""
        if self._half is None:
            return self._forward(inputs)
        try:
            return self._forward(inputs)
        except RuntimeError as exc:
            if "type" not in str(exc):  # "mat1 and mat2 must have the same dtype", "Input type and bias type ..."
                raise
        hook = self._net.register_forward_pre_hook(HalfInputs(self._half), with_kwargs=True)
        self._half = None
        try:
            return self._forward(inputs)
        except Exception:
            hook.remove()
            raise

    def _forward(self, inputs: Any) -> Any:
        """What the network gives; where that is not kept it may be no tensor, which a `Model` refuses."""
        if self.has_output:
            return self.network(inputs)
        return self._net(self._prepared(inputs))

    def _log(self, probabilities: Tensor) -> tuple[Tensor, int]:
        if bool((probabilities < 0).any()) or bool((probabilities > 1 + 1e-6).any()):
            raise TeacherError(
                f"teacher {self.name!r}: output={self.output}, but probabilities outside [0, 1] came out"
            )
        held = probabilities.clamp(PROBABILITY_FLOOR, 1.0)
        floored = int((probabilities < PROBABILITY_FLOOR).sum())
        if not self.multi_label:
            return held.log(), floored
        below = (1 - probabilities).clamp(PROBABILITY_FLOOR, 1.0)
        return held.log() - below.log(), floored + int((1 - probabilities < PROBABILITY_FLOOR).sum())

    def check_first_batch(self, batch: Any) -> None:
        """Run one batch twice and look at it hard, before anything is written.

        Raises:
            TeacherError: train mode, changed buffers, another output the second time, or probabilities declared as logits.
        """
        output = self(batch)
        first, second = self._answers_of(output), self.answers(batch)
        self._check_frozen()
        if self.fingerprint is None:
            self.fingerprint = hashlib.sha256(first.cpu().numpy().tobytes() + self._taken.encode()).hexdigest()
        self._check_same(first, second, "gave two outputs for one batch")
        self.first_batch = batch, first
        if self.output == "logits" and len(first) and not self.multi_label:
            self._refuse_probabilities(first if output.whole is None else output.whole)

    def _refuse_probabilities(self, values: Tensor) -> None:
        sums = values.sum(dim=1)
        if bool((values >= 0).all()) and bool((sums - 1).abs().amax() < 1e-3):
            raise TeacherError(
                f"teacher {self.name!r} was declared to give logits, but its rows are probabilities (they sum to one)",
                tip="declare it: add output=probs to the teacher's spec",
            )
        if float(values.logsumexp(dim=1).abs().amax()) < 1e-3:
            raise TeacherError(
                f"teacher {self.name!r} was declared to give logits, but its rows are log-probabilities",
                tip="declare it: add output=log_probs to the teacher's spec, or drop its last log_softmax",
            )

    def is_first_again(self, logits: Tensor) -> Tensor:
        """(B,) bool: the rows that are the first row of the first batch, but for a rounding."""
        if self.first_batch is None or not len(self.first_batch[1]):
            return torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        first = self.first_batch[1][0]
        return (logits - first).abs().amax(dim=1) <= 1e-5 * first.abs().amax().clamp(min=1.0)

    @property
    def rounds(self) -> bool:
        """Whether its last layer computed in a half type, which counts into eps."""
        return self.compute_dtype in ("float16", "bfloat16")

    def check_at_end(self) -> None:
        """After the last batch: TeacherError for a teacher that learned, or changed its mind, during the dump."""
        self._check_frozen()
        if self.first_batch is not None:
            batch, before = self.first_batch
            self._check_same(
                before, self.answers(batch), "gave another output for the first batch than before the dump"
            )

    def _check_same(self, before: Tensor, now: Tensor, what: str) -> None:
        scale = max(1.0, float(before.abs().amax())) if before.numel() else 1.0
        tolerance = 0.0 if self.device.type == "cpu" else 1e-4 * scale
        difference = float((before - now).abs().amax()) if before.numel() else 0.0
        if difference > tolerance:
            raise TeacherError(
                f"teacher {self.name!r} {what}, up to {difference:.3g} apart",
                tip="switch off dropout and sampling in the teacher; its logits must be a function of the input",
            )

    def _check_frozen(self) -> None:
        """Every module in eval mode, every buffer (BatchNorm statistics) as it was."""
        if not isinstance(self.network, nn.Module):
            return
        if any(module.training for module in self.network.modules()):
            raise TeacherError(
                f"teacher {self.name!r} has modules in train mode: dropout and BatchNorm would make its logits random",
                tip="do not call train() in the module's forward",
            )
        changed = self._state.changed()
        if changed is not None:
            raise TeacherError(
                f"teacher {self.name!r} changed its {changed} while it ran",
                tip="run it in eval mode; a teacher must not learn during a dump",
            )


def _is_out_of_memory(exc: Exception) -> bool:
    """Also of a CPU, for which torch has no error of its own."""
    return isinstance(exc, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(exc)


def _count(batch: Any) -> int:
    """How many samples a collated batch holds: the length of its first array."""
    while isinstance(batch, Mapping | tuple):
        batch = next(iter(batch.values() if isinstance(batch, Mapping) else batch))
    return len(batch)

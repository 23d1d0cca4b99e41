"""Losses over a vocabulary from the student's last hidden states and its head, in pieces: no (tokens x vocabulary) tensor."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from softcache.errors import LossError

LEAST = 256  # positions of a piece: below it the products of a head wait for memory
PIECE = 2**23  # logits of a piece, where that is more positions
STRIP = {"cpu": 2**18}  # logits of some rows of a piece, of which losses are computed: what caches hold
STRIP_ELSEWHERE = 2**22
LEAST_STRIP = 8  # rows
WIDENED = 2**22  # numbers of a head in a half type that are widened at a time
OF_TEACHER = ("teacher_logits", "head_ids", "head_logits", "tail_logsumexp")

Targets = Callable[[int, int, float], Mapping[str, Tensor]]


@dataclass(frozen=True)
class HeadTerm:
    """A loss of the pass, row by row; `softcache.losses.head_term` makes it of a term and refuses what cannot be one.

    Attributes:
        name: of the loss.
        loss: a mean over its rows, of student_logits and what else its signature names: teacher_logits, or head_ids,
            head_logits and tail_logsumexp; labels.
        over: what the mean runs over: "samples" (here positions), or "labels": those with a label.
        weight: in the total.
        settings: of the loss, its temperature among them.
        count: what its sum is divided by; None: the positions of this call that its mean is over. Where a batch comes in pieces
            or is shared by processes, the count of all of it: then the sum over the calls is the mean over the batch.
    """

    name: str
    loss: Callable[..., Tensor]
    over: str = "samples"
    weight: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    count: float | Tensor | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """What the loss is given, beside its settings."""
        found = inspect.signature(self.loss).parameters
        return tuple(name for name, p in found.items() if p.default is p.empty)

    @property
    def of_teacher(self) -> tuple[str, ...]:
        return tuple(name for name in self.inputs if name in OF_TEACHER)

    @property
    def temperature(self) -> float:
        return float(self.settings.get("temperature", 1.0))


@dataclass(frozen=True)
class HeadLoss:
    """What `head_loss` found.

    Attributes:
        total: () the weighted sum of the terms; its gradient is known already.
        values: (terms,) float64, each term's sum over its count, without weight and without gradient.
    """

    total: Tensor
    values: Tensor


@dataclass(frozen=True)
class _Asked:
    """What the pass is about, beside the tensors that have gradients."""

    terms: Sequence[HeadTerm]
    coefficients: Sequence[float | Tensor]  # of a term's sum in the total
    targets: Targets | None
    labels: Tensor | None
    recorded: Tensor | None
    scale: float
    cap: float | None

    def records_at(self, edges: Sequence[int]) -> list[int]:
        """How many records lie before each position."""
        if self.recorded is None:
            return list(edges)
        return torch.searchsorted(self.recorded, torch.tensor(edges, device=self.recorded.device)).tolist()


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | Targets | None,
    terms: Sequence[HeadTerm],
    labels: Tensor | None = None,
    *,
    recorded: Tensor | None = None,
    adapter: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0,
    cap: float | None = None,
) -> HeadLoss:
    """Losses on the logits scale * cap(hidden @ weight.T + bias), which are never all there: value and gradients in one pass.

    A piece of at least 256 positions is computed at a time, as are its teacher's rows; of each, losses, their gradients and
    what these add to those of hidden, weight and bias, which `backward` only scales. There are at most three tensors of the
    size of a piece x the vocabulary. What the head is of half types is multiplied and summed in float32, and its gradient is
    float32 until backward; autocast has no part in it. A second backward through the same graph makes the gradient anew; it has
    no gradient of its own.

    Args:
        hidden: (P, D), any float dtype: what the head takes at each position. A position without label and record trains
            nothing: leave those out where they are many, as the tokens of prompts are.
        weight: (C, D) of the head. An embedding that is the head too gets both gradients. One that does not learn costs none.
        bias: (C,), or None.
        targets: the teacher's (Q, C) logits, or a function of (first record, last one, not included, temperature) that gives
            what the losses take of these: teacher_logits (n, C); or head_ids (n, k), head_logits (n, k) and tail_logsumexp
            (n,) at the temperature. It is asked once for each piece and temperature. None: no term learns from a teacher.
        terms: at least one.
        labels: (P,) int64, the class of each position, -1 = none.
        recorded: (Q,) int64, rising: the positions that have a record. None: all of them.
        adapter: (down, up) of (r, D) and (C, r), what is learned beside a frozen head (LoRA): the head is weight + up @ down.
        scale: what the logits are multiplied with.
        cap: > 0, of cap * tanh(logit / cap), before the scale; None: none.

    Returns:
        total and values, in the units of the losses.

    Raises:
        ValueError: shapes that do not fit, no terms, or a loss refuses its settings.
        LossError: what a term takes is not given; a second derivative.
        IndexError: a label beyond the classes.

    Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2024), and Hsu et al., "Liger Kernel" (2024),
        for gradients of a head that are made in the forward pass.

    Example:
        >>> from softcache.losses import head_term, make_term
        >>> hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(10, 4, requires_grad=True)
        >>> terms = [head_term(make_term("kd", temperature=2.0, weight=0.9)), head_term(make_term("ce", weight=0.1))]
        >>> found = head_loss(hidden, weight, None, torch.randn(6, 10), terms, torch.tensor([3, 1, 4, 1, 5, -1]))
        >>> found.total.backward()
        >>> weight.grad.shape, found.values.shape
        (torch.Size([10, 4]), torch.Size([2]))
    """
    _check(hidden, weight, bias, adapter, cap)
    _check_given(terms, targets, labels, recorded, len(hidden))
    if isinstance(targets, Tensor):
        dense = targets
        targets = lambda first, last, _: {"teacher_logits": dense[first:last]}  # noqa: E731
    counts = [_count(term, labels, recorded, len(hidden)) for term in terms]
    coefficients = [term.weight / count for term, count in zip(terms, counts, strict=True)]
    asked = _Asked(terms, coefficients, targets, labels, recorded, scale, cap)
    low, up = (None, None) if adapter is None else (F.linear(hidden, adapter[0].to(hidden.dtype)), adapter[1])
    tensors = (hidden, weight, bias, low, up)
    wanted = tuple(torch.is_grad_enabled() and one is not None and one.requires_grad for one in tensors)
    total, sums = _HeadLoss.apply(asked, wanted, *tensors)
    divided = [one / count for one, count in zip(sums.unbind(), counts, strict=True)]
    return HeadLoss(total, torch.stack(divided))


class _HeadLoss(torch.autograd.Function):
    """The total and each term's sum; gradients are made with them."""

    @staticmethod
    def forward(
        ctx: Any, asked: _Asked, wanted: tuple[bool, ...], hidden: Tensor, weight: Tensor, *others: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        bias, low, up = others
        with torch.autocast(hidden.device.type, enabled=False):
            sums, ctx.gradients = _pass(asked, wanted, hidden, weight, bias, low, up)
        ctx.asked, ctx.wanted = asked, wanted
        ctx.save_for_backward(hidden, weight, *others)
        ctx.dtypes = [None if one is None else one.dtype for one in (hidden, weight, *others)]
        ctx.mark_non_differentiable(sums)
        weighted = [one * part for one, part in zip(sums.unbind(), asked.coefficients, strict=True)]
        return torch.stack(weighted).sum().to(_computed_in(hidden, weight)), sums

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise LossError(
                "head_loss has no second derivative: its gradient is made in the forward pass",
                tip="leave create_graph out, or compute the logits and use the losses on them",
            )
        gradients, ctx.gradients = ctx.gradients, None  # the caller's from here on: they may be changed
        if gradients is None:  # a second backward through the same graph
            hidden, weight, *others = ctx.saved_tensors
            _, gradients = _pass(ctx.asked, ctx.wanted, hidden, weight, *others)
        scaled = [
            None if one is None else one.mul_(upstream).to(dtype)
            for one, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return None, None, *scaled


def _pass(
    asked: _Asked,
    wanted: Sequence[bool],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
) -> tuple[Tensor, list[Tensor | None]]:
    """(terms,) float64 sums, and the total's gradients of the tensors that want one, in the dtype of the computation."""
    tensors = (hidden, weight, bias, low, up)
    dtype, classes = _computed_in(hidden, weight), len(weight)
    gradients = [
        torch.zeros_like(one, dtype=dtype) if one is not None and want else None
        for one, want in zip(tensors, wanted, strict=True)
    ]
    strip, height = _heights(classes, hidden.device)
    buffer = torch.empty(min(height, len(hidden)), classes, dtype=dtype, device=hidden.device)
    sums = torch.zeros(len(asked.terms), dtype=torch.float64, device=hidden.device)
    for start in range(0, len(hidden), height):
        inputs = hidden[start : start + height].to(dtype)
        logits = buffer[: len(inputs)]
        _multiply(inputs, weight, logits)
        beside = None if low is None else low[start : start + height].to(dtype)
        if beside is not None and up is not None:
            logits.addmm_(beside, up.to(dtype).T)
        _losses_of_piece(asked, logits, bias, start, strip, sums, with_gradient=any(wanted))
        _add_gradients(gradients, logits, inputs, weight, beside, up, start)
    return sums, gradients


def _losses_of_piece(
    asked: _Asked, logits: Tensor, bias: Tensor | None, start: int, strip: int, sums: Tensor, *, with_gradient: bool
) -> None:
    """Adds to the sums, and leaves the total's gradient in place of what the head's product gave."""
    edges = [*range(0, len(logits), strip), len(logits)]
    records = asked.records_at([start + edge for edge in edges])
    given = _given(asked, records[0], records[-1])
    for number, (top, bottom) in enumerate(pairwise(edges)):
        rows = logits[top:bottom]
        if bias is not None:
            rows += bias.to(rows.dtype)
        places = slice(start + top, start + bottom)
        own = slice(records[number] - records[0], records[number + 1] - records[0])
        recorded = (
            None if asked.recorded is None else asked.recorded[records[number] : records[number + 1]] - places.start
        )
        leaf = rows.detach().requires_grad_(with_gradient)
        with torch.set_grad_enabled(with_gradient):
            student = _scaled(leaf, asked.scale, asked.cap)
            labels = None if asked.labels is None else asked.labels[places]
            found = [_sum_of(term, student, labels, recorded, given, own) for term in asked.terms]
            parts = [one * part for one, part in zip(found, asked.coefficients, strict=True) if one is not None]
            total = torch.stack(parts).sum() if parts else None
        if with_gradient:
            rows.copy_(torch.autograd.grad(total, leaf)[0]) if total is not None else rows.zero_()
        for index, one in enumerate(found):
            if one is not None:
                sums[index] += one.detach()


def _given(asked: _Asked, first: int, last: int) -> dict[float, Mapping[str, Tensor]]:
    """Temperature -> what the teacher gives of the records of a piece."""
    found: dict[float, Mapping[str, Tensor]] = {}
    for term in asked.terms:
        if not term.of_teacher or first == last:
            continue
        assert asked.targets is not None
        if term.temperature not in found:
            found[term.temperature] = asked.targets(first, last, term.temperature)
        there = found[term.temperature]
        for name in term.of_teacher:
            if name not in there:
                raise LossError(
                    f"loss {term.name!r} takes {name}, and the targets give {', '.join(there)}",
                    tip="use kd and the others on whole rows, or of the k largest classes kd_lower_bound and its like",
                )
            if len(there[name]) != last - first:
                raise ValueError(f"the targets gave {len(there[name])} rows of {name} for records {first} to {last}")
    return found


def _sum_of(
    term: HeadTerm,
    student: Tensor,
    labels: Tensor | None,
    recorded: Tensor | None,
    given: Mapping[float, Mapping[str, Tensor]],
    own: slice,
) -> Tensor | None:
    """() of some rows, over what the term's mean is over; None where they are none."""
    inputs: dict[str, Tensor] = {"student_logits": student}
    if labels is not None:
        inputs["labels"] = labels
    if term.of_teacher:
        if own.start == own.stop:
            return None
        if recorded is not None and len(recorded) < len(student):
            inputs = {name: one[recorded] for name, one in inputs.items()}
        inputs |= {name: given[term.temperature][name][own] for name in term.of_teacher}
    mean = term.loss(**{name: inputs[name] for name in term.inputs}, **term.settings)
    return mean * ((inputs["labels"] >= 0).sum() if term.over == "labels" else len(inputs["student_logits"]))


def _add_gradients(
    gradients: Sequence[Tensor | None],
    of_logits: Tensor,
    inputs: Tensor,
    weight: Tensor,
    beside: Tensor | None,
    up: Tensor | None,
    start: int,
) -> None:
    """What the gradient of a piece's logits adds to those of hidden, weight, bias, low and up."""
    of_hidden, of_weight, of_bias, of_low, of_up = gradients
    rows = slice(start, start + len(of_logits))
    if of_hidden is not None:
        for block in _blocks(weight, of_logits.dtype):
            of_hidden[rows].addmm_(of_logits[:, block], weight[block].to(of_logits.dtype))
    if of_weight is not None:
        of_weight.addmm_(of_logits.T, inputs)
    if of_bias is not None:
        of_bias += of_logits.sum(dim=0)
    if of_low is not None and up is not None:
        of_low[rows] = of_logits @ up.to(of_logits.dtype)
    if of_up is not None and beside is not None:
        of_up.addmm_(of_logits.T, beside)


def _multiply(inputs: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = inputs @ weight.T, of a head in a half type too, block by block."""
    if weight.dtype == out.dtype:
        torch.mm(inputs, weight.T, out=out)
        return
    for block in _blocks(weight, out.dtype):
        out[:, block] = inputs @ weight[block].to(out.dtype).T


def _blocks(weight: Tensor, dtype: torch.dtype) -> list[slice]:
    """Rows of the head that are taken at a time: all, or as many as are widened at a time."""
    classes = len(weight)
    size = classes if weight.dtype == dtype else max(1, WIDENED // weight.shape[1])
    return [slice(first, min(first + size, classes)) for first in range(0, classes, size)]


def _scaled(logits: Tensor, scale: float, cap: float | None) -> Tensor:
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits if scale == 1.0 else scale * logits


def _heights(classes: int, device: torch.device) -> tuple[int, int]:
    """Rows of a strip, and of a piece: a number of strips."""
    strip = max(LEAST_STRIP, STRIP.get(device.type, STRIP_ELSEWHERE) // classes)
    return strip, strip * -(-max(LEAST, PIECE // classes) // strip)


def _computed_in(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def _count(term: HeadTerm, labels: Tensor | None, recorded: Tensor | None, positions: int) -> float | Tensor:
    """What the term's sum is divided by: its own count, or of this call what its mean is over; 1 for none."""
    if term.count is not None:
        return term.count.double() if isinstance(term.count, Tensor) else term.count
    if term.over == "labels" and labels is not None:
        chosen = labels if recorded is None or not term.of_teacher else labels[recorded]
        return max(1, int((chosen >= 0).sum()))
    return max(1, positions if recorded is None or not term.of_teacher else len(recorded))


def _check(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, adapter: tuple[Tensor, Tensor] | None, cap: float | None
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden states {tuple(hidden.shape)} and head {tuple(weight.shape)} do not fit: they must be (P, D) and (C, D); "
            "flatten all axes of the hidden states but the last"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({len(weight)},), one for each row of the head, got {tuple(bias.shape)}")
    if adapter is not None:
        down, up = adapter
        if down.ndim != 2 or down.shape[1] != weight.shape[1] or up.shape != (len(weight), len(down)):
            raise ValueError(
                f"adapter {tuple(down.shape)} and {tuple(up.shape)} does not fit a head {tuple(weight.shape)}: "
                "its parts must be (r, D) and (C, r)"
            )
    if cap is not None and not cap > 0:
        raise ValueError(f"cap must be > 0, got {cap}; None is none")


def _check_given(
    terms: Sequence[HeadTerm],
    targets: Tensor | Targets | None,
    labels: Tensor | None,
    recorded: Tensor | None,
    positions: int,
) -> None:
    if not terms:
        raise ValueError("head_loss needs at least one term")
    if labels is not None and labels.shape != (positions,):
        raise ValueError(f"labels must be ({positions},), one for each position, got {tuple(labels.shape)}")
    if recorded is not None and (recorded.ndim != 1 or recorded.dtype != torch.int64):
        raise ValueError(f"recorded must be (Q,) int64 positions, got {tuple(recorded.shape)} {recorded.dtype}")
    if recorded is not None and len(recorded):
        first, last = int(recorded[0]), int(recorded[-1])
        if first < 0 or last >= positions or not bool((recorded.diff() > 0).all()):
            raise ValueError(f"recorded must rise, from 0 to at most {positions - 1}, each position once")
    rows = positions if recorded is None else len(recorded)
    if isinstance(targets, Tensor) and len(targets) != rows:
        raise ValueError(f"{len(targets)} rows of teacher logits for {rows} positions with a record")
    for term in terms:
        _check_settings(term)
        for name, missing in (("labels", labels is None), ("targets", targets is None)):
            if missing and (name in term.inputs if name == "labels" else term.of_teacher):
                raise LossError(f"loss {term.name!r} needs {name}, and head_loss was given none", tip=f"give {name}=")


def _check_settings(term: HeadTerm) -> None:
    """LossError for a temperature of each position, and for what learns: it has no gradient here."""
    tensors = {key: one for key, one in term.settings.items() if isinstance(one, Tensor)}
    learned = [key for key, one in tensors.items() if one.requires_grad or key == "temperature"]
    if learned:
        raise LossError(
            f"loss {term.name!r} has {' and '.join(learned)} as a tensor: a temperature of each position, or a learned one, has "
            "no gradient where that of the head is made at once",
            tip="give a number",
        )

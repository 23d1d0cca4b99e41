"""`head_loss` beside the losses on all the logits at once: values, and gradients of hidden states, head, bias and adapter."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from softcache.errors import LossError
from softcache.losses import LOSSES, HeadLoss, LossTerm, ce, head_loss, head_term, kd, make_term
from softcache.losses.schedules import Moment

P, D, C, K = 37, 6, 11, 3
ALONE = [  # row by row
    name for name, loss in LOSSES.items() if not (loss.has_features or loss.module or loss.over == "batch")
]
module = importlib.import_module("softcache.losses.head_loss")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 8 positions in strips of 4: neither divides 37."""
    for name, value in (("LEAST", 8), ("PIECE", 1), ("STRIP", {"cpu": 1}), ("LEAST_STRIP", 4), ("WIDENED", 4 * D)):
        monkeypatch.setattr(module, name, value)


def numbers(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.from_numpy(np.random.default_rng([seed, *shape]).normal(0, scale, shape))


class World:
    """A head with all that goes into it, in float64."""

    def __init__(self) -> None:
        self.hidden, self.weight, self.bias = numbers(P, D, seed=1), numbers(C, D, seed=2), numbers(C, seed=3)
        self.down, self.up = numbers(2, D, seed=4), numbers(C, 2, seed=5)
        self.teacher = numbers(P, C, seed=6, scale=3.0)
        self.labels = torch.from_numpy(np.random.default_rng(7).integers(0, C, P))
        self.labels[5:15] = -1  # a whole piece without one, and more
        self.recorded = torch.tensor([*range(2, 10), *range(24, 31), 36])

    def leaves(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        named = {name: getattr(self, name) for name in ("hidden", "weight", "bias", "down", "up")}
        return {name: one.to(dtype, copy=True).requires_grad_() for name, one in named.items()}

    def given(self, rows: Tensor, temperature: float) -> dict[str, Tensor]:
        """What a dense loss takes of some positions' teacher."""
        teacher = self.teacher[rows]
        logits, ids = teacher.topk(K, dim=1)
        tail = (teacher / temperature).scatter(1, ids, -torch.inf).logsumexp(dim=1)
        return {"teacher_logits": teacher, "head_ids": ids, "head_logits": logits, "tail_logsumexp": tail}


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def temperature_of(term: LossTerm) -> float:
    return float(term.settings_at(Moment()).get("temperature", 1.0))


def dense(
    world: World,
    leaves: Mapping[str, Tensor],
    terms: Sequence[LossTerm],
    *,
    bias: bool = True,
    recorded: Tensor | None = None,
    adapter: bool = False,
    scale: float = 1.0,
    cap: float | None = None,
) -> tuple[Tensor, list[float]]:
    """All logits at once, and torch's own gradients."""
    weight = leaves["weight"] + leaves["up"] @ leaves["down"] if adapter else leaves["weight"]
    logits = leaves["hidden"] @ weight.T
    logits = logits + leaves["bias"] if bias else logits
    logits = scale * (logits if cap is None else cap * (logits / cap).tanh())
    rows = torch.arange(P) if recorded is None else recorded
    values = []
    for term in terms:
        mine = rows if term.loss.has_teacher else torch.arange(P)
        known = world.given(mine, temperature_of(term)) | {"student_logits": logits[mine], "labels": world.labels[mine]}
        settings = {k: v for k, v in term.settings_at(Moment()).items() if k != "class_weights"}
        values.append(term.loss.function(**{name: known[name] for name in term.loss.inputs}, **settings))
    weights = [term.weight.at(Moment()) for term in terms]
    total = torch.stack([w * value for w, value in zip(weights, values, strict=True)]).sum()
    return total, [value.item() for value in values]


def in_pieces(
    world: World,
    leaves: Mapping[str, Tensor],
    terms: Sequence[LossTerm],
    *,
    bias: bool = True,
    recorded: Tensor | None = None,
    adapter: bool = False,
    scale: float = 1.0,
    cap: float | None = None,
) -> HeadLoss:
    rows = torch.arange(P) if recorded is None else recorded
    return head_loss(
        leaves["hidden"],
        leaves["weight"],
        leaves["bias"] if bias else None,
        lambda first, last, temperature: world.given(rows[first:last], temperature),
        [head_term(term) for term in terms],
        world.labels,
        recorded=recorded,
        adapter=(leaves["down"], leaves["up"]) if adapter else None,
        scale=scale,
        cap=cap,
    )


def compared(
    world: World, terms: Sequence[LossTerm], dtype: torch.dtype = torch.float64, within: float = 1e-5, **how: Any
) -> None:
    """Values, and gradients relative to the largest entry, with those of all the logits at once in float64."""
    exact, mine = world.leaves(), world.leaves(dtype)
    wanted, values = dense(world, exact, terms, **how)
    found = in_pieces(world, mine, terms, **how)
    assert found.total.shape == () and found.total.dtype == dtype and found.values.dtype == torch.float64
    assert found.total.item() == pytest.approx(wanted.item(), rel=within, abs=within)
    assert found.values.tolist() == pytest.approx(values, rel=within, abs=within)
    assert not found.values.requires_grad
    wanted.backward()
    (3.0 * found.total).backward()
    for name, leaf in mine.items():
        theirs = exact[name].grad
        assert (leaf.grad is None) == (theirs is None), name
        if leaf.grad is not None and theirs is not None:
            assert leaf.grad.dtype == dtype
            error = float((leaf.grad.double() / 3 - theirs).abs().max() / theirs.abs().max())
            assert error <= within, (name, error)


# ------------------------------------------------------------------------------------------------------ beside the whole


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ALONE)
def test_every_loss_and_ce_are_those_of_all_the_logits(name: str, dtype: torch.dtype, world: World) -> None:
    within = 1e-12 if dtype == torch.float64 else 1e-5
    terms = [make_term(name, weight=0.7), make_term("ce", weight=0.2, smoothing=0.1)]
    compared(world, terms, dtype, within)
    compared(world, terms[:1], dtype, within, recorded=world.recorded, bias=False, scale=0.5, cap=1.5)


WAYS: dict[str, dict[str, Any]] = {
    "without a bias": {"bias": False},
    "some positions with a record": {"recorded": torch.tensor([0, 1, 7, 8, 20, 35])},
    "no position with a record": {"recorded": torch.zeros(0, dtype=torch.int64)},
    "a scale": {"scale": 0.25},
    "a cap": {"cap": 2.0},
    "a scale and a cap": {"scale": 3.0, "cap": 0.5},
    "an adapter": {"adapter": True},
    "an adapter, a cap and some records": {"adapter": True, "cap": 2.0, "recorded": torch.tensor([3, 4, 5, 36])},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_make_logits_and_to_leave_positions_out(way: str, dtype: torch.dtype, world: World) -> None:
    how, within = dict(WAYS[way]), 1e-12 if dtype == torch.float64 else 1e-5
    terms = [
        make_term("kd", temperature=2.0, weight=0.7),
        make_term("ce", weight=0.2),
        make_term("dkd", temperature=3.0),
    ]
    terms += [make_term("jsd_lower_bound", temperature=1.5), make_term("kd", temperature=4.0)]
    if how.get("recorded") is not None and not len(how["recorded"]):
        found = in_pieces(world, world.leaves(dtype), terms, **how)
        assert found.values[[0, 2, 3, 4]].tolist() == [0.0] * 4 and found.values[1] > 1
        terms = [make_term("ce", weight=0.2)]
    compared(world, terms, dtype, within, **how)


@pytest.mark.parametrize("name", ["ce", "kd", "skew_kl", "tvd_lower_bound"])
def test_the_gradient_is_that_of_the_value(name: str, world: World) -> None:
    leaves = world.leaves()
    few = {k: v[:9].detach().requires_grad_() if k == "hidden" else v for k, v in leaves.items()}
    terms = [head_term(make_term(name))]

    def value(*tensors: Tensor) -> Tensor:
        hidden, weight, bias, down, up = tensors
        given = lambda first, last, t: world.given(torch.arange(first, last), t)  # noqa: E731
        return head_loss(
            hidden, weight, bias, given, terms, world.labels[:9], adapter=(down, up), scale=1.5, cap=3.0
        ).total

    assert torch.autograd.gradcheck(value, tuple(few.values()), fast_mode=True)


@pytest.mark.parametrize("height", [4, 8, 36, 40, 400])
def test_whatever_the_pieces(height: int, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST", height)
    compared(world, [make_term("kd"), make_term("ce")], within=1e-12, recorded=world.recorded)


def test_a_mask_that_is_one_position_off_is_seen(world: World) -> None:
    terms = [make_term("kd", temperature=2.0)]
    right = in_pieces(world, world.leaves(), terms, recorded=world.recorded).total.item()
    wanted = dense(world, world.leaves(), terms, recorded=world.recorded)[0].item()
    rows = world.recorded
    shifted = head_loss(
        world.hidden, world.weight, world.bias, world.teacher[rows], [head_term(one) for one in terms],
        recorded=rows - 1,
    ).total.item()  # fmt: skip
    assert right == pytest.approx(wanted, rel=1e-12) and abs(shifted / wanted - 1) > 1e-2


def test_pieces_are_of_256_positions_at_least_and_strips_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for classes in (10, 4096, 32_000, 151_936, 2**24):
        strip, height = module._heights(classes, torch.device("cpu"))
        assert height >= 256 and height % strip == 0
        assert height * classes <= max(2 * module.PIECE, 264 * classes)
        assert strip == 8 or strip * classes <= 2**18


def test_the_teacher_is_asked_once_for_each_piece_and_temperature(world: World) -> None:
    asked: list[tuple[int, int, float]] = []

    def targets(first: int, last: int, temperature: float) -> Mapping[str, Tensor]:
        asked.append((first, last, temperature))
        return world.given(torch.arange(first, last), temperature)

    terms = [make_term("kd", temperature=2), make_term("jsd", temperature=2), make_term("mse_logits"), make_term("ce")]
    head_loss(world.hidden, world.weight, None, targets, [head_term(one) for one in terms], world.labels)
    pieces = [(0, 8), (8, 16), (16, 24), (24, 32), (32, 37)]
    assert asked == [(*piece, temperature) for piece in pieces for temperature in (2.0, 1.0)]


# ------------------------------------------------------------------------------------------------------- sums and counts


def test_a_batch_in_several_calls_is_divided_once_by_the_count_of_all(world: World) -> None:
    terms = [make_term("kd", weight=0.7), make_term("ce", weight=0.3), make_term("dkd")]
    whole = world.leaves()
    wanted, values = dense(world, whole, terms, recorded=world.recorded)
    wanted.backward()
    labelled = world.labels >= 0
    counts = [len(world.recorded), torch.tensor(int(labelled.sum())), int(labelled[world.recorded].sum())]
    leaves = world.leaves()
    found = []
    for first, last in ((0, 5), (5, 30), (30, P)):
        mine = world.recorded[(world.recorded >= first) & (world.recorded < last)]
        part = head_loss(
            leaves["hidden"][first:last], leaves["weight"], leaves["bias"], world.teacher[mine],
            [head_term(term, count=count) for term, count in zip(terms, counts, strict=True)],
            world.labels[first:last], recorded=mine - first,
        )  # fmt: skip
        part.total.backward()
        found.append(part.values)
    assert torch.stack(found).sum(dim=0).tolist() == pytest.approx(values, rel=1e-12)
    for name in ("hidden", "weight", "bias"):
        torch.testing.assert_close(leaves[name].grad, whole[name].grad, rtol=1e-11, atol=1e-15)


def test_no_position_at_all_is_a_zero_in_which_everything_has_a_part(world: World) -> None:
    leaves = {
        name: one[:0].detach().requires_grad_() if name == "hidden" else one for name, one in world.leaves().items()
    }
    found = head_loss(
        leaves["hidden"], leaves["weight"], leaves["bias"], world.teacher[:0],
        [head_term(make_term("kd")), head_term(make_term("ce"))], world.labels[:0],
    )  # fmt: skip
    found.total.backward()
    assert found.total.item() == 0.0 and leaves["weight"].grad is not None and not leaves["weight"].grad.any()


# -------------------------------------------------------------------------------------------------------- kinds of heads


def test_an_embedding_that_is_the_head_too_gets_both_gradients(world: World) -> None:
    ids = torch.from_numpy(np.random.default_rng(8).integers(0, C, P))
    grads = []
    for whole in (True, False):
        table = nn.Embedding.from_pretrained(world.weight.clone(), freeze=False)
        hidden = torch.tanh(table(ids))
        if whole:
            logits = hidden @ table.weight.T
            loss = kd(logits, world.teacher) + ce(logits, world.labels)
        else:
            terms = [head_term(make_term("kd")), head_term(make_term("ce"))]
            loss = head_loss(hidden, table.weight, None, world.teacher, terms, world.labels).total
        loss.backward()
        grads.append(table.weight.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-12, atol=1e-15)


def test_a_frozen_head_costs_no_gradient_and_its_adapter_has_one(world: World) -> None:
    wanted, mine = world.leaves(), world.leaves()
    for leaves in (wanted, mine):
        leaves["weight"].requires_grad_(False)
        leaves["bias"].requires_grad_(False)
    terms = [make_term("kd")]
    dense(world, wanted, terms, adapter=True)[0].backward()
    found = in_pieces(world, mine, terms, adapter=True).total
    assert [one is None for one in found.grad_fn.gradients] == [False, True, True, False, False]  # type: ignore[union-attr]
    found.backward()
    for name in ("hidden", "down", "up"):
        torch.testing.assert_close(mine[name].grad, wanted[name].grad, rtol=1e-12, atol=1e-15)
    assert mine["weight"].grad is None


def test_without_a_gradient_none_is_made(world: World) -> None:
    leaves = world.leaves()
    with torch.no_grad():
        found = in_pieces(world, leaves, [make_term("kd")])
    assert not found.total.requires_grad
    assert found.total.item() == pytest.approx(dense(world, leaves, [make_term("kd")])[0].item(), rel=1e-12)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_a_head_in_a_half_type_is_multiplied_and_summed_in_float32(half: torch.dtype, world: World) -> None:
    """Nothing is rounded but what comes in and what goes out; a scale as that of AMP keeps small gradients."""
    terms = [make_term("kd"), make_term("ce")]
    leaves = world.leaves(half)
    exact = {name: one.detach().double().requires_grad_() for name, one in leaves.items()}
    wanted = dense(world, exact, terms)[0]
    found = in_pieces(world, leaves, terms)
    assert found.total.dtype == torch.float32 and found.total.item() == pytest.approx(wanted.item(), rel=1e-5)
    wanted.backward()
    (1024 * found.total).backward()
    for name in ("hidden", "weight", "bias"):
        grad, theirs = leaves[name].grad, exact[name].grad
        assert grad is not None and theirs is not None and grad.dtype == half
        assert float((grad.double() / 1024 - theirs).abs().max() / theirs.abs().max()) < torch.finfo(half).eps


def test_autocast_has_no_part_in_it(world: World) -> None:
    leaves = world.leaves(torch.float32)
    plain = in_pieces(world, leaves, [make_term("kd")], adapter=False).total.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert in_pieces(world, leaves, [make_term("kd")], adapter=False).total.item() == plain


# -------------------------------------------------------------------------------------------------------------- refusals


def test_a_second_derivative_is_refused(world: World) -> None:
    leaves = world.leaves()
    with pytest.raises(LossError, match="no second derivative"):
        torch.autograd.grad(in_pieces(world, leaves, [make_term("kd")]).total, leaves["hidden"], create_graph=True)


def test_a_second_backward_through_one_graph_makes_the_gradient_anew(world: World) -> None:
    leaves = world.leaves()
    total = in_pieces(world, leaves, [make_term("kd")]).total
    (first,) = torch.autograd.grad(total, leaves["weight"], retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(2.0 * total, leaves["weight"])
    torch.testing.assert_close(first, kept, rtol=0, atol=0)
    torch.testing.assert_close(second, 2 * kept)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        total.backward()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ctkd", "learns a part of its own, as a temperature"),
        ("dist", "relates positions to one another"),
        ("hint", "looks at more than the logits"),
        ("crd", "learns a part of its own"),
    ],
)
def test_losses_that_do_not_take_each_row_alone_are_refused(name: str, message: str) -> None:
    with pytest.raises(LossError, match=f"loss '{name}' {message}"):
        head_term(make_term(name))


@pytest.mark.parametrize("temperature", [torch.ones(P), torch.tensor(2.0, requires_grad=True)], ids=["each", "learned"])
def test_a_temperature_of_each_position_or_a_learned_one_is_refused(temperature: Tensor, world: World) -> None:
    term = replace(head_term(make_term("kd")), settings={"temperature": temperature})
    with pytest.raises(LossError, match="'kd' has temperature as a tensor"):
        head_loss(world.hidden, world.weight, None, world.teacher, [term])


def test_weighted_classes_are_those_of_ce(world: World) -> None:
    weights = numbers(C, seed=9).abs()
    term = make_term("ce", class_weights="balanced", smoothing=0.1)
    with pytest.raises(LossError, match="class_weights, and no tensor"):
        head_term(term)
    logits = world.hidden @ world.weight.T
    wanted = ce(logits, world.labels, 0.1, class_weights=weights).item()
    found = head_loss(world.hidden, world.weight, None, None, [head_term(term, class_weights=weights)], world.labels)
    assert found.total.item() == pytest.approx(wanted, rel=1e-12)


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "hidden": ({"hidden": torch.zeros(2, P, D)}, r"\(2, 37, 6\) and head \(11, 6\) do not fit.*flatten"),
    "weight": ({"weight": torch.zeros(C, D + 1)}, r"must be \(P, D\) and \(C, D\)"),
    "bias": ({"bias": torch.zeros(C + 1)}, r"bias must be \(11,\)"),
    "adapter": ({"adapter": (torch.zeros(2, D), torch.zeros(2, C))}, r"its parts must be \(r, D\) and \(C, r\)"),
    "cap": ({"cap": 0.0}, "cap must be > 0, got 0.0"),
    "no terms": ({"terms": []}, "at least one term"),
    "labels": ({"labels": torch.zeros(P - 1, dtype=torch.int64)}, r"labels must be \(37,\)"),
    "recorded twice": ({"recorded": torch.tensor([1, 1])}, "must rise"),
    "recorded beyond": ({"recorded": torch.tensor([1, P])}, "from 0 to at most 36"),
    "a mask": ({"recorded": torch.ones(P, dtype=torch.bool)}, r"recorded must be \(Q,\) int64"),
    "rows": ({"recorded": torch.tensor([1, 5])}, "37 rows of teacher logits for 2 positions"),
    "narrow": ({"targets": torch.zeros(P, C - 1)}, "differ in shape"),
    "too few": (
        {"targets": lambda first, last, t: {"teacher_logits": torch.zeros(1, C)}},
        "gave 1 rows of teacher_logits",
    ),
    "no targets": ({"targets": None}, "loss 'kd' needs targets"),
    "no labels": ({"terms": [head_term(make_term("ce"))]}, "loss 'ce' needs labels"),
    "a head": (
        {"targets": lambda first, last, t: {"head_ids": torch.zeros(last - first, 1)}},
        "loss 'kd' takes teacher_logits, and the targets give head_ids",
    ),
}


@pytest.mark.parametrize("what", MISFITS)
def test_what_does_not_fit_is_refused(what: str, world: World) -> None:
    given: dict[str, Any] = {"hidden": world.hidden, "weight": world.weight, "bias": None, "targets": world.teacher}
    given |= {"terms": [head_term(make_term("kd"))]} | MISFITS[what][0]
    with pytest.raises((ValueError, LossError), match=MISFITS[what][1]):
        head_loss(**given)


def test_a_label_beyond_the_classes_is_refused(world: World) -> None:
    with pytest.raises(IndexError, match="out of bounds"):
        head_loss(world.hidden, world.weight, None, None, [head_term(make_term("ce"))], torch.full((P,), C))


def test_a_wider_head_is_given_by_its_first_rows_and_the_rest_gets_no_gradient(world: World) -> None:
    wide = torch.cat([world.weight, numbers(5, D, seed=10)]).requires_grad_()
    hidden = world.hidden.clone().requires_grad_()
    head_loss(hidden, wide[:C], None, world.teacher, [head_term(make_term("kd"))]).total.backward()
    exact = world.weight.clone().requires_grad_()
    kd(world.hidden @ exact.T, world.teacher).backward()
    assert wide.grad is not None and exact.grad is not None and not wide.grad[C:].any()
    torch.testing.assert_close(wide.grad[:C], exact.grad, rtol=1e-12, atol=1e-15)

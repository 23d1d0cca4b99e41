"""Losses between features: each against plain loops in float64, its gradient, its reduction, and inputs that could break it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from softcache.errors import LossError
from softcache.features.spec import attention, gram, spatial_gram
from softcache.losses import LOSSES
from softcache.losses.adapters import ADAPTERS, fit_map, make_adapter
from softcache.losses.contrast import Crd
from softcache.losses.features import Vid, ab, at, cosine, fsp, fsp_average, hint, ickd, nst, simkd, srrl
from softcache.losses.regression import huber as huber_loss
from softcache.losses.regression import mse
from softcache.losses.relations import cc, pkt, relational_kl, rkd_angle, rkd_distance, sp
from softcache.losses.review_kd import ReviewKd, hierarchical_context

# ---------------------------------------------------------------------------------------------------- oracles, in float64

Array = np.ndarray


def norm(x: Array) -> float:
    return math.sqrt(sum(float(v) ** 2 for v in x.ravel()))


def direction(x: Array) -> Array:
    length = norm(x)
    return x / length if length > 0 else np.zeros_like(x)


def huber(difference: float) -> float:
    return 0.5 * difference**2 if abs(difference) < 1 else abs(difference) - 0.5


def hint_oracle(student: Array, teacher: Array) -> float:
    return sum((a - b) ** 2 for a, b in zip(student.ravel(), teacher.ravel(), strict=True)) / student.size


def cosine_oracle(student: Array, teacher: Array) -> float:
    width = student.shape[-1]
    pairs = list(zip(student.reshape(-1, width), teacher.reshape(-1, width), strict=True))
    return sum(1 - float(np.dot(s, t)) / (norm(s) * norm(t)) for s, t in pairs) / len(pairs)


def distances(x: Array) -> Array:
    table = np.array([[norm(a - b) for b in x] for a in x])
    pairs = [table[i, j] for i in range(len(x)) for j in range(i)]
    return table / (sum(pairs) / len(pairs))


def rkd_distance_oracle(student: Array, teacher: Array) -> float:
    gaps = distances(student.reshape(len(student), -1)) - distances(teacher.reshape(len(teacher), -1))
    return sum(huber(gap) for gap in gaps.ravel()) / len(student) ** 2


def angle(x: Array, i: int, j: int, k: int) -> float:
    return float(np.dot(direction(x[i] - x[j]), direction(x[k] - x[j])))


def rkd_angle_oracle(student: Array, teacher: Array) -> float:
    n = len(student)
    triplets = [(i, j, k) for i in range(n) for j in range(n) for k in range(n)]
    return sum(huber(angle(student, *t) - angle(teacher, *t)) for t in triplets) / n**3


def pkt_oracle(student: Array, teacher: Array) -> float:
    total, n = 0.0, len(student)
    for i in range(n):
        rows = []
        for x in (teacher, student):
            row = [(1 + float(np.dot(direction(x[i]), direction(x[j])))) / 2 for j in range(n)]
            rows.append([value / sum(row) for value in row])
        total += sum(p * (math.log(p + 1e-7) - math.log(q + 1e-7)) for p, q in zip(*rows, strict=True))
    return total / n**2


def relational_kl_oracle(student: Array, teacher: Array, temperature: float = 0.1) -> float:
    total, n = 0.0, len(student)
    for i in range(n):
        rows = []
        for x in (teacher, student):
            row = [math.exp(float(np.dot(direction(x[i]), direction(x[j]))) / temperature) for j in range(n) if j != i]
            rows.append([value / sum(row) for value in row])
        total += sum(p * (math.log(p) - math.log(q)) for p, q in zip(*rows, strict=True))
    return total / n


def huber_oracle(student: Array, teacher: Array, delta: float = 1.0) -> float:
    gaps = [abs(a - b) for a, b in zip(student.ravel(), teacher.ravel(), strict=True)]
    return sum(gap**2 / 2 if gap <= delta else delta * (gap - delta / 2) for gap in gaps) / len(gaps)


def cc_oracle(student: Array, teacher: Array, gamma: float = 0.4) -> float:
    def kernel(x: Array, i: int, j: int) -> float:
        dot = float(np.dot(direction(x[i]), direction(x[j])))
        return math.exp(-2 * gamma) * sum((2 * gamma * dot) ** p / math.factorial(p) for p in range(3))

    n = len(student)
    gaps = [kernel(student, i, j) - kernel(teacher, i, j) for i in range(n) for j in range(n)]
    return sum(gap**2 for gap in gaps) / n**2


def sp_oracle(student: Array, teacher: Array) -> float:
    total, n = 0.0, len(student)
    for i in range(n):
        rows = [direction(np.array([float((x[i] * x[j]).sum()) for j in range(n)])) for x in (student, teacher)]
        total += norm(rows[0] - rows[1]) ** 2
    return total / n**2


WEIGHT, BIAS = np.random.default_rng(1).normal(size=(3, 6)), np.array([0.5, -1.0, 0.0])


def srrl_oracle(student: Array, teacher: Array, logits: str = "kl") -> float:
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        if logits == "mse":
            gaps = [float(row @ s) - float(row @ t) for row in WEIGHT]  # the bias is the same on both sides
            total += sum(gap**2 for gap in gaps) / len(gaps) / len(student)
            continue
        q, p = (np.exp(WEIGHT @ x + BIAS) / np.exp(WEIGHT @ x + BIAS).sum() for x in (s, t))
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / len(student)
    return total + hint_oracle(student, teacher)


def at_oracle(student: Array, teacher: Array) -> float:
    """Of maps (B, C, H, W)."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        total += norm(direction((s**2).mean(axis=0)) - direction((t**2).mean(axis=0))) ** 2
    return total / (len(student) * student[0, 0].size)


def nst_oracle(student: Array, teacher: Array) -> float:
    """Of maps: the squared MMD with the kernel (a . b)**2, pair of channels by pair of channels."""

    def mean_kernel(a: Array, b: Array) -> float:
        values = [float((direction(x) * direction(y)).sum()) ** 2 for x in a for y in b]
        return sum(values) / len(values)

    samples = [
        mean_kernel(t, t) + mean_kernel(s, s) - 2 * mean_kernel(s, t) for s, t in zip(student, teacher, strict=True)
    ]
    return sum(samples) / len(samples)


def two_maps(x: Any) -> list[Any]:
    """A map (B, 4, 4, 6) and a later one (B, 3, 2, 3), of one array."""
    return [x, x[:, 1:, ::2, :3]]


def fsp_average_oracle(student: Array, teacher: Array) -> float:
    """Position by position of the smaller map: the larger one's average over the 2 x 2 field there."""

    def matrix(x: Array) -> Array:
        large, small = two_maps(x)
        table = np.zeros((len(x), large.shape[1], small.shape[1]))
        for b, i, j in np.ndindex(table.shape):
            for y, z in np.ndindex(2, 3):
                field = sum(large[b, i, 2 * y + dy, 2 * z + dz] for dy in (0, 1) for dz in (0, 1)) / 4
                table[b, i, j] += field * small[b, j, y, z] / 6
        return table

    return hint_oracle(matrix(student), matrix(teacher))


def ickd_oracle(student: Array, teacher: Array) -> float:
    """Of maps of equal widths."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        for i in range(len(s)):
            rows = [direction(np.array([float((x[i] * x[j]).sum()) for j in range(len(x))])) for x in (s, t)]
            total += norm(rows[0] - rows[1]) ** 2
    return total / (len(student) * student.shape[1])


def ab_oracle(student: Array, teacher: Array, margin: float = 1.0) -> float:
    total = 0.0
    for s, t in zip(student.ravel(), teacher.ravel(), strict=True):
        side = 1 if t > 0 else -1
        if side * s < margin:
            total += (margin - side * s) ** 2
    return 0.003 * total / len(student)


VARIANCES = np.array([0.5, 2.0, 5.0, 9.0])


def vid_oracle(student: Array, teacher: Array) -> float:
    """Of maps (B, 4, H, W), the variances above."""
    total = 0.0
    for c, variance in enumerate(VARIANCES):
        gaps = (student[:, c] - teacher[:, c]).ravel()
        total += sum(gap**2 / variance + math.log(variance) for gap in gaps) / 2
    return total / student.size


def vid(student: Tensor, teacher: Tensor) -> Tensor:
    loss = Vid((4, *teacher.shape[2:])).to(student.dtype if student.dtype == torch.float64 else torch.float32)
    with torch.no_grad():
        loss.alpha.copy_(torch.from_numpy(np.log(np.expm1(VARIANCES - 1e-5))))
    return loss(student, teacher)


def srrl_here(student: Tensor, teacher: Tensor, **settings: Any) -> Tensor:
    return srrl(student, teacher, torch.from_numpy(WEIGHT), torch.from_numpy(BIAS), **settings)


def fsp_average_here(student: Tensor, teacher: Tensor) -> Tensor:
    return fsp_average(two_maps(student), two_maps(teacher))


# ------------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Row:
    """One loss.

    Attributes:
        loss: of student and teacher tensors, and settings.
        oracle: of what the tensors are made of, and settings.
        student, teacher: shapes of one sample of that.
        reduce: what makes the loss's tensors of it.
        settings: each of which is tried, beside the defaults.
        batch: it relates the samples of a batch to one another; else it is a mean over samples.
        at_equality: the value where student and teacher are the same array.
    """

    loss: Callable[..., Tensor]
    oracle: Callable[..., float]
    student: tuple[int, ...] = (6,)
    teacher: tuple[int, ...] = (6,)
    reduce: Callable[[Tensor], Tensor] = lambda x: x
    settings: Sequence[dict[str, Any]] = field(default=({},))
    batch: bool = False
    at_equality: Callable[[Array], float] = lambda _: 0.0

    def __call__(self, student: Tensor, teacher: Tensor, **settings: Any) -> Tensor:
        return self.loss(self.reduce(student), self.reduce(teacher), **settings)

    def pair(self, batch: int = 5, *, seed: int = 0) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([seed, batch])
        student, teacher = rng.normal(0.3, 1.0, (batch, *self.student)), rng.normal(-0.2, 2.0, (batch, *self.teacher))
        return torch.from_numpy(student), torch.from_numpy(teacher)


MAP = (4, 3, 2)
VID_AT_EQUALITY = float(np.log(VARIANCES).mean() / 2)

ROWS: dict[str, Row] = {
    "hint": Row(hint, hint_oracle),
    "fitnet": Row(hint, hint_oracle, MAP, MAP),
    "cosine": Row(cosine, cosine_oracle),
    "cosine of tokens": Row(cosine, cosine_oracle, (3, 6), (3, 6)),
    "rkd_distance": Row(rkd_distance, rkd_distance_oracle, (4,), (7,), batch=True),
    "rkd_distance of maps": Row(rkd_distance, rkd_distance_oracle, MAP, (2, 2, 2), batch=True),
    "rkd_angle": Row(rkd_angle, rkd_angle_oracle, (4,), (7,), batch=True),
    "pkt": Row(pkt, pkt_oracle, (4,), (7,), batch=True),
    "relational_kl": Row(
        relational_kl, relational_kl_oracle, (4,), (7,), settings=({}, {"temperature": 0.5}), batch=True
    ),
    "mse": Row(mse, hint_oracle, (3,), (3,)),
    "huber": Row(huber_loss, huber_oracle, (3,), (3,), settings=({}, {"delta": 0.25})),
    "cc": Row(cc, cc_oracle, (6,), (6,), settings=({}, {"gamma": 1.5}), batch=True),
    "sp": Row(sp, sp_oracle, MAP, (2, 3, 3), batch=True),
    "srrl": Row(srrl_here, srrl_oracle, settings=({}, {"logits": "mse"})),
    "at": Row(at, at_oracle, (3, 2, 3), (5, 2, 3), attention),
    "nst": Row(nst, nst_oracle, (3, 2, 3), (5, 2, 3), spatial_gram),
    "fsp": Row(fsp, hint_oracle, (3, 4), (3, 4)),
    "fsp_average": Row(fsp_average_here, fsp_average_oracle, (4, 4, 6), (4, 4, 6)),
    "simkd": Row(simkd, hint_oracle, MAP, MAP),
    "ickd": Row(ickd, ickd_oracle, (4, 3, 2), (4, 2, 2), gram),
    "ab": Row(ab, ab_oracle, MAP, MAP, settings=({}, {"margin": 0.25}), at_equality=lambda x: ab_oracle(x, x)),
    "vid": Row(vid, vid_oracle, MAP, MAP, at_equality=lambda _: VID_AT_EQUALITY),
}
IN_BATCH = [name for name in ROWS if ROWS[name].batch]
OF_SAMPLES = [name for name in ROWS if not ROWS[name].batch]


def test_every_loss_on_features_has_its_formula() -> None:
    """A row above, or, where a loss has memory or layers of its own, a test that compares it with its formula."""
    of_features = {name for name, loss in LOSSES.items() if {"student_features", "student_maps"} & set(loss.inputs)}
    tested = {"crd": test_crd_equals_the_formula_and_keeps_its_first_z, "reviewkd": test_review_equals_the_formula}
    assert of_features - ROWS.keys() == tested.keys()
    for name in of_features & ROWS.keys():
        brings = ("srrl", "vid", "fsp_average")  # layers, or a second map
        assert ROWS[name].loss is LOSSES[name].function or name in brings, name
        assert ROWS[name].batch == (LOSSES[name].over == "batch"), name


def value_and_gradient(row: Row, student: Tensor, teacher: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    value = row(student, teacher, **settings)
    value.backward()
    assert student.grad is not None
    return value.detach(), student.grad


@pytest.mark.parametrize("name", ROWS)
def test_value_equals_the_formula(name: str) -> None:
    row = ROWS[name]
    for batch in (3, 5):
        student, teacher = row.pair(batch)
        for settings in row.settings:
            wanted = row.oracle(student.numpy(), teacher.numpy(), **settings)
            assert abs(wanted) > 1e-7  # the case says something
            exact = row(student, teacher, **settings)
            assert exact.dtype == torch.float64 and exact.shape == ()
            assert exact.item() == pytest.approx(wanted, rel=1e-11)
            rounded = row(student.float(), teacher.float(), **settings)
            assert rounded.dtype == torch.float32
            assert rounded.item() == pytest.approx(wanted, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("name", ROWS)
def test_gradient_is_that_of_the_value(name: str) -> None:
    row = ROWS[name]
    student, teacher = row.pair(3)
    for settings in row.settings:
        assert torch.autograd.gradcheck(lambda s, v=settings: row(s, teacher, **v), (student.requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_equal_student_and_teacher_give_zero_or_the_stated_constant(name: str, dtype: torch.dtype) -> None:
    row = ROWS[name]
    features = row.pair()[0].to(dtype)
    value, gradient = value_and_gradient(row, features, features.clone())
    wanted = row.at_equality(features.double().numpy())
    assert value.item() == pytest.approx(wanted, rel=1e-5) if wanted else value.item() == 0.0
    if name != "ab":  # which pushes away from the margin
        assert float(gradient.abs().max()) < (1e-6 if name == "relational_kl" else 1e-7)  # which divides by T = 0.1


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in ROWS if ROWS[name].reduce is ROWS["hint"].reduce or name == "fsp"])
def test_half_types_are_computed_in_float32(name: str, half: torch.dtype) -> None:
    row = ROWS[name]
    student, teacher = (x.to(half) for x in row.pair())
    value = row(student, teacher)
    assert value.dtype == torch.float32
    assert value.item() == row(student.float(), teacher.float()).item()
    assert value.item() == pytest.approx(
        row.oracle(student.double().numpy(), teacher.double().numpy()), rel=1e-4, abs=1e-8
    )


@pytest.mark.parametrize("name", ROWS)
def test_autocast_changes_nothing(name: str) -> None:
    row = ROWS[name]
    student, teacher = (row.reduce(x.float()) for x in row.pair())
    wanted = row.loss(student, teacher).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = row.loss(student, teacher)
    assert value.dtype == torch.float32 and value.item() == wanted


@pytest.mark.parametrize("name", ROWS)
def test_the_order_of_the_batch_does_not_matter(name: str) -> None:
    row = ROWS[name]
    student, teacher = row.pair()
    order = torch.tensor([3, 1, 4, 0, 2])
    assert row(student[order], teacher[order]).item() == pytest.approx(row(student, teacher).item(), rel=1e-12)


@pytest.mark.parametrize("name", ROWS)
def test_a_mean_over_samples_is_one_and_a_relation_is_not(name: str) -> None:
    row = ROWS[name]
    student, teacher = row.pair(6)
    whole = row(student, teacher).item()
    parts = (2 * row(student[:2], teacher[:2]).item() + 4 * row(student[2:], teacher[2:]).item()) / 6
    assert (abs(whole - parts) > 1e-4 * abs(whole)) if row.batch else (whole == pytest.approx(parts, rel=1e-12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", IN_BATCH)
def test_a_batch_of_one_has_no_relations(name: str, dtype: torch.dtype) -> None:
    row = ROWS[name]
    student, teacher = (x.to(dtype) for x in row.pair(1))
    for s, t in [(student, teacher), (student, 0 * teacher), (0 * student, teacher)]:
        value, gradient = value_and_gradient(row, s, t)
        assert value.item() == 0.0 and not gradient.any()


DEGENERATE: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "zero student": lambda s, t: (0 * s, t),
    "zero teacher": lambda s, t: (s, 0 * t),
    "both zero": lambda s, t: (0 * s, 0 * t),
    "one zero row": lambda s, t: (torch.cat([0 * s[:1], s[1:]]), t),
    "identical samples": lambda s, t: (s[:1].expand_as(s), t),
    "identical samples on both sides": lambda s, t: (s[:1].expand_as(s), t[:1].expand_as(t)),
    "two identical samples": lambda s, t: (torch.cat([s[:1], s[:-1]]), torch.cat([t[:1], t[:-1]])),
    "constant": lambda s, t: (torch.ones_like(s), torch.ones_like(t)),
    "opposite samples": lambda s, t: (torch.cat([s[:2], -s[:2]]), torch.cat([t[:2], t[:2]])),
    "large": lambda s, t: (1e4 * s.sign(), -1e4 * t.sign()),
    "large and small": lambda s, t: (1e4 * s.sign(), 1e-6 * t),
    "tiny": lambda s, t: (1e-30 * s, 1e-30 * t),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("name", ROWS)
def test_value_and_gradient_are_finite(name: str, case: str, dtype: torch.dtype) -> None:
    row = ROWS[name]
    student, teacher = (x.to(dtype) for x in DEGENERATE[case](*row.pair(4)))
    for batch in (4, 1):
        value, gradient = value_and_gradient(row, student[:batch], teacher[:batch])
        assert value.isfinite() and gradient.isfinite().all()
    if case == "zero student" and row.loss in (
        cosine,
        rkd_distance,
        rkd_angle,
        pkt,
        relational_kl,
        cc,
        sp,
        at,
        nst,
        ickd,
    ):
        assert not gradient.any()  # no direction to move in is known


def test_a_pair_of_views_far_from_the_origin_keeps_its_distance() -> None:
    """In float32, |a|**2 + |b|**2 - 2 a.b is rounding only for rows of length 1000 that are 0.01 apart."""
    rng = np.random.default_rng(3)
    student = 1000.0 + rng.normal(size=(4, 8))
    student[1] = student[0] + 0.01 * rng.normal(size=8)
    student = torch.from_numpy(student).float()
    teacher = torch.from_numpy(rng.normal(size=(4, 5))).float()
    for name in ("rkd_distance", "rkd_angle"):
        wanted = ROWS[name].oracle(student.double().numpy(), teacher.double().numpy())
        assert ROWS[name](student, teacher).item() == pytest.approx(wanted, rel=1e-5)


def test_pkt_of_opposite_samples_is_finite_whatever_the_rounding() -> None:
    """1 + cos of opposite vectors comes out as low as -5e-7 in float32, of which the logarithm does not exist."""
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(300, 64))).float()
    teacher = ROWS["pkt"].pair(2)[1].float()
    for row in rows:
        student = torch.stack([row, -row]).requires_grad_()
        value = pkt(student, teacher)
        value.backward()
        assert value.isfinite() and student.grad is not None and student.grad.isfinite().all()


def test_cosine_of_a_zero_vector_and_of_a_small_angle() -> None:
    zero, other = torch.zeros(1, 4), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert cosine(zero, zero.clone()).item() == 0.0
    assert cosine(zero, other).item() == cosine(other, zero).item() == pytest.approx(0.5)
    near = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1e-5]])
    assert cosine(*near).item() == pytest.approx(0.5e-10, rel=1e-3)  # 1 - cos is 0 in float32


def test_similarities_move_and_stretch_as_each_relation_allows() -> None:
    student = ROWS["rkd_angle"].pair()[0]
    turn = torch.linalg.qr(torch.from_numpy(np.random.default_rng(2).normal(size=(4, 4))))[0]
    turned, moved = 3 * student @ turn, student + 5
    for name in IN_BATCH:
        x = student if ROWS[name].student == (4,) else ROWS[name].pair()[0].flatten(1)[:, :4]
        assert abs(ROWS[name].loss(3 * x @ turn, x).item()) < 1e-16
    assert rkd_distance(moved, turned).item() < 1e-20 and rkd_angle(moved, turned).item() < 1e-20
    assert all(loss(moved, student).item() > 1e-5 for loss in (pkt, cc, sp))


@pytest.mark.parametrize("bits", [True, False], ids=["signs", "pre-activations"])
def test_ab_takes_the_teachers_signs_as_well_as_its_map(bits: bool) -> None:
    student, teacher = ROWS["ab"].pair()
    teacher[0, 0, 0, 0] = 0.0  # not active
    given = (teacher > 0).float() if bits else teacher
    assert ab(student, given).item() == pytest.approx(ab_oracle(student.numpy(), teacher.numpy()), rel=1e-12)
    tiny = torch.full((1, 3), 1e-60, dtype=torch.float64)  # active, though zero in the student's float32
    assert ab(torch.full((1, 3), 2.0), tiny).item() == 0.0


def test_ab_is_zero_beyond_the_margin() -> None:
    teacher = torch.tensor([[1.0, -1.0, 0.0]])
    assert ab(torch.tensor([[1.0, -1.0, -5.0]]), teacher).item() == 0.0
    assert ab(torch.tensor([[0.0, -1.0, -5.0]]), teacher).item() == pytest.approx(0.003)


@pytest.mark.parametrize(
    ("shape", "channels"), [((4, 3, 2), 4), ((6,), 6), ((3, 6), 6)], ids=["map", "vector", "tokens"]
)
def test_vid_starts_from_its_variance_and_learns_one_for_each_channel(shape: tuple[int, ...], channels: int) -> None:
    loss = Vid(shape, initial_variance=5.0)
    features = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    assert loss.alpha.shape == (channels,)
    assert loss(features, features).item() == pytest.approx(math.log(5.0) / 2, rel=1e-5)
    loss(features, features + 3).backward()
    assert loss.alpha.grad is not None and bool((loss.alpha.grad < 0).all())  # a larger variance would cost less
    double = Vid(shape).double()
    assert torch.autograd.gradcheck(
        lambda a, s: torch.func.functional_call(double, {"alpha": a}, (s, features.double())),
        (double.alpha.detach().clone().requires_grad_(), features.double().requires_grad_()),
    )
    assert list(loss.state_dict()) == ["alpha"]


def test_vid_stays_finite_at_any_variance() -> None:
    for initial in (2e-5, 1e4):
        loss = Vid((6,), initial_variance=initial)
        value = loss(torch.zeros(2, 6), torch.full((2, 6), 3.0))
        assert value.item() == pytest.approx((9 / initial + math.log(initial)) / 2, rel=1e-2)
    loss = Vid((6,))
    with torch.no_grad():
        loss.alpha.fill_(-1e4)
    value = loss(torch.zeros(2, 6), torch.full((2, 6), 1e4))
    value.backward()
    assert value.isfinite() and loss.alpha.grad is not None and loss.alpha.grad.isfinite().all()


def test_srrl_has_the_gradient_of_the_cross_entropy() -> None:
    student, teacher = ROWS["srrl"].pair()
    _, gradient = value_and_gradient(ROWS["srrl"], student, teacher)
    s = student.clone().requires_grad_()
    weight, bias = torch.from_numpy(WEIGHT), torch.from_numpy(BIAS)
    soft = torch.softmax(teacher @ weight.T + bias, dim=1)
    reference = (s - teacher).square().mean() - (soft * torch.log_softmax(s @ weight.T + bias, 1)).sum(1).mean()
    torch.testing.assert_close(gradient, torch.autograd.grad(reference, s)[0])


B6, B7, MAPS = torch.zeros(4, 6), torch.zeros(4, 7), torch.zeros(4, 3, 2, 2)
ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    **{
        loss.__name__: (lambda loss=loss: loss(B6, B7), r"student features \(4, 6\).*\(4, 7\) do not fit")
        for loss in (hint, cosine, ab, at, nst, fsp, ickd)
    },
    **{
        f"{loss.__name__} rows": (
            lambda loss=loss: loss(B6, B6[:3]),
            r"\(4, 6\).*\(3, 6\) do not fit.*one row for each",
        )
        for loss in (rkd_distance, rkd_angle, pkt, cc, sp)
    },
    "no batch axis": (lambda: sp(B6[0], B6[0]), r"\(6,\).*both must be \(B, \.\.\.\)"),
    "hint without one": (lambda: hint(B6[0], B6[0]), r"\(6,\).*both must be \(B, \.\.\.\) of one shape"),
    "cosine of a map": (
        lambda: cosine(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)),
        r"must be \(B, D\) or \(B, L, D\)",
    ),
    "at of a map": (
        lambda: at(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)),
        r"must be \(B, H, W\) attention maps",
    ),
    "ab margin": (lambda: ab(B6, B6, margin=0.0), "margin must be > 0, got 0.0"),
    "cc gamma": (lambda: cc(B6, B6, gamma=-1.0), "gamma must be > 0, got -1.0"),
    "vid variance": (lambda: Vid((6,), initial_variance=0.0), "initial_variance must be > 1e-05, got 0.0"),
    "vid shape": (lambda: Vid((6,))(B7, B7), r"features \(4, 7\) do not fit.*\(B, \*\(6,\)\)"),
    "srrl classifier": (
        lambda: srrl(B6, B6, torch.zeros(3, 5), torch.zeros(3)),
        r"weight \(3, 5\).*must be \(B, D\), \(C, D\)",
    ),
    "srrl bias": (lambda: srrl(B6, B6, torch.zeros(3, 6), torch.zeros(2)), r"bias \(2,\) do not fit"),
    "srrl word": (
        lambda: srrl(B6, B6, torch.zeros(3, 6), torch.zeros(3), logits="l2"),  # type: ignore[arg-type]
        "logits must be 'kl' or 'mse', got 'l2'",
    ),
    "one map": (lambda: fsp_average([MAPS], [MAPS]), "1 maps of the student and 1 of the teacher; both must be two"),
    "two maps for three": (lambda: fsp_average([MAPS] * 2, [MAPS] * 3), "2 maps of the student and 3 of the teacher"),
    "fsp widths": (lambda: fsp_average([MAPS, MAPS], [MAPS, MAPS[:, :1]]), "FSP matrices of equal widths"),
    "review shapes": (
        lambda: hierarchical_context(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 2, 2)),
        r"\(2, 3, 4, 4\).*\(2, 3, 2, 2\) do not fit",
    ),
    "review maps": (
        lambda: ReviewKd([(3,)], [(3,)])([], []),
        "0 maps of the student and 0 of the teacher; both must be 1",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_shapes_and_settings_that_do_not_fit_are_refused(name: str) -> None:
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


# --------------------------------------------------------------------------------------------------------------- adapters

SHAPES = {
    "vector": ((5,), (3,)),
    "tokens": ((2, 5), (2, 3)),
    "map": ((5, 2, 2), (3, 2, 2)),
    "larger map": ((5, 5, 4), (3, 2, 2)),
}


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("case", SHAPES)
def test_an_adapter_is_an_affine_map_of_each_position(case: str, kind: str) -> None:
    student, teacher = SHAPES[case]
    torch.manual_seed(0)
    adapter = make_adapter(kind, student, teacher).double()
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(2, *student)))
    found = adapter(features)
    assert found.shape == (2, *teacher)
    layers = [layer for layer in adapter if list(layer.parameters())]
    assert len(layers) == {"linear": 1, "mlp": 2}[kind]
    at_last = fit_map(features, teacher[1:]).movedim(1, -1) if len(student) == 3 else features  # (..., D)
    wanted = at_last.numpy().reshape(-1, student[0] if len(student) == 3 else student[-1])
    for i, layer in enumerate(layers):
        weight, bias = layer.weight.detach().numpy().reshape(3, -1), layer.bias.detach().numpy()
        wanted = np.array([[float(np.dot(w, z)) + b for w, b in zip(weight, bias, strict=True)] for z in wanted])
        wanted = np.maximum(wanted, 0) if i + 1 < len(layers) else wanted
    last = found.movedim(1, -1) if len(student) == 3 else found
    np.testing.assert_allclose(last.detach().numpy().reshape(-1, 3), wanted, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ADAPTERS)
def test_gradients_through_an_adapter(kind: str) -> None:
    shape, target = ((4, 4, 4), (4, 2, 2)) if kind == "identity" else ((5, 4, 4), (4, 2, 2))
    torch.manual_seed(1)
    adapter = make_adapter(kind, shape, target).double()
    names = [name for name, _ in adapter.named_parameters()]
    rng = np.random.default_rng(4)
    features = torch.from_numpy(rng.normal(size=(2, *shape))).requires_grad_()
    teacher = torch.from_numpy(rng.normal(size=(2, *target)))
    weights = [p.detach().clone().requires_grad_() for p in adapter.parameters()]
    for row in (ROWS["fitnet"], ROWS["at"], ROWS["vid"], ROWS["sp"]):

        def value(x: Tensor, *values: Tensor, row: Row = row) -> Tensor:
            return row(torch.func.functional_call(adapter, dict(zip(names, values, strict=True)), (x,)), teacher)

        assert torch.autograd.gradcheck(value, (features, *weights))


def test_identity_learns_nothing_and_pools_a_larger_map() -> None:
    features = torch.arange(32.0).reshape(1, 2, 4, 4)
    assert make_adapter("identity", (2, 4, 4), (2, 4, 4))(features) is features
    assert fit_map(features, (4, 4)) is features
    state = torch.get_rng_state()
    pooled = make_adapter("identity", (2, 4, 4), (2, 2, 1))
    assert not list(pooled.parameters()) and torch.equal(torch.get_rng_state(), state)
    wanted = features.numpy().reshape(1, 2, 2, 2, 1, 4).mean(axis=(3, 5))
    np.testing.assert_allclose(pooled(features).numpy(), wanted)
    assert "size=(2, 1)" in repr(pooled)
    odd = fit_map(torch.arange(5.0).reshape(1, 1, 5, 1), (2, 1)).flatten().tolist()
    assert odd == [1.0, 3.0]  # fields 0..2 and 2..4


BAD_ADAPTERS: dict[str, tuple[tuple[Any, ...], str, str]] = {
    "unknown": (("linera", (5,), (3,)), "unknown adapter 'linera'", "did you mean 'linear'"),
    "widths": (
        ("identity", (5,), (3,)),
        "'identity': the student's features are 5 wide and the teacher's 3",
        "adapter=linear",
    ),
    "map widths": (("identity", (5, 4, 4), (3, 2, 2)), "are 5 wide and the teacher's 3", "adapter=linear"),
    "smaller map": (
        ("linear", (5, 2, 4), (3, 4, 4)),
        "map is 2 x 4, smaller than the teacher's 4 x 4",
        "earlier layer",
    ),
    "kinds": (("linear", (5, 2, 2), (3,)), r"gives a map \(5, 2, 2\) and the teacher a vector \(3,\)", "layer:pool"),
    "tokens": (("mlp", (16, 5), (17, 5)), "gives 16 tokens and the teacher 17", "mean_tokens"),
    "video": (("linear", (5, 2, 2, 2), (3, 2, 2, 2)), r"an output \(5, 2, 2, 2\)", "alike"),
}


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_shapes_that_no_adapter_joins_are_refused(case: str) -> None:
    arguments, message, tip = BAD_ADAPTERS[case]
    with pytest.raises(LossError, match=message) as caught:
        make_adapter(*arguments)
    assert tip in caught.value.tip


def test_a_smaller_map_is_never_enlarged() -> None:
    with pytest.raises(LossError, match="map is 2 x 2, smaller than the teacher's 3 x 2"):
        fit_map(torch.zeros(1, 1, 2, 2), (3, 2))


# --------------------------------------------------------------------------------------------------------------- ReviewKD


def convolved(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """(B, C, H, W) by (D, C, k, k) with k odd, zeros around."""
    pad = weight.shape[2] // 2
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    found = np.zeros((len(x), len(weight), *x.shape[2:]))
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            window = padded[:, :, i : i + weight.shape[2], j : j + weight.shape[3]]
            found[:, :, i, j] = window.reshape(len(x), -1) @ weight.reshape(len(weight), -1).T
    return found if bias is None else found + bias[:, None, None]


def normalised(x: Array, layer: nn.BatchNorm2d, training: bool) -> Array:
    assert layer.running_mean is not None and layer.running_var is not None
    mean = x.mean(axis=(0, 2, 3)) if training else layer.running_mean.numpy()
    variance = x.var(axis=(0, 2, 3)) if training else layer.running_var.numpy()
    scale, shift = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    scaled = (x - mean[:, None, None]) / np.sqrt(variance + layer.eps)[:, None, None]
    return scaled * scale[:, None, None] + shift[:, None, None]


def resized(x: Array, size: tuple[int, ...]) -> Array:
    rows = [i * x.shape[2] // size[0] for i in range(size[0])]
    columns = [j * x.shape[3] // size[1] for j in range(size[1])]
    return x[:, :, rows][:, :, :, columns]


def context_oracle(student: Array, teacher: Array) -> float:
    total, weight, weights = hint_oracle(student, teacher), 1.0, 1.0
    size = student.shape[2]  # square, and 4, 2, 1 divide it
    for fields in (4, 2, 1):
        if fields < size:
            weight /= 2
            step = size // fields
            pooled = [x.reshape(*x.shape[:2], fields, step, fields, step).mean(axis=(3, 5)) for x in (student, teacher)]
            total += weight * hint_oracle(*pooled)
            weights += weight
    return total / weights


def review_oracle(loss: ReviewKd, student: list[Array], teacher: list[Array], training: bool) -> float:
    total, deeper = 0.0, None
    for fusion, own, target in list(zip(loss.fusions, student, teacher, strict=True))[::-1]:
        own, target = (x[:, :, None, None] if x.ndim == 2 else x for x in (own, target))
        fused = normalised(convolved(own, fusion.reduce[0].weight.detach().numpy()), fusion.reduce[1], training)
        if deeper is not None:
            deeper = resized(deeper, fused.shape[2:])
            weight, bias = (p.detach().numpy() for p in fusion.attend.parameters())
            shares = 1 / (1 + np.exp(-convolved(np.concatenate([fused, deeper], axis=1), weight, bias)))
            fused = fused * shares[:, 0][:, None] + deeper * shares[:, 1][:, None]
        deeper = resized(fused, target.shape[2:])
        matched = normalised(convolved(deeper, fusion.match[0].weight.detach().numpy()), fusion.match[1], training)
        total += context_oracle(matched, target)
    return total


STUDENT_MAPS = [(3, 4, 4), (4, 4, 4), (5, 2, 2), (6,)]
TEACHER_MAPS = [(2, 8, 8), (3, 2, 2), (4, 2, 2), (5,)]  # larger, smaller, as large


def maps_of(shapes: Sequence[tuple[int, ...]], seed: int, batch: int = 3) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.normal(size=(batch, *shape))) for shape in shapes]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_review_equals_the_formula(training: bool) -> None:
    torch.manual_seed(0)
    loss = ReviewKd(STUDENT_MAPS, TEACHER_MAPS, width=3).double()
    for layer in loss.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 2.0)
            nn.init.uniform_(layer.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(layer.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    student, teacher = maps_of(STUDENT_MAPS, 1), maps_of(TEACHER_MAPS, 2)
    wanted = review_oracle(loss, [x.numpy() for x in student], [x.numpy() for x in teacher], training)
    value = loss.train(training)(student, teacher)
    assert value.shape == () and value.dtype == torch.float64
    assert value.item() == pytest.approx(wanted, rel=1e-10)


def test_gradients_of_review_reach_every_level_and_parameter() -> None:
    torch.manual_seed(0)
    loss = ReviewKd([(2, 2, 2), (3, 2, 2), (3,)], [(2, 2, 2), (2, 2, 2), (2,)], width=2).double()
    student = [x.requires_grad_() for x in maps_of([(2, 2, 2), (3, 2, 2), (3,)], 1)]
    teacher = maps_of([(2, 2, 2), (2, 2, 2), (2,)], 2)
    assert torch.autograd.gradcheck(lambda *s: loss(s, teacher), tuple(student))
    loss(student, teacher).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in loss.parameters())
    assert all(x.grad is not None and bool(x.grad.any()) for x in student)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_hierarchical_context(size: int) -> None:
    student, teacher = maps_of([(3, size, size)], 1)[0], maps_of([(3, size, size)], 2)[0]
    assert hierarchical_context(student, student.clone()).item() == 0.0
    if size != 3:
        wanted = context_oracle(student.numpy(), teacher.numpy())
        assert hierarchical_context(student, teacher).item() == pytest.approx(wanted, rel=1e-12)
    constant = hierarchical_context(student, student + 2)
    assert constant.item() == pytest.approx(
        4.0
    )  # every part of a constant difference is its square: the weights sum to 1
    assert torch.autograd.gradcheck(lambda s: hierarchical_context(s, teacher), (student.requires_grad_(),))


def test_review_of_half_and_large_maps_and_of_one_sample() -> None:
    loss = ReviewKd([(2, 4, 4)], [(3, 2, 2)])
    student, teacher = maps_of([(2, 4, 4)], 1), maps_of([(3, 2, 2)], 2)
    value = loss([student[0].half()], [teacher[0].half()])
    assert value.dtype == torch.float32
    for scale in (0.0, 1e4):
        one = [(scale * student[0][:1]).float().requires_grad_()]
        value = loss(one, [scale * teacher[0][:1].float()])
        value.backward()
        assert value.isfinite() and one[0].grad is not None and one[0].grad.isfinite().all()


def test_review_wants_as_many_maps_on_both_sides() -> None:
    for student, teacher in [([(3,)], [(3,), (4,)]), ([], [])]:
        with pytest.raises(
            LossError, match=f"{len(student)} maps of the student, {len(teacher)} of the teacher"
        ) as caught:
            ReviewKd(student, teacher)
        assert "as many layers" in caught.value.tip


# -------------------------------------------------------------------------------------------------------------------- CRD

LABELS = torch.tensor([0, 1, 0, 2, -1, 1, 0, 2, 2, -1, 2, 0])
IDS = torch.tensor([7, -3, 2**62, 11, -(2**63), 5, 6, 99, 1, 0, 42, 8])  # the bits of uint64 ids


def crd(**settings: Any) -> Crd:
    torch.manual_seed(5)
    settings = {"negatives": 6, "width": 4} | settings
    return Crd((5,), (3,), len(LABELS), LABELS, 17, **settings).double()


def crd_batch(samples: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    rows = torch.tensor(samples)
    student, teacher = rng.normal(size=(len(samples), 5)), rng.normal(size=(len(samples), 3))
    return torch.from_numpy(student), torch.from_numpy(teacher), rows, IDS[rows]


def embedded(layer: nn.Linear, features: Tensor) -> Array:
    raw = features.numpy() @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
    return np.array([direction(row) for row in raw])


def crd_oracle(loss: Crd, batch: tuple[Tensor, Tensor, Tensor, Tensor], step: int, z: list[float] | None = None) -> Any:
    """The value as the sum of its definition, with the Z of both directions."""
    student, teacher, samples, ids = batch
    n, k = loss.num_samples, loss.negatives
    drawn = loss.draw(samples, ids, step).tolist()
    sides = [
        (embedded(loss.embed_student, student), loss.teacher_bank.numpy()),
        (embedded(loss.embed_teacher, teacher), loss.student_bank.numpy()),
    ]
    total, found = 0.0, []
    for side, (rows, bank) in enumerate(sides):
        scored = [[own, *others] for own, others in zip(samples.tolist(), drawn, strict=True)]
        raw = [
            [math.exp(float(np.dot(row, bank[i])) / loss.nce_temperature) for i in chosen]
            for row, chosen in zip(rows, scored, strict=True)
        ]
        found.append(n * sum(map(sum, raw)) / (len(raw) * (k + 1)) if z is None else z[side])
        for values in raw:
            p = [value / found[side] for value in values]
            noise = k / n
            total -= math.log(p[0] / (p[0] + noise)) + sum(math.log(noise / (v + noise)) for v in p[1:])
    return total / len(samples), found


def test_crd_equals_the_formula_and_keeps_its_first_z() -> None:
    loss = crd()
    batch = crd_batch([3, 0, 4, 9])
    wanted, z = crd_oracle(loss, batch, 0)
    assert loss(*batch, 0).item() == pytest.approx(wanted, rel=1e-11)
    assert loss.log_normalisers.exp().tolist() == pytest.approx(z, rel=1e-11)
    later = crd_batch([5, 3, 1], seed=1)
    wanted, _ = crd_oracle(loss, later, 1, z)
    assert loss(*later, 1).item() == pytest.approx(wanted, rel=1e-11)
    assert loss.log_normalisers.exp().tolist() == pytest.approx(z, rel=1e-11)


def test_gradients_of_crd() -> None:
    loss = crd().eval()  # the same banks at each call
    student, teacher, samples, ids = crd_batch([3, 0, 4])
    loss.log_normalisers.fill_(2.0)
    names = [name for name, _ in loss.named_parameters()]
    assert names == ["embed_student.weight", "embed_student.bias", "embed_teacher.weight", "embed_teacher.bias"]

    def value(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(loss, dict(zip(names, weights, strict=True)), (x, teacher, samples, ids, 3))

    weights = [p.detach().clone().requires_grad_() for p in loss.parameters()]
    assert torch.autograd.gradcheck(value, (student.requires_grad_(), *weights))


def test_the_gradient_is_that_of_the_banks_before_the_update() -> None:
    gradients = []
    for training in (True, False):
        loss = crd().train(training)
        student, *rest = crd_batch([3, 0, 4])
        loss(student.requires_grad_(), *rest, 0).backward()
        assert student.grad is not None
        gradients.append(student.grad)
    # Z of a first batch is a constant in both
    torch.testing.assert_close(gradients[0], gradients[1])


def splitmix(word: int) -> int:
    word = ((word ^ word >> 30) * 0xBF58476D1CE4E5B9) % 2**64
    word = ((word ^ word >> 27) * 0x94D049BB133111EB) % 2**64
    return word ^ word >> 31


def test_splitmix_is_the_published_one() -> None:
    golden = 0x9E3779B97F4A7C15
    found = [splitmix(golden * (i + 1) % 2**64) for i in range(3)]
    assert found == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # of seed 0


@pytest.mark.parametrize("seed", [0, 17, 2**63 + 5, -4])
def test_negatives_are_a_function_of_seed_step_and_id(seed: int) -> None:
    loss = Crd((5,), (3,), len(LABELS), LABELS, seed, negatives=50, width=2)
    samples = torch.arange(len(LABELS))
    for step in (0, 1, 2**40):
        drawn = loss.draw(samples, IDS, step)
        for sample in (0, 3, 4, 11):
            label = int(LABELS[sample])
            # by class, unlabelled first: the order in which the draw counts
            order = sorted(range(len(LABELS)), key=lambda i: (int(LABELS[i]), i))
            others = [i for i in order if i != sample and (label < 0 or int(LABELS[i]) != label)]
            key = splitmix(splitmix(splitmix(seed % 2**64) ^ step) ^ int(IDS[sample]) % 2**64)
            words = [splitmix((key + (j + 1) * 0x9E3779B97F4A7C15) % 2**64) >> 32 for j in range(50)]
            assert drawn[sample].tolist() == [others[word * len(others) >> 32] for word in words]
    order = torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loss.draw(samples[order], IDS[order], 5), loss.draw(samples, IDS, 5)[order])
    again = loss.draw(torch.tensor([3, 3]), IDS[[3, 3]], 5)
    assert torch.equal(again[0], again[1]) and torch.equal(again[0], loss.draw(samples, IDS, 5)[3])
    assert not torch.equal(loss.draw(samples, IDS, 5), loss.draw(samples, IDS, 6))


def test_negatives_are_uniform_over_the_other_classes() -> None:
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.choice([-1, 0, 1, 2, 3], p=[0.1, 0.5, 0.2, 0.15, 0.05], size=60))
    ids = torch.from_numpy(rng.integers(-(2**63), 2**63, 60))
    loss = Crd((5,), (3,), 60, labels, 3, negatives=2000, width=2)
    samples = torch.arange(60)
    drawn = torch.cat([loss.draw(samples, ids, step) for step in range(5)], dim=1)  # (60, 10000)
    worst = 0.0
    for sample in range(60):
        label = int(labels[sample])
        others = [i for i in range(60) if i != sample and (label < 0 or int(labels[i]) != label)]
        counts = torch.bincount(drawn[sample], minlength=60).double()
        assert counts[others].sum() == 10_000  # never its own class, never itself
        expected = 10_000 / len(others)
        chi_square = float(((counts[others] - expected) ** 2 / expected).sum())
        freedom = len(others) - 1
        worst = max(worst, abs(chi_square - freedom) / math.sqrt(2 * freedom))
    assert worst < 5


def test_the_banks_move_towards_the_mean_of_a_samples_rows() -> None:
    loss = crd(momentum=0.3)
    batch = crd_batch([3, 0, 3, 4, 3])
    rows = {
        "student_bank": embedded(loss.embed_student, batch[0]),
        "teacher_bank": embedded(loss.embed_teacher, batch[1]),
    }
    wanted = {name: getattr(loss, name).numpy().copy() for name in rows}
    for name, bank in wanted.items():
        for sample in (0, 3, 4):
            own = [row for row, i in zip(rows[name], batch[2].tolist(), strict=True) if i == sample]
            bank[sample] = direction(0.3 * bank[sample] + 0.7 * sum(own) / len(own))
    loss(*batch, 0)
    for name, bank in wanted.items():
        np.testing.assert_allclose(getattr(loss, name).numpy(), bank, rtol=1e-12, atol=1e-15)


def test_the_order_of_the_batch_changes_neither_loss_nor_banks() -> None:
    batch = crd_batch([3, 0, 3, 4, 1, 0])
    first, second = crd(), crd()
    order = torch.tensor([5, 2, 0, 3, 1, 4])
    values = first(*batch, 2).item(), second(*(x[order] for x in batch), 2).item()
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    for name in ("student_bank", "teacher_bank", "log_normalisers"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=1e-12, atol=1e-14)


def test_evaluation_changes_nothing() -> None:
    loss = crd().eval()
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    batch = crd_batch([3, 0])
    wanted, _ = crd_oracle(loss, batch, 0)
    assert loss(*batch, 0).item() == pytest.approx(wanted, rel=1e-11)
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())


def test_state_dict_continues_bit_for_bit() -> None:
    batches = [crd_batch([i, i + 3, i], seed=i) for i in range(6)]
    loss = crd()
    for step in range(3):
        loss(*batches[step], step)
    state = {name: value.clone() for name, value in loss.state_dict().items()}
    assert {"student_bank", "teacher_bank", "log_normalisers"} < set(state) and "by_class" not in state
    resumed = crd()
    torch.nn.init.normal_(resumed.embed_student.weight)
    resumed.load_state_dict(state)
    for step in range(3, 6):
        assert torch.equal(loss(*batches[step], step), resumed(*batches[step], step))
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in loss.state_dict().items())


def test_the_global_generator_decides_nothing_but_the_embeddings() -> None:
    banks = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        loss = Crd((5,), (3,), len(LABELS), LABELS, 17, negatives=6, width=4)
        state = torch.get_rng_state()
        loss(*(x.float() if x.is_floating_point() else x for x in crd_batch([1, 2])), 0)
        assert torch.equal(torch.get_rng_state(), state)
        banks.append(Crd((5,), (3,), len(LABELS), LABELS, 17, width=4).student_bank)
    assert torch.equal(*banks)
    other = Crd((5,), (3,), len(LABELS), LABELS, 18, width=4)
    assert not torch.equal(banks[0], other.student_bank) and not torch.equal(other.student_bank, other.teacher_bank)


def test_banks_start_with_rows_of_mean_square_length_one() -> None:
    bank = Crd((5,), (3,), 2000, torch.arange(2000) % 2, 0, negatives=1, width=16).student_bank
    assert bank.square().sum(dim=1).mean().item() == pytest.approx(1.0, rel=0.02)
    assert bank.abs().max().item() <= math.sqrt(3 / 16)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_crd_is_finite_in_any_type(dtype: torch.dtype, scale: float) -> None:
    loss = crd(nce_temperature=0.01).float()  # exp(100) in the scores
    student, teacher, samples, ids = crd_batch([3, 3, 3])
    student = (scale * student).to(dtype).requires_grad_()
    value = loss(student, (scale * teacher).to(dtype), samples, ids, 0)
    value.backward()
    assert value.dtype == torch.float32 and value.isfinite() and value.item() >= 0
    assert student.grad is not None and student.grad.isfinite().all()
    assert loss.student_bank.isfinite().all()


def test_crd_learns_to_tell_samples_apart() -> None:
    """The student's features are the teacher's, turned: the loss falls well below that of a student of noise."""
    rng = np.random.default_rng(0)
    teacher = torch.from_numpy(rng.normal(size=(24, 6))).float()
    turn = torch.from_numpy(rng.normal(size=(6, 8))).float()
    labels, samples = torch.arange(24) % 3, torch.arange(24)
    last = []
    for student in (teacher @ turn, torch.from_numpy(rng.normal(size=(24, 8))).float()):
        torch.manual_seed(0)
        loss = Crd((8,), (6,), 24, labels, 0, negatives=16, width=8)
        weights = list(loss.parameters())
        for step in range(40):
            value = loss(student, teacher, samples, samples, step)
            with torch.no_grad():
                for weight, gradient in zip(weights, torch.autograd.grad(value, weights), strict=True):
                    weight -= 0.2 * gradient
        last.append(value.item())
    assert last[0] < 0.9 * last[1]


CRD_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "one class": ({"sample_labels": torch.zeros(4, dtype=torch.int64)}, "every sample is of one class"),
    "one sample": ({"num_samples": 1, "sample_labels": torch.tensor([-1])}, "every sample is of one class"),
    "labels": ({"num_samples": 5}, r"5 samples, and labels of shape \(4,\)"),
    "negatives": ({"negatives": 0}, "negatives=0"),
    "width": ({"width": 0}, "width=0"),
    "temperature": ({"nce_temperature": 0.0}, "nce_temperature=0.0"),
    "momentum": ({"momentum": 1.0}, "momentum=1.0"),
}


@pytest.mark.parametrize("case", CRD_ERRORS)
def test_crd_refuses_settings_that_cannot_work(case: str) -> None:
    settings, message = CRD_ERRORS[case]
    arguments = {"num_samples": 4, "sample_labels": torch.tensor([0, 1, 0, -1])} | settings
    with pytest.raises(LossError, match=message):
        Crd((5,), (3,), seed=0, **arguments)


def test_crd_refuses_batches_of_two_sizes() -> None:
    student, teacher, samples, ids = crd_batch([3, 0])
    for arguments in [
        (student, teacher[:1], samples, ids),
        (student, teacher, samples[:1], ids),
        (student, teacher, samples, ids[:1]),
    ]:
        with pytest.raises(ValueError, match="do not fit"):
            crd()(*arguments, 0)

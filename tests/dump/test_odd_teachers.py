"""Teachers of every kind: what they give, what they hold, and the number type they compute in."""

from __future__ import annotations

import re
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from softcache.dump.batch_composition import check_batch_composition
from softcache.dump.teacher import Teacher
from softcache.dump.teacher_state import digest_of, fingerprint
from softcache.errors import TeacherError
from softcache.models import AnyInput, ImageInput, Model
from softcache.models import fingerprint as tensors_fingerprint

BATCH = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
ROWS = BATCH[:, :3]
Output = namedtuple("Output", "logits hidden")


def collate(items: Sequence[Any]) -> Tensor:
    return torch.stack([torch.as_tensor(item) for item in items])


def teacher(network: Any, *, classes: int = 3, output: str = "logits", **settings: Any) -> Teacher:
    return Teacher("t", "spec", network, collate, output=output, num_classes=classes, **settings)


class ModelOutput(OrderedDict[str, Any]):
    """As transformers gives them."""


# ------------------------------------------------------------------------------------------------------------ what it gives


@pytest.mark.parametrize(
    ("result", "said", "wanted"),
    [
        pytest.param({"logits": ROWS, "loss": 0}, "dict of 'logits', 'loss'", "result['logits']", id="dict"),
        pytest.param(ModelOutput(logits=ROWS), "ModelOutput of 'logits'", "result['logits']", id="ModelOutput"),
        pytest.param({"x": ROWS}, "dict of 'x'", "its logits", id="dict of something"),
        pytest.param((ROWS, ROWS), "tuple of Tensor[6, 3], Tensor[6, 3]", "result[0]", id="tuple"),
        pytest.param([ROWS], "list of Tensor[6, 3]", "result[0]", id="list"),
        pytest.param(Output(ROWS, None), "Output of Tensor[6, 3], NoneType[]", "result[0]", id="named tuple"),
        pytest.param(list(ROWS), "list of Tensor[3], Tensor[3], Tensor[3]", "its logits", id="rows"),
        pytest.param((row for row in ROWS), "generator", "its logits", id="generator"),
        pytest.param(None, "NoneType", "its logits", id="nothing"),
        pytest.param("ant", "str", "its logits", id="text"),
        pytest.param(object(), "object", "its logits", id="object"),
        pytest.param([[1.0, 2.0], [3.0]], "list of", "its logits", id="ragged"),
        pytest.param(np.array([["a", "b", "c"]]), "an array of <U1", "its logits", id="array of texts"),
        pytest.param(ROWS > 0, "a tensor of bool", "its logits", id="yes and no"),
        pytest.param(ROWS.to(torch.complex64), "a tensor of complex64", "its logits", id="complex"),
        pytest.param(ROWS.to_sparse_csr, "a tensor of float32 in layout sparse", "its logits", id="sparse"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_results_that_are_no_rows_of_logits(result: Any, said: str, wanted: str) -> None:
    made = (lambda: result()) if callable(result) and not isinstance(result, Tensor) else (lambda: result)

    def gives(batch: Any) -> Any:
        return made()

    with pytest.raises(TeacherError, match=re.escape(said)) as caught:
        teacher(gives)(BATCH)
    assert "(test_odd_teachers.py, line " in caught.value.message
    assert f"gives {wanted} alone" in caught.value.tip


@pytest.mark.parametrize(
    ("result", "message", "tip"),
    [
        pytest.param(ROWS[:, 0], r"shape \(6,\)", "one number a sample is no row of logits: for two", id="one of two"),
        pytest.param(ROWS[:, :1], r"shape \(6, 1\)", "trained for these classes", id="one column"),
        pytest.param(ROWS.to(torch.float8_e4m3fn)[:, :2], "gave float8_e4m3fn", "float32", id="float8"),
    ],
)
def test_rows_of_another_kind(result: Any, message: str, tip: str) -> None:
    with pytest.raises(TeacherError, match=message) as caught:
        teacher(lambda batch: result, classes=2)(BATCH)
    assert tip in caught.value.tip


@pytest.mark.parametrize(
    "result",
    [
        pytest.param(ROWS.numpy(), id="NumPy"),
        pytest.param(ROWS.double().numpy(), id="float64"),
        pytest.param(ROWS.tolist(), id="lists"),
        pytest.param([row.numpy() for row in ROWS], id="arrays"),
        pytest.param(tuple(map(tuple, ROWS.tolist())), id="tuples"),
        pytest.param(ROWS.clone().requires_grad_(), id="with gradients"),
    ],
)
def test_rows_of_numbers_of_every_kind(result: Any) -> None:
    assert torch.equal(teacher(lambda batch: result)(BATCH).logits, ROWS)


def breaks(batch: Any) -> Any:
    raise KeyError("stage7")


def test_a_fault_is_told_with_the_users_line() -> None:
    with pytest.raises(TeacherError, match=r"failed: KeyError: 'stage7' \(test_odd_teachers.py, line \d+\)"):
        teacher(breaks)(BATCH)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(4, 3)
    )  # inside torch there is no line of a user's but where it is called
    with pytest.raises(TeacherError, match=r"failed: RuntimeError: mat1 and mat2 .*\(\w+.py, line \d+\)"):
        teacher(net)(BATCH)
    one = Teacher("t", "spec", nn.Linear(5, 3), breaks, output="logits", num_classes=3)
    with pytest.raises(TeacherError, match=r"the collate of teacher 't' failed: KeyError.*test_odd_teachers.py, line"):
        one.collated([1])


# ------------------------------------------------------------------------------------------------------------ what it holds


class Extra(nn.Module):
    """A linear layer, and a state that is no tensor; it counts its calls in it if `counts`."""

    def __init__(self, state: Any, *, counts: bool = False) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.fc, self.state, self.counts = nn.Linear(5, 3), state, counts

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state

    def forward(self, batch: Tensor) -> Tensor:
        if self.counts:
            self.state = {**self.state, "calls": self.state.get("calls", 0) + 1}
        return self.fc(batch)


@pytest.mark.parametrize(
    "states",
    [
        pytest.param(({"scale": 1}, {"scale": 2}), id="numbers"),
        pytest.param((b"ab", b"ac"), id="bytes"),
        pytest.param(({"rows": [torch.ones(2)]}, {"rows": [torch.zeros(2)]}), id="tensors inside"),
        pytest.param((None, "none"), id="nothing"),
        pytest.param(([["a"], []], [[], ["a"]]), id="nested"),
    ],
)
def test_state_that_is_no_tensor_belongs_to_the_fingerprint(states: Any) -> None:
    first, same, other = (teacher(Extra(state)) for state in (states[0], states[0], states[1]))
    first.check_first_batch(BATCH)
    first.check_at_end()
    assert first.fingerprint == same.fingerprint != other.fingerprint
    assert first.fingerprint is not None


def test_state_that_has_no_bytes_leaves_the_outputs_to_tell() -> None:
    one = teacher(Extra(object()))
    assert one.fingerprint is None
    one.check_first_batch(BATCH)
    assert one.fingerprint is not None
    one.check_at_end()


def test_state_that_changes_is_found() -> None:
    with pytest.raises(TeacherError, match="changed its state '_extra_state' while it ran"):
        teacher(Extra({}, counts=True)).check_first_batch(BATCH)


class Kept(nn.Module):
    """Buffers of other kinds than floats; `change` is done to them at each call."""

    def __init__(self, change: Callable[[Any], None]) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.fc, self.change = nn.Linear(5, 3), change
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64), persistent=False)
        self.register_buffer("gaps", torch.tensor([float("nan"), 1.0]))

    def forward(self, batch: Tensor) -> Tensor:
        self.change(self)
        return self.fc(batch)


def grows(net: Any) -> None:
    net.seen = torch.cat([net.seen, net.seen[:1]])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        pytest.param(lambda net: net.mask.fill_(True), "mask", id="yes and no"),
        pytest.param(lambda net: net.seen.add_(1), "seen", id="not saved"),
        pytest.param(grows, "seen", id="grows"),
        pytest.param(lambda net: setattr(net, "seen", net.seen.double()), "seen", id="another type"),
        pytest.param(lambda net: setattr(net, "gaps", None), "gaps", id="gone"),
    ],
)
def test_buffers_of_every_kind_must_stand_still(change: Any, name: str) -> None:
    with pytest.raises(TeacherError, match=f"changed its buffer '{name}' while it ran"):
        teacher(Kept(change)).check_first_batch(BATCH)


def test_buffers_of_every_kind_may_be_there() -> None:
    one = teacher(Kept(lambda net: None))
    one.check_first_batch(BATCH)
    one.check_at_end()


@pytest.mark.filterwarnings("ignore")  # that torch will do it elsewhere
def test_a_quantised_module_is_known_by_its_numbers() -> None:
    def made(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
        return torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)

    first, same, other = (teacher(made(seed)) for seed in (0, 0, 1))
    assert first.fingerprint == same.fingerprint != other.fingerprint
    first.check_first_batch(BATCH)
    first.check_at_end()


def test_plain_tensors_have_the_fingerprint_that_they_always_had() -> None:
    """Those of the caches that are there."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    assert fingerprint(net) == tensors_fingerprint(net)
    assert fingerprint(Model(net, AnyInput())) == tensors_fingerprint(net)


def test_no_two_states_read_the_same() -> None:
    values: list[Any] = [
        1,
        1.0,
        True,
        "1",
        b"1",
        None,
        [1],
        [[1]],
        [1, 1],
        {"1": 1},
        {1: 1},
        [],
        {},
        "",
        torch.tensor(1),
    ]
    values += [torch.tensor([1]), torch.tensor([1.0]), torch.tensor([[1]]), torch.ones(1, dtype=torch.int32)]
    digests = [digest_of(value) for value in values]
    assert None not in digests
    assert len(set(digests)) == len(values)
    assert digest_of([object()]) is None


# -------------------------------------------------------------------------------------------------------------- half types

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])


def small() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))


@HALVES
def test_a_module_in_a_half_type_is_given_its_own_and_its_rounding_is_stated(dtype: torch.dtype) -> None:
    one = teacher(small().to(dtype))
    one.check_first_batch(BATCH)
    out = one(BATCH)
    with torch.no_grad():
        wanted = small().to(dtype)(BATCH.to(dtype)).float()
        exact = small()(BATCH)
    assert torch.equal(out.logits, wanted)
    assert (one.rounds, one.compute_dtype) == (True, str(dtype).removeprefix("torch."))
    assert bool((out.rounding > 0).all())
    assert float((out.logits - exact).abs().max()) < 0.05
    one.check_at_end()


@HALVES
def test_a_model_in_a_half_type_is_normalised_in_float32_first(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    model = Model(net.to(dtype), ImageInput(3, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    items = [np.random.default_rng(i).integers(0, 256, (8, 8, 3)).astype(np.uint8) for i in range(4)]
    one = Teacher("t", "spec", model, model.input.collate, output="logits", num_classes=3)
    one.check_first_batch(one.collated(items))
    check_batch_composition(one, items)
    with torch.no_grad():
        wanted = net(model.input.prepare(model.input.collate(items)).to(dtype)).float()
    assert torch.equal(one(one.collated(items)).logits, wanted)


class Casts(nn.Module):
    """Takes float32, and casts itself after something that has to be done in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small().half()

    def forward(self, batch: Tensor) -> Tensor:
        assert batch.dtype == torch.float32
        return self.net((batch * 1e5 / 1e5).half())


def test_a_module_that_casts_by_itself_is_given_float32() -> None:
    one = teacher(Casts())
    one.check_first_batch(BATCH)
    assert one.compute_dtype == "float16"


@HALVES
def test_a_module_in_a_half_type_under_autocast_has_its_last_layer_in_float32(dtype: torch.dtype) -> None:
    one = teacher(small().to(dtype), autocast=torch.bfloat16)
    out = one(BATCH)
    net = small().to(dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        inner = net[:2](BATCH)
    wanted = inner.double() @ net[2].weight.double().T + net[2].bias.double()
    assert (one.compute_dtype, one.rounds) == ("float32", False)
    torch.testing.assert_close(out.logits.double(), wanted, rtol=1e-6, atol=1e-6)


class TwoHeads(nn.Module):
    """The layer that gives the logits is not the last that was made."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.body, self.head, self.other = nn.Linear(5, 16), nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, batch: Tensor) -> Tensor:
        return self.head(self.body(batch).tanh())


def test_under_autocast_the_layer_that_gives_the_logits_is_found_by_them() -> None:
    net = TwoHeads()
    out = teacher(net, autocast=torch.bfloat16)(BATCH)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        inner = net.body(BATCH).tanh()
    torch.testing.assert_close(out.logits, inner.float() @ net.head.weight.T + net.head.bias, rtol=1e-6, atol=1e-6)


def test_under_autocast_a_forward_of_somebodys_own_is_put_back() -> None:
    net = small()
    own = net[2].forward
    net[2].forward = lambda inputs: own(inputs)
    before = net[2].forward
    teacher(net, autocast=torch.bfloat16)(BATCH)
    assert net[2].__dict__["forward"] is before

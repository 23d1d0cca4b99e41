"""Which device a rank takes, and what is set around exact arithmetic. No GPU is needed: torch is told of some."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from softcache import machine
from softcache.errors import ConfigError
from softcache.students.compare import exact_float32


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """gpus(count, environment): torch sees that many, in a process that was started so; the device that is current."""
    chosen: list[torch.device] = []
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def make(count: int, environment: Mapping[str, str]) -> list[torch.device]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        return chosen

    return make


SECOND = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("count", "environment", "name", "device"),
    [
        pytest.param(0, {}, "auto", "cpu", id="no GPU"),
        pytest.param(0, SECOND, "cpu", "cpu", id="ranks on the CPU"),
        pytest.param(4, {}, "auto", "cuda:0", id="alone"),
        pytest.param(4, {}, "cuda:3", "cuda:3", id="alone, named"),
        pytest.param(2, SECOND, "cuda", "cuda:1", id="torchrun"),
        pytest.param(1, SECOND, "auto", "cuda:0", id="each rank sees its own"),
        pytest.param(1, {"RANK": "1", "WORLD_SIZE": "2"}, "auto", "cuda:0", id="the same under SLURM"),
        pytest.param(2, {"RANK": "1", "WORLD_SIZE": "2"}, "cuda:1", "cuda:1", id="named for each rank by hand"),
    ],
)
def test_the_device_of_a_rank(gpus: Any, count: int, environment: dict[str, str], name: str, device: str) -> None:
    chosen = gpus(count, environment)
    assert machine.pick_device(name) == torch.device(device)
    assert chosen == ([torch.device(device)] if device.startswith("cuda") else [])


@pytest.mark.parametrize(
    ("count", "environment", "name", "message", "tip"),
    [
        pytest.param(
            4, {"RANK": "1", "WORLD_SIZE": "4"}, "cuda", "without a LOCAL_RANK", "SLURM_LOCALID", id="no local rank"
        ),
        pytest.param(
            2, SECOND, "cuda:0", "all 2 ranks of this machine would take one", "--device cuda:", id="one for all"
        ),
        pytest.param(
            2, SECOND | {"LOCAL_RANK": "2"}, "cuda", "LOCAL_RANK is 2: there are 2 GPUs", "as many ranks", id="too many"
        ),
        pytest.param(2, {}, "cuda:2", "--device cuda:2: there are 2 GPUs", "cuda:N", id="not there"),
        pytest.param(1, {}, "cuda:1", "--device cuda:1: there are 1 GPUs", "cuda:N", id="not the only one"),
        pytest.param(2, SECOND | {"LOCAL_RANK": "b"}, "cuda", "LOCAL_RANK is 'b'", "torchrun", id="no number"),
        pytest.param(0, {}, "cuda", "finds no GPU", "--device cpu", id="none"),
        pytest.param(0, {}, "mps", "computes on cpu and cuda", "--device cpu", id="mps"),
        pytest.param(0, {}, "meta", "computes on cpu and cuda", "--device cpu", id="meta"),
        pytest.param(0, {}, "gpu", "unknown device 'gpu'", "use auto", id="no device"),
    ],
)
def test_devices_that_are_refused(
    gpus: Any, count: int, environment: dict[str, str], name: str, message: str, tip: str
) -> None:
    chosen = gpus(count, environment)
    with pytest.raises(ConfigError, match=message) as caught:
        machine.pick_device(name)
    assert tip in caught.value.tip
    assert chosen == []


def test_what_equal_bytes_depend_on_is_said_of_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = machine.describe_device(torch.device("cpu"))
    assert cpu == f"cpu {torch.backends.cpu.get_cpu_capability()}"  # as in every cache that is there
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    told = machine.describe_device(torch.device("cuda", 0))
    assert told == "cuda Tesla, cuDNN 91002, convolutions tf32, products ieee"  # torch's defaults
    with exact_float32(torch.device("cpu")):
        told = machine.describe_device(torch.device("cuda", 0))
        assert told.endswith("convolutions ieee, products ieee")


def settings() -> dict[str, str]:
    backends = torch.backends
    parts = {"conv": backends.cudnn.conv, "rnn": backends.cudnn.rnn, "mkldnn": backends.mkldnn.conv}
    parts |= {"matmul": backends.cuda.matmul}
    return {name: getattr(part, "fp32_precision", "") for name, part in parts.items()}


def by_flags() -> None:
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")


def by_one_name() -> None:
    torch.backends.fp32_precision = "tf32"


def by_kind() -> None:
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"


@pytest.fixture
def _put_back() -> Any:
    parts = [SimpleNamespace(of=part, was=part.fp32_precision) for part in (
        torch.backends, torch.backends.cudnn, torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul,
        torch.backends.mkldnn.conv, torch.backends.mkldnn.rnn, torch.backends.mkldnn.matmul,
    )]  # fmt: skip
    yield
    for part in parts:
        part.of.fp32_precision = part.was


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="one flag, before torch 2.9")
@pytest.mark.filterwarnings("ignore:Please use the new API settings")
@pytest.mark.parametrize("set_by", [by_flags, by_one_name, by_kind])
@pytest.mark.usefixtures("_put_back")
def test_exports_are_compared_in_float32_whatever_is_set(set_by: Any) -> None:
    set_by()
    before = settings()
    with exact_float32(torch.device("cpu")):
        assert set(settings().values()) == {"ieee"}
    assert settings() == before


TWO = {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}
ELSEWHERE = {"LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("wanted", "environment", "alone", "shared"),
    [
        pytest.param(None, {}, 8, 8, id="all cores"),
        pytest.param(3, {"OMP_NUM_THREADS": "5"}, 3, 3, id="a flag before all"),
        pytest.param(None, {"OMP_NUM_THREADS": "5"}, 5, 5, id="OMP_NUM_THREADS"),
        pytest.param(None, {"OMP_NUM_THREADS": "5,2"}, 5, 5, id="for nested levels"),
        pytest.param(None, {"OMP_NUM_THREADS": "many"}, 8, 8, id="no number"),
        pytest.param(None, {"OMP_NUM_THREADS": "0"}, 8, 8, id="none"),
        pytest.param(None, {"OMP_NUM_THREADS": "5", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, 5, 5, id="one rank"),
        pytest.param(None, TWO | {"OMP_NUM_THREADS": "1"}, 8, 4, id="torchrun sets it to 1"),
        pytest.param(None, ELSEWHERE | {"OMP_NUM_THREADS": "1"}, 8, 8, id="one rank of several on this machine"),
    ],
)
def test_threads(
    monkeypatch: pytest.MonkeyPatch, wanted: int | None, environment: dict[str, str], alone: int, shared: int
) -> None:
    """A plan has the same number with and without torchrun."""
    for name in ("OMP_NUM_THREADS", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert machine.pick_threads(wanted) == shared
    assert machine.pick_threads(wanted, shared=False) == alone


@pytest.mark.parametrize(
    ("name", "device", "able", "said"),
    [
        ("bf16", "cpu", False, True),
        ("fp16", "cpu", False, True),
        ("bf16", "cpu", True, False),
        ("none", "cpu", False, False),
        ("bf16", "cuda", False, False),
    ],
)
def test_a_half_type_that_the_processor_cannot_compute_in_is_told(
    name: str, device: str, able: bool, said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "_computes_in", lambda _half: able)
    monkeypatch.setattr("softcache.errors._TOLD", set())
    for _ in range(2):
        assert machine.autocast_dtype(name, torch.device(device)) == machine.HALF_TYPES[name]
    told = capsys.readouterr().err
    assert told.count("ten times as long as in float32") == said
    assert (f"--autocast {name}" in told) == said


def test_what_torch_does_not_tell_of_a_processor_is_not_warned_of() -> None:
    assert machine._computes_in("no such type")

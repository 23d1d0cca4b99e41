"""Shared by the tests: users' files, one of them with a small data set and small teachers; and a dump of them in one call."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import softcache
from softcache import dump, errors
from softcache.config import DumpConfig
from softcache.report import progress

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded; read when the hub's package is first imported

# what is remembered of hashed files stays out of the home of whoever runs the tests
os.environ["SOFTCACHE_HOME"] = tempfile.mkdtemp(prefix="softcache-home-")
atexit.register(shutil.rmtree, os.environ["SOFTCACHE_HOME"], ignore_errors=True)

if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:  # the workers share the cores, their children too
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

# a shell without job control lets what it starts with `&` ignore Ctrl-C, and so would every test of it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# every shard is synced to the disk: in memory, where there is room for it, that takes no time
MEMORY = Path("/dev/shm")
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 2**31:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole", action="store_true", help="also run the long counts of which the other tests run a part"
    )
    if find_spec("pytest_timeout") is None:
        parser.addini("timeout", "a limit for each test: it is kept where pytest-timeout is installed")


@pytest.hookimpl(tryfirst=True)  # before what -m deselects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip("a long count, of which other tests run a part: pytest --whole")
    for item in items:
        if item.get_closest_marker("whole"):
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(3600) if config.getoption("--whole") else skip)


WORLDS = Path(__file__).parent / "worlds"  # users' files: data sets, teachers and students


def needs(package: str, extra: str) -> pytest.MarkDecorator:
    """Marks what is skipped where the package of an extra is not installed."""
    return pytest.mark.skipif(find_spec(package) is None, reason=f"needs the extra softcache[{extra}]")


QuickDump = Callable[..., softcache.Cache]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # everything here is tiny


def seed_everything() -> None:
    """Every global generator begins anew, whichever tests ran before, and in whichever worker."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    seed_everything()


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_TOLD", set())  # what is said once is said in each test


@pytest.fixture(autouse=True)
def _no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SHOWN_AFTER_S", float("inf"))  # what is printed does not hang on how long it took


@pytest.fixture(scope="session")
def toy() -> Path:
    """A user's .py file: a data set and teachers."""
    return WORLDS / "toy.py"


@pytest.fixture
def quick_dump(tmp_path: Path, toy: Path) -> QuickDump:
    """quick_dump(data=spec, teacher=[spec, ...], out=name, **settings) -> the opened cache; by default exact in float32."""

    def make(data: str = "", teacher: Sequence[str] = (), out: str = "cache", **settings: Any) -> softcache.Cache:
        settings = {"codec": "float32", "threads": 1, "workers": 0} | settings
        config = DumpConfig(
            data=data or f"{toy}:images",
            teacher=tuple(teacher) or (f"{toy}:exact",),
            out=str(tmp_path / out),
            **settings,
        )
        result = dump.run(config, quiet=True)
        return softcache.open(result.path)

    return make


@pytest.fixture
def timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model costs is measured by one run of it: no test looks at a time."""
    from softcache.students import cost

    monkeypatch.setattr(cost, "SECONDS", 0.0)
    monkeypatch.setattr(cost, "RUNS", 1)

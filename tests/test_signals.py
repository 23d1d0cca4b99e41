"""Signals that come while a module is being imported."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from softcache import cli, signals
from softcache.train.stop import Asked, Stop

TERM, INT = signal.SIGTERM, signal.SIGINT
SENDS = """
import os, signal
try:
    os.kill(os.getpid(), signal.{name})
    for _ in range(1000):
        pass
except BaseException:  # as C code does
    pass
whole = True
"""


class Ended(BaseException):
    pass


def imported(folder: Path, name: str, monkeypatch: Any) -> Any:
    """A module that sends its own process this signal."""
    (folder / "sends_a_signal.py").write_text(SENDS.format(name=name))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "sends_a_signal", raising=False)
    importlib.invalidate_caches()
    return importlib.import_module("sends_a_signal")


def import_and_wait(folder: Path, name: str, monkeypatch: Any) -> None:
    """The module is whole, and the signal comes afterwards."""
    assert imported(folder, name, monkeypatch).whole
    end = time.monotonic() + 20
    while time.monotonic() < end:
        time.sleep(0.01)
    raise AssertionError("the signal was lost")


@pytest.mark.parametrize("number", [TERM, INT])
def test_it_is_raised_when_the_import_has_ended(tmp_path: Path, monkeypatch: Any, number: signal.Signals) -> None:
    before = [signal.getsignal(one) for one in (TERM, INT, signal.SIGALRM)]
    with pytest.raises(Ended), signals.raised({number: Ended}):
        import_and_wait(tmp_path, number.name, monkeypatch)
    assert [signal.getsignal(one) for one in (TERM, INT, signal.SIGALRM)] == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_an_import_that_takes_too_long_is_given_up(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(signals, "GRACE_S", 0.0)
    (tmp_path / "endless.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(20)"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Ended), signals.raised({TERM: Ended}):
        importlib.import_module("endless")


def test_a_run_that_may_be_broken_off_is_not_within_an_import(tmp_path: Path, monkeypatch: Any) -> None:
    def run() -> None:
        with signals.raised({TERM: Ended}), Stop() as stop, pytest.raises(Asked), stop.opened():
            import_and_wait(tmp_path, "SIGTERM", monkeypatch)

    with pytest.raises(Ended):  # when it is left, the signal takes its course
        run()


def test_within_a_wait_in_c_code_it_ends_the_process() -> None:
    """A handler of Python's would run after the wait."""
    before = signal.getsignal(TERM)
    pid = os.fork()
    if not pid:
        with signals.raised({TERM: Ended}), signals.kills():
            os.kill(os.getpid(), TERM)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -TERM
    ignored = signal.signal(INT, signal.SIG_IGN)
    try:
        with signals.kills():
            assert (signal.getsignal(TERM), signal.getsignal(INT)) == (signal.SIG_DFL, signal.SIG_IGN)
    finally:
        signal.signal(INT, ignored)
    assert signal.getsignal(TERM) is before


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(INT, signal.SIG_IGN)
    try:
        with signals.raised({INT: Ended}):
            os.kill(os.getpid(), INT)  # raises nothing
            assert signal.getsignal(INT) == signal.SIG_IGN
        assert signal.getsignal(INT) == signal.SIG_IGN
    finally:
        signal.signal(INT, before)


def test_a_command_that_is_stopped_while_it_imports_says_so(
    tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(f"import time\n{SENDS.format(name='SIGTERM')}\ndef data():\n    time.sleep(20)\n")
    monkeypatch.chdir(tmp_path)
    argv = ["train", "--data", "mine.py:data", "--student", "softcache:mlp", "--loss", "ce", "--out", "run"]
    assert cli.main(argv) == 143
    assert "terminated; nothing was learned yet" in capsys.readouterr().err

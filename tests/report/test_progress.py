"""Progress: nothing at first, a bar on a terminal, lines fit for a log elsewhere, silence when quiet."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest

from softcache.report import progress
from softcache.report.progress import Meter, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _no_progress() -> None:
    """Here it is as it is for users."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that `time.monotonic` gives here."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_of_a_log(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Meter("dump caches/a", 1000, unit="views", done=100, after_s=2, every_s=10) as meter:
        for _ in range(80):
            clock[0] += 0.5
            meter.add(10)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "dump caches/a: 140 of 1,000 views, 20/s, ETA 0:00:43"  # what was there already has no rate
    assert lines[1] == "dump caches/a: 340 of 1,000 views, 20/s, ETA 0:00:33"
    assert len(lines) == 4  # after 2, 12, 22 and 32 of 40 seconds


def test_bytes_and_a_note(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    meter = Meter("verify a", 3_000_000, unit="B", after_s=0)
    meter.note("loss 0.5")
    clock[0] += 2
    meter.add(1_000_000)
    assert capsys.readouterr().err == "verify a: 1.0 MB of 3.0 MB, 500.0 kB/s, ETA 0:00:04, loss 0.5\n"


def test_slow_work_has_a_rate_too(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    meter = Meter("train a", 10, unit="steps", after_s=0, every_s=0)
    meter.add(0)
    clock[0] += 8
    meter.add()
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("ETA unknown") and second == "train a: 1 of 10 steps, 0.12/s, ETA 0:01:12"


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_short_or_quiet_shows_nothing(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    stderr = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    assert list(track(range(5), "eval", 5, unit="batches")) == [0, 1, 2, 3, 4]
    with Meter("eval", 5, unit="batches", quiet=True, after_s=0, every_s=0) as meter:
        meter.add(5)
    assert meter.done == 5  # counted all the same
    assert stderr.getvalue() == ""


def test_a_bar_on_a_terminal_that_goes_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    with Meter("dump a", 4, unit="views", after_s=0.01) as meter:
        for _ in range(4):
            time.sleep(0.12)  # longer than the bar's own least time between two pictures
            meter.note("3 MB/s")
            meter.add()
        shown = stderr.getvalue()
    assert "\n" not in shown and re.search(r"dump a: +\d+%.*\d/4.00 .*view.*3 MB/s", shown)
    assert stderr.getvalue().rpartition("\r")[0].rpartition("\r")[2].strip() == ""  # wiped


def test_the_defaults_are_two_and_ten_seconds() -> None:
    assert (progress.SHOWN_AFTER_S, progress.LINE_EVERY_S) == (2.0, 10.0)

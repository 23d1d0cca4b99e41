"""Every prefix of the calls, under a model of what survives."""

from __future__ import annotations

import random
import shutil
from contextlib import suppress
from pathlib import Path

from faults.disk import Disk, lay_out
from faults.promise import judge, resume, undisturbed
from faults.report import Report, demand
from faults.small_dump import write_cache
from faults.watched import Choice, Recorder, Stopped, everywhere, layer

SURVIVALS = ("all", "lost", "torn", "mixed")
STATES = ("nothing", "unfinished", "old", "new")


def prefixes(root: Path, seed: int, *, at: Choice = everywhere, resumed_at: Choice = everywhere) -> Report:
    """Every prefix of the calls, under every model.

    Args:
        at: after which calls the power fails.
        resumed_at: after which of them that state is resumed as well; and after which calls a process dies, the next one
            goes on to the end, and then the power fails.
    """
    report, draw = Report("prefixes"), random.Random(seed)
    expected = undisturbed(root / "undisturbed")
    report.counts["calls of the file layer"] = len(expected.calls)
    disk, reached = Disk(), dict.fromkeys(SURVIVALS, 0)
    cuts, resumes = {*at(expected.calls), len(expected.calls)}, {*resumed_at(expected.calls)}
    for number, call in enumerate(expected.calls, start=1):
        disk.apply(call)
        for how in SURVIVALS if number in cuts else ():
            with report.trial(f"{how} of the first {number} calls, up to {call.name} {call.to or call.path}"):
                path = lay_out(root / "replayed", disk.survivors(how, draw))
                state = judge(path, expected)
                report.counts[f"{how}: {state}"] += 1
                if how in ("all", "lost"):  # the others are drawn anew each time
                    demand(STATES.index(state) >= reached[how], f"from {STATES[reached[how]]} back to {state}")
                    reached[how] = STATES.index(state)
                if number in resumes:
                    resume(path, expected)
                    report.counts["resumed"] += 1
    with report.trial("the last call"):
        demand(reached["all"] == reached["lost"] == STATES.index("new"), "a power cut undoes the finished cache")
    for number in sorted(resumes):
        with report.trial(f"killed after {number} calls, resumed, power cut"):
            path = lay_out(root / "replayed", after_resume(root / "resumed", number).survivors("lost", draw))
            demand(judge(path, expected) == "new", "what was said to be done is undone")
            report.counts["killed, resumed, power cut: new"] += 1
    return report


def after_resume(root: Path, number: int) -> Disk:
    """A disk on which a process died after so many calls, and another one went on to the end."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    died, went_on = Recorder(root, stop_after=number), Recorder(root)
    with layer(died), suppress(Stopped):
        write_cache(root / "cache")
    with layer(went_on):
        write_cache(root / "cache")
    disk = Disk()
    for call in (*died.calls, *went_on.calls):
        disk.apply(call)
    return disk

"""Every tool starts, says what it takes, and runs once in its quick form: whatever is runnable below tools/ is found."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
NEEDS = {
    "examples/executorch_student.py": "executorch",
    "examples/timm_loop.py": "timm",
    "examples/plain_loop.py": "torchvision",
    "bench/views.py": "matplotlib",
    "docs/make_completion.py": "shtab",
}
# ways in that --quick does not take by itself
MORE = {
    "bench/cache.py": ["--quick", "--memory"],
    "bench/dump.py": ["--step", "plan", "--samples", "50", "--classes", "5", "--views", "1", "--threads", "1"],
    "faults": ["kill", "--quick", "--full-command", "1"],
}


def runnable() -> list[str]:
    """Files that do something when they are run, and folders with a `__main__.py`, as python is given them below tools/."""
    found = [file for file in TOOLS.rglob("*.py") if '__name__ == "__main__"' in file.read_text(encoding="utf-8")]
    paths = [file.parent if file.name == "__main__.py" else file for file in found]
    return sorted(path.relative_to(TOOLS).as_posix() for path in paths)


def ran(tool: str, arguments: list[str], folder: Path) -> str:
    """What a tool printed, in a process of its own that must end well and leave nothing behind."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOLS / tool), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)
    assert done.returncode == 0, f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert list(folder.iterdir()) == []
    return done.stdout


def test_tools_are_found() -> None:
    found = runnable()
    assert {"faults", "hostile", "fuzz", "bench/cache.py", "golden/same_bytes.py", "examples/plain_loop.py"} <= {*found}
    assert {*NEEDS, *MORE} <= {*found}


@pytest.mark.parametrize("tool", runnable())
def test_help_says_what_it_does_and_takes(
    tool: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if tool in NEEDS:
        pytest.importorskip(NEEDS[tool])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [tool, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOLS / tool), run_name="__main__")
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert "usage:" in told and len(told.splitlines()) > 5
    assert "--quick" in told, f"tools/{tool} has no --quick"


@pytest.mark.slow
@pytest.mark.timeout(300)  # seconds each, where the machine is idle
@pytest.mark.parametrize("tool", runnable())
def test_it_runs_in_its_quick_form(tool: str, tmp_path: Path) -> None:
    if tool in NEEDS:
        pytest.importorskip(NEEDS[tool])
    assert ran(tool, ["--quick"], tmp_path).strip() != ""


@pytest.mark.slow
@pytest.mark.timeout(300)  # up to six processes that load torch, one after the other
@pytest.mark.parametrize("tool", MORE)
def test_it_runs_otherwise_too(tool: str, tmp_path: Path) -> None:
    assert ran(tool, MORE[tool], tmp_path).strip() != ""

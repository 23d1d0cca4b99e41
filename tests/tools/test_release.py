"""What is released: lower bounds that are written down twice and agree, and a wheel and a source archive that hold every file."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest
from packaging.version import Version

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))
from release.check_wheels import build, faults_of_archive, faults_of_wheel, released_files
from release.lowest import CONSTRAINTS, disagreements, lower_bounds, pins

REPOSITORY = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_lower_bound_has_its_pin_and_they_agree() -> None:
    bounds = lower_bounds(PROJECT)
    assert {"setuptools", "torch", "numpy", "matplotlib", "onnxscript", "pytest"} <= {*bounds}  # of every kind
    assert disagreements(bounds, pins(CONSTRAINTS.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("dependency", "pinned", "message"),
    [
        pytest.param("torch>=2.9", "torch==2.8.0", "at least 2.9 in pyproject.toml, but pinned to 2.8.0", id="another"),
        pytest.param("torch>=2.8", "", "at least 2.8 in pyproject.toml, but has no pin", id="no pin"),
        pytest.param("torch", "torch==2.8", "has no lower bound", id="no bound"),
        pytest.param("numpy>=2", "numpy==2\ntorch==2.8", "torch: is pinned to 2.8, but pyproject.toml", id="too many"),
    ],
)
def test_a_disagreement_is_said(dependency: str, pinned: str, message: str) -> None:
    project = {
        "build-system": {"requires": []},
        "project": {
            "name": "softcache",
            "dependencies": [dependency],
            "optional-dependencies": {"dev": ["softcache[demo]"]},
        },
    }
    (found,) = disagreements(lower_bounds(project), pins(pinned))
    assert message in found


def test_a_pin_may_be_written_in_full() -> None:
    assert disagreements({"torch": Version("2.8")}, pins("torch==2.8.0  # as the registry has it\n")) == []


def test_two_bounds_of_one_package_are_refused() -> None:
    project = {
        "build-system": {"requires": ["setuptools>=77"]},
        "project": {"name": "softcache", "dependencies": [], "optional-dependencies": {"dev": ["setuptools>=80"]}},
    }
    with pytest.raises(ValueError, match="setuptools has two lower bounds: 77 and 80"):
        lower_bounds(project)


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_the_source_archive_everything(tmp_path: Path) -> None:
    files = released_files()
    assert {"softcache/py.typed", "softcache/FORMAT.md", "tools/release/lowest.py", ".ci/run"} <= {*files}
    assert any(name.startswith("tests/golden/v1/") for name in files)
    archive, wheel = build(files, tmp_path)
    assert faults_of_archive(archive, files) == []
    assert faults_of_wheel(wheel, files) == []
    assert faults_of_wheel(wheel, [*files, "softcache/forgotten.toml"]) == [
        f"{wheel.name}: softcache/forgotten.toml is missing"
    ]

"""Do the lower bounds of pyproject.toml hold? The quick tests, in a fresh environment with the lowest versions it allows.

    python3.11 tools/release/lowest.py                           # about 6 GB of packages; everything is removed again
    python3.11 tools/release/lowest.py --keep lowest -- -n auto  # keeps the environment; more arguments for pytest

`tools/release/constraints-lowest.txt` names these versions and must agree with pyproject.toml, bound by bound. `--quick` compares
the two and prints what would be done, without doing it. Exit code 1 where they disagree or a test fails.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parents[2]
CONSTRAINTS = Path(__file__).with_name("constraints-lowest.txt")


def lower_bounds(project: Mapping[str, object]) -> dict[str, Version | None]:
    """Each package that pyproject.toml asks for, to build, to run or as an extra, with the lowest version; None without one.

    ValueError where two places give one package two bounds.
    """
    found: dict[str, Version | None] = {}
    for requirement in map(Requirement, _requirements(project)):
        lowest = next((Version(s.version) for s in requirement.specifier if s.operator in (">=", "==", "~=")), None)
        if found.setdefault(requirement.name, lowest) != lowest:
            raise ValueError(f"{requirement.name} has two lower bounds: {found[requirement.name]} and {lowest}")
    return found


def _requirements(project: Mapping[str, object]) -> list[str]:
    """All but the package's own extras, which one extra may take from another."""
    build, described = project["build-system"], project["project"]
    assert isinstance(build, Mapping) and isinstance(described, Mapping)
    listed = [*build["requires"], *described["dependencies"]]
    listed += [line for extra in described["optional-dependencies"].values() for line in extra]
    return [line for line in listed if Requirement(line).name != described["name"]]


def pins(constraints: str) -> dict[str, Version]:
    """Name -> version of the lines `name==version`; comments and empty lines aside."""
    lines = (line.partition("#")[0].strip() for line in constraints.splitlines())
    named = (line.partition("==") for line in lines if line)
    return {name: Version(version) for name, _, version in named}


def disagreements(bounds: Mapping[str, Version | None], pinned: Mapping[str, Version]) -> list[str]:
    """What has to change, a sentence for each package; empty where every bound has its pin and they are equal."""
    found = []
    for name in sorted({*bounds, *pinned}):
        bound, pin = bounds.get(name), pinned.get(name)
        if name not in bounds:
            found.append(f"{name}: is pinned to {pin}, but pyproject.toml does not ask for it")
        elif bound is None:
            found.append(f"{name}: has no lower bound in pyproject.toml")
        elif pin is None:
            found.append(f"{name}: is at least {bound} in pyproject.toml, but has no pin in {CONSTRAINTS.name}")
        elif pin != bound:
            found.append(f"{name}: is at least {bound} in pyproject.toml, but pinned to {pin}")
    return found


def plan(project: Mapping[str, object], environment: Path, pytest_arguments: Sequence[str]) -> list[list[str]]:
    """The commands, in their order."""
    described = project["project"]
    assert isinstance(described, Mapping)
    python, extras = str(environment / "bin" / "python"), ",".join(described["optional-dependencies"])
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", str(CONSTRAINTS)]
    return [
        [sys.executable, "-m", "venv", "--clear", str(environment)],
        [*install, "setuptools"],  # the lowest that builds the package does so here: hence no isolation
        [*install, "--no-build-isolation", "--editable", f"{REPOSITORY}[{extras}]"],
        [python, "-m", "pip", "check"],
        [python, "-m", "pytest", "-m", "not slow", "-n", "1", *pytest_arguments],
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="compare the bounds and print the plan")
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="make the environment there and keep it")
    parser.add_argument("pytest", nargs="*", metavar="ARGUMENT", help="for pytest, behind --")
    flags = parser.parse_args()

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    pinned = pins(CONSTRAINTS.read_text(encoding="utf-8"))
    if faults := disagreements(lower_bounds(project), pinned):
        print("\n".join(faults))
        return 1
    print(f"{len(pinned)} lower bounds of pyproject.toml, each with its pin")

    wanted, mine = project["project"]["requires-python"], ".".join(map(str, sys.version_info[:2]))
    if wanted != f">={mine}" and not flags.quick:
        print(
            f"this is Python {mine}, pyproject.toml asks for {wanted}: start this script with the lowest Python that it allows"
        )
        return 1
    with tempfile.TemporaryDirectory(prefix="softcache-lowest-") as scratch:
        commands = plan(project, flags.keep.absolute() if flags.keep else Path(scratch) / "environment", flags.pytest)
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
        for command in commands:
            print(f"$ {shlex.join(command)}", flush=True)
            if not flags.quick and (code := subprocess.run(command, cwd=REPOSITORY, env=clean).returncode):
                print(f"exit code {code}")
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Is what is released complete, and does it run? Builds wheel and source archive, and tries the wheel in fresh environments.

    python tools/release/check_wheels.py                           # with every Python of pyproject.toml's list that is found
    python tools/release/check_wheels.py --python /opt/python3.13/bin/python3

The archive is built from the files that git knows, the wheel from the archive, and both must hold what they should: the wheel
every file of the package, the archive every file. Then, for each Python, in an environment of its own (5 GB and more, removed
again) and in an empty folder: `softcache --version`, `softcache --help`, `softcache demo`. `--quick` builds and lists only. Exit
code 1 where something is missing or fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from softcache.report.tables import size, table

REPOSITORY = Path(__file__).resolve().parents[2]
HOOK = "import sys; from setuptools import build_meta; print(build_meta.build_{what}(sys.argv[1]))"
MADE_FOR_THE_ARCHIVE = ("PKG-INFO", "setup.cfg", "softcache.egg-info/")  # by setuptools, beside the files of git
COLUMNS = ("python", "softcache", "--help", "demo", "what the demo found")


def released_files() -> list[str]:
    """What git has of this checkout; of a copy without its repository, every file that .gitignore does not name."""
    if (REPOSITORY / ".git").exists():
        found = _git("ls-files", "-z")
    else:
        with tempfile.TemporaryDirectory() as empty:
            _git("init", "--quiet", "--bare", empty)
            found = _git(f"--git-dir={empty}", "--work-tree=.", "ls-files", "-z", "--others", "--exclude-standard")
    return sorted(name for name in found.split("\0") if name and not name.startswith(MADE_FOR_THE_ARCHIVE))


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout


def build(files: Iterable[str], scratch: Path) -> tuple[Path, Path]:
    """The source archive of a copy of these files, and the wheel of that archive."""
    copy, built = scratch / "copy", scratch / "built"
    for name in files:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, copy / name)
    archive = _build("sdist", copy, built)
    with tarfile.open(archive) as opened:
        opened.extractall(scratch / "unpacked", filter="data")
    (unpacked,) = (scratch / "unpacked").iterdir()
    return archive, _build("wheel", unpacked, built)


def _build(what: str, folder: Path, out: Path) -> Path:
    """What setuptools, as pyproject.toml names it, builds out of a folder."""
    done = subprocess.run(
        [sys.executable, "-c", HOOK.format(what=what), str(out)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"building the {what} failed\n{done.stdout}{done.stderr}")
    return out / done.stdout.splitlines()[-1]


def faults_of_archive(archive: Path, files: Iterable[str]) -> list[str]:
    """Which files are missing in the source archive, and which are there that do not belong to it."""
    with tarfile.open(archive) as opened:
        names = {member.name.partition("/")[2] for member in opened if member.isfile()}
    return _differences(archive.name, {name for name in names if not name.startswith(MADE_FOR_THE_ARCHIVE)}, {*files})


def faults_of_wheel(wheel: Path, files: Iterable[str]) -> list[str]:
    """Which files of the package are missing in the wheel, and which are there that do not belong to it."""
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if ".dist-info/" not in name}
    return _differences(wheel.name, names, {name for name in files if name.startswith("softcache/")})


def _differences(where: str, found: set[str], wanted: set[str]) -> list[str]:
    missing = [f"{where}: {name} is missing" for name in sorted(wanted - found)]
    return missing + [f"{where}: {name} should not be there" for name in sorted(found - wanted)]


def pythons() -> list[str]:
    """The interpreters of pyproject.toml's classifiers that start here."""
    classifiers = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["classifiers"]
    versions = [
        line.rpartition(" ")[2] for line in classifiers if line.startswith("Programming Language :: Python :: 3.")
    ]
    return [f"python{version}" for version in versions if _starts(f"python{version}")]


def _starts(python: str) -> bool:
    return shutil.which(python) is not None and not subprocess.run([python, "-c", ""], capture_output=True).returncode


def tried(python: str, wheel: Path, scratch: Path) -> tuple[str, str, str, str, str]:
    """Install the wheel into a fresh environment, and run it in an empty folder: a row of COLUMNS.

    SystemExit, with what was printed, where something fails.
    """
    environment, empty = scratch / "environment", scratch / "empty"
    empty.mkdir(exist_ok=True)
    _run([python, "-m", "venv", "--clear", str(environment)], empty)
    own = environment / "bin"
    _run([str(own / "python"), "-m", "pip", "install", "--quiet", f"{wheel}[demo]"], empty)
    version = _run([str(own / "python"), "--version"], empty)[0].split()[-1]
    said = _run([str(own / "softcache"), "--version"], empty)[0].strip()
    _, help_s = _run([str(own / "softcache"), "--help"], empty)
    printed, demo_s = _run([str(own / "softcache"), "demo"], empty)
    shutil.rmtree(environment)
    shutil.rmtree(empty)
    found = next((line for line in printed.splitlines() if line.startswith("from the cache, T=2:")), "nothing")
    return version, said, f"{help_s:.2f} s", f"{demo_s:.0f} s", found


def _run(command: Sequence[str], folder: Path) -> tuple[str, float]:
    """What a command printed, and how long it took; nothing of this checkout is in its way."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout, time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="build and list only")
    parser.add_argument(
        "--python", action="append", metavar="PROGRAM", help="an interpreter to try; may be given again"
    )
    flags = parser.parse_args()

    files = released_files()
    with tempfile.TemporaryDirectory(prefix="softcache-wheels-") as scratch:
        archive, wheel = build(files, Path(scratch))
        faults = faults_of_archive(archive, files) + faults_of_wheel(wheel, files)
        for path in (archive, wheel):
            print(f"{path.name}: {size(path.stat().st_size)}")
        print(
            "\n".join(faults)
            or f"complete: {len(files)} files, {sum(name.startswith('softcache/') for name in files)} of them of the package"
        )
        if faults or flags.quick:
            return 1 if faults else 0
        rows = []
        for python in flags.python or pythons():
            print(f"trying {python}", flush=True)
            rows.append(tried(python, wheel, Path(scratch)))
        print(table(COLUMNS, rows, words=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Every benchmark whose figures stand in softcache/docs/MEASURED.md, one after the other, each in a process of its own.

    python tools/bench/all.py --list                      # names and commands
    python tools/bench/all.py --out measured              # all of them; what each printed and its figures, in this folder
    python tools/bench/all.py --out measured --only reading --only losses
    python tools/bench/all.py --quick                     # the shortest, in its quick form

The figures are printed beside those of an earlier run (`--old FILE`, a `figures.json` that this tool wrote; default: those of
the page). Run it on a quiet machine: about an hour and a half on two cores, half of it for `views`, which like `real` is left
out where there is no MNIST in `--data-root`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from softcache.report.tables import table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.harness import QUICK

HERE = Path(__file__).resolve().parent
PAGE = HERE / "figures.json"  # of softcache/docs/MEASURED.md
MOVED = 0.1  # a figure that moved by more than this share is marked
COMMANDS = {  # OUT: the folder; ROOT: --data-root; minutes, estimated, on two cores
    "reading": ("cache.py", 4),
    "memory": ("cache.py --memory", 5),
    "step": ("train.py --teacher softcache:resnet20 --codecs 'float16 float32'", 4),
    "step of each codec": ("train.py --threads 1 --teacher 'softcache:mlp?hidden=256' --no-live", 8),
    "losses": ("losses.py", 1),
    "codecs": ("codecs.py --only trained unstructured wide --png OUT/codecs.png", 6),
    "dump": ("dump.py --threads 1", 12),
    "plan": ("dump.py --threads 1 --samples 20000 --views 4 --plan-only", 2),
    "verify": ("verify.py --threads 1 --rounds 3", 6),
    "open": ("open.py", 12),
    "positions": ("positions.py", 10),
    "embeddings": ("embeddings.py", 3),
    "views": ("views.py --data-root ROOT --out OUT/views", 45),
    "real": ("codecs.py --only real --model OUT/views/teacher --data 'torchvision:MNIST?root=ROOT&train=false'", 2),
}
NEED_MNIST = ("views", "real")


def command_of(name: str, out: Path, root: Path) -> list[str]:
    script, *arguments = shlex.split(COMMANDS[name][0])
    arguments = [word.replace("OUT/", f"{out}/").replace("ROOT", str(root)) for word in arguments]
    return [sys.executable, str(HERE / script), *arguments]


def figures_in(found: Any, at: str = "") -> Iterator[tuple[str, float]]:
    """(name, number) of everything in a benchmark's JSON; an element of a list is called by the first text in it."""
    if isinstance(found, bool):
        return
    if isinstance(found, int | float):
        yield at, float(found)
        return
    pairs: list[tuple[str, Any]] = []
    if isinstance(found, dict):
        pairs = [(str(key), value) for key, value in found.items()]
    elif isinstance(found, list):
        for number, one in enumerate(found):
            texts = [v for v in one.values() if isinstance(v, str) and v] if isinstance(one, dict) else []
            pairs.append((", ".join(texts[:2]) or str(number), one))
    for key, value in pairs:
        yield from figures_in(value, f"{at}: {key}" if at else key)


def measure(name: str, out: Path, root: Path, *, quick: bool) -> dict[str, float] | None:
    """Run one benchmark; its figures, or None where it failed. What it printed goes to a file."""
    stem = name.replace(" ", "-")
    file = out / f"{stem}.json"
    command = [*command_of(name, out, root), "--json", str(file), *(["--quick"] if quick else [])]
    begin = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    (out / f"{stem}.txt").write_text(f"{shlex.join(command)}\n{done.stdout}")
    print(f"{name}: exit code {done.returncode}, {(time.monotonic() - begin) / 60:.1f} minutes", flush=True)
    if done.returncode or not file.is_file():
        print(done.stdout[-2000:])
        return None
    return dict(figures_in(json.loads(file.read_text())))


def beside(new: dict[str, dict[str, float]], old: dict[str, dict[str, float]]) -> str:
    """Every figure that is known of both runs, and how far it moved."""
    rows = []
    for name, figures in new.items():
        for figure, before in old.get(name, {}).items():
            if figure in figures:
                moved = figures[figure] / before - 1 if before else 0.0
                mark = "moved" if abs(moved) > MOVED else ""
                rows.append([name, figure, f"{before:.4g}", f"{figures[figure]:.4g}", f"{100 * moved:+.0f} %", mark])
    return table(["benchmark", "figure", "old", "new", "change", ""], rows) if rows else "no figure is known of both"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for what they print and for their figures")
    parser.add_argument("--only", action="append", choices=COMMANDS, metavar="NAME", help="one of them; repeat")
    parser.add_argument("--old", type=Path, default=PAGE, metavar="FILE", help="figures of an earlier run")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder that holds MNIST/raw")
    parser.add_argument("--list", action="store_true", help="print names, commands and minutes, and stop")
    parser.add_argument("--quick", action="store_true", help="the shortest, or those of --only, in their quick form")
    arguments = parser.parse_args()
    if not (arguments.out or arguments.list or arguments.quick):
        parser.error("--out is missing")
    return arguments


def run(names: Sequence[str], out: Path, arguments: argparse.Namespace) -> int:
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, float]] = {}
    failed = []
    for name in names:
        if name in NEED_MNIST and not (arguments.data_root / "MNIST").is_dir():
            print(f"{name}: left out, there is no MNIST in {arguments.data_root}")
            continue
        figures = measure(name, out, arguments.data_root, quick=arguments.quick)
        if figures is None:
            failed.append(name)
        else:
            found[name] = figures
            (out / "figures.json").write_text(json.dumps(found, indent=1) + "\n")
    print(beside(found, json.loads(arguments.old.read_text())))
    if arguments.quick:
        print(QUICK)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


def main() -> int:
    arguments = parse()
    if arguments.list:
        rows = [[name, command, minutes] for name, (command, minutes) in COMMANDS.items()]
        print(table(["name", "command", "minutes"], rows))
        return 0
    if arguments.quick:
        with tempfile.TemporaryDirectory(prefix="bench-all-") as folder:
            return run(arguments.only or ["losses"], Path(folder), arguments)
    return run(arguments.only or tuple(COMMANDS), arguments.out, arguments)


if __name__ == "__main__":
    sys.exit(main())

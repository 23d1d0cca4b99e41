"""Hostile caches, run folders and texts, made from small honest ones, and what became of them; exit 1 if one did harm.

caches   with sizes, hashes, checksums and ids recomputed to fit, so that only the rules can refuse them: the strict manifest, the
         gate, the way files are opened, what the reader checks of samples and records, and, for HDF5 features that no reader
         ever looks at, the structural check of `verify --full`
runs     every file of a run folder and of a cache x {link, wrong type, cut, huge, deep, foreign spec} x every verb that opens it:
         code run, files outside touched, network asked, tracebacks, escapes on the screen
texts    recipes, settings, spec strings, tables and pictures
flips    1,000 single bits of a student and a checkpoint: refused, or all that is loaded equals the original

python tools/hostile                      everything
python tools/hostile runs flips           some of it
python tools/hostile caches --only 'h5/*' of caches, runs and texts those whose name fits
python tools/hostile caches --keep FOLDER leave the caches there
python tools/hostile --quick              a few of each
"""

from __future__ import annotations

import argparse
import fnmatch
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from softcache.check import verify

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hostile import runs as runs_of
from hostile import texts as texts_of
from hostile import world as world_of
from hostile.corpus import CASES
from hostile.flips import flipped
from hostile.forge import Case
from hostile.honest import make_honest
from hostile.judge import Outcome, read_everything, try_case
from hostile.version_2 import CASES_2, make_honest_2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=[*PARTS], help="caches, runs, texts, flips; default: all")
    parser.add_argument("--only", default="*", help="a pattern of case names")
    parser.add_argument("--keep", type=Path, help="make the caches in this folder and leave them there")
    parser.add_argument("--all", action="store_true", help="one line for every variant, not only for every case")
    parser.add_argument("--quick", action="store_true", help="a few of each")
    args = parser.parse_args()
    if unknown := set(args.what) - PARTS.keys():
        parser.error(f"{unknown.pop()!r}: there are {', '.join(PARTS)}")
    return max(PARTS[what](args) for what in args.what)


def caches(args: argparse.Namespace) -> int:
    """Caches that fit."""
    folder = args.keep or Path(tempfile.mkdtemp(prefix="softcache-hostile-"))
    cases = {**CASES, **CASES_2}
    names = [name for name in cases if fnmatch.fnmatch(name, args.only)][:: 12 if args.quick else 1]
    try:
        outcomes = tried(folder, names, at_most=2 if args.quick else 10**6, show_all=args.all)
    finally:
        if args.keep is None:
            shutil.rmtree(folder)
    bad = [outcome for outcome in outcomes if outcome.fault]
    slowest = max(outcomes, key=lambda o: o.reading_s + o.verifying_s)
    print(f"{len(outcomes)} hostile caches: {len(outcomes) - len(bad)} refused, {len(bad)} not")
    print(f"slowest: {slowest.case}: {slowest.reading_s:.2f} s reading, {slowest.verifying_s:.2f} s verifying")
    return 1 if bad else 0


def world(args: argparse.Namespace, made: Callable[[Path], Iterator[world_of.Outcome]], what: str) -> int:
    """Cases in a world of verbs, and their table."""
    folder = Path(tempfile.mkdtemp(prefix="softcache-hostile-"))
    started = time.monotonic()
    try:
        world_of.make_world(folder)
        outcomes = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for outcome in made(folder):
                outcomes.append(outcome)
                if outcome.faults or args.all:
                    faults = "; ".join(outcome.faults) or f"exit code {outcome.code}"
                    print(f"{ascii(outcome.case)[1:-1]}: {ascii(faults)[1:-1]}\n    {ascii(outcome.said[:150])[1:-1]}")
    finally:
        shutil.rmtree(folder)
    print(f"{what}: " + "\n  ".join(runs_of.judged(outcomes)) + f"\n  in {time.monotonic() - started:.0f} s")
    return 1 if any(outcome.faults for outcome in outcomes) else 0


def runs(args: argparse.Namespace) -> int:
    """Files of run folders and caches."""
    every = 97 if args.quick else 1
    return world(args, lambda folder: runs_of.tried(folder, every=every, only=args.only), "runs")


def texts(args: argparse.Namespace) -> int:
    """Recipes, settings, specs, tables, pictures."""
    every = 11 if args.quick else 1
    return world(args, lambda folder: texts_of.tried(folder, every=every, only=args.only), "texts")


def flips(args: argparse.Namespace) -> int:
    """Single bits of what a run writes."""
    return world(args, lambda folder: flipped(folder / "world/run", 60 if args.quick else 1000), "flips")


PARTS: dict[str, Callable[[argparse.Namespace], int]] = {"caches": caches, "runs": runs, "texts": texts, "flips": flips}


def tried(folder: Path, names: Sequence[str], *, at_most: int, show_all: bool) -> list[Outcome]:
    """Make the honest cache and these cases of it, and print what became of them."""
    outcomes: list[Outcome] = []
    worlds = [(CASES, folder / "honest", make_honest), (CASES_2, folder / "honest-2", make_honest_2)]
    for cases, root, make in worlds:
        if set(names) & cases.keys():
            make(root)
            outcomes += _of_world(cases, root, folder, names, at_most=at_most, show_all=show_all)
    return outcomes


def _of_world(
    cases: Mapping[str, Case], root: Path, folder: Path, names: Sequence[str], *, at_most: int, show_all: bool
) -> list[Outcome]:
    """These of the cases that are made from one honest cache."""
    honest, verdict = read_everything(root), verify.run(root, full=True, quiet=True)
    print(f"honest cache: {verdict.text()}")
    assert verdict.state == "whole"
    outcomes: list[Outcome] = []
    for name in (name for name in names if name in cases):
        found = list(try_case(cases[name], root, honest, folder, at_most=at_most))
        outcomes += found
        for outcome in found if show_all or len(found) == 1 else [o for o in found if o.fault]:
            print(line(outcome))
        if len(found) > 1:
            print(f"{name}: {len(found)} variants, {sum(not o.fault for o in found)} refused")
    return outcomes


def line(outcome: Outcome) -> str:
    mark = f"NOT REFUSED ({outcome.fault})" if outcome.fault else "refused"
    times = f"{outcome.reading_s:.2f} + {outcome.verifying_s:.2f} s"
    return f"{outcome.case:<52} {mark:<8} {times}\n    read:   {outcome.reading[:150]}\n    verify: {outcome.verifying[:150]}"


if __name__ == "__main__":
    sys.exit(main())

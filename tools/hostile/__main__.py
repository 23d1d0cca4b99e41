"""Hostile caches, made from one small honest one: every case has sizes, hashes, checksums and ids recomputed to fit.

So only the rules can refuse it: the strict manifest, the gate, the way files are opened, what the reader checks of samples and
records, and, for HDF5 features that no reader ever looks at, the structural check of `verify --full`.

python tools/hostile                   every case: refused by what, where, in what time; exit 1 if one is accepted
python tools/hostile --only 'h5/*'     some of them
python tools/hostile --keep FOLDER     leave the caches there
python tools/hostile --quick           one case in twelve, two variants of each
"""

from __future__ import annotations

import argparse
import fnmatch
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from softcache.check import verify

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hostile.corpus import CASES
from hostile.honest import make_honest
from hostile.judge import Outcome, read_everything, try_case


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="a pattern of case names")
    parser.add_argument("--keep", type=Path, help="make the caches in this folder and leave them there")
    parser.add_argument("--all", action="store_true", help="one line for every variant, not only for every case")
    parser.add_argument("--quick", action="store_true", help="one case in twelve, two variants of each")
    args = parser.parse_args()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="softcache-hostile-"))
    names = [name for name in CASES if fnmatch.fnmatch(name, args.only)][:: 12 if args.quick else 1]
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


def tried(folder: Path, names: Sequence[str], *, at_most: int, show_all: bool) -> list[Outcome]:
    """Make the honest cache and these cases of it, and print what became of them."""
    make_honest(folder / "honest")
    honest = read_everything(folder / "honest")
    verdict = verify.run(folder / "honest", full=True, quiet=True)
    print(f"honest cache: {verdict.text()}")
    assert verdict.state == "whole"
    outcomes: list[Outcome] = []
    for name in names:
        found = list(try_case(CASES[name], folder / "honest", honest, folder, at_most=at_most))
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

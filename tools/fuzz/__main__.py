"""Mutants of a small cache's manifest and files, through parser, gate, reader and structural check.

Each mutant is tried twice: as it is, and with sizes, hashes, checksums and id recomputed to fit. What must not happen: an error
that is not ours, other numbers from a file that was changed behind the manifest's back, more than a second for one, memory that
grows. A file goes through the HDF5 library only in the structural check's child process, and there only once its hash fits.

python tools/fuzz --mutants 100000 --seed 0
python tools/fuzz --flips 10000 --truncations 1000      single damages instead: is each of them found?
python tools/fuzz --format 2 ...                        of a cache of version 2: indexes, lists, members without classes
python tools/fuzz --quick                               a few of each
"""

from __future__ import annotations

import argparse
import faulthandler
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fuzz.damages import damages
from fuzz.mutants import HANG_S, Fuzz, make_honest_of, resident_bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=0)
    parser.add_argument("--flips", type=int, default=0)
    parser.add_argument("--truncations", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", type=int, choices=(1, 2), default=1, help="version of the cache")
    parser.add_argument(
        "--findings", type=Path, default=Path("fuzz-findings"), help="folder for mutants that did wrong"
    )
    parser.add_argument("--quick", action="store_true", help="a few of each")
    args = parser.parse_args()
    if args.quick:
        args.mutants, args.flips, args.truncations = 60, 8, 4
    if not args.mutants + args.flips + args.truncations:
        parser.error("say how many: --mutants, --flips or --truncations; or --quick")
    faulthandler.dump_traceback_later(24 * 3600, exit=True)
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="softcache-fuzz-", dir=memory if memory.is_dir() else None))
    bad = 0
    try:
        if args.mutants:
            bad += mutants_report(folder, args.mutants, args.seed, args.findings, args.format)
        if args.flips or args.truncations:
            make_honest_of(folder / "damaged", args.format)
            bad += damages_report(damages(folder / "damaged", args.flips, args.truncations, args.seed))
    finally:
        shutil.rmtree(folder)
    return 1 if bad else 0


def mutants_report(folder: Path, mutants: int, seed: int, findings: Path, format: int) -> int:
    started = time.monotonic()
    fuzz = Fuzz(folder, seed, findings, format)
    fuzz.run(mutants)
    growth = (resident_bytes() - fuzz.memory_before) / 2**20
    tally = fuzz.tally
    for name, count in sorted(tally.counts.items()):
        print(f"{count:>8}  {name}")
    total = sum(count for name, count in tally.counts.items() if not name.startswith("child") and name != "HANG")
    crashes = sum(count for name, count in tally.counts.items() if "CRASH" in name)
    wrong = sum(count for name, count in tally.counts.items() if "OTHER NUMBERS" in name)
    hangs = tally.counts["HANG"]
    print(f"{mutants} mutants, {total} runs in {time.monotonic() - started:.0f} s (seed {seed})")
    print(f"crashes {crashes}, hangs over {HANG_S:g} s of the processor {hangs}, silently other numbers {wrong}")
    print(f"slowest {tally.slowest_s:.2f} s ({tally.slowest}); resident memory grew by {growth:.1f} MiB")
    for finding in tally.findings[:40]:
        print(f"  {finding}")
    return crashes + wrong + hangs + (growth >= 50)


def damages_report(counts: dict[str, int]) -> int:
    for name, count in sorted(counts.items()):
        print(f"{count:>8}  {name}")
    missed = sum(
        counts.get(kind, 0) - counts.get(f"{kind} found by verify {how}", 0)
        for kind, how in (("flips", "--full"), ("truncations", "--full"), ("truncations", "--quick"))
    )
    silent = sum(count for name, count in counts.items() if "SILENTLY" in name)
    print(f"not found by verify: {missed}; silently wrong batches: {silent}")
    return missed + silent


if __name__ == "__main__":
    sys.exit(main())

"""Do the tests find bugs? Some are planted, one at a time, in a copy of the checkout; the quick tier runs against each copy.

    python tools/faults/planted_bugs.py                   every bug against the whole quick tier: says which test found it
    python tools/faults/planted_bugs.py --only view       those with this word in their name
    python tools/faults/planted_bugs.py --tests tests/train tests/targets    against some tests only
    python tools/faults/planted_bugs.py --quick           two of them, each against the tests that stand beside its module

A bug is one piece of text in one file, put in place of another that has to stand there exactly once. The copy without any
bug has to pass, or nothing that is found afterwards would say anything. Exit code 1 if a bug was not found, 2 if a text is
not there or the copy without a bug fails.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Bug:
    """One mistake in one file.

    Attributes:
        name: what is wrong.
        file: below softcache/.
        right: text that stands there once.
        wrong: what is put in its place.
        beside: the tests of that module, for --quick.
    """

    name: str
    file: str
    right: str
    wrong: str
    beside: str


BUGS = (
    Bug(
        "samples are joined by position",
        "data/join.py",
        "    rows = find_ids(table.ids, ids)\n",
        "    rows = np.arange(len(ids), dtype=np.int64) % len(table)\n",
        "tests/targets",
    ),
    Bug(
        "T**2 is dropped in kd",
        "losses/logits.py",
        "return temperature**2 * mean_kl(student / temperature, teacher / temperature)",
        "return mean_kl(student / temperature, teacher / temperature)",
        "tests/losses/test_losses.py",
    ),
    Bug(
        "teacher and student are swapped in kd",
        "losses/logits.py",
        "return temperature**2 * mean_kl(student / temperature, teacher / temperature)",
        "return temperature**2 * mean_kl(teacher / temperature, student / temperature)",
        "tests/losses",
    ),
    Bug(
        "a gather takes the view after the one that was asked for",
        "targets/cache.py",
        "        views, rows = np.divmod(np.asarray(records, dtype=np.int64), len(self.cache))\n",
        "        views, rows = np.divmod(np.asarray(records, dtype=np.int64), len(self.cache))\n"
        "        views = (views + 1) % self.cache.num_views\n",
        "tests/targets",
    ),
    Bug(
        "the members' weights are ignored",
        "targets/ensemble.py",
        "torch.tensor([1.0] * len(logits) if weights is None else list(weights), dtype=torch.float64, ",
        "torch.ones(len(logits), dtype=torch.float64, ",
        "tests/targets/test_ensemble.py",
    ),
    Bug(
        "a teacher's own order of classes is ignored",
        "dump/teacher.py",
        "        logits = whole[:, torch.tensor(self.match.columns, device=whole.device)]\n",
        "        logits = whole.clone()\n",
        "tests/dump",
    ),
    Bug(
        "a resumed run begins one step too late",
        "train/checkpoint.py",
        '        sums = position.pop("sums")[ranks.rank]\n',
        '        sums = position.pop("sums")[ranks.rank]\n        position["step"] += position["step"] > 0\n',
        "tests/train",
    ),
    Bug(
        "momentum brings weights back that were set to zero",
        "train/flow.py",
        "    if masks is not None:\n        masks.apply()\n",
        "",
        "tests/train/test_pruning.py",
    ),
    Bug(
        "int8 divides a row's range by one step too many",
        "codecs/int8.py",
        "    return (highest / 2 - lowest / 2) / (levels / 2)\n",
        "    return (highest / 2 - lowest / 2) / ((levels + 1) / 2)\n",
        "tests/codecs",
    ),
    Bug(
        "ce is averaged over all rows, not over the labelled ones",
        "losses/labelled.py",
        "    return total / labelled.sum().clamp(min=1)\n",
        "    return total / labelled.numel()\n",
        "tests/losses/test_losses.py",
    ),
    Bug(
        "a mask over a vocabulary's positions is one position off",
        "losses/head_loss.py",
        "one[recorded] for name, one in inputs.items()",
        "one[recorded - 1] for name, one in inputs.items()",
        "tests/losses/test_head_loss.py",
    ),
    Bug(
        "the temperature is applied twice to stored logits",
        "targets/batch.py",
        "        return (codec.decode(arrays) / temperature).log_softmax(dim=1)\n",
        "        return (codec.decode(arrays) / temperature**2).log_softmax(dim=1)\n",
        "tests/targets",
    ),
    Bug(
        "a rank begins where as many shares of the first one's size end",
        "train/ranks.py",
        "        first = sum(shares[: self.rank])\n",
        "        first = self.rank * shares[0]\n",
        "tests/train/test_shares.py",
    ),
    Bug(
        "a rank takes back the gradients of rows that are another one's",
        "train/ranks.py",
        "        ctx.first, ctx.count, ctx.size = sum(counts[:rank]), counts[rank], len(counts)\n",
        "        ctx.first, ctx.count, ctx.size = rank * counts[0], counts[rank], len(counts)\n",
        "tests/train/test_shares.py",
    ),
    Bug(
        "a piece of a batch counts by its sentences, and not by its words",
        "train/pieces.py",
        '"samples": float(counts[ranks.rank, piece] * ranks.size / total),',
        '"samples": (last - first) * ranks.size / (count * self.views),',
        "tests/train/test_words.py",
    ),
    Bug(
        "a word's record is looked for among those of the words that have one",
        "targets/positions.py",
        "        starts = np.cumsum(counts) - counts\n        found",
        "        starts = np.cumsum(self.counts) - self.counts\n        found",
        "tests/targets",
    ),
    Bug(
        "the mask of a text's tokens is shifted by one",
        "tokens.py",
        "np.flatnonzero(self.trains[1:])",
        "np.flatnonzero(self.trains[:-1])",
        "tests/data/test_token_texts.py",
    ),
    Bug(
        "a token's record is that of the token itself, not of the one before it",
        "data/token_texts.py",
        "listed = (at - 1 - offsets[sample])",
        "listed = (at - offsets[sample])",
        "tests/data/test_token_texts.py",
    ),
    Bug(
        "the parts of a dump are dealt out from the second process on",
        "cache/write/writer.py",
        "        return span % self.count == self.index - 1\n",
        "        return span % self.count == self.index % self.count\n",
        "tests/dump/test_parts.py",
    ),
    Bug(
        "a checkpoint gets its name before its bytes are on the disk",
        "files/durable.py",
        "        os.fsync(file.fd)\n",
        "        pass\n",
        "tests/train/test_checkpoint.py",
    ),
    Bug(
        "a teacher is not asked in another batch",
        "dump/open_teachers.py",
        "            check_batch_composition(teacher, prober.first_items())\n",
        "            pass\n",
        "tests/dump/test_batch_composition.py",
    ),
    Bug(
        "floats that were normalised already are normalised again",
        "models/item_range.py",
        "    if found != OTHERWISE or not _is_of_scaled(taken):\n",
        "    if True:\n",
        "tests/models/test_item_range.py",
    ),
)
QUICK = ("T**2 is dropped in kd", "the members' weights are ignored")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="bugs whose name holds this")
    parser.add_argument("--tests", nargs="+", default=["tests"], help="what is run (default: the whole quick tier)")
    parser.add_argument("--processes", help="as pytest -n takes them (default: auto, with --quick 0)")
    parser.add_argument("--quick", action="store_true", help="two bugs, each against the tests beside its module")
    arguments = parser.parse_args(argv)
    processes = arguments.processes or ("0" if arguments.quick else "auto")
    chosen = [bug for bug in BUGS if arguments.only in bug.name and (bug.name in QUICK or not arguments.quick)]
    wrong = [f"{bug.file}: {count} times, not once: {bug.right!r}" for bug in BUGS if (count := occurrences(bug)) != 1]
    if wrong or not chosen:
        print("\n".join(wrong) or f"no bug's name holds {arguments.only!r}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="softcache-bugs-") as folder:
        copy = Path(folder)
        copy_checkout(copy)
        tests = sorted({bug.beside for bug in chosen}) if arguments.quick else arguments.tests
        print(f"{len(chosen)} bugs, against: {' '.join(tests)}", flush=True)
        failed = failing_test(copy, tests, processes)
        if failed:
            print(f"the copy without a bug fails: {failed}", file=sys.stderr)
            return 2
        missed = 0
        for bug in chosen:
            found = try_bug(copy, bug, [bug.beside] if arguments.quick else tests, processes)
            missed += not found
            print(f"{bug.name}: " + (f"found by {found}" if found else "NOT FOUND"), flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} found")
    return 1 if missed else 0


def copy_checkout(copy: Path) -> None:
    """Every file that git knows; of an unpacked source distribution every file."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    names = [name for name in listed.stdout.split("\0") if name]
    if listed.returncode:
        names = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file()]
    for name in names:
        if (ROOT / name).is_file():  # git knows what was just deleted, too
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)


def occurrences(bug: Bug) -> int:
    return (ROOT / "softcache" / bug.file).read_text(encoding="utf-8").count(bug.right)


def try_bug(copy: Path, bug: Bug, tests: Sequence[str], processes: str) -> str:
    """The test that finds the bug; "" where none does. The file is as it was afterwards."""
    path = copy / "softcache" / bug.file
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace(bug.right, bug.wrong), encoding="utf-8")
    try:
        return failing_test(copy, tests, processes)
    finally:
        path.write_text(before, encoding="utf-8")


def failing_test(copy: Path, tests: Sequence[str], processes: str) -> str:
    """The first test of the quick tier that fails in the copy; "" where all pass."""
    argv = [sys.executable, "-m", "pytest", "-x", "-rfE", "--tb=no", "-p", "no:cacheprovider"]
    argv += ["-m", "not slow", "-n", processes, *tests]
    # written once and changed within a second: Python must not take the old file's bytecode for the new one's
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**inherited, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(argv, cwd=copy, env=environment, capture_output=True, text=True)
    found = re.findall(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", done.stdout, re.M)
    if not found and done.returncode:
        raise SystemExit(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return str(found[0]) if found else ""


if __name__ == "__main__":
    sys.exit(main())

"""Hostile caches are refused by name, mutants end in a typed error or in the same numbers, and HDF5 stays in its cage."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softcache
from softcache.cache import checksums, hdf5_check, manifest, mapped_file
from softcache.cache.file_entry import StoredFile
from softcache.cache.hdf5_check import Limits, structure_faults
from softcache.cache.manifest import read_manifest
from softcache.cache.write.shard import write_shard
from softcache.check import verify
from softcache.errors import CacheError, DamagedCacheError

sys.path.append(str(Path(__file__).parents[2] / "tools"))
corpus, honest_cache, judge = (importlib.import_module(f"hostile.{name}") for name in ("corpus", "honest", "judge"))
fuzzing, damaging = (importlib.import_module(f"fuzz.{name}") for name in ("mutants", "damages"))

ROOT = Path(softcache.__file__).parent


# ---------------------------------------------------------------------------------------------------------------- corpus


@dataclass(frozen=True)
class Honest:
    root: Path
    numbers: Mapping[str, np.ndarray]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Honest:
    root = tmp_path_factory.mktemp("hostile") / "honest"
    honest_cache.make_honest(root)
    return Honest(root, judge.read_everything(root))


def test_the_honest_cache_is_whole(honest: Honest) -> None:
    """Else every case of the corpus would be refused for nothing."""
    verdict = verify.run(honest.root, full=True, quiet=True)
    assert (verdict.state, verdict.faults) == ("whole", [])
    kinds = {file.kind for file in read_manifest(honest.root).files}
    assert kinds == {"samples", "probe", "views", "constants", "member", "dense"}
    assert judge.same(honest.numbers, judge.read_everything(honest.root))


IN_HDF5 = [name for name, case in corpus.CASES.items() if name.startswith("h5/") and case.gate == "verify"]
ELSEWHERE = [name for name in corpus.CASES if name not in IN_HDF5]


@pytest.mark.slow
@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_hostile_cache_is_refused(name: str, honest: Honest, tmp_path: Path) -> None:
    case = corpus.CASES[name]
    how = {"verifying": case.gate == "verify", "at_most": 120}
    outcomes = list(judge.try_case(case, honest.root, honest.numbers, tmp_path, **how))
    assert [(outcome.case, outcome.fault) for outcome in outcomes if outcome.fault] == []
    assert outcomes


@pytest.fixture(scope="module")
def in_hdf5(honest: Honest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, list[str]]]:
    """Case -> (what reading did, what the structural check says), all of them in one child process."""
    folder = tmp_path_factory.mktemp("structure")
    reading, changed = {}, []
    for name in IN_HDF5:
        (made,) = judge.try_case(corpus.CASES[name], honest.root, honest.numbers, folder, verifying=False)
        reading[name] = made.reading
        root = folder / judge.folder_name(name)
        old = {file.path: file.sha256 for file in read_manifest(honest.root).files}
        (file,) = (file for file in read_manifest(root).files if file.sha256 != old[file.path])
        with (root / file.path).open("rb") as handle:
            assert checksums.sha256_of(handle.fileno()) == file.sha256  # else verify would not ask
        changed.append(replace(file, path=f"{root.name}/{file.path}"))
    found = structure_faults(folder, changed)
    return {name: (reading[name], faults) for name, (_, faults) in zip(IN_HDF5, found, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_HDF5)
def test_a_hostile_hdf5_file_is_found_and_never_looked_at_by_the_reader(
    name: str, in_hdf5: dict[str, tuple[str, list[str]]]
) -> None:
    reading, faults = in_hdf5[name]
    assert reading == "honest numbers"
    assert faults
    assert all(len(fault) <= hdf5_check.MAX_FAULT_CHARS for fault in faults) and len(faults) <= hdf5_check.MAX_FAULTS
    assert "did not survive" not in faults[0] or name == "h5/a B-tree of names with more records than its node"


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("h5/external storage", "'logits' is not stored in one piece as it is"),
        ("h5/external link", "'logits' is a link to somewhere else"),
        ("h5/hard link under a second name", "links"),
        ("h5/two names, one data set", "'eps' has another name as well"),
        ("h5/shape bomb, contiguous, 2 PiB", "does not have 3 axes"),
        ("h5/byte-swapped type", "'logits' is not stored as <f2"),
        ("h5/giant attribute", "attributes"),
        ("h5/two thousand links", "holds 9 links"),  # it does not read on
        ("h5/another shape of the same bytes in the same place", "'logits' is of shape (4, 128, 6)"),
        ("h5/user block", "its superblock is not that of a plain HDF5 file"),
        ("h5/trailing data, one byte", "its superblock is not that of a plain HDF5 file"),
        ("h5/another kind", "attribute softcache_kind"),
    ],
)
def test_the_fault_says_what_it_is(name: str, fault: str, in_hdf5: dict[str, tuple[str, list[str]]]) -> None:
    assert any(fault in found for found in in_hdf5[name][1]), in_hdf5[name][1]


def test_verify_full_runs_the_structural_check(honest: Honest, tmp_path: Path) -> None:
    (outcome,) = judge.try_case(corpus.CASES["h5/external link"], honest.root, honest.numbers, tmp_path)
    assert outcome.verifying == f"{honest_cache.PLAIN}: 'logits' is a link to somewhere else"
    assert verify.run(tmp_path / judge.folder_name("h5/external link"), full=False, quiet=True).state == "whole"


# ------------------------------------------------------------------------------------------------------- the child's limits

STUB = """
import json, os, resource, socket, sys, time
from softcache.cache import hdf5_check

real = hdf5_check.answer_to

def answer(fd, request):
    if request["kind"] != "bad":
        return real(fd, request)
    EVIL

hdf5_check.answer_to = answer
hdf5_check.serve(int(sys.argv[1]), hdf5_check.Limits(**json.loads(sys.argv[2])))
"""


@pytest.fixture
def shard(tmp_path: Path) -> StoredFile:
    return write_shard(tmp_path / "a.h5", {"x": np.arange(9.0, dtype="<f4")}, kind="member", relative_path="a.h5")


def answers(
    monkeypatch: pytest.MonkeyPatch, root: Path, shard: StoredFile, evil: str, *, bad: int = 1, **limits: Any
) -> list[list[str]]:
    """Faults of a good file, of `bad` ones at which the child does `evil`, and of a good one."""
    monkeypatch.setattr(hdf5_check, "CHILD", (sys.executable, "-P", "-c", STUB.replace("EVIL", evil)))
    files = [shard, *[replace(shard, kind="bad")] * bad, shard]
    return [faults for _, faults in structure_faults(root, files, limits=Limits(**limits))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("evil", "cause"),
    [
        ("os.abort()", "signal 6, SIGABRT"),
        ("os.kill(os.getpid(), 11)", "signal 11, SIGSEGV"),
        ("os._exit(3)", "exit status 3"),
        ("time.sleep(60)", "no answer in 0.4 s"),
        ("os.write(int(sys.argv[1]), b'x' * 100000)", "too long an answer"),
        ("os.write(int(sys.argv[1]), b'no JSON\\n'); time.sleep(9)", "an answer that is none"),
        ("return None", "an answer that is none"),
        ("return {'faults': []}", "an answer that is none"),
    ],
)
def test_a_child_that_dies_costs_one_file(
    evil: str, cause: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shard: StoredFile
) -> None:
    found = answers(monkeypatch, tmp_path, shard, evil, wall_s=0.4)
    assert found == [[], [f"the HDF5 library did not survive it ({cause})"], []]


@pytest.mark.slow
def test_the_childs_time_is_limited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shard: StoredFile) -> None:
    found = answers(monkeypatch, tmp_path, shard, "while True: pass", cpu_s=0)
    assert found == [[], ["the HDF5 library did not survive it (signal 24, SIGXCPU)"], []]


@pytest.mark.slow
def test_the_childs_memory_is_limited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shard: StoredFile) -> None:
    evil = "taken = bytearray(100 * 2**20); return ['it fitted']"
    assert answers(monkeypatch, tmp_path, shard, evil, memory_bytes=200 * 2**20) == [[], ["it fitted"], []]
    refused = answers(monkeypatch, tmp_path, shard, evil, memory_bytes=50 * 2**20)
    assert refused == [[], ["the HDF5 library refuses it: MemoryError: "], []] or "did not survive" in refused[1][0]


def test_what_else_the_child_may_not_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shard: StoredFile) -> None:
    monkeypatch.setenv("HDF5_PLUGIN_PATH", str(tmp_path))
    monkeypatch.setenv("HDF5_DRIVER", "core")
    evil = (
        "limit = lambda name: resource.getrlimit(getattr(resource, 'RLIMIT_' + name))[0]; "
        "return [repr([limit('CORE'), limit('FSIZE'), limit('NOFILE'), 'torch' in sys.modules, os.getcwd(), "
        "sorted(n for n in os.environ if n.startswith('HDF5'))])]"
    )
    found = answers(monkeypatch, tmp_path, shard, evil)
    expected = [0, 0, 16, False, "/", ["HDF5_PLUGIN_PRELOAD", "HDF5_USE_FILE_LOCKING"]]
    assert found == [[], [repr(expected)], []]


def test_after_some_deaths_no_other_file_is_opened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shard: StoredFile
) -> None:
    found = answers(monkeypatch, tmp_path, shard, "os._exit(1)", bad=2, deaths=2)
    assert found[0] == [] and "did not survive it" in found[2][0]
    assert found[3] == ["not checked: the HDF5 library did not survive 2 files before it"]


def test_a_child_that_cannot_start_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shard: StoredFile
) -> None:
    monkeypatch.setattr(hdf5_check, "CHILD", (sys.executable, "-c", "raise SystemExit(7)"))
    with pytest.raises(CacheError, match=r"did not start \(exit status 7\)"):
        list(structure_faults(tmp_path, [shard]))


def test_no_child_is_left_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shard: StoredFile) -> None:
    children: list[subprocess.Popen[bytes]] = []
    started = subprocess.Popen

    def popen(*args: Any, **more: Any) -> subprocess.Popen[bytes]:
        children.append(started(*args, **more))
        return children[-1]

    monkeypatch.setattr(hdf5_check.subprocess, "Popen", popen)
    asking = structure_faults(tmp_path, [shard, shard])
    assert next(asking)[1] == []
    assert children[0].poll() is None
    asking.close()
    assert children[0].poll() is not None
    assert list(structure_faults(tmp_path, [])) == [] and len(children) == 1  # nothing to ask: none is started


def test_a_file_behind_a_link_is_not_opened(tmp_path: Path, shard: StoredFile) -> None:
    (tmp_path / "b.h5").symlink_to("a.h5")
    with pytest.raises(DamagedCacheError, match="symbolic link"):
        list(structure_faults(tmp_path, [replace(shard, path="b.h5")]))


# ------------------------------------------------------------------------------------------------------- one door to HDF5

OPENERS = {"File", "is_hdf5", "open_file_image", "fopen"}


def hdf5_openings(module: str, source: str) -> Iterator[tuple[str, str]]:
    """(module, function) of every call that can open an HDF5 file."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "h5py":
            yield module, f"from {node.module} import: write h5py.name in full, so that this test sees it"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            if (node.func.attr in OPENERS and "h5" in owner) or (node.func.attr == "open" and owner.endswith("h5f")):
                inside = [f.name for f in functions if f.lineno <= node.lineno <= (f.end_lineno or 0)]
                yield module, inside[-1] if inside else "the module itself"


def sources() -> dict[str, str]:
    return {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in sorted(ROOT.rglob("*.py"))}


@pytest.mark.slow
def test_hdf5_is_opened_for_reading_in_one_function() -> None:
    found = {one for module, source in sources().items() for one in hdf5_openings(module, source)}
    assert found == {("cache/write/shard.py", "_hdf5_file"), ("cache/hdf5_check.py", "file_faults")}


@pytest.mark.parametrize(
    "line",
    [
        "h5py.File(path)",
        "h5py.h5f.open(path)",
        "h5.File(path, 'r')",
        "from h5py import File",
        "from h5py.h5f import open",
        "h5py.is_hdf5(path)",
    ],
)
def test_another_opening_would_be_found(line: str) -> None:
    assert list(hdf5_openings("cache/reader.py", f"def f(path):\n    {line}\n"))


def test_the_writers_function_only_creates() -> None:
    source = sources()["cache/write/shard.py"]
    (create,) = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef) and n.name == "_hdf5_file")
    text = ast.unparse(create)
    assert "h5py.File(h5py.h5f.create(" in text and "ACC_TRUNC" in text


# -------------------------------------------------------------------------------------------------------------- mutants


def fuzzed(tmp_path: Path, mutants: int, seed: int) -> Any:
    fuzz = fuzzing.Fuzz(tmp_path / "scratch", seed, tmp_path / "findings")
    fuzz.run(mutants)
    return fuzz


def bad_counts(fuzz: Any) -> dict[str, int]:
    return {n: c for n, c in fuzz.tally.counts.items() if "CRASH" in n or "OTHER" in n or "HANG" in n}


def check_mutants(tmp_path: Path, mutants: int, seed: int) -> None:
    fuzz = fuzzed(tmp_path, mutants, seed)
    assert bad_counts(fuzz) == {} and fuzz.tally.findings == []
    done = {name.partition(":")[0] for name in fuzz.tally.counts}
    assert done == {"manifest as it is", "manifest recomputed", "file as it is", "file recomputed", "child"}
    # it gets past the first gates: some mutants are taken for other caches, some files are whole to the HDF5 library
    for name in ("manifest recomputed: the same numbers", "child: as the manifest says", "child: refused"):
        assert fuzz.tally.counts[name] > 0


@pytest.mark.slow
def test_mutants(tmp_path: Path) -> None:
    check_mutants(tmp_path, 300, seed=1)


@pytest.mark.whole
def test_more_mutants(tmp_path: Path) -> None:
    check_mutants(tmp_path, 4000, seed=2)


@pytest.mark.slow
def test_mutants_would_show_a_reader_that_checks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each is kept with its bytes, its seed and what it did, so that it can become a case of the corpus."""
    monkeypatch.setattr(checksums.BlockChecks, "check", lambda *_: None)
    monkeypatch.setattr(mapped_file.MappedFile, "_check_blocks", lambda *_: None)
    fuzz = fuzzed(tmp_path, 120, seed=1)
    assert bad_counts(fuzz).keys() == {"file as it is: OTHER NUMBERS"}
    (kept, *_) = sorted((tmp_path / "findings").glob("*.bin"))
    told = kept.with_suffix(".txt").read_text().splitlines()
    assert told[0] == "seed 1" and told[1].startswith("file as it is #") and told[2] == "OTHER NUMBERS"
    assert f"{told[1]}: OTHER NUMBERS" in fuzz.tally.findings


def test_the_corpus_would_show_an_open_gate(honest: Honest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "check_manifest", lambda *_: None)
    case = corpus.CASES["place/two entries for the same bytes"]
    (outcome,) = judge.try_case(case, honest.root, honest.numbers, tmp_path, verifying=False)
    assert outcome.fault == "reading accepts it"


def test_the_mutants_metadata_checksums_are_hdf5s(tmp_path: Path) -> None:
    """Else the library would stop at the first checksum, and nothing behind it would be tried."""
    fuzz = fuzzed(tmp_path, 0, seed=0)
    for file in fuzz.manifest.files:
        starts = [fuzz.files[file.path][start : start + 4] for start, _ in fuzz.guarded[file.path]]
        assert starts.count(b"\x89HDF") == 1 and starts.count(b"OHDR") >= 1 + len(file.arrays), file.path


def check_damages(tmp_path: Path, flips: int, truncations: int) -> None:
    honest_cache.make_honest(tmp_path / "cache")
    counts = damaging.damages(tmp_path / "cache", flips, truncations, seed=3)
    assert counts["flips found by verify --full"] == counts["flips"] == flips
    assert counts["truncations found by verify --full"] == counts["truncations"] == truncations
    assert counts["truncations found by verify --quick"] == truncations
    assert not [name for name in counts if "SILENTLY" in name]
    assert counts["flips refused with check_blocks=always"] > flips / 4


@pytest.mark.slow
def test_flipped_bits_and_cut_files(tmp_path: Path) -> None:
    check_damages(tmp_path, 40, 20)


@pytest.mark.whole
def test_more_flipped_bits_and_cut_files(tmp_path: Path) -> None:
    check_damages(tmp_path, 300, 50)


@pytest.mark.slow
def test_damages_would_show_a_reader_that_checks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest_cache.make_honest(tmp_path / "cache")
    monkeypatch.setattr(checksums.BlockChecks, "check", lambda *_: None)
    counts = damaging.damages(tmp_path / "cache", 30, 0, seed=3)
    assert any("SILENTLY" in name for name in counts)


# ------------------------------------------------------------------------------------------------------------- version 2

hostile_2 = importlib.import_module("hostile.version_2")


@pytest.fixture(scope="module")
def honest_2(tmp_path_factory: pytest.TempPathFactory) -> Honest:
    root = tmp_path_factory.mktemp("hostile") / "honest-2"
    hostile_2.make_honest_2(root)
    return Honest(root, judge.read_everything(root))


def test_the_honest_cache_of_version_2_is_whole(honest_2: Honest) -> None:
    assert verify.run(honest_2.root, full=True, quiet=True).faults == []
    assert judge.same(honest_2.numbers, judge.read_everything(honest_2.root))


@pytest.mark.slow
@pytest.mark.parametrize("name", hostile_2.CASES_2)
def test_a_hostile_cache_of_version_2_is_refused(name: str, honest_2: Honest, tmp_path: Path) -> None:
    case = hostile_2.CASES_2[name]
    how = {"verifying": case.gate == "verify"}
    (outcome,) = judge.try_case(case, honest_2.root, honest_2.numbers, tmp_path, **how)
    assert outcome.fault == "", outcome


def test_the_cases_would_show_an_open_gate(honest_2: Honest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of lists, of indexes, and of the checksums that bind a file."""
    monkeypatch.setattr("softcache.cache.file_lists.check_listed", lambda *_: None)
    monkeypatch.setattr("softcache.cache.reader.check_positions", lambda *_, **__: None)
    monkeypatch.setattr("softcache.cache.bound_files.BoundFiles._is_known", lambda *_: True)
    names = (
        "list/statistics of no records",
        "arrays/words: a label that is no class",
        "file/a part in another one's place",
    )
    for name in names:
        case = hostile_2.CASES_2[f"v2/{name}"]
        (outcome,) = judge.try_case(case, honest_2.root, honest_2.numbers, tmp_path, verifying=False)
        assert outcome.fault == "reading accepts it", outcome


@pytest.mark.slow
def test_mutants_of_version_2(tmp_path: Path) -> None:
    fuzz = fuzzing.Fuzz(tmp_path / "fuzz", 5, tmp_path / "findings", 2)
    fuzz.run(40)
    assert bad_counts(fuzz) == {}
    assert {name.partition(":")[0] for name in fuzz.tally.counts} >= {"list as it is", "list recomputed"}

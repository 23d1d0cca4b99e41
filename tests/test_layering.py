"""Who may import whom. A room is a folder or a file directly under softcache/; the tables below are the architecture."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import softcache

ROOT = Path(softcache.__file__).parent
PACKAGE = "softcache"  # as a room: softcache/__init__.py, with the version and the public names

LEAVES = {"errors", "spec", "machine", "report"}

# room -> the rooms it may import, besides itself
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "report": set(),
    "version": set(),
    "spec": {"errors"},
    "machine": {"errors"},
    "config": {"errors", "spec"},
    "cache": {"errors"},
    "codecs": {"errors", "spec"},
    "features": {"errors"},
    "taps": {"errors", "features"},
    "losses": {"errors", "spec"},
    "ensemble": {"errors"},
    "ranks": {"errors"},
    "checkpoint": {"errors", "ranks"},
    "models": {"errors", "spec", "taps"},
    "data": {"errors", "spec", "cache"},
    "drift": {"errors", "version", "cache"},
    "targets": {"errors", "cache", "codecs", "data", "drift", "ensemble", "features"},
    "teacher": {"errors", "spec", "data", "features", "models", "taps"},
    "pairing": {"errors", "features", "losses", "taps", "targets"},
    "terms": {"errors", "spec", "ensemble", "losses", "targets"},
    "parts": {"errors", "features", "losses", "pairing", "targets", "terms"},
    "objective": {"errors", "ensemble", "losses", "pairing", "parts", "ranks", "targets", "terms"},
    "stages": {"errors", "config", "losses", "terms"},
    "run_folder": {"errors", PACKAGE, "cache", "config", "stages"},
    "material": {
        "errors",
        "config",
        "data",
        "evaluate",
        "losses",
        "objective",
        "ranks",
        "run_folder",
        "targets",
        "terms",
    },
    "learner": {
        "errors",
        "config",
        "data",
        "losses",
        "models",
        "objective",
        "parts",
        "pairing",
        "ranks",
        "stages",
        "taps",
        "targets",
        "terms",
    },
    "bias": {"errors", "data"},
    "evaluate": {*LEAVES, "bias", "config", "data", "models", "targets"},
    "graphs": {"errors", "data", "models", "report"},
    "export": {*LEAVES, PACKAGE, "config", "data", "evaluate", "graphs", "models", "run_folder"},
    "inspect": {*LEAVES, "cache", "data", "targets"},
    "replay": {"errors", "spec", "cache", "data", "targets"},
    "picture": {"errors", "data", "inspect", "replay", "targets"},
    "verify": {*LEAVES, "cache", "replay"},
    "storage": {"errors", "spec", "cache", "codecs", "config", "features", "taps", "teacher"},
    "rounds": {"errors", "cache", "config", "data", "storage", "teacher"},
    "needs": {"errors", "codecs", "losses", "teacher"},
    "survey": {"errors", "cache", "codecs", "config", "data", "needs", "rounds", "storage", "teacher"},
    "catalogue": {"errors", "losses", "report"},
    "encode": {"errors", "cache", "codecs", "storage", "teacher"},
    "progress": {"cache", "data"},
    "dump": {
        *LEAVES,
        PACKAGE,
        "config",
        "cache",
        "data",
        "drift",
        "encode",
        "progress",
        "rounds",
        "storage",
        "survey",
        "teacher",
    },
    "plan": {*LEAVES, "config", "cache", "codecs", "data", "drift", "dump", "rounds", "storage", "survey", "teacher"},
    "train": {
        *LEAVES,
        PACKAGE,
        "config",
        "checkpoint",
        "data",
        "evaluate",
        "learner",
        "losses",
        "material",
        "models",
        "objective",
        "pairing",
        "parts",
        "ranks",
        "run_folder",
        "stages",
    },
    "repair": {
        *LEAVES,
        "cache",
        "config",
        "data",
        "drift",
        "dump",
        "progress",
        "replay",
        "rounds",
        "survey",
        "teacher",
        "verify",
    },
    "subset": {"errors", "cache", "data", "targets"},
    "recipe": {"errors"},
    "chart": set(),
    "outcomes": {
        *LEAVES,
        PACKAGE,
        "config",
        "data",
        "dump",
        "evaluate",
        "models",
        "recipe",
        "stages",
        "targets",
        "train",
    },
    "reproduce": {*LEAVES, "chart", "data", "outcomes", "recipe"},
    "demo": {*LEAVES, PACKAGE, "config", "data", "dump", "evaluate", "targets", "train"},
    "cli": {
        *LEAVES,
        PACKAGE,
        "catalogue",
        "config",
        "demo",
        "dump",
        "evaluate",
        "export",
        "inspect",
        "picture",
        "plan",
        "repair",
        "reproduce",
        "subset",
        "train",
        "verify",
    },
    PACKAGE: {"targets", "version"},
    "__main__": {"cli"},
}

# room -> the packages beyond the standard library it may import, anywhere in it; rooms that are not named: any
PACKAGES: dict[str, set[str]] = {
    "errors": set(),
    "report": set(),
    "version": set(),
    "spec": set(),
    "config": set(),
    "cli": set(),
    "__main__": set(),
    PACKAGE: set(),
    "cache": {"numpy", "h5py"},
    "codecs": {"torch"},
    "features": {"torch"},
    "taps": {"torch"},
    "losses": {"torch"},
    "ensemble": {"torch"},
    "machine": {"torch"},
    "ranks": {"torch"},
}

# package -> the only modules that may import it
DOORS: dict[str, set[str]] = {"h5py": {"softcache.cache.shard", "softcache.cache.structure"}}

# module -> modules that it may not reach by any chain of imports
NEVER_REACHED: dict[str, set[str]] = {
    "softcache.train": {
        "softcache.teacher",
        "softcache.storage",
        "softcache.dump",
        "softcache.cache.shard",
        "softcache.cache.writer",
    },
    "softcache.dump": {"softcache.train", "softcache.objective", "softcache.targets", "softcache.evaluate"},
    "softcache.plan": {"softcache.train", "softcache.objective", "softcache.targets", "softcache.evaluate"},
    "softcache.targets": {"softcache.cache.shard", "softcache.cache.writer", "softcache.models", "softcache.losses"},
}


@dataclass(frozen=True)
class Import:
    """One imported module, by its full name, and where."""

    module: str
    name: str
    line: int


def sources_of(root: Path) -> dict[str, str]:
    """Module name -> source, of every file under the package."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = [PACKAGE, *path.relative_to(root).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


SOURCES = sources_of(ROOT)


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else PACKAGE


@cache
def import_nodes(source: str) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]


def imports_of(module: str, sources: Mapping[str, str]) -> Iterator[Import]:
    """Every import of a module, inside functions and TYPE_CHECKING blocks as well."""
    for node in import_nodes(sources[module]):
        if isinstance(node, ast.Import):
            yield from (Import(module, alias.name, node.lineno) for alias in node.names)
        else:
            assert node.level == 0, f"{module}:{node.lineno}: write imports in full: from softcache.room import name"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield Import(module, whole if whole in sources else str(node.module), node.lineno)


def own(name: str) -> bool:
    return name == PACKAGE or name.startswith(PACKAGE + ".")


def direction_faults(sources: Mapping[str, str]) -> list[str]:
    """What the tables do not allow, one line each."""
    faults = []
    for module in sources:
        room = room_of(module)
        if room not in ALLOWED:
            faults.append(f"{module}: a new room; place it in ALLOWED")
            continue
        for one in imports_of(module, sources):
            package = one.name.partition(".")[0]
            if own(one.name):
                target = room_of(one.name)
                if target != room and target not in ALLOWED[room]:
                    faults.append(f"{module}:{one.line}: {room} may not import {target}")
            elif package not in sys.stdlib_module_names:
                if package not in PACKAGES.get(room, {package}):
                    faults.append(f"{module}:{one.line}: {room} may not import {package}")
                if module not in DOORS.get(package, {module}):
                    faults.append(f"{module}:{one.line}: only {', '.join(sorted(DOORS[package]))} may import {package}")
    return faults


def reached_from(module: str, sources: Mapping[str, str]) -> set[str]:
    """Modules that importing and using `module` may load. The package's lazy public names are not followed."""
    reached, waiting = set(), [module]
    while waiting:
        current = waiting.pop()
        if current in reached or current not in sources or current == PACKAGE:
            continue
        reached.add(current)
        waiting += [one.name for one in imports_of(current, sources) if own(one.name)]
        waiting.append(current.rpartition(".")[0])  # a folder's __init__ is loaded with its modules
    return reached


def chain_faults(sources: Mapping[str, str]) -> list[str]:
    faults = []
    for module, never in NEVER_REACHED.items():
        faults += [f"{module} reaches {other}" for other in sorted(never & reached_from(module, sources))]
    return faults


# ------------------------------------------------------------------------------------------------------------ as it stands


def test_every_import_goes_in_an_allowed_direction() -> None:
    assert direction_faults(SOURCES) == []


def test_no_chain_of_imports_leads_where_it_must_not() -> None:
    assert chain_faults(SOURCES) == []


def test_the_tables_name_rooms_and_modules_that_exist() -> None:
    rooms = {room_of(module) for module in SOURCES}
    assert set(ALLOWED) == rooms
    assert set().union(*ALLOWED.values()) | set(PACKAGES) <= rooms
    named = set().union(*DOORS.values(), *NEVER_REACHED.values(), NEVER_REACHED)
    assert named <= set(SOURCES)
    for package, modules in DOORS.items():
        for module in modules:
            assert any(one.name == package for one in imports_of(module, SOURCES)), f"{module} is no door to {package}"


def test_the_directions_have_no_circle() -> None:
    order = list(TopologicalSorter(ALLOWED).static_order())
    assert order.index("cache") < order.index("data") < order.index("targets") < order.index("train")
    assert order[-1] == "__main__"


def test_the_promises_are_in_the_tables() -> None:
    """What the architecture promises, so that a table edited in passing does not take it back."""
    for room in ("codecs", "losses"):
        assert "cache" not in ALLOWED[room] and "h5py" not in PACKAGES[room]
    for room in ("cache", "ensemble", "features"):
        assert ALLOWED[room] == {"errors"}
    for room in ("codecs", "losses"):
        assert ALLOWED[room] == {"errors", "spec"}  # their parameters are text: spec converts them
    assert ALLOWED["errors"] == set() and ALLOWED["config"] == {"errors", "spec"}
    assert ALLOWED["data"] & {"models", "targets", "codecs", "losses", "config"} == set()
    assert "torch" not in PACKAGES["cache"]
    assert ALLOWED["train"] & {"teacher", "storage", "encode", "rounds", "survey", "dump", "plan"} == set()
    assert (ALLOWED["dump"] | ALLOWED["plan"]) & {"train", "objective", "targets"} == set()
    assert DOORS["h5py"] == {"softcache.cache.shard", "softcache.cache.structure"}


# -------------------------------------------------------------------------------------------------------- and it would see


@pytest.mark.parametrize(
    ("module", "line", "fault"),
    [
        ("softcache.train", "from softcache.teacher import Teacher", "train may not import teacher"),
        ("softcache.train", "from softcache import dump", "train may not import dump"),
        ("softcache.train", "import softcache.dump as d", "train may not import dump"),
        ("softcache.dump", "def f():\n    from softcache import train", "dump may not import train"),
        ("softcache.cache.reader", "def f():\n    import torch", "cache may not import torch"),
        ("softcache.cache.reader", "from torch.utils.data import Dataset", "cache may not import torch"),
        ("softcache.cache.reader", "import h5py", "only softcache.cache.shard, softcache.cache.structure may"),
        ("softcache.losses.logits", "from softcache.cache.schema import Layout", "losses may not import cache"),
        ("softcache.losses.logits", "import h5py", "losses may not import h5py"),
        ("softcache.codecs.floats", "import h5py", "codecs may not import h5py"),
        ("softcache.codecs.codec", "from softcache.config import option", "codecs may not import config"),
        ("softcache.taps", "from softcache.teacher import Teacher", "taps may not import teacher"),
        ("softcache.targets", "from softcache.storage import Storage", "targets may not import storage"),
        ("softcache.drift", "from softcache.targets import Cache", "drift may not import targets"),
        ("softcache.plan", "from softcache import train", "plan may not import train"),
        ("softcache.config", "import torch", "config may not import torch"),
        ("softcache.cli", "import numpy as np", "cli may not import numpy"),
        ("softcache.spec", "from softcache.config import option", "spec may not import config"),
        ("softcache.data.join", "if TYPE_CHECKING:\n    from softcache.targets import Cache", "data may not import"),
        ("softcache.helpers", "", "softcache.helpers: a new room"),
        ("softcache.extras.first", "", "softcache.extras.first: a new room"),
    ],
    ids=lambda value: value.strip() if "may" not in value and "room" not in value else "",
)
def test_a_planted_import_is_found(module: str, line: str, fault: str) -> None:
    planted = {**SOURCES, module: SOURCES.get(module, "") + "\n" + line + "\n"}
    assert any(fault in found for found in direction_faults(planted))


def test_a_planted_chain_is_found() -> None:
    line = "\ndef f():\n    from softcache.cache.writer import CacheWriter\n"
    planted = {**SOURCES, "softcache.cache.samples": SOURCES["softcache.cache.samples"] + line}
    found = chain_faults(planted)
    assert "softcache.train reaches softcache.cache.shard" in found
    assert "softcache.targets reaches softcache.cache.writer" in found


# --------------------------------------------------------------------------------------------------------- in a new process


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("softcache, softcache.cli, softcache.config, softcache.spec, softcache.errors", {"torch", "numpy", "h5py"}),
        (
            "softcache.cache.reader, softcache.cache.writer, softcache.cache.card",
            {"torch", "torchvision", "safetensors"},
        ),
        ("softcache.cache.reader, softcache.cache.samples", {"h5py", "torch"}),
        ("softcache.verify", {"torch", "torchvision"}),
    ],
    ids=["command line", "cache", "reading", "verify"],
)
def test_what_is_loaded_at_run_time(modules: str, heavy: set[str]) -> None:
    code = f"import sys, {modules}; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.split() == []


# ---------------------------------------------------------------------------------------------------- nothing is executed


def test_torch_load_reads_weights_only() -> None:
    calls = 0
    for module, source in SOURCES.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                calls += 1
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert keywords.get("weights_only") == "True", f"{module}:{node.lineno}"
    assert calls


def test_the_cache_unpickles_nothing() -> None:
    for module in SOURCES:
        if room_of(module) == "cache":
            assert not {one.name for one in imports_of(module, SOURCES)} & {"pickle", "marshal", "shelve", "dill"}

"""Who may import whom. A room is a folder or a file directly under softcache/; the tables below are the architecture."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import softcache

ROOT = Path(softcache.__file__).parent
PACKAGE = "softcache"  # as a room: softcache/__init__.py, with the version and the public names

EVERYBODY = {"errors", "version"}  # every room may import these; nobody imports the package itself for its version

# room -> the rooms it may import, besides itself and what everybody may
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "version": set(),
    "report": set(),
    "files": set(),
    "spec": set(),
    "words": set(),
    "tokens": set(),
    "signals": set(),
    "machine": set(),
    "features": set(),
    "config": {"spec"},
    "cache": {"files"},
    "codecs": {"spec", "features"},
    "losses": {"spec", "features"},
    "models": {"spec", "features", "files", "words", "tokens"},
    "data": {"spec", "cache", "words", "tokens"},
    "remote": {"cache", "files", "report"},
    "targets": {"cache", "codecs", "data", "features", "remote", "report"},
    "dump": {
        "config",
        "spec",
        "machine",
        "report",
        "files",
        "cache",
        "codecs",
        "data",
        "features",
        "models",
        "losses",  # features_for only, see INNER
        "tokens",
    },
    "evaluate": {"config", "spec", "machine", "report", "data", "models", "targets"},
    "train": {
        "config",
        "spec",
        "machine",
        "report",  # progress: how far a run is
        "files",
        "cache",
        "data",
        "features",
        "models",
        "losses",
        "targets",
        "evaluate",
        "signals",
    },
    "share": {"files", "spec", "cache", "codecs", "data", "targets", "remote", "report", "machine", "config"},
    "check": {"files", "spec", "cache", "codecs", "data", "targets", "dump", "report", "machine", "config"},
    "students": {
        "files",
        "codecs",  # matmul only: products in float32
        "config",
        "spec",
        "data",
        "features",
        "models",
        "losses",
        "targets",
        "evaluate",
        "report",
        "machine",
        "train",  # run_folder only
    },
    "reproduce": {
        "files",
        "dump",
        "train",
        "evaluate",
        "models",
        "data",
        "targets",
        "report",
        "config",
        "machine",
        "spec",
        "students",
    },
    "demo": {"files", "dump", "train", "evaluate", "models", "data", "targets", "report", "config", "machine", "spec"},
    "commands": {
        "report",
        "files",
        "spec",
        "machine",
        "config",
        "cache",
        "codecs",
        "losses",
        "models",
        "data",
        "targets",
        "dump",
        "evaluate",
        "train",
        "share",
        "remote",
        "check",
        "students",
        "reproduce",
        "demo",
    },
    "cli": {"commands", "report", "signals"},
    "__main__": {"cli"},
    PACKAGE: {"targets"},
}

# of some rooms the only modules that may import another room, or the only modules of the other room
ONLY_FROM: dict[tuple[str, str], set[str]] = {
    ("dump", "losses"): {"softcache.dump.features_for"},
    ("check", "dump"): {"softcache.check.repair"},
}
ONLY_TO: dict[tuple[str, str], set[str]] = {
    ("students", "train"): {"softcache.train.run_folder"},
    ("students", "codecs"): {"softcache.codecs.matmul"},
}

# module of train/ or dump/ -> the modules of the same room that it may import
INNER: dict[str, dict[str, set[str]]] = {
    "dump": {
        "half_types": set(),
        "teacher_state": set(),
        "results": set(),
        "output_scale": set(),
        "teacher": {"half_types", "results", "teacher_state"},
        "batch_composition": {"results", "teacher"},
        "progress": set(),
        "samples": set(),
        "made_with": {"progress", "teacher"},
        "position_index": set(),
        "row_batches": set(),
        "layout": {"teacher", "position_index"},
        "features_for": {"teacher"},
        "job": {"layout", "teacher", "position_index"},
        "kept": {"layout"},
        "choose_codec": {
            "kept",
            "batch_composition",
            "features_for",
            "job",
            "layout",
            "output_scale",
            "results",
            "row_batches",
            "teacher",
        },
        "token_teachers": {"teacher"},
        "open_teachers": {"choose_codec", "batch_composition", "teacher", "position_index", "token_teachers"},
        "encode": {"layout", "results", "teacher"},
        "pixels": {"choose_codec"},
        "class_report": {"encode", "teacher"},
        "flow": {
            "choose_codec",
            "class_report",
            "encode",
            "job",
            "layout",
            "made_with",
            "open_teachers",
            "pixels",
            "progress",
            "row_batches",
            "samples",
            "teacher",
            "token_teachers",
            "position_index",
        },
        "forecast": {
            "kept",
            "choose_codec",
            "flow",
            "job",
            "layout",
            "open_teachers",
            "row_batches",
            "samples",
            "teacher",
            "position_index",
        },
        "list_modules": {"choose_codec", "job", "open_teachers", "row_batches", "samples"},
    },
    "train": {
        "ranks": set(),
        "fits": set(),
        "terms": {"fits", "pairs"},
        "pairs": set(),
        "checkpoint": {"ranks"},
        "pruning": set(),
        "quantising": {"stages"},
        "stages": {"pruning", "terms"},
        "run_folder": {"ranks", "stages"},
        "tensorboard": {"run_folder"},
        "refuse": {"ranks", "run_folder", "stages", "tensorboard"},
        "class_weights": set(),
        "term_modules": {"class_weights", "pairs"},
        "objective": {"pairs", "ranks", "stages", "term_modules", "terms"},
        "optimizer": {"objective", "stages"},
        "learner": {"checkpoint", "objective", "pairs", "ranks"},
        "pieces": {"objective", "ranks"},
        "batches": {"fits", "objective", "pieces", "ranks", "run_folder", "terms"},
        "student": {"batches", "run_folder"},
        "stop": {"checkpoint", "ranks"},
        "session": {
            "batches",
            "checkpoint",
            "objective",
            "pairs",
            "quantising",
            "ranks",
            "stages",
            "stop",
            "tensorboard",
        },
        "metrics": {"batches", "checkpoint", "run_folder", "session"},
        "more_epochs": {"checkpoint", "metrics", "run_folder", "session", "stages"},
        "outlook": {"session", "stages", "terms"},
        "preparation": {
            "batches",
            "checkpoint",
            "learner",
            "objective",
            "optimizer",
            "outlook",
            "quantising",
            "ranks",
            "refuse",
            "session",
            "stages",
            "student",
            "term_modules",
        },
        "flow": {
            "checkpoint",
            "learner",
            "metrics",
            "more_epochs",
            "optimizer",
            "preparation",
            "ranks",
            "refuse",
            "run_folder",
            "session",
            "stop",
            "tensorboard",
        },
    },
}

# room -> the packages beyond the standard library it may import, anywhere in it; rooms that are not named: any
PACKAGES: dict[str, set[str]] = {
    "errors": set(),
    "report": {"matplotlib", "tqdm"},
    "version": set(),
    "files": set(),
    "spec": set(),
    "config": set(),
    "cli": set(),
    "commands": set(),
    "__main__": set(),
    PACKAGE: set(),
    "cache": {"numpy", "h5py", "cryptography"},
    "codecs": {"torch"},
    "features": {"torch"},
    "losses": {"torch"},
    "machine": {"numpy", "torch"},
}

# package -> the only modules that may import it
DOORS: dict[str, set[str]] = {
    "h5py": {"softcache.cache.write.shard", "softcache.cache.hdf5_check"},
    "tqdm": {"softcache.report.progress"},
    "pyarrow": {"softcache.share.preview"},
    "cryptography": {"softcache.cache.signatures"},
    "obstore": {"softcache.remote.objects"},
    "fsspec": {"softcache.remote.filesystems"},
}

# folders whose public names are loaded on first use
FACES = {PACKAGE, "softcache.dump", "softcache.targets", "softcache.train"}

# module -> rooms, folders and modules that it may not reach by any chain of imports
NEVER_REACHED: dict[str, set[str]] = {
    "softcache.train.flow": {"softcache.dump", "softcache.cache.write"},
    "softcache.dump.flow": {"softcache.train", "softcache.targets", "softcache.evaluate"},
    "softcache.dump.forecast": {"softcache.train", "softcache.targets", "softcache.evaluate"},
    "softcache.targets.cache": {"softcache.cache.write", "softcache.models", "softcache.losses"},
    "softcache.evaluate.measure": {"softcache.dump", "softcache.train", "softcache.cache.write"},
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
                faults += own_faults(module, one)
            elif package not in sys.stdlib_module_names:
                if package not in PACKAGES.get(room, {package}):
                    faults.append(f"{module}:{one.line}: {room} may not import {package}")
                if module not in DOORS.get(package, {module}):
                    faults.append(f"{module}:{one.line}: only {', '.join(sorted(DOORS[package]))} may import {package}")
    return faults


def own_faults(module: str, one: Import) -> Iterator[str]:
    """What is wrong with one import of a module of ours."""
    room, target = room_of(module), room_of(one.name)
    if target == room:
        table, name, other = INNER.get(room, {}), module.rpartition(".")[2], one.name.rpartition(".")[2]
        face = module.count(".") == 1  # a folder's __init__: its lazy public names
        if table and not face and (name not in table or other not in table[name]):
            yield f"{module}:{one.line}: in {room}, {name} may not import {other}"
        return
    if target not in ALLOWED[room] | (EVERYBODY if room not in EVERYBODY else set()):
        yield f"{module}:{one.line}: {room} may not import {target}"
    if module not in ONLY_FROM.get((room, target), {module}):
        yield f"{module}:{one.line}: only {', '.join(sorted(ONLY_FROM[room, target]))} may import {target}"
    if one.name not in ONLY_TO.get((room, target), {one.name}):
        yield f"{module}:{one.line}: {room} may import only {', '.join(sorted(ONLY_TO[room, target]))} of {target}"


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
        reached = reached_from(module, sources)
        faults += [
            f"{module} reaches {other}"
            for other in sorted(reached)
            if any(other == one or other.startswith(one + ".") for one in never)
        ]
    return faults


def circles(sources: Mapping[str, str]) -> list[str]:
    """The first circle of modules that import one another, at any depth of the code; lazy faces are not followed."""
    arrows = {
        module: {
            one.name
            for one in imports_of(module, sources)
            if own(one.name) and one.name != module and one.name in sources and one.name not in FACES
        }
        for module in sources
        if module not in FACES
    }
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as exc:
        return exc.args[1]
    return []


# ------------------------------------------------------------------------------------------------------------ as it stands


def test_every_import_goes_in_an_allowed_direction() -> None:
    assert direction_faults(SOURCES) == []


def test_no_chain_of_imports_leads_where_it_must_not() -> None:
    assert chain_faults(SOURCES) == []


def test_no_modules_import_one_another_in_a_circle() -> None:
    assert circles(SOURCES) == []


def test_the_tables_name_rooms_and_modules_that_exist() -> None:
    rooms = {room_of(module) for module in SOURCES}
    assert set(ALLOWED) == rooms
    assert set().union(*ALLOWED.values()) | set(PACKAGES) <= rooms
    named = set().union(*DOORS.values(), *NEVER_REACHED.values(), NEVER_REACHED, *ONLY_FROM.values(), *ONLY_TO.values())
    folders = {module.rpartition(".")[0] for module in SOURCES}
    assert named <= set(SOURCES) | folders
    for room, table in INNER.items():
        there = {m.removeprefix(f"{PACKAGE}.{room}.") for m in SOURCES if m.startswith(f"{PACKAGE}.{room}.")}
        assert set(table) == there
        assert not set().union(*table.values()) - there
        TopologicalSorter(table).prepare()  # no circle
    for package, modules in DOORS.items():
        for module in modules:
            assert any(one.name.partition(".")[0] == package for one in imports_of(module, SOURCES)), (
                f"{module} is no door to {package}"
            )


def test_the_directions_have_no_circle() -> None:
    order = list(TopologicalSorter(ALLOWED).static_order())
    assert order.index("cache") < order.index("data") < order.index("targets") < order.index("train")
    assert order[-1] == "__main__"


def test_the_promises_are_in_the_tables() -> None:
    """What the architecture promises, so that a table edited in passing does not take it back."""
    for room in ("codecs", "losses"):
        assert ALLOWED[room] == {"spec", "features"} and "h5py" not in PACKAGES[room]
    for room in EVERYBODY | {"report", "files", "spec", "machine", "features"}:
        assert ALLOWED[room] == set()
    assert ALLOWED["cache"] == {"files"} and "torch" not in PACKAGES["cache"]
    assert ALLOWED["config"] == {"spec"} and ALLOWED["models"] == {"spec", "features", "files", "words", "tokens"}
    assert ALLOWED["data"] == {"spec", "cache", "words", "tokens"} and ALLOWED["targets"] == {
        "cache",
        "codecs",
        "data",
        "features",
        "remote",
        "report",
    }
    assert "dump" not in ALLOWED["train"] and ALLOWED["dump"] & {"train", "targets", "evaluate"} == set()
    assert ALLOWED["evaluate"] & {"dump", "train", "cache"} == set()
    assert INNER["train"]["ranks"] == INNER["dump"]["teacher_state"] == set()
    assert INNER["dump"]["teacher"] == {"half_types", "results", "teacher_state"} and not INNER["dump"]["half_types"]
    assert "learner" not in INNER["train"]["objective"] and "flow" not in INNER["train"]["run_folder"]
    assert DOORS["h5py"] == {"softcache.cache.write.shard", "softcache.cache.hdf5_check"}


# -------------------------------------------------------------------------------------------------------- and it would see


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "line", "fault"),
    [
        ("softcache.train.flow", "from softcache.dump.teacher import Teacher", "train may not import dump"),
        ("softcache.train.flow", "from softcache import dump", "train may not import dump"),
        ("softcache.train.flow", "import softcache.dump as d", "train may not import dump"),
        ("softcache.dump.flow", "def f():\n    from softcache import train", "dump may not import train"),
        (
            "softcache.dump.flow",
            "from softcache.losses import LOSSES",
            "only softcache.dump.features_for may import losses",
        ),
        ("softcache.check.verify", "from softcache.dump import flow", "only softcache.check.repair may import dump"),
        (
            "softcache.students.export",
            "from softcache.train.flow import run",
            "students may import only softcache.train.run",
        ),
        (
            "softcache.train.objective",
            "from softcache.train.learner import Learner",
            "objective may not import learner",
        ),
        ("softcache.train.run_folder", "from softcache.train import flow", "run_folder may not import flow"),
        ("softcache.train.helpers", "from softcache.train import ranks", "in train, helpers may not import ranks"),
        ("softcache.cache.reader", "def f():\n    import torch", "cache may not import torch"),
        ("softcache.cache.reader", "from torch.utils.data import Dataset", "cache may not import torch"),
        ("softcache.cache.reader", "import h5py", "only softcache.cache.hdf5_check, softcache.cache.write.shard may"),
        ("softcache.losses.logits", "from softcache.cache.schema import Layout", "losses may not import cache"),
        ("softcache.losses.logits", "import h5py", "losses may not import h5py"),
        ("softcache.codecs.floats", "import h5py", "codecs may not import h5py"),
        ("softcache.codecs.codec", "from softcache.config import option", "codecs may not import config"),
        ("softcache.features.taps", "from softcache.dump.teacher import Teacher", "features may not import dump"),
        ("softcache.targets.cache", "from softcache.dump.layout import Storage", "targets may not import dump"),
        ("softcache.data.drift", "from softcache.targets import Cache", "data may not import targets"),
        ("softcache.files.durable", "from softcache.spec import convert", "files may not import spec"),
        ("softcache.dump.forecast", "from softcache import train", "dump may not import train"),
        ("softcache.train.flow", "import softcache", "train may not import softcache"),
        ("softcache.config", "import torch", "config may not import torch"),
        ("softcache.cli", "import numpy as np", "cli may not import numpy"),
        ("softcache.cli", "from softcache.config import resolve", "cli may not import config"),
        ("softcache.commands.dump", "import torch", "commands may not import torch"),
        ("softcache.evaluate.measure", "from tqdm import tqdm", "only softcache.report.progress may import tqdm"),
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
    line = "\ndef f():\n    from softcache.cache.write.writer import CacheWriter\n"
    planted = {**SOURCES, "softcache.cache.samples": SOURCES["softcache.cache.samples"] + line}
    found = chain_faults(planted)
    assert "softcache.train.flow reaches softcache.cache.write.shard" in found
    assert "softcache.targets.cache reaches softcache.cache.write.writer" in found


def test_a_planted_circle_is_found() -> None:
    line = "\ndef f():\n    from softcache.data.join import join_rows\n"
    planted = {**SOURCES, "softcache.data.identity": SOURCES["softcache.data.identity"] + line}
    assert {"softcache.data.identity", "softcache.data.join"} <= set(circles(planted))


# --------------------------------------------------------------------------------------------------------- in a new process


SHARING = {"torch", "h5py", "cryptography", "huggingface_hub", "obstore", "fsspec"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("softcache, softcache.cli, softcache.config, softcache.spec, softcache.errors", {"torch", "numpy", "h5py"}),
        (
            "softcache.cache.reader, softcache.cache.write.writer, softcache.cache.card",
            {"torch", "torchvision", "safetensors"},
        ),
        ("softcache.cache.reader, softcache.cache.samples", {"h5py", "torch"}),
        ("softcache.check.verify", {"torch", "torchvision"}),
        ("softcache.share.push, softcache.share.pull, softcache.share.sign", SHARING),
    ],
    ids=["command line", "cache", "reading", "verify", "sharing"],
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

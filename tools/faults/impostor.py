"""Does anything of another world pass for one's own? Caches and data of two worlds of one shape, crossed in every way.

    python tools/faults/impostor.py                 # every file x every way to put it there x every door
    python tools/faults/impostor.py --quick         # one way each, and workers that are forked

Two caches of one layout differ in their teacher, their data, their views, their row order, or in all of it. One file of the
second, or several, takes the place of the first one's; or the data that is joined has other contents, labels, class names,
class order or keys. Then somebody trains, evaluates, cuts a subset, or joins in Python with loader workers of every start method.

Contents are compared on 64 samples unless all are asked for: what is wrong with two samples of many is tried so.

A case is **silent** where it ended well, some target was not what this world's teacher says about the very pixels beside it (or
a label or a class meant something else), and nothing was said that is not said without the crossing. There must be none. A
swap of everything is consistent: nobody can see it, and nothing is wrong with it; it is listed and not counted.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import softcache
from softcache import cli, dump, errors
from softcache.cache import bound_files
from softcache.config import DumpConfig
from softcache.errors import SoftcacheError
from softcache.report.tables import table
from softcache.targets.cache import Joined

COUNT, SIDE, VIEWS = 512, 6, 2  # two parts of 256 rows
NAMES = ("ant", "bee", "cat", "dog")
METHODS = ("fork", "spawn", "forkserver")


# --- worlds ----------------------------------------------------------------------------------------------------------


def weight_of(seed: int) -> Tensor:
    draw = np.random.default_rng(100 + seed)
    return torch.from_numpy(draw.integers(-8, 9, (len(NAMES), SIDE * SIDE)) / 1024).float()


def answers(items: Any, seed: int = 0) -> Tensor:
    """(B, 4) what a teacher says about (B, H, W) uint8 pixels; exact in float32."""
    return torch.as_tensor(np.asarray(items)).flatten(1).float() @ weight_of(seed).T


class Teacher(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.fc = nn.Linear(SIDE * SIDE, len(NAMES), bias=False)
        self.fc.weight.data = weight_of(seed)

    def collate(self, items: Any) -> Tensor:
        return torch.stack([torch.as_tensor(np.asarray(item)) for item in items])

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.fc(images.flatten(1).float())
        return found


def teacher(seed: int = 0) -> Teacher:
    """As a factory for `softcache dump`."""
    return Teacher(seed)


class Pictures:
    """The data, as a factory for the command line: what is wrong with it is chosen by name."""

    def __init__(self, seed: int, wrong: str) -> None:
        draw = np.random.default_rng(seed)
        self.images = draw.integers(0, 256, (COUNT, SIDE, SIDE)).astype(np.uint8)
        self.labels = np.random.default_rng(7).integers(0, len(NAMES), COUNT)
        self.sample_keys = [f"picture/{i:04d}" for i in range(COUNT)]
        self.class_names = list(NAMES)
        if wrong == "contents":
            self.images = 255 - self.images
        if wrong == "contents of one in 50":
            self.images[::50] = 0
        if wrong == "labels shifted":
            self.labels = (self.labels + 1) % len(NAMES)
        if wrong == "one label":
            self.labels[3] = (self.labels[3] + 1) % len(NAMES)
        if wrong == "class order":
            self.class_names = list(NAMES[::-1])
        if wrong == "class names":
            self.class_names = ["ape", *NAMES[1:]]
        if wrong == "keys rotated":
            self.sample_keys = [*self.sample_keys[1:], self.sample_keys[0]]
        if wrong == "keys reversed":
            self.sample_keys = self.sample_keys[::-1]
        if wrong == "two keys exchanged":
            self.sample_keys[10], self.sample_keys[200] = self.sample_keys[200], self.sample_keys[10]

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index].copy(), int(self.labels[index])


def pictures(seed: int = 0, wrong: str = "") -> Pictures:
    return Pictures(seed, wrong.replace("_", " "))


WRONG_DATA = (
    "contents",
    "contents of one in 50",
    "labels shifted",
    "one label",
    "class order",
    "class names",
    "keys rotated",
    "keys reversed",
    "two keys exchanged",
)
FULL = ("two keys exchanged",)  # too few for the 64 samples that are looked at by default
MEANING = (
    "labels shifted",
    "one label",
    "class order",
    "class names",
)  # targets are the sample's own; what is beside is not

# how the other cache differs from this one
OTHERS: dict[str, dict[str, Any]] = {
    "teacher": {"teacher": 1},
    "data": {"data": 1},
    "views": {"view_seed": 5},
    "row order": {"order_seed": 9},
    "everything": {"teacher": 1, "data": 1, "view_seed": 5, "order_seed": 9},
}


def make(path: Path, codec: str, *, views: int = VIEWS, **other: Any) -> Path:
    config = DumpConfig(
        data=f"{__file__}:pictures?seed={other.get('data', 0)}",
        teacher=tuple(
            f"{__file__}:teacher?seed={other.get('teacher', 0) + m}&name={n}" for m, n in ((0, "a"), (10, "b"))
        ),
        policy=("shift:pixels=1",) if views > 1 else (),
        views=views,
        view_seed=other.get("view_seed", 0),
        order_seed=other.get("order_seed", 0),
        codec=codec,
        shard_rows=256,
        out=str(path),
        threads=1,
        workers=0,
    )
    dump.run(config, quiet=True)
    return path


# --- doors -----------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What came through a door: targets that are not those of the pixels beside them, and what was said."""

    wrong: int = 0
    compared: int = 0
    said: list[str] = field(default_factory=list)
    refused: str = ""


def compare(seen: Seen, items: Any, targets: Any) -> None:
    for member, seed in (("a", 0), ("b", 10)):
        if member in targets.members:
            seen.wrong += int((targets.logits(member) != answers(items, seed)).any(dim=1).sum())
    seen.compared += len(targets.rows)


class InWorker:
    """A collate function that reads the targets where the samples are loaded."""

    def __init__(self, joined: Joined) -> None:
        self.joined = joined

    def __call__(self, batch: list[Any]) -> tuple[Tensor, ...] | str:
        try:
            items = torch.stack([torch.as_tensor(sample[0]) for sample, _ in batch])
            targets = self.joined.gather(np.array([record for _, record in batch]))
            return items, targets.logits("a"), targets.logits("b")
        except SoftcacheError as exc:  # raised here, it would take the loader five seconds to end
            return str(exc)


def join_door(method: str | None) -> Callable[[Seen, Path, Any, dict[str, Any]], None]:
    """Every sample of every view, gathered in the main process, or in workers that are started in one way."""

    def enter(seen: Seen, path: Path, data: Any, how: dict[str, Any]) -> None:
        joined = softcache.open(path, quiet=True).join(data, **how)
        for view in range(joined.cache.num_views):
            joined.view = view
            if method is None:
                for sample, records in DataLoader(joined, 128):
                    compare(seen, sample[0], joined.gather(records))
                continue
            workers: dict[str, Any] = {"num_workers": 1, "multiprocessing_context": method}
            for batch in DataLoader(joined, 128, collate_fn=InWorker(joined), **workers):
                if isinstance(batch, str):
                    raise SoftcacheError(batch)
                items, a, b = batch
                seen.wrong += int(
                    (a != answers(items, 0)).any(dim=1).sum() + (b != answers(items, 10)).any(dim=1).sum()
                )
                seen.compared += len(items)

    return enter


@contextmanager
def watched(seen: Seen) -> Iterator[None]:
    """What the command line reads of a cache is compared with the pixels of the very samples."""
    plain = Joined.gather_samples

    def gather_samples(self: Joined, index: np.ndarray, views: np.ndarray, **how: Any) -> Any:
        targets = plain(self, index, views, **how)
        ids = self.cache.samples.ids[self.rows[index]]
        policy = self.cache.policy
        pairs = zip(index.tolist(), views.tolist(), ids.tolist(), strict=True)
        compare(seen, np.stack([policy.render(self.dataset[i][0], one, view) for i, view, one in pairs]), targets)
        return targets

    Joined.gather_samples = gather_samples  # type: ignore[method-assign]
    try:
        yield
    finally:
        Joined.gather_samples = plain  # type: ignore[method-assign]


def command_door(words: Callable[[Path, Path, str], list[str]]) -> Callable[[Seen, Path, Any, dict[str, Any]], None]:
    """A verb, in this process; data is a spec."""

    def enter(seen: Seen, path: Path, data: Any, how: dict[str, Any]) -> None:
        flags = [word for name, value in how.items() for word in (f"--{name.replace('_', '-')}", value)]
        with watched(seen), tempfile.TemporaryDirectory(dir=path.parent) as out, redirect_stdout(io.StringIO()):
            code = cli.main([*words(path, Path(out), data), *flags, "--quiet"])
        if code:
            raise SoftcacheError("exit code " + str(code))

    return enter


def train_words(path: Path, out: Path, data: str) -> list[str]:
    student = ["--student", "softcache:mlp?hidden=2", "--epochs", "2", "--loss", "kd", "--threads", "1"]
    return ["train", "--cache", str(path), "--data", data, *student, "--out", str(out / "run")]


def eval_words(path: Path, out: Path, data: str) -> list[str]:
    return ["eval", str(path), "--data", data, "--threads", "1"]


def subset_door(seen: Seen, path: Path, data: Any, how: dict[str, Any]) -> None:
    """A smaller cache is cut out of it, and that one is joined."""
    with tempfile.TemporaryDirectory(dir=path.parent) as out:
        with redirect_stdout(io.StringIO()):
            if cli.main(["subset", str(path), f"{out}/small", "--members", "a", "--quiet"]):
                raise SoftcacheError("subset refused")
        join_door(None)(seen, Path(out, "small"), pictures(), how)


Door = Callable[[Seen, Path, Any, dict[str, Any]], None]
SPEC = f"{__file__}:pictures"
DOORS: dict[str, tuple[Door, bool]] = {  # door, whether it takes a spec
    "join": (join_door(None), False),
    "train": (command_door(train_words), True),
    "eval": (command_door(eval_words), True),
    "subset": (subset_door, False),
    **{f"join, {method}": (join_door(method), False) for method in METHODS},
}


def through(door: str, path: Path, data: Any, how: dict[str, Any] | None = None) -> Seen:
    """What comes through a door."""
    seen, said = Seen(), io.StringIO()
    errors._TOLD.clear()
    with redirect_stderr(said):
        try:
            DOORS[door][0](seen, path, data, how or {})
        except (SoftcacheError, IndexError) as exc:
            seen.refused = f"{type(exc).__name__}: {exc}"
    seen.said = [line for line in said.getvalue().splitlines() if line.startswith("softcache: ")]
    return seen


# --- crossings -------------------------------------------------------------------------------------------------------


def over(source: Path, target: Path) -> None:
    """Written over the file that is there, whose times it keeps."""
    there = target.stat()
    target.write_bytes(source.read_bytes())
    os.utime(target, ns=(there.st_atime_ns, there.st_mtime_ns))


def moved(source: Path, target: Path) -> None:
    shutil.copy2(source, target.with_name("aside"))
    os.replace(target.with_name("aside"), target)


def linked(source: Path, target: Path) -> None:
    target.unlink()
    os.link(source, target)


WAYS = {"written over": over, "renamed": moved, "hard link": linked}


def crossed_files(path: Path) -> dict[str, list[str]]:
    """What is exchanged together."""
    files = [str(file.relative_to(path)) for file in sorted(path.rglob("*.h5"))]
    manifests = ["manifest.json"]
    groups = {one: [one] for one in [*files, *manifests]}
    groups["members/"] = [one for one in files if one.startswith("members/")]
    groups["members/a/"] = [one for one in files if one.startswith("members/a/")]
    groups["views/"] = [one for one in files if one.startswith("views/")]
    groups["members/, views/"] = groups["members/"] + groups["views/"]
    groups["samples, probe"] = [one for one in files if one in ("samples.h5", "probe.h5")]
    groups["all but samples"] = [one for one in files if one != "samples.h5"]
    groups["all but the manifest"] = files
    return groups


def cross(own: Path, other: Path, names: list[str], way: str) -> bool:
    """Put files of the other cache into this one; False where nothing changed by it."""
    changed = False
    for name in names:
        if name.startswith("manifest"):  # with the copy under its id, or nobody would take it
            shutil.copytree(other / "manifests", own / "manifests", dirs_exist_ok=True)
        if (other / name).read_bytes() != (own / name).read_bytes():
            changed = True
            WAYS[way](other / name, own / name)
    return changed


def twin_within(own: Path, name: str) -> str | None:
    """Another file of the same cache that has the same layout: of the other member, or the other part."""
    swaps = [("/a/", "/b/"), ("/b/", "/a/"), ("part-00000", "part-00001"), ("part-00001", "part-00000")]
    for old, new in swaps:
        other = own / name.replace(old, new)
        if old in name and other.is_file() and other.stat().st_size == (own / name).stat().st_size:
            return str(other.relative_to(own))
    return None


@dataclass
class Report:
    """Counts, and what was silent or consistent."""

    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    silent: list[str] = field(default_factory=list)
    consistent: list[str] = field(default_factory=list)

    def note(self, what: str, name: str, door: str, seen: Seen, twin: Seen, *, meaning: bool = False) -> None:
        assert twin.compared and not (twin.refused or twin.wrong), (what, name, door, twin)
        if seen.refused:
            came = "refused"
        elif len(seen.said) > len(twin.said):
            came = "warned"
        elif seen.wrong or meaning:
            came = "SILENT"
            self.silent.append(f"{what}: {name}, through {door}: {seen.wrong} of {seen.compared} targets")
        else:
            came = "own targets"
        self.counts[what, came] = self.counts.get((what, came), 0) + 1


def cross_caches(report: Report, root: Path, doors: list[str], ways: list[str], codecs: list[str]) -> None:
    """Every file of every other cache in this one's place."""
    for codec in codecs:
        own = make(root / f"{codec}-own", codec)
        twins = {door: through(door, own, data_of(door)) for door in doors}
        for door, twin in twins.items():
            assert not twin.refused and not twin.wrong and twin.compared, (codec, door, twin)
        for kind, settings in OTHERS.items():
            other = make(root / f"{codec}-{kind}", codec, **settings)
            for name, files in crossed_files(own).items():
                for way in ways:
                    with copied(own, root) as copy:
                        softcache.open(copy, quiet=True)  # the right files are remembered
                        if not cross(copy, other, files, way):
                            continue
                        for door in chosen(doors, kind, way == ways[0] and codec == codecs[0]):
                            what, case = f"a cache of another {kind}", f"{codec}, {name} ({way})"
                            report.note(what, case, door, through(door, copy, data_of(door)), twins[door])
            if kind == "everything":
                seen = through("join", other, pictures(1))
                report.consistent.append(
                    f"the whole other cache with its own data: {seen.compared} targets, {seen.refused or 'joined'}"
                )
        for name in [one for one in crossed_files(own) if one.endswith(".h5")]:
            inner = twin_within(own, name)
            if inner is None:
                continue
            with copied(own, root) as copy:
                WAYS[ways[0]](own / inner, copy / name)
                for door in chosen(doors, "data", first=True):
                    case = f"{codec}, {inner} as {name}"
                    report.note("a file of the same cache", case, door, through(door, copy, data_of(door)), twins[door])


def chosen(doors: list[str], kind: str, first: bool) -> list[str]:
    """The doors that a crossing is taken through: processes that start anew take seconds, and see the same files."""
    if kind not in ("teacher", "data"):
        return doors[:2]
    slow = [f"join, {method}" for method in METHODS[1:]]
    return [door for door in doors if door not in slow or (kind == "teacher" and first)]


def data_of(door: str) -> Any:
    return SPEC if DOORS[door][1] else pictures()


@contextmanager
def copied(own: Path, root: Path) -> Iterator[Path]:
    """A copy of a cache, for one crossing."""
    with tempfile.TemporaryDirectory(dir=root) as folder:
        yield Path(shutil.copytree(own, Path(folder, "cache")))


def as_torch(data: Pictures) -> tuple[Any, dict[str, Any]]:
    return TensorDataset(torch.from_numpy(data.images), torch.from_numpy(data.labels)), {"keys": data.sample_keys}


class Bare:
    """Items and labels, and nothing that could be asked for without reading."""

    def __init__(self, data: Pictures) -> None:
        self.data, self.sample_keys, self.classes = data, data.sample_keys, data.class_names

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


FORMS: dict[str, Callable[[Pictures], tuple[Any, dict[str, Any]]]] = {
    "attributes": lambda data: (data, {}),
    "selected": lambda data: (Subset(data, range(COUNT - 1, -1, -1)), {}),  # type: ignore[arg-type]
    "tensors": as_torch,
    "pairs": lambda data: ([data[i] for i in range(COUNT)], {"keys": data.sample_keys}),
    "read only": lambda data: (Bare(data), {}),
}


def cross_data(report: Report, root: Path, doors: list[str]) -> None:
    """Data that is not what the teacher saw, in every form."""
    own = make(root / "data-own", "float32", views=1)
    for wrong in WRONG_DATA:
        for form, made in FORMS.items():
            data, how = made(pictures(wrong=wrong))
            how |= {"check_content": "full"} if wrong in FULL else {}
            if wrong in ("class order", "class names") and form in ("tensors", "pairs"):
                continue  # these have no class names that could be wrong
            twin = through("join", own, *made(pictures()))
            seen = through("join", own, data, how)
            report.note("data", f"{wrong}, {form}", "join", seen, twin, meaning=wrong in MEANING)
        for door in [door for door in doors if DOORS[door][1]]:
            if wrong in FULL and door == "eval":
                continue  # it has no flag for it
            twin = through(door, own, SPEC)
            how = {"check_content": "full"} if wrong in FULL else {}
            seen = through(door, own, f"{SPEC}?wrong={wrong.replace(' ', '_')}", how)
            report.note("data", wrong, door, seen, twin, meaning=wrong in MEANING)


def cross_folders(report: Report, root: Path, doors: list[str]) -> None:
    """Image folders with the same names: through the command line, and as torchvision's."""
    import torchvision

    for world in (0, 1):
        draw = np.random.default_rng(world)
        for name in NAMES:
            (root / f"folder-{world}" / name).mkdir(parents=True)
            for i in range(4):
                pixels = draw.integers(0, 256, (SIDE, SIDE)).astype(np.uint8)
                Image.fromarray(pixels).save(root / f"folder-{world}" / name / f"{i}.png")
    config = DumpConfig(
        data=f"imagefolder:{root}/folder-0",
        teacher=(f"{__file__}:teacher?name=a",),
        codec="float32",
        out=str(root / "folder-cache"),
        threads=1,
    )
    dump.run(config, quiet=True)

    def grey(path: str) -> np.ndarray:
        return np.array(Image.open(path))

    for door in [door for door in doors if DOORS[door][1]]:
        found = [through(door, root / "folder-cache", f"imagefolder:{root}/folder-{world}") for world in (0, 1)]
        report.note("a data folder", "imagefolder:", door, found[1], found[0])
    for form in (torchvision.datasets.ImageFolder, torchvision.datasets.DatasetFolder):
        more = {"extensions": (".png",)} if form is torchvision.datasets.DatasetFolder else {}
        found = []
        for world in (0, 1):
            dataset = form(f"{root}/folder-{world}", loader=grey, **more)
            seen, said = Seen(), io.StringIO()
            with redirect_stderr(said):
                try:
                    joined = softcache.open(root / "folder-cache", quiet=True).join(dataset)
                    for sample, records in DataLoader(joined, 8):
                        compare(seen, sample[0], joined.gather(records))
                except SoftcacheError as exc:
                    seen.refused = str(exc)
            seen.said = said.getvalue().splitlines()
            found.append(seen)
        report.note("a data folder", form.__name__, "join", found[1], found[0])


def cross_runs(report: Report, root: Path) -> None:
    """Files of another run's folder, in a run that is resumed: its targets must still be the cache's."""
    own, other = make(root / "run-own", "float32"), make(root / "run-other", "float32", **OTHERS["everything"])

    def words(cache: Path, out: Path, seed: int, epochs: int) -> list[str]:
        student = ["--student", "softcache:mlp?hidden=2", "--loss", "kd", "--threads", "1", "--quiet"]
        return [
            "train",
            "--cache",
            str(cache),
            "--data",
            f"{SPEC}?seed={seed}",
            *student,
            "--epochs",
            str(epochs),
            "--out",
            str(out),
        ]

    def resumed(run: Path) -> Seen:
        seen, said = Seen(), io.StringIO()
        errors._TOLD.clear()
        with redirect_stderr(said), redirect_stdout(io.StringIO()), watched(seen):
            code = cli.main(words(own, run, 0, 2))
        seen.refused = f"exit code {code}" if code else ""
        seen.said = [line for line in said.getvalue().splitlines() if line.startswith("softcache: ")]
        return seen

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        cli.main(words(own, root / "run-a", 0, 2))
        cli.main(words(other, root / "run-b", 1, 2))
    twin = resumed(Path(shutil.copytree(root / "run-a", root / "run-twin")))
    for file in sorted((root / "run-a").iterdir()):
        if not file.is_file() or not (root / "run-b" / file.name).is_file():
            continue
        run = Path(shutil.copytree(root / "run-a", root / f"run-with-{file.name}"))
        shutil.copy2(root / "run-b" / file.name, run / file.name)
        report.note("a run folder", file.name, "train, resumed", resumed(run), twin)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="one way to cross each file, and forked workers: under a minute"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    doors = [door for door in DOORS if not arguments.quick or door in ("join", "train", "join, fork")]
    ways = ["written over"] if arguments.quick else list(WAYS)
    codecs = ["float32"] if arguments.quick else ["float32", "linear_head"]
    bound_files.SETTLED_NS = -(10**9)  # what was just written is remembered too: the memory is to be tried
    report = Report()
    with tempfile.TemporaryDirectory(prefix="impostor-") as folder:
        root = Path(folder)
        os.environ["SOFTCACHE_HOME"] = str(root / "home")
        cross_caches(report, root, doors, ways, codecs)
        cross_data(report, root, doors)
        cross_folders(report, root, doors)
        cross_runs(report, root)
    kinds = sorted({what for what, _ in report.counts})
    came = ("refused", "warned", "own targets", "SILENT")
    print(table(["crossed", *came], [[kind, *(report.counts.get((kind, one), 0) for one in came)] for kind in kinds]))
    for line in report.consistent:
        print(f"consistent, not counted: {line}")
    for line in report.silent:
        print(f"SILENT  {line}")
    print(f"{sum(report.counts.values())} cases, {len(report.silent)} silent")
    return int(bool(report.silent))


if __name__ == "__main__":
    sys.exit(main())

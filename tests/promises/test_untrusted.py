"""Run folders, weights, provenance and texts of somebody else: no code of theirs runs, nothing outside is touched."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from softcache import cli
from softcache.errors import UntrustedError
from softcache.models import load_model

sys.path.append(str(Path(__file__).parents[2] / "tools"))
world, runs, texts, flips = (importlib.import_module(f"hostile.{name}") for name in ("world", "runs", "texts", "flips"))


def quick_first(*values: str) -> list[Any]:
    """Parameters, of which the quick tier takes the first."""
    return [pytest.param(value, marks=[pytest.mark.slow] * (i > 0)) for i, value in enumerate(values)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`world/` and `outside/`."""
    made = tmp_path_factory.mktemp("untrusted")
    world.make_world(made)
    return made


@pytest.fixture
def place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the world to be harmed, which the test stands in."""
    with world.copy_of(folder) as made:
        monkeypatch.chdir(made)
        yield made


@pytest.fixture
def outside(folder: Path) -> Path:
    """What nothing may touch."""
    return folder / "outside"


def do(verb: str, place: Path, outside: Path, *more: str) -> Any:
    """What a verb did; whatever must not happen is in its `faults`."""
    return world.judge(verb, [*world.words_of(verb), *more], place, outside)


# ----------------------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("verb", ["repair by a teacher", "repair from a copy", "extend", "dump again"])
def test_a_folder_of_a_cache_that_is_a_link_is_written_by_no_verb(verb: str, place: Path, outside: Path) -> None:
    """A repair once cleared and filled `dump/repair` wherever `dump` led."""
    shutil.move("cache/dump", outside / "dump")
    (outside / "dump/repair").mkdir()
    (outside / "dump/repair/precious").write_text("precious")
    Path("cache/dump").symlink_to(outside / "dump")
    runs._damage(place / "cache")
    done = do(verb, place, outside)
    assert (done.code, done.faults) == (2, [])
    assert "is a symbolic link; links inside a cache are not followed" in done.said


@pytest.mark.parametrize(
    "name",
    [
        *("run.json.tmp-0", "config.toml.tmp-0", "metrics.csv.tmp-0", "metrics.jsonl.tmp-0", "checkpoint.pt.tmp-0"),
        *("student.safetensors.tmp-0", "best.safetensors.tmp-0", "metrics.csv", "config.toml"),
    ],
)
@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_a_run_that_is_resumed_writes_through_no_link(name: str, link: Any, place: Path, outside: Path) -> None:
    for there in ("checkpoint.pt", "student.safetensors"):
        (place / "run" / there).unlink()
    (place / "run" / name).unlink(missing_ok=True)
    link(outside / "precious", place / "run" / name)
    done = do("resume", place, outside)
    assert (done.code, done.faults) == (0, [])
    assert not Path("run", name).is_symlink()


def test_the_folder_for_tensorboard_is_no_link(place: Path, outside: Path) -> None:
    Path("run/tensorboard").symlink_to(outside / "full")
    done = do("resume", place, outside)
    assert (done.code, done.faults) == (2, []) and "run/tensorboard: is a symbolic link" in done.said


@pytest.mark.parametrize("file", ["dump/part-1-of-1.lock", "dump/repair.lock"])
def test_a_lock_with_a_second_name_is_not_written(file: str, place: Path, outside: Path) -> None:
    Path("cache", file).unlink(missing_ok=True)
    os.link(outside / "precious", Path("cache", file))
    for verb in ("dump again", "repair from a copy"):
        assert do(verb, place, outside).faults == []


@pytest.mark.parametrize("attack", quick_first("a pipe", "a socket", "link to nothing", "link to a file", "hard link"))
def test_what_lies_where_a_repair_works_is_not_opened(attack: str, place: Path, outside: Path) -> None:
    """To clear such a folder away it was opened, and of a pipe it was waited for its writer."""
    runs.ATTACKS[attack](place / "cache/dump/repair", outside)
    runs._damage(place / "cache")
    done = do("repair by a teacher", place, outside)
    assert (done.code, done.faults) == (0, [])
    assert do("verify --full", place, outside).code == 0


def test_a_journal_with_a_second_name_is_refused(place: Path, outside: Path) -> None:
    Path("cache/manifest.json").unlink()
    shutil.rmtree("cache/members/run")
    journal = Path("cache/dump/part-1-of-1.jsonl")
    journal.unlink()
    os.link(outside / "precious", journal)
    done = do("dump again", place, outside)
    assert (done.code, done.faults) == (2, []) and "has a second name (a hard link)" in done.said


@pytest.mark.parametrize(
    ("file", "verb"),
    [
        ("student.safetensors", "eval"),
        ("student.safetensors", "init"),
        ("run.json", "resume"),
        ("checkpoint.pt", "resume"),
        ("best.safetensors", "resume"),
        ("config.toml", "export of its data"),
    ],
)
def test_a_file_of_a_run_folder_is_not_read_through_a_link(file: str, verb: str, place: Path, outside: Path) -> None:
    runs.link_to_a_copy(place / "run" / file, outside)
    done = do(verb, place, outside)
    assert (done.code, done.faults) == (2, [])
    assert f"{file}: '{file}' is a symbolic link; links inside a run folder are not followed" in done.said
    if file == "student.safetensors":  # a file that the user names may be one: a hub keeps it so
        assert do("eval FILE", place, outside).code == 0


def test_the_folder_itself_may_be_a_link(place: Path, outside: Path) -> None:
    for name in ("run", "cache"):
        shutil.move(name, f"{name}-elsewhere")
        Path(name).symlink_to(f"{name}-elsewhere")
    for verb in ("eval", "verify --full", "resume", "extend"):
        assert do(verb, place, outside).code == 0


def test_a_store_of_links_is_told_how_to_be_copied(
    place: Path, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a hub keeps a snapshot: every file a link to a blob. It is not damaged."""
    for number, path in enumerate(sorted(path for path in Path("cache").rglob("*") if path.is_file())):
        path.rename(place / f"blob-{number}")
        path.symlink_to(place / f"blob-{number}")
    for verb in ("verify", "verify --full", "inspect", "learn", "repair"):
        assert cli.main(world.words_of(verb)) == 2
        said = capsys.readouterr()
        assert "links inside a cache are not followed" in said.err and "cp -rL" in said.err
        assert "damaged" not in said.out + said.err.partition("--allow-code")[0]
    shutil.copytree("cache", "copied")  # which resolves links
    assert cli.main(["verify", "copied", "--full"]) == 0


# ------------------------------------------------------------------------------------------------------- provenance and metadata

FOREIGN = {
    "code": {"data": "mine.py:images", "teacher": ["mine.py:net"]},
    "a folder": {"data": "imagefolder:../outside/full", "teacher": ["../outside/full"]},
    "a download": {"data": "torchvision:MNIST?root=new", "teacher": ["torchvision:resnet18@IMAGENET1K_V1"]},
    "a list of keys": {"data": world.DATA, "teacher": ["other"], "samples": "../outside/precious"},
}


@pytest.mark.parametrize("verb", ["repair", "views", "verify --replay"])
@pytest.mark.parametrize("what", quick_first(*FOREIGN))
def test_what_provenance_names_is_opened_only_where_the_user_repeats_it(
    verb: str, what: str, place: Path, outside: Path
) -> None:
    Path("cache/provenance.json").write_text(json.dumps({"command": FOREIGN[what]}))
    runs._damage(place / "cache") if verb == "repair" else None
    done = do(verb, place, outside)
    assert (done.code, done.faults) == (2, [])
    assert FOREIGN[what]["data"] in done.said and not Path("new").exists()
    honest = ["--data", world.DATA, *(["--teacher", "other"] if verb == "repair" else [])]
    again = do(verb, place, outside, *honest)
    assert (again.code, again.faults) == (0, [])


def test_what_provenance_names_is_opened_where_the_user_allows_it(place: Path, outside: Path) -> None:
    told = json.loads(Path("cache/provenance.json").read_text())["command"]
    assert (told["data"], told["teacher"]) == (world.DATA, ["run"])
    runs._damage(place / "cache")
    assert do("repair", place, outside, "--allow-code").code == 0
    assert do("verify --full", place, outside).code == 0


WITHOUT_ASKING = ("eval", "export", "plan", "dump", "train from it")


@pytest.mark.parametrize("verb", WITHOUT_ASKING)
@pytest.mark.parametrize(
    "text",
    [
        "mine.py:net",
        "hf:prajjwal1/bert-tiny",
        "torchvision:resnet18?weights=IMAGENET1K_V1",
        "softcache:textcnn?vocabulary=../outside/precious",
    ],
)
def test_what_a_weights_file_names_is_built_by_no_verb_unasked(
    verb: str, text: str, place: Path, outside: Path
) -> None:
    runs.SPECS[f"spec {text}"](place / "run/student.safetensors", outside)
    done = do(verb, place, outside)
    assert (done.code, done.faults) == (2, []) and f"says that it belongs to {text}" in done.said


def test_a_factory_is_called_where_the_user_names_or_allows_it(
    place: Path, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ["--threads", "1", "--device", "cpu", "--quiet"]
    train = ["train", "--data", world.DATA, "--student", "mine.py:net", "--epochs", "1", "--out", "coded", *how]
    assert cli.main(train) == 0 and cli.main(train) == 0  # and resumed: the command names it
    (outside / "called-net").unlink()
    evaluate = ["eval", "coded", "--data", world.EVAL, *how]
    assert cli.main(evaluate) == 2
    said = capsys.readouterr().err
    assert "name it yourself: mine.py:net@coded" in said
    assert f"softcache eval coded --data '{world.EVAL}' --threads 1 --device cpu --quiet --allow-code" in said
    assert not (outside / "called-net").exists()
    assert cli.main([*evaluate, "--allow-code"]) == 0
    assert cli.main(["eval", "mine.py:net@coded", *evaluate[2:]]) == 0
    with pytest.raises(UntrustedError, match="allow_code=True"):
        load_model("coded", num_classes=3)
    assert load_model("coded", num_classes=3, allow_code=True).num_classes == 3


def test_a_recipe_of_the_users_own_names_its_factories(
    place: Path, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = texts.recipe().replace(world.MLP, "mine.py:net")
    text = text.replace(
        "[budget", '[[step]]\nname = "c"\nseeds = true\ndump = {data = "train", teacher = ["a"]}\n[budget'
    )
    text = text.replace("[budget", '[[step]]\nname = "e"\neval = {data = "test", run = "a"}\n[budget')
    Path("r.toml").write_text(text)
    assert cli.main(["reproduce", "r.toml", "--out", "out", "--device", "cpu", "--quiet"]) == 0
    made = cli.main(["reproduce", "r.toml", "--out", "out", "--device", "cpu", "--quiet", "--use", "a=run"])
    assert made == 0, capsys.readouterr().err  # of softcache's own: built by name


HARMFUL = [
    name
    for name in texts.RECIPES
    if name.startswith(("a step", "a billion", "laughs", "deep", "large", "pairs", "words"))
]


@pytest.mark.parametrize("name", quick_first(*HARMFUL))
def test_a_recipe_that_would_leave_its_folder_or_grow_is_refused(name: str, place: Path, outside: Path) -> None:
    text = texts.RECIPES[name]
    Path("r.toml").write_bytes(text.encode() if isinstance(text, str) else text)
    done = world.judge(name, ["reproduce", "r.toml", "--out", "fresh", "--device", "cpu"], place, outside)
    assert (done.code, done.faults) == (2, []) and not Path("fresh").exists()


def test_a_note_of_a_recipe_that_names_somebody_elses_run_is_not_believed(place: Path, outside: Path) -> None:
    Path("r.toml").write_text(texts.recipe())
    reproduce = ["reproduce", "r.toml", "--out", "out", "--device", "cpu", "--quiet"]
    assert cli.main(reproduce) == 0
    (note,) = Path("out").rglob("a-*.result.json")
    kept = json.loads(note.read_text())
    kept["outcome"]["folder"] = "../outside/full"
    note.write_text(json.dumps(kept))
    assert cli.main(reproduce) == 0
    assert json.loads(note.read_text())["outcome"]["folder"] == "."


# ---------------------------------------------------------------------------------------------------------------- on the screen


def test_names_of_a_cache_reach_the_screen_without_what_a_terminal_obeys(
    place: Path, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Class names, keys and provenance that hold escapes, through every verb that prints them."""
    Path("theirs.py").write_text(
        "import numpy as np\n\n\nclass Data:\n"
        "    sample_keys = [f'\\x1b[31m{i}\\x07\\u202e' for i in range(12)]\n"
        "    class_names, labels = ('\\x1b]0;a\\x07', 'b\\x9b', 'c\\r\\nc'), [i % 3 for i in range(12)]\n"
        "    __len__ = lambda self: 12\n"
        "    __getitem__ = lambda self, i: np.full((8, 8), 20 * i, np.uint8)\n\n\ndef data():\n    return Data()\n"
    )
    key, data = "\x1b[31m1\x07\u202e", ["--data", "theirs.py:data"]
    how = ["--threads", "1", "--device", "cpu"]
    commands = [
        ["train", *data, "--eval-data", "theirs.py:data", "--student", world.MLP, "--epochs", "1", "--out", "r", *how],
        ["dump", *data, "--teacher", "r", "--out", "c", *how],
        ["inspect", "c"],
        ["inspect", "c", "--sample", key],
        ["views", "c", "--sample", key, "--out", "v.png", *data],
        ["verify", "c", "--replay", "2", *data],
        ["eval", "r", *data, "--per-class", *how],
        ["eval", "c", *data, "--per-class", *how],
        ["subset", "c", "s", "--keep-labels", "0"],
        ["subset", "c", "t", "--drop-labels", "0"],
        ["merge", "s", "t", "m"],
        ["plan", *data, "--teacher", "r", *how],
        ["export", "r", "--to", "safetensors", *data, *how],
        ["eval", "r", *data, "--keep-labels", "\x1b[31mnone", *how],
        ["inspect", "c", "--sample", "\x1b[31mnone"],
        ["views", "c", "--sample", key],
    ]
    for words in commands:
        code = cli.main(words)
        said = capsys.readouterr()
        text = said.out + said.err
        assert code == (
            0
            if (words[-1] not in ("\x1b[31mnone", key) and "\x1b[31mnone" not in words)
            or (words[0] == "inspect" and words[-1] == key)
            else 2
        ), said.err
        assert not {"\x1b", "\x07", "\x9b", "\u202e", "\r"} & set(text), words
        assert text.strip()


# ------------------------------------------------------------------------------------------------------------------ the whole


SHOWN = (  # (file, attack): one of each way in which a file is opened
    *(
        ("student.safetensors", name)
        for name in runs.SPECS
        if name.startswith(("an input", "a graft", "a policy", "num"))
    ),
    *(("checkpoint.pt", name) for name in runs.CHECKPOINTS),
    *(("run.json", name) for name in runs.DOCUMENTS["run.json"]),
    *(("config.toml", name) for name in runs.DOCUMENTS["config.toml"]),
)


@pytest.mark.parametrize(
    ("file", "name"),
    [pytest.param(*one, marks=[pytest.mark.slow] * (i % 3 > 0)) for i, one in enumerate(SHOWN)],
    ids=str,
)
def test_what_a_file_of_a_run_folder_says_ends_in_a_refusal(file: str, name: str, place: Path, outside: Path) -> None:
    runs.DOCUMENTS[file][name](place / "run" / file, outside)
    verb = {"student.safetensors": "eval", "config.toml": "export of its data"}.get(file, "resume")
    done = do(verb, place, outside)
    assert done.faults == []
    harmless = name in (
        "a position far away",
        "metrics with escapes",
        "an optimiser of nothing",
        "a policy that is code",
    )
    assert done.code == 2 or harmless, name


@pytest.mark.slow
@pytest.mark.parametrize(("part", "every"), [(runs, 29), (texts, 13)], ids=["runs", "texts"])
def test_files_and_texts_do_no_harm(part: Any, every: int, folder: Path) -> None:
    """Some of them; all by `python tools/hostile runs texts`."""
    found = list(part.tried(folder, every=every))
    assert [(one.case, one.faults) for one in found if one.faults] == []
    assert len(found) > 20 and {one.code for one in found} >= {0, 2}


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.whole)])
def test_a_flipped_bit_is_refused_or_changes_nothing(count: int, place: Path) -> None:
    found = list(flips.flipped(place / "run", count))
    assert [(one.case, one.faults) for one in found if one.faults] == []
    assert len(found) == count and sum(one.code == 2 for one in found) > 0.8 * count

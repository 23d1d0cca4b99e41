"""What every verb of the command line keeps. A new verb is tested by its line in VERBS alone."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from signing import Key

from softcache import cli, demo
from softcache.commands import VERBS
from softcache.commands.flags import load_verb
from softcache.commands.help import DOCS
from softcache.dump import forecast
from softcache.files import durable
from softcache.models import load_model
from softcache.report import progress
from softcache.share import sign

# what stands in examples -> what it is in the world below
SUBSTITUTIONS = {
    r"torchvision:MNIST\?root=data": "digits",
    r"imagefolder:train": "digits",
    r"digits\?split=test": "imagefolder:test",
    r"(data|pictures) digits\b": r"\1 imagefolder:train",
    r"sample digits/0*(\d+)": r"sample 0/000\1.png",
    r"torchvision:resnet50@IMAGENET1K_V2": "runs/teacher",
    r"softcache:mlp\?hidden=1200,1200@runs/teacher": "softcache:cnn?width=4@runs/teacher",
    r"layers\.0:flatten": "9:flatten",
    r"(?<!--extend )--out caches/(?=digits|mnist)": "--out caches/new-",
    r"--out runs/": "--out runs/new-",
    r"--views 8": "--views 2",
    r"--views 16": "--views 6",
    r"--epochs 20": "--epochs 1",
    r"/backup/": "backup/",
    r"(?:file:/shared/caches|hf:team)/mnist@\w+": "file:caches/mnist",
    r"hf:team/": "file:hub/",
    r"file:/shared/": "file:shared/",
    r"https://data.example.org/caches/mnist (.*) --id \w+": r"file:caches/digits \1",
    r"--budget short --seeds 0,1,2": "--budget smoke --seeds 0",
    r"reproduce digits$": "reproduce digits --budget smoke",
    r"--nproc-per-node 4": "--nproc-per-node 2",
}
# the example that does a verb's longest work, where it is not the first
WORK = {"reproduce": 1, "verify": 1, "export": 2}
# verbs that are done before a progress could be shown
INSTANT = {"losses", "inspect", "views", "card", "sign", "store", "completion", "help"}
# verbs that need no file of the world
ANYWHERE = {"demo", "reproduce", "losses", "store", "completion", "help"}
# what takes more than a few seconds: a verb's longest work, and single examples
SLOW_WORK = {"demo", "reproduce", "plan"}
SLOW = {
    "softcache demo",
    "softcache demo --out my-demo --seeds 0,1,2",
    "softcache export runs/s --to onnx --data digits?split=test",
    "softcache reproduce digits",
    "softcache reproduce hinton2015-mnist --data-root data --budget short --seeds 0,1,2",
}


def rows_of(verbs: Iterable[str]) -> list[object]:
    """Of tests that do a verb's longest work."""
    return [pytest.param(verb, marks=[pytest.mark.slow] if verb in SLOW_WORK else []) for verb in verbs]


def examples_of(verb: str) -> list[str]:
    """Its command lines as they are in help, each on one line, without remarks."""
    text = load_verb(verb).examples.replace("\\\n", " ")
    return [" ".join(line.partition("   (")[0].split()) for line in text.strip().splitlines()]


def substituted(example: str) -> list[str]:
    """An example's words, with small data in the place of its own."""
    for pattern, small in SUBSTITUTIONS.items():
        example = re.sub(pattern, small, example)
    return shlex.split(example)


def work_of(verb: str) -> list[str]:
    """The words after `softcache` of the example that does its longest work, without --json."""
    return [word for word in substituted(examples_of(verb)[WORK.get(verb, 0)])[1:] if word != "--json"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples speak of: images, two teachers, a student, two caches, weights and a list of keys."""
    folder = tmp_path_factory.mktemp("world")
    draw = np.random.default_rng(0)
    for name, count in (("train", 6), ("test", 3)):
        for label in range(10):
            (folder / name / str(label)).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / name / str(label) / f"{number:04d}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in WORLD.replace("\\\n", " ").strip().splitlines():
            assert cli.main([*line.split(), "--quiet", "--threads", "1", "--device", "cpu"]) == 0
    shutil.copytree(folder / "caches/digits", folder / "backup/digits")
    model = load_model("softcache:cnn", num_classes=10, class_names=[*"0123456789"], input_shape=(8, 8))
    torch.save(model.net.state_dict(), folder / "weights.pt")
    key = Key(folder / "id_ed25519")
    (folder / "signers").write_text(f"carol {key.public}\n")
    shutil.copytree(folder / "caches/digits", folder / "caches/signed")
    sign.run(folder / "caches/signed", key.file)
    (folder / "keys.txt").write_text("0/0001.png\n3/0002.png\n")
    return folder


WORLD = r"""
train --data imagefolder:train --student softcache:cnn?width=4 --epochs 1 --out runs/teacher
train --data imagefolder:train --student softcache:cnn?width=4 --epochs 1 --out runs/second --seed 1
dump --data imagefolder:train --teacher runs/teacher --out caches/digits
dump --data imagefolder:train --teacher runs/teacher --teacher runs/second --policy shift:pixels=2 --views 4 \
     --out caches/mnist
dump --data imagefolder:train --teacher runs/second --out caches/second
dump --data imagefolder:train --teacher runs/teacher --teacher runs/second --policy shift:pixels=2 --views 2 \
     --first-view 4 --out caches/mnist-later
train --data imagefolder:train --cache caches/digits --loss kd --student softcache:mlp?hidden=8 --epochs 1 \
      --eval-data imagefolder:test --out runs/s
"""


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it, as the current folder; what takes long is cut short."""
    folder = Path(shutil.copytree(world, tmp_path / "here"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})  # everything here is tiny
    monkeypatch.setattr(demo, "TRAIN_DATA", "imagefolder:train")
    monkeypatch.setattr(demo, "TEST_DATA", "imagefolder:test")
    monkeypatch.setattr(demo, "TEACHER_EPOCHS", 1)
    monkeypatch.setattr(demo, "STUDENT_EPOCHS", 1)
    monkeypatch.setattr(forecast, "TRIAL_SECONDS", 0.1)
    yield folder
    torch.set_num_threads(1)  # as the other tests want it


def damage(folder: Path) -> None:
    """One byte of one shard: what `repair` is for."""
    shard = next((folder / "caches/digits/members").rglob("*.h5"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


def prepare(verb: str, folder: Path) -> None:
    if verb == "repair":
        damage(folder)


# ---- help -----------------------------------------------------------------------------------------------------------


def test_help_of_every_verb_loads_nothing_heavy() -> None:
    """Also --version, `softcache help` and `softcache completion`; and the help of one verb loads no other verb."""
    script = (
        "import sys\nfrom softcache.cli import main\nfrom softcache.commands import VERBS\n"
        "def run(*argv):\n    try:\n        return main(argv)\n    except SystemExit as done:\n        return done.code\n"
        "assert run('dump', '--help') == 0\n"
        "assert 'softcache.commands.train' not in sys.modules\n"
        "assert [run(verb, '--help') for verb in VERBS] == [0] * len(VERBS)\n"
        "assert [run(*argv) for argv in (['--help'], ['--version'], ['help'], ['help', 'dump'])] == [0] * 4\n"
        "assert run('completion', 'bash') == 0\n"
        "heavy = {'torch', 'numpy', 'h5py', 'torchvision', 'tqdm', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_a_summary_and_two_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main([verb, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: softcache {verb}")
    assert load_verb(verb).summary.split()[0] in text
    shown = text[text.index("\nexamples:\n") :]
    assert len(re.findall(rf"^  (softcache|torchrun .* -m softcache) {verb}\b", shown, re.MULTILINE)) >= 2


def test_the_main_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(re.search(rf"^ +{verb} ", text, re.MULTILINE) for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_a_page_of_the_docs_has_the_verb(verb: str) -> None:
    assert any(f"softcache {verb}" in page.read_text(encoding="utf-8") for page in DOCS.glob("*.md"))


# ---- examples -------------------------------------------------------------------------------------------------------


def example_rows() -> list[object]:
    rows = []
    for verb in VERBS:
        for example in examples_of(verb):
            slow = example in SLOW or example.startswith("torchrun")
            rows.append(pytest.param(example, id=example, marks=[pytest.mark.slow] if slow else []))
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("example", example_rows())
def test_an_example_runs(here: Path, capsys: pytest.CaptureFixture[str], example: str) -> None:
    program, *words = substituted(example)
    if program == "torchrun":
        torchrun = [sys.executable, "-m", "torch.distributed.run", *words]
        done = subprocess.run(torchrun, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        return
    assert program == "softcache"
    assert cli.main(words) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.strip()


def test_substitutions_have_a_use() -> None:
    text = "\n".join(example for verb in VERBS for example in examples_of(verb))
    assert [pattern for pattern in SUBSTITUTIONS if not re.search(pattern, text, re.MULTILINE)] == []
    assert {*WORK, *INSTANT, *ANYWHERE, *SLOW_WORK} <= set(VERBS)
    assert set(text.splitlines()) >= SLOW


# ---- the flags of every verb ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("verb", rows_of(VERBS))
def test_json_is_one_document_and_nothing_else(here: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    prepare(verb, here)
    assert cli.main([*work_of(verb), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "argv",
    [
        ["reproduce", "LIST"],
        ["inspect", "caches/mnist", "--sample", "0/0001.png"],
        ["help", "CLI"],
        ["help", "dump"],
        ["losses", "kd"],
        ["dump", "--data", "imagefolder:train", "--teacher", "runs/teacher", "--out", "x", "--list-modules"],
    ],
    ids=" ".join,
)
def test_json_of_other_answers(here: Path, capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert cli.main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_json_of_a_soft_target_holds_what_the_bars_show(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["inspect", "caches/mnist", "--sample", "0/0001.png", "--view", "2"]
    assert cli.main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["key"], found["view"], len(found["classes"])) == ("0/0001.png", 2, 10)
    assert set(found["probabilities"]) == {"teacher", "second", "ensemble (mean_probs)"}
    for by_temperature in found["probabilities"].values():
        assert list(by_temperature) == ["1", "2", "4", "20"]
        assert all(abs(sum(shares) - 1) < 1e-6 for shares in by_temperature.values())
    assert cli.main(argv) == 0
    largest = max(found["probabilities"]["teacher"]["1"])
    assert f"{100 * largest:6.2f} %" in capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_print_config_shows_every_setting_and_does_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    before = sorted(here.rglob("*"))
    assert cli.main([*work_of(verb), "--print-config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["setting", "value", "from"]
    assert cli.main([*work_of(verb), "--print-config", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [line.split()[0] for line in lines[2:]] == list(load_verb(verb).config.__dataclass_fields__)
    assert {one["from"] for one in found.values()} <= {"default", "flag"}
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("verb", VERBS)
def test_settings_come_from_a_file_too(here: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    """Every setting that was given, positional ones among them: what --print-config says makes the same command."""
    assert cli.main([*work_of(verb), "--print-config", "--json"]) == 0
    given = {k: v["value"] for k, v in json.loads(capsys.readouterr().out).items() if v["from"] == "flag"}
    (here / "own.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in given.items()))
    assert cli.main([verb, "--config", "own.toml", "--print-config", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {k: v["value"] for k, v in found.items() if v["from"] == "own.toml"} == given


# ---- progress -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", rows_of(verb for verb in VERBS if verb not in INSTANT))
def test_progress_is_shown_after_a_while_and_not_before(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """In lines fit for a log, since stderr is no terminal here. A verb without it belongs to INSTANT, if it is."""
    shutil.copytree(here, here.parent / "again")
    words = work_of(verb)
    for folder, after_s, argv in (
        (here, 0.0, words),
        (here.parent / "again", 1000.0, words),
        (here, 0.0, [*words, "--quiet"]),
    ):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(progress, "SHOWN_AFTER_S", after_s)
        monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
        prepare(verb, folder)
        cli.main(argv)
        errors = capsys.readouterr().err
        assert "\r" not in errors
        shown = re.findall(r"^.*: [\d.,]+( \w?B)? of [\d.,]+ \w+, .*/s, ETA ", errors, re.MULTILINE)
        assert bool(shown) == (after_s == 0.0 and "--quiet" not in argv), errors


# ---- stopped --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_says_how_to_go_on(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    def stopped(self: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("softcache.commands.flags.Command.run", stopped)
    assert cli.main(work_of(verb)) == 130
    assert capsys.readouterr().err == f"\nsoftcache: interrupted; {load_verb(verb).after_stop}\n"
    assert "same command" in load_verb(verb).after_stop


# Loads everything once, then does each case in a process of its own that stands still in the middle of its work.
STOPPER = """
import json, os, signal, sys, time
from pathlib import Path
from softcache import cli
from softcache.report.progress import Meter
import softcache.reproduce.flow, softcache.demo, softcache.check.repair, softcache.share.subset, softcache.students.export
import softcache.share.merge

def stand_still(self, count=1):
    Path("working").touch()
    time.sleep(60)

Meter.add = stand_still
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test in the background would ignore it
found = []
for folder, number, words in json.load(sys.stdin):
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        os.dup2(os.open("said", os.O_CREAT | os.O_WRONLY), 2)
        sys.exit(cli.main(words))
    begin = time.monotonic()
    while not Path(folder, "working").exists() and time.monotonic() - begin < 60:
        time.sleep(0.01)
    os.kill(child, number)
    begin = time.monotonic()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found.append([code, time.monotonic() - begin, Path(folder, "said").read_text()])
Path("found.json").write_text(json.dumps(found))
"""
WORKING = [verb for verb in VERBS if verb not in INSTANT]
STOPS = [(verb, number) for verb in WORKING for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.fixture(scope="module")
def stopped(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], tuple[int, float, str]]:
    """(verb, signal) -> exit code, seconds that it took to end, and what it said on stderr."""
    root = tmp_path_factory.mktemp("stopped")
    cases = []
    for verb, number in STOPS:
        folder = Path(shutil.copytree(world, root / f"{verb}-{number}"))
        prepare(verb, folder)
        cases.append([str(folder), int(number), work_of(verb)])
    subprocess.run(
        [sys.executable, "-c", STOPPER],
        input=json.dumps(cases),
        text=True,
        cwd=root,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return dict(zip(STOPS, json.loads((root / "found.json").read_text()), strict=True))


@pytest.mark.slow
@pytest.mark.timeout(300)  # the first one makes what all of them speak of
@pytest.mark.parametrize(("verb", "number"), STOPS, ids=lambda value: getattr(value, "name", value))
def test_a_signal_ends_a_verb_within_ten_seconds(
    stopped: dict[tuple[str, int], tuple[int, float, str]], verb: str, number: int
) -> None:
    code, seconds, errors = stopped[verb, number]
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert code == {signal.SIGINT: 130, signal.SIGTERM: 143}[number], errors
    assert re.search(rf"\nsoftcache: {word}; .*same command (resumes|starts|goes on)[^\n]*\n\Z", errors), errors
    assert "Traceback" not in errors
    assert seconds < 10


# ---- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("verb", [verb for verb in VERBS if load_verb(verb).writes])
def test_a_verb_that_writes_asks_for_room_first(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    prepare(verb, here)
    monkeypatch.setattr(durable, "free_bytes", lambda folder: 10)
    assert cli.main(work_of(verb)) == 2
    errors = capsys.readouterr().err
    assert re.search(r"^softcache: error: .* needs? \d+\.\d MB, the disk has 0\.0 MB left$", errors, re.MULTILINE), (
        errors
    )
    assert "Traceback" not in errors


@pytest.mark.parametrize("verb", rows_of(verb for verb in VERBS if not load_verb(verb).writes))
def test_a_verb_that_says_so_writes_nothing(here: Path, verb: str) -> None:
    before = sorted(here.rglob("*"))
    assert cli.main(work_of(verb)) == 0
    assert sorted(here.rglob("*")) == before


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("extra", "message", "tip"),
    [
        (["--quiett"], "unrecognized arguments: --quiett", "did you mean '--quiet'"),
        (["--set", "nonsense=1"], "--set: unknown setting 'nonsense'", ""),
        (["--config", "nowhere.toml"], "nowhere.toml: No such file", None),
    ],
    ids=["flag", "setting", "file"],
)
def test_a_mistake_is_told_without_a_traceback(
    here: Path, capsys: pytest.CaptureFixture[str], verb: str, extra: list[str], message: str, tip: str | None
) -> None:
    assert cli.main([*work_of(verb), *extra]) == 2
    said, errors = capsys.readouterr()
    assert said == ""
    assert errors.startswith(f"softcache: error: {message}")
    assert tip is None or re.search(f"^  tip: .*{tip}", errors, re.MULTILINE)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ANYWHERE])
def test_files_that_are_not_there_are_told_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(work_of(verb)) == 2
    torch.set_num_threads(1)
    errors = capsys.readouterr().err
    assert errors.startswith("softcache: error: ")
    assert "Traceback" not in errors

"""The command line: instant help, and for every mistake a message, a tip and the right exit code."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORLDS

import softcache
from softcache import cli
from softcache.commands import VERBS
from softcache.files import durable


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pieces.py, a cache, and a run trained from it."""
    folder = tmp_path_factory.mktemp("cli")
    shutil.copy(WORLDS / "command_line.py", folder / "pieces.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["dump", *DATA, "--teacher", "pieces.py:good", "--out", "cache", *QUIET]) == 0
        argv = ["train", *DATA, "--cache", "cache", "--student", "softcache:mlp?hidden=4", "--epochs", "1"]
        assert cli.main([*argv, "--out", "run", *QUIET]) == 0
    return folder


DATA = ("--data", "pieces.py:toy")
QUIET = ("--quiet", "--threads", "1", "--device", "cpu")


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the current folder."""
    folder = Path(shutil.copytree(made, tmp_path / "here"))
    monkeypatch.chdir(folder)
    return folder


# ---- help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_imports_neither_torch_nor_numpy(argv: list[str]) -> None:
    script = (
        "import sys\nfrom softcache.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as done:\n    assert not done.code\n"
        "heavy = {'torch', 'numpy', 'h5py', 'torchvision', 'tqdm', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


# ---- mistakes -------------------------------------------------------------------------------------------------------


def dump_of(teacher: str = "pieces.py:good", data: str = "pieces.py:toy", *more: str) -> list[str]:
    return ["dump", "--data", data, "--teacher", teacher, "--out", "new", *QUIET, *more]


def extend_by(*more: str) -> list[str]:
    return ["dump", *DATA, "--teacher", "pieces.py:good", "--out", "cache", "--extend", *QUIET, *more]


def train_on(*more: str, data: str = "pieces.py:toy", student: str = "softcache:mlp?hidden=4") -> list[str]:
    return ["train", "--data", data, "--student", student, "--epochs", "1", "--out", "new", *QUIET, *more]


def export_of(model: str, *more: str) -> list[str]:
    return ["export", model, "--to", "program", *QUIET, *more]


def nothing(here: Path, patch: pytest.MonkeyPatch) -> None:
    pass


def shard(here: Path) -> Path:
    (found,) = (here / "cache/members").rglob("*.h5")
    return found


def truncated(here: Path, patch: pytest.MonkeyPatch) -> None:
    shard(here).write_bytes(shard(here).read_bytes()[:-100])


def not_hdf5(here: Path, patch: pytest.MonkeyPatch) -> None:
    shard(here).write_bytes(b"just text, ".ljust(shard(here).stat().st_size, b"."))


def without_manifest(here: Path, patch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(here / "cache" / "dump")
    (here / "cache" / "manifest.json").unlink()


def unfinished(here: Path, patch: pytest.MonkeyPatch) -> None:
    (here / "cache" / "manifest.json").unlink()


def nonsense_manifest(here: Path, patch: pytest.MonkeyPatch) -> None:
    (here / "cache" / "manifest.json").write_text("<html>404</html>")


def empty_folder(here: Path, patch: pytest.MonkeyPatch) -> None:
    (here / "empty").mkdir()
    (here / "hollow" / "cat").mkdir(parents=True)


def there_already(here: Path, patch: pytest.MonkeyPatch) -> None:
    (here / "pieces.pt2").touch()


def no_room(here: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(durable, "free_bytes", lambda folder: 10)


def disk_full(here: Path, patch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: Any, offset: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(durable, "write_at", full)


def disk_full_in_training(here: Path, patch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "new/checkpoint.pt")

    patch.setattr(torch, "save", full)


def no_scikit_learn(here: Path, patch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    patch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "sklearn" else find_spec(name, *a))


def read_only(here: Path, patch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, data: bytes, *, tag: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    patch.setattr(durable, "write_whole", refused)


def bad_toml(here: Path, patch: pytest.MonkeyPatch) -> None:
    (here / "bad.toml").write_text("lr = \n")
    (here / "typo.toml").write_text("learning_rate = 0.1\n")


Prepare = Callable[[Path, pytest.MonkeyPatch], None]


def row(
    id: str, argv: Sequence[str], message: str, tip: str | None, *, code: int = 2, prepare: Prepare = nothing
) -> Any:
    return pytest.param(list(argv), message, tip, code, prepare, id=id)


MISTAKES = [
    # spelling
    row("no verb", [], "arguments are required: VERB", "softcache --help"),
    row("unknown verb", ["dmup"], "there is no verb 'dmup'", "did you mean 'dump'"),
    row("verb of no likeness", ["xyz"], "there is no verb 'xyz'", "see `softcache --help`"),
    row("mistyped flag", ["verify", "cache", "--repaly", "3"], "arguments: --repaly", "did you mean '--replay'.*verify"),
    row("shortened flag", ["verify", "cache", "--repla", "3"], "arguments: --repla", "did you mean '--replay'.*verify"),
    row("unknown flag", ["verify", "cache", "--fast"], "unrecognized arguments: --fast", "--help"),
    row("flag of another verb", [*dump_of(), "--epochs", "3"], "unrecognized arguments: --epochs 3", "--help"),
    row("flag without value", ["dump", "--data"], "--data: expected one argument", "dump --help"),
    row("no cache named", ["inspect"], "CACHE is missing", "CACHE: folder of the cache"),
    row("two depths", ["verify", "cache", "--quick", "--full"], "not allowed with", "verify --help"),
    row("flag missing", ["dump", *DATA, "--out", "new"], "--teacher is missing", "--teacher TEACHER: MODEL@WEIGHTS"),
    row("number", train_on("--lr", "fast"), "--lr: 'fast' is not a number", None),
    row("weight decay", train_on("--weight-decay", "-1"), "--weight-decay -1.0: must be at least 0", None),
    row("warm-up", train_on("--schedule", "warmup(-3)"), "'-3' is not a finite number of at least 0", None),
    row("checkpoints", train_on("--checkpoint-every", "0"), "--checkpoint-every 0: must be at least 1", None),
    row("choice", train_on("--optimizer", "adamx"), "--optimizer cannot be 'adamx'", "did you mean 'adam' or 'adamw'"),
    row("--set", train_on("--set", "batchsize=3"), "--set: unknown setting 'batchsize'", "'batch_size'"),
    row("--set without value", train_on("--set", "lr"), "'lr' is not key=value", None),
    row("config missing", train_on("--config", "none.toml"), "none.toml: No such file", None),
    row("config not TOML", train_on("--config", "bad.toml"), "bad.toml: not TOML", "texts stand in quotes", prepare=bad_toml),
    row("config typo", train_on("--config", "typo.toml"), "typo.toml: unknown setting 'learning_rate'", "", prepare=bad_toml),
    row("codec", [*dump_of(), "--codec", "float61"], "unknown codec 'float61'", "'float16'"),
    row("codec parameter", [*dump_of(), "--codec", "headtail:bit=8"], "no parameter 'bit'", "'bits'"),
    row("codec value", [*dump_of(), "--codec", "headtail:k=few"], "'few' is not a whole number", None),
    row("promise", [*dump_of(), "--max-kl", "0"], "--max-kl 0 --at-temperature 4: both must be", None),
    row("promise at no temperature", [*dump_of(), "--max-kl", "1", "--at-temperature", "-1"], "temperature -1: both", None),
    row("type of features", [*dump_of(), "--feature-dtype", "int4"], "--feature-dtype cannot be 'int4'", "int8"),
    row("features of no module", [*dump_of(), "--features", "fc:flatten"], "'good' is no torch module", "torch module"),
    row("extend nothing", [*dump_of(), "--extend"], "new: there is no such folder", "softcache dump --out"),
    row("policy of an extension", extend_by("--policy", "shift"), "--policy cannot be given with --ext", "keeps its own"),
    row("fewer views", extend_by("--views", "0"), "the cache has 1 already", "in the end"),
    row("views of no policy", extend_by("--views", "3"), "every view of this cache's policy is the same", None),
    row("plan of another teacher", ["plan", *DATA, "--teacher", "pieces.py:wide", *QUIET], r"shape \(40, 5\).*3 classes", ""),
    row(
        "views of no sample",
        ["views", "cache", "--sample", "toy/999.png", "--data", "pieces.py:toy"],
        "no sample 'toy/999.png'",
        "toy/",
    ),
    row(
        "views by code of the cache",
        ["views", "cache", "--sample", "toy/001.png"],
        "made with --data pieces.py:toy.*softcache views cache --sample toy/001.png --allow-code",
        "say it yourself: --data pieces.py:toy",
    ),
    row("views without a sample", ["views", "cache"], "--sample is missing", "--sample KEY: whose views"),
    row("views of no kind", ["views", "cache", "--sample", "toy/001.png", "--out", "v.gif"], "is a PNG", ".png"),
    row("policy step", [*dump_of(), "--policy", "crop_filp"], "unknown view step 'crop_filp'", "'crop_flip'"),
    row("policy parameter", [*dump_of(), "--policy", "shift:pixel=2"], "no parameter 'pixel'", "'pixels'"),
    row("policy value", [*dump_of(), "--policy", "shift:pixels=few"], "'few' is not a whole number", None),
    row("loss", train_on("--loss", "kld"), "unknown loss 'kld'", "'kd'"),
    row("loss parameter", train_on("--cache", "cache", "--loss", "kd:T=4"), "no setting 'T'", "temperature"),
    row("part", [*dump_of(), "--part", "3"], "--part '3' is not i/n", "1/3"),
    # data
    row("data set", dump_of(data="digist"), "no source is called 'digist'", "'digits'"),
    row("data set of torchvision", dump_of(data="torchvision:MNITS?root=."), "no data set 'MNITS'", "'MNIST'"),
    row("data not there", dump_of(data="torchvision:MNIST?root=nowhere"), "Dataset not found", "--download"),
    row("data file", dump_of(data="peices.py:toy"), "there is no file peices.py", "path"),
    row("data factory", dump_of(data="pieces.py:toys"), "no factory 'toys'", "'toy'"),
    row("data parameter", dump_of(data="pieces.py:toy?cuont=3"), "unknown parameter 'cuont'", "'count'"),
    row("data module", dump_of(data="not_a.module:f"), "no module named 'not_a'", "install the package"),
    row("data iterable", dump_of(data="pieces.py:keyless"), "can only be iterated", "map-style"),
    row("plain path", dump_of(data="cache"), "is a path, not a source", "imagefolder:cache"),
    row("no folder", dump_of(data="imagefolder:nowhere"), "there is no such folder", "imagefolder:PATH"),
    row("empty folder", dump_of(data="imagefolder:empty"), "holds no folders", "own folder", prepare=empty_folder),
    row("empty class", dump_of(data="imagefolder:hollow"), "none of its 1 folders holds an image", "", prepare=empty_folder),
    row("no text file", dump_of(data="tsv:none.tsv"), "there is no such file", "path"),
    row("class to keep", [*dump_of(), "--keep-labels", "bat"], "no class 'bat'", "'cat'"),
    row("keys to take", [*dump_of(), "--samples", "none.txt"], "cannot be read as a list of keys", "UTF-8"),
    # models
    row("model", dump_of("softcache:mlpp"), "softcache has no model 'mlpp'", "'mlp'"),
    row("teacher without weights", dump_of("softcache:mlp?hidden=4"), "has no weights", "@WEIGHTS"),
    row("model scheme", dump_of("sofcache:mlp"), "unknown kind of model 'sofcache'", "'softcache'"),
    row("model without scheme", train_on(student="resnet20"), "neither a run folder nor a model", "softcache:resnet20"),
    row("model parameter", train_on(student="softcache:mlp?hiden=3"), "unknown parameter 'hiden'", "'hidden'"),
    row("weights", dump_of("softcache:mlp@none.pt"), "there are no weights none.pt", "exists"),
    row("a cache as a run", dump_of("cache"), "holds no student.safetensors", "it is a cache"),
    row("teacher not a module as student", train_on(student="pieces.py:good"), "must be an nn.Module", "teachers"),
    row("classes of a run", dump_of("run", data="pieces.py:four"), "trained on 3 classes, the data has 4", ""),
    row("classes of a teacher", dump_of("pieces.py:wide"), r"shape \(40, 5\).*3 classes", "these classes"),
    row("weights of another model", dump_of("softcache:mlp?hidden=5@run"), "3 of another shape: 0.weight", "name and param"),
    row("eval of nothing", ["eval", "nowhere", *DATA, *QUIET], "neither a run folder nor a model", ""),
    row("export of nothing", export_of("nowhere", *DATA, "--out", "new.pt2"), "neither a run folder nor a model", ""),
    row("format of an export", export_of("run", *DATA, "--to", "onxx"), "--to cannot be 'onxx'", "'onnx'"),
    row("export on no data", export_of("run"), "without --eval-data", "--data DATA"),
    row("export over a file", export_of("run", *DATA, "--out", "pieces.pt2"), "there already", "remove", prepare=there_already),
    row("NaN logits", dump_of("pieces.py:nan"), "not finite for 40 samples.*toy/0", "--without FILE"),
    row("package in a factory", dump_of("softcache_is_not_a_package_xyz.sub:f"), "no module named", "install"),
    # caches
    row("cache not there", train_on("--cache", "nowhere"), "nowhere: there is no such folder", "softcache dump --out"),
    row("cache without manifest", train_on("--cache", "cache"), "not a softcache cache", "--out", prepare=without_manifest),
    row("verify without manifest", ["verify", "cache"], "not a softcache cache", "--out", prepare=without_manifest),
    row("inspect without manifest", ["inspect", "cache"], "not a softcache cache", "--out", prepare=without_manifest),
    row("manifest that is none", ["inspect", "cache"], "is no manifest", "copy the cache", prepare=nonsense_manifest),
    row("unfinished cache", train_on("--cache", "cache"), "1 of 1 spans", "resume", prepare=unfinished),
    row("truncated shard", train_on("--cache", "cache"), r"has \d+ bytes, the manifest", "copy", prepare=truncated),
    row("sample", ["inspect", "cache", "--sample", "toy/999.png"], "no sample 'toy/999.png'", "toy/"),
    row("view of a sample", ["inspect", "cache", "--sample", "toy/001.png", "--view", "7"], "views 0 to 0", None),
    row("other data", train_on("--cache", "cache", data="pieces.py:toy?count=41"), "1 of 41 samples are not in", "--samples"),
    row("member", train_on("--cache", "cache", "--members", "goood"), "no member 'goood'", "'good'"),
    row("view", train_on("--cache", "cache", "--view", "1"), "views 0 to 0", None),
    row("combination", train_on("--cache", "cache", "--combine", "mean"), "unknown combination rule", "mean_"),
    row("combination of eval", ["eval", "run", *DATA, "--cache", "cache", "--combine", "x", *QUIET], "rule 'x'", ""),
    # the machine
    row("device", train_on("--device", "gpu"), "unknown device 'gpu'", "cuda"),
    row("no room", dump_of(), "the shards to be written need .* the disk has", "free some space", prepare=no_room),
    row("disk full", dump_of(), "No space left on device", "free some space", prepare=disk_full),
    row("disk full in training", train_on(), "checkpoint.pt: No space left", "free", prepare=disk_full_in_training),
    row("extra not installed", dump_of(data="digits"), "'sklearn', which is not", r"softcache\[demo\]", prepare=no_scikit_learn),
    row("no permission", dump_of(), "Permission denied", None, prepare=read_only),
    row("a file as folder", train_on("--out", "pieces.py"), "pieces.py: is a file", "another --out"),
    # verify's own exit codes
    row("verify: truncated", ["verify", "cache"], r"has \d+ bytes", None, code=1, prepare=truncated),
    row("verify: truncated, full", ["verify", "cache", "--full"], r"has \d+ bytes", None, code=1, prepare=truncated),
    row("verify: not HDF5", ["verify", "cache", "--full"], "not those that were written.*sha256", None, code=1, prepare=not_hdf5),
    row("verify: nonsense", ["verify", "cache"], "is no manifest", None, code=1, prepare=nonsense_manifest),
    row("verify: unfinished", ["verify", "cache"], "1 of 1 spans", None, code=3, prepare=unfinished),
    # signals
    row("Ctrl-C", dump_of("pieces.py:interrupted"), "interrupted; the same command resumes", None, code=130),
    row("SIGTERM", dump_of("pieces.py:terminated"), "terminated; the same command resumes", None, code=143),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "message", "tip", "code", "prepare"), MISTAKES)
def test_a_mistake_gets_a_message_a_tip_and_an_exit_code(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    message: str,
    tip: str | None,
    code: int,
    prepare: Prepare,
) -> None:
    """`tip` is a pattern, "" for any tip at all, None where the message says it all."""
    prepare(here, monkeypatch)
    assert cli.main(argv) == code
    said, errors = capsys.readouterr()
    text = said + errors
    assert re.search(message, text, re.DOTALL), text
    assert "Traceback" not in text
    if code == 2:
        assert all(
            line.startswith("softcache: warning: ") for line in errors.partition("softcache: error: ")[0].splitlines()
        )
        assert said == ""
    if tip is not None:
        assert re.search(r"^  tip: .*" + tip, errors, re.MULTILINE), errors


def test_an_error_inside_a_users_file_is_told_with_its_place(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "broken.py").write_text("def teacher():\n    return 1 / 0\n")
    assert cli.main(dump_of("broken.py:teacher")) == 2
    told = "building the teacher 'broken.py:teacher' failed: ZeroDivisionError: division by zero (broken.py, line 2)"
    assert told in capsys.readouterr().err


def test_errors_on_the_terminal_have_no_traceback(here: Path) -> None:
    """Through the real entry point."""
    done = subprocess.run(
        [sys.executable, "-m", "softcache", "verify", "nowhere"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "softcache: error: nowhere: there is no such folder",
        "  tip: give the folder that `softcache dump --out` wrote",
    ]


def started(argv: list[str], flag: Path) -> subprocess.Popen[str]:
    """A command in a process group of its own, once it has got as far as `flag`."""
    # a test run in the background of a shell ignores Ctrl-C, and a child would inherit that
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "softcache", *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    start = time.monotonic()
    while not flag.exists():
        assert process.poll() is None and time.monotonic() - start < 60, process.communicate()
        time.sleep(0.01)
    return process


SIGNALS = [
    pytest.param(signal.SIGINT, 130, "interrupted", id="SIGINT"),
    pytest.param(signal.SIGTERM, 143, "terminated", id="SIGTERM"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code", "word"), SIGNALS)
def test_a_signal_ends_a_dump_that_can_be_resumed(here: Path, number: int, code: int, word: str) -> None:
    argv = ["dump", *DATA, "--teacher", "pieces.py:slow", "--out", "caches/slow", "--batch-size", "4", *QUIET]
    process = started(argv, here / "writing")
    process.send_signal(number)
    said, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert (said, errors) == ("", f"\nsoftcache: {word}; the same command resumes where it stopped\n")
    assert not list((here / "caches/slow").rglob("*.tmp*"))
    assert cli.main(argv) == 0
    assert len(softcache.open("caches/slow")) == 40


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code", "word"), SIGNALS)
def test_a_signal_to_the_whole_group_ends_loader_workers_too(here: Path, number: int, code: int, word: str) -> None:
    """As Ctrl-C in a terminal and a job scheduler's SIGTERM do it."""
    argv = train_on("--workers", "2", "--batch-size", "2", "--epochs", "50", student="pieces.py:slow_student")
    process = started(argv, here / "training")
    time.sleep(0.2)
    os.killpg(process.pid, number)
    said, errors = process.communicate(timeout=30)
    assert process.returncode == code, errors
    told = re.fullmatch(
        rf"\nsoftcache: {word}; (\S+) is saved (in|after) epoch .*: the same command goes on from there\n", errors
    )
    assert told and said == "", errors


@pytest.mark.parametrize(("size", "ends"), [(None, "exit"), ("1", "exit"), ("2", "_exit")])
@pytest.mark.parametrize("fault", [None, RuntimeError("torch")])
def test_one_of_several_processes_ends_without_teardown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], size: str | None, ends: str, fault: Exception | None
) -> None:  # fmt: skip
    def work() -> int:
        if fault is not None:
            raise fault
        return 2

    def end(how: str) -> Any:
        def ended(code: int) -> None:
            raise SystemExit(f"{how} {code}")

        return ended

    monkeypatch.setattr(cli, "main", work)
    monkeypatch.setattr(os, "_exit", end("_exit"))
    monkeypatch.setattr(sys, "exit", end("exit"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(RuntimeError if fault and ends == "exit" else SystemExit) as caught:
        cli.run_and_exit()
    if ends == "_exit" or not fault:
        assert str(caught.value) == f"{ends} {1 if fault else 2}"
    assert ("RuntimeError: torch" in capsys.readouterr().err) == (fault is not None and ends == "_exit")


def test_the_signal_handler_is_put_back(here: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["verify", "cache"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_a_pipe_that_is_closed(here: Path) -> None:
    """`softcache inspect cache | head -0`"""
    command = f"{sys.executable} -m softcache inspect cache | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode in (0, 2)
    assert done.stderr == ""


# ---- what is printed ------------------------------------------------------------------------------------------------


def test_json_of_dump_train_and_eval(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*dump_of(), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"path": "new", "id": softcache.open("new").id}
    argv = train_on("--cache", "cache", "--eval-data", "pieces.py:toy", "--json")
    argv[argv.index("new")] = "new-run"
    assert cli.main(argv) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["path"], said["epoch"], said["parameters"]) == ("new-run", 0, 16 * 4 + 4 + 4 * 3 + 3)
    assert cli.main(["eval", "new-run", *DATA, "--cache", "cache", *QUIET, "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["top1"] == said["eval_top1"]
    assert evaluated["kl"] > 0


def test_a_dump_says_what_comes_next(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(dump_of()) == 0
    text = capsys.readouterr().out
    assert softcache.open("new").id in text
    assert "softcache train --cache new --data pieces.py:toy" in text
    halves = [*dump_of(data="pieces.py:toy?count=300"), "--shard-rows", "256", "--out", "parts"]
    assert cli.main([*halves, "--part", "1/2"]) == 0
    assert "this part is done" in capsys.readouterr().out
    assert cli.main([*halves, "--part", "2/2"]) == 0
    assert softcache.open("parts").id in capsys.readouterr().out


def test_print_config_says_where_each_value_comes_from(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "settings.toml").write_text('lr = 0.5\nepochs = 7\nloss = ["kd:temperature=2", "ce"]\nseed = 3\n')
    argv = train_on(
        "--config", "settings.toml", "--set", "seed=4", "--set", "ema=0.2", "--lr", "0.25", "--print-config"
    )
    place = argv.index("--epochs")
    del argv[place : place + 2]
    assert cli.main(argv) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert lines["lr"] == ["0.25", "flag"]
    assert lines["epochs"] == ["7", "settings.toml"]
    assert lines["seed"] == ["4", "--set"]
    assert lines["ema"] == ["0.2", "--set"]
    assert lines["momentum"] == ["0.9", "default"]
    assert lines["loss"][-1] == "settings.toml"
    assert not (here / "new").exists()


def test_loss_tables_in_a_config_file(here: Path) -> None:
    (here / "settings.toml").write_text(
        'cache = "cache"\n[[loss]]\nname = "kd"\ntemperature = 2\nweight = 0.5\n[[loss]]\nname = "ce"\n'
    )
    assert cli.main(train_on("--config", "settings.toml")) == 0
    (stage,) = json.loads((here / "new/run.json").read_text())["stages"]
    kd = {"name": "kd", "weight": 0.5, "temperature": 2.0, "standardized": False}
    assert stage["losses"] == [kd, {"name": "ce", "weight": 1.0, "smoothing": 0.0}]


def test_the_table_of_a_staged_run_has_the_terms_of_every_stage(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = ["--stage", "epochs=1 loss=kd", "--stage", "epochs=1 loss=ce loss=bce"]
    assert cli.main([*train_on("--cache", "cache"), *stages]) == 0
    header = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch"))
    assert header.split() == ["epoch", "stage", "lr", "kd", "loss", "ce", "bce", "seconds"]


def test_quiet_means_quiet(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """But for a warning that concerns the result: this teacher is right less often than by chance."""
    assert cli.main(dump_of()) == 0
    assert cli.main(train_on("--cache", "cache", "--out", "quiet-run")) == 0
    told = capsys.readouterr().err
    for whose in ("teacher 'good'", "member 'good' of the cache"):
        assert f"softcache: warning: {whose} is right on 25.00%" in told
    assert told.count("\n") == 2


def test_what_a_cache_says_cannot_give_orders_to_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rude = WORLDS / "rude.py"
    argv = ["dump", "--data", f"{rude}:rude", "--teacher", f"{rude}:teacher", "--quiet"]
    assert cli.main([*argv, "--out", str(tmp_path / "cache")]) == 0
    shard = tmp_path / "cache/members/teacher/part-00000.h5"
    data = bytearray(shard.read_bytes())
    data[softcache.open(tmp_path / "cache").manifest.files[-1].arrays["logits"].offset] ^= 1
    assert cli.main(["inspect", str(tmp_path / "cache")]) == 0
    assert cli.main(["inspect", str(tmp_path / "cache"), "--sample", "\x1b]0;3\x07"]) == 0
    shard.write_bytes(data)
    assert cli.main(["verify", str(tmp_path / "cache"), "--full"]) == 1
    assert cli.main(["inspect", str(tmp_path / "cache"), "--sample", "\x1b]0;9\x07"]) == 2
    said = "".join(capsys.readouterr())
    assert "\\x1b[2Jcat" in said and "dog\\u202e" in said and "\\x1b]0;0\\x07" in said
    assert not set(said) & set("\x1b\x07\u202e")

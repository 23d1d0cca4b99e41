"""A Python without `fcntl` and `resource`: caches are read and learned from; what needs the two refuses and names them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from softcache import cli
from softcache.cache import hdf5_check
from softcache.files import locks

NEXT = "---- next ----"
GOLDEN = Path(__file__).resolve().parents[1] / "golden"
WITHOUT = "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None\n"  # their import raises ImportError

READING = f"""
import json
import torch
import softcache
from softcache.data.transfer_set import open_transfer_set
from softcache.losses import ce, kd

cache = softcache.open({str(GOLDEN / "v1/float16")!r})
wanted = json.loads(open({str(GOLDEN / "v1/float16.json")!r}).read())
targets = cache.gather(wanted["rows"], wanted["views"])
assert targets.logits().tolist() == wanted["members"]["network"]["logits"]

joined = cache.join(open_transfer_set({str(GOLDEN / "pieces.py") + ":images"!r}))
records = [joined[i][1] for i in range(len(joined))]
targets = joined.gather(records)
student_logits = torch.zeros_like(targets.logits(), requires_grad=True)
loss = 0.9 * kd(student_logits, targets.logits(), temperature=4) + 0.1 * ce(student_logits, targets.labels)
loss.backward()

from softcache.cli import main
assert main(["verify", str(cache.reader.path)]) == 0
assert main(["inspect", str(cache.reader.path)]) == 0
print("loss", loss.item(), student_logits.grad.abs().sum().item())
"""
REFUSALS = f"""
import json
from softcache.cli import main

for argv in json.loads(sys.argv[1]):
    print({NEXT!r}, file=sys.stderr, flush=True)
    print(main(argv), flush=True)
"""


def without_them(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WITHOUT + script, *arguments], capture_output=True, text=True)


def commands(toy: Path, folder: Path) -> list[tuple[list[str], str]]:
    """Command lines that need one of the two, and which."""
    data, teacher = f"{toy}:images", f"{toy}:exact"
    return [
        (["dump", "--data", data, "--teacher", teacher, "--out", str(folder / "cache")], "fcntl"),
        (["train", "--data", data, "--student", "mlp:8", "--epochs", "1", "--out", str(folder / "run")], "fcntl"),
        (["verify", "--full", str(GOLDEN / "v1/float16")], "resource"),
    ]


def refused(printed: str, module: str) -> bool:
    return f"Python on {sys.platform} has no module '{module}'" in printed and "tip: " in printed


def nothing_was_written(folder: Path) -> bool:
    return not [path for path in folder.rglob("*") if path.suffix in {".h5", ".safetensors", ".pt"}]


def test_what_needs_them_refuses_by_name(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(locks, "fcntl", None)  # as their imports leave it
    monkeypatch.setattr(hdf5_check, "resource", None)
    for argv, module in commands(toy, tmp_path):
        assert cli.main(argv) == 2
        assert refused(capsys.readouterr().err, module), argv
    assert nothing_was_written(tmp_path)


@pytest.mark.slow
def test_a_cache_is_opened_joined_gathered_learned_from_and_its_bytes_are_checked() -> None:
    done = without_them(READING)
    assert done.returncode == 0, done.stderr
    word, loss, gradient = done.stdout.splitlines()[-1].split()
    assert word == "loss" and float(loss) > 0 and float(gradient) > 0


@pytest.mark.slow
def test_a_refusal_is_no_import_error(toy: Path, tmp_path: Path) -> None:
    asked = commands(toy, tmp_path)
    done = without_them(REFUSALS, json.dumps([argv for argv, _ in asked]))
    assert done.returncode == 0, done.stderr
    for (argv, module), printed in zip(asked, done.stderr.split(NEXT)[1:], strict=True):
        assert refused(printed, module), argv
    assert done.stdout.split()[-len(asked) :] == ["2"] * len(asked)
    assert nothing_was_written(tmp_path)

"""Format number and digest of what a run writes: one bit is noticed, a newer format refused, an older file read with a note."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from softcache.errors import ModelError, SoftcacheError
from softcache.models import load_model, load_weights, read_metadata, save_student
from softcache.models.seal import check_format, digest, refuse_stretched


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.manual_seed(0)
    model = load_model("softcache:mlp?hidden=3", num_classes=2, class_names=("a", "b"), input_shape=(2, 2))
    save_student(model, tmp_path / "student.safetensors", metadata={"softcache_version": "0.6.0", "x": "y"})
    return tmp_path


def rewritten(run: Path, **changes: str | None) -> None:
    """Its metadata with some strings changed, or taken away."""
    path = run / "student.safetensors"
    with safe_open(path, framework="pt") as file:
        told = json.loads(file.metadata()["softcache"])
    told = {key: value for key, value in {**told, **changes}.items() if value is not None}
    save_file(load_file(path), path, metadata={"softcache": json.dumps(told)})


BASE: dict[str, Any] = {"t": torch.arange(6.0).reshape(2, 3), "n": [1, 2.5, None, True, "x"], "s": {"a": 1}}


@pytest.mark.parametrize(
    "other",
    [
        {**BASE, "t": torch.arange(6.0).reshape(3, 2)},
        {**BASE, "t": torch.arange(6.0).reshape(2, 3).double()},
        {**BASE, "t": torch.arange(6.0).reshape(2, 3).nextafter(torch.tensor(9.0))},
        {**BASE, "n": [1, 2.5, None, True, "y"]},
        {**BASE, "n": [1, 2.5, None, 1, "x"]},
        {**BASE, "n": [1, 2.5, None, True], "x": "x"},
        {**BASE, "s": {"b": 1}},
        {**BASE, "s": {"a": 1, "b": None}},
        {"t": BASE["t"], "n": BASE["n"]},
    ],
)
def test_a_digest_is_of_every_value_type_name_and_place(other: dict[str, Any]) -> None:
    assert digest(BASE) == digest({key: BASE[key] for key in sorted(BASE)})  # not of the order of names
    assert digest(BASE) == digest({**BASE, "t": BASE["t"].t().contiguous().t()})  # nor of how it lies in memory
    assert digest(other) != digest(BASE)


def test_minus_zero_and_nan_are_told_apart() -> None:
    numbers = [0.0, -0.0, float("nan"), float("inf")]
    assert len({digest(torch.tensor(number)) for number in numbers}) == 4
    assert len({digest(number) for number in numbers}) == 4


def test_versions_of_modules_are_among_it() -> None:
    state = torch.nn.BatchNorm1d(2).state_dict()
    before = digest(state)
    state._metadata[""]["version"] = 1  # with which other buffers would be made
    assert digest(state) != before


@pytest.mark.parametrize(
    "changes",
    [
        {"x": "z"},
        {"softcache_version": "0.6.1"},
        {"softcache_digest": None},
        {"softcache_digest": "0" * 64},
        {"y": ""},
    ],
    ids=str,
)
def test_metadata_that_were_changed_are_refused(run: Path, changes: dict[str, str | None]) -> None:
    rewritten(run, **changes)
    for load in (lambda: load_model(str(run), num_classes=2), lambda: read_metadata(run)):
        with pytest.raises(
            ModelError, match=r"student.safetensors: is damaged: its tensors and metadata are not those"
        ):
            load()
    named = load_model("softcache:mlp?hidden=3", num_classes=2, input_shape=(2, 2))
    with pytest.raises(ModelError, match="is damaged"):
        load_weights(named, str(run / "student.safetensors"))


def test_tensors_that_were_changed_are_refused(run: Path) -> None:
    path = run / "student.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"is damaged[\s\S]*copy it again"):
        load_model(str(run), num_classes=2)


def test_metadata_that_lost_their_name_are_refused(run: Path) -> None:
    path = run / "student.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"softcache":', b'"roftcache":', 1))
    with pytest.raises(ModelError, match="lost its name"):
        load_model("softcache:mlp?hidden=3@" + str(run), num_classes=2, input_shape=(2, 2))


def test_a_file_of_an_earlier_version_is_read_with_one_note(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewritten(run, softcache_digest=None, softcache_format=None)
    for _ in range(2):
        assert load_model(str(run), num_classes=2).declared_classes == ("a", "b")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(
        f"softcache: note: {run}/student.safetensors: was written by an earlier"
    )


def test_weights_of_other_people_have_no_note(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(load_file(run / "student.safetensors"), run / "plain.safetensors", metadata={"format": "pt"})
    load_model(f"softcache:mlp?hidden=3@{run}/plain.safetensors", num_classes=2, input_shape=(2, 2))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("found", "wrote", "message"),
    [
        (2, "0.9.0", r"is of format 2; this softcache reads formats up to 1\n.*pip install 'softcache>=0.9.0'"),
        (2, "0.9; rm -rf /", r"pip install -U softcache$"),
        (2, None, r"pip install -U softcache$"),
        ("x", None, "its format number is 'x'"),
        (0, None, "its format number is '0'"),
        (True, None, "its format number is 'True'"),
    ],
)
def test_a_format_that_is_not_known_is_refused(found: Any, wrote: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_format(found, Path("file"), wrote, ModelError)
    check_format(1, Path("file"), wrote, ModelError)
    check_format(None, Path("file"), wrote, ModelError)


def test_a_student_of_a_newer_format_says_what_to_install(run: Path) -> None:
    rewritten(run, softcache_format="3", softcache_version="0.9.0")
    with pytest.raises(ModelError, match=r"softcache>=0.9.0"):
        load_model(str(run), num_classes=2)


def test_equal_students_are_equal_files(run: Path) -> None:
    model = load_model(str(run), num_classes=2)
    for name in ("one", "two"):
        save_student(model, run / name, metadata={"b": "1", "a": "2"})
    assert (run / "one").read_bytes() == (run / "two").read_bytes()


def test_tensors_that_are_far_larger_than_their_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"w": torch.zeros(1).expand(10**6, 10**6)}, path)
    model = load_model("softcache:mlp?hidden=", num_classes=2, input_shape=(2, 2))
    with pytest.raises(ModelError, match=r"tensors that would take 4,000,000,000,000.*\n.*contiguous"):
        load_weights(model, str(path))
    refuse_stretched({"w": [torch.zeros(2**20).expand(4, 2**20)]}, 2**22, path, SoftcacheError)


# ------------------------------------------------------------------------------------------------- sizes that a file only says

TOO_LARGE = {
    "wide": {"spec": "softcache:mlp?hidden=16000000,16000000"},
    "deep": {"spec": "softcache:wrn?depth=100&width=1000", "input_shape": [8, 8]},
    "many": {"spec": "softcache:mlp?hidden=" + ",".join(["4"] * 200)},
    "over the most": {"spec": "softcache:mlp?hidden=99999999999"},
    "a wide item": {"input_shape": [10**5, 10**5]},
    "a wide graft": {
        "graft": {
            "layer": "1",
            "head": "3",
            "classes": 2,
            "width": 10**9,
            "bias": False,
            "projector": {"student_shape": [3], "teacher_shape": [10**9], "factor": 1},
        }
    },
}


@pytest.mark.parametrize("what", TOO_LARGE)
def test_what_metadata_say_of_a_size_is_not_allocated(what: str, run: Path) -> None:
    """It is built without memory first, and compared with the tensors beside it."""
    path = run / "student.safetensors"
    about = {**json.loads(read_metadata(run)["softcache_model"]), **TOO_LARGE[what]}
    told: dict[str, str] = {"softcache_model": json.dumps(about), "softcache_format": "1"}
    tensors = load_file(path)
    told["softcache_digest"] = digest({"tensors": tensors, "metadata": told})
    save_file(tensors, path, metadata={"softcache": json.dumps(told)})
    with pytest.raises(ModelError, match=r"does not fit|over|more numbers than there are weights|far larger"):
        load_model(str(run), num_classes=2)

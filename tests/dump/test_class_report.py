"""Is the teacher right, and are its columns the data's classes? What a dump prints, warns of and keeps; and what it refuses."""

from __future__ import annotations

import hashlib
import json
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORLDS, QuickDump, needs
from PIL import Image
from torch import nn

import softcache
from softcache import cli, dump
from softcache.config import DumpConfig, EvalConfig, ExportConfig, PlanConfig, TrainConfig
from softcache.data.class_counts import chance_warning, described, offset_warning
from softcache.data.transfer_set import open_transfer_set
from softcache.dump.class_report import best_order
from softcache.dump.list_modules import list_modules
from softcache.errors import ClassMismatchError, ConfigError, ModelError, SoftcacheError, TeacherError
from softcache.evaluate import measure
from softcache.models import fingerprint, load_model, save_student
from softcache.students import export
from softcache.train import flow

PIECES = WORLDS / "whose_classes.py"
DATA = f"{PIECES}:data"
EXACT = "ant+bee+cat+dog"


def told(cache: softcache.Cache) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((cache.reader.path / "provenance.json").read_text())["classes"]
    return found


def top1(cache: softcache.Cache) -> float:
    found = cache.manifest.statistics[cache.members[0]].accuracy
    assert found is not None
    return found


def logits(cache: softcache.Cache, data: str = DATA) -> np.ndarray:
    joined = cache.join(open_transfer_set(data))
    return joined.gather_samples(np.arange(len(joined)), np.zeros(len(joined), np.int64)).logits().numpy()


def pixels(data: str = DATA) -> np.ndarray:
    found = open_transfer_set(data)
    return np.stack([found.load(i)[0].ravel() for i in range(len(found))]).astype(np.float32) / 10


# ---------------------------------------------------------------------------------------------------------- columns of a teacher


def test_a_fair_teacher_is_told_with_the_classes_and_nothing_is_warned_of(
    quick_dump: QuickDump, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = DumpConfig(data=DATA, teacher=(f"{PIECES}:reader",), out=str(tmp_path / "c"), threads=1, workers=0)
    dump.run(config)
    said = capsys.readouterr().err
    counts = np.bincount(open_transfer_set(DATA).labels)
    assert "4 classes: " + ", ".join(f"{n} {c}" for n, c in zip(EXACT.split("+"), counts, strict=True)) in said
    share = (pixels()[:, :4].argmax(1) == open_transfer_set(DATA).labels).mean()
    assert f"reader: top-1 {100 * share:.2f} % of 64; classes matched by position" in said and "warning" not in said
    about = told(softcache.open(tmp_path / "c"))
    assert about["warnings"] == [] and about["members"]["reader"]["correct"] == round(share * 64)


@pytest.mark.parametrize(
    ("teacher", "columns"),
    [
        ("reader?order=3%s&names=dog+cat+bee+ant", [3, 2, 1, 0]),  # by name
        ("estimator?values=ant+bee+cat+dog&kind=str", None),
        ("reader?order=5+0+4+1+2+3&names=x+ant+y+bee+cat+dog", [1, 3, 4, 5]),  # some of more
    ],
)
def test_columns_are_found_by_name(quick_dump: QuickDump, teacher: str, columns: list[int] | None) -> None:
    cache = quick_dump(DATA, [f"{PIECES}:{teacher.replace('%s', '+2+1+0')}"])
    wanted = pixels()[:, :4]
    found = logits(cache)
    np.testing.assert_allclose(
        found - found.max(1, keepdims=True), wanted - wanted.max(1, keepdims=True), atol=1e-5 if columns else 20
    )
    assert top1(cache) == (wanted.argmax(1) == open_transfer_set(DATA).labels).mean() > 0.5
    order = cache.member(cache.members[0]).class_order
    assert order == (columns if columns and sorted(columns) == [0, 1, 2, 3] else None)
    assert told(cache)["members"][cache.members[0]].get("columns") == columns


def test_a_choice_of_columns_enters_the_fingerprint_and_nothing_else_does(
    quick_dump: QuickDump, tmp_path: Path
) -> None:
    more, exact = "order=0+1+2+3+4&names=ant+bee+cat+dog+elk", f"{PIECES}:reader"
    caches = {
        data: quick_dump(f"{DATA}?names={data}", [f"{exact}?{more}"], out=f"c{i}")
        for i, data in enumerate((EXACT, "elk+ant+bee+cat", "ant+bee+cat+dog+elk"))
    }
    prints = [cache.member("reader").fingerprint for cache in caches.values()]
    assert len(set(prints)) == 3
    model = load_model(f"{exact}?{more}", num_classes=5)
    before = f"{fingerprint(model)} {model.spec} logits {model.input.describe()}"  # as every version has made it
    assert prints[2] == hashlib.sha256(before.encode()).hexdigest()
    assert caches[EXACT].member("reader").class_order is None
    # more members and views of a cache whose columns are a choice
    quick_dump(f"{DATA}?names={EXACT}", [f"{exact}?{more}", exact], out="c0", extend=True)
    assert softcache.open(tmp_path / "c0").members == ("reader", "reader-2")


@pytest.mark.parametrize("values", ["1+2+3+4", "4+3+2+1"])
@pytest.mark.parametrize("kind", ["int", "float", "str"])
def test_estimators_are_matched_by_value(quick_dump: QuickDump, kind: str, values: str) -> None:
    """Stars: labels 1 to 4, and an estimator that was fitted on them."""
    cache = quick_dump(f"{DATA}?names={values}", [f"{PIECES}:estimator?values={values}&kind={kind}"])
    assert top1(cache) > 0.5
    assert cache.class_names == tuple(values.split("+"))


@pytest.mark.parametrize(
    ("data", "teacher", "error", "message"),
    [
        ("", "reader?order=0+1+2+3&names=ant+bee+cat+eel", ModelError, "knows other classes than the data has"),
        ("", "reader?order=0+1+2+3+4+5&names=a+b+c+d+e+f", ModelError, "knows 6 classes, and of the data's not 'ant'"),
        ("?names=1+2+3+4+5", "estimator", ModelError, "4 classes where the data has 5: for example '5'"),
        ("?names=0+1+2+3", "estimator", ModelError, "for example '4'"),
        ("", "reader?order=0+1+2+3+4", TeacherError, r"shape \(64, 5\); the transfer set has 4 classes"),
        ("", "reader?order=0+1+2&names=ant+bee+cat+dog", TeacherError, r"shape \(64, 3\)"),
        (
            "",
            "estimator?values=0+1+2+3&shifted=true",
            TeacherError,
            "its own predict decides otherwise than its largest",
        ),
        ("", "estimator?values=0+1+2+3&decides=mine", ConfigError, "decides=mine"),
        ("", "reader?decides=own", ConfigError, "decides=own is of objects with a predict"),
    ],
)
def test_refused(quick_dump: QuickDump, data: str, teacher: str, error: type[SoftcacheError], message: str) -> None:
    with pytest.raises(error, match=message):
        quick_dump(DATA + data, [f"{PIECES}:{teacher}"])


def test_a_decision_of_its_own_may_be_declared_and_is_recorded(quick_dump: QuickDump) -> None:
    cache = quick_dump(DATA, [f"{PIECES}:estimator?values=0+1+2+3&shifted=true&decides=own"])
    assert "decides=own" in cache.member("estimator").model and top1(cache) > 0.5


# ---------------------------------------------------------------------------------------------------------------------- warnings


@pytest.mark.parametrize(
    ("data", "teacher", "message"),
    [
        pytest.param(
            "", "reader?order=3+2+1+0", "another order of its columns explains the labels far better", id="reversed"
        ),
        pytest.param("?count=160", "reader?order=1+2+3+0", "is told by the column of", id="shifted"),
        pytest.param(
            "?count=160&noise=0", "reader?order=0+1+3+2", "of [0-9]+ samples .*'cat' is told", id="two swapped"
        ),
        pytest.param("?count=200", "reader?order=4+5+6+7", "chance is 25.00%", id="pixels of nobody"),
        pytest.param("", "same", "gives the same logits to all 64 samples", id="constant"),
        pytest.param("", "same?value=0", "the same logits to all 64", id="zeros"),
        pytest.param("?numbered=true&first=1", "reader?order=0+1+2+3+4", "all of 1 to 4 have samples", id="offset"),
    ],
)
def test_what_is_odd_is_warned_of_once_and_kept(
    quick_dump: QuickDump, data: str, teacher: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import re

    cache = quick_dump(DATA + data, [f"{PIECES}:{teacher}"])
    said = capsys.readouterr().err
    matching = [text for text in told(cache)["warnings"] if re.search(message, text)]
    assert len(matching) == 1 and said.count(f"softcache: warning: {matching[0]}") == 1


def test_the_order_that_explains_better_is_the_one_that_was_mixed_up(quick_dump: QuickDump) -> None:
    cache = quick_dump(f"{DATA}?count=300&names=a+b+c+d+e&noise=110", [f"{PIECES}:reader?order=2+4+0+1+3"])
    (warning,) = (text for text in told(cache)["warnings"] if "another order" in text)
    assert "'a' is told by the column of 'c'" in warning or "'b' is told by the column of 'd'" in warning


@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_best_order_is_that_of_all_permutations(size: int) -> None:
    draw = np.random.default_rng(size)
    for _ in range(40):
        counts = draw.integers(0, draw.integers(2, 30), (size, size))
        found = best_order(counts)
        best = max(sum(counts[i, p[i]] for i in range(size)) for p in permutations(range(size)))
        assert sorted(found) == list(range(size)) and counts[np.arange(size), found].sum() == best
    assert best_order(np.ones((size, size), np.int64)).tolist() == list(range(size))  # a tie stays as it is


@pytest.mark.parametrize(
    ("correct", "labelled", "classes", "warned"),
    [
        (0, 64, 4, True),
        (16, 64, 4, True),
        (100, 1000, 10, True),
        (1, 10_000, 1000, True),
        (50_000, 100_000, 2, True),
        (5, 10, 2, False),  # ten samples tell nothing
        (0, 2, 10, False),
        (1, 3, 100, False),
        (9, 10, 2, False),
        (600, 1000, 2, False),  # weak, and above chance
        (120, 1000, 10, True),  # 2.1 standard errors
        (140, 1000, 10, False),
        (5, 500, 1000, False),  # 1 % of 1,000 classes
        (0, 0, 10, False),
        (3, 30, 1, False),
    ],
)
def test_what_counts_as_chance(correct: int, labelled: int, classes: int, warned: bool) -> None:
    assert (chance_warning("t", correct, labelled, classes) is not None) == warned


def test_the_list_of_classes_is_short_for_many(tmp_path: Path) -> None:
    few = open_transfer_set(f"{DATA}?count=9")
    assert described(few).startswith("4 classes: ant ")
    assert offset_warning(few) is None
    rows = [f"t\tc{i % 30:02d}\n" for i in range(90)] + ["t\tc07\n"]
    (tmp_path / "x.tsv").write_text("".join(rows))
    names = ",".join([f"c{i:02d}" for i in range(30)] + ["none"])
    said = described(open_transfer_set(f"tsv:{tmp_path / 'x.tsv'}?classes={names}"))
    assert said.startswith("31 classes, from none 0, c00 3, c01 3 to c07 4") and "1 classes have none" in said


# ---------------------------------------------------------------------------------------------------------- a map, in every verb


@pytest.mark.slow
def test_one_map_serves_every_verb(quick_dump: QuickDump, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    german = "Ameise+Biene+Hund+Katze"
    path = tmp_path / "map.tsv"
    path.write_text("Ameise\tant\nBiene\tbee\nHund\tdog\nKatze\tcat\n")
    data = f"{DATA}?names={german}&count=48"
    teacher = f"{PIECES}:reader?order=0+1+3+2&names={EXACT}"  # dog is Hund, the third of the data
    common: dict[str, Any] = {"data": data, "teacher": (teacher,), "threads": 1, "workers": 0, "classes_map": str(path)}
    with pytest.raises(ModelError, match="knows other classes"):
        quick_dump(data, [teacher], out="none")
    cache = quick_dump(data, [teacher], classes_map=str(path))
    np.testing.assert_allclose(logits(cache, data), pixels(data)[:, :4], atol=1e-5)
    assert cache.member("reader").class_order == [0, 1, 3, 2]
    assert told(cache)["members"]["reader"] | {"correct": 0} == {
        "matched": "by --classes-map", "labelled": 48, "correct": 0, "columns": [0, 1, 3, 2],
    }  # fmt: skip
    assert list_modules(PlanConfig(**common)).startswith("reader")
    # the cache speaks German: English data needs the map the other way round
    back = tmp_path / "back.tsv"
    back.write_text("ant\tAmeise\nbee\tBiene\ndog\tHund\ncat\tKatze\n")
    english = f"{DATA}?names=ant+bee+dog+cat&count=48"
    with pytest.raises(ClassMismatchError, match="another class list"):
        cache.join(open_transfer_set(english))
    classes_map = {"ant": "Ameise", "bee": "Biene", "dog": "Hund", "cat": "Katze"}
    assert len(cache.join(open_transfer_set(english), classes_map=classes_map)) == 48
    run = TrainConfig(
        data=english, cache=str(cache.reader.path), student="softcache:mlp?hidden=8", out=str(tmp_path / "run"), threads=1,
        loss=("kd",), epochs=2, classes_map=str(back), device="cpu", workers=0,
    )  # fmt: skip
    flow.run(run, quiet=True)
    # its classes are English; German data needs the first map
    settings: dict[str, Any] = {"data": data, "threads": 1, "device": "cpu"}
    plain = measure.run(str(tmp_path / "run"), EvalConfig(**settings | {"data": english}), quiet=True)
    mapped = measure.run(str(tmp_path / "run"), EvalConfig(**settings, classes_map=str(path)), quiet=True)
    assert mapped.errors == plain.errors
    compared = EvalConfig(**settings | {"data": english}, classes_map=str(back), cache=str(cache.reader.path))
    assert measure.run(str(tmp_path / "run"), compared, quiet=True).kl is not None
    with pytest.raises(ModelError, match="knows other classes"):
        measure.run(str(tmp_path / "run"), EvalConfig(**settings), quiet=True)
    out = ExportConfig(to="safetensors", **settings, classes_map=str(path), out=str(tmp_path / "e.safetensors"))
    assert export.run(str(tmp_path / "run"), out, quiet=True).before.errors == plain.errors
    # a start whose classes are called otherwise, and stand in another order
    more = TrainConfig(
        data=f"{DATA}?names=Katze+Ameise+Biene+Hund&count=48", student=str(tmp_path / "run"), out=str(tmp_path / "more"),
        threads=1, epochs=1, lr=1e-9, classes_map=str(path), device="cpu", workers=0,
    )  # fmt: skip
    flow.run(more, quiet=True)
    begun = {**settings, "data": f"{DATA}?names=Katze+Ameise+Biene+Hund&count=48"}
    found = measure.run(str(tmp_path / "more"), EvalConfig(**begun), quiet=True)
    turned = measure.run(str(tmp_path / "run"), EvalConfig(**begun, classes_map=str(path)), quiet=True)
    assert found.errors == turned.errors
    # a damaged file is made again with it
    damaged = next((cache.reader.path / "members/reader").glob("*.h5"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.chmod(0o644)
    damaged.write_bytes(bytes(content))
    argv = ["repair", str(cache.reader.path), "--data", data, "--teacher", teacher, "--device", "cpu", "--quiet"]
    assert cli.main(argv) == 1
    assert cli.main([*argv, "--classes-map", str(path)]) == 0
    capsys.readouterr()


# ----------------------------------------------------------------------------------------------------------- teachers of ImageNet


class Thousand(nn.Module):
    """1,000 outputs, of which number p grows with the mean of the pixels, the further down the list the faster."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.linspace(-1, 1, 1000))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return batch.flatten(1).mean(dim=1, keepdim=True) * self.slope


IDS = ("n01440764", "n02979186", "n03888257")
PLACES = [0, 482, 701]  # of tench, cassette player, parachute


@pytest.fixture
def imagenette(tmp_path: Path) -> str:
    for number, name in enumerate(IDS):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.full((4, 4, 3), 40 + 60 * number + i, np.uint8)).save(tmp_path / f"train/{name}/{i}.png")
    return f"imagefolder:{tmp_path / 'train'}"


@pytest.mark.parametrize(
    "teacher",
    [
        pytest.param("torchvision:resnet18@IMAGENET1K_V1", id="words"),
        pytest.param("timm:resnet18@a1_in1k", id="ids", marks=[needs("timm", "timm"), pytest.mark.slow]),
    ],
)
def test_a_teacher_of_imagenet_serves_data_of_some_of_its_classes(
    teacher: str, imagenette: str, quick_dump: QuickDump, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import torchvision

    monkeypatch.setattr(torchvision.models, "get_model", lambda *_, **__: Thousand())
    if teacher.startswith("timm"):
        import timm

        net = timm.create_model("resnet18")
        net.forward = Thousand().forward
        monkeypatch.setattr(timm, "create_model", lambda *_, **__: net)
    cache = quick_dump(imagenette, [teacher])
    assert cache.class_names == IDS and cache.member(cache.members[0]).class_order is None
    assert told(cache)["members"][cache.members[0]]["columns"] == PLACES
    model = load_model(teacher, num_classes=1000)
    data = open_transfer_set(imagenette)
    with torch.no_grad():
        whole = model(model.input.collate([data.load(i)[0] for i in range(6)]))
    np.testing.assert_allclose(logits(cache, imagenette), whole[:, PLACES], atol=1e-5)
    # evaluated by itself it may say any of its classes; beside the cache, those of the data
    settings: dict[str, Any] = {"data": imagenette, "threads": 1, "device": "cpu"}
    capsys.readouterr()
    alone = measure.run(teacher, EvalConfig(**settings), quiet=True)
    right = (whole.argmax(1) == torch.tensor(PLACES)[torch.from_numpy(data.labels).long()]).float().mean().item()
    assert alone.top1 == pytest.approx(right) and len(alone.class_errors) == 1000
    assert "the data has 3 of the model's 1,000 classes" in capsys.readouterr().err
    beside = measure.run(teacher, EvalConfig(**settings, cache=str(cache.reader.path)), quiet=True)
    assert beside.kl == pytest.approx(0, abs=1e-6) and len(beside.class_errors) == 3


def test_words_in_front_of_ids_are_refused_where_they_are_not_imagenets_list(
    imagenette: str, quick_dump: QuickDump
) -> None:
    """The WordNet exemption of earlier versions: sorted ids switched every comparison off."""
    teacher = f"{PIECES}:reader?order=0+1+2&names=parachute+tench+cassette player"
    with pytest.raises(ModelError, match="knows other classes than the data has"):
        quick_dump(imagenette, [teacher])


def test_a_run_of_more_classes_serves_data_of_some_of_them(quick_dump: QuickDump, tmp_path: Path) -> None:
    run = tmp_path / "run"
    model = load_model("softcache:mlp?hidden=4", num_classes=6, class_names=tuple("xadbcy"), input_shape=(1, 12))
    run.mkdir()
    save_student(model, run / "student.safetensors", metadata={})
    cache = quick_dump(f"{DATA}?names=a+b+c+d", [str(run)])
    data = open_transfer_set(f"{DATA}?names=a+b+c+d")
    with torch.no_grad():
        live = model.eval()(model.input.collate([data.load(i)[0] for i in range(len(data))]))
    np.testing.assert_allclose(logits(cache, f"{DATA}?names=a+b+c+d"), live[:, [1, 3, 4, 2]], atol=1e-6)
    with pytest.raises(ModelError, match="knows 6 classes, and of the data's not 'e'"):
        quick_dump(f"{DATA}?names=a+b+c+e", [str(run)], out="other")


def test_outputs_of_a_teacher_that_names_no_classes_are_chosen_by_number(quick_dump: QuickDump, tmp_path: Path) -> None:
    path = tmp_path / "map.tsv"
    for order, numbers in (("9+0+8+1+2+3", "1352"), ("3+2+1+0", "3210")):  # some of six, and four in another order
        path.write_text("".join(f"{name}\t{i}\n" for name, i in zip(EXACT.split("+"), numbers, strict=True)))
        cache = quick_dump(DATA, [f"{PIECES}:reader?order={order}"], out=order, classes_map=str(path))
        columns = [int(order.split("+")[int(i)]) for i in numbers]
        np.testing.assert_allclose(logits(cache), pixels()[:, columns], atol=1e-5)
        assert cache.member("reader").class_order == (None if len(order) > 7 else [3, 2, 1, 0])
    path.write_text("ant\t0\nbee\t1\ncat\t2\ndog\t7\n")
    with pytest.raises(TeacherError, match=r"its classes, or the map of them, ask for \(batch, 8\)"):
        quick_dump(DATA, [f"{PIECES}:reader?order=0+1+2+3"], out="wrong", classes_map=str(path))


def test_data_may_lack_a_class_in_every_verb(imagenette: str, quick_dump: QuickDump, tmp_path: Path) -> None:
    """Its folder is empty, or is not there: samples keep their class, and the student all of the cache's."""
    teacher = f"{PIECES}:reader?order=0+1+2&names={'+'.join(IDS)}"
    cache = quick_dump(imagenette, [teacher])
    for file in (tmp_path / "train" / IDS[1]).iterdir():
        file.unlink()
    for state in ("empty", "absent"):
        if state == "absent":
            (tmp_path / "train" / IDS[1]).rmdir()
        settings: dict[str, Any] = {"data": imagenette, "threads": 1, "device": "cpu"}
        out = str(tmp_path / state)
        run = TrainConfig(
            **settings, eval_data=imagenette, cache=str(cache.reader.path), student="softcache:mlp?hidden=4", out=out,
            loss=("kd", "ce"), epochs=1, workers=0,
        )  # fmt: skip
        flow.run(run, quiet=True)
        found = measure.run(out, EvalConfig(**settings, cache=str(cache.reader.path)), quiet=True)
        assert {name: count for name, (_, count) in found.class_errors.items()} == dict(
            zip(IDS, (2, 0, 2), strict=True)
        )
        alone = measure.run(out, EvalConfig(**settings), quiet=True)
        assert alone.errors == found.errors and load_model(out, num_classes=3).declared_classes == IDS
        whole = measure.run(str(cache.reader.path), EvalConfig(**settings), quiet=True)
        assert whole.labelled == 4
        assert export.run(out, ExportConfig(to="safetensors", **settings), quiet=True).before.errors == found.errors

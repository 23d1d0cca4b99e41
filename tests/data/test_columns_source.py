"""Hugging Face's data sets, Parquet and DataFrames as sources; by stand-ins where the packages are not installed."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from columns import ClassLabel, Frame, HuggingFace
from conftest import needs
from PIL import Image

from softcache.data.columns_source import source_of_columns
from softcache.data.identity import item_digest
from softcache.data.map_style import from_dataset
from softcache.data.sources import Source
from softcache.data.transfer_set import TransferSet, open_transfer_set
from softcache.errors import DataError, MissingExtraError, SoftcacheError

TEXTS = ["a film", "so bad", "a film, not bad"]


def frame(**columns: list[Any]) -> Frame:
    return Frame({"text": list(TEXTS)} | columns)


def described(source: Source) -> tuple[Any, ...]:
    return source.labels.tolist(), source.class_names, list(source.keys)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize(
    ("rows", "how", "expected"),
    [
        pytest.param(frame(label=["x", "y", "x"]), {}, ([0, 1, 0], ("x", "y"), ["f/000000", "f/000001", "f/000002"]), id="names"),
        pytest.param(frame(label=[5, 1, 5], id=[7, 8, 9]), {"key": "id"}, ([1, 0, 1], ("1", "5"), ["7", "8", "9"]), id="ratings"),
        pytest.param(
            frame(stars=[1.0, float("nan"), 2.0], id=["a", "b", "c"]), {"label": "stars", "key": "id", "empty": "unlabelled"},
            ([0, -1, 1], ("1", "2"), ["a", "b", "c"]), id="floats with gaps",
        ),
        pytest.param(frame(n=[0, 0, 0]), {"label": "none", "classes": ("x",)}, ([-1] * 3, ("x",), None), id="no labels"),
        pytest.param(Frame({"q": list(TEXTS)}), {}, ([-1] * 3, (), None), id="one column"),
        pytest.param(
            frame(rude=[0, 1, 0], loud=[1.0, 1.0, 0.0]), {"label": "rude,loud"},
            ([[False, True], [True, True], [False, False]], ("rude", "loud"), None), id="several columns",
        ),
        pytest.param(
            HuggingFace({"label": ClassLabel(["no", "yes"])}, {"text": TEXTS, "label": [1, -1, 0]}), {},
            ([1, -1, 0], ("no", "yes"), None), id="class label",
        ),
        pytest.param(
            HuggingFace({}, {"text": TEXTS, "labels": [["b"], [], ["a", "b"]]}), {},
            ([[False, True], [False, False], [True, True]], ("a", "b"), None), id="lists",
        ),
        pytest.param(
            HuggingFace({}, {"text": TEXTS, "labels": [[0.0, 1.0, 1.0], [0, 0, 0], [1, 0, 1]]}), {},
            ([[False, True, True], [False] * 3, [True, False, True]], ("0", "1", "2"), None), id="rows of 0 and 1",
        ),
        pytest.param(
            HuggingFace({}, {"text": TEXTS, "labels": [[0, 1, -1], [0, 0, 0], [1, 0, 1]]}), {"classes": ("x", "y", "z")},
            ([[0, 1, -1], [0, 0, 0], [1, 0, 1]], ("x", "y", "z"), None), id="rows with unknown ones",
        ),
        pytest.param(
            frame(**{"rude, or so": [0, 1, 0], "loud": [1, -1, 0]}), {"label": '"rude, or so",loud'},
            ([[0, 1], [1, -1], [0, 0]], ("rude, or so", "loud"), None), id="quoted columns with unknown ones",
        ),
        pytest.param(
            frame(rude=[0, 1, None], loud=[1, 1, 0]), {"label": "rude,loud", "empty": "unlabelled"},
            ([[0, 1], [1, 1], [-1, 0]], ("rude", "loud"), None), id="columns with gaps",
        ),
        pytest.param(
            Frame({"text": list(TEXTS), "a,b": [0, 1, 0]}), {"label": "a,b"},
            ([0, 1, 0], ("0", "1"), None), id="a comma in a name",
        ),
    ],
)  # fmt: skip
def test_columns_become_labels_classes_and_keys(rows: Any, how: dict[str, Any], expected: tuple[Any, ...]) -> None:
    source = source_of_columns(rows, "f", "f", **how)
    labels, classes, keys = described(source)
    assert (labels, classes) == expected[:2] and keys == (expected[2] or [f"f/{i:06d}" for i in range(3)])
    assert [source.reader.read(i)[0] for i in range(3)] == TEXTS


def test_pairs_and_pictures_are_items() -> None:
    pair = source_of_columns(frame(other=["x", "y", "z"], label=[0, 1, 0]), "f", "f", item="text,other")
    assert [pair.reader.read(i)[0] for i in range(3)] == list(zip(TEXTS, "xyz", strict=True))
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    kinds = [Image.fromarray(pixels), png(pixels), {"bytes": png(pixels), "path": None}]
    pictures = source_of_columns(HuggingFace({}, {"image": kinds, "label": [0, 1, 0]}), "f", "f")
    assert all(np.array_equal(pictures.reader.read(i)[0], pixels) for i in range(3))


@pytest.mark.parametrize(
    ("rows", "how", "message"),
    [
        (Frame({"review": TEXTS, "stars": [1, 2, 1]}), {}, r"which of its columns is the item\? There are 'review', 'stars'"),
        (frame(stars=[1, 2, 1]), {}, r"which of its columns is the label\?[^$]*label=none"),
        (frame(label=[0, 1, 0]), {"label": "lable"}, "no column 'lable'\n.*did you mean 'label'"),
        (frame(a=[0, 1, 2], b=[0, 1, 1]), {"label": "a,b"}, "f, row 2: '2' in the column 'a'"),
        (Frame({"text": ["a", None, float("nan")], "label": [0, 1, 0]}), {}, "2 of 3 rows have nothing in the column 'text'"),
        (frame(label=["x", None, "y"]), {}, "f, row 1: the label is empty"),
        (frame(label=[{}, {}, {}]), {}, "the column 'label' holds dict"),
        (frame(label=[0, 1, 0], id=["a", "", "b"]), {"key": "id"}, "row 1: the sample's key is ''"),
        (frame(label=[0, 1, 0]), {"item": "text,label,text"}, "item=text,label,text names 3 columns"),
        (HuggingFace({"label": ClassLabel(["a"])}, {"text": TEXTS, "label": [0] * 3}), {"classes": ("a",)}, "names its classes"),
        (Frame({"text": [], "label": []}), {}, "the data set is empty"),
        (frame(a=[0, 1, None], b=[0, 1, 1]), {"label": "a,b"}, "'' in the column 'a' is neither 0 nor 1\n.*empty=unlabelled"),
        (frame(a=[1, -1, 1], b=[-1, 1, 1]), {"label": "a,b"}, "1 and -1 and never 0"),
        (frame(a=[["x"], 1, 0], b=[0, 1, 1]), {"label": "a,b"}, "'a' is neither 0 nor 1"),
        (frame(a=[0, 1, 1], b=[0, 1, 1]), {"label": "a,b", "classes": ("x", "x")}, "names a class twice"),
        (frame(label=[["x"], ["y"], []]), {"classes": ("x", "x", "y")}, "names a class twice"),
        (frame(label=[[0.3, 0.7], [0.5, 0.5], [0.1, 0.9]]), {}, "'0.1' among the labels is no class"),
        (
            HuggingFace({"label": ClassLabel(["x", "y"])}, {"text": TEXTS, "label": [[0], [1], [-1]]}), {},
            "row 2: label '-1' is not in classes",
        ),
    ],
)  # fmt: skip
def test_what_nobody_can_tell_is_asked(rows: Any, how: dict[str, Any], message: str) -> None:
    with pytest.raises(SoftcacheError, match=message):
        source_of_columns(rows, "f", "f", **how)


def test_a_factory_may_return_a_frame(tmp_path: Path) -> None:
    file = tmp_path / "t.py"
    file.write_text(
        "from columns import Frame\n"
        "def frame(count: int = 2):\n"
        "    stars = {'stars': [5, 1, 5][:count], 'a & b': [1, 5, 1][:count]}\n"
        "    return Frame({'review': ['a', 'b', 'c'][:count], 'id': [7, 8, 9][:count], **stars})\n"
        "def pairs(label='x'): return [('a', 0), ('b', 1)]\n"
    )
    found = open_transfer_set(f"{file}:frame?item=review&label=stars&key=id&count=3")
    assert found.labels.tolist() == [1, 0, 1] and list(found.keys) == ["7", "8", "9"] and found[2] == ("c", 1)
    assert pickle.loads(pickle.dumps(found)).load(1) == ("b", item_digest("b"))
    quoted = open_transfer_set(f'{file}:frame?item="review"&label="a & b"&key="id"')
    assert quoted.labels.tolist() == [0, 1] and list(quoted.keys) == ["7", "8"]
    with pytest.raises(DataError, match=r"which of its columns is the item\?[^$]*item=NAME"):
        open_transfer_set(f"{file}:frame")
    with pytest.raises(SoftcacheError, match="'item' is no parameter of the factory, and list has no columns"):
        open_transfer_set(f"{file}:pairs?item=a")
    assert len(open_transfer_set(f"{file}:pairs?label=y")) == 2  # its own parameter


def test_a_table_without_a_column_called_label_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    pictures = HuggingFace({}, {"image": [np.zeros((4, 4), np.uint8)] * 2, "fine_label": [0, 1]})
    assert from_dataset(pictures, "x.py:sets", "sets").labels.tolist() == [-1, -1]  # as it always was
    assert "other columns are not used: fine_label; label=NAME" in capsys.readouterr().err
    named = from_dataset(pictures, "x.py:sets", "sets", {"label": "fine_label"})
    assert named.labels.tolist() == [0, 1] and named.class_names == ("0", "1")


def test_without_the_package_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    for spec in (f"hf-dataset:{tmp_path}", f"table:{tmp_path}/x.parquet"):
        with pytest.raises(MissingExtraError, match=r"needs the package 'datasets'[^$]*softcache\[datasets\]"):
            open_transfer_set(spec)


@needs("datasets", "datasets")
def test_sets_saved_to_a_disk_and_parquet_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {"image": datasets.Image(), "fine": datasets.ClassLabel(names=["ant", "bee"]), "id": datasets.Value("int64")}
    )
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    made = datasets.Dataset.from_dict({"image": [pixels, pixels + 1], "fine": [1, 0], "id": [5, 6]}, features=features)
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "two")
    made.to_parquet(tmp_path / "x.parquet")

    def opened(spec: str) -> TransferSet:
        return open_transfer_set(spec.replace(":", f":{tmp_path}/", 1))

    for spec, first in (
        ("hf-dataset:one?label=fine", "one/000000"),
        ("hf-dataset:two?label=fine&split=test", "two/test/000000"),
        ("hf-dataset:x.parquet?label=fine", "x.parquet/000000"),
        ("table:x.parquet?label=fine&text=image", "x.parquet/000000"),
        ("hf-dataset:one?item=image&label=fine&key=id", "5"),
    ):
        found = opened(spec)
        assert found.class_names == ("ant", "bee") and found.labels.tolist() == [1, 0] and found.keys[0] == first
        again = pickle.loads(pickle.dumps(found))
        assert np.array_equal(again[1][0], pixels + 1) and again.load(0)[1] == item_digest(pixels)
    for spec, message in (
        ("hf-dataset:two?label=fine", "it has 2 splits\n.*split=train, split=test"),
        ("hf-dataset:two?split=dev", "no split 'dev'"),
        ("hf-dataset:one", r"which of its columns is the label\? There are 'image', 'fine', 'id'"),
        ("hf-dataset:one?label=fien", "did you mean 'fine'"),
        ("hf-dataset:none", "there is no such file or folder.*\n.*--download"),
    ):
        with pytest.raises(SoftcacheError, match=message):
            opened(spec)
    texts = datasets.Dataset.from_dict({"text": ["a", None], "label": ["x", "y"]})
    texts.save_to_disk(tmp_path / "gaps")
    with pytest.raises(DataError, match="1 of 2 rows have nothing in the column 'text': row 1"):
        opened("hf-dataset:gaps")


@pytest.mark.parametrize("item", [None, float("nan"), ("a text", float("nan"))])
def test_an_item_that_is_not_there_is_refused_with_its_place(item: object) -> None:
    """Also of a map-style data set: a table read by somebody else has NaN where a text is empty."""
    source = from_dataset([("a text", 0), (item, 1)], "x.py:texts", "texts")
    assert source.reader.read(0) == ("a text", None)
    with pytest.raises(DataError, match=r"x\.py:texts, sample 1: the item is (None|nan)[\s\S]*leave it out"):
        source.reader.read(1)

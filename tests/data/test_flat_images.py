"""`images:PATH`: pictures of one folder without classes, or with labels from a table."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from softcache.data.transfer_set import open_transfer_set
from softcache.errors import ConfigError, DataError

KEYS = ["a.png", "b/c.jpg", "b/d e.PNG"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "pictures"
    (place / "b" / ".thumbs").mkdir(parents=True)
    for number, key in enumerate([*KEYS, "b/.thumbs/x.png", ".hidden.png"]):
        Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(place / key, format="PNG")
    return place


def test_every_picture_below_the_folder_is_a_sample_named_by_its_path(folder: Path) -> None:
    found = open_transfer_set(f"images:{folder}")
    assert list(found.keys) == KEYS and found.labels.tolist() == [-1, -1, -1] and found.class_names == ()
    assert [int(found[i][0][0, 0, 0]) for i in range(3)] == [0, 1, 2]
    assert found.name == "images:pictures" and found.digest_kind == "file"
    moved = shutil.move(folder, folder.with_name("elsewhere"))
    assert list(open_transfer_set(f"images:{moved}").keys) == KEYS


@pytest.mark.parametrize("table", ["id,label\na.png,cat\nb/c,dog\nx.png,cow\n", 'a.png\tcat\n"./b/c.jpg"\tdog\n'])
def test_labels_come_from_a_table_by_key_with_or_without_ending(
    table: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "labels.txt"
    file.write_text(table)
    found = open_transfer_set(f"images:{folder}?labels={file}")
    assert found.class_names == ("cat", "dog") and found.labels.tolist() == [0, 1, -1]
    told = capsys.readouterr().err
    assert "has labels of 2 of 3 pictures" in told and "no pictures" not in told
    declared = open_transfer_set(f"images:{folder}?labels={file}&classes=cow,dog,cat")
    assert declared.class_names == ("cow", "dog", "cat") and declared.labels.tolist() == [2, 1, -1]


def test_names_and_labels_stand_in_quotes_as_in_csv(folder: Path) -> None:
    (folder / "b, c.png").write_bytes((folder / "a.png").read_bytes())
    file = folder / "labels.csv"
    file.write_text('a.png,"Paris, Texas"\nb/c.jpg,"say ""so""\u2028now"\n"b, c.png",Rome\nb/d e.PNG,Rome\n')
    found = open_transfer_set(f"images:{folder}?labels={file}")
    assert [found.class_names[label] for label in found.labels] == ["Paris, Texas", "Rome", 'say "so"\u2028now', "Rome"]
    file.write_text("b, c.png,Rome\n\na.png,Paris\n")  # a comma too many is the name's
    found = open_transfer_set(f"images:{folder}?labels={file}")
    assert found.labels.tolist() == [0, 1, -1, -1] and found.class_names == ("Paris", "Rome")


def test_classes_are_declared_by_name_or_number(folder: Path) -> None:
    assert open_transfer_set(f"images:{folder}?classes=3").class_names == ("0", "1", "2")
    assert open_transfer_set(f'images:{folder}?classes="a, b",c').class_names == ("a, b", "c")


def test_files_that_are_no_pictures_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "b" / "notes.txt").touch()
    (folder / ".gitkeep").touch()
    assert len(open_transfer_set(f"images:{folder}")) == 3
    assert "left out: b/notes.txt\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("x.png,cat\ny.png,dog\n", "names none of the 3 pictures; its first name is 'x.png'"),
        ("a.png cat\n", "line 1: 'a.png cat' is no name and label"),
        ("a.png,cat\na.png,dog\n", "line 2: a.png has a label already"),
        ("a.png,cat\na,dog\n", "line 2: a has a label already"),
        ("a.png,\nb/c.jpg,dog\n", "the label is empty"),
        ("", "its first name is 'missing'"),
    ],
)
def test_tables_that_do_not_fit_the_pictures(table: str, message: str, folder: Path) -> None:
    (folder.parent / "labels.csv").write_text(table)
    with pytest.raises(DataError, match=message):
        open_transfer_set(f"images:{folder}?labels={folder.parent}/labels.csv")


def test_folders_that_hold_no_pictures(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        open_transfer_set(f"images:{tmp_path}/none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no picture"):
        open_transfer_set(f"images:{tmp_path}/empty")
    with pytest.raises(DataError, match="there is no such file"):
        open_transfer_set(f"images:{folder}?labels=none.csv")
    shutil.rmtree(folder / "b")
    with pytest.raises(ConfigError) as caught:
        open_transfer_set(str(folder))
    assert "images:" in caught.value.tip
    with pytest.raises(DataError) as refused:
        open_transfer_set(f"imagefolder:{folder}")
    assert "images:PATH" in refused.value.tip

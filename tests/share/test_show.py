"""The card's preview says what the cache holds, shows nothing of a sample unless asked, and goes where the cache is pushed."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import QuickDump
from PIL import Image
from words_cache import COUNT, NAMES, live_teacher, sentences, write_cache

import softcache
from softcache import cli
from softcache.cache.card.preview_columns import preview_columns
from softcache.cache.manifest import read_manifest
from softcache.check import verify
from softcache.data.transfer_set import open_transfer_set
from softcache.errors import ContentMismatchError, DataError, SoftcacheError
from softcache.remote.places import parse_place
from softcache.share import preview, pull, push, show

GOLDEN = Path(__file__).parents[1] / "golden"
CROPPED = ("crop_flip:padding=1",)


def softmax(logits: np.ndarray) -> np.ndarray:
    """(B, C) float64."""
    shares = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


@pytest.fixture
def with_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where pyarrow is installed; its bytes are told by what is in the table."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(
        show, "to_parquet", lambda columns, cells: json.dumps([[c.name, cells[c.name]] for c in columns]).encode()
    )


# ------------------------------------------------------------------------------------------------------------ what it says


def test_the_preview_has_the_largest_classes_and_the_entropy(quick_dump: QuickDump, toy: Path) -> None:
    cache = quick_dump(teacher=[f"{toy}:exact", f"{toy}:exact?seed=5&name=b"], policy=CROPPED, views=2, codec="float32")
    cells, rows = preview.preview_cells(cache), preview.preview_rows(cache)
    assert rows.tolist() == list(range(40)) and list(cells) == [c.name for c in preview_columns(cache.manifest.plan)]
    targets = cache.gather(rows, np.zeros(40, np.int64))
    for name in ("exact", "b"):
        shares = softmax(targets.logits(name).numpy())
        order = np.argsort(-shares, axis=1, kind="stable")
        assert cells[f"{name}_classes"] == [[cache.class_names[i] for i in row[:5]] for row in order]
        sorted_shares = np.take_along_axis(shares, order, axis=1)
        np.testing.assert_allclose(cells[f"{name}_probabilities"], sorted_shares[:, :5], rtol=1e-3)
        np.testing.assert_allclose(cells[f"{name}_entropy"], -(shares * np.log(shares)).sum(axis=1), rtol=5e-3)
    assert cells["b_entropy"] != cells["exact_entropy"]
    assert cells["sample"] == [cache.samples.key(row) for row in range(40)]
    labels = cache.samples.labels_of(rows)
    assert cells["label"] == [cache.class_names[i] for i in labels]


def test_at_most_a_hundred_samples_are_shown_and_they_are_spread(quick_dump: QuickDump) -> None:
    cache = quick_dump(data="synthetic:images?count=250&classes=9&size=8", order="natural")
    rows = preview.preview_rows(cache)
    assert len(rows) == 100 and rows[0] == 0 and rows[-1] == 249 and np.diff(rows).max() == 3
    cells = preview.preview_cells(cache)
    assert len(set(cells["label"])) == 9 and {len(found) for found in cells["exact_classes"]} == {5}
    shares = softmax(cache.gather(rows, 0 * rows).logits().numpy())  # of all nine classes
    np.testing.assert_allclose(cells["exact_entropy"], -(shares * np.log(shares)).sum(axis=1), rtol=5e-3)


def test_of_a_codec_of_some_classes_no_entropy_is_told(quick_dump: QuickDump) -> None:
    cells = preview.preview_cells(quick_dump(codec="topk:k=2"))
    assert set(cells["exact_entropy"]) == {None}
    assert {len(row) for name in ("exact_classes", "exact_probabilities") for row in cells[name]} == {
        2
    }  # and no others


def test_several_labels_are_told_by_name_with_the_share_of_each(quick_dump: QuickDump, toy: Path) -> None:
    cache = quick_dump(data=f"{toy}:images?multi_label=true", codec="float32")
    cells, rows = preview.preview_cells(cache), np.arange(len(cache))
    assert list(cells) == ["sample", "label", "exact_classes", "exact_probabilities"]
    held = cache.samples.labels_of(rows)
    assert cells["label"] == [[cache.class_names[i] for i in np.flatnonzero(row)] for row in held]
    logits = cache.gather(rows, 0 * rows).logits().numpy().astype(np.float64)
    np.testing.assert_allclose(cells["exact_probabilities"], -np.sort(-1 / (1 + np.exp(-logits)), axis=1), rtol=1e-3)


def test_of_words_the_first_ones_are_shown_as_the_live_tagger_says_them(tmp_path: Path) -> None:
    data = sentences(tmp_path / "s.jsonl", longest=14)
    cache, found = softcache.open(write_cache(tmp_path / "c", data)), open_transfer_set(data)
    cells = preview.preview_cells(cache)
    at = {key: number for number, key in enumerate(found.keys)}
    assert len(cells["sample"]) == COUNT and found.positions is not None
    for row, key in enumerate(cells["sample"]):
        words, labels = found[at[key]]
        assert cells["words_count"][row] == len(words)
        assert cells["words_labels"][row] == [NAMES[i] if i >= 0 else None for i in labels[:10].tolist()]
        (logits,) = live_teacher("a", [list(words)])
        shares = softmax(logits.numpy()) if len(words) else np.zeros((0, 1))
        assert cells["a_classes"][row] == [NAMES[i] for i in shares.argmax(axis=1)[:10]] if len(words) else [[]]
        np.testing.assert_allclose(cells["a_probabilities"][row], shares.max(axis=1)[:10], rtol=5e-3)
    assert max(map(len, cells["a_classes"])) == 10 and "label" not in cells


def test_vectors_and_named_numbers_of_a_cache_of_everything() -> None:
    cache = softcache.open(GOLDEN / "indexed")
    cells = preview.preview_cells(cache)
    assert list(cells) == [column.name for column in preview_columns(cache.manifest.plan)]
    assert {len(found) for found in cells.values()} == {20}
    for column in preview_columns(cache.manifest.plan):
        assert all(isinstance(cell, list) == column.many for cell in cells[column.name] if cell is not None), column
    (name,) = [member.name for member in cache.manifest.plan.members if member.output == "embedding"]
    targets = cache.gather(np.arange(20), np.zeros(20, np.int64), members=[name])
    np.testing.assert_allclose(cells[f"{name}_norm"], np.linalg.norm(targets.embedding().numpy(), axis=1), rtol=1e-3)


# ------------------------------------------------------------------------------------------------------ what is written


def test_the_card_names_the_preview_and_nothing_of_a_sample_is_shown_unasked(
    quick_dump: QuickDump, monkeypatch: pytest.MonkeyPatch, with_tables: None
) -> None:
    cache = quick_dump()
    path, id = cache.reader.path, cache.id
    monkeypatch.setattr(preview, "open_transfer_set", None)  # nobody opens it
    done = show.run(path, languages=("en", "pt-BR"), left_out={"exact": "3 of 9 texts are cut"}, quiet=True)
    table = f"preview/{id[:16]}.parquet"
    assert done.files == (table, "croissant.json", "README.md") and done.rows == 40 and done.id == id
    text = (path / "README.md").read_text(encoding="utf-8")
    about = yaml.safe_load(text.split("---\n")[1])
    assert about["configs"][0]["data_files"][0]["path"] == table and about["language"] == ["en", "pt-BR"]
    assert f"`{table}`: a table of some samples" in text and "![" not in text and "3 of 9 texts are cut" in text
    made = json.loads((path / "croissant.json").read_text())
    assert made["distribution"][-1]["contentUrl"] == table and made["recordSet"]
    assert [one.name for one in (path / "preview").iterdir()] == [Path(table).name]
    assert read_manifest(path).id == id and verify.run(path, full=True, quiet=True).state == "whole"


def test_without_pyarrow_there_is_a_card_without_a_preview_and_it_is_said(
    quick_dump: QuickDump, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = quick_dump().reader.path
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["card", str(path), "--quiet"]) == 0
    assert "no preview: that needs the package pyarrow: pip install 'softcache[preview]'" in capsys.readouterr().out
    assert yaml.safe_load((path / "README.md").read_text().split("---\n")[1])["viewer"] is False
    assert not (path / "preview").exists()


def test_pictures_are_the_samples_own_and_only_where_they_are_asked_for(
    quick_dump: QuickDump, toy: Path, with_tables: None
) -> None:
    cache = quick_dump(policy=CROPPED, views=2)
    path = cache.reader.path
    done = show.run(path, pictures=f"{toy}:images", quiet=True)
    found = open_transfer_set(f"{toy}:images")
    text, names = (path / "README.md").read_text(), [name for name in done.files if name.endswith(".png")]
    assert names == [f"preview/{cache.id[:16]}-{number}.png" for number in (0, 1)]
    for row, name in enumerate(names):
        image = np.asarray(Image.open(path / name))
        item = np.asarray(found[list(found.keys).index(cache.samples.key(row))][0])
        times = image.shape[0] // item.shape[0]
        assert times > 1 and np.array_equal(image, item.repeat(times, axis=0).repeat(times, axis=1))
        label = cache.class_names[int(cache.samples.labels_of(np.array([row]))[0])]
        assert f"]({name})\n{cache.samples.key(row).replace('_', chr(92) + '_')}: {label}" in text
    show.run(path, quiet=True)  # once more, without
    assert [one.suffix for one in (path / "preview").iterdir()] == [".parquet"]
    assert "![" not in (path / "README.md").read_text()


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ("synthetic:images?count=3", DataError, "has none of the 40 samples of the preview"),
        ("{worlds}/toy_edited.py:every_image", ContentMismatchError, "is not what the teachers saw"),
    ],
    ids=["others", "changed"],
)
def test_pictures_of_other_samples_are_refused(
    quick_dump: QuickDump, toy: Path, data: str, error: type[SoftcacheError], message: str
) -> None:
    path = quick_dump().reader.path
    with pytest.raises(error, match=message):
        show.run(path, pictures=data.format(worlds=toy.parent), quiet=True)
    assert not (path / "croissant.json").exists()  # nothing was begun


def test_what_is_no_image_has_no_picture(quick_dump: QuickDump, tmp_path: Path) -> None:
    data = sentences(tmp_path / "s.jsonl")
    with pytest.raises(DataError, match=r"sample '.*' is no image"):
        show.run(write_cache(tmp_path / "c", data), pictures=data, quiet=True)


@pytest.mark.parametrize("language", ["english", "EN", "e", "en\n", "en: x", ""])
def test_what_is_no_code_of_a_language_is_refused(quick_dump: QuickDump, language: str) -> None:
    with pytest.raises(SoftcacheError, match="is no code of a language"):
        show.run(quick_dump().reader.path, languages=(language,), quiet=True)


def test_a_large_picture_is_made_smaller() -> None:
    draw = np.random.default_rng(0).integers(0, 256, (700, 1100, 3), dtype=np.uint8)
    assert Image.open(io.BytesIO(preview._png(draw, "x"))).size == (512, 326)


# ------------------------------------------------------------------------------------------------------ where it goes


def there(folder: Path) -> dict[str, bytes]:
    """What is shown in a place."""
    names = [folder / "README.md", folder / "croissant.json", *sorted((folder / "preview").glob("*"))]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in names}


def test_push_sends_what_is_shown_and_pull_leaves_it(
    quick_dump: QuickDump, toy: Path, tmp_path: Path, with_tables: None
) -> None:
    path = quick_dump(policy=CROPPED, views=1).reader.path
    place = parse_place(f"file:{tmp_path}/there")
    push.run(path, place, quiet=True)
    assert list(there(tmp_path / "there")) == ["README.md", "croissant.json"]
    show.run(path, languages=("de",), pictures=f"{toy}:images", quiet=True)
    done = push.run(path, place, quiet=True)  # the same cache, another card
    assert done.sent_files == 0 and there(tmp_path / "there") == there(path) and len(there(path)) == 5
    pull.run(place, tmp_path / "here", quiet=True)
    assert list(there_or_not(tmp_path / "here")) == ["README.md"]
    own = (path / "README.md").read_bytes() + b"\n## Thanks\n\nTo all.\n"
    (path / "README.md").write_bytes(own)  # what somebody wrote into it
    push.run(path, place, quiet=True)
    assert (tmp_path / "there/README.md").read_bytes() == own


def there_or_not(folder: Path) -> dict[str, bytes]:
    return {name: b"" for name in ("README.md", "croissant.json", "preview") if (folder / name).exists()}


def test_the_preview_of_an_earlier_state_is_not_sent_and_goes(
    quick_dump: QuickDump, tmp_path: Path, with_tables: None
) -> None:
    path = quick_dump(policy=CROPPED, views=1).reader.path
    show.run(path, quiet=True)
    (old,) = (path / "preview").iterdir()
    quick_dump(extend=True, codec=None, views=2)
    push.run(path, parse_place(f"file:{tmp_path}/there"), quiet=True)
    assert list(there(tmp_path / "there")) == ["README.md", "croissant.json"]
    (path / "preview/mine.txt").write_text("somebody's own")
    show.run(path, quiet=True)
    assert not old.exists() and sorted(one.suffix for one in (path / "preview").iterdir()) == [".parquet", ".txt"]


@pytest.mark.parametrize("harm", ["of another cache", "preview gone", "no text"])
def test_a_card_that_does_not_fit_is_made_anew_for_the_push(
    quick_dump: QuickDump, tmp_path: Path, with_tables: None, harm: str
) -> None:
    path = quick_dump().reader.path
    fresh = (path / "README.md").read_bytes()
    show.run(path, quiet=True)
    if harm == "preview gone":
        next((path / "preview").iterdir()).unlink()
    else:
        (path / "README.md").write_bytes(b"\xff\xfe" if harm == "no text" else b"# `" + b"0" * 64 + b"`")
    push.run(path, parse_place(f"file:{tmp_path}/there"), quiet=True)
    assert there(tmp_path / "there")["README.md"] == fresh and len(there(tmp_path / "there")) == 2


def test_a_pushed_card_that_was_changed_there_is_put_right(quick_dump: QuickDump, tmp_path: Path) -> None:
    path = quick_dump().reader.path
    place = parse_place(f"file:{tmp_path}/there")
    push.run(path, place, quiet=True)
    expected = there(tmp_path / "there")
    (tmp_path / "there/croissant.json").unlink()
    push.run(path, place, quiet=True)
    assert there(tmp_path / "there") == expected


def test_the_table_is_the_same_bytes_twice_and_reads_back(quick_dump: QuickDump) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    for cache in (quick_dump(), softcache.open(GOLDEN / "indexed")):
        cells, columns = preview.preview_cells(cache), preview_columns(cache.manifest.plan)
        data = preview.to_parquet(columns, cells)
        assert data == preview.to_parquet(columns, preview.preview_cells(cache))
        found: Mapping[str, list[Any]] = parquet.read_table(io.BytesIO(data)).to_pydict()
        assert dict(found) == cells


# ---------------------------------------------------------------------------------------- as other programs read it


@pytest.fixture(params=["of classes", "of everything"])
def shown(request: pytest.FixtureRequest, quick_dump: QuickDump, tmp_path: Path) -> softcache.Cache:
    """A cache with all that is shown of it, its name one that YAML and JSON have to quote."""
    pytest.importorskip("pyarrow")
    if request.param == "of everything":
        shutil.copytree(GOLDEN / "indexed", tmp_path / "cache")
    else:
        quick_dump(data="synthetic:images?count=30&classes=4&size=8", license='mine: "all"')
    show.run(tmp_path / "cache", languages=("en", "no"), quiet=True)
    return softcache.open(tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of other packages
def test_mlcroissant_takes_it_and_reads_the_preview(shown: softcache.Cache) -> None:
    """In an environment of its own: `python tools/croissant`."""
    mlcroissant = pytest.importorskip("mlcroissant")
    read = mlcroissant.Dataset(jsonld=shown.reader.path / "croissant.json")
    assert not read.metadata.ctx.issues.errors
    assert read.metadata.distribution[0].sha256 == shown.id == read.metadata.version
    cells, rows = preview.preview_cells(shown), list(read.records("preview"))
    for column in preview_columns(shown.manifest.plan):
        found = [row[f"preview/{column.name}"] for row in rows]
        assert [_as_text(one) for one in found] == [_as_text(one) for one in cells[column.name]], column


def _as_text(cell: Any) -> Any:
    """Strings come as bytes, and what is missing in more than one way."""
    if isinstance(cell, list | np.ndarray):
        return [_as_text(one) for one in cell]
    if isinstance(cell, bytes):
        return cell.decode()
    return None if cell is None or cell != cell or cell in ("None", "nan") else cell


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_datasets_reads_the_folder_as_a_hubs_viewer_does(
    shown: softcache.Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    place = tmp_path / "there"
    push.run(shown.reader.path, parse_place(f"file:{place}"), quiet=True)
    read = datasets.load_dataset(str(place), cache_dir=str(tmp_path / "store"))
    assert list(read) == ["preview"] and len(read["preview"]) == len(preview.preview_rows(shown))
    assert read["preview"].to_dict() == preview.preview_cells(shown)


@pytest.mark.slow
def test_a_hubs_own_reader_of_cards_takes_the_front_matter(shown: softcache.Cache) -> None:
    hub = pytest.importorskip("huggingface_hub")
    about = hub.DatasetCard.load(shown.reader.path / "README.md").data
    assert about.pretty_name.startswith("Soft targets for ") and about.language == ["en", "no"]
    assert about.license in ("unknown", "other") and about.size_categories == ["n<1K"]

"""One file layer for caches and run folders: what it opens, what it writes, and that nothing else writes."""

from __future__ import annotations

import ast
import os
import re
import shutil
import socket
from pathlib import Path

import pytest

import softcache
from softcache import cli
from softcache.errors import DamagedCacheError, DumpError, LinkedCacheError, SoftcacheError, TrainingError
from softcache.files import durable
from softcache.files.inside import RUN, is_inside, open_inside, read_inside, refuse_linked_folders


def test_no_module_but_the_file_layer_writes_what_belongs_to_a_cache_or_a_run() -> None:
    """What else writes: a vocabulary where its user says, the lists of keys in a folder of the trials' own."""
    writing = re.compile(
        r"(os|files\.os)\.(write|pwrite|replace|rename|unlink|remove|mkdir|makedirs|rmdir|link|symlink|chmod|truncate)"
        r"|.*\.(write_bytes|write_text|mkdir|unlink|rename|touch|rmdir|symlink_to|hardlink_to|savefig|save)"
        r"|shutil\.(copy.*|move|rmtree)|torch\.save|.*\.save_file"
    )
    package = Path(softcache.__file__).parent
    found = {}
    words = re.compile(r"os\.|write|mkdir|unlink|rename|touch|rmdir|_to\(|save|shutil")
    for path in sorted(package.rglob("*.py")):
        if not words.search(path.read_text()):
            continue
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        guilty = sorted({name for name in map(ast.unparse, calls) if writing.fullmatch(name)})
        if guilty and path != package / "files/durable.py":
            found[str(path.relative_to(package))] = guilty
    assert found == {
        "cache/write/rewriter.py": ["shutil.rmtree"],  # which follows no link
        "check/view_picture.py": ["grid.save"],
        "demo.py": ["figure.savefig"],  # into memory
        "dump/forecast.py": ["keys.write_text"],
        "files/home.py": ["one.mkdir", "os.replace", "temporary.unlink"],  # outside of every cache
        "models/textcnn.py": ["Path(path).write_text"],
        "report/chart.py": ["figure_of(title, rows).savefig"],  # into memory
        "share/preview.py": ["image.save"],  # into memory
        "students/traced_program.py": ["made.save", "torch.export.save"],  # to a path that the file layer made
        "train/checkpoint.py": ["torch.save"],  # into a file of the file layer's
    }


def harm(path: Path, how: str, outside: Path) -> None:
    if how == "link":
        path.symlink_to(outside)
    elif how == "hard link":
        os.link(outside, path)
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    else:
        path.mkdir()


@pytest.mark.parametrize("how", ["link", "hard link", "pipe", "socket"])
def test_a_file_is_written_under_a_name_that_was_made_for_it(how: str, tmp_path: Path) -> None:
    outside = tmp_path / "precious"
    outside.write_bytes(b"precious")
    place = tmp_path / "place"
    place.mkdir()
    for name in ("a.json", "a.json.tmp-0"):
        harm(place / name, how, outside)
    durable.write_whole(place / "a.json", b"new")
    assert outside.read_bytes() == b"precious"
    assert (place / "a.json").read_bytes() == b"new" and not (place / "a.json").is_symlink()
    assert os.listdir(place) == ["a.json"]


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    for name in ("a.json", "b.json.tmp-0"):
        (tmp_path / name).mkdir()
        with pytest.raises(DumpError, match=r"Is a directory|not writable"):
            durable.write_whole(tmp_path / name[:6], b"new")


def test_a_stream_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")

    def half() -> None:
        with durable.written_aside(tmp_path / "a") as file:
            durable.Stream(file).write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert (tmp_path / "a").read_bytes() == b"old"
    with durable.written_aside(tmp_path / "a") as file:
        stream = durable.Stream(file)
        assert (stream.write(b"one"), stream.write(memoryview(b" two")), stream.tell()) == (3, 4, 7)
    assert (tmp_path / "a").read_bytes() == b"one two"

    def half_by_path() -> None:
        with durable.written_by_path(tmp_path / "a", tmp_path / ".a.1") as aside:
            aside.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half_by_path()
    assert (tmp_path / "a").read_bytes() == b"one two" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("how", ["link", "pipe", "socket", "folder"])
@pytest.mark.parametrize("deeper", [False, True])
def test_only_regular_files_are_opened_and_no_link_is_followed(how: str, deeper: bool, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x").write_bytes(b"theirs")
    place = tmp_path / "place"
    place.mkdir()
    harm(place / "inner", how, outside if deeper else outside / "x")
    relative = "inner/x" if deeper else "inner"
    if how == "folder" and deeper:
        (place / relative).write_bytes(b"ours")
        assert read_inside(place, relative, 10) == b"ours"
        return
    with pytest.raises(LinkedCacheError if how == "link" else DamagedCacheError) as caught:
        open_inside(place, relative)
    assert ("cp -rL" in caught.value.tip) == (how == "link")
    with pytest.raises(TrainingError):
        is_inside(place, relative, RUN)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(11))
    with pytest.raises(DamagedCacheError, match="more than 10 bytes"):
        read_inside(tmp_path, "x", 10)
    assert is_inside(tmp_path, "x") and not is_inside(tmp_path, "y") and not is_inside(tmp_path, "no/y")


def test_links_to_folders_are_found_at_any_depth(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/file").symlink_to("nowhere")  # of files a writer makes new ones
    refuse_linked_folders(tmp_path)
    refuse_linked_folders(tmp_path / "nothing")
    (tmp_path / "a/b/folder").symlink_to(tmp_path)
    with pytest.raises(SoftcacheError, match="a/b/folder: is a symbolic link; links inside a cache are not followed"):
        refuse_linked_folders(tmp_path)
    (tmp_path / "by a link").symlink_to(tmp_path / "a")
    (tmp_path / "a/b/folder").unlink()
    refuse_linked_folders(tmp_path / "by a link")


def hub_store(root: Path, cache: Path, linked: str) -> Path:
    """A folder as a hub's package keeps it: files whose names match are links to blobs."""
    snapshot = root / "datasets--team--digits" / "snapshots" / ("0" * 40)
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in cache.rglob("*") if path.is_file())):
        relative = file.relative_to(cache)
        place = snapshot / relative
        place.parent.mkdir(parents=True, exist_ok=True)
        if not relative.match(linked):
            shutil.copyfile(file, place)
            continue
        blob = blobs / f"{number:064x}"
        shutil.copyfile(file, blob)
        place.symlink_to("../" * (len(relative.parts) + 1) + f"blobs/{blob.name}")
    return snapshot


MANIFESTS = ("*", "manifests/*.json", "files-*.json")  # all that inspect reads
LINKED = {"verify": (*MANIFESTS, "samples.h5", "members/*/*"), "inspect": MANIFESTS}
LINKED["push"] = LINKED["verify"]


@pytest.mark.parametrize(("verb", "linked"), [(verb, one) for verb, names in LINKED.items() for one in names])
def test_a_hubs_store_is_told_as_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], linked: str, verb: str
) -> None:
    snapshot = hub_store(tmp_path, Path(__file__).parents[1] / "golden/indexed", linked)
    argv = [verb, str(snapshot), *([f"file:{tmp_path}/out"] if verb == "push" else [])]
    assert cli.main(argv) == 2
    told = capsys.readouterr()
    assert f"{snapshot}: lies in a hub's store" in told.err
    assert f"cp -rL {snapshot} NEW, or softcache pull hf:team/digits NEW" in told.err
    assert "damaged" not in told.out

"""Hostile caches of version 2: indexes, lists, candidates, members without classes. Made from the small cache of tools/golden."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from golden.indexed import ROWS, make_indexed
from hostile.forge import Case, Forge, Gate, assign, dumps

CASES_2: dict[str, Case] = {}
FIRST, OF_TAGGER, OF_SEGMENTER = "files-r00000-00000.json", "files-r00000-00002.json", "files-r00000-00003.json"
WORDS, CELLS, COARSE, LIST = (
    f"positions/{name}.h5" for name in ("words-r00000", "cells-r00000", "coarse-r00001", "list-r00000")
)


def make_honest_2(path: Path) -> None:
    """Few parts, so that a case takes a fraction of a second."""
    make_indexed(path, shard_rows=32)


def _case(name: str, make: Callable[[Forge], None], *, gate: Gate = "open") -> None:
    assert name not in CASES_2, name
    CASES_2[f"v2/{name}"] = Case(f"v2/{name}", make, gate, "other")


def _of_manifest(name: str, change: Callable[[Any], Any], **how: Any) -> None:
    def make(forge: Forge) -> None:
        change(forge.entry)
        forge.publish(dumps(forge.entry))

    _case(f"manifest/{name}", make, **how)


def _of_list(name: str, path: str, change: Callable[[list[dict[str, Any]]], Any], **how: Any) -> None:
    def make(forge: Forge) -> None:
        change(forge.listed[path])
        forge.save()

    _case(f"list/{name}", make, **how)


def _of_arrays(name: str, path: str, change: Callable[[dict[str, np.ndarray]], Any], **how: Any) -> None:
    """A file written by the real writer, with other arrays."""

    def make(forge: Forge) -> None:
        arrays = {n: forge.read(path, n).copy() for n in forge.file(path)["arrays"] if not n.endswith("_crc32")}
        change(arrays)
        forge.replace(path, arrays)
        forge.save()

    _case(f"arrays/{name}", make, **how)


def _put(name: str, at: Any, value: Any) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda arrays: arrays[name].__setitem__(at, value)


def _one_more(arrays: dict[str, np.ndarray]) -> None:
    arrays["lengths"][0, -1] += 1
    arrays["offsets"][0, -1] += np.uint64(1)
    arrays["labels"] = np.append(arrays["labels"], np.int32(0))


def _three_candidates(arrays: dict[str, np.ndarray]) -> None:
    arrays.update(ids=arrays["ids"][:3], digests=arrays["digests"][:3], key_offsets=arrays["key_offsets"][:4])


MANIFEST: Mapping[str, Callable[[Any], Any]] = {
    "an index that is not there": assign("members", 0, "index", to="x"),
    "no index of a member that has one": assign("members", 0, "index", to=None),
    "an index of a member that has none": assign("members", 3, "index", to="words"),
    "another index of as many positions": assign("members", 1, "index", to="words"),
    "another index of a feature": assign("members", 3, "features", 0, "index", to="cells"),
    "no index of a feature": assign("members", 3, "features", 0, "index", to=None),
    "an unknown kind of index": assign("indexes", 0, "kind", to="pixels"),
    "words as a grid": assign("indexes", 0, "kind", to="grid"),
    "a grid as frames": assign("indexes", 1, "kind", to="frames"),
    "an index twice": lambda e: e["indexes"].append(e["indexes"][0]),
    "no indexes": assign("indexes", to=[]),
    "an index that no round wrote": lambda e: e["indexes"].append({**e["indexes"][0], "name": "more", "labels": False}),
    "labels of a grid": assign("indexes", 1, "labels", to=True),
    "no labels of words": assign("indexes", 0, "labels", to=False),
    "all of an index that is listed": assign("indexes", 3, "listed", to=False),
    "listed words": assign("indexes", 0, "listed", to=True),
    "a name of an index with a slash": lambda e: (
        assign("indexes", 0, "name", to="../w")(e),
        assign("members", 0, "index", to="../w")(e),
    ),
    "a round without one of its indexes": lambda e: e["rounds"][0]["indexes"].pop(),
    "a round with an index more": lambda e: e["rounds"][1]["indexes"].append("words"),
    "an index in a round twice": lambda e: e["rounds"][0]["indexes"].append("words"),
    "width of more numbers": assign("members", 2, "width", to=2),
    "width of no numbers": assign("members", 3, "width", to=0),
    "width of other classes": assign("members", 0, "width", to=6),
    "width of 2^52": assign("members", 2, "width", to=2**52),
    "no names of values": assign("members", 2, "value_names", to=[]),
    "names of an embedding": assign("members", 3, "value_names", to=list("abcdef")),
    "an unknown output": assign("members", 0, "output", to="boxes"),
    "an embedding as classes": assign("members", 3, "output", to="logits"),
    "no output, and a codec": assign("members", 0, "output", to=None),
    "an output, and no codec": assign("members", 0, "codec", to=None),
    "features alone, and none": assign("members", 4, "features", to=[]),
    "a promise of classes for an embedding": assign("members", 3, "promise", to={"max_kl": "1", "at_temperature": "4"}),
    "half a promise": assign("members", 0, "promise", to={"max_kl": "1"}),
    "no digests of views": assign("views", "digests", to=[]),
    "unknown digests of views": assign("views", "digests", to=["pixel_digests", "sound_digests"]),
    "no masks": assign("samples", "has_masks", to=False),
    "a vocabulary beside classes": assign("vocabulary", to={"count": 5, "tokenizer": "0" * 64}),
    "a vocabulary without its tokenizer": lambda e: (
        assign("vocabulary", to={"count": 5, "tokenizer": "0" * 64})(e),
        assign("class_names", to=[])(e),
    ),
    "no classes": assign("class_names", to=[]),
    "parents of nobody": lambda e: e["parents"].append(
        {"id": "0" * 64, "statistics": {"x": e["lists"][2]["statistics"]}}
    ),
    "a parent as in version 1": assign("parent", to=None),
    "files as in version 1": assign("files", to=[]),
    "shard_rows 3": assign("rounds", 0, "layout", "shard_rows", to=3),
    "shard_rows 300": assign("rounds", 0, "layout", "shard_rows", to=300),
    "2^50 parts": lambda e: (
        assign("rounds", 0, "layout", "num_rows", to=2**50)(e),
        assign("rounds", 0, "layout", "shard_rows", to=1)(e),
        assign("samples", "count", to=2**50)(e),
    ),
    "a batch of -1 tokens": assign("rounds", 0, "made_with", "batch_tokens", to=-1),
    "no lists": assign("lists", to=[]),
    "a list less": lambda e: e["lists"].pop(),
    "a list more": lambda e: e["lists"].append(e["lists"][-1]),
    "two lists swapped": lambda e: e["lists"].insert(2, e["lists"].pop(3)),
    "no list of the samples": lambda e: e["lists"].pop(0),
    "a list of another round": assign("lists", 2, "round", to=1),
    "a list of another member": assign("lists", 2, "member", to="segmenter"),
    "a list of an unknown kind": assign("lists", 2, "of", to="friends"),
    "a list of fewer parts": assign("lists", 2, "parts", to=[0, 1]),
    "a list of parts that run backwards": assign("lists", 2, "parts", to=[2, 0]),
    "a list of 2^50 parts": assign("lists", 2, "parts", to=[0, 2**50]),
    "a list of 2^50 files": assign("lists", 2, "files", to=2**50),
    "a list of a file less": assign("lists", 2, "files", to=1),
    "a list of other bytes of files": assign("lists", 2, "file_bytes", to=5),
    "a list outside": assign("lists", 2, "path", to="../files-r00000-00002.json"),
    "a list of 2^40 bytes": assign("lists", 2, "bytes", to=2**40),
    "another list in its place": lambda e: e["lists"][2].update(
        {name: e["lists"][3][name] for name in ("sha256", "bytes")}
    ),
    "statistics of a list of views": lambda e: e["lists"][1].update(statistics=e["lists"][2]["statistics"]),
    "no statistics of a member's list": assign("lists", 2, "statistics", to=None),
    "statistics of more records": assign("lists", 2, "statistics", "records", to=10**6),
    "a list without its digest": lambda e: e["lists"][2].pop("sha256"),
}
for _name, _change in MANIFEST.items():
    _of_manifest(_name, _change)

LISTS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "a file twice": (OF_TAGGER, lambda files: files.append(files[-1])),
    "a file less": (OF_TAGGER, lambda files: files.pop()),
    "no files": (OF_TAGGER, lambda files: files.clear()),
    "two files swapped": (OF_TAGGER, lambda files: files.reverse()),
    "a part of another member": (OF_TAGGER, assign(0, "path", to="members/segmenter/part-00000.h5")),
    "a path outside": (OF_TAGGER, assign(0, "path", to="../part-00000.h5")),
    "rows of another part": (OF_TAGGER, assign(0, "rows", to=[0, ROWS - 1])),
    "views of another part": (OF_TAGGER, assign(0, "views", to=[1, 2])),
    "checksums of another file": (OF_TAGGER, assign(0, "checksums", to="0" * 64)),
    "no checksums": (OF_TAGGER, lambda files: files[0].pop("checksums")),
    "an index of a part": (OF_TAGGER, assign(0, "index", to="words")),
    "more positions": (OF_TAGGER, lambda files: files[0]["arrays"]["eps"]["shape"].__setitem__(0, 99)),
    "statistics without an error": (OF_TAGGER, lambda files: files[0]["statistics"].pop("error")),
    "statistics of no records": (OF_TAGGER, assign(0, "statistics", "records", to=0)),
    "records of another length": (
        OF_SEGMENTER,
        lambda files: files[0]["arrays"]["records"]["shape"].__setitem__(1, 12),
    ),
    "positions of another index": (FIRST, lambda files: files[2].update(index="cells")),
    "positions of other views": (FIRST, lambda files: files[2].update(views=[0, 1])),
    "positions without an index": (FIRST, lambda files: files[2].pop("index")),
    "no candidates": (FIRST, lambda files: files.pop(1)),
    "a tokenizer of nobody": (
        FIRST,
        lambda files: files.insert(2, {**files[1], "kind": "tokenizer", "path": "tokenizer.json", "arrays": {}}),
    ),
    "a dtype of nobody": (OF_TAGGER, lambda files: files[0]["arrays"]["logits"].update(dtype="<u2")),
    "data sets over one another": (
        OF_TAGGER,
        lambda files: files[0]["arrays"]["eps"].update(offset=files[0]["arrays"]["logits"]["offset"]),
    ),
}
for _name, (_path, _in_list) in LISTS.items():
    _of_list(_name, _path, _in_list)
_of_list("another sha256", OF_TAGGER, assign(0, "sha256", to="0" * 64), gate="verify")

_of_arrays("words: offsets fall", WORDS, _put("offsets", (0, 5), 2**40))
_of_arrays("words: offsets of 2^64 - 1", WORDS, _put("offsets", (0, -1), 2**64 - 1))
_of_arrays("words: offsets begin late", WORDS, _put("offsets", (0, 0), 1))
_of_arrays("words: longer", WORDS, _put("lengths", (0, 3), 99))
_of_arrays("words: a label that is no class", WORDS, _put("labels", 2, 5))
_of_arrays("words: a label below -1", WORDS, _put("labels", 2, -2))
_of_arrays("words: other labels", WORDS, _put("labels", 2, 4), gate="verify")
_of_arrays("words: a position more", WORDS, _one_more)
_of_arrays("words: no labels", WORDS, lambda a: a.pop("labels"))
_of_arrays("words: of other rows", WORDS, lambda a: a.update(lengths=a["lengths"][:, :-1]))
_of_arrays("cells: another shape of as many", CELLS, _put("shapes", (0, 1), [2**16, 2**16]))
_of_arrays("cells: a side of 2^32 - 1", CELLS, _put("shapes", (0, 0), [2**32 - 1, 0]))
_of_arrays("cells: one view for both", CELLS, lambda a: a.update({name: value[:1] for name, value in a.items()}))
_of_arrays("coarse: a position that is not there", COARSE, _put("listed", 0, 2**31))
_of_arrays("coarse: positions that do not ascend", COARSE, lambda a: a["listed"].__setitem__(slice(1, 4), 2))
_of_arrays("coarse: fewer listed", COARSE, lambda a: a.update(listed=a["listed"][:-1]))
_of_arrays("list: a candidate that is not there", LIST, _put("entries", 0, 7))
_of_arrays("list: a candidate twice", LIST, lambda a: a["entries"].__setitem__(slice(0, 3), 0))
_of_arrays("candidates: an id twice", "candidates.h5", lambda a: a["ids"].__setitem__(1, a["ids"][0]), gate="verify")
_of_arrays("candidates: other contents", "candidates.h5", _put("digests", 0, 0), gate="verify")
_of_arrays("candidates: fewer", "candidates.h5", _three_candidates)
_of_arrays("candidates: keys that fall", "candidates.h5", _put("key_offsets", 2, 2**40))
_of_arrays("samples: other masks", "samples.h5", _put("mask_digests", 0, 0), gate="verify")
_of_arrays("samples: no masks", "samples.h5", lambda a: a.pop("mask_digests"))


def _copied(forge: Forge) -> None:
    """Both are right in themselves, and of one size: the checksums in the file say which it is."""
    shutil.copy(forge.root / "members/embedder/part-00001.h5", forge.root / "members/embedder/part-00000.h5")


def _flipped(forge: Forge) -> None:
    """A block whose checksum stays."""
    path = forge.root / "members/tagger/part-00000.h5"
    data = bytearray(path.read_bytes())
    data[forge.array("members/tagger/part-00000.h5", "logits")["offset"]] ^= 1
    path.write_bytes(data)


def _linked(forge: Forge) -> None:
    path = forge.root / OF_TAGGER
    path.rename(path.with_suffix(".aside"))
    path.symlink_to(path.with_suffix(".aside").name)


def _a_folder(forge: Forge) -> None:
    (forge.root / OF_TAGGER).unlink()
    (forge.root / OF_TAGGER).mkdir()


def _huge(forge: Forge) -> None:
    with (forge.root / OF_TAGGER).open("r+b") as handle:
        handle.truncate(2**40)


def _no_json(forge: Forge) -> None:
    (forge.root / OF_TAGGER).write_bytes(b"[" * 100_000)


_case("file/a part in another one's place", _copied)
_case("file/a changed block", _flipped)
_case("file/a list that is a link", _linked)
_case("file/a list that is a folder", _a_folder)
_case("file/a list of one TiB", _huge)
_case("file/a list that is not there", lambda forge: os.unlink(forge.root / OF_TAGGER))
_case("file/a list that is no JSON", _no_json)

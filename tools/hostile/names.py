"""Names that are not our names."""

from __future__ import annotations

import json
from collections.abc import Iterator

from hostile.forge import Forge, case, dumps
from hostile.honest import PLAIN

BAD_PATHS = [
    "../x.h5",
    "../../etc/passwd",
    "/etc/passwd",
    "//etc/passwd",
    "members/../../x.h5",
    "members/plain/../plain/part-00000.h5",
    "./members/plain/part-00000.h5",
    "members//plain/part-00000.h5",
    "members/plain/part-00000.h5/",
    "members\\plain\\part-00000.h5",
    "file:///etc/passwd",
    "C:\\windows",
    "~/x.h5",
    "members/Plain/part-00000.h5",
    "MEMBERS/plain/part-00000.h5",
    "members/plain/part-00000.H5",
    "members/plain/part-00000.h5\0",
    "members/plain/part-00000.h5\0.txt",
    "members/plain/part-00000.h5\n",
    "members/plain/part-00000.h5 ",
    "members/plain/part-00000.h5.",
    " members/plain/part-00000.h5",
    "members/plain\u200b/part-00000.h5",
    "members/p\u2113ain/part-00000.h5",
    "members/\uff50lain/part-00000.h5",
    "members/pl\u0430in/part-00000.h5",
    "members/plain/part-0000\u0660.h5",
    "members/plain/part-000000.h5",
    "members/plain/part-0.h5",
    "members/plain/part-00007.h5",
    "members/plain/part-00000.h5:stream",
    "members/other/part-00000.h5",
    "manifest.json",
    "README.md",
    "CON",
    "",
    ".",
    "a" * 5000,
]


@case("name/paths of files")
def paths_of_files(forge: Forge) -> Iterator[tuple[str, bytes]]:
    for bad in BAD_PATHS:
        forge.file(PLAIN)["path"] = bad
        yield repr(bad[:40]), dumps(forge.entry)
        forge.file(bad)["path"] = PLAIN


BAD_MEMBERS = [
    "",
    ".",
    "..",
    "../plain",
    "Plain",
    "PLAIN",
    "plain ",
    " plain",
    "plain.",
    "plain\n",
    "plain\0",
    "-plain",
]
BAD_MEMBERS += [
    "pl\u0430in",
    "\uff50lain",
    "plain\u200b",
    "p" * 65,
    "a/b",
    "a\\b",
    "_plain",
    "pl.ain",
    "\u0131",
    "\ud83d",
]


@case("name/members")
def members(forge: Forge) -> Iterator[tuple[str, bytes]]:
    text = dumps(forge.entry).decode()
    for bad in BAD_MEMBERS:
        quoted = json.dumps(bad, ensure_ascii=False)
        renamed = text.replace('"plain"', quoted).replace("members/plain/", f"members/{quoted[1:-1]}/")
        yield repr(bad[:40]), renamed.encode("utf-8", "surrogatepass")


@case("name/data sets")
def data_sets(forge: Forge) -> Iterator[tuple[str, bytes]]:
    text = dumps(forge.entry).decode()
    for bad in [
        "Logits",
        "logits ",
        "../logits",
        "/logits",
        "a/b",
        "logits\0",
        "",
        "log\u0456ts",
        "l" * 65,
        "logits.x",
        "1x",
    ]:
        quoted = json.dumps(bad, ensure_ascii=False)[1:-1]
        yield (
            repr(bad[:40]),
            text.replace('"logits"', f'"{quoted}"').replace('"logits_crc32"', f'"{quoted}_crc32"').encode(),
        )


@case("name/twice")
def twice(forge: Forge) -> Iterator[tuple[str, bytes]]:
    entry = forge.entry
    for what, change in {
        "a class": lambda e: e["class_names"].__setitem__(1, e["class_names"][0]),
        "a member": lambda e: e["members"].append(e["members"][0]),
        "a member under one name": lambda e: e["members"][1].update(name="coded"),
        "a member of a round": lambda e: e["rounds"][0]["members"].append("plain"),
        "a file": lambda e: e["files"].append(e["files"][-1]),
        "a file in the middle": lambda e: e["files"].insert(3, e["files"][3]),
        "samples": lambda e: e["files"].insert(0, e["files"][0]),
        "a round": lambda e: e["rounds"].append(e["rounds"][0]),
        "a feature": lambda e: e["members"][1]["features"].append(e["members"][1]["features"][0]),
    }.items():
        changed = json.loads(dumps(entry))
        change(changed)
        yield what, dumps(changed)

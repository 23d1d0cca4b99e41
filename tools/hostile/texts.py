"""Recipes, settings, spec strings, tables and pictures that nobody should have written, and the verbs that read them.

The specs are a user's own words here: what they name may be called. They only must not end in a traceback, or on the screen.
"""

from __future__ import annotations

import fnmatch
import gzip
import io
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hostile.world import DATA, EVAL, MLP, Outcome, copy_of, judge

ESCAPES = "\x1b[31mred\x1b]0;title\x07"
RECIPE = """
title = "T"
source = "S"
[data]
train = "{data}"
test = "{test}"
[[step]]
name = "{name}"
train = {{data = "train", eval_data = "test", student = "softcache:mlp?hidden=4", epochs = 1}}
[budget.paper]
seeds = [0]
"""


def recipe(name: str = "a", data: str = DATA, more: str = "") -> str:
    return RECIPE.format(name=name, data=data, test=EVAL) + more


RECIPES: dict[str, str | bytes] = {
    "no recipe": "",
    "no text": b"\xff\xfe\x00",
    "deep": "a = " + "[" * 100_000,
    "large": "# " + "x" * 2**24 + "\n" + recipe(),
    "a step above": recipe(name="../outside/x"),
    "a step at the root": recipe(name="/tmp/x"),
    "a step of dots": recipe(name=".."),
    "a step with a line": recipe(name="a\\nb"),
    "a step with escapes": recipe(name="\\u001b[31mred"),
    "a step without a name": recipe(name=""),
    "a step of numbers": recipe().replace('name = "a"', "name = 3"),
    "data of escapes": recipe(data="\\u001b[31mred"),
    "data of nothing": recipe(data=""),
    "a title of escapes": recipe().replace('"T"', '"\\u001b[31mred"'),
    "a seed of text": recipe().replace("seeds = [0]", 'seeds = ["x"]'),
    "a billion laughs": recipe(
        more='[words]\nb0 = "lol"\n'
        + "".join(f'b{i + 1} = "{f"{{b{i}}}" * 10}"\n' for i in range(20))
        + "[pair.p]\n"
        + '[[step]]\nname = "{b20}"\neach = true\ntrain = {data = "train", student = "x"}\n'
    ),
    "laughs that grow": recipe(
        more="[words]\n"
        + "".join(f'b{i} = "{f"{{b{i + 1}}}" * 10}"\n' for i in range(20))
        + 'b20 = "lol"\n[pair.p]\n[[step]]\nname = "{b0}"\neach = true\ntrain = {data = "train", student = "x"}\n'
    ),
    "pairs of numbers": recipe(
        more='[pair]\np = 3\n[[step]]\nname = "{pair}"\neach = true\ntrain = {data = "train"}\n'
    ),
    "words of lists": recipe(
        more='[words]\nw = [1]\n[pair.p]\n[[step]]\nname = "{w}"\neach = true\ntrain = {data = "train"}\n'
    ),
    "an output of its own": recipe().replace("epochs = 1", 'epochs = 1, out = "../outside/full"'),
    "settings of tables": recipe().replace("epochs = 1", "epochs = {a = 1}"),
    "settings of lists": recipe().replace("epochs = 1", "epochs = [[1]]"),
    "a class of nothing": recipe().replace("[budget", 'metric = "class_errors"\nclass = 3\n[budget'),
    "a tolerance of text": recipe().replace("[budget", 'tolerance = "x"\n[budget'),
    "a use elsewhere": recipe(more="").replace("seeds = [0]", 'seeds = [0]\nuse = {a = "../outside/precious"}'),
}

SETTINGS: dict[str, str | bytes] = {
    "no text": b"\xff\xfe",
    "deep": "data = " + "[" * 100_000,
    "deep tables": "a." * 5000 + "b = 1",
    "large": "# " + "x" * 2**24 + "\n",
    "numbers": "data = 3\nstudent = 4\nepochs = 99999999999999999999999\n",
    "dates": "data = 1979-05-27T07:32:00Z\n",
    "infinite": "lr = inf\ndata = 'digits'\nepochs = nan\n",
    "escapes": 'data = "\\u001b[31mred"\n"\\u001b[31m" = 3\n',
    "zeros": 'data = "a\\u0000b"\nstudent = "softcache:mlp\\u0000"\n',
    "lists in lists": "loss = [[[[1]]]]\n",
    "tables in lists": "loss = [{name = {a = 1}}]\n",
    "surrogates": b'data = "\xed\xa0\x80"\n',
    "a folder of lists": "out = ['a']\n",
}

SPECS = (
    *(
        "",
        "?",
        ":",
        "@",
        "a:b:c:d",
        "?a=1",
        "softcache:mlp?",
        "softcache:mlp?a",
        "softcache:mlp?hidden",
        "softcache:mlp?hidden=x",
    ),
    *(
        ESCAPES,
        "a\0b",
        "softcache:mlp\0",
        "x" * 100_000,
        "x" * 300,
        f"{'x' * 300}.py:f",
        "a\nb:c",
        "\u202eevil:x",
        "softcache:mlp@\0",
    ),
    *(
        "softcache:mlp?hidden=" + "9" * 5000,
        "softcache:mlp?hidden=-1",
        "softcache:mlp?hidden=1e5",
        "softcache:mlp?dropout=nan",
    ),
    *(
        "softcache:mlp?hidden=99999999999",
        "softcache:cnn?width=9999999",
        "softcache:mlp?hidden=" + "4," * 10_000,
        "\udc80:x",
    ),
    *(
        "torchvision:../x",
        "torchvision:MNIST?root=/nowhere",
        "timm:hf-hub:a/b",
        "hf:../x",
        "hf:a/b/c",
        "hf:",
        "tsv:",
        "tsv:/dev/null",
    ),
    *(
        "imagefolder:",
        "imagefolder:/dev/null",
        "imagefolder:\0",
        "synthetic:images?count=1000000000000",
        "synthetic:images?size=9999999",
    ),
    *(
        "synthetic:images?classes=-1",
        "synthetic:images?count=0",
        "digits?rows=0-99999999999",
        "digits?split=" + ESCAPES,
        "mine.py:nothing",
    ),
    *(
        "mine.py:",
        "mine.py:__class__",
        "nowhere.py:f",
        "/dev/null:f",
        ".py:f",
        "os.path:join",
        "os.path:join?a=1",
        "run@run",
        "@run",
    ),
)


def tables() -> dict[str, tuple[str, bytes]]:
    """What a table may be: name -> (ending, bytes)."""
    bomb = gzip.compress(bytes(2**20) * 600)
    return {
        "empty": (".tsv", b""),
        "zeros": (".tsv", bytes(1000)),
        "no text": (".tsv", bytes(range(256))),
        "escapes": (".tsv", f"{ESCAPES}\t{ESCAPES}\nb\tc\n".encode()),
        "one line of a megabyte": (".tsv", b"a" * 2**20 + b"\tb\n"),
        "a million columns": (".tsv", b"\t" * 10**6 + b"\n"),
        "uneven": (".tsv", b"a\tb\nc\n"),
        "a bomb": (".tsv.gz", bomb),
        "a cut bomb": (".tsv.gz", bomb[:1000]),
        "no gzip": (".tsv.gz", b"a\tb\n"),
        "a thousand classes": (".tsv", b"".join(b"t\tc%d\n" % i for i in range(1000))),
        "surrogates": (".tsv", b"\xed\xa0\x80\ta\n"),
        "directions": (".tsv", "a\t\u202eb\nc\t\u2066d\n".encode()),
    }


def _png(width: int, height: int, data: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def pictures() -> dict[str, bytes]:
    from PIL import Image

    made = io.BytesIO()
    Image.new("L", (8, 8), 7).save(made, "PNG")
    good = made.getvalue()
    return {
        "empty": b"",
        "cut": good[: len(good) // 2],
        "no picture": b"\x89PNG\r\n\x1a\nnothing",
        "a bomb of 4 gigapixels": _png(65_535, 65_535, zlib.compress(bytes(1000))),
        "a bomb of rows": _png(2**31 - 1, 1, zlib.compress(bytes(1000))),
        "no pixels": _png(0, 0, b""),
        "text in its place": b"<svg onload='x'/>",
        "a pickle": b"\x80\x04\x95\x00",
    }


def tried(folder: Path, *, every: int = 1, only: str = "*") -> Iterator[Outcome]:
    """The cases, or one in `every`, in a world that `make_world` has made in `folder`."""
    number = 0
    for case, files, words in _cases():
        number += 1
        if (number - 1) % every or not fnmatch.fnmatch(case, only):
            continue
        with copy_of(folder) as place:
            for name, data in files.items():
                path = place / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            outcome = judge(case, words, place, folder / "outside")
            if case.startswith("spec"):  # the user's own word: what it names may be called
                faults = [fault for fault in outcome.faults if not fault.startswith(("code run", "network"))]
                outcome = Outcome(case, outcome.code, faults, outcome.said, outcome.seconds)
            yield outcome


def _cases() -> Iterator[tuple[str, Mapping[str, bytes], Sequence[str]]]:
    how = ["--threads", "1", "--device", "cpu"]
    for name, text in RECIPES.items():
        data = text.encode() if isinstance(text, str) else text
        yield f"recipe: {name}", {"r.toml": data}, ["reproduce", "r.toml", "--out", "fresh", "--device", "cpu"]
    for name, text in SETTINGS.items():
        data = text.encode() if isinstance(text, str) else text
        yield f"settings: {name}", {"c.toml": data}, ["train", "--config", "c.toml", "--out", "fresh", "--student", MLP]
        yield f"settings shown: {name}", {"c.toml": data}, ["eval", "--config", "c.toml", "--print-config"]
    for text in SPECS:
        yield f"spec of data {text[:40]!a}", {}, ["eval", "run", "--data", text, *how]
        yield f"spec of a model {text[:40]!a}", {}, ["eval", text, "--data", EVAL, *how]
        yield (
            f"spec of a teacher {text[:40]!a}",
            {},
            ["dump", "--teacher", text, "--data", DATA, "--out", "fresh", *how],
        )
        yield f"spec of a step {text[:40]!a}", {}, ["eval", "run", "--data", EVAL, "--policy", text, *how]
    for name, (ending, data) in tables().items():
        file = f"t{ending}"
        plan = ["train", "--data", f"tsv:{file}", "--student", "softcache:textcnn", "--epochs", "1", "--out", "fresh"]
        yield f"table: {name}", {file: data}, [*plan, *how]
        yield f"keys: {name}", {file: data}, ["eval", "run", "--data", EVAL, "--samples", file, *how]
    for name, data in pictures().items():
        words = ["eval", "run", "--data", "imagefolder:p", *how]
        yield f"picture: {name}", {"p/a/1.png": data, "p/b/1.png": data, "p/c/1.png": data}, words

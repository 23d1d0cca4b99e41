"""Every file of a run folder and of a cache x {link, wrong type, cut, huge, deep, foreign spec} x every verb that opens it."""

from __future__ import annotations

import fnmatch
import json
import os
import pickle
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hostile.world import OF_CACHES, OF_RUNS, Outcome, copy_of, judge, words_of

Attack = Callable[[Path, Path], None]  # the file, and what is outside

RUN_FILES = (
    "student.safetensors",
    "best.safetensors",
    "checkpoint.pt",
    "run.json",
    "config.toml",
    "metrics.jsonl",
    "metrics.csv",
)
RUN_LEFT = (
    "lock",
    "tensorboard",
    "run.json.tmp-0",
    "checkpoint.pt.tmp-0",
    "student.safetensors.tmp-0",
    "export.safetensors",
)
CACHE_FILES = (
    *(
        "manifest.json",
        "manifests/ID.json",
        "samples.h5",
        "probe.h5",
        "members/run/part-00000.h5",
        "views/part-00000.h5",
    ),
    *("provenance.json", "README.md", "dump/plan.json", "dump/part-1-of-1.jsonl", "dump/part-1-of-1.lock"),
)
CACHE_LEFT = (
    *(
        "dump/repair.lock",
        "dump/commit.lock",
        "dump/setup.lock",
        "dump/repair",
        "dump/extend-1",
        "manifest.json.tmp-repair",
    ),
    *("members/run/part-00001.h5.tmp-0-1-of-1", "members", "members/run", "views", "manifests", "dump"),
)
# what is surely read, by which verbs: with a link in its place they do not end well
OF_A_STUDENT = ("eval", "eval MODEL@RUN", "export", "plan", "dump", "train from it", "init")
OF_RECORDS = ("verify", "verify --full", "learn", "eval the cache", "subset")
READ_BY: dict[str, Sequence[str]] = {
    "run/student.safetensors": OF_A_STUDENT,
    **dict.fromkeys(("run/best.safetensors", "run/checkpoint.pt", "run/run.json"), ("resume",)),
    **dict.fromkeys(("cache/manifest.json", "cache/manifests"), OF_RECORDS),
    **dict.fromkeys(
        ("cache/samples.h5", "cache/members/run/part-00000.h5", "cache/members", "cache/members/run"), OF_RECORDS
    ),
    "cache/views": ("verify", "verify --full", "learn", "subset"),
}
OPENED_BY = {"metrics.jsonl": ("resume",), "metrics.csv": ("resume",), "config.toml": ("export of its data", "resume")}


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def link_to_a_copy(path: Path, outside: Path) -> None:
    """The file, or folder, lies outside, and a link to it in its place."""
    if path.exists():
        shutil.move(path, outside / "moved")
        path.symlink_to(outside / "moved")
    else:
        path.symlink_to(outside / "full")


def link_to_a_file(path: Path, outside: Path) -> None:
    remove(path)
    path.symlink_to(outside / "precious")


def link_to_a_folder(path: Path, outside: Path) -> None:
    remove(path)
    path.symlink_to(outside / "full")


def link_to_nothing(path: Path, outside: Path) -> None:
    remove(path)
    path.symlink_to(outside / "new")


def hard_link(path: Path, outside: Path) -> None:
    remove(path)
    os.link(outside / "precious", path)


def a_folder(path: Path, outside: Path) -> None:
    remove(path)
    path.mkdir()
    (path / "inner").write_text("inner")


def a_pipe(path: Path, outside: Path) -> None:
    remove(path)
    os.mkfifo(path)


def a_socket(path: Path, outside: Path) -> None:
    remove(path)
    before = Path.cwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


def cut(path: Path, outside: Path) -> None:
    if path.is_file():
        os.truncate(path, path.stat().st_size // 2)
    else:
        remove(path)
        path.write_bytes(b"")


def empty(path: Path, outside: Path) -> None:
    remove(path)
    path.write_bytes(b"")


def huge(path: Path, outside: Path) -> None:
    """A tebibyte that takes no room."""
    if path.is_dir():
        remove(path)
    path.touch()
    os.truncate(path, 2**40)


def deep(path: Path, outside: Path) -> None:
    remove(path)
    path.write_bytes(b"a = " * path.name.endswith(".toml") + b"[" * 200_000)


def noise(path: Path, outside: Path) -> None:
    remove(path)
    path.write_bytes(bytes(range(256)) * 64)


ATTACKS: dict[str, Attack] = {
    attack.__name__.replace("_", " "): attack
    for attack in (
        *(link_to_a_copy, link_to_a_file, link_to_a_folder, link_to_nothing, hard_link, a_folder, a_pipe, a_socket),
        *(cut, empty, huge, deep, noise),
    )
}


# ---------------------------------------------------------------------------------------------------------------- foreign specs


def said(change: Callable[[dict[str, Any]], None], *, seal: bool = True) -> Attack:
    """A student whose metadata say something else, with a digest that fits."""

    def attack(path: Path, outside: Path) -> None:
        from softcache.models.seal import digest

        with safe_open(path, framework="pt") as file:
            told = json.loads(file.metadata()["softcache"])
        tensors, about = load_file(path), json.loads(told["softcache_model"])
        about["_told"] = told
        change(about)
        about.pop("_told")
        told["softcache_model"] = json.dumps(about)
        told.pop("softcache_digest")
        if seal:
            told["softcache_digest"] = digest({"tensors": tensors, "metadata": told})
        save_file(tensors, path, metadata={"softcache": json.dumps(told)})

    return attack


def spec(text: str) -> Attack:
    return said(lambda about: about.update(spec=text))


def model(**changes: Any) -> Attack:
    return said(lambda about: about.update(changes))


def told(**changes: str) -> Attack:
    return said(lambda about: about["_told"].update(changes))


BERT = {"model_type": "bert", "vocab_size": 9, "num_hidden_layers": 1, "num_attention_heads": 1}
BERT |= {"hidden_size": 8, "intermediate_size": 8}


def transformer(**changes: Any) -> Attack:
    words = {"[UNK]": 0, "a": 1}
    definition = {"version": "1.0", "model": {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"}}
    taken = {"definition": definition, "takes": ["input_ids"], "max_tokens": 8, "pad_id": 0, "pad_type_id": 0}
    taken |= {"pad_side": "right", "cut_side": "right"}
    return model(spec="hf:Bert?config=0", transformer={"config": {**BERT, **changes}, "input": taken})


SPECS: dict[str, Attack] = {
    **{
        f"spec {text[:60]}": spec(text)
        for text in (
            *(
                "mine.py:net",
                "mine:net",
                "./mine.py:net",
                "os.path:join?a=1",
                "subprocess:run",
                "posixpath.os:system?command=true",
            ),
            *(
                "hf:prajjwal1/bert-tiny",
                "hf:./cache",
                "torchvision:resnet18?weights=IMAGENET1K_V1",
                "timm:resnet18?weights=a1_in1k",
            ),
            *(
                "timm:hf-hub:timm/resnet18.a1_in1k",
                "softcache:textcnn?vocabulary=../outside/precious",
                "softcache:../mine",
            ),
            *("softcache:mlp?hidden=1000000000", "softcache:mlp?hidden=4,4,4,4", "softcache:wrn?depth=1000000&width=1"),
            *(
                "softcache:encoder?layers=1000000000",
                "softcache:mlp?hidden=99999999999999999999",
                "softcache:mlp?scale=nan",
            ),
            *(
                "softcache:mlp?in_features=1000000000",
                "softcache:cnn?width=16000000",
                "softcache:nothing",
                "",
                "?",
                ":",
                "a" * 5000,
            ),
            *(
                "softcache:mlp?hidden=4&num_classes=1000000000",
                "\x1b[31mred:\x1b]0;title\x07",
                "softcache:mlp?\x1b[2J=1",
            ),
        )
    },
    "num_classes of a billion": model(num_classes=10**9),
    "num_classes of text": model(num_classes="3"),
    "class names with escapes": model(class_names=["\x1b[31mred", "\x1b]0;t\x07", "b\u202ec"]),
    "class names of numbers": model(class_names=[1, 2, 3]),
    "an input shape of a billion": model(input_shape=[10**5, 10**5]),
    "an input shape of many axes": model(input_shape=[1] * 1000),
    "an input of nothing": model(input={}),
    "an input of another kind": model(input={"kind": "image", "channels": "x", "mean": "y"}),
    "an input of a million means": model(
        input={"kind": "vector", "features": None, "mean": [0.5] * 10**6, "std": [0.5], "scale": 1.0}
    ),
    "a vocabulary of numbers": model(vocabulary=[1, 2]),
    "a graft of a billion": model(
        graft={
            "layer": "1",
            "head": "3",
            "classes": 10**9,
            "width": 10**9,
            "bias": False,
            "projector": {"student_shape": [10**5], "teacher_shape": [10**5], "factor": 1},
        }
    ),
    "a graft elsewhere": model(
        graft={
            "layer": "2",
            "head": "2",
            "classes": 3,
            "width": 4,
            "bias": False,
            "projector": {"student_shape": [4], "teacher_shape": [4], "factor": 1},
        }
    ),
    "a graft of text": model(graft={"layer": 1}),
    "a policy that is code": told(
        softcache_policy=json.dumps([{"name": "seeded", "version": 1, "parameters": {"transform": "mine.py:darker"}}])
    ),
    "a policy of nothing": told(softcache_policy="{}"),
    "a policy that is deep": told(softcache_policy="[" * 100_000),
    "a newer format": told(softcache_format="99", softcache_version="9.0.0; rm -rf"),
    "transformers: code of its own": transformer(auto_map={"AutoModelForSequenceClassification": "a/b--modeling.Net"}),
    "transformers: attention of a hub": transformer(_attn_implementation="kernels-community/flash-attn"),
    "transformers: attention of a hub, inside": transformer(
        text_config={"attn_implementation": "kernels-community/flash-attn"}
    ),
    "transformers: a quantiser": transformer(
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
    ),
    "transformers: a billion wide": transformer(hidden_size=10**9, num_attention_heads=1),
    "transformers: a billion layers": transformer(num_hidden_layers=10**9),
    "transformers: a million words": transformer(vocab_size=2**30),
    "transformers: a path": transformer(hidden_act="../outside/precious"),
    "transformers: no model": transformer(model_type="\x1b[31mnone"),
}


class Marks:
    """What a pickle calls when it is loaded as code."""

    def __init__(self, outside: Path) -> None:
        self.outside = outside

    def __reduce__(self) -> Any:
        return os.mknod, (str(self.outside / "called-pickle"),)


def pickled(path: Path, outside: Path) -> None:
    torch.save({"net": Marks(outside), "progress": {}, "random": [{}]}, path)


def bare_pickle(path: Path, outside: Path) -> None:
    path.write_bytes(pickle.dumps(Marks(outside)))


def checkpoint(change: Callable[[dict[str, Any]], None]) -> Attack:
    """A checkpoint that says something else, with a digest that fits."""

    def attack(path: Path, outside: Path) -> None:
        from softcache.models.seal import digest

        state = torch.load(path, weights_only=True)
        state.pop("digest")
        change(state)
        state["digest"] = digest(state)
        torch.save(state, path)

    return attack


def beginning(saved: dict[str, Any], **changes: Any) -> None:
    """Of a run that has everything before it, and something else in its optimiser."""
    saved["progress"].update(stage=0, epoch=0, step=0, metrics=[])
    saved["optimizer"].update(changes)


def stretched(path: Path, outside: Path) -> None:
    state = torch.load(path, weights_only=True)
    state["net"]["0.weight"] = torch.zeros(1).expand(10**6, 10**6)
    torch.save(state, path)


CHECKPOINTS: dict[str, Attack] = {
    "code in a pickle": pickled,
    "a bare pickle": bare_pickle,
    "a tensor of a terabyte": stretched,
    "a newer format": checkpoint(lambda state: state.update(format=99)),
    "a position of text": checkpoint(lambda state: state["progress"].update(step="x")),
    "a position far away": checkpoint(lambda state: state["progress"].update(stage=10**9)),
    "a position without metrics": checkpoint(lambda state: state["progress"].update(stage=10**9, metrics=[])),
    "metrics without numbers": checkpoint(
        lambda state: state["progress"].update(stage=0, epoch=0, step=0, metrics=[{"epoch": 0, "eval_top1": "x"}])
    ),
    "sums of many numbers": checkpoint(lambda state: state["progress"].update(sums=[{"loss": torch.zeros(3)}])),
    "metrics of text": checkpoint(lambda state: state["progress"].update(metrics=["x"])),
    "metrics with escapes": checkpoint(
        lambda state: state["progress"].update(metrics=[{"epoch": 0, "\x1b[31m": 1.0, "loss": "\x1b"}])
    ),
    "random states of nothing": checkpoint(lambda state: state.update(random=[{}])),
    "random states of text": checkpoint(
        lambda state: state.update(random=[dict.fromkeys(("torch", "cuda", "numpy", "python"), "x")])
    ),
    "an optimiser of nothing": checkpoint(lambda state: state.update(optimizer={})),
    "an optimiser of another shape": checkpoint(
        lambda state: beginning(state, state={0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(1)}})
    ),
    "an optimiser of text": checkpoint(lambda state: beginning(state, param_groups=[{"params": ["x"], "lr": "x"}])),
    "an optimiser of one group too many": checkpoint(
        lambda state: beginning(state, param_groups=state["optimizer"]["param_groups"] * 2)
    ),
    "a network of nothing": checkpoint(lambda state: state.update(net={})),
    "a network of text": checkpoint(lambda state: state.update(net="x")),
}


def document(data: Any) -> Attack:
    def attack(path: Path, outside: Path) -> None:
        remove(path)
        path.write_text(data if isinstance(data, str) else json.dumps(data))

    return attack


def changed(**changes: Any) -> Attack:
    def attack(path: Path, outside: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return attack


DOCUMENTS: dict[str, Mapping[str, Attack]] = {
    "student.safetensors": SPECS,
    "best.safetensors": {"a newer format": SPECS["a newer format"], "a spec of code": SPECS["spec mine.py:net"]},
    "checkpoint.pt": CHECKPOINTS,
    "run.json": {
        "no object": document([1]),
        "a newer format": changed(format=99, softcache="9.9"),
        "a format of text": changed(format="\x1b[31m"),
        "config of a number": changed(config=3),
        "cache of a list": changed(cache=["\x1b[31m"]),
        "data of a number": changed(data=3),
        "other settings with escapes": changed(config={"data": "\x1b[31mred\x1b[0m", "student": "x"}),
    },
    "config.toml": {
        "an evaluation set that is code": document('eval_data = "mine.py:images"\n'),
        "an evaluation set elsewhere": document('eval_data = "tsv:../outside/precious"\n'),
        "an evaluation set of a hub": document('eval_data = "torchvision:MNIST?root=new&download=true"\n'),
        "an evaluation set with escapes": document('eval_data = "\\u001b[31mred"\n'),
        "an evaluation set of numbers": document("eval_data = 3\n"),
    },
    "provenance.json": {
        "data that is code": document({"command": {"data": "mine.py:images", "teacher": ["mine.py:net"]}}),
        "data elsewhere": document(
            {"command": {"data": "imagefolder:../outside/full", "teacher": ["../outside/precious"]}}
        ),
        "data of a hub": document(
            {"command": {"data": "torchvision:MNIST?root=new", "teacher": ["torchvision:resnet18@IMAGENET1K_V1"]}}
        ),
        "samples elsewhere": document(
            {"command": {"data": "digits", "samples": "../outside/precious", "teacher": ["hf:a/b"]}}
        ),
        "numbers": document({"command": {"data": 3, "teacher": 4, "keep_labels": 5, "samples": []}}),
        "lists in lists": document({"command": {"data": ["x"], "teacher": [["x"]], "keep_labels": [[1]]}}),
        "escapes": document({"command": {"data": "\x1b[31mred"}, "finished": "\x1b[31mred", "host": "\x1b]0;t\x07"}),
        "no object": document([1, 2]),
    },
}


def cases() -> Iterator[tuple[str, str, Attack, str]]:
    """(verb, file, attack, its name)."""
    for root, files, left, verbs in (
        ("run", RUN_FILES, RUN_LEFT, OF_RUNS),
        ("cache", CACHE_FILES, CACHE_LEFT, OF_CACHES),
    ):
        for file in (*files, *left):
            foreign = DOCUMENTS.get(Path(file).name, {})
            for name, attack in {**ATTACKS, **foreign}.items():
                for verb in OPENED_BY.get(file, verbs):
                    yield verb, f"{root}/{file}", attack, name


def tried(folder: Path, *, every: int = 1, only: str = "*") -> Iterator[Outcome]:
    """The cases, or one in `every`, in a world that `make_world` has made in `folder`."""
    for verb, file, attack, name in list(cases())[::every]:
        case = f"{verb}: {file}: {name}"
        if not fnmatch.fnmatch(case, only):
            continue
        with copy_of(folder) as place:
            path = place / file
            if path.name == "ID.json":
                path = next((place / "cache/manifests").glob("*.json"))
            if not path.parent.is_dir():
                path.parent.mkdir(parents=True)
            attack(path, folder / "outside")
            if verb in ("repair", "repair by a teacher", "repair from a copy"):
                _damage(place / "cache")
            outcome = judge(case, words_of(verb), place, folder / "outside")
            if name == "link to a copy" and verb in READ_BY.get(file, ()) and outcome.code == 0:
                outcome = replace(outcome, faults=[*outcome.faults, "outside touched: read through a link"])
            yield outcome


def _damage(cache: Path) -> None:
    """Something for a repair to do."""
    path = cache / "members/run/part-00000.h5"
    if path.is_file() and not path.is_symlink() and 2**24 > path.stat().st_size > 100 and path.stat().st_nlink == 1:
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            file.write(b"damaged")


def judged(outcomes: Sequence[Outcome]) -> list[str]:
    """A table: how many, and of what kind their faults are."""
    kinds = ("code run", "outside touched", "network asked", "traceback", "escapes", "something else", "seconds")
    lines = [
        f"{len(outcomes)} cases, {sum(o.code == 0 for o in outcomes)} went on, {sum(o.code != 0 for o in outcomes)} were refused"
    ]
    for kind in kinds:
        count = sum(any(fault.startswith(kind) for fault in o.faults) for o in outcomes)
        lines.append(f"{kind:<16} {count}")
    return lines

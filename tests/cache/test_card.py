"""The card says what the manifest says, in words for a stranger; nothing from outside can break it, and its commands work."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import WORLDS, QuickDump
from words_cache import NAMES, sentences

import softcache
from softcache import cli
from softcache.cache.card import card
from softcache.cache.card import croissant as croissant_module
from softcache.cache.card.croissant import croissant
from softcache.cache.card.front_matter import front_matter, size_category
from softcache.cache.card.preview_columns import preview_columns
from softcache.cache.card.teachers import record_bytes
from softcache.cache.manifest import Manifest, read_manifest
from softcache.cache.plan import IndexInfo, Plan
from softcache.data.transfer_set import open_transfer_set
from softcache.share import subset
from softcache.spec import load_user_file

GOLDEN = Path(__file__).parents[1] / "golden"
CROPPED = ("crop_flip:padding=1",)


@pytest.fixture
def more(tmp_path: Path) -> str:
    path = tmp_path / "folder of the maker" / "more.py"
    path.parent.mkdir()
    shutil.copy(WORLDS / "few_labels.py", path)
    return str(path)


def written(cache: softcache.Cache) -> str:
    """The card as it lies in the cache: what the manifest alone gives."""
    text = (cache.reader.path / "README.md").read_text(encoding="utf-8")
    assert text == card(cache.manifest)
    return text


def tables(text: str) -> list[list[list[str]]]:
    """The cells of every table: a pipe that is not escaped ends a cell."""
    found: list[list[list[str]]] = []
    before = ""
    for line in text.splitlines():
        if line.startswith("|"):
            if not before.startswith("|"):
                found.append([])
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))])
        before = line
    return found


def row(text: str, first: str) -> dict[str, str]:
    """A row of a table by its first cell: header -> cell."""
    for header, _, *rows in tables(text):
        for cells in rows:
            if cells[0] == first:
                return dict(zip(header, cells, strict=True))
    raise AssertionError(f"no row {first!r} in\n{text}")


def section(text: str, title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert found is not None, title
    return found[1]


# ------------------------------------------------------------------------------------------------------ what it says


def test_the_card_of_a_labelled_cache(quick_dump: QuickDump, toy: Path) -> None:
    teachers = [f"{toy}:network?name=first", f"{toy}:network?seed=3&name=second"]
    cache = quick_dump(
        teacher=teachers, codec="int8", policy=CROPPED, views=2, view_seed=11, license="CC-BY-4.0", max_kl=0.1
    )
    text, s = written(cache), cache.manifest.statistics["second"]
    assert re.match(r"(?s)---\n.*?\n---\n\n# Soft targets for `toy.py:images`\n", text)
    assert "answers of 2 trained models (the teachers) to 40 samples,\neach seen 2 times, each time under" in text
    assert section(text, "Licence").startswith("\nCC-BY-4.0, as stated by whoever made this cache.")
    found = row(text, "second")
    assert found["model"] == "`toy.py:network?seed=3`" and found["gives"] == "logits" and found["codec"] == "int8"
    assert found["a logit is off by at most"] == f"{s.max_eps:.3g}"
    assert found["KL at T=1 / 4, mean"] == f"{s.mean_kl('1'):.2g} / {s.mean_kl('4'):.2g} nats"
    assert s.agreement is not None and found["largest class kept"] == f"{100 * s.agreement:.2f} %"
    assert s.accuracy is not None and found["top-1 on labelled samples"] == f"{100 * s.accuracy:.2f} %"
    assert found["mean entropy"] == f"{s.entropy:.4f} nats" and found != row(text, "first")
    assert found["bytes a record"] == "14.0" == f"{record_bytes(cache.manifest, 'second'):,.1f}"  # 2 x 4 + 4 + 2
    said = section(text, "Teachers")
    for member in cache.manifest.plan.members:
        assert f"Fingerprint of its weights: `{member.fingerprint}`" in said
    assert "KL was measured on 64 of 80 records here" in said
    assert "KL at T=4.0 is at most 0.1 nats" in said and "every logit in 8 bits" in said
    said = section(text, "Transfer set")
    assert "Source, as the teachers were given it: `toy.py:images`, 40 samples" in said
    assert "(4): ant, bee, cat, dog\n" in said and "Labels: of all samples" in said
    assert "Names of the samples: stored" in said and "over its decoded item" in said
    assert cache.manifest.plan.samples.fingerprint in said
    said = section(text, "Views")
    assert "2 of each sample. In order: padded, cropped and mirrored at random (`crop_flip:flip=0.5,padding=1`)" in said
    assert "root seed 11" in said and "bit for bit" in said and "as view" not in said
    made = cache.manifest.plan.made_with
    said = section(text, "What made it")
    assert f"torch {made['torch']}" in said and f"{made['batch_size']} samples a call" in said
    assert "larger cache" not in said and "## Features" not in text


def test_the_id_that_it_tells_to_compare(quick_dump: QuickDump) -> None:
    cache = quick_dump()
    data = (cache.reader.path / "manifest.json").read_bytes()
    said = section(written(cache), "How to check it")
    assert f"`{hashlib.sha256(data).hexdigest()}`" in said and "sha256sum manifest.json" in said
    assert row(written(cache), "id")[""] == f"`{cache.id}`"
    said = section(written(cache), "How to use it")
    assert (
        f"\n    softcache pull URL@{cache.id[:16]} caches/here\n" in said
        and f"`URL@{cache.id[:16]}` stands for" in said
    )


def test_without_a_licence_it_says_what_that_means(quick_dump: QuickDump) -> None:
    text = written(quick_dump())
    assert yaml.safe_load(text.split("---\n")[1])["license"] == "unknown"
    assert "Not stated: whoever made this cache did not say what others may do with it. Ask" in section(text, "Licence")
    assert "Every teacher saw each sample as it is." in section(text, "Views")


@pytest.mark.parametrize(
    ("license", "identifier"),
    [
        ("cc-by-4.0", "cc-by-4.0"),
        ("Apache-2.0", "apache-2.0"),
        ("for my team only", "other"),
        ('a"b', "other"),
        ("mit\n---\nevil: true", "other"),
        ("yes", "yes"),  # quoted: not a boolean
        ("§ 1", "other"),
    ],
)
def test_front_matter_holds_any_licence(quick_dump: QuickDump, license: str, identifier: str) -> None:
    text = written(quick_dump(license=license))
    head, about, rest = text.split("---\n", 2)
    assert head == "" and yaml.safe_load(about)["license"] == identifier
    assert section(rest, "Licence").strip().startswith(" ".join(license.split()).replace("---", "---"))


def test_unlabelled_samples_and_a_long_list_of_classes(quick_dump: QuickDump, toy: Path, more: str) -> None:
    text = written(quick_dump(data=f"{more}:unlabelled", teacher=[f"{toy}:network"], no_keys=True))
    assert row(text, "network")["top-1 on labelled samples"] == "no labels"
    said = section(text, "Transfer set")
    assert "Labels: none: the samples are unlabelled" in said
    assert "(50): kind 0, kind 1, " in said and "kind 19, and 30 more (`class_names` in `manifest.json`)" in said
    assert "kind 20" not in text
    assert "not stored, only their 64-bit hashes" in said and "who guesses a name can confirm it" in said


def test_some_samples_labelled(quick_dump: QuickDump, toy: Path, more: str) -> None:
    data = f"{more}:unlabelled?classes=4"
    cache = quick_dump(data=data, teacher=[f"{toy}:network"], policy=CROPPED, views=3)
    assert "Labels: of 10 of 40 samples" in section(written(cache), "Transfer set")


def test_several_labels_per_sample(quick_dump: QuickDump, toy: Path) -> None:
    text = written(quick_dump(data=f"{toy}:images?multi_label=true"))
    assert "Labels: several classes per sample" in section(text, "Transfer set")
    found = row(text, "exact")
    assert found["KL at T=1 / 4, mean"] == found["largest class kept"] == found["mean entropy"] == "not measured"
    assert found["top-1 on labelled samples"] == "several labels: not counted"
    assert "KL was not measured" in section(text, "Teachers") and "--loss bce " in text


def test_features_and_rows_kept_whole(quick_dump: QuickDump, toy: Path) -> None:
    cache = quick_dump(teacher=[f"{toy}:network"], features=("1:flatten,2:sign",), feature_dtype="int8")
    text, errors = written(cache), cache.manifest.statistics["network"].feature_errors
    header, _, first, second = next(one for one in tables(text) if "module and reduction" in one[0])
    assert first == ["network", "`1:flatten`", "flatten", "int8", "32", f"{errors['1:flatten']:.2g}"]
    assert second[1:3] == ["`2:sign`", "sign"] and header[-1] == "worst relative error"
    assert "and what some of their inner layers computed" in text


def test_a_codec_without_a_bound(quick_dump: QuickDump) -> None:
    text = written(quick_dump(codec="topk:k=2"))
    found = row(text, "exact")
    assert (found["codec"], found["a logit is off by at most"]) == ("topk:k=2", "none")
    assert "the largest logits only" in section(text, "Teachers") and "--loss kd_lower_bound:temperature=4 " in text


def test_the_card_of_a_subset(quick_dump: QuickDump, tmp_path: Path) -> None:
    parent = quick_dump(policy=CROPPED, views=3, codec="int8")
    subset.run(parent.reader.path, tmp_path / "child", subset.Choice(views="1-2", keep_labels=("0-2",)), quiet=True)
    child = softcache.open(tmp_path / "child")
    text, s = written(child), parent.manifest.statistics["exact"]
    assert f"larger cache `{parent.id}`" in section(text, "What made it")
    assert "View 0 of this cache is rendered as view 1 of that policy" in section(text, "Views")
    assert row(text, "exact")["KL at T=1 / 4, mean"] == f"{s.mean_kl('1'):.2g} / {s.mean_kl('4'):.2g} nats"
    assert "measured on 96 of 120 records in the cache that this one was taken out of" in section(text, "Teachers")
    assert f"to {len(child)} samples,\neach seen 2 times" in text


def test_an_extended_cache(quick_dump: QuickDump) -> None:
    quick_dump(policy=CROPPED, views=1)
    text = written(quick_dump(extend=True, codec=None, views=2))
    assert "Extended 1 times since" in section(text, "What made it") and "each seen 2 times" in text


def test_no_folder_of_the_maker_is_told(quick_dump: QuickDump, toy: Path, more: str, tmp_path: Path) -> None:
    cache = quick_dump(
        data=f"{more}:unlabelled", teacher=[f"{toy}:network"], policy=(f"{more}:inverted", "shift"), views=2
    )
    text = written(cache)
    assert "`more.py:inverted`" in section(text, "Views") and "maker's own transform" in section(text, "Views")
    assert "folder of the maker" not in text and str(tmp_path) not in text and str(toy.parent) not in text


# --------------------------------------------------------------------------------------------- what comes from outside

HOSTILE = (
    "a|b",
    "<script>alert(1)</script>",
    "x](http://evil.example) [y",
    "**bold** `code` _it_ ~~no~~ $x$",
    "one\n\n# Two\n\n| three | four |",
    "\u202eright to left\u202c\u200b",
    "&lt;img src=x&gt;",
    "",
    "\\|escaped",
    "w" * 1000,
)


def hostile(manifest: Manifest, text: str) -> Manifest:
    """The same cache, with `text` wherever a manifest takes any string."""
    plan = manifest.plan
    codec = {**plan.members[0].codec, "parameters": {"k": text}}
    features = tuple(replace(f, name=text, stored=text, dtype=text) for f in plan.members[0].features)
    member = replace(plan.members[0], model=text, fingerprint=text, compute_dtype=text, codec=codec, features=features)
    made_with = {key: text if isinstance(value, str) else value for key, value in plan.made_with.items()}
    views = replace(plan.views, steps=[{"name": text, "version": 1, "parameters": {text: text}}])
    return replace(
        manifest,
        plan=replace(
            plan,
            samples=replace(plan.samples, source=text, fingerprint=text),
            class_names=(text, "dog"),
            views=views,
            members=(member,),
            rounds=tuple(replace(one, made_with=made_with) for one in plan.rounds),
            license=text,
        ),
    )


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_text_from_outside_breaks_the_card(quick_dump: QuickDump, toy: Path, text: str) -> None:
    honest = quick_dump(teacher=[f"{toy}:network"], features=("1:flatten",), policy=CROPPED, license="x").manifest
    calm = card(hostile(honest, "calm"))
    found = card(hostile(honest, text))
    widths = [[len(cells) for cells in table] for table in tables(found)]
    assert widths == [[len(cells) for cells in table] for table in tables(calm)]
    outline = r"(?m)^(#.*|```.*|---|- |    \S+)"
    assert [line[:5] for line in re.findall(outline, found)] == [line[:5] for line in re.findall(outline, calm)]
    prose = re.sub(r"(?ms)^```python.*?^```$|`[^`\n]+`", "", found.split("\n---\n", 1)[1])  # in code, nothing is markup
    assert "<" not in prose and "&lt;img" not in prose
    assert not re.search(r"(?<!\\)[\[\]$~`]", prose)
    assert "\u202e" not in found and "\u200b" not in found
    assert max(map(len, found.splitlines())) < 2500
    heads = [page.split("\n---\n")[0].removeprefix("---\n") for page in (calm, found)]
    about, expected = (yaml.safe_load(head) for head in heads)
    assert list(about) == list(expected) and len(heads[0].splitlines()) == len(heads[1].splitlines())
    assert about["pretty_name"].startswith("Soft targets for") and all(c.isprintable() for c in about["pretty_name"])


def test_names_that_are_harmless_stand_as_they_are(quick_dump: QuickDump) -> None:
    manifest = quick_dump().manifest
    names = ("great_white_shark", "naïve café", "東京", "C++ (2011)", "R&D")
    found = card(replace(manifest, plan=replace(manifest.plan, class_names=names)))
    assert "(5): great_white_shark, naïve café, 東京, C++ (2011), R&amp;D\n" in found


# ------------------------------------------------------------------------------------------------ what it tells to do

USES: list[Any] = [
    pytest.param({}, id="one teacher"),
    pytest.param({"policy": CROPPED, "views": 2, "teacher": ("exact", "exact?seed=5&name=b")}, id="ensemble, views"),
    pytest.param({"codec": "topk:k=2"}, id="topk"),
    pytest.param({"policy": (*CROPPED, "mixup"), "views": 2}, id="mixing"),
    pytest.param({"data": "images?multi_label=true"}, id="several labels"),
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", USES)
def test_the_loop_and_the_command_of_the_card_work(
    quick_dump: QuickDump, toy: Path, tmp_path: Path, settings: Mapping[str, Any]
) -> None:
    data = f"{toy}:{settings.get('data', 'images')}"
    teachers: Sequence[str] = [f"{toy}:{one}" for one in settings.get("teacher", ("exact",))]
    cache = quick_dump(**{**settings, "data": data, "teacher": teachers})
    text = written(cache)
    (loop,) = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    loop = loop.replace("path/to/this/folder", str(cache.reader.path)).replace("range(20)", "range(2)")
    net = torch.nn.Linear(64, 4)
    losses: list[float] = []

    def student(images: torch.Tensor) -> torch.Tensor:
        return net(images.flatten(1).float() / 255)

    names = {"student": student, "data_set": open_transfer_set(data), "losses": losses}
    exec(loop + "\n        losses.append(loss.item())\n", names)  # the page's own code
    assert len(losses) == 2 and np.isfinite(losses).all()

    (command,) = re.findall(r"^    (softcache train .*)$", text, re.M)
    words = shlex.split(command)[1:]
    places = {
        "DATA": data,
        "MODEL": "softcache:mlp?hidden=4",
        ".": str(cache.reader.path),
        "runs/student": str(tmp_path / "r"),
    }
    argv = [places.get(word, word) for word in words]
    assert cli.main([*argv, "--epochs", "1", "--quiet", "--threads", "1"]) == 0
    (command,) = re.findall(r"^    (softcache verify .*)$", text, re.M)
    assert cli.main([places.get(word, word) for word in shlex.split(command)[1:]]) == 0
    (example,) = re.findall(r'h5py\.File\("(.*?)"\)', text)
    assert (cache.reader.path / example).is_file()


@pytest.mark.parametrize(
    ("output", "codec", "loss"),
    [
        ("", "float32", "kd(student_rows"),
        ("", "topk:k=5", "16 * kl_div("),
        ("&output=embedding", "float32", "cosine(student_rows"),
    ],
    ids=["logits", "topk", "vectors"],
)
def test_the_loop_of_the_card_meets_the_teachers_word_with_the_students(
    quick_dump: QuickDump, tmp_path: Path, output: str, codec: str, loss: str
) -> None:
    """Its student is the teacher itself, asked live: every loss is 0, and it is not where each word meets another one."""
    data = sentences(tmp_path / "s.jsonl")
    cache = quick_dump(data=data, teacher=[f"{WORLDS / 'words.py'}:tagger?seed=1&scale=8&name=a{output}"], codec=codec)
    text = written(cache)
    assert f"to {len(cache)} samples,\neach seen once, with an answer for each of its words; " in text
    assert "Labels: of the words of the samples\n" in text and "images" not in text
    assert ("top-1 on labelled words" in text) == (not output) and "labelled samples" not in text
    (loop,) = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    loop = loop.replace("path/to/this/folder", str(cache.reader.path)).replace("range(20)", "range(1)")
    assert f"loss = {loss}" in loop
    network = load_user_file(WORLDS / "words.py").tagger(len(NAMES), 1, scale=8.0)
    losses: dict[int, list[float]] = {0: [], 1: []}
    for shift, found in losses.items():

        def student(batch: Sequence[Sequence[str]], shift: int = shift) -> torch.Tensor:
            rows = network([words for words in batch if words]).detach().roll(shift, dims=0)
            return torch.nn.utils.rnn.pad_sequence(list(rows.split([*map(len, batch)])), batch_first=True)

        names = {"student": student, "data_set": open_transfer_set(data), "losses": found}
        exec(loop + "\n        losses.append(loss.item())\n", names)  # the page's own code
    assert len(losses[0]) == len(losses[1]) == 3
    assert max(map(abs, losses[0])) < 1e-3 < 1e-2 < min(losses[1])


# ---------------------------------------------------------------------------------------------------- what a hub reads

PLANS: list[Any] = [
    pytest.param({"source": "digits"}, ["image-classification"], id="images"),
    pytest.param({"source": "team.data:sets", "steps": ["shift"]}, ["image-classification"], id="views of images"),
    pytest.param({"source": "table:reviews.csv?text=body"}, ["text-classification"], id="texts"),
    pytest.param({"source": "conll:train.conll", "index": "words"}, ["token-classification"], id="words"),
    pytest.param({"source": "imagefolder:train", "index": "grid"}, ["image-segmentation"], id="cells of images"),
    pytest.param({"source": "team.data:sets", "index": "frames"}, None, id="frames of something"),
    pytest.param({"source": "team.data:sets"}, None, id="nobody says what"),
    pytest.param({"source": "digits", "output": "embedding"}, ["image-feature-extraction"], id="embeddings of images"),
    pytest.param(
        {"source": "synthetic:texts", "output": "embedding"}, ["feature-extraction"], id="embeddings of texts"
    ),
    pytest.param({"source": "digits", "output": None}, ["image-feature-extraction"], id="features alone"),
    pytest.param({"source": "digits", "output": "values"}, None, id="values"),
]


def like(manifest: Manifest, source: str, steps: Sequence[str] = (), index: str | None = None, **member: Any) -> Plan:
    """Its plan, with what a card says of a task in it."""
    one = replace(manifest.plan.members[0], index=index, **member)
    views = replace(manifest.plan.views, steps=[{"name": name, "version": 1, "parameters": {}} for name in steps])
    samples = replace(manifest.plan.samples, source=source)
    indexes = (IndexInfo(index, index),) if index else ()
    return replace(manifest.plan, samples=samples, views=views, members=(one,), indexes=indexes)


@pytest.mark.parametrize(("settings", "tasks"), PLANS)
def test_the_task_is_what_the_plan_says_or_is_left_out(
    quick_dump: QuickDump, settings: Mapping[str, Any], tasks: list[str] | None
) -> None:
    about = read_front_matter(front_matter(like(quick_dump().manifest, **settings)))
    assert about.get("task_categories") == tasks
    assert about["tags"] == ["softcache", "knowledge-distillation", "soft-targets"] and "language" not in about
    assert about["viewer"] is False and "configs" not in about  # nothing here that a hub's viewer reads


@pytest.mark.parametrize(
    ("count", "category"),
    [
        (1, "n<1K"),
        (999, "n<1K"),
        (1000, "1K<n<10K"),
        (60_000, "10K<n<100K"),
        (1_281_167, "1M<n<10M"),
        (10**10, "10B<n<100B"),
    ],
)
def test_how_many_samples_there_are_as_hubs_say_it(count: int, category: str) -> None:
    assert size_category(count) == category


def test_languages_and_a_preview_in_front_matter(quick_dump: QuickDump) -> None:
    about = read_front_matter(front_matter(quick_dump().manifest.plan, ("en", "no"), "preview/ab.parquet"))
    assert about["language"] == ["en", "no"]  # quoted: YAML's own "no" is a boolean
    (config,) = about["configs"]
    assert config == {"config_name": "preview", "data_files": [{"split": "preview", "path": "preview/ab.parquet"}]}
    assert "viewer" not in about


def read_front_matter(text: str) -> dict[str, Any]:
    assert text.startswith("---\n") and text.endswith("\n---")
    found = yaml.safe_load(text[4:-4])
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("text", ["a: b", "---", "# no comment", '"', "- x", "{a}", "\ud800", "😀", "yes", "\u2028"])
def test_any_name_is_one_string_of_the_front_matter(quick_dump: QuickDump, text: str) -> None:
    about = read_front_matter(front_matter(like(quick_dump().manifest, source=f"{text}?x=1")))
    shown = "".join(c if c.isprintable() else " " for c in text)
    assert about["pretty_name"] == " ".join(f"Soft targets for {shown}?x=1".split())


# ---------------------------------------------------------------------------------------------------- what programs read


@pytest.mark.parametrize("cache", ["v1/extended", "indexed"])
def test_croissant_names_every_file_with_its_size_and_hash(cache: str) -> None:
    root = GOLDEN / cache
    manifest = read_manifest(root)
    made = json.loads(croissant(manifest))
    found = {one["@id"]: one for one in made["distribution"]}
    assert len(found) == len(made["distribution"])  # each has a name of its own
    listed = list(root.glob("files-*.json"))
    assert len(found) == 1 + len(manifest.files) + len(listed)
    for path, one in found.items():
        data = (root / path).read_bytes()
        assert one["contentUrl"] == path and one["contentSize"] == f"{len(data)} B"
        assert one["sha256"] == hashlib.sha256(data).hexdigest()
    assert made["version"] == manifest.id and made["license"] == "unknown" and "recordSet" not in made
    assert croissant(manifest) == croissant(manifest)


def test_croissant_of_very_many_files_names_their_lists_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(croissant_module, "MOST_FILES", 3)
    found = [one["@id"] for one in json.loads(croissant(read_manifest(GOLDEN / "indexed")))["distribution"]]
    assert found == ["manifest.json", *sorted(path.name for path in (GOLDEN / "indexed").glob("files-*.json"))]


def test_croissant_says_what_the_columns_of_a_preview_are() -> None:
    manifest, data = read_manifest(GOLDEN / "indexed"), b"some rows"
    made = json.loads(croissant(manifest, ("preview/x.parquet", data)))
    assert made["distribution"][-1]["sha256"] == hashlib.sha256(data).hexdigest()
    (records,) = made["recordSet"]
    fields = {field["source"]["extract"]["column"]: field for field in records["field"]}
    assert list(fields) == [column.name for column in preview_columns(manifest.plan)]
    assert {field["source"]["fileObject"]["@id"] for field in fields.values()} == {"preview/x.parquet"}
    assert fields["tagger_classes"]["dataType"] == "sc:Text" and fields["tagger_classes"]["repeated"] is True
    assert fields["sample"]["dataType"] == "sc:Text" and "repeated" not in fields["sample"]


def test_a_teacher_of_sentences_beside_one_of_their_words_has_a_task_of_its_own(quick_dump: QuickDump) -> None:
    plan = like(quick_dump().manifest, source="conll:train.conll", index="words")
    plan = replace(plan, members=(*plan.members, replace(plan.members[0], name="b", index=None)))
    assert read_front_matter(front_matter(plan))["task_categories"] == ["token-classification", "text-classification"]

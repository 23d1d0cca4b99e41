"""Dumps of teachers of words: records are the live teacher's, whatever the split; what does not fit is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORLDS, QuickDump
from words_cache import NAMES, sentences, write_cache

import softcache
from softcache import cli, dump
from softcache.cache.reader import CacheReader
from softcache.check import inspect, repair, verify
from softcache.config import DumpConfig, PlanConfig
from softcache.data.transfer_set import TransferSet, open_transfer_set
from softcache.dump import forecast
from softcache.errors import CodecRangeError, SoftcacheError
from softcache.share import subset
from softcache.spec import load_user_file

WORLD, ODD = WORLDS / "words.py", WORLDS / "odd_taggers.py"
QUIET = ["--quiet", "--threads", "1", "--workers", "0"]


def teacher(seed: int = 1, name: str = "a") -> str:
    return f"{WORLD}:tagger?seed={seed}&scale=8&name={name}"


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Forty sentences of up to nine words; two of them have none."""
    return sentences(tmp_path / "s.jsonl")


def live(found: TransferSet, seed: int = 1) -> list[torch.Tensor]:
    """(n, C) float32 of each sentence, asked alone."""
    network = load_user_file(WORLD).tagger(len(NAMES), seed, scale=8.0)
    with torch.no_grad():
        samples = [found[i][0] for i in range(len(found))]
        return [network([words]) if words else torch.empty(0, len(NAMES)) for words in samples]


def all_of(cache: softcache.Cache, keys: Sequence[str]) -> softcache.Targets:
    return cache.gather(cache.find(keys), np.zeros(len(keys), np.int64))


@pytest.mark.parametrize("order", ["permuted", "natural"])
@pytest.mark.parametrize("batch", [1, 7, 256])
def test_every_word_has_the_live_teachers_logits(quick_dump: QuickDump, data: str, order: str, batch: int) -> None:
    cache = quick_dump(data=data, teacher=[teacher()], order=order, batch_size=batch)
    found = open_transfer_set(data)
    assert found.positions is not None
    targets = all_of(cache, list(found.keys))
    wanted = live(found)
    torch.testing.assert_close(targets.flat("a"), torch.cat(wanted), rtol=1e-5, atol=1e-5)
    at = targets.at("a")
    assert at.counts.tolist() == [len(rows) for rows in wanted] and at.counts.tolist()[4] == 0
    assert at.labels is not None and at.labels.tolist() == found.positions.labels.tolist()
    (index,) = cache.manifest.plan.indexes
    assert (index.name, index.kind, index.labels, index.listed) == ("words", "words", True, False)
    assert cache.member("a").index == "words" and cache.manifest.plan.format == 2
    # counted by hand
    right = sum(int((z.argmax(1).numpy() == found.positions.of(i)).sum()) for i, z in enumerate(wanted))
    told = cache.manifest.statistics["a"]
    assert (told.records, told.correct) == (sum(map(len, wanted)), right)
    assert told.labelled == int((found.positions.labels >= 0).sum()) < told.records
    assert verify.run(cache.reader.path, full=True).faults == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "codec",
    ["float16", "int8", "topk:k=2", "headtail:k=2,bits=8", "int8:group=2"],
)
def test_codecs_hold_words_within_what_they_say(quick_dump: QuickDump, data: str, codec: str) -> None:
    cache = quick_dump(data=data, teacher=[teacher()], codec=codec)
    found = open_transfer_set(data)
    targets, wanted = all_of(cache, list(found.keys)), torch.cat(live(found))
    if codec.startswith("topk"):
        ids, logits, tail = targets.per_position("words").head("a", 1.0)
        best = wanted.log_softmax(1).topk(2)
        whole = torch.cat([logits, tail[:, None]], 1).logsumexp(1, keepdim=True)
        torch.testing.assert_close(logits - whole, best.values, rtol=0, atol=2e-2)
        assert torch.equal(ids, best.indices)
        return
    apart = (targets.flat("a") - wanted).abs().amax()
    assert float(apart) <= cache.manifest.statistics["a"].max_eps * 1.01 + 1e-6
    assert verify.run(cache.reader.path, full=True).faults == []


def test_the_linear_head_of_a_tagger_is_kept(quick_dump: QuickDump, data: str, tmp_path: Path) -> None:
    settings = ["--epochs", "1", "--optimizer", "adamw", "--lr", "0.01", *QUIET]
    tagger = "softcache:tagger?width=4&embedding=4"
    assert cli.main(["train", "--data", data, "--student", tagger, "--out", str(tmp_path / "t"), *settings]) == 0
    cache = quick_dump(data=data, teacher=[str(tmp_path / "t")], codec="linear_head:dtype=float16", out="head")
    exact = quick_dump(data=data, teacher=[str(tmp_path / "t")], out="exact")
    keys = list(open_transfer_set(data).keys)
    torch.testing.assert_close(all_of(cache, keys).flat("t"), all_of(exact, keys).flat("t"), rtol=2e-3, atol=2e-3)


def test_parts_of_a_dump_and_a_later_member_are_the_same_bytes(quick_dump: QuickDump, tmp_path: Path) -> None:
    data = sentences(tmp_path / "s.jsonl", count=300)
    given: dict[str, Any] = {"data": data, "shard_rows": 256, "batch_size": 50}
    both = quick_dump(teacher=[teacher(), teacher(2, "b")], out="both", **given)
    base = {**given, "teacher": (teacher(), teacher(2, "b")), "codec": "float32", "threads": 1, "workers": 0}
    for part in ("2/2", "1/2"):
        dump.run(DumpConfig(**base, out=str(tmp_path / "parts"), part=part), quiet=True)
    assert softcache.open(tmp_path / "parts").id == both.id
    quick_dump(teacher=[teacher()], out="grown", **given)
    grown = quick_dump(teacher=[teacher(2, "b")], out="grown", extend=True, **given)
    assert grown.manifest.plan.rounds[1].indexes == () and verify.run(grown.reader.path, full=True).faults == []
    keys = list(open_transfer_set(data).keys)
    assert torch.equal(all_of(grown, keys).flat("b"), all_of(both, keys).flat("b"))
    own, one = ([file.sha256 for file in cache.manifest.files_of("member", "b")] for cache in (grown, both))
    assert own == one and len(own) == 2


def test_a_dump_that_was_interrupted_goes_on(
    quick_dump: QuickDump, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = sentences(tmp_path / "s.jsonl", count=300)
    given: dict[str, Any] = {"data": data, "teacher": [teacher()], "shard_rows": 256, "batch_size": 50}
    whole = quick_dump(out="whole", **given)
    calls, encode = [], dump.flow.encode

    def stopping(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(dump.flow, "encode", stopping)
    with pytest.raises(KeyboardInterrupt):
        quick_dump(out="again", **given)
    monkeypatch.undo()
    assert quick_dump(out="again", **given).id == whole.id


def test_the_tags_must_be_those_that_a_dump_began_with(quick_dump: QuickDump, data: str, tmp_path: Path) -> None:
    quick_dump(data=data, teacher=[teacher()])
    file = tmp_path / "s.jsonl"
    lines = file.read_text().splitlines()
    for changed, message in (
        (
            lines[0].replace('"B-PER"', '"I-PER"'),
            "have words with other labels than this cache was started with: s.jsonl/000000",
        ),
        (
            '{"words": ["x"], "tags": ["O"]}',
            "1 of 40 checked views are not what the teacher saw: s.jsonl/000000",
        ),
    ):
        assert changed != lines[0]
        file.write_text("\n".join([changed, *lines[1:]]) + "\n")
        with pytest.raises(SoftcacheError, match=message):
            quick_dump(data=data, teacher=[teacher(2, "b")], extend=True)
    words = lines[0].split('"words": ["', 1)[1].split('"', 1)[0]
    file.write_text("\n".join([lines[0].replace(f'"{words}"', f'"{words}x"', 1), *lines[1:]]) + "\n")
    with pytest.raises(SoftcacheError, match=r"1 of 40 checked views are not what the teacher saw: s\.jsonl/000000"):
        quick_dump(data=data, teacher=[teacher(2, "b")], extend=True)


def test_words_are_not_added_to_a_cache_of_samples_nor_the_other_way_round(
    quick_dump: QuickDump, data: str, toy: Path
) -> None:
    quick_dump(out="pictures")
    with pytest.raises(SoftcacheError, match="its samples are words, and the cache has one answer for each sample"):
        quick_dump(data=data, teacher=[teacher()], out="pictures", extend=True)
    quick_dump(data=data, teacher=[teacher()], out="words")
    with pytest.raises(SoftcacheError, match="the cache has answers about words, and these samples are none"):
        quick_dump(out="words", extend=True)


def test_a_function_answers_about_lists_of_words(quick_dump: QuickDump, data: str) -> None:
    cache, found = quick_dump(data=data, teacher=[f"{ODD}:plain"]), open_transfer_set(data)
    wanted = np.concatenate([load_user_file(ODD).scores(found[i][0]) for i in range(len(found))])
    assert np.array_equal(all_of(cache, list(found.keys)).flat("plain").numpy(), wanted.astype(np.float32))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("padded", r"gave a result of shape \(38, 9, 5\)"),
        ("of samples", r"gave 38 rows for \d+ words.*odd_taggers.py"),
        ("not finite", r"not finite for \d+ words of this batch: s.jsonl/0000"),
        ("of the batch", r"gives other logits for the same samples in another batch"),
    ],
)
def test_answers_that_are_not_of_each_word_are_refused(
    quick_dump: QuickDump, data: str, how: str, message: str
) -> None:
    with pytest.raises(SoftcacheError, match=message):
        quick_dump(data=data, teacher=[f"{ODD}:odd?how={how}"])


def test_numbers_that_a_codec_cannot_hold_are_named_by_their_samples(quick_dump: QuickDump, data: str) -> None:
    with pytest.raises(CodecRangeError, match=r"for \d+ words of this batch: s.jsonl/0000\d\d"):
        quick_dump(data=data, teacher=[teacher().replace("scale=8", "scale=1e7")], codec="float16")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": ("hidden:flatten",)}, "features are of samples, and here words are asked about"),
        ({"keep_labels": ("O",)}, "here words have classes"),
        ({"policy": ("crop_flip",), "views": 2}, "a view policy needs uint8 images, got Words"),
        ({"format": "1"}, None),
    ],
)
def test_what_does_not_go_with_words(quick_dump: QuickDump, data: str, settings: Any, message: str | None) -> None:
    given = {"data": data, "teacher": [teacher()], **settings}
    if message is None:
        assert quick_dump(**given).manifest.plan.format == 2
        return
    with pytest.raises(SoftcacheError, match=message):
        quick_dump(**given)


def test_samples_that_a_tagger_cannot_answer_about_are_all_named(
    quick_dump: QuickDump, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tagger = "softcache:encoder_tagger?width=4&heads=1&hidden=4&layers=1&max_words=9"
    out = str(tmp_path / "t")
    assert cli.main(["train", "--data", data, "--student", tagger, "--out", out, "--epochs", "1", *QUIET]) == 0
    long = sentences(tmp_path / "long.jsonl", count=20, longest=12)
    found, misfits = open_transfer_set(long), tmp_path / "misfits.txt"
    assert found.positions is not None
    wanted = [found.keys[i] for i in np.flatnonzero(found.positions.counts > 9)]
    assert len(wanted) > 1
    with pytest.raises(SoftcacheError, match=f"{len(wanted)} of 20 samples cannot be used: {wanted[0]}") as caught:
        quick_dump(data=long, teacher=[out], misfits=str(misfits))
    assert "the model takes 9" in str(caught.value) and misfits.read_text().split() == wanted
    capsys.readouterr()
    again = ["--out", str(tmp_path / "again"), "--epochs", "1", *QUIET]
    assert cli.main(["train", "--data", long, "--student", tagger, *again]) == 2
    assert f"{len(wanted)} of 20 samples do not fit the student: {wanted[0]}, {wanted[1]}" in capsys.readouterr().err
    cache = quick_dump(data=long, teacher=[out], without=str(misfits), out="rest")
    assert len(cache) == 20 - len(wanted)


def test_a_plan_tells_the_size_that_a_dump_has(data: str, quick_dump: QuickDump) -> None:
    told = forecast.run(
        PlanConfig(data=data, teacher=(teacher(),), threads=1, workers=0, codec="int8"),
        quiet=True,
        codecs=("float16", "int8"),
        trial_rows=(20, 20),
    )
    cache = quick_dump(data=data, teacher=[teacher()], codec="int8")
    assert told.chosen == "int8" and told.choice.nbytes == cache.manifest.nbytes
    assert told.words == cache.manifest.statistics["a"].records and f"{told.words} words" in told.text()


@pytest.mark.parametrize(
    "file", ["samples.h5", "positions/words-r00000.h5", "members/a/part-00000.h5", "views/part-00000.h5"]
)
def test_each_damaged_file_is_made_again(quick_dump: QuickDump, data: str, file: str) -> None:
    cache = quick_dump(data=data, teacher=[teacher()])
    path, before = cache.reader.path, (cache.reader.path / file).read_bytes()
    (path / file).write_bytes(before[:-7] + b"damaged")
    done = repair.run(path, repair.Means(data=data, teachers=(teacher(),), workers=0), quiet=True)
    assert done.mended == [file] and done.left == {} and (path / file).read_bytes() == before
    other = shutil.copytree(path, path.with_name("other"))
    (path / file).unlink()
    done = repair.run(path, repair.Means(source=other), quiet=True)
    assert done.mended == [file] and verify.run(path, full=True).faults == []


def test_words_without_tags_and_a_teacher_that_names_its_classes(
    quick_dump: QuickDump, tmp_path: Path, data: str
) -> None:
    out = str(tmp_path / "t")
    tagger = "softcache:tagger?width=4&embedding=4"
    assert cli.main(["train", "--data", data, "--student", tagger, "--out", out, "--epochs", "1", *QUIET]) == 0
    bare = data.partition("?")[0] + "?words=words&tags=none"
    cache = quick_dump(data=bare, teacher=[out])
    assert cache.class_names == NAMES
    (index,) = cache.manifest.plan.indexes
    assert not index.labels and CacheReader(cache.reader.path).index("words").info == index
    assert cache.manifest.statistics["t"].labelled == 0


def test_of_vectors_of_words_no_loss_is_named_that_train_refuses(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither by the dump nor on the card, nor in a tip; beside a tagger its classes are learned."""
    vectors = f"{ODD}:odd?how=right&output=embedding"
    for name, teachers in {"alone": (vectors,), "both": (vectors, teacher())}.items():
        asked = [word for one in teachers for word in ("--teacher", one)]
        assert cli.main(["dump", "--data", data, *asked, "--out", str(tmp_path / name), *QUIET]) == 0
        said, card = capsys.readouterr().out, (tmp_path / name / "README.md").read_text()
        assert ("next: softcache train" in said) == (name == "both") == ("--loss kd:temperature=4" in card)
        assert "--loss cosine" not in said + card
        assert ("train learns of words their classes alone" in said) == (name == "alone")
    train = ["train", "--cache", str(tmp_path / "alone"), "--data", data, "--student", teacher(), *QUIET]
    assert cli.main([*train, "--out", str(tmp_path / "r")]) == 2
    assert "tip: dump a teacher that gives each word logits" in capsys.readouterr().err


def test_no_words_at_all_are_no_transfer_set(quick_dump: QuickDump, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text('{"words": [], "tags": []}\n' * 3)
    with pytest.raises(SoftcacheError, match="none of its 3 samples has a word"):
        quick_dump(
            data=f"table:{tmp_path}/none.jsonl?words=words&tags=tags&classes={','.join(NAMES)}", teacher=[teacher()]
        )


def test_the_report_counts_words(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = open_transfer_set(data)
    assert found.positions is not None
    code = cli.main(["dump", "--data", data, "--teacher", teacher(), "--out", str(tmp_path / "c"), *QUIET[1:]])
    told = capsys.readouterr().err
    labelled = int((found.positions.labels >= 0).sum())
    assert code == 0 and f"of {labelled} words" in told and "provisional: words\n" in told
    assert f"40 samples x 1 views, {len(found.positions.labels)} words" in told


def test_a_dump_of_words_is_the_cache_that_was_written_from_arrays(
    quick_dump: QuickDump, data: str, tmp_path: Path
) -> None:
    cache = quick_dump(data=data, teacher=[f"{teacher()}&double=true"])
    written = softcache.open(write_cache(tmp_path / "written", data))
    keys = list(open_transfer_set(data).keys)
    assert torch.equal(all_of(cache, keys).flat("a"), all_of(written, keys).flat("a"))
    assert cache.manifest.plan.samples.fingerprint == written.manifest.plan.samples.fingerprint


def test_the_words_of_a_sample_are_shown(quick_dump: QuickDump, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    cache, found = quick_dump(data=data, teacher=[teacher()]), open_transfer_set(data)
    path = str(cache.reader.path)
    assert cli.main(["inspect", path, "--sample", "s.jsonl/000002", "--json", "--quiet"]) == 0
    told = json.loads(capsys.readouterr().out)
    wanted, tags = live(found)[2].double().softmax(1), found[2][1]
    np.testing.assert_allclose(told["probabilities"]["a"], wanted.numpy(), atol=1e-6)
    assert told["labels"] == [NAMES[i] if i >= 0 else "none" for i in tags] and told["words"] == list(range(len(tags)))
    assert cli.main(["inspect", path, "--sample", "s.jsonl/000002", "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert (
        f"{len(tags)} words" in shown
        and f"{NAMES[int(wanted[0].argmax())]} {100 * float(wanted[0].max()):.2f} %" in shown
    )
    quick_dump(data=data, teacher=[teacher()], codec="topk:k=2", out="head")
    with pytest.raises(SoftcacheError, match="no member keeps every class of a word"):
        inspect.soft_target(path.replace("cache", "head"), "s.jsonl/000002")  # type: ignore[arg-type]


def test_a_cut_of_a_cache_of_words(quick_dump: QuickDump, data: str, tmp_path: Path) -> None:
    cache, found = quick_dump(data=data, teacher=[teacher()]), open_transfer_set(data)
    keys = [found.keys[i] for i in (3, 4, 20)]
    (tmp_path / "keys").write_text("\n".join(keys) + "\n")
    with pytest.raises(SoftcacheError, match="here words have classes"):
        subset.run(cache.reader.path, tmp_path / "cut", subset.Choice(keep_labels=("O",)), quiet=True)
    subset.run(cache.reader.path, tmp_path / "cut", subset.Choice(samples=tmp_path / "keys"), quiet=True)
    cut = softcache.open(tmp_path / "cut")
    assert torch.equal(all_of(cut, keys).flat("a"), all_of(cache, keys).flat("a"))

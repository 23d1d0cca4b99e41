"""Dumps of language models: records are the live model's, token by token; other tokens, masks and renderings are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORLDS, QuickDump
from token_world import count_of, live, save_model, save_tokenizer, write_texts

import softcache
from softcache import dump
from softcache.check import inspect, repair, verify
from softcache.config import DumpConfig
from softcache.data.transfer_set import TransferSet, open_transfer_set
from softcache.dump.row_batches import cut_rows
from softcache.errors import (
    ContentMismatchError,
    DataError,
    ModelError,
    RenderingError,
    SoftcacheError,
    TeacherError,
)
from softcache.models.language_model import TokenInput
from softcache.share import subset

WORLD = WORLDS / "language_models.py"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of three families, each with the same tokenizer; one whose head is wider than the vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("gpt2", "llama", "gemma2"):
        save_model(folder / kind, kind)
    save_model(folder / "wide", "llama", rows=301)
    return folder


@pytest.fixture
def docs(tmp_path: Path, models: Path) -> str:
    """Six texts in windows of eight tokens."""
    return spec(write_texts(tmp_path / "docs"), models / "gpt2")


def spec(path: Path, tokenizer: Path, **parameters: Any) -> str:
    more = {"window": 8, **parameters}
    return f"text:{path}?tokenizer={tokenizer}" + "".join(f"&{name}={value}" for name, value in more.items() if value)


def all_of(cache: softcache.Cache, data: TransferSet) -> softcache.Targets:
    return cache.gather(cache.find(list(data.keys)), np.zeros(len(data), np.int64))


def wanted(folder: Path, data: TransferSet, count: int) -> torch.Tensor:
    """(P, C) of the live model, text by text, row i where token i + 1 carries loss."""
    rows = []
    for number in range(len(data)):
        item, _ = data[number]
        at = [i for i in range(len(item) - 1) if item.trains[i + 1]]
        rows.append(live(folder, item.ids.tolist())[at, :count])
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("kind", "batch"),
    [
        ("gpt2", 3),
        pytest.param("llama", 256, marks=pytest.mark.slow),
        pytest.param("gemma2", 4, marks=pytest.mark.slow),
        pytest.param("wide", 256, marks=pytest.mark.slow),
    ],
)
def test_every_record_is_the_live_models(quick_dump: QuickDump, docs: str, models: Path, kind: str, batch: int) -> None:
    cache = quick_dump(data=docs, teacher=[f"hf:{models / kind}?name=a"], batch_size=batch)
    data = open_transfer_set(docs)
    count = count_of(models / kind / "tokenizer.json")
    given = wanted(models / kind, data, count)
    torch.testing.assert_close(all_of(cache, data).flat("a"), given, rtol=1e-4, atol=1e-4)
    at = all_of(cache, data).at("a")
    assert at.numbers.tolist() == [i for number in range(len(data)) for i in data[number][0].listed]
    told = cache.manifest.statistics["a"]
    following = torch.tensor([one for number in range(len(data)) for one in data[number][1]])
    assert (told.records, told.labelled) == (len(given), len(given))
    assert told.correct == int((given.argmax(1) == following).sum())
    plan = cache.manifest.plan
    (index,) = plan.indexes
    assert (index.name, index.kind, index.listed, index.labels) == ("tokens", "tokens", True, False)
    assert plan.views.digests == ["token_digests"] and plan.rendering == {
        "bos": "<s>",
        "eos": "</s>",
        "window": "8",
        "stride": "6",
    }
    assert plan.vocabulary is not None and plan.vocabulary["count"] == count == cache.num_classes
    assert cache.reader.tokenizer() == (models / "gpt2" / "tokenizer.json").read_bytes()
    assert verify.run(cache.reader.path, full=True).faults == []
    assert f"{count:,} ids" in inspect.report(cache.reader.path)


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["topk:k=8", "int8:group=64", "linear_head:dtype=float16"])
def test_codecs_hold_tokens(quick_dump: QuickDump, docs: str, models: Path, codec: str) -> None:
    cache = quick_dump(data=docs, teacher=[f"hf:{models / 'wide'}?name=a"], codec=codec)
    data = open_transfer_set(docs)
    given = wanted(models / "wide", data, cache.num_classes)
    if codec.startswith("topk"):
        best = given.log_softmax(1).topk(8)
        ids, logits, tail = all_of(cache, data).per_position("tokens").head("a", 1.0)
        kept = torch.cat([logits, tail[:, None]], 1).log_softmax(1)[:, :-1]
        assert torch.equal(ids, best.indices)
        torch.testing.assert_close(kept, best.values, rtol=0, atol=2e-2)
        return
    apart = float((all_of(cache, data).flat("a") - given).abs().amax())
    assert apart <= cache.manifest.statistics["a"].max_eps * 1.01 + 1e-4


def test_a_capped_head_is_no_linear_one(quick_dump: QuickDump, docs: str, models: Path) -> None:
    with pytest.raises(SoftcacheError, match="linear"):
        quick_dump(data=docs, teacher=[f"hf:{models / 'gemma2'}"], codec="linear_head:dtype=float16")


@pytest.mark.slow
def test_parts_a_later_member_and_a_subset_hold_the_same_records(
    quick_dump: QuickDump, tmp_path: Path, docs: str, models: Path
) -> None:
    teachers = (f"hf:{models / 'gpt2'}?name=a", f"hf:{models / 'llama'}?name=b")
    both = quick_dump(data=docs, teacher=list(teachers), out="both")
    base: dict[str, Any] = {"data": docs, "codec": "float32", "threads": 1, "workers": 0}
    for part in ("2/2", "1/2"):
        dump.run(DumpConfig(**base, teacher=teachers, out=str(tmp_path / "parts"), part=part), quiet=True)
    assert softcache.open(tmp_path / "parts").id == both.id
    quick_dump(data=docs, teacher=[teachers[0]], out="grown")
    grown = quick_dump(data=docs, teacher=[teachers[1]], out="grown", extend=True)
    data = open_transfer_set(docs)
    assert torch.equal(all_of(grown, data).flat("b"), all_of(both, data).flat("b"))
    keys = tmp_path / "keys.txt"
    keys.write_text("\n".join(list(data.keys)[2:5]))
    subset.run(both.reader.path, tmp_path / "few", subset.Choice(samples=keys), quiet=True)
    few, chosen = softcache.open(tmp_path / "few"), data.select(np.arange(2, 5))
    torch.testing.assert_close(all_of(few, chosen).flat("a"), all_of(both, chosen).flat("a"), rtol=0, atol=0)
    assert few.reader.tokenizer() == both.reader.tokenizer()
    assert len(few.join(chosen)) == 3 and verify.run(tmp_path / "few", full=True).faults == []


@pytest.mark.slow
def test_what_is_damaged_is_made_again(quick_dump: QuickDump, docs: str, models: Path) -> None:
    cache = quick_dump(data=docs, teacher=[f"hf:{models / 'gpt2'}?name=a"])
    path = cache.reader.path
    for name in ("tokenizer.json", "positions/tokens-r00000.h5", "members/a/part-00000.h5"):
        before = (path / name).read_bytes()
        (path / name).write_bytes(before[:-9] + b"?" * 9)
        assert verify.run(path, full=True).damaged == [name]
        done = repair.run(path, repair.Means(data=docs, teachers=(f"hf:{models / 'gpt2'}?name=a",)), quiet=True)
        assert done.mended == [name] and (path / name).read_bytes() == before


def altered(cache: Path, change: str, tmp_path: Path, models: Path) -> str:
    """The data of a cache, changed in one way."""
    texts, tokenizer = tmp_path / "docs", models / "gpt2"
    if change == "tokenizer":
        return spec(texts, save_tokenizer(tmp_path / "other", swap=True).parent)
    if change == "rendering":
        return spec(texts, tokenizer, eos="none")
    if change == "truncation":
        return spec(texts, tokenizer, max_tokens=5)
    if change == "reordered":
        one, other = texts / "t0.txt", texts / "deep" / "t5.txt"
        first, second = one.read_text(), other.read_text()
        one.write_text(second)
        other.write_text(first)
    if change == "repeated":
        (texts / "t4.txt").write_text((texts / "deep" / "t1.txt").read_text())
    return spec(texts, tokenizer)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ("tokenizer", RenderingError, "'x'"),
        ("rendering", RenderingError, "eos=none"),
        pytest.param("truncation", RenderingError, "max_tokens=5", marks=pytest.mark.slow),
        pytest.param("reordered", SoftcacheError, "t5.txt", marks=pytest.mark.slow),
        ("repeated", SoftcacheError, "t4.txt"),
    ],
)
def test_other_tokens_are_refused_by_name(
    quick_dump: QuickDump, tmp_path: Path, docs: str, models: Path, change: str, error: type[SoftcacheError], said: str
) -> None:
    cache = quick_dump(data=docs, teacher=[f"hf:{models / 'gpt2'}?name=a"])
    assert len(cache.join(open_transfer_set(docs))) == len(cache)
    data = altered(cache.reader.path, change, tmp_path, models)
    with pytest.raises(error) as found:
        cache.join(open_transfer_set(data))
    assert said in found.value.message
    with pytest.raises(SoftcacheError) as found:
        quick_dump(data=data, teacher=[f"hf:{models / 'llama'}?name=b"], out=cache.reader.path.name, extend=True)
    assert said in found.value.message


def test_another_mask_over_equal_tokens_is_refused(quick_dump: QuickDump, tmp_path: Path, models: Path) -> None:
    def data(prompt: str, completion: str) -> str:
        path = tmp_path / "p.jsonl"
        path.write_text(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
        return spec(path, models / "gpt2", window=0)

    cache = quick_dump(data=data("the cat", " sat on"), teacher=[f"hf:{models / 'gpt2'}?name=a"])
    with pytest.raises(ContentMismatchError, match=r"p\.jsonl/000000"):
        cache.join(open_transfer_set(data("the cat sat", " on")))
    with pytest.raises(ContentMismatchError, match="other tokens carry loss"):
        cache.join(open_transfer_set(data("the cat sat", " on")), check_content="none")


def test_a_tokenizer_that_only_reads_differently_is_told(
    quick_dump: QuickDump, tmp_path: Path, docs: str, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = quick_dump(data=docs, teacher=[f"hf:{models / 'gpt2'}?name=a"])
    again = save_tokenizer(tmp_path / "indented", indent=2).parent
    assert len(cache.join(open_transfer_set(spec(tmp_path / "docs", again)))) == len(cache)
    assert "reads differently from the cache's tokenizer.json" in capsys.readouterr().err


def test_teachers_that_do_not_fit_the_vocabulary_are_refused(
    quick_dump: QuickDump, tmp_path: Path, docs: str, models: Path
) -> None:
    with pytest.raises(ModelError, match="its head gives 280 numbers"):
        quick_dump(data=docs, teacher=[f"hf:{save_model(tmp_path / 'narrow', rows=280)}"])
    other = shutil.copytree(models / "gpt2", tmp_path / "swapped")
    save_tokenizer(other, swap=True)
    with pytest.raises(ModelError, match="has other tokens than"):
        quick_dump(data=docs, teacher=[f"hf:{other}"])
    long = spec(tmp_path / "docs", models / "gpt2", window=0)
    (tmp_path / "docs" / "long.txt").write_text(" the cat sat" * 40)
    with pytest.raises(DataError, match=r"long\.txt.*and the model takes 64"):
        quick_dump(data=long, teacher=[f"hf:{models / 'gpt2'}"])


@pytest.mark.slow
def test_factories_and_engines_are_asked_about_tokens(quick_dump: QuickDump, docs: str, models: Path) -> None:
    data = open_transfer_set(docs)
    cache = quick_dump(
        data=docs,
        teacher=[f"{WORLD}:module?folder={models / 'llama'}&name=m", f"{WORLD}:engine?folder={models / 'wide'}&name=e"],
    )
    for member, folder in (("m", "llama"), ("e", "wide")):
        given = wanted(models / folder, data, cache.num_classes)
        torch.testing.assert_close(all_of(cache, data).flat(member), given, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["padded", "stale"])
def test_a_teacher_whose_answers_depend_on_its_batch_is_refused(
    quick_dump: QuickDump, docs: str, models: Path, fault: str
) -> None:
    with pytest.raises(TeacherError, match=r"in another batch|alone than beside others"):
        quick_dump(data=docs, teacher=[f"{WORLD}:module?folder={models / 'llama'}&fault={fault}"])


@pytest.mark.parametrize(
    ("tokens", "most", "wanted"),
    [
        ([3, 4, 5], 7, [[0, 1], [2]]),
        ([9, 1, 1, 9], 2, [[0], [1, 2], [3]]),
        ([0, 0, 2], 2, [[0, 1, 2]]),
        ([2], 1, [[0]]),
        ([], 5, []),
    ],
)
def test_a_batch_has_so_many_tokens_at_most_and_one_row_at_least(
    tokens: list[int], most: int, wanted: list[list[int]]
) -> None:
    assert [list(cut) for cut in cut_rows(len(tokens), 100, np.array(tokens), most)] == wanted


def test_batches_of_tokens_change_nothing_but_rounding(
    quick_dump: QuickDump, docs: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = TokenInput.collate
    monkeypatch.setattr(
        TokenInput, "collate", lambda self, items: (seen.append(sum(map(len, items))), real(self, items))[1]
    )
    few = quick_dump(data=docs, teacher=[f"hf:{models / 'gpt2'}?name=a"], batch_tokens=16, out="few")
    assert max(seen) <= 16 and few.manifest.plan.made_with["batch_tokens"] == 16
    many = quick_dump(data=docs, teacher=[f"hf:{models / 'gpt2'}?name=a"], out="many")
    assert many.manifest.plan.made_with["batch_tokens"] == 16384
    data = open_transfer_set(docs)
    torch.testing.assert_close(all_of(few, data).flat("a"), all_of(many, data).flat("a"), rtol=1e-5, atol=1e-5)
    with pytest.raises(SoftcacheError, match="these samples are no tokens"):
        quick_dump(batch_tokens=16, out="images")

"""What differs between two caches is told as float64 formulas have it; what cannot be compared is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import QuickDump

import softcache
from softcache import cli
from softcache.errors import ConfigError, JoinError
from softcache.share import diff, subset

GOLDEN = Path(__file__).parents[1] / "golden"


def logits(cache: softcache.Cache, keys: list[str], view: int = 0) -> np.ndarray:
    rows = cache.find(keys)
    return cache.gather(rows, np.full(len(rows), view)).logits().numpy().astype(np.float64)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def keys_of(cache: softcache.Cache) -> list[str]:
    return [cache.samples.key(row) for row in range(len(cache))]


def test_teachers_are_as_far_apart_as_the_formula_says(quick_dump: QuickDump, toy: Path) -> None:
    a = quick_dump(out="a", teacher=[f"{toy}:exact?name=one"])
    b = quick_dump(out="b", teacher=[f"{toy}:exact?name=one&seed=3"], data=f"{toy}:images?count=30")
    found = diff.run(a.reader.path, b.reader.path, temperatures=(1.0, 3.0), quiet=True)
    assert found.samples == (30, 10, 0)
    keys = sorted(set(keys_of(a)) & set(keys_of(b)))
    x, y = logits(a, keys), logits(b, keys)
    (one,) = found.members
    assert one.agreement == np.mean(x.argmax(1) == y.argmax(1)) < 1
    for temperature in (1.0, 3.0):
        p, q = log_softmax(x / temperature), log_softmax(y / temperature)
        assert one.kl[f"{temperature:g}"] == pytest.approx((np.exp(p) * (p - q)).sum(1).mean(), rel=1e-9)
    each = (np.exp(log_softmax(x)) * (log_softmax(x) - log_softmax(y))).sum(1)
    order = np.argsort(-each)[:10]
    assert [key for key, _, _ in one.most] == [keys[i] for i in order]
    assert [far for *_, far in one.most] == pytest.approx(each[order].tolist(), rel=1e-9)
    where = {name for name, _, _ in found.fields}
    assert {"samples.count", "samples.fingerprint"} <= where
    assert not any(name.startswith("views") for name in where)


def test_views_meet_by_their_number_and_a_subset_is_the_same(quick_dump: QuickDump, tmp_path: Path) -> None:
    a = quick_dump(out="a", policy="shift:pixels=1", views=4)
    subset.run(a.reader.path, tmp_path / "b", subset.Choice(views="2-3"), quiet=True)
    b = softcache.open(tmp_path / "b")
    assert not np.array_equal(logits(a, keys_of(a)), logits(b, keys_of(a)))  # its first view is another one
    found = diff.run(a.reader.path, tmp_path / "b", quiet=True)
    assert (found.views, found.notes, found.relabelled, found.changed) == (2, [], 0, 0)
    assert found.members[0].kl == {"1": 0.0, "4": 0.0} and found.members[0].agreement == 1.0
    assert found.members[0].records == 2 * len(a)
    subset.run(a.reader.path, tmp_path / "c", subset.Choice(views="0"), quiet=True)
    found = diff.run(tmp_path / "c", tmp_path / "b", quiet=True)
    assert (found.views, found.members[0].records) == (0, 0)
    assert "other views" in found.notes[0]


def test_other_views_labels_and_contents_are_told(quick_dump: QuickDump, toy: Path, tmp_path: Path) -> None:
    a = quick_dump(out="a")
    b = quick_dump(out="b", data=f"{toy}:images?seed=5", policy="shift:pixels=1", views=2)
    found = diff.run(a.reader.path, b.reader.path, quiet=True)
    assert found.changed == len(a) and found.views == 1
    assert "may be of other pixels" in found.notes[0]
    labels = [cache.samples.labels_of(cache.find(keys_of(a))) for cache in (a, b)]
    assert found.relabelled == (labels[0] != labels[1]).sum()
    told = diff.text(a.reader.path, b.reader.path, found)
    assert f"{len(a)} another content" in told and "views.count" in told and "note: the views differ" in told


def test_several_labels_are_compared_by_their_own_kl(quick_dump: QuickDump, toy: Path) -> None:
    data = f"{toy}:images?multi_label=true"
    a = quick_dump(out="a", data=data, teacher=[f"{toy}:exact?name=one"])
    b = quick_dump(out="b", data=data, teacher=[f"{toy}:exact?name=two&seed=3"])
    (one,) = diff.run(a.reader.path, b.reader.path, temperatures=(1.0,), quiet=True).members
    x, y = logits(a, keys_of(a)), logits(b, keys_of(a))
    p = np.exp(-np.logaddexp(0, -x))
    kl = (p * (np.logaddexp(0, -y) - np.logaddexp(0, -x)) + (1 - p) * (np.logaddexp(0, y) - np.logaddexp(0, x))).sum(1)
    assert (one.a, one.b) == ("one", "two")  # the only ones
    assert one.kl["1"] == pytest.approx(kl.mean(), rel=1e-6)
    assert one.agreement == pytest.approx(np.mean((x > 0) == (y > 0)))


def test_vectors_are_compared_by_cosine_and_length(quick_dump: QuickDump, toy: Path) -> None:
    caches = [
        quick_dump(out=name, teacher=[f"{toy}:exact?name=one&seed={seed}&output=embedding"])
        for name, seed in (("a", 0), ("b", 3))
    ]
    (one,) = diff.run(caches[0].reader.path, caches[1].reader.path, quiet=True).members
    rows = caches[0].find(keys_of(caches[0]))
    x, y = (cache.gather(rows, np.zeros_like(rows)).embedding().numpy().astype(np.float64) for cache in caches)
    norm = np.linalg.norm
    assert one.cosine == pytest.approx(((x * y).sum(1) / norm(x, axis=1) / norm(y, axis=1)).mean(), rel=1e-9)
    assert one.relative == pytest.approx((norm(x - y, axis=1) / norm(x, axis=1)).mean(), rel=1e-9)
    assert one.agreement is None and not one.kl


def test_positions_are_compared_one_by_one() -> None:
    found = diff.run(GOLDEN / "indexed", GOLDEN / "indexed", pairs=("tagger", "ranker", "layers"), quiet=True)
    by_name = {one.a: one for one in found.members}
    cache = softcache.open(GOLDEN / "indexed")
    words = sum(int(cache.positions("words", np.arange(20), np.full(20, view)).counts.sum()) for view in range(3))
    assert by_name["tagger"].records == words and by_name["tagger"].agreement == 1.0
    assert by_name["ranker"].relative == 0.0
    assert [note for note in found.notes if note.startswith("layers")] == [
        "layers and layers: one of them gave features alone"
    ]


def test_what_cannot_be_compared_is_said_or_refused(quick_dump: QuickDump, toy: Path, tmp_path: Path) -> None:
    a = quick_dump(out="a", teacher=[f"{toy}:exact?name=one"])
    b = quick_dump(out="b", teacher=[f"{toy}:exact?name=one&output=embedding"])
    found = diff.run(a.reader.path, b.reader.path, quiet=True)
    assert found.members == [] and found.notes == ["one and one: one gave logits, the other embedding"]
    with pytest.raises(ConfigError, match="no member 'two'"):
        diff.run(a.reader.path, b.reader.path, pairs=("one=two",), quiet=True)
    keys = keys_of(a)
    for name, chosen in (("c", keys[:20]), ("d", keys[20:])):
        (tmp_path / f"{name}.txt").write_text("\n".join(chosen))
        subset.run(a.reader.path, tmp_path / name, subset.Choice(samples=tmp_path / f"{name}.txt"), quiet=True)
    with pytest.raises(JoinError, match="have no sample in common"):
        diff.run(tmp_path / "c", tmp_path / "d", quiet=True)


def test_what_cannot_be_compared_of_some_is_a_note(quick_dump: QuickDump, toy: Path) -> None:
    two = [f"{toy}:exact?name=one", f"{toy}:exact?name=two&seed=3"]
    a = quick_dump(out="a", teacher=two)
    b = quick_dump(out="b", teacher=two, codec="topk:k=2")
    found = diff.run(a.reader.path, b.reader.path, quiet=True)
    assert not found.members and "keeps some classes only" in found.notes[0]
    with pytest.raises(ConfigError, match="is no number above 0"):
        diff.run(a.reader.path, b.reader.path, temperatures=(1.0, 0.0), quiet=True)


def test_mixed_views_of_other_sample_tables_are_not_compared(quick_dump: QuickDump, toy: Path) -> None:
    settings = {"policy": "mixup:alpha=0.4", "views": 2}
    caches = [quick_dump(out=f"m{n}", data=f"{toy}:images?count={n}", **settings) for n in (30, 40)]
    found = diff.run(caches[0].reader.path, caches[1].reader.path, quiet=True)
    assert found.views == 0 and "mixed with partners" in found.notes[0]


def test_on_the_command_line(quick_dump: QuickDump, capsys: pytest.CaptureFixture[str]) -> None:
    a = quick_dump(out="a")
    assert cli.main(["diff", str(a.reader.path), str(a.reader.path)]) == 0
    assert "are the same cache" in capsys.readouterr().out
    b = quick_dump(out="b", codec="int8")
    assert cli.main(["diff", str(a.reader.path), str(b.reader.path), "--temperatures", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told["members"][0]["kl"]) == ["2"] and told["members"][0]["kl"]["2"] < 0.01
    assert ["members.exact.codec.name", "float32", "int8"] in told["fields"]

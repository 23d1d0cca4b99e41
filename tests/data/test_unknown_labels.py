"""Of several labels per sample some may be unknown: they are no "no", wherever labels are counted, compared or learned from."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import WORLDS

from softcache import dump
from softcache import open as open_cache
from softcache.config import DumpConfig
from softcache.data.class_counts import class_counts, described
from softcache.data.map_style import from_dataset
from softcache.data.selection import of_classes
from softcache.data.transfer_set import TransferSet, open_transfer_set
from softcache.errors import DataError, LabelMismatchError
from softcache.losses import ce, mixed_ce
from softcache.train.objective import Labels

KNOWN = np.array([[1, 0, -1], [-1, -1, -1], [0, 1, 1], [0, 0, 0]], np.int8)
nan = float("nan")
FORMS = {
    "NaN": np.where(KNOWN < 0, nan, KNOWN),
    "-1": KNOWN.astype(np.int64),
    "-1 as a float": KNOWN.astype(np.float32),
    "None": [[None if v < 0 else int(v) for v in row] for row in KNOWN],
    "tensors": [torch.tensor([nan if v < 0 else float(v) for v in row]) for row in KNOWN],
    "a sample without": [[1, 0, nan], None, [0, 1, 1], [0, 0, 0]],
}


def opened(labels: Any) -> TransferSet:
    class Rows(SimpleNamespace):
        def __len__(self) -> int:
            return len(self.labels)

        def __getitem__(self, i: int) -> tuple[str, Any]:
            return f"item {i}", self.labels[i]

    return TransferSet("rows", from_dataset(Rows(labels=labels), "rows", "rows"))


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_unknown_is_the_same(form: str) -> None:
    found = opened(FORMS[form])
    assert found.labels.dtype == np.int8 and found.multi_label
    np.testing.assert_array_equal(found.labels, KNOWN)
    assert found[0][1].tolist() == [1, 0, -1]


def test_labels_that_are_all_known_are_bool_as_before() -> None:
    assert opened(np.maximum(KNOWN, 0).astype(float)).labels.dtype == bool


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[1, -1], [-1, 1]], r"1 and -1 and never 0.*may be no, or what is not known\n.*write 0 for no, and NaN"),
        ([[1, 2], [0, 1]], r"label \[1 2\] of sample rows/000000 is not 0 or 1\n.*NaN or -1 what is not known"),
        ([[0, 1], [0, 0.5]], r"of sample rows/000001 is not 0 or 1"),
        ([[1, -2], [0, 1]], r"of sample rows/000000 is not 0 or 1"),
        ([[1, float("inf")], [0, 1]], r"of sample rows/000000 is not 0 or 1"),
    ],
)
def test_labels_that_are_no_answers_are_refused(labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        opened(labels)


def test_yes_alone_beside_unknown_is_a_set() -> None:
    assert opened([[1, nan], [nan, 1]]).labels.tolist() == [[1, -1], [-1, 1]]


def test_unknown_is_counted_as_neither() -> None:
    found = opened(KNOWN)
    assert class_counts(found).tolist() == [1, 1, 1] and found.labelled == 3
    assert described(found) == "3 classes: 0 1, 1 1, 2 1; 4 of 12 answers not known"
    assert of_classes(found.labels, found.class_names, ["2"]).tolist() == [False, False, True, False]
    assert found.with_classes(["2", "0"]).labels.tolist() == KNOWN[:, [0, 2]].tolist()
    assert found.select(np.array([2, 0])).labels.tolist() == KNOWN[[2, 0]].tolist()


def test_cross_entropy_is_the_mean_over_what_is_known() -> None:
    rng = np.random.default_rng(0)
    z, y = rng.normal(0, 3, (40, 5)), rng.integers(-1, 2, (40, 5))
    losses = np.logaddexp(0, z) - z * y
    logits = torch.from_numpy(z).requires_grad_()
    found = ce(logits, torch.from_numpy(y))
    assert found.item() == pytest.approx(losses[y >= 0].mean(), rel=1e-12)
    found.backward()
    assert logits.grad is not None and bool(((logits.grad == 0) == (torch.from_numpy(y) < 0)).all())
    assert ce(logits, torch.from_numpy(np.where(y < 0, nan, y))).item() == pytest.approx(found.item(), rel=1e-12)
    nothing = ce(logits, torch.full((40, 5), -1))
    assert nothing.item() == 0.0 and not torch.autograd.grad(nothing, logits)[0].any()
    soft = torch.from_numpy(rng.random((40, 5)))
    assert ce(logits, soft).item() == pytest.approx(F.binary_cross_entropy_with_logits(logits, soft).item(), rel=1e-12)


def test_mixed_cross_entropy_weighs_what_is_known() -> None:
    rng = np.random.default_rng(1)
    z, own, other = rng.normal(0, 3, (40, 5)), *rng.integers(-1, 2, (2, 40, 5))
    share = rng.random(40)
    weight = np.stack([share[:, None] * (own >= 0), (1 - share)[:, None] * (other >= 0)])
    losses = np.logaddexp(0, z) - z * np.stack([own, other])
    given = [torch.from_numpy(one) for one in (z, own, other, share)]
    assert mixed_ce(*given).item() == pytest.approx((weight * losses).sum() / weight.sum(), rel=1e-6)
    whole = [
        torch.from_numpy(z),
        *(torch.from_numpy(np.maximum(one, 0)) for one in (own, other)),
        torch.from_numpy(share),
    ]
    mixture = share[:, None] * np.maximum(own, 0) + (1 - share)[:, None] * np.maximum(other, 0)
    assert mixed_ce(*whole).item() == pytest.approx((np.logaddexp(0, z) - z * mixture).mean(), rel=1e-6)


@pytest.mark.parametrize("mixed", [False, True])
def test_pieces_of_a_batch_add_up_to_its_mean(mixed: bool) -> None:
    rng = np.random.default_rng(2)
    logits = torch.from_numpy(rng.normal(size=(24, 5)))
    own, other = (torch.from_numpy(rng.integers(-1, 2, (24, 5)).astype(np.int8)) for _ in range(2))
    shares = torch.from_numpy(rng.random(24).astype(np.float32))

    def value(rows: slice) -> tuple[float, float]:
        if not mixed:
            return ce(logits[rows], own[rows]).item(), Labels(own[rows]).weight.item()
        labels = Labels(own[rows], other[rows], shares[rows])
        return mixed_ce(logits[rows], own[rows], other[rows], shares[rows]).item(), labels.weight.item()

    whole, total = value(slice(None))
    pieces = [value(rows) for rows in (slice(0, 3), slice(3, 4), slice(4, 24))]
    assert sum(loss * weight for loss, weight in pieces) / total == pytest.approx(whole, rel=1e-6)


def test_a_dump_says_what_becomes_of_unknown_labels_and_a_join_leaves_them_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logits = np.random.default_rng(0).normal(size=(4, 1, 3)).astype(np.float32)
    pieces, path = WORLDS / "given_logits.py", tmp_path / "given.npz"
    np.savez(path, logits=logits, labels=FORMS["NaN"])
    data, out = f"{pieces}:given?path={path}", str(tmp_path / "cache")
    dump.run(DumpConfig(data=data, teacher=(f"{pieces}:pick",), out=out, codec="float32", threads=1))
    told, right = capsys.readouterr().err, int(((logits[:, 0] > 0) == (KNOWN > 0))[KNOWN >= 0].sum())
    assert "4 of 12 labels are not known" in told
    assert f"{100 * right / 8:.2f} % of 8 decisions right; classes matched" in told
    cache, found = open_cache(out), open_transfer_set(data)
    classes = json.loads((tmp_path / "cache" / "provenance.json").read_text())["classes"]
    assert [(one["correct"], one["labelled"]) for one in classes["members"].values()] == [(right, 8)]
    assert "4 of 12 labels are not known" in classes["warnings"][0]
    assert cache.join(found).labels_changed == 0
    filled = opened(FORMS["NaN"])
    filled.keys = found.keys
    for others in (np.where(KNOWN < 0, 0, KNOWN), np.where(KNOWN == 1, np.int8(-1), KNOWN)):
        filled.labels = others  # what one of the two does not know is no difference
        assert cache.join(filled, check_content="none").labels_changed == 0
    filled.labels = np.where(KNOWN == 0, 1, KNOWN)
    with pytest.raises(LabelMismatchError, match="3 labels differ"):
        cache.join(filled, check_content="none")

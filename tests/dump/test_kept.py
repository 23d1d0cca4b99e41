"""How much probability the k largest classes keep: what `plan` tells of vocabularies, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from softcache.dump.choose_codec import CANDIDATES, candidates
from softcache.dump.kept import SIZES, TEMPERATURES, kept_by_size, kept_table


def test_what_is_kept_is_the_softmax_mass_of_the_largest_and_the_least_of_the_members() -> None:
    rng = np.random.default_rng(0)
    members = [rng.normal(0, scale, (20, 5000)) for scale in (6.0, 3.0)]
    found = kept_by_size([torch.from_numpy(rows.astype(np.float32)) for rows in members])
    assert [one.k for one in found] == list(SIZES)
    for one in found:
        for t in TEMPERATURES:
            shares = []
            for rows in members:
                p = np.exp(rows / t)
                p = np.sort(p / p.sum(axis=1, keepdims=True), axis=1)
                shares.append(p[:, -one.k :].sum(axis=1).mean())
            assert one.shares[t] == pytest.approx(min(shares), rel=1e-5)
    assert [one.record_bytes for one in found][2] == 4 + 8 + 50 + -(-(50 * 6 + 50 + (4999 >> 6) + 1) // 8)
    text = "\n".join(kept_table(found))
    assert f"{found[2].shares[4.0]:.1%}" in text and "k=128" in text


def test_of_few_classes_only_sizes_below_them_are_told() -> None:
    assert [one.k for one in kept_by_size([torch.zeros(3, 60)])] == [16, 32, 50]
    assert kept_by_size([torch.zeros(3, 10)]) == []


def test_topset_is_compared_where_there_are_very_many_classes() -> None:
    assert "topset:k=50" in candidates(4096, CANDIDATES) and "topset:k=50" not in candidates(4095, CANDIDATES)

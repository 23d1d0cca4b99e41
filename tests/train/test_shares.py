"""What each of several ranks takes of a batch, and gets back of its gradients; three of them, whose shares differ in size."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from softcache.train import ranks as module
from softcache.train.batches import visits
from softcache.train.ranks import Ranks


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [7, 8, 9, 127, 128, 301])
def test_the_shares_of_a_batch_lie_side_by_side(count: int, size: int) -> None:
    rows = list(range(count))
    shares = [rows[Ranks(rank, size).own(count)] for rank in range(size)]
    assert [row for share in shares for row in share] == rows
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [len(share) for share in shares] == Ranks(0, size).shares(count)


def test_the_visits_of_three_ranks_are_those_of_one_process() -> None:
    order = torch.randperm(301, generator=torch.Generator().manual_seed(0)).numpy()
    alone, *three = (list(visits(order, [0, 1], 100, ranks)) for ranks in (Ranks(), *(Ranks(r, 3) for r in range(3))))
    assert [list(chain(*shares)) for shares in zip(*three, strict=True)] == alone
    assert [len(one) for one in three[0]] == [68, 68, 68, 2]  # 34, 33 and 33 samples of two views, then the last one


class _Group:
    """torch.distributed as the ranks see it: every one's rows are known beforehand."""

    def __init__(self, rows: Sequence[Tensor]) -> None:
        self.rows = rows

    def all_gather(self, blocks: list[Tensor], padded: Tensor) -> None:
        for block, own in zip(blocks, self.rows, strict=True):
            block.zero_()
            block[: len(own)] = own


@pytest.mark.parametrize("counts", [(43, 42, 42), (16, 16, 15), (1, 0, 3), (2, 5, 0)])
def test_gathered_rows_give_each_rank_the_gradients_of_its_own(
    counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the rows of a rank add to the loss of all rows, times the number of ranks that is divided by later."""
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randn(count, 3, generator=draw) for count in counts]
    weight = torch.randn(sum(counts), 3, generator=draw)
    whole = torch.cat(rows).requires_grad_()
    (wanted,) = torch.autograd.grad((whole.square() * weight).sum(), whole)
    group: Any = _Group(rows)
    monkeypatch.setattr(module.dist, "all_gather", group.all_gather)
    for rank, own in enumerate(torch.split(wanted, counts)):
        mine = rows[rank].clone().requires_grad_()
        gathered = Ranks(rank, 3).gather(mine, counts)
        assert torch.equal(gathered.detach(), whole.detach())
        (found,) = torch.autograd.grad((gathered.square() * weight).sum(), mine)
        torch.testing.assert_close(found, 3 * own)

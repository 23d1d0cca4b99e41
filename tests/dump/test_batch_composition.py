"""A teacher's logits are of the sample alone: the samples of the first batch are asked again in another batch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import QuickDump
from torch import Tensor, nn

import softcache
from softcache.check import repair
from softcache.dump import open_teachers
from softcache.dump.batch_composition import check_batch_composition
from softcache.dump.teacher import Teacher
from softcache.errors import TeacherError

ITEMS = list(torch.randn(16, 5, generator=torch.Generator().manual_seed(0)))
TEXTS = ["a", "a bee", "a bee and a cat", "no", "a dog sees a bee", "cat", "an ant", "a cat sees an ant and a dog"]


def stacked(items: Sequence[Any]) -> Tensor:
    return torch.stack([torch.as_tensor(item) for item in items])


def padded(items: Sequence[str]) -> Tensor:
    """(B, L) of letters, 0 where a text has ended."""
    length = max(map(len, items))
    return torch.tensor([[ord(letter) % 32 + 1 for letter in text] + [0] * (length - len(text)) for text in items])


def asked(network: Any, items: Sequence[Any] = ITEMS, collate: Any = stacked, **settings: Any) -> Teacher:
    """A teacher that has gone through both looks at its first batch."""
    one = Teacher("t", "spec", network, collate, **{"output": "logits", "num_classes": 3} | settings)
    one.check_first_batch(one.collated(items))
    check_batch_composition(one, items)
    return one


class Net(nn.Module):
    """A linear layer, and something that happens to the whole batch of its results."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda z: z) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.fc, self.change = nn.Linear(5, 3), change

    def forward(self, batch: Tensor) -> Tensor:
        return self.change(self.fc(batch))


class Letters(nn.Module):
    """A mean over the letters of a text, of which padding is one if `masked` is false."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table, self.masked = nn.Embedding(33, 3), masked

    def forward(self, batch: Tensor) -> Tensor:
        mask = (batch > 0)[:, :, None] if self.masked else torch.ones_like(batch, dtype=torch.bool)[:, :, None]
        return (self.table(batch) * mask).sum(1) / mask.sum(1)


def batch_norm() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.ReLU(), nn.Linear(8, 3)
    ).eval()


def drawn_collate(items: Sequence[Any]) -> Tensor:
    """A user's collate that augments: always the same draws, whichever samples they meet."""
    noise = torch.randn(len(items), 5, generator=torch.Generator().manual_seed(5))
    return stacked(items) + noise


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: asked(batch_norm()), id="BatchNorm without running statistics"),
        pytest.param(lambda: asked(Net(lambda z: z.softmax(0))), id="softmax over the batch"),
        pytest.param(lambda: asked(Net(lambda z: z.sort(0).values)), id="sorted"),
        pytest.param(lambda: asked(Net(lambda z: z - z.mean(0))), id="less the batch's mean"),
        pytest.param(lambda: asked(Net(lambda z: z - z[:1])), id="less the first row"),
        pytest.param(lambda: asked(Net(lambda z: z / len(z))), id="over its size"),
        pytest.param(lambda: asked(Net(lambda z: z.cumsum(0))), id="added up"),
        pytest.param(lambda: asked(Letters(False), TEXTS, padded), id="padding that counts"),
        pytest.param(lambda: asked(Net(), collate=drawn_collate), id="a collate that draws"),
        pytest.param(lambda: asked(Net(lambda z: (z - z.mean(0)).softmax(1)), output="probs"), id="probabilities"),
        pytest.param(
            lambda: asked(lambda batch: batch[:, :3] - batch.mean(), collate=lambda i: np.stack(i)), id="NumPy"
        ),
        pytest.param(lambda: asked(Net(lambda z: z - z.mean(0)), autocast=torch.bfloat16), id="under autocast"),
    ],
)
def test_a_teacher_is_refused_whose_logits_depend_on_the_batch(make: Callable[[], Teacher]) -> None:
    with pytest.raises(TeacherError, match=r"gives other \w+ for the same samples in another batch: \d+ of") as caught:
        make()
    assert re.search("must depend on the sample alone", caught.value.tip)


def of_eight(batch: Tensor) -> Tensor:
    """As a program that was exported for one batch size."""
    return batch.reshape(16, 5)[:, :3]


def flips(z: Tensor) -> Tensor:
    """A choice between two experts that the order of the batch decides for one row: a tie, in rounding."""
    return torch.where((z[:, :1] == z[:, :1].max()) & (z[0, 0] > z[-1, 0]), z + 1, z)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: asked(Net()), id="plain"),
        pytest.param(lambda: asked(Net(), autocast=torch.bfloat16), id="autocast"),
        pytest.param(lambda: asked(Net().half()), id="float16"),
        pytest.param(lambda: asked(Net().bfloat16()), id="bfloat16"),
        pytest.param(lambda: asked(Letters(True), TEXTS, padded), id="padding that is masked"),
        pytest.param(lambda: asked(of_eight), id="of one batch size"),
        pytest.param(lambda: asked(Net(flips)), id="a tie that falls otherwise in one row"),
        pytest.param(lambda: asked(Net(lambda z: z * 1e30)), id="large"),
        pytest.param(lambda: asked(Net(lambda z: z * float("nan"))), id="not finite, which the dump names"),
        pytest.param(
            lambda: asked(Net(lambda z: (9 * z).sigmoid()), output="probs", multi_label=True), id="multi-label"
        ),
        pytest.param(lambda: asked(Net(lambda z: (99 * z).log_softmax(1)), output="log_probs"), id="log-probabilities"),
        pytest.param(lambda: asked(Net(), ITEMS[:1]), id="one sample"),
        pytest.param(lambda: asked(Net(), ITEMS[:3]), id="three samples"),
    ],
)
def test_a_teacher_of_single_samples_is_not_refused(make: Callable[[], Teacher]) -> None:
    assert make().name == "t"


def test_rows_that_are_missing_are_told_at_once() -> None:
    with pytest.raises(TeacherError, match="gave 15 rows for 16 samples"):
        asked(Net(lambda z: z[:-1]))


SHIFTED = """import torch
from torch import nn
class Shifted(nn.Module):
    def forward(self, batch):
        rows = batch.flatten(1)[:, :4]
        return rows - rows.mean(0)
def shifted(): return Shifted()
"""


def test_a_cache_that_an_older_version_made_of_such_a_teacher_is_still_mended(
    quick_dump: QuickDump, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same bytes: its batches are those of the dump."""
    world = tmp_path / "world.py"
    world.write_text(SHIFTED)
    with monkeypatch.context() as older:
        older.setattr(open_teachers, "check_batch_composition", lambda teacher, items: None)
        cache = quick_dump(teacher=[f"{world}:shifted"])
    (part,) = (tmp_path / "cache" / "members" / "shifted").glob("*.h5")
    before = part.read_bytes()
    part.unlink()
    means = repair.Means(data=f"{toy}:images", teachers=(f"{world}:shifted",))
    assert repair.run(tmp_path / "cache", means, quiet=True).mended == [f"members/shifted/{part.name}"]
    assert part.read_bytes() == before
    assert softcache.open(tmp_path / "cache").id == cache.id


def test_a_dump_asks_before_anything_is_written(quick_dump: QuickDump, tmp_path: Path) -> None:
    world = tmp_path / "world.py"
    world.write_text(SHIFTED)
    with pytest.raises(TeacherError, match=r"in another batch: .*\(world.py, line 4\)"):
        quick_dump(teacher=[f"{world}:shifted"])
    assert not (tmp_path / "cache").exists()

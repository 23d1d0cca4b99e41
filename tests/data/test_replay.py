"""Replay: the pixels that a loader gives are those that the policy renders by itself, wherever and whenever it runs."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORLDS
from torch.utils.data import Dataset

from softcache.data import seeded_transform, view_steps
from softcache.data.identity import pixel_digest, sample_id, sample_ids
from softcache.data.loading import LoadedBatch, Pair, Partners, ViewedSet, load_batches
from softcache.data.philox import Draws
from softcache.data.transfer_set import TransferSet, open_transfer_set
from softcache.data.views import STEPS, Policy
from softcache.errors import ConfigError, DataError
from softcache.spec import load_user_file

COUNT = 40
POLICIES: list[tuple[str, ...]] = [
    (),
    ("to_rgb",),
    ("resize:size=9,height=7",),
    ("center_crop:size=11",),
    ("middle_crop:size=7",),
    ("shift",),
    ("crop_flip",),
    ("resized_crop_flip:size=12",),
    ("rotate",),
    ("color_jitter:brightness=0.4,contrast=0.4,saturation=0.4,hue=0.1",),
    ("randaugment",),
    ("erase:p=0.7",),
    ("mixup",),
    ("cutmix",),
    ("user.py:noise?strength=50",),
    ("torchvision.transforms:RandomPerspective?p=0.9",),
    ("crop_flip", "user.py:noise?kind=pil", "user.py:noise?kind=array", "erase:p=1"),
    (
        "to_rgb",
        "resized_crop_flip:size=16,scale_min=0.3",
        "rotate:degrees=30",
        "color_jitter:contrast=0.5,hue=0.2",
        "randaugment:ops=1",
        "erase:p=0.5",
        "mixup:alpha=1",
    ),
]
VIEWS = 3
SEED = 11


@pytest.fixture(autouse=True)
def _in_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The policies name the user's file as it is seen from here, which is not where the test run began."""
    shutil.copy(WORLDS / "global_draws.py", tmp_path / "user.py")
    monkeypatch.chdir(tmp_path)
    yield
    seeded_transform._open.cache_clear()


class Every(Dataset[Any]):
    """Several viewed sets in one, so that each process is started once: a batch's first pair names the set."""

    def __init__(self, sets: Sequence[ViewedSet]) -> None:
        self.sets = list(sets)

    def __len__(self) -> int:
        return len(self.sets)

    def __getitems__(self, pairs: list[Pair]) -> Any:
        which, _ = pairs[0]
        return which, self.sets[which].__getitems__(pairs[1:])


def policies() -> list[Policy]:
    return [Policy.parse(texts, SEED) for texts in POLICIES]


def whole_set() -> TransferSet:
    return open_transfer_set(f"user.py:images?count={COUNT}")


def viewed_sets(visited: TransferSet, whole: TransferSet) -> list[ViewedSet]:
    """The visited samples through every policy; rows of the sample table are the whole set's, backwards."""
    partners = Partners.of(whole, np.arange(COUNT)[::-1], COUNT)
    return [ViewedSet(visited, policy, [_list], digests=True, partners=partners) for policy in policies()]


def _list(items: list[Any]) -> list[Any]:
    return items


def direct(policy: Policy, whole: TransferSet, key: str, view: int) -> tuple[np.ndarray, int, float]:
    """One view without any loader: its pixels, the partner's row and the share."""
    keys = list(whole.keys)
    item = whole.load(keys.index(key))[0]
    own = policy.render(item, sample_id(key), view)
    if policy.mixing is None:
        return own, -1, 1.0
    row = policy.partner(sample_id(key), view, COUNT)
    partner = keys[COUNT - 1 - row]
    other = policy.render(whole.load(keys.index(partner))[0], sample_id(partner), view)
    mixed, share = policy.mix(own, other, sample_id(key), view)
    return mixed, row, share


def some_batches(count: int, size: int, seed: int) -> list[list[Pair]]:
    """For every policy, all views of `count` samples in a random order; in front of each batch, the policy's number."""
    rng = np.random.default_rng(seed)
    batches: list[list[Pair]] = []
    for which in range(len(POLICIES)):
        pairs = [(int(i), view) for view in range(VIEWS) for i in rng.permutation(count)]
        batches += [[(which, 0), *pairs[start : start + size]] for start in range(0, len(pairs), size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def check(visited: TransferSet, batches: list[list[Pair]], loaded: Sequence[Any]) -> None:
    """Every batch is what its policy renders directly, with the digests and partners that belong to it."""
    whole, made = whole_set(), policies()
    assert len(loaded) == len(batches)
    for (_, *pairs), (which, batch) in zip(batches, loaded, strict=True):
        policy = made[which]
        wanted = [direct(policy, whole, visited.keys[index], view) for index, view in pairs]
        for item, (pixels, _, _) in zip(batch.inputs[0], wanted, strict=True):
            np.testing.assert_array_equal(item, pixels)
        assert batch.pixel_digests.tolist() == [pixel_digest(pixels) for pixels, _, _ in wanted]
        assert list(zip(batch.index.tolist(), batch.views.tolist(), strict=True)) == pairs
        assert (batch.partner_rows is None) == (batch.shares is None) == (policy.mixing is None)
        if policy.mixing is not None:
            assert batch.partner_rows.dtype == np.int64 and batch.shares.dtype == np.float32
            assert batch.partner_rows.tolist() == [row for _, row, _ in wanted]
            np.testing.assert_array_equal(batch.shares, np.float32([share for _, _, share in wanted]))


def check_through_loaders(
    chosen: Sequence[int], workers: int, method: str | None, *, ranks: int = 1, size: int = 7
) -> None:
    whole = whole_set()
    visited = whole.select(np.array(chosen))
    every: Any = Every(viewed_sets(visited, whole))
    batches = some_batches(len(chosen), size, seed=size)
    loaded: list[Any] = [None] * len(batches)
    for rank in range(ranks):
        mine: Any = batches[rank::ranks]
        loaded[rank::ranks] = list(load_batches(every, mine, workers=workers, start_method=method))
    check(visited, batches, loaded)


@pytest.mark.slow
def test_in_this_process() -> None:
    check_through_loaders(range(0, COUNT, 3), 0, None)


@pytest.mark.slow
def test_forked_workers() -> None:
    check_through_loaders(range(1, COUNT, 3), 2, "fork")


def test_a_subset_in_another_order_mixes_with_the_whole_set() -> None:
    check_through_loaders([31, 2, 17, 5, 39], 0, None, size=4)


@pytest.mark.timeout(300)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")  # more than there may be cores
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.whole), "forkserver"])
def test_four_workers_by_every_start_method(method: str) -> None:
    check_through_loaders(range(COUNT), 4, method)


@pytest.mark.slow
def test_a_spawned_worker_does_not_need_every_file_that_this_process_ever_loaded(tmp_path: Path) -> None:
    gone = tmp_path / "gone.py"
    gone.write_text("anything = 1\n")
    load_user_file(gone)
    gone.unlink()
    check_through_loaders([3, 1, 4], 1, "spawn", size=2)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_two_ranks_share_the_batches(workers: int) -> None:
    check_through_loaders(range(0, COUNT, 2), workers, "spawn" if workers else None, ranks=2, size=5)


@pytest.mark.slow
def test_after_a_restart() -> None:
    """A fresh process, which knows the policies by their JSON alone, renders the same pixels."""
    whole = whole_set()
    job = [(policy.to_json(), [int(i) for i in range(0, COUNT, 5)]) for policy in policies()]
    script = """
import json, sys
import numpy as np, torch
from softcache.data.identity import pixel_digest
from softcache.data.loading import Partners, ViewedSet
from softcache.data.transfer_set import open_transfer_set
from softcache.data.views import Policy
torch.set_num_threads(1)
whole = open_transfer_set("user.py:images?count=40")
partners = Partners.of(whole, np.arange(40)[::-1], 40)
found = []
for steps, chosen in json.load(sys.stdin):
    viewed = ViewedSet(whole, Policy.from_json(steps, 11), (), partners=partners)
    found.append([pixel_digest(viewed.render(i, view)) for i in chosen for view in range(3)])
json.dump(found, sys.stdout)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(job), capture_output=True, text=True, check=True
    )
    for policy, (_, chosen), found in zip(policies(), job, json.loads(done.stdout), strict=True):
        wanted = [pixel_digest(direct(policy, whole, whole.keys[i], view)[0]) for i in chosen for view in range(VIEWS)]
        assert found == wanted, policy


def test_every_step_is_replayed_here() -> None:
    assert {step.name for policy in policies() for step in policy.steps} == set(STEPS)


# ------------------------------------------------------------------------------------------------- planted changes are seen


def digests() -> list[list[int]]:
    """Of some views under every policy."""
    seeded_transform._open.cache_clear()
    whole = whole_set()
    return [
        [int(pixel_digest(viewed.render(i, 1))) for i in range(0, COUNT, 4)] for viewed in viewed_sets(whole, whole)
    ]


def test_another_generator_changes_every_random_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    before, word = digests(), Draws.word
    monkeypatch.setattr(Draws, "word", lambda self: word(self) ^ 0x5555555555555555)
    for policy, old, new in zip(policies(), before, digests(), strict=True):
        assert (old != new) == policy.is_random, policy


def test_one_changed_image_changes_its_views(monkeypatch: pytest.MonkeyPatch) -> None:
    before, load = digests(), TransferSet.load

    def changed(self: TransferSet, index: int) -> tuple[Any, bytes]:
        item, digest = load(self, index)
        if self.keys[index] == "toy/0008":
            item ^= 128
        return item, digest

    monkeypatch.setattr(TransferSet, "load", changed)
    for policy, old, new in zip(policies(), before, digests(), strict=True):
        assert old[2] != new[2], policy
        assert sum(a != b for a, b in zip(old, new, strict=True)) <= 4  # itself, and those it is a partner of


def test_one_level_of_rounding_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    before, window = digests(), view_steps.window
    monkeypatch.setattr(view_steps, "window", lambda image, dy, dx: window(image, dy, dx).clamp(min=1))
    changed = [old != new for old, new in zip(before, digests(), strict=True)]
    named = [any(step.name in ("shift", "crop_flip") for step in policy.steps) for policy in policies()]
    assert changed == named


# ------------------------------------------------------------------------------------------------------------ mixing sets


def test_a_mixing_policy_needs_partners() -> None:
    with pytest.raises(ConfigError, match=r"ends with mixup:alpha=0.2, and there are no samples to mix with"):
        ViewedSet(whole_set(), Policy.parse(["mixup"], 0), ())


def test_a_partner_that_is_not_there_is_named() -> None:
    whole = whole_set()
    some = whole.select(np.arange(20))
    viewed = ViewedSet(some, Policy.parse(["mixup"], 0), (), partners=Partners.of(some, np.arange(20), COUNT))
    with pytest.raises(DataError, match=r"view 0 is mixed with row \d+ of .*\n.*whole transfer set") as caught:
        list(load_batches(viewed, [[(index, 0) for index in range(20)]]))
    assert "while loading sample toy/" in caught.value.__notes__[0]


def test_a_partner_that_cannot_be_read_is_named_with_its_sample() -> None:
    whole = open_transfer_set("user.py:images?count=14")
    viewed = ViewedSet(whole, Policy.parse(["mixup"], 0), (), partners=Partners.of(whole, np.arange(14), 14))
    pairs = [[(i, view)] for view in range(5) for i in range(13)]
    with pytest.raises(DataError, match=r"sample toy/0013: OSError: the disk is gone") as caught:
        list(load_batches(viewed, pairs))
    assert any("while loading sample toy/00" in note for note in caught.value.__notes__)


def test_partners_from_the_rows_of_a_set() -> None:
    partners = Partners.of("a set", np.array([4, 0, 2]), 6)
    assert partners.index_of_row.tolist() == [1, -1, 2, -1, 0, -1]


def test_without_mixing_a_batch_has_no_partners() -> None:
    viewed = ViewedSet(whole_set(), Policy.parse(["shift"], 0), [_list])
    batch = viewed.__getitems__([(0, 0), (1, 1)])
    assert isinstance(batch, LoadedBatch)
    assert (batch.partner_rows, batch.shares, batch.pixel_digests) == (None, None, None)


# ----------------------------------------------------------------------------------------------------------- seeded steps


def states() -> tuple[Any, ...]:
    name, words, *rest = np.random.get_state()
    return random.getstate(), name, words.tolist(), rest, torch.get_rng_state().tolist()  # type: ignore[union-attr]


def render(text: str, *, sample: int = 5, view: int = 0, seed: int = 0, item: Any = None) -> np.ndarray:
    image = np.full((20, 24, 3), 7, np.uint8) if item is None else item
    made: np.ndarray = Policy.parse([text], seed).render(image, sample, view)
    return made


def test_a_seeded_step_is_a_function_of_seed_sample_and_view() -> None:
    first = render("user.py:noise?strength=200")
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    seeded_transform._open.cache_clear()  # as another process would, the factory is called again
    np.testing.assert_array_equal(render("user.py:noise?strength=200"), first)
    for other in ({"sample": 6}, {"view": 1}, {"seed": 1}):
        for rows in (slice(0, 4), slice(4, 8), slice(12, 20)):  # torch, NumPy, random
            assert not np.array_equal(render("user.py:noise?strength=200", **other)[rows], first[rows])


def test_each_generator_is_seeded_by_a_word_of_its_own() -> None:
    words = Draws(3, 4, 5, 6)
    expected = [words.word() for _ in range(3)]
    with seeded_transform.seeded_generators(Draws(3, 4, 5, 6)):
        found = random.random(), np.random.random_sample(), torch.rand(3)
    assert found[0] == random.Random(expected[0]).random()
    assert found[1] == np.random.RandomState([expected[1] % 2**32, expected[1] >> 32]).random_sample()
    assert torch.equal(found[2], torch.rand(3, generator=torch.Generator().manual_seed(expected[2])))


@pytest.mark.parametrize("kind", ["tensor", "broken", "floats"])
def test_the_generators_of_others_are_left_as_they_were(kind: str) -> None:
    random.seed(5)
    np.random.seed(6)
    torch.manual_seed(7)
    before = states()
    with nullcontext() if kind == "tensor" else pytest.raises(DataError):
        render(f"user.py:noise?kind={kind}")
    assert states() == before


def test_the_generators_of_a_gpu_are_never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for name in ("manual_seed", "manual_seed_all", "get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: asked.append(name))
    render("user.py:noise")
    assert asked == []
    torch.manual_seed(0)  # does ask, which is why it is not used
    assert asked


@pytest.mark.parametrize("kind", ["pil", "array"])
def test_what_a_transform_gives_becomes_an_image_again(kind: str) -> None:
    text = f"user.py:noise?kind={kind}"
    made = render(text)
    assert made.shape == (20, 24, 3) and made.dtype == np.uint8
    with seeded_transform.seeded_generators(Draws(0, seeded_transform.step_key(text, 0), 5, 0)):
        by_hand = np.asarray(seeded_transform._open(text)(torch.full((3, 20, 24), 7, dtype=torch.uint8)))
    np.testing.assert_array_equal(made, by_hand)


def test_the_item_is_never_written_into() -> None:
    for item in (np.full((20, 24, 3), 7, np.uint8), torch.full((3, 20, 24), 7, dtype=torch.uint8)):
        render("user.py:noise", item=item)
        assert (item == 7).all()


@pytest.mark.parametrize(
    ("kind", "found"),
    [("floats", r"Tensor torch.float32 \(3, 20, 24\)"), ("none", "NoneType"), ("flat", r"ndarray uint8 \(1440,\)")],
)
def test_what_is_no_uint8_image_is_refused(kind: str, found: str) -> None:
    with pytest.raises(DataError, match=rf"kind={kind}' gave {found}; .*\n.*normalising .* belong to the model"):
        render(f"user.py:noise?kind={kind}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gone.py:noise", r"'gone.py:noise', and there is no file /.*/gone.py\n.*the folder the dump was started from"),
        ("user.py:nois", r"has no factory 'nois'\n.*did you mean 'noise'"),
        ("user.py:noise?strenght=3", r"unknown parameter 'strenght'\n.*'strength'"),
        ("user.py:noise?strength=big", "'big' is not a whole number"),
        ("user.py:not_callable", "gave int, which cannot be called"),
        ("no.such.package:noise", "no module named 'no'"),
    ],
)
def test_a_transform_that_cannot_be_made_is_refused(text: str, message: str) -> None:
    policy = Policy.from_json(json.loads(json.dumps(Policy.parse([text], 0).to_json())), 0)  # named, not yet needed
    with pytest.raises(ConfigError, match=message):
        policy.render(np.zeros((20, 24, 3), np.uint8), 1, 0)


def test_faults_of_a_transform_name_the_sample() -> None:
    viewed = ViewedSet(whole_set(), Policy.parse(["user.py:noise?kind=broken"], 0), ())
    message = r"kind=broken' failed on Tensor torch.uint8 \(3, 20, 24\): RuntimeError: the transform broke"
    with pytest.raises(DataError, match=message) as caught:
        viewed.render(3, 0)
    assert caught.value.__notes__ == ["while loading sample toy/0003"]


def test_two_seeded_steps_draw_numbers_of_their_own() -> None:
    item = np.full((20, 24, 3), 7, np.uint8)
    once = Policy.parse(["user.py:noise"], 0).render(item, 1, 0).astype(int) - 7
    twice = Policy.parse(["user.py:noise", "user.py:noise"], 0).render(item, 1, 0).astype(int) - 7
    behind = Policy.parse(["torchvision.transforms:RandomVerticalFlip?p=0", "user.py:noise"], 0).render(item, 1, 0)
    assert not np.array_equal(twice[:8], 2 * once[:8])
    np.testing.assert_array_equal(behind.astype(int) - 7, once)  # another transform before it changes nothing


def test_ids_are_those_of_the_sample_table() -> None:
    whole = whole_set()
    assert [sample_id(key) for key in whole.keys] == sample_ids(whole.keys).tolist()

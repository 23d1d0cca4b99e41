"""The reading pass: samples that cannot be read, or that no batch takes beside the others, are all named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from softcache.data.identity import file_digest
from softcache.data.reading import Contents, read_contents, refuse_misfits
from softcache.data.transfer_set import TransferSet, open_transfer_set
from softcache.data.views import Policy
from softcache.errors import DataError
from softcache.models import ImageInput
from softcache.report.progress import Meter

COUNT = 12


def stack(items: list[Any]) -> torch.Tensor:
    return ImageInput(3, (0.5,), (0.5,)).collate(items)


def pictures(folder: Path, odd: dict[int, Any]) -> TransferSet:
    for number in range(COUNT):
        content = odd.get(number, np.full((8, 8, 3), number, np.uint8))
        if isinstance(content, bytes):
            (folder / f"{number:02d}.png").write_bytes(content)
        else:
            Image.fromarray(content).save(folder / f"{number:02d}.png")
    return open_transfer_set(f"images:{folder}")


def read(transfer_set: TransferSet, *steps: str, collates: Any = (stack,), workers: int = 0) -> Contents:
    with Meter("reading", len(transfer_set), unit="samples", quiet=True) as meter:
        return read_contents(transfer_set, Policy.parse(steps, 0), collates, workers=workers, meter=meter)


GREY, TINY, FINE, CORRUPT = np.zeros((8, 8), np.uint8), np.zeros((3, 3, 3), np.uint8), {}, b"nothing"


@pytest.mark.parametrize(
    ("odd", "steps", "misfits"),
    [
        (FINE, (), {}),
        ({11: GREY}, (), {11: "uint8 (8, 8), where most are"}),
        ({11: GREY}, ("to_rgb",), {}),
        ({3: TINY, 5: GREY, 7: TINY}, (), {3: "(3, 3, 3)", 5: "(8, 8)", 7: "(3, 3, 3)"}),
        ({3: TINY, 5: GREY, 7: TINY}, ("to_rgb", "resize:size=4"), {}),
        ({0: CORRUPT, 11: CORRUPT}, (), {0: "no image that Pillow knows", 11: "no image that Pillow knows"}),
        ({2: CORRUPT, 4: GREY}, (), {2: "no image", 4: "(8, 8)"}),
    ],
)
def test_every_misfit_is_found_and_no_other(odd: Any, steps: Any, misfits: dict[int, str], tmp_path: Path) -> None:
    data = pictures(tmp_path, odd)
    found = read(data, *steps)
    assert found.misfits.keys() == misfits.keys()
    for place, message in misfits.items():
        assert message in found.misfits[place].message and data.keys[place] in found.misfits[place].message
    for place in set(range(COUNT)) - misfits.keys():
        assert bytes(found.digests[place]) == file_digest((tmp_path / data.keys[place]).read_bytes())


def test_a_model_that_takes_items_of_several_shapes_has_no_misfits(tmp_path: Path) -> None:
    data = pictures(tmp_path, {1: TINY, 2: GREY})
    assert not read(data, collates=(list,)).misfits
    assert not read(data, collates=()).misfits  # nobody asked what fits
    assert read(data, collates=(list, stack)).misfits.keys() == {1, 2}


@pytest.mark.slow
def test_loader_workers_find_the_same(tmp_path: Path) -> None:
    data = pictures(tmp_path, {1: TINY, 2: CORRUPT})
    here, there = read(data), read(data, workers=1)
    assert {i: str(e) for i, e in here.misfits.items()} == {i: str(e) for i, e in there.misfits.items()}
    assert np.array_equal(here.digests[3:], there.digests[3:])


def test_the_refusal_names_samples_reasons_and_the_way_round(tmp_path: Path) -> None:
    data = pictures(tmp_path, {2: CORRUPT, 4: GREY, 6: GREY})
    with pytest.raises(DataError) as caught:
        refuse_misfits(read(data).misfits, data.keys)
    assert caught.value.message.startswith("3 of 12 samples cannot be used: 02.png, 04.png, 06.png. For example: ")
    assert "no image that Pillow knows; sample 04.png: ndarray uint8 (8, 8), where most" in caught.value.message
    for part in ("--policy to_rgb", "--without FILE", "--misfits FILE"):
        assert part in caught.value.tip
    refuse_misfits({}, data.keys)


def test_data_of_which_most_cannot_be_read_are_given_up_early() -> None:
    asked: list[int] = []

    class Broken:
        keys = tuple(map(str, range(5000)))

        def __len__(self) -> int:
            return len(self.keys)

        def load(self, index: int) -> Any:
            asked.append(index)
            raise OSError("the disk is gone")

    found = read(Broken())  # type: ignore[arg-type]
    assert len(asked) == 1024 and "OSError: the disk is gone" in found.misfits[0].message

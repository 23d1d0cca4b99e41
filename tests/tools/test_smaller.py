"""What SMALLER says of which method works on which network is what the tool finds."""

from __future__ import annotations

import re
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from softcache.models import MODELS

ROOT = Path(__file__).resolve().parents[2]
SMALLER = (ROOT / "softcache/docs/SMALLER.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tool() -> dict[str, Any]:
    found = runpy.run_path(str(ROOT / "tools/smaller"), run_name="smaller")
    found["cost"].SECONDS = 0.0
    return found


def lines(tool: dict[str, Any]) -> list[list[str]]:
    """The cells of the tool's table on the page."""
    told = SMALLER.partition(tool["BEGIN"])[2].partition(tool["END"])[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in told.splitlines()]


def test_the_table_has_every_method_every_family_of_ours_and_six_of_each_library(tool: dict[str, Any]) -> None:
    head, _, *rows = lines(tool)
    assert head == ["network", *(f"`{method}`" for method in tool["METHODS"])]
    names = [row[0].strip("`") for row in rows]
    ours = {family(name.removeprefix("softcache:")) for name in names if name.startswith("softcache:")}
    assert ours == {family(name) for name in MODELS} - {"tagger", "encoder_tagger"}  # which answer for each word
    count = Counter(name.partition(":")[0] for name in names)
    assert min(count["torchvision"], count["timm"], count["hf"]) >= 6 and len(set(names)) == len(names)


def family(name: str) -> str:
    return re.sub(r"(?<=resnet)\d+(x4)?|(?<=wrn).*|(?<=vgg).*", "", name)


def test_each_cell_is_a_share_or_says_in_few_words_why_not(tool: dict[str, Any]) -> None:
    words = "|".join(tool["SAID"].values())
    for row in lines(tool)[2:]:
        for cell in row[1:]:
            assert re.fullmatch(rf"[01]\.\d\d|refused: ({words})", cell), row


def test_a_row_takes_the_place_of_its_own(tool: dict[str, Any]) -> None:
    page = f"a\n{tool['BEGIN']}| `x:a` | 1 |\n| `x:b` | 2 |\n{tool['END']}b\n"
    other = tool["with_row"](page, "x:a", "| `x:a` | 3 |")
    assert other == page.replace("| 1 |", "| 3 |")
    assert tool["with_row"](page, "x:c", "| `x:c` | 3 |") == page.replace("| 2 |\n", "| 2 |\n| `x:c` | 3 |\n")
    with pytest.raises(ValueError, match="needs the lines"):
        tool["with_row"]("no table", "x:a", "| |")


@pytest.mark.slow
@pytest.mark.parametrize("network", ["softcache:cnn", "softcache:textcnn"])
def test_the_page_has_what_the_tool_finds(tool: dict[str, Any], network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool["shrink"], "find_spec", lambda _name: None)  # as the tool has it: int8 is not timed
    told = next(row[1:] for row in lines(tool) if row[0] == f"`{network}`")
    found = [tool["short"](cell) for cell in tool["row"](network, tool["METHODS"])]
    for one, other in zip(told, found, strict=True):
        if other.startswith("refused"):
            assert one == other
        else:
            assert float(one) == pytest.approx(float(other), abs=0.02)  # where zlib is another

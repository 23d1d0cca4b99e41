"""What SMALLER says of which method works on which network is what the tool finds."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALLER = (ROOT / "softcache/docs/SMALLER.md").read_text(encoding="utf-8")
METHODS = ["carve:depth=0.5", "prune:structured,amount=0.5", "lowrank:rank=0.25", "quantise:int8"]


def told_of(network: str) -> list[str]:
    """Its cells on the page."""
    (line,) = [line for line in SMALLER.splitlines() if line.startswith("|") and f"`{network}`" in line.split("|")[1]]
    return [cell.strip() for cell in line.split("|")[2:-1]]


@pytest.fixture(scope="module")
def tool() -> dict[str, Any]:
    found = runpy.run_path(str(ROOT / "tools/smaller"), run_name="smaller")
    found["cost"].SECONDS = 0.0
    return found


@pytest.mark.slow
@pytest.mark.parametrize("network", ["softcache:cnn", "softcache:textcnn"])
def test_the_page_has_what_the_tool_finds(tool: dict[str, Any], network: str) -> None:
    for told, found in zip(told_of(network), tool["row"](network, METHODS), strict=True):
        if found.startswith("refused: "):
            assert told.startswith("refused")
        else:
            assert told.split(" ")[0] == found

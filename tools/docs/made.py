"""Files that are made from the code: written anew, or only compared with what is there."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path


def write_or_compare(about: str | None, made: Mapping[Path, str]) -> None:
    """The command of a tool that makes files: writes them, or with --quick says which are as they should be.

    Args:
        about: what --help says of the tool.
        made: file -> its whole text.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="write nothing, say whether it is as it should be")
    quick = parser.parse_args().quick
    for path, text in made.items():
        if quick:
            same = path.read_text(encoding="utf-8") == text
            print(f"{path.name}: {'as it should be' if same else 'to be made again'}")
        else:
            path.write_text(text, encoding="utf-8")
            print(path)

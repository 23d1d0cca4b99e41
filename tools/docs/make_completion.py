"""Write the completion scripts that `softcache completion` prints, from the parsers: python tools/docs/make_completion.py

Needs the extra `completion` (shtab). The test of the scripts compares them with what this makes.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import shtab

from softcache.commands import VERBS
from softcache.commands.completion import SCRIPTS, SHELLS
from softcache.commands.flags import load_verb, make_parser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from docs.made import write_or_compare

FOLDERS = {"DIR", "CACHE", "OUT"}  # what stands for a folder in help; FILE and MODEL may be one or a file
FILES = {"FILE", "MODEL", "RECIPE"}


def script(shell: str) -> str:
    """One shell's script."""
    parser = make_parser()
    (verbs,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for name in VERBS:
        fields = {field.name: field for field in dataclasses.fields(load_verb(name).config)}
        for action in verbs.choices[name]._actions:
            field = fields.get(action.dest)
            if action.metavar in FOLDERS:
                action.complete = shtab.DIRECTORY
            elif action.metavar in FILES:
                action.complete = shtab.FILE
            elif field is not None and field.metadata["choices"]:
                action.choices = field.metadata["choices"]
            elif (name, action.dest) == ("help", "topic"):
                action.choices = list(VERBS)
    return shtab.complete(parser, shell).rstrip() + "\n"


def place_of(shell: str) -> Path:
    return SCRIPTS / f"softcache.{shell}"


def main() -> None:
    write_or_compare(__doc__, {place_of(shell): script(shell) for shell in SHELLS})


if __name__ == "__main__":
    main()

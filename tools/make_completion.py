"""Write the completion scripts that `softcache completion` prints, from the parsers.

    python tools/make_completion.py
    python tools/make_completion.py --quick    # makes the scripts, writes nothing, and says whether they are those there

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="write nothing; exit code 1 where a script is another")
    if parser.parse_args().quick:
        other = [shell for shell in SHELLS if place_of(shell).read_text(encoding="utf-8") != script(shell)]
        print(f"{SCRIPTS}: {', '.join(other) or 'none'} of {', '.join(SHELLS)} other than it is made")
        return int(bool(other))
    SCRIPTS.mkdir(exist_ok=True)
    for shell in SHELLS:
        place_of(shell).write_text(script(shell), encoding="utf-8")
        print(place_of(shell))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Write softcache/docs/CLI.md from the verbs' own words: python tools/docs/make_cli_page.py

The page does not go through argparse's help, whose lines differ between Python versions.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from pathlib import Path

from softcache.commands import VERBS
from softcache.commands.flags import SHARED, Verb, help_of, load_verb, metavar_of, usage_of
from softcache.commands.help import DOCS
from softcache.config import flag_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from docs.made import write_or_compare

PAGE = DOCS / "CLI.md"
BEGINNING = """# The command line

Every verb of `softcache`, its examples and its flags. This page is made from the verbs by `python tools/docs/make_cli_page.py`;
`softcache VERB --help` says the same in the terminal.

Settings of every verb may also stand in a TOML file (`--config`) under the flag's name without its dashes, or in
`--set key=value`. A flag goes before `--set`, `--set` before the file, the file before the default; `--print-config` shows what
came of it, and stops.

A command ends with exit code 0 when it did what it was asked, 2 with a message and a tip where the user can mend something,
130 after Ctrl-C and 143 after SIGTERM; `verify` and `repair` end with 1 where a cache is damaged, and `verify` with 3 where it
is unfinished. Progress is written to stderr after two seconds: a bar on a terminal, a line every ten seconds elsewhere.
"""


def page() -> str:
    """The whole page."""
    shared = [_row(f"{flag} {how.get('metavar', '')}".strip(), how["help"]) for flag, how in SHARED.items()]
    sections = [_section(name, load_verb(name)) for name in VERBS]
    return "\n".join([BEGINNING, "## Flags of every verb\n", *shared, "", *sections])


def _section(name: str, verb: Verb) -> str:
    fields = dataclasses.fields(verb.config)
    hints = typing.get_type_hints(verb.config)
    rows = [_row(_usage(field, hints[field.name]), _text(field)) for field in fields]
    lines = verb.examples.replace("\\\n", " ").strip().splitlines()
    head = [f"## {name}\n", f"`{usage_of(name, verb)}`: {verb.summary}.\n", "Examples:\n"]
    return "\n".join([*head, *map(_example, lines), *(["\nFlags:\n", *rows] if rows else []), ""])


def _example(line: str) -> str:
    """A list's item; a remark stands behind it."""
    command, _, remark = line.partition("   (")
    return f"- `{' '.join(command.split())}`" + (f" ({remark}" if remark else "")


def _usage(field: dataclasses.Field[typing.Any], hint: typing.Any) -> str:
    if field.metadata["positional"]:
        return str(field.metadata["metavar"])
    return flag_of(field.name) if hint is bool else f"{flag_of(field.name)} {metavar_of(field)}"


def _text(field: dataclasses.Field[typing.Any]) -> str:
    return help_of(field) + (" (required)" if field.metadata["required"] else "")


def _row(usage: str, text: str) -> str:
    return f"- `{usage}`: {text}"


def main() -> None:
    write_or_compare(__doc__, {PAGE: page()})


if __name__ == "__main__":
    main()

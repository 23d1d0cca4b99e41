"""How a verb becomes a command line: the fields of its config are its flags. The same way for every verb."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import json
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from softcache.commands import VERBS
from softcache.config import Resolved, flag_of, resolve
from softcache.errors import ConfigError
from softcache.version import __version__

RESUMES = "the same command resumes where it stopped"
STARTS_AGAIN = "the same command starts again"


@dataclass(frozen=True)
class Output:
    """How a verb talks.

    Attributes:
        json: one JSON document on stdout, and nothing else there.
        quiet: no progress on stderr.
    """

    json: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class Verb:
    """One verb.

    Attributes:
        config: a frozen dataclass whose fields are made by `softcache.config.option`; each is a flag.
        run: does it, prints what there is to say on stdout, and returns the exit code.
        summary: one line.
        examples: command lines, at least two, one a line; a backslash at the end of a line goes on with the next.
        after_stop: what a user who stopped it is told about going on.
        writes: it writes files; where they may be larger than 1 MB, it calls `require_room` before it begins.
    """

    config: type[Any]
    run: Callable[[Any, Output], int]
    summary: str
    examples: str
    after_stop: str
    writes: bool


@dataclass(frozen=True)
class Command:
    """A command line that was understood."""

    verb: Verb
    resolved: Resolved[Any]
    output: Output
    print_config: bool

    def run(self) -> int:
        """The exit code."""
        if self.print_config:
            print(_config_text(self.resolved, self.output))
            return 0
        return self.verb.run(self.resolved.config, self.output)


def load_verb(name: str) -> Verb:
    """Import the one module that holds it."""
    verb: Verb = importlib.import_module(VERBS[name]).VERB
    return verb


def parse(words: Sequence[str]) -> Command:
    """Understand a command line.

    Raises:
        ConfigError: it cannot be understood; a mistyped verb or flag names the nearest.
        SystemExit: after --help and --version.
    """
    name = words[0] if words else ""
    if name and not name.startswith("-") and name not in VERBS:
        raise ConfigError(f"there is no verb {name!r}", tip=_meant(name, VERBS, "softcache --help"))
    parser = make_parser([name] if name in VERBS else VERBS)
    arguments, unknown = parser.parse_known_args(words)
    verb = load_verb(arguments.verb)
    if unknown:
        flags = [flag_of(field.name) for field in dataclasses.fields(verb.config) if not field.metadata["positional"]]
        wrong = next((word for word in unknown if word.startswith("-")), "").partition("=")[0]
        tip = _meant(wrong, [*flags, *SHARED], f"softcache {arguments.verb} --help")
        raise ConfigError(f"unrecognized arguments: {' '.join(unknown)}", tip=tip)
    given = _given(verb.config, arguments)
    resolved = resolve(verb.config, file=arguments.config, sets=arguments.set, flags=given)
    return Command(verb, resolved, Output(arguments.json, arguments.quiet), arguments.print_config)


def _meant(name: str, known: Iterable[str], see: str) -> str:
    close = difflib.get_close_matches(name, list(known), n=2, cutoff=0.7)
    return (f"did you mean {' or '.join(map(repr, close))}? " if close else "") + f"see `{see}`"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(message, tip=f"see `{self.prog} --help`")


def make_parser(names: Iterable[str] = VERBS) -> argparse.ArgumentParser:
    """The parser of these verbs."""
    parser = _Parser(
        prog="softcache",
        description="Run the teacher once, train any number of students: an offline soft-target cache for distillation.",
        epilog="examples:\n  softcache demo\n  softcache dump --help\n  softcache help\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-V", "--version", action="version", version=f"softcache {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name in names:
        verb = load_verb(name)
        _add_flags(verbs.add_parser(name, help=verb.summary, **_words_of(name, verb)), verb)
    return parser


def verb_parser(name: str) -> argparse.ArgumentParser:
    """The parser of one verb alone."""
    verb = load_verb(name)
    parser = _Parser(prog=f"softcache {name}", **_words_of(name, verb))
    _add_flags(parser, verb)
    return parser


def usage_of(name: str, verb: Verb) -> str:
    """What must be given, and what may."""
    words = ["softcache", name]
    for field in dataclasses.fields(verb.config):
        meta = field.metadata
        if meta["positional"]:
            words.append(meta["metavar"] if meta["required"] else f"[{meta['metavar']}]")
    for field in dataclasses.fields(verb.config):
        if field.metadata["required"] and not field.metadata["positional"]:
            words.append(f"{flag_of(field.name)} {metavar_of(field)}")
    return " ".join([*words, "[flags]"])


def _words_of(name: str, verb: Verb) -> dict[str, Any]:
    examples = "\n".join(f"  {line}" for line in verb.examples.strip().splitlines())
    return {
        "usage": usage_of(name, verb),
        "description": verb.summary,
        "epilog": f"examples:\n{examples}\n",
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "allow_abbrev": False,  # a mistyped flag is told, also where it begins like another
    }


# the flags of every verb
SHARED: dict[str, dict[str, Any]] = {
    "--config": {"metavar": "FILE", "help": "settings from a TOML file"},
    "--set": {"action": "append", "default": [], "metavar": "KEY=VALUE", "help": "one setting; repeat"},
    "--print-config": {"action": "store_true", "help": "show every setting and where it came from, and stop"},
    "--quiet": {"action": "store_true", "help": "no progress"},
    "--json": {"action": "store_true", "help": "the result for machines"},
}


def _add_flags(parser: argparse.ArgumentParser, verb: Verb) -> None:
    kind = verb.config
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        meta, hint = field.metadata, hints[field.name]
        how: dict[str, Any] = {"default": None, "help": help_of(field).replace("%", "%%")}
        if meta["positional"]:
            # not required here: it may come from --config; `resolve` refuses where it is missing
            words = "*" if meta["repeat"] else "?"
            parser.add_argument(field.name, nargs=words, metavar=meta["metavar"], **how)
            continue
        if hint is bool:
            how |= {"action": "store_const", "const": "true"}
        else:
            how["metavar"] = metavar_of(field)
            how |= {"action": "append"} if typing.get_origin(hint) is tuple else {}
        parser.add_argument(flag_of(field.name), dest=field.name, **how)
    for flag, how in SHARED.items():
        parser.add_argument(flag, **how)


def metavar_of(field: dataclasses.Field[Any]) -> str | None:
    """What stands for the value of a flag in help."""
    choices, metavar = field.metadata["choices"], field.metadata["metavar"]
    return "{" + ",".join(choices) + "}" if choices else metavar


def help_of(field: dataclasses.Field[Any]) -> str:
    """The help text of a setting, with its default."""
    text: str = field.metadata["help"]
    if field.default in (None, (), False) or field.metadata["required"] or "(default" in text:
        return text
    default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    return f"{text} (default: {default})"


def _given(kind: type[Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """What the flags say, for `resolve`."""
    given = {}
    for field in dataclasses.fields(kind):
        value = getattr(arguments, field.name)
        if value not in (None, []):  # a list of words may be empty, and then come from --config
            joined = isinstance(value, list) and not field.metadata["repeat"]  # a repeated list is one list
            given[field.name] = ",".join(value) if joined else value
    return given


def _config_text(resolved: Resolved[Any], output: Output) -> str:
    """Every setting and where it came from."""
    found = [(name, getattr(resolved.config, name), origin) for name, origin in resolved.origins.items()]
    if output.json:
        return json.dumps({name: {"value": value, "from": origin} for name, value, origin in found})
    from softcache.report.tables import table

    return table(["setting", "value", "from"], [[name, str(value), origin] for name, value, origin in found])

"""softcache help: the pages of softcache/docs in the terminal, and the flags of a verb."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from softcache.commands import VERBS
from softcache.commands.flags import STARTS_AGAIN, Output, Verb, verb_parser
from softcache.config import option
from softcache.errors import ConfigError, nearest

DOCS = Path(__file__).parents[1] / "docs"


@dataclass(frozen=True)
class HelpConfig:
    """softcache help: a page, a verb's flags, or what there is to read."""

    topic: str | None = option(
        None, "name of a page or of a verb (default: list the pages)", metavar="TOPIC", positional=True
    )


def run(config: HelpConfig, output: Output) -> int:
    if config.topic is None:
        print(json.dumps({name: first_sentence(name) for name in pages()}) if output.json else listing())
        return 0
    text = text_of(config.topic)
    if output.json:
        print(json.dumps({"topic": config.topic, "text": text}))
    elif sys.stdout.isatty():
        import pydoc

        pydoc.pager(text)
    else:
        print(text, end="")
    return 0


def pages() -> list[str]:
    """The names of the pages."""
    return sorted(path.stem for path in DOCS.glob("*.md"))


def listing() -> str:
    """All pages, with the first sentence of each."""
    width = max(map(len, pages()), default=0)
    lines = [f"{name:<{width}}  {first_sentence(name)}" for name in pages()]
    usage = ["softcache help TOPIC   shows a page", "softcache help VERB    shows the flags of a verb"]
    return "\n".join([*lines, "", *usage])


def first_sentence(name: str) -> str:
    """Of the first paragraph of a page."""
    text = "\n".join("" if line.startswith("#") else line for line in _read(name).splitlines())
    paragraphs = text.strip().split("\n\n")
    return " ".join(paragraphs[0].split()).partition(". ")[0].rstrip(".")


def text_of(topic: str) -> str:
    """A page, or the help of a verb. `losses` is a verb, `LOSSES` is a page; other pages may be written small.

    Raises:
        ConfigError: there is neither.
    """
    if topic not in pages() and topic in VERBS:
        return verb_parser(topic).format_help()
    for name in (topic, topic.upper()):
        if name in pages():
            return _read(name)
    known = {*VERBS, *(name.lower() for name in pages())}
    raise ConfigError(f"there is no page and no verb {topic!r}", tip=nearest(topic.lower(), known))


def _read(page: str) -> str:
    return (DOCS / f"{page}.md").read_text(encoding="utf-8")


VERB = Verb(
    config=HelpConfig,
    run=run,
    summary="list the pages of the documentation, or show one; or the flags of a verb",
    examples="""
softcache help
softcache help CLI
softcache help dump
""",
    after_stop=STARTS_AGAIN,
    writes=False,
)

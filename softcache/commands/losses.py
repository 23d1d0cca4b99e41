"""softcache losses: flags, examples and printing; the words are in `describe_losses`."""

from __future__ import annotations

import json
from dataclasses import dataclass

from softcache.commands.flags import STARTS_AGAIN, Output, Verb
from softcache.config import option


@dataclass(frozen=True)
class LossesConfig:
    """softcache losses: what a student can learn by."""

    name: str | None = option(None, "explain this one (default: list all)", metavar="LOSS", positional=True)


def run(config: LossesConfig, output: Output) -> int:
    from softcache.commands import describe_losses

    if output.json:
        print(json.dumps(describe_losses.to_json(config.name)))
    else:
        print(describe_losses.explanation(config.name) if config.name else describe_losses.listing())
    return 0


VERB = Verb(
    config=LossesConfig,
    run=run,
    summary="the losses a student can learn by: what they need of a cache, their settings, their papers",
    examples="""
softcache losses
softcache losses dkd
softcache losses --json
""",
    after_stop=STARTS_AGAIN,
    writes=False,
)

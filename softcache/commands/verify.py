"""softcache verify: flags, examples and printing."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from softcache.commands.flags import STARTS_AGAIN, Output, Verb
from softcache.config import option
from softcache.config.options import ALLOW_CODE_HELP
from softcache.errors import ConfigError


@dataclass(frozen=True)
class VerifyConfig:
    """softcache verify: is this cache whole?"""

    cache: str = option(..., "folder of the cache", metavar="CACHE", positional=True)
    quick: bool = option(False, "names and sizes (the default)")
    full: bool = option(False, "hashes, block checksums and HDF5 structure")
    replay: int = option(0, "also render N records and compare pixels", metavar="N")
    data: str | None = option(None, "for --replay (with --allow-code by default as the cache says)", metavar="DATA")
    allow_code: bool = option(False, ALLOW_CODE_HELP)
    signed_by: str | None = option(None, "ask for a signature of somebody in this list of signers", metavar="FILE")


def run(config: VerifyConfig, output: Output) -> int:
    from softcache.check import verify
    from softcache.remote.places import folder_of

    if config.quick and config.full:
        raise ConfigError("--full is not allowed with --quick", tip="give one of them; see `softcache verify --help`")
    verdict = verify.run(
        folder_of(config.cache, "verify"),
        full=config.full,
        quiet=output.quiet or output.json,
        replay=config.replay,
        data=config.data,
        allow_code=config.allow_code,
        signed_by=Path(config.signed_by) if config.signed_by else None,
    )
    print(json.dumps(dataclasses.asdict(verdict)) if output.json else verdict.text())
    return verdict.exit_code


VERB = Verb(
    config=VerifyConfig,
    run=run,
    summary="is this cache whole? exit code 0 whole, 1 damaged, 3 unfinished",
    examples="""
softcache verify caches/digits --quick
softcache verify caches/digits --full --json
softcache verify caches/digits --replay 1000 --data digits
softcache verify caches/signed --full --signed-by signers
""",
    after_stop=STARTS_AGAIN,
    writes=False,
)

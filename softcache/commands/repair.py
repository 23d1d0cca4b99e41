"""softcache repair: flags, examples and printing."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from softcache.commands.flags import Output, Verb
from softcache.config import option
from softcache.config.options import ALLOW_CODE_HELP


@dataclass(frozen=True)
class RepairConfig:
    """softcache repair: make damaged files again."""

    cache: str = option(..., "folder of the cache", metavar="CACHE", positional=True)
    from_: str | None = option(None, "take damaged files from another copy of the cache", metavar="DIR")
    data: str | None = option(None, "the transfer set (with --allow-code by default as the cache says)", metavar="DATA")
    teacher: tuple[str, ...] = option(
        (), "repeat (with --allow-code by default as the cache says)", metavar="TEACHER", repeat=True
    )
    classes_map: str | None = option(
        None, "which of the data's classes is which of the teachers': as the dump was given it", metavar="FILE"
    )
    device: str = option("auto", "as it was at the dump: bytes may depend on it", metavar="DEVICE")
    allow_code: bool = option(False, ALLOW_CODE_HELP)
    workers: int | None = option(None, "loader processes (default: 0 on a CPU, 4 with a GPU)", metavar="N")


def run(config: RepairConfig, output: Output) -> int:
    from softcache.check import repair
    from softcache.remote.places import folder_of

    means = repair.Means(
        source=folder_of(config.from_, "repair --from") if config.from_ else None,
        data=config.data,
        teachers=config.teacher,
        classes_map=config.classes_map,
        device=config.device,
        workers=config.workers,
        allow_code=config.allow_code,
    )
    result = repair.run(folder_of(config.cache, "repair"), means, quiet=output.quiet or output.json)
    print(json.dumps(dataclasses.asdict(result)) if output.json else result.text())
    return result.exit_code


VERB = Verb(
    config=RepairConfig,
    run=run,
    summary="make damaged or missing files again, and prove that they are the same bytes",
    examples="""
softcache repair caches/digits --data digits --teacher runs/teacher
softcache repair caches/digits --from /backup/digits
""",
    after_stop="mended files stay; the same command goes on with the others",
    writes=True,
)

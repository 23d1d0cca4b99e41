"""softcache merge: flags, examples and printing."""

from __future__ import annotations

import json
from dataclasses import dataclass

from softcache.commands.flags import RESUMES, Output, Verb
from softcache.config import option
from softcache.errors import ConfigError


@dataclass(frozen=True)
class MergeConfig:
    """softcache merge: several caches as one."""

    folders: tuple[str, ...] = option(
        ...,
        "folders of the caches, and behind them that of the merged one",
        metavar="A B [C ...] OUT",
        positional=True,
        repeat=True,
    )
    license: str | None = option(None, "of the merged cache (default: theirs, if it is the same)", metavar="TEXT")


def run(config: MergeConfig, output: Output) -> int:
    from softcache.cache.schema import PROVISIONAL_FORMAT
    from softcache.remote.places import folder_of
    from softcache.report.tables import size
    from softcache.share import merge

    if len(config.folders) < 3:
        raise ConfigError(
            f"{len(config.folders)} folders: two caches are the least, and then the folder of the merged one",
            tip="softcache merge A B OUT",
        )
    *caches, out = (folder_of(one, "merge") for one in config.folders)
    made = merge.run(caches, out, license=config.license, quiet=output.quiet or output.json)
    manifest = made.manifest
    plan = manifest.plan
    members = [member.name for member in plan.members]
    if output.json:
        facts = {"path": str(out), "id": manifest.id, "merged": made.how, "bytes": manifest.nbytes}
        facts |= {"samples": plan.samples.count, "views": plan.views.count, "members": members}
        print(json.dumps(facts | {"notes": list(made.notes)}))
        return 0
    views = f"{plan.views.count} view{'s' * (plan.views.count != 1)}"
    what = f"{plan.samples.count:,} samples x {views} of {', '.join(members)}"
    print(f"{out}: {what}; {size(manifest.nbytes)}; merged by their {made.how}")
    if plan.format == PROVISIONAL_FORMAT:
        print(f"format version {plan.format}, which is provisional: a later softcache may want it made again")
    print(f"id {manifest.id}")
    return 0


VERB = Verb(
    config=MergeConfig,
    run=run,
    summary="several caches as one: their members, their views or their samples",
    examples="""
softcache merge caches/digits caches/second caches/both
softcache merge caches/mnist caches/mnist-later caches/mnist-all --license cc-by-4.0 --json
""",
    after_stop=RESUMES,
    writes=True,
)

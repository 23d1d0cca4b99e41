"""softcache plan: examples and printing; its flags are `softcache.config.PlanConfig`."""

from __future__ import annotations

import json

from softcache.commands.flags import STARTS_AGAIN, Output, Verb
from softcache.config import PlanConfig


def run(config: PlanConfig, output: Output) -> int:
    from softcache.dump import forecast

    found = forecast.run(config, quiet=output.quiet)
    print(json.dumps(found.to_json()) if output.json else found.text())
    return 0


VERB = Verb(
    config=PlanConfig,
    run=run,
    summary="what a dump would cost and keep: size, time and fidelity of every codec, before it is paid for",
    examples=r"""
softcache plan --data digits --teacher runs/teacher --policy shift:pixels=1 --views 8
softcache plan --data imagefolder:train --teacher torchvision:resnet50@IMAGENET1K_V2 --max-kl 1e-3 --at-temperature 4
""",
    after_stop=STARTS_AGAIN,
    writes=False,
)

"""softcache shrink: examples and printing; its flags are `softcache.config.ShrinkConfig`."""

from __future__ import annotations

import json

from softcache.commands.flags import STARTS_AGAIN, Output, Verb
from softcache.config import ShrinkConfig


def run(config: ShrinkConfig, output: Output) -> int:
    from softcache.students import scan, shrink

    result = scan.scan(config, quiet=output.quiet) if config.scan else shrink.run(config, quiet=output.quiet)
    print(json.dumps(result.to_json()) if output.json else result.text())
    return 0


VERB = Verb(
    config=ShrinkConfig,
    run=run,
    summary="make a trained model smaller: carve, prune, low rank, int8; what it costs before and after",
    examples=r"""
softcache shrink runs/teacher --by lowrank:energy=0.9 --data digits --eval-data digits?split=test --out runs/low
softcache shrink runs/teacher --by prune:unstructured,amount=0.5 --out runs/sparse
softcache shrink torchvision:resnet50@IMAGENET1K_V2 --by prune:unstructured,amount=0.5 --by lowrank:rank=0.25 \
                 --data imagefolder:train --out runs/small
softcache shrink runs/teacher --by quantise:int8 --data digits --eval-data digits?split=test --out runs/int8
softcache shrink runs/teacher --scan --eval-data digits?split=test
""",
    after_stop=STARTS_AGAIN,
    writes=True,
)

"""softcache dump: examples and printing; its flags are `softcache.config.DumpConfig`."""

from __future__ import annotations

import json
import shlex

from softcache.commands.flags import RESUMES, Output, Verb
from softcache.config import DumpConfig


def run(config: DumpConfig, output: Output) -> int:
    from softcache.cache.card.use import suggested_loss
    from softcache.dump import flow
    from softcache.remote.places import folder_of
    from softcache.report.tables import size

    if config.list_modules:
        from softcache.dump.list_modules import list_modules

        modules = list_modules(config)
        print(json.dumps({"modules": modules}) if output.json else modules)
        return 0
    folder_of(config.out, "dump")
    result = flow.run(config, quiet=output.quiet)
    manifest = result.manifest
    if output.json:
        print(json.dumps({"path": str(result.path), "id": manifest.id if manifest else None}))
    elif manifest is None:
        print(f"{result.path}: this part is done; the cache is committed when the other parts are")
    else:
        print(f"{result.path}: {len(manifest.files)} files, {size(manifest.nbytes)}, id {manifest.id}")
        data = shlex.quote(config.data)
        loss = suggested_loss(manifest.plan)
        if loss is None:
            of_tokens = manifest.plan.vocabulary is not None
            what = "has no student of tokens yet" if of_tokens else "learns of words their classes alone"
            print(f"softcache train {what}; {result.path}/README.md has a loop of your own")
            return 0
        asked = "" if loss == "kd:temperature=4" else f" --loss {loss}"  # what `train` takes by itself
        print(f"next: softcache train --cache {result.path} --data {data} --student ...{asked} --out runs/student")
    return 0


VERB = Verb(
    config=DumpConfig,
    run=run,
    summary="run a teacher or an ensemble once over a transfer set and write its logits to a cache",
    examples=r"""
softcache dump --data digits --teacher runs/teacher --out caches/digits
softcache dump --data torchvision:MNIST?root=data --teacher softcache:mlp?hidden=1200,1200@runs/teacher \
               --teacher runs/second --policy shift:pixels=2 --views 8 --codec float16 --out caches/mnist
torchrun --nproc-per-node 4 -m softcache dump --data imagefolder:train \
         --teacher torchvision:resnet50@IMAGENET1K_V2 --out caches/imagenet
softcache dump --data digits --teacher runs/teacher --out caches/in-parts --part 1/3   (and 2/3, 3/3, as a job array)
softcache dump --extend --out caches/mnist --data torchvision:MNIST?root=data --views 16 \
               --teacher softcache:mlp?hidden=1200,1200@runs/teacher --teacher runs/second
softcache dump --data digits --teacher runs/teacher --features layers.0:flatten --codec int8 --out caches/features
softcache dump --data digits --teacher runs/teacher --for at,crd,dkd --out caches/for-losses
softcache dump --data digits --teacher runs/teacher --out caches/any --list-modules
""",
    after_stop=RESUMES,
    writes=True,
)

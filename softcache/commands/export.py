"""softcache export: examples and printing; its flags are `softcache.config.ExportConfig`."""

from __future__ import annotations

import json
from dataclasses import dataclass

from softcache.commands.flags import STARTS_AGAIN, Output, Verb
from softcache.config import ExportConfig, option


@dataclass(frozen=True)
class ExportOfModel(ExportConfig):
    """softcache export: a model as one file for other programs, verified on an evaluation set."""

    model: str = option(..., "run folder or MODEL@WEIGHTS", metavar="MODEL", positional=True)


def run(config: ExportOfModel, output: Output) -> int:
    from softcache.students import export

    result = export.run(config.model, config, quiet=output.quiet or output.json)
    print(json.dumps(result.to_json()) if output.json else result.text())
    return 0


VERB = Verb(
    config=ExportOfModel,
    run=run,
    summary="write a model as safetensors, torch.export program or ONNX, verified by running it on an evaluation set",
    examples="""
softcache export runs/s --to onnx --data digits?split=test
softcache export runs/s --to program --data digits?split=test --out student.pt2
softcache export softcache:cnn@weights.pt --to safetensors --data digits?split=test --out cnn.safetensors
""",
    after_stop=f"nothing was written; {STARTS_AGAIN}",
    writes=True,
)

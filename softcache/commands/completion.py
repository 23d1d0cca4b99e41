"""softcache completion: the scripts that complete verbs and flags in a shell. Made by tools/docs/make_completion.py."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from softcache.commands.flags import STARTS_AGAIN, Output, Verb
from softcache.config import option

SHELLS = ("bash", "zsh", "fish")
SCRIPTS = Path(__file__).parent / "completion"


@dataclass(frozen=True)
class CompletionConfig:
    """softcache completion: the script for one shell."""

    shell: str = option(..., "bash, zsh or fish", choices=SHELLS, metavar="SHELL", positional=True)


def run(config: CompletionConfig, output: Output) -> int:
    script = (SCRIPTS / f"softcache.{config.shell}").read_text(encoding="utf-8")
    print(json.dumps({"shell": config.shell, "script": script}) if output.json else script.rstrip())
    return 0


VERB = Verb(
    config=CompletionConfig,
    run=run,
    summary="print the script that completes verbs and flags in bash, zsh or fish",
    examples="""
softcache completion bash   (eval "$(softcache completion bash)" in ~/.bashrc loads it)
softcache completion zsh    (into a file _softcache in a folder of $fpath)
softcache completion fish   (into ~/.config/fish/completions/softcache.fish)
""",
    after_stop=STARTS_AGAIN,
    writes=False,
)

"""What another package says went wrong, in one line without what may be a secret."""

from __future__ import annotations

import re

LONGEST = 200  # characters
_SECRETS = re.compile(r"\?[^\s\"'<>)]*|\b(hf_|eyJ|AKIA|ASIA)[\w.-]+|//[^/\s]*@", re.ASCII)


def scrubbed(exc: BaseException) -> str:
    """The kind of the innermost cause, and the first line of its text: no queries of addresses, no tokens, no passwords."""
    while exc.__cause__ is not None:
        exc = exc.__cause__
    line = next(iter(str(exc).strip().splitlines()), "")
    text = _SECRETS.sub("...", line)
    return f"{type(exc).__name__}: {text[:LONGEST]}" if text else type(exc).__name__

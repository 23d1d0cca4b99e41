"""softcache sign: flags, examples and printing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from softcache.commands.flags import STARTS_AGAIN, Output, Verb
from softcache.config import option


@dataclass(frozen=True)
class SignConfig:
    """softcache sign: say that a cache is yours."""

    cache: str = option(..., "folder of the cache", metavar="CACHE", positional=True)
    key: str = option(..., "private Ed25519 key in OpenSSH's form, without a passphrase", metavar="FILE")
    id: str | None = option(None, "of an older state of the cache (default: the newest)", metavar="ID")


def run(config: SignConfig, output: Output) -> int:
    from softcache.cache.signatures import NAMESPACE, signatures_path
    from softcache.remote.places import folder_of
    from softcache.share import sign

    id, fingerprint = sign.run(folder_of(config.cache, "sign"), Path(config.key), id=config.id)
    if output.json:
        print(json.dumps({"path": config.cache, "id": id, "key": fingerprint, "file": signatures_path(id)}))
        return 0
    print(f"{config.cache}: signed by {fingerprint}\nid {id}")
    print(f"who has your public key in a list of signers: softcache verify {config.cache} --full --signed-by FILE")
    print(
        f"without softcache: printf %s {id} | ssh-keygen -Y verify -n {NAMESPACE} -I NAME -f FILE -s {signatures_path(id)}"
    )
    return 0


VERB = Verb(
    config=SignConfig,
    run=run,
    summary="a signature of a cache's id, as ssh-keygen makes and checks them",
    examples="""
softcache sign caches/digits --key id_ed25519
softcache sign caches/digits --key id_ed25519 --json
""",
    after_stop=STARTS_AGAIN,
    writes=True,
)

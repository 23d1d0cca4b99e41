"""python -m softcache."""

import os
import sys

from softcache.cli import main

if __name__ == "__main__":
    code = main()
    if (
        "TORCHELASTIC_RUN_ID" in os.environ
    ):  # under torchrun: everything is written, and torch's threads may abort a teardown
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)

"""python -m softcache."""

import os
import sys

from softcache.cli import main

if __name__ == "__main__":
    code = main()
    # under torchrun: everything is written by now, and torch's threads may abort a teardown
    if "TORCHELASTIC_RUN_ID" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)

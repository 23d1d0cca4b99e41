"""python -m softcache"""

import sys

from softcache.cli import main

if __name__ == "__main__":
    sys.exit(main())

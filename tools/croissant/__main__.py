"""Do the programs of others read what `softcache card` makes: mlcroissant, Hugging Face's datasets and pyarrow?

    python tools/croissant                       # an environment of its own in a temporary folder, thrown away afterwards
    python tools/croissant --venv ~/croissant    # kept, and used again
    python tools/croissant --quick               # with the packages that are here: what needs others is skipped

It sees the packages of the environment that it is run in, and installs what is missing beside them; then it runs the tests that
are skipped without these. Exit code 1 where one fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

PACKAGES = ("mlcroissant>=1.0.17", "pyarrow", "datasets>=4.0")
ROOT = Path(__file__).resolve().parents[2]


def python_of(folder: Path) -> Path:
    """The interpreter of an environment that sees this one's packages, with PACKAGES; made where it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    inside = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    Path(inside.strip(), "of_softcache.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, help="folder of the environment (default: a temporary one)")
    parser.add_argument(
        "--quick", action="store_true", help="install nothing: what needs a package is skipped without it"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        python = sys.executable if arguments.quick else python_of(arguments.venv or Path(temporary))
        tests = ["tests/share/test_show.py", "-k", "mlcroissant or datasets or hubs or bytes_twice", "-rs", "-n", "0"]
        done = subprocess.run([python, "-m", "pytest", *tests], cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())

"""The source archive: the package, and what tests, measures and checks it.

`pyproject.toml` names this class. setuptools itself would leave out tests and tools, and asks for a `MANIFEST.in` beside
`pyproject.toml` to put them back.
"""

from __future__ import annotations

from setuptools.command.sdist import sdist

FOLDERS = ("tests", "tools", ".ci")
FILES = (".gitignore",)
LEFTOVERS = ("*.py[cod]", ".*_cache/**")


class SourceArchive(sdist):
    """`sdist` with every file of FOLDERS and FILES; what an interpreter or a test run left among them stays out."""

    def make_distribution(self) -> None:
        for folder in FOLDERS:
            self.filelist.graft(folder)
        self.filelist.extend(FILES)
        for pattern in LEFTOVERS:
            self.filelist.global_exclude(pattern)
        super().make_distribution()

"""Files that are not files."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

from hostile.forge import Forge, case
from hostile.honest import PLAIN, SAMPLES


def _moved_and_linked(forge: Forge, path: str) -> None:
    aside = forge.root.with_name(forge.root.name + "-aside")
    aside.mkdir()
    shutil.move(forge.root / path, aside / "it")
    (forge.root / path).symlink_to(aside / "it")


@case("file/a symbolic link")
def a_symbolic_link(forge: Forge) -> None:
    _moved_and_linked(forge, PLAIN)


@case("file/a symbolic link within the cache")
def a_symbolic_link_within_the_cache(forge: Forge) -> None:
    shutil.move(forge.root / PLAIN, forge.root / "members/plain/other.h5")
    (forge.root / PLAIN).symlink_to("other.h5")


@case("file/a folder that is a symbolic link")
def a_folder_that_is_a_symbolic_link(forge: Forge) -> None:
    _moved_and_linked(forge, "members/plain")


@case("file/the folder of all members is a symbolic link")
def the_folder_of_all_members_is_a_symbolic_link(forge: Forge) -> None:
    _moved_and_linked(forge, "members")


@case("file/samples.h5 is a symbolic link")
def samples_h5_is_a_symbolic_link(forge: Forge) -> None:
    _moved_and_linked(forge, SAMPLES)


@case("file/a symbolic link to itself")
def a_symbolic_link_to_itself(forge: Forge) -> None:
    (forge.root / PLAIN).unlink()
    (forge.root / PLAIN).symlink_to(Path(PLAIN).name)


@case("file/the manifest is a symbolic link")
def the_manifest_is_a_symbolic_link(forge: Forge) -> None:
    _moved_and_linked(forge, "manifest.json")


@case("file/the folder of manifests is a symbolic link", gate="verify")
def the_folder_of_manifests_is_a_symbolic_link(forge: Forge) -> None:
    _moved_and_linked(forge, "manifests")


@case("file/the manifest's copy is a symbolic link", gate="verify")
def the_manifests_copy_is_a_symbolic_link(forge: Forge) -> None:
    (copy,) = (forge.root / "manifests").iterdir()
    _moved_and_linked(forge, f"manifests/{copy.name}")


@case("file/a pipe")
def a_pipe(forge: Forge) -> None:
    (forge.root / PLAIN).unlink()
    os.mkfifo(forge.root / PLAIN)


@case("file/the manifest is a pipe")
def the_manifest_is_a_pipe(forge: Forge) -> None:
    (forge.root / "manifest.json").unlink()
    os.mkfifo(forge.root / "manifest.json")


@case("file/a socket")
def a_socket(forge: Forge) -> None:
    (forge.root / PLAIN).unlink()
    here = os.getcwd()
    os.chdir((forge.root / PLAIN).parent)  # a socket's path may have 107 bytes at most
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(Path(PLAIN).name)
    os.chdir(here)


@case("file/a directory")
def a_directory(forge: Forge) -> None:
    (forge.root / PLAIN).unlink()
    (forge.root / PLAIN).mkdir()


@case("file/the manifest is a directory")
def the_manifest_is_a_directory(forge: Forge) -> None:
    (forge.root / "manifest.json").unlink()
    (forge.root / "manifest.json").mkdir()


@case("file/a folder that is a file")
def a_folder_that_is_a_file(forge: Forge) -> None:
    shutil.rmtree(forge.root / "members/plain")
    (forge.root / "members/plain").write_bytes(b"")


@case("file/missing")
def missing(forge: Forge) -> None:
    (forge.root / PLAIN).unlink()


@case("file/empty, and the manifest says so")
def empty_and_the_manifest_says_so(forge: Forge) -> None:
    (forge.root / PLAIN).write_bytes(b"")
    forge.refit(PLAIN)
    forge.save()


@case("file/no copy of the manifest")
def no_copy_of_the_manifest(forge: Forge) -> None:
    for copy in (forge.root / "manifests").iterdir():
        copy.unlink()


@case("file/the copy of the manifest has other bytes", gate="verify")
def the_copy_of_the_manifest_has_other_bytes(forge: Forge) -> None:
    (copy,) = (forge.root / "manifests").iterdir()
    copy.write_bytes(copy.read_bytes() + b" ")

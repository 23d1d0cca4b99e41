"""Places in a file that are not the data sets' own."""

from __future__ import annotations

from typing import Any

from hostile.forge import Forge, case
from hostile.honest import PIXELS, PLAIN
from hostile.metadata import patch_header


@case("place/two data sets swapped", gate="verify", numbers="other")
def two_data_sets_swapped(forge: Forge) -> None:
    one, other = forge.array(PLAIN, "eps"), forge.array(PLAIN, "feature0_error")
    one["offset"], other["offset"] = other["offset"], one["offset"]
    forge.refit(PLAIN)
    forge.save()


@case("place/over an HDF5 header", gate="verify", numbers="other")
def over_an_hdf5_header(forge: Forge) -> None:
    forge.array(PIXELS, "pixel_digests")["offset"] = 4096  # the root group's
    forge.refit(PIXELS)
    forge.save()


@case("place/over an HDF5 header, and HDF5 says so too", gate="verify", numbers="other")
def over_an_hdf5_header_and_hdf5_says_so_too(forge: Forge) -> None:
    data, array = (forge.root / PLAIN).read_bytes(), forge.array(PLAIN, "eps")
    place = data.rfind(b"OHDR", 0, forge.array(PLAIN, "logits")["offset"])  # the header of `logits`
    patch_header(forge, "eps", array["offset"].to_bytes(8, "little"), place.to_bytes(8, "little"))
    array["offset"] = place
    forge.refit(PLAIN)
    forge.save()


def _place_case(name: str, path: str, data_set: str, **changes: Any) -> None:
    def make(forge: Forge) -> None:
        forge.array(path, data_set).update(changes)
        offset = changes.get("offset", 0)
        if "dtype" not in changes and isinstance(offset, int) and offset >= 0 and "shape" not in changes:
            forge.refit(path)  # else there is nothing that could be made to fit
        forge.save()

    case(f"place/{name}", gate="open")(make)


_place_case("offset into the superblock", PIXELS, "pixel_digests", offset=0)
_place_case("offset not aligned", PIXELS, "pixel_digests", offset=8200)
_place_case("negative offset", PIXELS, "pixel_digests", offset=-4096)
_place_case("offset at the end of the file", PIXELS, "pixel_digests", offset=2**20)
_place_case("offset beyond 2^53", PIXELS, "pixel_digests", offset=2**53)
_place_case("offset beyond 2^64", PIXELS, "pixel_digests", offset=2**64)
_place_case("offset of a fraction", PIXELS, "pixel_digests", offset=8192.0)
_place_case("offset true", PIXELS, "pixel_digests", offset=True)
_place_case("shape of 2 PiB", PIXELS, "pixel_digests", shape=[2, 2**48])
_place_case("shape whose bytes overflow", PIXELS, "pixel_digests", shape=[2**40, 2**40])
_place_case("negative axes", PIXELS, "pixel_digests", shape=[-2, -256])
_place_case("no axes", PIXELS, "pixel_digests", shape=[])
_place_case("axes of nothing", PIXELS, "pixel_digests", shape=[2, 0], offset=0)
_place_case("a thousand axes", PIXELS, "pixel_digests", shape=[2, 256, *[1] * 1000])
_place_case("dtype object", PIXELS, "pixel_digests", dtype="|O")
_place_case("dtype big-endian", PIXELS, "pixel_digests", dtype=">u4")
_place_case("dtype structured", PIXELS, "pixel_digests", dtype="<u2,<u2")
_place_case("dtype of no known name", PIXELS, "pixel_digests", dtype="fast")
_place_case("dtype double", PIXELS, "pixel_digests", dtype="<f8", shape=[2, 128])


@case("place/two entries for the same bytes")
def two_entries_for_the_same_bytes(forge: Forge) -> None:
    forge.array(PLAIN, "feature0_error")["offset"] = forge.array(PLAIN, "eps")["offset"]
    forge.refit(PLAIN)
    forge.save()


@case("place/data sets overlap")
def data_sets_overlap(forge: Forge) -> None:
    forge.array(PLAIN, "eps")["offset"] = forge.array(PLAIN, "logits")["offset"] + 4096
    forge.refit(PLAIN)
    forge.save()


@case("place/checksums over their data")
def checksums_over_their_data(forge: Forge) -> None:
    forge.array(PLAIN, "eps_crc32")["offset"] = forge.array(PLAIN, "eps")["offset"]
    forge.save()


@case("place/data sets of no file: many files of one TiB each")
def data_sets_of_no_file_many_files_of_one_tib_each(forge: Forge) -> None:
    """Files with holes: a TiB that takes no space, of which the data sets use a few kB."""
    with (forge.root / PLAIN).open("r+b") as handle:
        handle.truncate(2**40)
    forge.file(PLAIN)["bytes"] = 2**40
    forge.save()

"""Numbers that no dump writes, honestly stored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from hostile.forge import Forge, Gate, case
from hostile.honest import CODED, CONSTANTS, DENSE, PIXELS, PLAIN, PROBE, ROWS, SAMPLES, VIEWS


def _values_case(name: str, path: str, change: Callable[[dict[str, np.ndarray]], Any], *, gate: Gate = "open") -> None:
    """A file written by the real writer, with other arrays; the manifest's plan stays."""

    def make(forge: Forge) -> None:
        arrays = {n: forge.read(path, n).copy() for n in forge.file(path)["arrays"] if not n.endswith("_crc32")}
        change(arrays)
        place = {name: value for name, value in forge.file(path).items() if name in ("rows", "views", "statistics")}
        forge.replace(path, arrays)
        forge.file(path).update(place)
        forge.save()

    case(f"values/{name}", gate=gate, numbers="other")(make)


def _put(name: str, at: Any, value: Any) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda arrays: arrays[name].__setitem__(at, value)


def _now(name: str, make: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda arrays: arrays.update({name: make(arrays[name])})


_values_case("label beyond the classes", SAMPLES, _put("labels", 5, 6))
_values_case("label below -1", SAMPLES, _put("labels", 5, -2))
_values_case("label of 2^31 - 1", SAMPLES, _put("labels", 5, 2**31 - 1))
_values_case("key offsets not ascending", SAMPLES, _put("key_offsets", 5, 2**40))
_values_case("key offsets end early", SAMPLES, _put("key_offsets", -1, 3))
_values_case("key offsets begin late", SAMPLES, _put("key_offsets", 0, 3))
_values_case("a sample id twice", SAMPLES, lambda a: a["ids"].__setitem__(1, a["ids"][0]), gate="verify")
_values_case("ids of other samples", SAMPLES, lambda a: a["ids"].__setitem__(slice(2), a["ids"][[1, 0]]), gate="verify")
_values_case("fewer samples", SAMPLES, lambda a: a.update({n: v[:299] for n, v in a.items() if n != "key_bytes"}))
_values_case("an extra data set of the samples", SAMPLES, lambda a: a.update(extra=np.zeros(3, "<f4")))
_values_case("no digests", SAMPLES, lambda a: a.pop("digests"))
_values_case("probe: shapes of more pixels", PROBE, _put("shapes", (0, 0), 2**31), gate="open")
_values_case("probe: a row beyond the samples", PROBE, _put("rows", 0, ROWS), gate="open")
_values_case("probe: a view beyond the views", PROBE, _put("views", 0, VIEWS), gate="open")
_values_case("constants: none of the basis", CONSTANTS, lambda a: a.pop("codec_basis"))
_values_case("constants: one more", CONSTANTS, lambda a: a.update(codec_more=np.zeros(3, "<f4")))
_values_case("constants: a mean of other classes", CONSTANTS, _now("codec_mean", lambda v: np.append(v, v)))
_values_case("constants: a basis of another shape", CONSTANTS, _now("codec_basis", lambda v: v[:, :7]))
_values_case("constants: a flat basis", CONSTANTS, _now("codec_basis", lambda v: v.reshape(-1)))
_values_case("constants: a basis of integers", CONSTANTS, _now("codec_basis", lambda v: v.astype("<u8")))
_values_case("constants: steps of another number", CONSTANTS, _now("codec_step", lambda v: v[:3]))
_values_case("constants: widths of 255 bits", CONSTANTS, _put("codec_bits", 0, 255))
_values_case("constants: no widths", CONSTANTS, _put("codec_bits", 0, 0))
_values_case("constants: widths of another group", CONSTANTS, _now("codec_bits", lambda v: np.array([2, 2], "u1")))
_values_case("constants: empty", CONSTANTS, _now("codec_mean", lambda v: v[:0]))
_values_case("constants: a head of no layer", CONSTANTS, lambda a: a.update(head_weight=np.zeros((2, 3, 4), "<f4")))
_values_case("records: a dense row that is not there", CODED, _put("records", (0, 0, slice(4, 8)), 255))
_values_case("records: a dense row past the last", CODED, _put("records", (0, 0, slice(4, 8)), [4, 0, 0, 0]))
_values_case("dense: fewer rows", DENSE, _now("logits", lambda v: v[:2]))
_values_case("dense: rows of other classes", DENSE, _now("logits", lambda v: v[:, :5]))
_values_case("records of another length", CODED, _now("records", lambda v: v[:, :, :-1]))
_values_case("logits of other classes", PLAIN, _now("logits", lambda v: v[:, :, :-1]))
_values_case("logits of another dtype", PLAIN, _now("logits", lambda v: v.astype("<f4")))
_values_case("eps of another dtype", PLAIN, _now("eps", lambda v: v.astype("<f4")))
_values_case("no eps", PLAIN, lambda a: a.pop("eps"))
_values_case("an extra data set of a part", PLAIN, lambda a: a.update(extra=a["eps"]))
_values_case("a feature of another shape", PLAIN, _now("feature0", lambda v: v[:, :, :2]))
_values_case("pixel digests of other views", PIXELS, _now("pixel_digests", lambda v: v[:1]))


@case("values/checksums of other bytes", numbers="other")
def checksums_of_other_bytes(forge: Forge) -> None:
    forge.write(PLAIN, "logits", np.ones(7, "<f2"))  # size and sha256 are made to fit, the checksums are not
    data = (forge.root / PLAIN).read_bytes()
    forge.file(PLAIN)["sha256"] = hashlib.sha256(data).hexdigest()
    forge.save()

"""`lowrank`: coordinates in a fitted basis over classes, because the logits of a linear head span few directions.

So do many embeddings, over their numbers: these have no level and no classes that matter, and codes are the nearest.

A row is level + mean + basis (step * code): transform coding (Huang and Schultheiss, "Block quantization of correlated
Gaussian random variables", 1963). The basis is the principal components of the probe's rows, and bits go where one more lowers
the squared error most. Codes are not simply the nearest: what rounding some coordinates does to the classes that matter
in this row, the next ones take back (error feedback, as GPTQ does for weights: Frantar et al., 2022, section 3). That is the
encoder's business alone.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from typing import ClassVar, Self

import torch
from torch import Tensor

from softcache.codecs.codec import Codec, Probe, constant
from softcache.codecs.fidelity import explained, kl_rows, relative_errors
from softcache.codecs.floats import Float16Codec, Float32Codec
from softcache.codecs.headtail import HeadTailCodec
from softcache.codecs.int8 import Int8Codec
from softcache.codecs.matmul import UNIT_ROUNDOFF, affine, affine_rounding, full_float32
from softcache.codecs.records import Field, lay_out, read_field, record_bytes, write_fields
from softcache.codecs.transform import (
    GROUP,
    MAX_BITS,
    allot,
    dequantise,
    principal_components,
    quantise,
    quantisers,
)
from softcache.errors import CodecFitError, CodecRangeError, ConfigError

MIN_ROWS = 32  # of a probe
STEPPED_ROWS = 1024  # of the probe, on which steps are chosen
MEASURED_NUMBERS = 1 << 23  # logits of the rows on which sizes are tried, unless these are fewer than MIN_ROWS
SIZE_RATIO = 1.05  # between sizes that are tried
FEW_DENSE = 0.1  # share of dense rows below which sizes are tried one by one
HEAD = 32  # classes of a row whose errors are fed back
PASSES = 6  # of the error feedback, each over half of the coordinates that are left
TAIL_WEIGHT = 0.1  # of all other classes together, where those of the head have about 1
CHUNK_ROWS = 128  # that are encoded at once
KEPT_SHARE = 0.999  # of max_kl: the rest is for other devices' rounding


@dataclass(frozen=True)
class Tables:
    """Constants on one device, ready for use.

    The codes of a record are parts of eight codes each, one group's: the lower eight bits of every group, then what is
    above them of the wider groups, which come first. A part of width b is b bytes of one little-endian number; code i of the
    eight lies at its bit i * b.

    Attributes:
        mean: (C,) float32.
        matrix: (C, r) float32 basis times step.
        step: (r,) float32.
        bits: (r,) float32 width of each coordinate.
        wide: how many groups have more than eight bits.
        shifts, masks: (n, 8) and (n, 1) int64 of the n parts.
        stored: for each byte of a record's codes, its place among the 8 n bytes of the parts as 64-bit words.
        loaded: for each of those 8 n bytes, its place among a record's codes; any place where no code lies.
    """

    mean: Tensor
    matrix: Tensor
    step: Tensor
    bits: Tensor
    wide: int
    shifts: Tensor
    masks: Tensor
    stored: Tensor
    loaded: Tensor


@dataclass(frozen=True)
class Attempt:
    """A size on trial: the codec, its share of dense rows, and what a record then takes with them."""

    codec: LowRankCodec
    dense: float
    nbytes: float


@dataclass(frozen=True)
class LowRankCodec(Codec):
    """A row's coordinates in few bits each; rows that miss the promise are kept dense.

    The promise: KL(given || stored) at `at_temperature` is at most `max_kl` for every record; of outputs without classes
    |given - stored| / |given| is at most `max_relative_error`, and the level is 0. Rows that miss it are stored
    beside the records, as float16 of logit - level; in their records the level is the largest logit, not the mean, and the
    codes mean nothing. `fit` takes the size at which a record and its share of the dense rows are smallest together.
    Encoding has to know how many rows are dense, for which a GPU is waited for once a batch.

    Attributes:
        max_kl: in nats.
        at_temperature: T of the promise.
        max_relative_error: of outputs without classes; 0: these are logits.
    """

    name: ClassVar[str] = "lowrank"

    max_kl: float = 1e-4
    at_temperature: float = 4.0
    max_relative_error: float = 0.0
    _fitted: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _tables: dict[str, Tables] = field(default_factory=dict, init=False, repr=False, compare=False)  # by device

    def __post_init__(self) -> None:
        if not self.max_kl > 0 or not self.at_temperature > 0:
            raise ConfigError(
                f"codec 'lowrank': max_kl={self.max_kl:g} and at_temperature={self.at_temperature:g} must be > 0"
            )
        if not 0 <= self.max_relative_error < math.inf:
            raise ConfigError(f"codec 'lowrank': max_relative_error={self.max_relative_error:g} must be a number > 0")

    @property
    def of_classes(self) -> bool:
        return not self.max_relative_error

    @property
    def parameters(self) -> dict[str, str]:
        """One promise or the other."""
        names = ("max_kl", "at_temperature") if self.of_classes else ("max_relative_error",)
        return {name: str(getattr(self, name)) for name in names}

    @property
    def format(self) -> int:
        return 1 if self.of_classes else 2

    @property
    def constants(self) -> dict[str, Tensor]:
        """mean (C,) and step (r,) float32, basis (C, r) float16, bits (r / 8,) uint8: the width of eight coordinates, falling.

        Of outputs without classes also explained (1,) float32: the share of the variance that the records keep.
        """
        if not self._fitted:
            raise CodecFitError("codec 'lowrank' is not fitted yet: it has no basis", tip="call fit(probe) first")
        return dict(self._fitted)

    def with_constants(self, constants: Mapping[str, Tensor]) -> Self:
        classes, bits = self.num_classes, constant(constants, "bits", (None,), torch.uint8)
        if len(bits) and not 1 <= int(bits.min()) <= int(bits.max()) <= MAX_BITS:
            raise CodecFitError("codec 'lowrank': its constant 'bits' holds numbers that no fit gives")
        rank = GROUP * len(bits)
        fitted = replace(self)
        fitted._fitted["mean"] = constant(constants, "mean", (classes,), torch.float32)
        fitted._fitted["basis"] = constant(constants, "basis", (classes, rank), torch.float16)
        fitted._fitted["step"] = constant(constants, "step", (rank,), torch.float32)
        fitted._fitted["bits"] = bits
        if not self.of_classes:
            fitted._fitted["explained"] = constant(constants, "explained", (1,), torch.float32)
        return fitted

    def fit(self, probe: Probe) -> LowRankCodec:
        """The codec with a basis and quantisers for the probe's rows, in the size that costs least.

        Three quarters of the rows make the basis; on the others sizes are tried.

        Raises:
            CodecFitError: too few rows, or another codec keeps the promise in fewer bytes.
        """
        rows = probe.logits.float()
        if len(rows) < MIN_ROWS:
            raise CodecFitError(
                f"codec 'lowrank' is fitted on at least {MIN_ROWS} rows, and there are {len(rows)}",
                tip="use --codec int8",
            )
        apart = torch.arange(len(rows), device=rows.device) % 4 == 3
        measured = rows[apart][: max(MIN_ROWS, MEASURED_NUMBERS // self.num_classes)]
        mean, basis = principal_components(rows[~apart], levels=self.of_classes)
        few = rows[:STEPPED_ROWS]
        if self.of_classes:
            few = few - few.mean(dim=1, keepdim=True)
        with full_float32(rows.device):
            coordinates = (few - mean) @ basis
        steps, errors = quantisers(coordinates)

        @cache
        def attempt(size: int) -> Attempt:
            codec = self._sized(mean, basis, steps, errors, size)
            distances = codec._distance(measured, codec._record(*codec._coded(measured)))
            dense = share_above(KEPT_SHARE * self._promised, distances)
            return Attempt(codec, dense, record_bytes(codec.fields) + dense * 2 * self.num_classes)

        other, limit = self._cheapest_other(measured)
        sizes = [size for size in _sizes(basis.shape[1] * MAX_BITS // GROUP) if size < limit]
        start = bisect_left(sizes, True, key=lambda size: attempt(size).dense <= FEW_DENSE, hi=len(sizes) - 1)
        best = attempt(sizes[start])
        for size in sizes[start:]:
            if size < best.nbytes:
                best = min(best, attempt(size), key=lambda tried: tried.nbytes)
        if best.nbytes >= limit:
            raise CodecFitError(
                f"codec 'lowrank' does not pay: with {self._promise} a record takes it "
                f"{best.nbytes:.0f} B, rows kept dense counted in, and {other} {limit} B",
                tip=f"use --codec {other}, or allow a larger {'KL' if self.of_classes else 'error'}",
            )
        return best.codec if self.of_classes else best.codec._explaining(measured)

    def _explaining(self, rows: Tensor) -> Self:
        """The same with the share of the variance of these rows that its records keep, dense ones too."""
        share = torch.tensor([explained(rows, self.decode(self.encode(rows)))], dtype=torch.float32, device="cpu")
        return self.with_constants(self.constants | {"explained": share})

    @property
    def _promised(self) -> float:
        """What the distance of no record may exceed."""
        return self.max_kl if self.of_classes else self.max_relative_error

    @property
    def _promise(self) -> str:
        """The same in words."""
        if self.of_classes:
            return f"KL <= {self.max_kl:g} at T={self.at_temperature:g}"
        return f"a relative error <= {self.max_relative_error:g}"

    def _sized(self, mean: Tensor, basis: Tensor, steps: Tensor, errors: Tensor, size: int) -> Self:
        """The codec with `size` bytes of codes."""
        bits = allot(errors, size)
        order = bits.argsort(descending=True, stable=True)[: int((bits > 0).sum())]  # the widest groups first
        chosen = (order[:, None] * GROUP + torch.arange(GROUP, device=bits.device)).flatten()
        return self.with_constants(
            {
                "mean": mean,
                "basis": basis[:, chosen].half(),
                "step": steps[bits.repeat_interleave(GROUP)[chosen], chosen],
                "bits": bits[order].to(torch.uint8),
                "explained": torch.ones(1),  # until it is measured
            }
        )

    def _cheapest_other(self, rows: Tensor) -> tuple[str, int]:
        """Name and bytes per record of the smallest simpler codec that keeps the promise on these rows."""
        count = self.num_classes
        heads = [HeadTailCodec(count, 16, 6), HeadTailCodec(count, 8, 8)]
        others = [*(heads if self.of_classes else [Int8Codec(count, 64)]), Int8Codec(count), Float16Codec(count)]
        sizes = {codec: record_bytes(codec.fields) or 2 * self.num_classes for codec in others}
        for codec in sorted(others, key=lambda codec: sizes[codec]):
            try:
                decoded = codec.decode(codec.encode(rows))
            except CodecRangeError:
                continue
            if bool((self._apart(rows, decoded) <= self._promised).all()):
                return codec.text, sizes[codec]
        return Float32Codec.name, 4 * self.num_classes

    @property
    def fields(self) -> tuple[Field, ...]:
        return lay_out(
            [
                ("level", "<f4", ()),
                ("dense", "<u4", ()),  # 0, or the number of this record's dense row, counted from 1
                ("codes", "|u1", (int(self.constants["bits"].sum()),)),  # of eight coordinates with b bits: b bytes
            ]
        )

    # ------------------------------------------------------------------------------------------------ encoding, decoding

    def encode(self, logits: Tensor, classifier_input: Tensor | None = None) -> dict[str, Tensor]:
        level, codes = self._coded(logits)
        records = self._record(level, codes)
        missed = ~(self._distance(logits, records) <= KEPT_SHARE * self._promised)  # NaN is no promise kept
        at = missed.nonzero()[:, 0]
        if len(at) and self.of_classes:  # float16 is finest where the row is largest
            level = torch.where(missed, logits.amax(dim=1), level)
            records = self._record(level, codes)
        arrays = {"records": records, "dense": (logits[at] - level[at, None]).half(), "dense_at": at}
        if len(at):
            self._check_dense(logits[at], self._dense_rows(arrays))
        return arrays

    def decode(self, arrays: Mapping[str, Tensor]) -> Tensor:
        tables = self._on(arrays["records"].device)
        rows = affine(self._unpack(arrays["records"], tables), tables.matrix, tables.mean)
        rows += self._level(arrays["records"])[:, None]
        if "dense_at" in arrays:
            rows[arrays["dense_at"]] = self._dense_rows(arrays)
        return rows

    def rounding(self, arrays: Mapping[str, Tensor]) -> Tensor:
        tables = self._on(arrays["records"].device)
        bound = affine_rounding(self._unpack(arrays["records"], tables), tables.matrix, tables.mean)
        # two sums with the level that differ by `bound` are each rounded at their own size
        largest = self.decode({"records": arrays["records"]}).abs().amax(dim=1) + bound
        bound = bound + 2 * UNIT_ROUNDOFF * largest
        if "dense_at" in arrays:
            bound[arrays["dense_at"]] = 0.0  # one difference put back by one sum: the same everywhere
        return bound

    def _dense_rows(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """(n, C) float32 rows that are kept dense."""
        return arrays["dense"].float() + self._level(arrays["records"])[arrays["dense_at"], None]

    def _check_dense(self, given: Tensor, stored: Tensor) -> None:
        worst = self._apart(given, stored).amax().item()
        if not (worst <= self._promised and bool(stored.isfinite().all())):
            found = (
                f"KL {worst:.3g} at T={self.at_temperature:g}, logits" if self.of_classes else f"{worst:.3g}, numbers"
            )
            raise CodecRangeError(
                f"codec 'lowrank' keeps rows dense in float16, which is not enough here: {found} up to "
                f"{given.abs().amax().item():.6g}",
                tip=f"use --codec float32, or allow a larger {'KL' if self.of_classes else 'error'}",
            )

    def _distance(self, logits: Tensor, records: Tensor) -> Tensor:
        """(B,) float64, what is promised of each record, without dense rows; NaN where there is none."""
        return self._apart(logits, self.decode({"records": records}))

    def _apart(self, given: Tensor, stored: Tensor) -> Tensor:
        """(B,) float64 KL at the promise's temperature, or the relative error."""
        return kl_rows(given, stored, self.at_temperature) if self.of_classes else relative_errors(given, stored)

    def _level(self, records: Tensor) -> Tensor:
        return read_field(records, self.fields[0])

    def _coded(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) float32 levels and (B, bytes) uint8 codes."""
        tables = self._on(logits.device)
        if not self.of_classes:
            with full_float32(logits.device):
                exact = (logits - tables.mean) @ tables.matrix / tables.step  # (B, r)
            return torch.zeros_like(logits[:, 0]), self._pack(quantise(exact, tables.step, tables.bits), tables)
        first = logits[:, 0]
        level = first + (logits - first[:, None]).mean(dim=1)  # of rows far from 0 too, to float32's precision
        with full_float32(logits.device):
            parts = [self._codes(part, tables) for part in (logits - level[:, None]).split(CHUNK_ROWS)]
        return level, self._pack(torch.cat(parts), tables)

    def _record(self, level: Tensor, codes: Tensor) -> Tensor:
        """(B, R) uint8 records whose rows are not dense, or not numbered yet."""
        return write_fields(self.fields, {"level": level, "dense": torch.zeros_like(level), "codes": codes})

    def _codes(self, rows: Tensor, tables: Tables) -> Tensor:
        """(B, r) float32 whole numbers for (B, C) rows without their level, rounded with error feedback.

        With u the error so far in the logits of the row's head, H the basis there, and weights w from the second-order form of
        KL, sum p u**2 / (2 T**2), the coordinates not rounded yet move by the d that minimises sum w (u + H d)**2 + tail |d|**2.
        """
        step, bits = tables.step, tables.bits
        exact = (rows - tables.mean) @ tables.matrix / step  # (B, r)
        head, ids = rows.topk(min(HEAD, self.num_classes), dim=1)  # (B, K)
        basis = tables.matrix[ids] / step  # (B, K, r)
        error = tables.mean[ids] + _apply(basis, exact) - head  # of leaving directions out
        tail = TAIL_WEIGHT / self.num_classes
        weight = torch.full_like(head, tail)
        for t in (1.0, self.at_temperature):
            weight += (rows / t).softmax(dim=1).gather(1, ids) / t**2
        passes = _halves(basis.shape[2])
        normal = torch.diag_embed(tail / weight)
        systems = []
        for part in reversed(passes):  # each with all the coordinates that are not rounded before it
            normal = normal + basis[:, :, part] @ basis[:, :, part].mT
            systems.append(torch.linalg.cholesky_ex(normal)[0])
        codes = torch.empty_like(exact)
        for part, system in zip(passes, reversed(systems), strict=True):
            moved = -_apply(basis[:, :, part].mT, torch.cholesky_solve(error[:, :, None], system)[:, :, 0])
            codes[:, part] = quantise(exact[:, part] + moved.nan_to_num(), step[part], bits[part])
            error = error + _apply(
                basis[:, :, part], dequantise(codes[:, part], bits[part]) * step[part] - exact[:, part]
            )
        return codes.nan_to_num()

    # -------------------------------------------------------------------------------------------------- bytes and tables

    def _pack(self, codes: Tensor, tables: Tables) -> Tensor:
        """(B, r) whole numbers -> (B, bytes) uint8."""
        groups = codes.long().unflatten(1, (-1, GROUP))  # (B, r / 8, 8)
        parts = torch.cat([groups & 0xFF, groups[:, : tables.wide] >> 8], dim=1)  # (B, n, 8)
        words = (parts << tables.shifts).sum(dim=2)
        return words.view(torch.uint8).index_select(1, tables.stored)

    def _unpack(self, records: Tensor, tables: Tables) -> Tensor:
        """(B, R) uint8 records -> (B, r) float32 coordinates, in steps."""
        words = read_field(records, self.fields[2]).index_select(1, tables.loaded).view(torch.int64)  # (B, n)
        parts = ((words[:, :, None] >> tables.shifts) & tables.masks).float()  # (B, n, 8)
        groups = parts[:, : len(tables.step) // GROUP]
        groups[:, : tables.wide] += 256 * parts[:, groups.shape[1] :]
        return dequantise(groups.flatten(1), tables.bits)

    def _on(self, device: torch.device) -> Tables:
        if str(device) not in self._tables:
            self._tables[str(device)] = _tables(self.constants, device)
        return self._tables[str(device)]


def _tables(constants: Mapping[str, Tensor], device: torch.device) -> Tables:
    step, bits = constants["step"], constants["bits"].long()
    wide = int((bits > 8).sum())
    widths = torch.cat([bits.clamp(max=8), bits[:wide] - 8])  # (n,) of the parts
    places = torch.arange(8, device=bits.device)
    in_use = places < widths[:, None]  # (n, 8) bytes of the parts' words
    loaded = (widths.cumsum(0) - widths)[:, None] + places * in_use
    return Tables(
        mean=constants["mean"].to(device),
        matrix=constants["basis"].to(device).float() * step.to(device),
        step=step.to(device),
        bits=bits.repeat_interleave(GROUP).float().to(device),
        wide=wide,
        shifts=(widths[:, None] * places).to(device),
        masks=((1 << widths) - 1)[:, None].to(device),
        stored=in_use.flatten().nonzero()[:, 0].to(device),
        loaded=loaded.flatten().to(device),
    )


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    """(B, m) products of (B, m, n) and (B, n)."""
    return (matrix @ vector[:, :, None])[:, :, 0]


def _halves(count: int) -> list[slice]:
    """Parts of range(count), the last half first, then the last half of the rest, and so on: the finest coordinates last."""
    ends = [count >> i for i in range(PASSES)]
    return [slice(start, end) for end, start in pairwise([*ends, 0]) if end > start]


def share_above(limit: float, divergences: Tensor) -> float:
    """The share of rows like these whose KL will be above `limit`: as many as here, or as a log-normal law has, if that is more.

    Where a dense row costs as much as a hundred others, none among a few hundred is not yet few enough.
    """
    known = divergences.nan_to_num(nan=torch.inf).clamp(1e-30, 1e30)
    logs = known.log()
    distance = (math.log(limit) - logs.mean()) / logs.std().clamp(min=1e-6)
    return max((known > limit).double().mean().item(), 0.5 * math.erfc(distance.item() / math.sqrt(2)))


def _sizes(limit: int) -> list[int]:
    """Whole numbers up to `limit`, each about SIZE_RATIO times the one before."""
    sizes = [1]
    while sizes[-1] < limit:
        sizes.append(min(limit, max(sizes[-1] + 1, round(sizes[-1] * SIZE_RATIO))))
    return sizes

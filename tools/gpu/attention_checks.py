"""Attention and the small kernels on a device, against float64.

python tools/gpu/attention_checks.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, Final

import norms
import numpy as np
from numpy.typing import NDArray
from runner import Runner, poisoned

from edgellm.cuda.launch import At, Device, Launch
from edgellm.kernels import elementwise
from edgellm.kernels.attention_decode import decode_attention, decode_workspace
from edgellm.kernels.attention_prefill import (
    prefill_attention,
    prefill_attention_workspace,
    rope_and_append,
)
from edgellm.kernels.attention_shape import COUNTERS_BYTES, AttentionShape, Cache, HeadNorms, rope_table
from edgellm.kernels.norm import NormAhead
from edgellm.kernels.rows import CHUNK, ROW
from edgellm.model.rotary import make_rotary
from edgellm.model.weights import Dense, Grouped, Groups, Weight

Array = NDArray[Any]
Float = NDArray[np.float64]

TOLERANCE: Final = 2e-3
"""Relative to the norm of the result: queries, keys and probabilities round to float16."""
EPSILON: Final = 1e-6
CUTS: Final = ((87, 4), (87, 14), (87, 132), (90, 132))
"""Devices that decode attention is cut for, capability and SMs; the results must be right for all. 9.0 has
clusters."""


def shape(
    heads: int, kv_heads: int, size: int, max_seq: int, *, int8: bool = False, norm: bool = False
) -> AttentionShape:
    """Attention of these numbers with the usual scale."""
    kind: Any = "int8" if int8 else "fp16"
    return AttentionShape(heads, kv_heads, size, max_seq, kind, size**-0.5, norm, EPSILON)


BUCKETS: Final = (1, 3, 8, 16)
"""Rows of a step."""

CHUNKS: Final = ((16, 1, 0), (64, 50, 740), (256, 256, 0), (128, 100, -100), (16, 13, -13))
"""A bucket of tokens, how many of them there are, the first one's position; negative: from the slot's end."""

PREFILL_CUTS: Final = (2, 132)
"""SMs of devices that prefill attention is cut for: keys in one part, or in as many as fill them."""

WIDTHS: Final = ((576, 576), (4096, 4096), (3584, 3584), (896, 960))
"""Of the residual, and of attention's output."""

SHAPES: Final = (
    shape(9, 3, 64, 1024),
    shape(32, 8, 128, 1024, norm=True),
    shape(28, 4, 128, 704),
    shape(8, 8, 80, 512),
    shape(12, 4, 96, 512),
    shape(16, 1, 64, 512),
    shape(9, 3, 64, 1024, int8=True),
    shape(32, 8, 128, 1024, int8=True, norm=True),
    shape(8, 2, 80, 512, int8=True),
    shape(14, 2, 96, 512, int8=True, norm=True),
    shape(4, 1, 128, 32768),
)


class Layer:
    """One layer's caches with something in them, in numpy: what the kernels are compared with."""

    def __init__(self, rng: np.random.Generator, shape: AttentionShape, slots: int) -> None:
        self.shape = shape
        # By tiles of 16 tokens, of each head keys and values: as the kernels have them.
        places = (slots, shape.max_seq // 16, shape.kv_heads, 2, 16)
        self.table = rope_table(make_rotary(shape.head_size, 10000.0), shape.max_seq)
        self.gains = [rng.normal(1, 0.2, shape.head_size).astype(np.float32) for _ in "qk"]
        self.scales: Array | None = None
        if shape.kv == "fp16":
            self.held: Array = rng.standard_normal((*places, shape.head_size), np.float32).astype("<f2")
        else:
            self.held = rng.integers(1, 256, (*places, shape.head_size), dtype=np.uint8)
            self.scales = rng.uniform(0.005, 0.02, places).astype("<f2")

    def hide(self, slot: int, length: int) -> None:
        """Make what lies behind a slot's tokens NaN, or codes with NaN for a scale."""
        tokens = np.arange(length, self.shape.max_seq)
        cache = self.held if self.scales is None else self.scales
        cache[slot, tokens // 16, :, :, tokens % 16] = np.nan

    def arrays(self) -> dict[str, Array]:
        """Buffers by name."""
        named = {"held": self.held, "rope": self.table}
        if self.scales is not None:
            named["scales"] = self.scales
        return named | {"q_gain": self.gains[0], "k_gain": self.gains[1]}

    def cache(self) -> Cache:
        """Where the kernels find the caches."""
        return Cache(At("held"), None if self.scales is None else At("scales"))

    def norms(self) -> HeadNorms:
        """Where the kernels find the gains."""
        return HeadNorms(At("q_gain"), At("k_gain")) if self.shape.qk_norm else HeadNorms()

    def read(self, arrays: dict[str, Array], kind: int, slot: int, length: int) -> Float:
        """Keys (kind 0) or values as float64 [kv_heads, length, head_size]."""

        def of_heads(places: Array) -> Float:
            mine = np.moveaxis(places[slot, :, :, kind], 0, 1)
            return mine.reshape(self.shape.kv_heads, self.shape.max_seq, -1)[:, :length].astype(np.float64)

        stored = of_heads(arrays["held"])
        if self.scales is None:
            return stored
        read: Float = (stored - 128) * of_heads(arrays["scales"])
        return read

    def turn(self, x: Float, positions: Array, gain: Array | None) -> Float:
        """x [T, heads, head_size] normalised, if there is a gain, and rotated."""
        if gain is not None:
            x = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * gain
        cos, sin = (
            self.table[positions, 0].astype(float)[:, None],
            self.table[positions, 1].astype(float)[:, None],
        )
        a, b = np.split(x, 2, axis=-1)
        turned: Float = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
        return turned

    def split(self, qkv: Array, past: int) -> tuple[Float, Float, Float]:
        """Rotated queries, rotated keys and values of T neighbouring tokens, each [T, heads, head_size]."""
        shape = self.shape
        heads = qkv.astype(np.float64).reshape(len(qkv), -1, shape.head_size)
        q, k, v = np.split(heads, [shape.heads, shape.heads + shape.kv_heads], axis=1)
        gains: list[Array | None] = list(self.gains) if shape.qk_norm else [None, None]
        positions = past + np.arange(len(qkv))
        return self.turn(q, positions, gains[0]), self.turn(k, positions, gains[1]), v

    def attend(self, q: Float, keys: Float, values: Float, past: int) -> Float:
        """Causal attention, [T, heads · head_size]; keys and values [kv_heads, length, head_size]."""
        shape = self.shape
        q = q.reshape(len(q), shape.kv_heads, shape.queries, shape.head_size)
        logits = np.einsum("tgqd,gsd->tgqs", q, keys, optimize=True) * shape.scale
        there = np.arange(keys.shape[1]) <= past + np.arange(len(q))[:, None]
        logits = np.where(there[:, None, None], logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        attended: Float = np.einsum("tgqs,gsd->tgqd", weights, values, optimize=True)
        return attended.reshape(len(q), -1)

    def appended(self, after: dict[str, Array], slot: int, past: int, k: Float, v: Float) -> float:
        """How far the cache's new tokens are off, relative to what int8 or float16 may be."""
        worst = 0.0
        for kind, new in enumerate((k, v)):
            stored = self.read(after, kind, slot, past + len(new))[:, past:].swapaxes(0, 1)
            step = np.abs(new).max(-1, keepdims=True) * (2**-10 if self.scales is None else 1 / 127)
            worst = max(worst, float((np.abs(stored - new) / step).max()))
        return worst


def relative(got: Array, wanted: Array) -> float:
    """Norm of the difference by the norm of what is wanted; infinite where something is not finite."""
    got = got.astype(np.float64)
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted)) if np.isfinite(got).all() else np.inf


def verdict(name: str, error: float, append: float, others: bool) -> tuple[str, bool]:
    """A line and whether all is well: what was appended is off by at most a step, the rest untouched."""
    good = error <= TOLERANCE and append <= 1.0 and others
    line = f"{name:62s} {error:.1e}  appended {append:.2f}  {'' if others else 'OTHERS CHANGED '}"
    return line + ("ok" if good else "FAIL"), good


def unchanged(before: dict[str, Array], after: dict[str, Array], new: Sequence[tuple[int, int, int]]) -> bool:
    """Whether caches hold what they held, but for tokens [begin, end) of these slots."""
    for name in ("held", "scales"):
        if name not in before:
            continue
        a, b = (
            each[name].copy().view(np.uint8 if each[name].itemsize == 1 else "<u2")
            for each in (before, after)
        )
        for slot, begin, end in new:
            tokens = np.arange(begin, end)
            places = (slot, tokens // 16, slice(None), slice(None), tokens % 16)
            a[places] = b[places]
        if not np.array_equal(a, b):
            return False
    return True


def check_decode(
    runner: Runner,
    rng: np.random.Generator,
    shapes: Sequence[AttentionShape] = SHAPES,
    *,
    buckets: Sequence[int] = BUCKETS,
    cuts: Sequence[tuple[int, int]] = CUTS,
) -> Iterator[tuple[str, bool]]:
    """Rows of all lengths, nobody's rows among them; each twice, since counters must be left as they were."""
    for shape in shapes:
        long = shape.max_seq > 4096
        for rows in (1, 16) if long else buckets:
            slots = 2 if long else rows + 2
            layer = Layer(rng, shape, slots)
            table = np.zeros(rows, ROW)
            table["slot"] = np.resize(rng.permutation(slots)[: min(rows, slots)], rows)
            table["past"] = rng.integers(0, shape.max_seq, rows)
            table["past"][0] = shape.max_seq - 1 if rows < 16 else 0
            if rows > 2:
                table["slot"][rng.permutation(rows)[: rows // 3]] = -1
            if long:
                table["slot"][2:] = -1
            for row in table[table["slot"] >= 0]:
                layer.hide(row["slot"], row["past"])
            qkv = rng.standard_normal((rows, shape.qkv_width), np.float32).astype("<f2")
            for sm, multiprocessors in cuts:
                device = replace(runner.device, sm=sm, multiprocessors=multiprocessors)
                size = decode_workspace(shape, rows=rows, device=device)
                workspace = np.full(size, 0xFF, np.uint8)
                workspace[:COUNTERS_BYTES] = 0
                before = layer.arrays() | {
                    "rows": table,
                    "qkv": qkv,
                    "out": poisoned((rows, shape.heads * shape.head_size), "<f2"),
                    "workspace": workspace,
                }
                launches = decode_launches(shape, layer, rows, device)
                # The second time is another step's: it may not start before the first has ended.
                again = [replace(each, early=False) for each in launches]
                after = runner.run([*launches, *again], before)
                error = append = 0.0
                new = []
                for i, row in enumerate(table):
                    slot, past = int(row["slot"]), int(row["past"])
                    if slot < 0:
                        continue
                    q, k, v = layer.split(qkv[i : i + 1], past)
                    keys, values = (layer.read(after, kind, slot, past + 1) for kind in (0, 1))
                    error = max(error, relative(after["out"][i : i + 1], layer.attend(q, keys, values, past)))
                    append = max(append, layer.appended(after, slot, past, k, v))
                    new.append((slot, past, past + 1))
                zero = not after["workspace"][:COUNTERS_BYTES].any()
                name = f"decode {describe(shape)} rows {rows} SMs {multiprocessors}"
                name += " clusters" * (sm >= 90)
                yield verdict(name, error, append, unchanged(before, after, new) and zero)


def decode_launches(
    shape: AttentionShape, layer: Layer, rows: int, device: Device, cache: Cache | None = None
) -> list[Launch]:
    """Decode attention over buffers of the usual names."""
    return decode_attention(
        shape,
        rows=rows,
        device=device,
        qkv=At("qkv"),
        rows_at=At("rows"),
        rope=At("rope"),
        norms=layer.norms(),
        cache=cache or layer.cache(),
        out=At("out"),
        workspace=At("workspace"),
    )


def describe(shape: AttentionShape) -> str:
    """A shape in few words."""
    norm = " norm" * shape.qk_norm
    return f"{shape.heads}/{shape.kv_heads}×{shape.head_size} of {shape.max_seq} {shape.kv}{norm}"


def check_prefill(
    runner: Runner,
    rng: np.random.Generator,
    shapes: Sequence[AttentionShape] = SHAPES,
    chunks: Sequence[tuple[int, int, int]] = CHUNKS,
    cuts: Sequence[int] = PREFILL_CUTS,
) -> Iterator[tuple[str, bool]]:
    """Chunks at the start, in the middle and at the end of a slot, full buckets and nearly empty ones; each
    twice, since counters must be left as they were."""
    for shape in shapes:
        for tokens, count, at in chunks:
            past = at % shape.max_seq
            layer = Layer(rng, shape, 2)
            chunk = np.zeros(1, CHUNK)
            chunk["slot"], chunk["past"], chunk["count"] = 1, past, count
            layer.hide(1, past)
            qkv = rng.standard_normal((tokens, shape.qkv_width), np.float32).astype("<f2")
            qkv[count:] = np.nan
            for multiprocessors in cuts:
                device = replace(runner.device, multiprocessors=multiprocessors)
                workspace = np.full(
                    max(COUNTERS_BYTES, prefill_attention_workspace(shape, tokens=tokens, device=device)),
                    0xFF,
                    np.uint8,
                )
                workspace[:COUNTERS_BYTES] = 0
                before = layer.arrays() | {
                    "chunk": chunk,
                    "qkv": qkv,
                    "out": poisoned((tokens, shape.heads * shape.head_size), "<f2"),
                    "workspace": workspace,
                }
                append, attend = prefill_launches(shape, layer, tokens, device)
                after = runner.run([append, attend, replace(attend, early=False)], before)
                q, k, v = layer.split(qkv[:count], past)
                keys, values = (layer.read(after, kind, 1, past + count) for kind in (0, 1))
                error = relative(after["out"][:count], layer.attend(q, keys, values, past))
                appended = layer.appended(after, 1, past, k, v)
                others = unchanged(before, after, [(1, past, past + count)])
                others &= bool(np.isnan(after["out"][count:]).all())
                others &= not after["workspace"][:COUNTERS_BYTES].any()
                name = f"prefill {describe(shape)} {count} of {tokens} at {past} parts {attend.grid[2]}"
                yield verdict(name, error, appended, others)


def prefill_launches(
    shape: AttentionShape, layer: Layer, tokens: int, device: Device, cache: Cache | None = None
) -> list[Launch]:
    """Prefill attention over buffers of the usual names: append, attend."""
    cache, chunk, qkv = cache or layer.cache(), At("chunk"), At("qkv")
    return [
        *rope_and_append(
            shape, tokens=tokens, chunk=chunk, qkv=qkv, rope=At("rope"), norms=layer.norms(), cache=cache
        ),
        *prefill_attention(
            shape,
            tokens=tokens,
            device=device,
            chunk=chunk,
            qkv=qkv,
            cache=cache,
            out=At("out"),
            workspace=At("workspace"),
        ),
    ]


def check_elementwise(
    runner: Runner, rng: np.random.Generator, widths: Sequence[tuple[int, int]] = WIDTHS
) -> Iterator[tuple[str, bool]]:
    """Embedding of every kind of table, RMSNorm, the last row, columns in another order."""
    yield from _check_embeddings(runner, rng)
    yield from _check_rows(runner, rng, widths)


def _check_embeddings(runner: Runner, rng: np.random.Generator) -> Iterator[tuple[str, bool]]:
    vocab = 500
    for hidden, weight in tables(rng, vocab):
        table = elementwise.table_of(weight)
        parts = list(elementwise.table_rows(weight))
        arrays: dict[str, Array] = {"elements": np.concatenate([part.elements for part in parts])}
        scales = offsets = None
        if parts[0].scales is not None:
            arrays["scales"], scales = np.concatenate([part.scales for part in parts]), At("scales")
        if parts[0].offsets is not None:
            arrays["offsets"], offsets = np.concatenate([part.offsets for part in parts]), At("offsets")
        rows = np.zeros(5, ROW)
        rows["slot"], rows["token"] = [3, 0, -1, 2, 1], [7, -1, 9, vocab - 1, -1]
        last = rng.integers(0, vocab, 4).astype("<i4")
        chunk = np.zeros(1, CHUNK)
        chunk["count"] = 3
        ids = rng.integers(0, vocab, 4).astype("<i4")
        out, chunk_out = (poisoned((n, hidden), "<f4") for n in (5, 4))
        arrays |= {"rows": rows, "last": last, "chunk": chunk, "ids": ids, "out": out, "chunk_out": chunk_out}
        gain = arrays["gain"] = rng.normal(1, 0.3, hidden).astype("<f4")
        arrays |= {"norm_scales": poisoned((5,), "<f4"), "scaled": poisoned((5, hidden), "<f2")}
        arrays["squares"] = poisoned((5, hidden // 16), "<f4")
        places: dict[str, Any] = {"elements": At("elements"), "scales": scales, "offsets": offsets}
        launches = [
            *elementwise.embed_rows(
                table,
                rows=5,
                rows_at=At("rows"),
                last_token=At("last"),
                out=At("out"),
                epsilon=EPSILON,
                ahead=NormAhead(At("gain"), At("norm_scales"), At("scaled"), At("squares")),
                **places,
            ),
            *elementwise.embed_chunk(
                table, tokens=4, chunk=At("chunk"), ids=At("ids"), out=At("chunk_out"), **places
            ),
        ]
        after = runner.run(launches, arrays)
        w = weight.dequantize()
        fed = np.where(rows["token"] < 0, last[rows["slot"]], rows["token"])
        there = rows["slot"] >= 0
        good = np.allclose(after["out"][there], w[fed[there]], rtol=1e-6, atol=1e-7)
        good &= bool(np.isnan(after["out"][~there]).all())
        left = {name: after[name][there] for name in ("scaled", "squares", "norm_scales")}
        inverse_rms = norms.inverse_rms(w[fed[there]], EPSILON)
        good &= np.allclose(left["norm_scales"] * norms.ROOM, inverse_rms, rtol=1e-5)
        good &= not norms.wrong_ahead(left, after["out"][there], gain, left["norm_scales"])
        good &= np.allclose(after["chunk_out"][:3], w[ids[:3]], rtol=1e-6, atol=1e-7)
        good &= bool(np.isnan(after["chunk_out"][3:]).all())
        yield f"embed {table.kind} {hidden} g{table.group} {'ok' if good else 'FAIL'}", good


def _check_rows(
    runner: Runner, rng: np.random.Generator, widths: Sequence[tuple[int, int]]
) -> Iterator[tuple[str, bool]]:
    for hidden, width in widths:
        x = (rng.standard_normal((6, hidden), np.float32) * 30).astype("<f4")
        h = rng.standard_normal((6, width), np.float32).astype("<f2")
        gain = rng.normal(1, 0.3, hidden).astype("<f4")
        order = rng.permutation(width).astype("<i4")
        chunk = np.zeros(1, CHUNK)
        chunk["count"] = 4
        arrays: dict[str, Array] = {"x": x, "h": h, "gain": gain, "order": order, "chunk": chunk}
        arrays |= {"normed": poisoned((6, hidden), "<f2"), "permuted": poisoned((6, width), "<f2")}
        arrays |= {"x_out": poisoned((1, hidden), "<f4"), "h_out": poisoned((1, width), "<f2")}
        arrays |= {"scales": poisoned((6,), "<f4"), "last_scale": poisoned((1,), "<f4")}
        launches = [
            *elementwise.rms_norm(
                hidden,
                rows=6,
                x=At("x"),
                gain=At("gain"),
                epsilon=EPSILON,
                out=At("normed"),
                chunk=At("chunk"),
                scales=At("scales"),
            ),
            *elementwise.permute_columns(width, rows=6, order=At("order"), x=At("h"), out=At("permuted")),
            *elementwise.last_row(
                hidden,
                width,
                chunk=At("chunk"),
                x=At("x"),
                h=At("h"),
                epsilon=EPSILON,
                x_out=At("x_out"),
                h_out=At("h_out"),
                scales=At("last_scale"),
            ),
        ]
        after = runner.run(launches, arrays)
        wide = x[:4].astype(np.float64)
        normed = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + EPSILON) * gain
        good = relative(after["normed"][:4], normed) < 5e-4 and bool(np.isnan(after["normed"][4:]).all())
        inverse_rms = norms.inverse_rms(x[:4], EPSILON)
        good &= np.allclose(after["scales"][:4] * norms.ROOM, inverse_rms, rtol=1e-5)
        good &= np.allclose(after["last_scale"] * norms.ROOM, inverse_rms[3], rtol=1e-5)
        good &= np.array_equal(after["permuted"], h[:, order])
        good &= np.array_equal(after["x_out"][0], x[3]) and np.array_equal(after["h_out"][0], h[3])
        yield f"norm, permutation, last row {hidden} {width} {'ok' if good else 'FAIL'}", good


def rows_of(values: NDArray[np.float32]) -> Callable[[int, int], NDArray[np.float32]]:
    """What reads these rows of an array."""
    return lambda begin, end: values[begin:end]


def tables(rng: np.random.Generator, vocab: int) -> Iterator[tuple[int, Weight]]:
    """Embeddings of all kinds."""
    kinds: tuple[Any, ...] = ("f16", "bf16", "f32")
    for kind in kinds:
        values = rng.standard_normal((vocab, 576), np.float32).astype(np.float16).astype(np.float32)
        if kind == "bf16":
            values = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
        yield 576, Dense("embed", (vocab, 576), kind, rows_of(values))
    for bits, hidden, group, asymmetric in ((8, 576, 32, False), (4, 4096, 128, True), (4, 896, 32, False)):
        q: Any = rng.integers(0, 16, (vocab, hidden)).astype(np.uint8)
        if bits == 8:
            q = rng.integers(-128, 128, (vocab, hidden)).astype(np.int8)
        scale, offset = (
            rng.normal(size=(vocab, hidden // group)).astype(np.float16).astype(np.float32) for _ in "so"
        )
        width: Any = bits
        groups = Groups(q, scale, offset if asymmetric else None)
        yield hidden, Grouped("embed", (vocab, hidden), width, group, asymmetric, groups.rows)


def prepare(
    runner: Runner,
    shapes: Sequence[AttentionShape] = SHAPES,
    *,
    buckets: Sequence[int] = BUCKETS,
    cuts: Sequence[tuple[int, int]] = CUTS,
    chunks: Sequence[tuple[int, int, int]] = CHUNKS,
) -> None:
    """Compile side by side what is needed one after the other."""
    rng = np.random.default_rng(0)
    launches: list[Launch] = []
    for kind in shapes:
        layer = Layer(rng, replace(kind, max_seq=16), 1)
        for tokens, multiprocessors in product({tokens for tokens, _, _ in chunks}, PREFILL_CUTS):
            device = replace(runner.device, multiprocessors=multiprocessors)
            launches += prefill_launches(kind, layer, tokens, device)
        for sm, multiprocessors in cuts:
            device = replace(runner.device, sm=sm, multiprocessors=multiprocessors)
            for rows in buckets:
                launches += decode_launches(kind, layer, rows, device)
    runner.prepare(launches)


def main() -> int:
    """Print a line for each check; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    runner = Runner()
    rng = np.random.default_rng(arguments.seed)
    failed = checked = 0
    prepare(runner)
    for check in (check_elementwise, check_decode, check_prefill):
        for line, good in check(runner, rng):
            print(line, flush=True)
            checked += 1
            failed += not good
    print(f"{checked} checks, {failed} failed", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

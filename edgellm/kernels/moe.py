"""Mixtures of experts: launches of `moe.cu` between a router's linear and the residual.

Weights of active experts alone are read, each once for all rows that chose the expert, up to `Cuts.most` of
them. Who is active shows on the device only, so a fixed grid parts whatever work there is:

    router (linear.cu or gemm.cu) → route → experts: gate and up → experts: down → combine

Where experts have many rows each, as in a long chunk, their linears are tiles of `gemm.cu`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from edgellm.cuda.launch import At, Device, Kernel, Launch
from edgellm.errors import BuildError
from edgellm.kernels.gemm import TILES, Tile, prefill_linear, prefill_workspace
from edgellm.kernels.gemm import shared_bytes as tile_bytes
from edgellm.kernels.linear import BUCKETS, ZERO_NAMES, decode_linear, decode_workspace
from edgellm.kernels.packing import PackedShape

MOST_EXPERTS: Final = 512
MOST_TOP_K: Final = 32
PIECE: Final = 512
"""Tokens of a chunk that go through the experts together: what is found for each of their pairs is kept."""

_SOURCE: Final = "moe.cu"
_TILED_ROWS: Final = math.inf
"""Of an expert on average, from which on tiles are taken; 24 once a device has measured them."""
_WIDE_ROWS: Final = 40
"""From which on tiles have 64 rows, not 32."""
_TEAMS: Final = (1,)
"""Warps that may share a row block; (1, 2, 4) once a device has measured them."""
_STAGES_LEAST: Final = 4
_STAGES_MOST: Final = 16
_RESERVED: Final = 1 << 10
"""Bytes of shared memory that the system has of every block."""
_ROUTE_WARPS: Final = 32
_CHOOSE_WARPS: Final = 4
_GROUP_BYTES: Final = 16
_COMBINE_THREADS: Final = 128
_ALIGNMENT: Final = 256


def require_mixture(experts: int, top_k: int, name: str) -> None:
    """Refuse what no kernel does.

    Raises:
        BuildError: too many experts, or too many of them for a token; `name` is their router's.
    """
    if experts > MOST_EXPERTS or top_k > MOST_TOP_K:
        raise BuildError(
            f"{name} has {experts} experts, {top_k} for a token; the CUDA executor does at most "
            f"{MOST_EXPERTS} and {MOST_TOP_K}: build with --executor cpu"
        )


@dataclass(frozen=True, slots=True)
class MixtureShape:
    """A layer's mixture of experts.

    Attributes:
        top_k: experts that a row goes through.
        normalize: their shares are divided by their sum.
        router: of the linear that scores, one row for each expert.
        gate_up, down: of every expert alike; experts lie one behind the other, each `nbytes`.
    """

    top_k: int
    normalize: bool
    router: PackedShape
    gate_up: PackedShape
    down: PackedShape

    @property
    def experts(self) -> int:
        """How many there are."""
        return self.router.n

    @property
    def hidden(self) -> int:
        """Width of the residual."""
        return self.router.k


@dataclass(frozen=True, slots=True)
class MixtureWeights:
    """Where a mixture's packed weights lie."""

    router: At
    gate_up: At
    down: At


@dataclass(frozen=True, slots=True)
class Tokens:
    """Which rows there are: of a decode step, those of `rows_at` whose slot is not below 0; of a chunk, from
    its token `first` on, those before its end.

    Attributes:
        rows: the bucket.
        rows_at: an array of ROW, or
        chunk: a CHUNK.
    """

    rows: int
    rows_at: At | None = None
    chunk: At | None = None
    first: int = 0


@dataclass(frozen=True, slots=True)
class Tuning:
    """How an experts' linear is cut.

    Attributes:
        blocks: that part all row blocks of all groups evenly.
        warps: of a block.
        warps_k: of them, that part the columns of a row block among them; divides `warps`.
        stages: panels under way for each warp.
        most: rows of a group.
    """

    blocks: int
    warps: int
    warps_k: int
    stages: int
    most: int


class Places(NamedTuple):
    """Offsets in the workspace, and its size."""

    scores: int
    ids: int
    groups: int
    pair_rows: int
    positions: int
    shares: int
    inner: int
    found: int
    size: int


@dataclass(frozen=True, slots=True)
class Cuts:
    """Of both linears, which share their groups: a tile's tokens are a group."""

    gate_up: Tuning | Tile
    down: Tuning | Tile

    def __post_init__(self) -> None:
        most, other = (_most(cut) for cut in (self.gate_up, self.down))
        if most != other:
            raise ValueError(f"groups of {most} and of {other} rows in one mixture")

    @property
    def most(self) -> int:
        """Rows of a group."""
        return _most(self.gate_up)

    @property
    def narrow(self) -> bool:
        """Whether what experts find is float16, as tiles store it; float32 otherwise."""
        return isinstance(self.down, Tile)


def _most(cut: Tuning | Tile) -> int:
    return cut.tokens if isinstance(cut, Tile) else cut.most


def row_mixture(
    mixture: MixtureShape,
    tokens: Tokens,
    *,
    device: Device,
    x: At,
    weights: MixtureWeights,
    residual: At,
    squares: At | None,
    workspace: At,
    linear_workspace: At | None,
    cuts: Cuts | None = None,
) -> list[Launch]:
    """residual += the mixture of x, for 1 to 16 rows.

    Args:
        x: float16 [rows, hidden], normalised.
        residual: float32 [rows, hidden].
        squares: float32 [rows, hidden / 16], as the next linear's norm wants them.
        workspace: `mixture_workspace` bytes, of any content.
        linear_workspace: `router_workspace` bytes, as `decode_linear` wants it.
        cuts: instead of `tuned`.
    """
    places = places_of(mixture, tokens.rows, device, cuts)
    scored = decode_linear(
        mixture.router,
        rows=tokens.rows,
        device=device,
        x=x,
        norm=None,
        weights=weights.router,
        bias=None,
        epilogue="logits",
        out=workspace + places.scores,
        workspace=linear_workspace,
    )
    rest = _after_scores(
        mixture,
        tokens,
        device=device,
        x=x,
        weights=weights,
        residual=residual,
        squares=squares,
        workspace=workspace,
        cuts=cuts,
    )
    return [*scored, *rest]


def chunk_mixture(
    mixture: MixtureShape,
    tokens: int,
    *,
    device: Device,
    chunk: At,
    x: At,
    weights: MixtureWeights,
    residual: At,
    workspace: At,
    linear_workspace: At | None,
    cuts: Cuts | None = None,
) -> list[Launch]:
    """residual += the mixture of x, for a chunk's bucket of tokens; `Args` as of `row_mixture`."""
    launches: list[Launch] = []
    for first in range(0, tokens, PIECE):
        piece = Tokens(min(PIECE, tokens - first), chunk=chunk, first=first)
        here = x + first * mixture.hidden * 2
        places = places_of(mixture, piece.rows, device, cuts)
        launches += prefill_linear(
            mixture.router,
            tokens=piece.rows,
            device=device,
            chunk=chunk,
            x=here,
            weights=weights.router,
            bias=None,
            epilogue="logits",
            out=workspace + places.scores,
            workspace=linear_workspace,
        )
        there = residual + first * mixture.hidden * 4
        launches += _after_scores(
            mixture,
            piece,
            device=device,
            x=here,
            weights=weights,
            residual=there,
            squares=None,
            workspace=workspace,
            cuts=cuts,
        )
    return launches


def mixture_workspace(mixture: MixtureShape, tokens: int, device: Device) -> int:
    """Bytes that the launches for a bucket need between them."""
    return places_of(mixture, min(tokens, PIECE), device).size


def router_workspace(mixture: MixtureShape, tokens: int, device: Device, *, chunk: bool) -> int:
    """Bytes that the router's linear needs of a workspace; 0: none."""
    if chunk:
        return prefill_workspace(mixture.router, min(tokens, PIECE), device)
    return decode_workspace(mixture.router, tokens, device)


def places_of(mixture: MixtureShape, rows: int, device: Device, cuts: Cuts | None = None) -> Places:
    """What lies where in the workspace."""
    cuts = cuts or tuned(mixture, rows=rows, device=device)
    pairs = rows * mixture.top_k
    sizes = (
        rows * mixture.experts * 4,
        pairs * 2,
        (1 + groups_most(mixture, rows, cuts.most)) * _GROUP_BYTES,
        pairs * 4,
        pairs * 4,
        pairs * 4,
        pairs * mixture.gate_up.outputs * 2,
        pairs * mixture.hidden * (2 if cuts.narrow else 4),
    )
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] - -size // _ALIGNMENT * _ALIGNMENT)
    return Places(*offsets)


def groups_most(mixture: MixtureShape, rows: int, most: int) -> int:
    """Groups that rows can make: one for each active expert, more for those with more than `most` rows."""
    pairs = rows * mixture.top_k
    return min(mixture.experts, pairs) + pairs // most


def tuned(mixture: MixtureShape, *, rows: int, device: Device) -> Cuts:
    """The cuts of both linears for a bucket and a device.

    Raises:
        BuildError: not even one row fits into the device's shared memory.
    """
    average = rows * mixture.top_k / mixture.experts
    if average >= _TILED_ROWS and (tiles := tiled(mixture, rows=rows, device=device)):
        return tiles
    most = min(BUCKETS[-1], rows)
    groups = min(mixture.experts, rows * mixture.top_k)
    while most:
        gate_up, down = (_cut(shape, groups, most, device) for shape in (mixture.gate_up, mixture.down))
        if gate_up and down:
            return Cuts(gate_up, down)
        most //= 2
    widest = max(mixture.gate_up.k, mixture.down.k)
    raise BuildError(
        f"experts of {widest} columns need more than the {device.shared_per_block} bytes of shared memory "
        "that a block has on this device"
    )


def tiled(mixture: MixtureShape, *, rows: int, device: Device) -> Cuts | None:
    """Tiles for both linears of a chunk; None, if they do not fit the device."""
    tokens = 64 if rows * mixture.top_k / mixture.experts >= _WIDE_ROWS else 32
    found = [
        next(
            (
                tile
                for tile in TILES
                if tile.tokens == tokens and 2 * tile_bytes(shape, tile) <= device.shared_per_block
            ),
            None,
        )
        for shape in (mixture.gate_up, mixture.down)
    ]
    return Cuts(found[0], found[1]) if found[0] and found[1] else None


def _cut(shape: PackedShape, groups: int, most: int, device: Device) -> Tuning | None:
    # Two blocks on an SM, where they fit: one waits for its rows while the other multiplies.
    for warps, per_sm in ((8, 2), (8, 1), (4, 1)):
        blocks = per_sm * device.multiprocessors
        cut = Tuning(blocks, warps, _warps_k(shape, groups / blocks, warps), 0, most)
        fixed = shared_bytes(shape, cut)
        available = (device.shared_per_block + _RESERVED) // per_sm - _RESERVED
        stages = min((available - fixed) // (warps * shape.panel_bytes), _STAGES_MOST)
        if stages >= _STAGES_LEAST:
            return replace(cut, stages=stages)
    return None


def _warps_k(shape: PackedShape, groups: float, warps: int) -> int:
    """Warps to a row block, if each block has row blocks of so many groups."""

    def cost(warps_k: int) -> float:
        rounds = math.ceil(groups * shape.row_blocks / (warps // warps_k))
        # A round costs its panels and about as much as one and a half for what is around them.
        return rounds * (math.ceil(shape.panels / warps_k) + 1.5)

    return min(_TEAMS, key=cost)


def shared_bytes(shape: PackedShape, cut: Tuning) -> int:
    """Dynamic shared memory of a block of `experts`: `Layout` in moe.cu."""
    size = cut.warps * cut.stages * shape.panel_bytes + cut.most * (shape.k + 32) * 2
    if shape.bits < 16:
        size += shape.k // shape.group * max(2, cut.most) * 4
    if cut.warps_k > 1:
        size = -(-size // 16) * 16 + 2 * cut.warps * (2 if cut.most > 8 else 1) * 512
    return size


def items_of(row_blocks: int, groups: int, cut: Tuning, block: int, warp: int) -> Iterator[tuple[int, int]]:
    """(group, row block) of each item that a warp of a block multiplies, as the kernel has it: for tests."""
    items = groups * row_blocks
    begin, end = items * block // cut.blocks, items * (block + 1) // cut.blocks
    for group in range(begin // row_blocks, groups):
        first = max(begin, group * row_blocks)
        teams = cut.warps // cut.warps_k
        for item in range(first + warp // cut.warps_k, min(end, (group + 1) * row_blocks), teams):
            yield group, item - group * row_blocks


def panels_of(shape: PackedShape, cut: Tuning, warp: int) -> range:
    """The panels of each of its items that a warp multiplies."""
    part = warp % cut.warps_k
    return range(part * shape.panels // cut.warps_k, (part + 1) * shape.panels // cut.warps_k)


def _after_scores(
    mixture: MixtureShape,
    tokens: Tokens,
    *,
    device: Device,
    x: At,
    weights: MixtureWeights,
    residual: At,
    squares: At | None,
    workspace: At,
    cuts: Cuts | None,
) -> Iterator[Launch]:
    cuts = cuts or tuned(mixture, rows=tokens.rows, device=device)
    places = places_of(mixture, tokens.rows, device, cuts)
    groups, pair_rows = workspace + places.groups, workspace + places.pair_rows
    inner, found = workspace + places.inner, workspace + places.found
    yield from _route(mixture, tokens, cuts.most, workspace, places)
    for shape, cut, part, taken, given in (
        (mixture.gate_up, cuts.gate_up, weights.gate_up, x, inner),
        (mixture.down, cuts.down, weights.down, inner, found),
    ):
        if isinstance(cut, Tile):
            kernel = _expert_gemm(shape, cut)
            grid = (groups_most(mixture, tokens.rows, cut.tokens), -(-shape.row_blocks // cut.row_blocks), 1)
        else:
            kernel, grid = _experts(shape, cut), (cut.blocks, 1, 1)
        yield Launch(kernel, grid, (groups, pair_rows, part, taken, given, shape.row_blocks, shape.outputs))
    narrow = str(cuts.narrow).lower()
    kernel = Kernel(_SOURCE, f"combine<{mixture.hidden}, {mixture.top_k}, {narrow}>", _COMBINE_THREADS)
    yield Launch(
        kernel,
        (-(-mixture.hidden // (4 * _COMBINE_THREADS)), tokens.rows, 1),
        (
            tokens.rows_at,
            tokens.chunk,
            tokens.first,
            workspace + places.positions,
            workspace + places.shares,
            found,
            residual,
            squares,
        ),
    )


def _route(
    mixture: MixtureShape, tokens: Tokens, most: int, workspace: At, places: Places
) -> Iterator[Launch]:
    normalize = str(mixture.normalize).lower()
    scores, ids, shares = (workspace + at for at in (places.scores, places.ids, places.shares))
    if tokens.chunk is not None:
        kernel = Kernel(
            _SOURCE, f"choose<{mixture.experts}, {mixture.top_k}, {normalize}>", _CHOOSE_WARPS * 32
        )
        yield Launch(
            kernel,
            (-(-tokens.rows // _CHOOSE_WARPS), 1, 1),
            (tokens.chunk, tokens.first, tokens.rows, scores, ids, shares),
        )
    chosen = str(tokens.chunk is not None).lower()
    warps = max(-(-mixture.experts // 32), min(_ROUTE_WARPS, tokens.rows))
    kernel = Kernel(
        _SOURCE,
        f"route<{mixture.experts}, {mixture.top_k}, {most}, {normalize}, {chosen}, {warps}>",
        warps * 32,
        (warps * mixture.experts + tokens.rows * mixture.top_k) * 2,
    )
    groups, pair_rows, positions = (
        workspace + at for at in (places.groups, places.pair_rows, places.positions)
    )
    yield Launch(
        kernel,
        (1, 1, 1),
        (tokens.rows_at, tokens.rows, scores, ids, groups, pair_rows, positions, shares),
    )


def _experts(shape: PackedShape, cut: Tuning) -> Kernel:
    # Gate and up take a pair's row, down what they left for the pair.
    epilogue, gathered = ("SWIGLU", "true") if shape.swiglu else ("PAIRS", "false")
    weights = f"{shape.bits}, {shape.group}, {ZERO_NAMES[shape.zero]}, {shape.k}"
    return Kernel(
        _SOURCE,
        f"experts<{weights}, {cut.most}, {epilogue}, {gathered}, {cut.warps}, {cut.warps_k}, {cut.stages}>",
        cut.warps * 32,
        shared_bytes(shape, cut),
    )


def _expert_gemm(shape: PackedShape, tile: Tile) -> Kernel:
    epilogue, gathered = ("SWIGLU", "true") if shape.swiglu else ("STORE", "false")
    weights = f"{shape.bits}, {shape.group}, {ZERO_NAMES[shape.zero]}, {shape.k}"
    parts = f"{tile.row_blocks}, {tile.tokens}, {tile.warps_r}, {tile.warps_t}"
    return Kernel(
        "gemm.cu",
        f"expert_gemm<{weights}, {parts}, {epilogue}, {gathered}, {tile.stages}>",
        tile.threads,
        tile_bytes(shape, tile),
    )

"""Mixtures of experts: launches of `moe.cu` between a router's linear and the residual.

Weights of active experts alone are read, each once for all rows that chose the expert, up to `Cuts.most` of
them. Who is active shows on the device only, so a fixed grid parts whatever work there is:

    router (linear.cu or gemm.cu) → route → experts: gate and up → experts: down → combine

Where experts have many rows each, as in a long chunk, their linears are tiles of `gemm.cu`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from edgellm.cuda.launch import Argument, At, Device, Kernel, Launch
from edgellm.kernels.gemm import Tile, prefill_linear, prefill_workspace
from edgellm.kernels.gemm import shared_bytes as tile_bytes
from edgellm.kernels.linear import ZERO_NAMES, decode_linear, decode_workspace
from edgellm.kernels.moe_cuts import Cuts, Held, Tuning, groups_most, held_bytes, shared_bytes, tuned
from edgellm.kernels.moe_shape import MixtureShape, MixtureWeights, Tokens
from edgellm.kernels.norm import NormAhead
from edgellm.kernels.packing import PackedShape

_PIECE: Final = 2048
_PIECE_PAIRS: Final = 1 << 14
"""Tokens of a chunk that go through the experts together, and their pairs, which one block sorts. The more an
expert has, the less often its weights are read; what is found for each pair is kept meanwhile."""

_SOURCE: Final = "moe.cu"
_EXPERTS: Final = "experts.cu"
_HELD_EXPERTS: Final = "held_experts.cu"
_ROUTE_WARPS: Final = 32
_CHOOSE_WARPS: Final = 4
_GROUP_BYTES: Final = 16
_COMBINE_THREADS: Final = 128
_ALIGNMENT: Final = 256


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


def row_mixture(
    mixture: MixtureShape,
    tokens: Tokens,
    *,
    device: Device,
    x: At,
    weights: MixtureWeights,
    residual: At,
    ahead: NormAhead | None,
    workspace: At,
    linear_workspace: At | None,
    cuts: Cuts | None = None,
) -> list[Launch]:
    """residual += the mixture of x, for 1 to 16 rows.

    Args:
        x: float16 [rows, hidden], normalised.
        residual: float32 [rows, hidden].
        ahead: the norm behind, which leaves what it wants; None: nobody does.
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
        ahead=ahead,
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
    longest = longest_piece(mixture)
    for first in range(0, tokens, longest):
        piece = Tokens(min(longest, tokens - first), chunk=chunk, first=first)
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
            ahead=None,
            workspace=workspace,
            cuts=cuts,
        )
    return launches


def longest_piece(mixture: MixtureShape) -> int:
    """Tokens of a chunk that go through the experts together."""
    return min(_PIECE, _PIECE_PAIRS // mixture.top_k // 128 * 128)


def mixture_workspace(mixture: MixtureShape, tokens: int, device: Device, cuts: Cuts | None = None) -> int:
    """Bytes that the launches for a bucket need between them."""
    return max(places_of(mixture, rows, device, cuts).size for rows in _pieces(mixture, tokens))


def router_workspace(mixture: MixtureShape, tokens: int, device: Device, *, chunk: bool) -> int:
    """Bytes that the router's linear needs of a workspace; 0: none."""
    if chunk:
        return max(prefill_workspace(mixture.router, rows, device) for rows in _pieces(mixture, tokens))
    return decode_workspace(mixture.router, tokens, device)


def _pieces(mixture: MixtureShape, tokens: int) -> set[int]:
    longest = longest_piece(mixture)
    return {min(tokens, longest), tokens % longest or longest} if tokens > longest else {tokens}


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


def _after_scores(
    mixture: MixtureShape,
    tokens: Tokens,
    *,
    device: Device,
    x: At,
    weights: MixtureWeights,
    residual: At,
    ahead: NormAhead | None,
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
        most = groups_most(mixture, tokens.rows, cuts.most)
        arguments: tuple[Argument, ...] = (
            groups,
            pair_rows,
            part,
            taken,
            given,
            shape.row_blocks,
            shape.outputs,
        )
        if isinstance(cut, Tile):
            grid = (most, -(-shape.row_blocks // cut.row_blocks), 1)
            yield Launch(_expert_gemm(shape, cut), grid, arguments)
        elif isinstance(cut, Held):
            yield Launch(_held_experts(shape, cut), (cut.blocks, 1, 1), (*arguments, 1 + most))
        else:
            yield Launch(_experts(shape, cut), (cut.blocks, 1, 1), arguments)
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
            *(ahead.arguments if ahead else (None,) * 4),
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
    parts = f"{cut.warps}, {cut.warps_k}, {cut.stages}"
    return Kernel(
        _EXPERTS,
        f"experts<{_weights(shape)}, {cut.most}, {_use(shape)}, {parts}>",
        cut.warps * 32,
        shared_bytes(shape, cut),
    )


def _held_experts(shape: PackedShape, cut: Held) -> Kernel:
    parts = f"{cut.warps}, {cut.warps_k}, {cut.stages}, {cut.abreast}, {cut.sets}"
    return Kernel(
        _HELD_EXPERTS,
        f"held_experts<{_weights(shape)}, {cut.most}, {_use(shape)}, {parts}>",
        cut.warps * 32,
        held_bytes(shape, cut),
    )


def _weights(shape: PackedShape) -> str:
    return f"{shape.bits}, {shape.group}, {ZERO_NAMES[shape.zero]}, {shape.k}"


def _use(shape: PackedShape) -> str:
    # Gate and up take a pair's row, down what they left for the pair.
    return "SWIGLU, true" if shape.swiglu else "PAIRS, false"


def _expert_gemm(shape: PackedShape, tile: Tile) -> Kernel:
    epilogue, gathered = ("SWIGLU", "true") if shape.swiglu else ("STORE", "false")
    parts = f"{tile.row_blocks}, {tile.tokens}, {tile.warps_r}, {tile.warps_t}"
    return Kernel(
        "gemm.cu",
        f"expert_gemm<{_weights(shape)}, {parts}, {epilogue}, {gathered}, {tile.stages}>",
        tile.threads,
        tile_bytes(shape, tile),
    )

"""The CPU executor's memory: what ONNX Runtime makes of `model/onnx.py`'s network, and the process around it.

Exact where arrays are ours or a layout is known (weights, KV caches, sampling), measured constants where they
are not (the process, the tokenizer, the graph, how ONNX Runtime's arena fragments). docs/memory.md has each
constant, where it was measured, and how far it carries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from edgellm.engine_config import Compute
from edgellm.memory.plan import Line, Shape
from edgellm.memory.process import TOKENIZER_PER_TOKEN, number, requests_line, tokenizer_line
from edgellm.model.inventory import Matrices, Role
from edgellm.model.kv_cache import KV_DTYPES, KvCache
from edgellm.model.spec import ModelSpec

FLOAT: Final = 4

PROCESS_PRIVATE: Final = 35_500_000
"""Python, numpy, onnxruntime, pyzmq, msgspec and edgellm itself, without an engine."""
PROCESS_LIBRARIES: Final = 45_000_000
"""Pages of shared libraries that are touched on the way to READY."""
THREAD: Final = 300_000
"""One more thread of ONNX Runtime: stack, allocator arena, scratch."""
TOKENIZER_LOADING: Final = 630
"""The same while tokenizer.json is parsed."""
NODE: Final = 7_000
"""What ONNX Runtime holds for a node of the graph."""
NODES_PER_LAYER: Final = {"int8": 26, "fp32": 14}
HEAD_NORM_NODES: Final = 7
"""More per layer where query and key heads are normalised: one that parts q, k and v, three for each norm."""
MIXTURE_NODES: Final = 30
"""More per layer that is a mixture of experts: routing, sorting, adding up."""
FRAGMENTATION: Final = 1.25
"""ONNX Runtime's arena against the tensors that live at the same time."""

PANEL: Final = 16
"""MLAS packs float matrices in panels of so many columns."""
CHUNK: Final = 128
"""`executor/cpu.py`'s longest run of one prompt."""


@dataclass(frozen=True, slots=True)
class CpuFootprint:
    """See `memory.plan.Footprint`.

    Attributes:
        spec: the model's numbers.
        weights: its inventory.
        compute: `int8` or `fp32`, as `model/onnx.py` has it.
        kv_cache: element type of the caches.
        threads: ONNX Runtime's.
        max_queue: requests that may wait.
        max_message_bytes: of a request.
    """

    spec: ModelSpec
    weights: tuple[Matrices, ...]
    compute: Compute
    kv_cache: KvCache
    threads: int = 1
    max_queue: int = 64
    max_message_bytes: int = 1 << 20

    @property
    def unified(self) -> bool:
        """There is no device."""
        return True

    def lines(self, shape: Shape) -> tuple[Line, ...]:
        """All parts."""
        model = (
            self._process(),
            tokenizer_line(self.spec),
            *self._weights(),
            self._graph(),
            self._kv_cache(shape),
        )
        parts = (
            *model,
            self._sampling(shape),
            self._activations(shape),
            requests_line(shape, max_queue=self.max_queue, max_message_bytes=self.max_message_bytes),
            *self._mapped(shape),
        )
        return (*parts, self._loading(model, parts))

    def _process(self) -> Line:
        return Line(
            "process",
            PROCESS_PRIVATE + PROCESS_LIBRARIES + self.threads * THREAD,
            f"Python and libraries {number(PROCESS_PRIVATE)} B "
            f"+ their mapped pages {number(PROCESS_LIBRARIES)} B "
            f"+ threads {self.threads} × {number(THREAD)} B",
        )

    def _weights(self) -> Iterator[Line]:
        """One line for each way of storing them, as ONNX Runtime packs them."""
        packed: dict[str, list[Matrices]] = {}
        for matrices in self.weights:
            if matrices.role in ("linear", "expert", "head"):
                packed.setdefault(self._layout(matrices), []).append(matrices)
        for layout, kinds in packed.items():
            elements, groups = sum(each.elements for each in kinds), sum(each.groups for each in kinds)
            if layout == "float":
                formula = f"weights {number(elements)} × {FLOAT} B"
            else:
                planes = 3 if layout.endswith("offsets") else 2
                what = "scale, sum" + (", offset" if planes == 3 else "")
                formula = (
                    f"weights {number(elements)} × {kinds[0].bits} bit "
                    f"+ groups {number(groups)} × {planes} × {FLOAT} B ({what})"
                )
            yield Line(f"weights {layout}", sum(self._packed(each) for each in kinds), formula)

    def _layout(self, matrices: Matrices) -> str:
        if not self._quantized(matrices):
            return "float"
        return f"{matrices.bits}-bit" + (" with offsets" if matrices.offsets else "")

    def _quantized(self, matrices: Matrices) -> bool:
        return bool(matrices.group) and self.compute == "int8"

    def _packed(self, matrices: Matrices) -> int:
        """Bytes once packed: MatMulNBits' numbers, scales and group sums; FusedMatMul's floats in panels."""
        rows = -(-matrices.rows // PANEL) * PANEL
        if not self._quantized(matrices):
            return matrices.count * rows * matrices.columns * FLOAT
        size = matrices.elements * matrices.bits // 8 + 2 * matrices.groups * FLOAT
        if matrices.offsets:
            size += matrices.count * rows * (matrices.columns // matrices.group) * FLOAT
        return size

    def _graph(self) -> Line:
        layers, each = self.spec.num_hidden_layers, NODES_PER_LAYER[self.compute]
        each += HEAD_NORM_NODES * self.spec.qk_layernorm
        size = layers * each * NODE
        formula = f"layers {layers} × nodes {each} × {number(NODE)} B of ONNX Runtime"
        if self.spec.moe is not None:
            mixtures = sum(map(self.spec.is_mixture, range(layers)))
            # Gate and up are one product, down another; each has a second one where there are offsets.
            products = self.spec.moe.num_experts * (4 if self._any_offsets("expert") else 2)
            size += mixtures * (MIXTURE_NODES + products) * NODE
            formula += (
                f" + mixtures {mixtures} × (nodes {MIXTURE_NODES} + products {products}) × {number(NODE)} B"
            )
        return Line("graph", size, formula)

    def _kv_cache(self, shape: Shape) -> Line:
        spec, size = self.spec, np.dtype(KV_DTYPES[self.kv_cache]).itemsize
        slots = shape.max_batch_size * spec.kv_elements_per_token() * shape.max_seq_len
        spare = spec.num_key_value_heads * spec.head_size * shape.max_seq_len
        return Line(
            "kv_cache",
            (slots + spare) * size,
            f"(slots {shape.max_batch_size} × layers {spec.num_hidden_layers} × 2 + spare 1) "
            f"× tokens {number(shape.max_seq_len)} × kv heads {spec.num_key_value_heads} "
            f"× head {spec.head_size} × {size} B",
        )

    def _sampling(self, shape: Shape) -> Line:
        batch, vocabulary = shape.max_batch_size, self.spec.vocab_size
        seen = min(vocabulary, shape.max_seq_len)
        return Line(
            "sampling",
            ((2 * batch + 3) * vocabulary + batch * seen) * FLOAT,
            f"((2 × slots {batch} + 3) × vocabulary {number(vocabulary)} "
            f"+ slots {batch} × distinct {number(seen)}) × {FLOAT} B",
        )

    def _activations(self, shape: Shape) -> Line:
        """The tensors that live at the same time in the widest layer, and attention's scores."""
        spec = self.spec
        rows = max(min(CHUNK, shape.max_num_tokens, shape.max_seq_len), shape.max_batch_size)
        # Gate and up side by side, their halves, SiLU, product; with offsets two more of the first.
        wide = 10 if self._any_offsets("linear") else 6
        # The heads together can be wider than the residual stream, as Qwen3's are.
        stream = max(spec.hidden_size, spec.num_attention_heads * spec.head_size)
        around = f"6 × hidden or heads {number(stream)}"
        widths = []
        if not all(map(spec.is_mixture, range(spec.num_hidden_layers))):
            inner = spec.intermediate_size
            widths.append((wide * inner + 6 * stream, f"{wide} × mlp {number(inner)} + {around}"))
        if spec.moe is not None:
            # A row for each of a token's experts, twice: sorted, and cut into the experts' runs; the runs of
            # gate and up, and these joined; where there are offsets, the same of their products.
            top_k, inner, hidden = spec.moe.top_k, spec.moe_intermediate_size, spec.hidden_size
            runs = 8 if self._any_offsets("expert") else 4
            of_experts = f"experts {top_k} × ({runs} × mlp {number(inner)} + 3 × hidden {number(hidden)})"
            widths.append((top_k * (runs * inner + 3 * hidden) + 6 * stream, f"{of_experts} + {around}"))
        width, formula = max(widths)
        # Half-precision caches: the scores once more, in floats.
        copies = 1 if self.kv_cache == "fp32" else 2
        heads = spec.num_attention_heads
        scores = rows * heads * shape.max_seq_len * copies * FLOAT
        return Line(
            "activations",
            int(FRAGMENTATION * rows * width * FLOAT) + scores,
            f"rows {rows} × ({FRAGMENTATION} × ({formula}) "
            f"+ heads {heads} × tokens {number(shape.max_seq_len)} × {copies}) × {FLOAT} B",
        )

    def _any_offsets(self, *roles: Role) -> bool:
        return any(each.offsets and each.role in roles and self._quantized(each) for each in self.weights)

    def _mapped(self, shape: Shape) -> Iterator[Line]:
        """What is read from the file as it is used: rows of the embedding, and the rotary tables."""
        tables = [each for each in self.weights if each.role == "embedding"]
        yield Line(
            "embedding",
            sum(map(self._table, tables)),
            " + ".join(_table_formula(each, quantized=self._quantized(each)) for each in tables)
            + ", as its rows are used",
            "mapped",
        )
        half, size = self.spec.head_size // 2, np.dtype(KV_DTYPES[self.kv_cache]).itemsize
        vectors = sum(each.elements for each in self.weights if each.role == "vector")
        yield Line(
            "tables",
            2 * shape.max_seq_len * half * size + vectors * FLOAT,
            f"rotary 2 × tokens {number(shape.max_seq_len)} × {half} × {size} B "
            f"+ gains {number(vectors)} × {FLOAT} B",
            "mapped",
        )

    def _loading(self, model: Sequence[Line], parts: Sequence[Line]) -> Line:
        """How far loading, while weights are packed and caches filled, goes beyond what stays.

        ONNX Runtime packs from the mapped file and lets go of a tensor when it has; the embedding and the
        scales stay mapped to the end.
        """
        parsing = self.spec.vocab_size * (TOKENIZER_LOADING - TOKENIZER_PER_TOKEN)
        tables = sum(self._table(each) for each in self.weights if each.role == "embedding")
        scales = FLOAT * sum(each.groups for each in self.weights if self._quantized(each))
        peak = sum(line.bytes for line in model) + parsing + tables + scales
        return Line(
            "loading",
            max(0, peak - sum(line.bytes for line in parts)),
            f"while weights are packed: process, tokenizer, weights, graph, caches, embedding "
            f"+ parsing {number(parsing)} B + scales {number(scales)} B = {number(peak)} B, "
            "as far as it exceeds the lines above",
            "transient",
        )

    def _table(self, matrices: Matrices) -> int:
        if not self._quantized(matrices):
            return matrices.elements * FLOAT
        return matrices.elements * matrices.bits // 8 + (1 + matrices.offsets) * matrices.groups * FLOAT


def _table_formula(matrices: Matrices, *, quantized: bool) -> str:
    if not quantized:
        return f"{number(matrices.rows)} × {number(matrices.columns)} × {FLOAT} B"
    return (
        f"{number(matrices.rows)} × {number(matrices.columns)} × {matrices.bits} bit "
        f"+ groups {number(matrices.groups)} × {1 + matrices.offsets} × {FLOAT} B"
    )

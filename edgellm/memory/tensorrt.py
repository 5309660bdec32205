"""The TensorRT executor's memory: what its plan says of itself, what is carved beside it, and the process.

Weights and activations are as TensorRT said when the plan was built, for the sizes that it was built for: it
takes no less for smaller ones. For larger ones the plan has to be built again, and activations are taken to
grow with each size. What TensorRT's runtime takes by itself, no device at hand could tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from msgspec import structs

from edgellm.engine_config import BuildConfig, Compute, PlanRecord
from edgellm.executor.buckets import HISTORY
from edgellm.executor.tensorrt_buffers import lasting_buffers, longest_chunk
from edgellm.kernels.adjust import AdjustmentsShape
from edgellm.memory.arena import aligned
from edgellm.memory.device import context_line, graphs_line, pinned_line, process_line, sampling_line
from edgellm.memory.plan import Line, Shape
from edgellm.memory.process import number, requests_line, tokenizer_line
from edgellm.model.kv_cache import KvCache
from edgellm.model.spec import ModelSpec

LIBRARY: Final = 105_000_000
"""Pages of TensorRT-RTX 1.7 in the process once it is imported, x86-64; its runtime without a device."""


@dataclass(frozen=True, slots=True)
class TensorRtFootprint:
    """See `memory.plan.Footprint`.

    Attributes:
        spec: the model's numbers.
        build: the sizes that the plan was built for.
        plan: what it says of itself.
        plan_bytes: of its file.
        unified: whether the device's memory is the host's.
        max_queue: requests that may wait.
        max_message_bytes: of a request.
    """

    spec: ModelSpec
    build: BuildConfig
    plan: PlanRecord
    plan_bytes: int
    unified: bool = True
    max_queue: int = 64
    max_message_bytes: int = 1 << 20

    @property
    def compute(self) -> Compute:
        """Activations in half precision: there is no other."""
        return "fp16"

    @property
    def kv_cache(self) -> KvCache:
        """There is no other."""
        return "fp16"

    def lines(self, shape: Shape) -> tuple[Line, ...]:
        """All parts."""
        spec, plan = self.spec, self.plan
        code = max(0, self.plan_bytes - plan.weight_bytes)
        return (
            process_line(plan.library, LIBRARY),
            tokenizer_line(spec),
            sampling_line(spec, shape),
            pinned_line(
                spec,
                shape,
                longest=longest_chunk(shape),
                adjustments=AdjustmentsShape(spec.vocab_size, HISTORY).dtype.itemsize,
            ),
            context_line(),
            graphs_line(shape.max_batch_size * plan.kernels),
            Line("weights", plan.weight_bytes, f"{number(plan.weight_bytes)} B, as the plan says", "device"),
            Line("code", code, f"the plan {number(self.plan_bytes)} B − its weights", "device"),
            self._caches(shape),
            self._activations(shape),
            requests_line(shape, max_queue=self.max_queue, max_message_bytes=self.max_message_bytes),
            Line("loading", self.plan_bytes, "the plan's file while it is deserialized", "transient"),
        )

    def _buffers(self, shape: Shape) -> dict[str, int]:
        return {
            buffer.name: aligned(buffer.bytes)
            for buffer in lasting_buffers(
                self.spec, self._built(shape), shape, context_bytes=self._context_bytes(shape)
            )
        }

    def _caches(self, shape: Shape) -> Line:
        spec, buffers = self.spec, self._buffers(shape)
        return Line(
            "kv_cache",
            buffers["kv_cache"] + buffers["spare_row"],
            f"(slots {shape.max_batch_size} × layers {spec.num_hidden_layers} × 2 + 1) "
            f"× tokens {number(self._built(shape).max_seq_len)} × kv heads {spec.num_key_value_heads} "
            f"× head {spec.head_size} × 2 B",
            "device",
        )

    def _activations(self, shape: Shape) -> Line:
        buffers = self._buffers(shape)
        rest = sum(buffers.values()) - buffers["kv_cache"] - buffers["spare_row"] - buffers["context"]
        return Line(
            "activations",
            buffers["context"] + rest,
            f"of a chunk or a decode step {number(buffers['context'])} B, as the plan says, + inputs, logits "
            f"and sampling {number(rest)} B",
            "device",
        )

    def _context_bytes(self, shape: Shape) -> int:
        """As recorded; for sizes that the plan was not built for, taken to grow with each of them."""
        build, plan = self.build, self.plan
        length = max(1.0, shape.max_seq_len / build.max_seq_len)
        built = longest_chunk(Shape(build.max_batch_size, build.max_seq_len, build.max_num_tokens))
        chunk = max(1.0, longest_chunk(shape) / built)
        slots = max(1.0, shape.max_batch_size / build.max_batch_size)
        return int(max(plan.prefill_bytes * chunk * length, plan.decode_bytes * slots * length))

    def _built(self, shape: Shape) -> BuildConfig:
        """What the plan was built for, or would be: its caches are as long as that."""
        return structs.replace(self.build, max_seq_len=max(self.build.max_seq_len, shape.max_seq_len))

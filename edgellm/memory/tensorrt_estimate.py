"""The TensorRT executor's memory before there is a plan: what a build would find out, estimated.

Weights are counted as `model/trt_linear.py` emits them. What TensorRT adds of its own is read off builds of
TensorRT-RTX 1.7 for compute capability 8.6 (one to four layers, widths of 512 to 2,048, chunks of 64 to 512,
slots of 512 to 4,096 tokens, and SmolLM2), rounded up; another TensorRT takes something else. Once the plan
is built it says so itself, and `edgellm plan ENGINE` takes that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from edgellm.engine_config import BuildConfig, Compute, PlanRecord
from edgellm.errors import BuildError
from edgellm.executor.tensorrt_buffers import longest_chunk
from edgellm.memory.plan import Line, Shape
from edgellm.memory.process import number
from edgellm.memory.tensorrt import TensorRtFootprint
from edgellm.model.inventory import Matrices
from edgellm.model.kv_cache import KvCache
from edgellm.model.spec import ModelSpec
from edgellm.model.trt_linear import GROUPS

WORKSPACE: Final = 8 << 20
"""Of a kernel that multiplies."""
CODE: Final = 10_000_000
CODE_PER_LAYER: Final = 1_000_000
"""Of a plan for one compute capability: its kernels, of both profiles."""
KERNELS_PER_LAYER: Final = 25
"""That a decode step launches."""
HALF: Final = 2
FLOAT: Final = 4


@dataclass(frozen=True, slots=True)
class TensorRtEstimate:
    """See `memory.plan.Footprint`.

    Attributes:
        spec: the model's numbers.
        weights: every matrix.
        targets: compute capabilities that the plan would be for.
        unified: whether the device's memory is the host's.
        max_queue: requests that may wait.
        max_message_bytes: of a request.

    Raises:
        BuildError: TensorRT has no form for a matrix.
    """

    spec: ModelSpec
    weights: Sequence[Matrices]
    targets: tuple[int, ...] = (87,)
    unified: bool = True
    max_queue: int = 64
    max_message_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        for matrices in self.weights:
            if matrices.group not in (0, *GROUPS):
                raise BuildError(
                    f"matrices of {matrices.rows} × {matrices.columns} have groups of {matrices.group}; "
                    f"TensorRT multiplies by groups of {', '.join(map(str, GROUPS))}. Use `--executor cuda`"
                )

    @property
    def compute(self) -> Compute:
        """Activations in half precision: there is no other."""
        return "fp16"

    @property
    def kv_cache(self) -> KvCache:
        """There is no other."""
        return "fp16"

    def lines(self, shape: Shape) -> tuple[Line, ...]:
        """All parts, as of a plan that was built for these sizes."""
        weights, code = emitted_bytes(self.spec, self.weights, shape), self._code()
        prefill, decode = chunk_bytes(self.spec, self.weights, shape), step_bytes(self.spec, shape)
        record = PlanRecord(
            library="tensorrt",
            version="",
            targets=self.targets,
            lengths=True,
            emitted_bytes=weights,
            weight_bytes=weights,
            prefill_bytes=prefill,
            decode_bytes=decode,
            kernels=KERNELS_PER_LAYER * (self.spec.num_hidden_layers + 1),
        )
        build = BuildConfig(
            max_input_len=shape.max_seq_len - 1,
            max_seq_len=shape.max_seq_len,
            max_batch_size=shape.max_batch_size,
            max_num_tokens=shape.max_num_tokens,
            opt_batch_size=shape.max_batch_size,
            opt_num_tokens=shape.max_num_tokens,
        )
        built = TensorRtFootprint(
            spec=self.spec,
            build=build,
            plan=record,
            plan_bytes=weights + code,
            unified=self.unified,
            max_queue=self.max_queue,
            max_message_bytes=self.max_message_bytes,
        )
        estimated = {
            "weights": f"{number(weights)} B, as emitted",
            "code": f"estimated: devices {len(self.targets)} × ({number(CODE)} B + layers "
            f"{self.spec.num_hidden_layers} × {number(CODE_PER_LAYER)} B)",
            "activations": f"estimated: of a chunk {number(prefill)} B or a decode step {number(decode)} B, "
            "+ inputs, logits and sampling",
            "loading": "estimated: the plan's file while it is deserialized",
        }
        return tuple(
            replace(line, formula=estimated.get(line.name, line.formula)) for line in built.lines(shape)
        )

    def _code(self) -> int:
        return len(self.targets) * (CODE + self.spec.num_hidden_layers * CODE_PER_LAYER)


def emitted_bytes(spec: ModelSpec, weights: Sequence[Matrices], shape: Shape) -> int:
    """Of the network's constants; within a few kilobytes."""
    tables = 2 * 2 * shape.max_seq_len * spec.head_size // 2 * HALF
    return tables + sum(_matrix_bytes(matrices) for matrices in weights)


def _matrix_bytes(matrices: Matrices) -> int:
    """4 bits: numbers, scales, what is added where there are offsets. 8 bits: as two of 4, and always added.

    An embedding of 8 bits is stored as it is; dense matrices as float16, gains as float32.
    """
    scales = matrices.groups * HALF
    if matrices.bits == 4:
        return matrices.elements // 2 + scales + matrices.offsets * scales
    if matrices.bits == 8 and matrices.role == "embedding":
        return matrices.elements + scales + matrices.offsets * scales
    if matrices.bits == 8:
        return matrices.elements + 3 * scales
    return matrices.elements * (FLOAT if matrices.role == "vector" else HALF)


def chunk_bytes(spec: ModelSpec, weights: Sequence[Matrices], shape: Shape) -> int:
    """Activations of a prompt's longest piece.

    A product's workspace and what a token has, beside a second workspace (of the product that adds offsets)
    or a cache repeated for every query head, whichever is more.
    """
    repeated = shape.max_seq_len * spec.num_attention_heads * spec.head_size * HALF
    offsets = WORKSPACE if any(_adds(matrices) for matrices in weights) else 0
    return WORKSPACE + max(offsets, repeated) + longest_chunk(shape) * _token(spec) + 6 * spec.vocab_size


def step_bytes(spec: ModelSpec, shape: Shape) -> int:
    """Activations of a decode step: logits in three forms, the rest as a chunk's tokens."""
    return WORKSPACE + shape.max_batch_size * (_token(spec) + 6 * spec.vocab_size)


def _adds(matrices: Matrices) -> bool:
    """Whether a product needs a second one for what is added to numbers times scales."""
    return matrices.role in ("linear", "expert") and (matrices.offsets or matrices.bits == 8)


def _token(spec: ModelSpec) -> int:
    """Of one: queries in float32, in two forms and turned; an MLP's half; the residual."""
    return 12 * spec.num_attention_heads * spec.head_size + 2 * _inner(spec) + 4 * spec.hidden_size


def _inner(spec: ModelSpec) -> int:
    """Widest row between two linears: a mixture's form computes every expert."""
    if spec.moe is None:
        return spec.intermediate_size
    return max(spec.intermediate_size, spec.moe.num_experts * spec.moe_intermediate_size)

"""What the CUDA and the TensorRT executor take alike: the process, the driver's context, pinned memory."""

from __future__ import annotations

from typing import Final

import numpy as np

from edgellm.executor.cuda_steps import StepBuffers
from edgellm.kernels.sample import SAMPLING
from edgellm.memory.arena import aligned
from edgellm.memory.plan import Line, Shape
from edgellm.memory.process import number
from edgellm.model.spec import ModelSpec

PROCESS: Final = 75_000_000
"""Python, numpy, pyzmq, msgspec, cuda-bindings and edgellm itself, without an engine."""
DRIVER: Final = 160_000_000
"""libcuda's pages in the process: code, its own heaps, the host side of the context."""
CONTEXT: Final = 520_000_000
"""Device memory of a context: local memory for every thread that can run, and the driver's own buffers."""
GRAPH_NODE: Final = 2_500
"""Of a captured graph, on the device."""
DEPTH: Final = 2
"""Steps in flight, each with buffers of its own."""


def process_line(library: str = "", size: int = 0) -> Line:
    """The process without an engine, and a library beside CUDA's, of so many bytes."""
    more = f" + {library} {number(size)} B" if library else ""
    return Line(
        "process",
        PROCESS + DRIVER + size,
        f"Python and libraries {number(PROCESS)} B + libcuda {number(DRIVER)} B{more}",
    )


def context_line() -> Line:
    """The driver's own."""
    return Line("context", CONTEXT, f"{number(CONTEXT)} B of the driver's", "device")


def graphs_line(launches: int) -> Line:
    """Captured graphs of so many launches in all."""
    formula = f"launches {number(launches)} × {number(GRAPH_NODE)} B"
    return Line("graphs", launches * GRAPH_NODE, formula, "device")


def pinned_line(spec: ModelSpec, shape: Shape, *, longest: int, adjustments: int = 0) -> Line:
    """What goes across.

    Args:
        longest: tokens of a prompt's piece.
        adjustments: bytes for what a request wants changed of its logits.
    """
    step = StepBuffers.size(shape, spec.vocab_size, longest)
    slots = aligned(shape.max_batch_size * SAMPLING.itemsize) + aligned(shape.max_batch_size * adjustments)
    return Line(
        "pinned",
        DEPTH * step + slots,
        f"steps {DEPTH} × {number(step)} B, mostly logits of {shape.max_batch_size} slots, "
        f"+ sampling parameters {number(slots)} B",
        "pinned",
    )


def sampling_line(spec: ModelSpec, shape: Shape) -> Line:
    """The host's sampler, for what the device does not sample."""
    batch, vocabulary = shape.max_batch_size, spec.vocab_size
    seen, size = min(vocabulary, shape.max_seq_len), np.dtype(np.int32).itemsize
    return Line(
        "sampling",
        ((batch + 2) * vocabulary + batch * seen) * size,
        f"((slots {batch} + 2) × vocabulary {number(vocabulary)} "
        f"+ slots {batch} × distinct {number(seen)}) × {size} B",
    )

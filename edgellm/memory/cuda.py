"""The CUDA executor's memory: what it carves on the device, and the process around it.

Exact where buffers are ours, since the same code that launches says how large they are; measured constants
where they are the driver's. On a Jetson device memory is the host's and counts with the rest.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass
from typing import Final

import msgspec

from edgellm.cuda.launch import Device
from edgellm.engine_config import Compute
from edgellm.executor.buckets import HISTORY, decode_buckets, prefill_buckets
from edgellm.executor.cuda_programs import Lowering
from edgellm.kernels.adjust import AdjustmentsShape
from edgellm.kernels.attention_shape import CacheKind
from edgellm.memory.arena import aligned
from edgellm.memory.device import context_line, graphs_line, pinned_line, process_line, sampling_line
from edgellm.memory.plan import Line, Shape
from edgellm.memory.process import number, requests_line, tokenizer_line
from edgellm.model.network import Network
from edgellm.model.spec import ModelSpec

DEVICES: Final = (Device(87, 16, 163 << 10), Device(87, 8, 163 << 10), Device(90, 132, 227 << 10))
"""Launches are cut to the device, and workspaces with them; the largest of these is planned for."""


@dataclass(frozen=True, slots=True)
class CudaFootprint:
    """See `memory.plan.Footprint`.

    Attributes:
        spec: the model's numbers.
        network: of the engine.
        weights_bytes: of all packed tensors.
        kv_cache: what the caches hold.
        unified: whether the device's memory is the host's.
        devices: that launches may be cut to.
        max_queue: requests that may wait.
        max_message_bytes: of a request.
    """

    spec: ModelSpec
    network: Network
    weights_bytes: int
    kv_cache: CacheKind
    unified: bool = True
    devices: tuple[Device, ...] = DEVICES
    max_queue: int = 64
    max_message_bytes: int = 1 << 20

    @property
    def compute(self) -> Compute:
        """Activations in half precision: there is no other."""
        return "fp16"

    def lines(self, shape: Shape) -> tuple[Line, ...]:
        """All parts."""
        spec = self.spec
        activations, nodes = self._activations(shape)
        return (
            process_line(),
            tokenizer_line(spec),
            sampling_line(spec, shape),
            pinned_line(
                spec,
                shape,
                longest=min(prefill_buckets(shape)[-1], shape.max_num_tokens),
                adjustments=AdjustmentsShape(spec.vocab_size, HISTORY).dtype.itemsize,
            ),
            context_line(),
            graphs_line(nodes),
            Line("weights", self.weights_bytes, f"{number(self.weights_bytes)} B, packed", "device"),
            self._caches(shape),
            activations,
            requests_line(shape, max_queue=self.max_queue, max_message_bytes=self.max_message_bytes),
        )

    def _caches(self, shape: Shape) -> Line:
        spec, caches = self.spec, self._lowering(shape, self.devices[0]).caches
        each = f"{spec.head_size} × 2 B" if self.kv_cache == "fp16" else f"({spec.head_size} + 2) B"
        return Line(
            "kv_cache",
            caches.bytes,
            f"slots {shape.max_batch_size} × layers {spec.num_hidden_layers} × 2 "
            f"× tokens {number(caches.any_attention.max_seq)} × kv heads {spec.num_key_value_heads} "
            f"× head {each}",
            "device",
        )

    def _activations(self, shape: Shape) -> tuple[Line, int]:
        """What is neither weights nor caches, and how many launches all programs have.

        Two layers stand for all: the buffers of one are those of the next.
        """
        largest, nodes = 0, 0
        for device in self.devices:
            lowering = self._lowering(shape, device)
            programs = [lowering.decode(rows) for rows in decode_buckets(shape.max_batch_size)]
            programs += [lowering.prefill(tokens) for tokens in prefill_buckets(shape)]
            shared = max(program.placement.bytes for program in programs)
            lasting = sum(
                aligned(buffer.bytes)
                for buffer in lowering.lasting()
                if buffer.name not in ("weights", "kv_cache")
            )
            largest = max(largest, shared + lasting)
            launches = sum(len(program.launches) for program in programs)
            nodes = max(nodes, launches * len(self.network.layers) // len(self._short.layers))
        return (
            Line(
                "activations",
                largest,
                f"rows {decode_buckets(shape.max_batch_size)[-1]} or tokens {prefill_buckets(shape)[-1]} of "
                f"a layer, logits, rotary table, workspaces: {number(largest)} B, placed by when they live",
                "device",
            ),
            nodes,
        )

    @property
    def _short(self) -> Network:
        layers = self.network.layers
        return msgspec.structs.replace(self.network, layers=(*layers[:1], *layers[1:][-1:]))

    def _lowering(self, shape: Shape, device: Device) -> Lowering:
        return Lowering(
            self._short,
            self.spec,
            shape,
            kv_cache=self.kv_cache,
            device=device,
            weights=_Anywhere(),
            weights_bytes=self.weights_bytes,
        )


class _Anywhere(collections.defaultdict[str, int]):
    """Offsets of tensors where only sizes are asked for."""

    def __init__(self) -> None:
        super().__init__(int)

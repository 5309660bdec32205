"""Where keys and values lie on the device: caches of all layers in one buffer, slots side by side."""

from __future__ import annotations

from edgellm.cuda.launch import At
from edgellm.kernels.attention_shape import SEQUENCE_MULTIPLE, AttentionShape, Cache, CacheKind
from edgellm.memory.arena import aligned
from edgellm.memory.plan import Shape
from edgellm.model.network import Network
from edgellm.model.spec import ModelSpec


class Caches:
    """Layers' caches in the buffer `kv_cache`, and the attention that reads them.

    Args:
        network: of the engine.
        spec: the model's numbers.
        shape: slots, and their length.
        kind: what the caches hold.

    Attributes:
        attention: of each layer; they differ in their scale alone.
    """

    def __init__(self, network: Network, spec: ModelSpec, shape: Shape, kind: CacheKind) -> None:
        capacity = -(-shape.max_seq_len // SEQUENCE_MULTIPLE) * SEQUENCE_MULTIPLE
        self._slots = shape.max_batch_size
        self.attention = [
            AttentionShape(
                heads=spec.num_attention_heads,
                kv_heads=spec.num_key_value_heads,
                head_size=spec.head_size,
                max_seq=capacity,
                kv=kind,
                scale=layer.attention.scale,
                qk_norm=layer.attention.q_gain is not None,
                epsilon=spec.norm_epsilon,
            )
            for layer in network.layers
        ]

    @property
    def any_attention(self) -> AttentionShape:
        """Of every layer, apart from its scale."""
        return self.attention[0]

    @property
    def bytes(self) -> int:
        """Of the buffer."""
        return len(self.attention) * self._layer_bytes

    def of(self, layer: int) -> Cache:
        """A layer's keys and values."""
        held = At("kv_cache", layer * self._layer_bytes)
        if not self.any_attention.scale_bytes(self._slots):
            return Cache(held)
        return Cache(held, held + aligned(self.any_attention.cache_bytes(self._slots)))

    @property
    def _layer_bytes(self) -> int:
        """Of a layer's keys and values, with their scales."""
        attention = self.any_attention
        return aligned(attention.cache_bytes(self._slots)) + aligned(attention.scale_bytes(self._slots))

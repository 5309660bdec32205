"""Models of a known shape with random weights: what is measured where no checkpoint is at hand.

The same name, quantization and seed give the same weights on every machine. Numbers are cut out of one pool
of random bytes at a place that depends on the tensor, so that making a row costs what copying it does. The
text such a model writes is noise, its tokenizer one token a byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from edgellm.checkpoint.random_models import MODELS, TINY
from edgellm.errors import CheckpointError, UsageError
from edgellm.model.quantization import Quantization
from edgellm.model.spec import ModelSpec
from edgellm.model.weights import Dense, Float, Grouped, Groups, Weight
from edgellm.text.bpe import CONTROL, NORMAL, BpeVocabulary
from edgellm.text.spelling import BYTE_ALPHABET

Quant = Literal["int4", "int8", "fp16"]
QUANTS: Final[tuple[Quant, ...]] = ("int4", "int8", "fp16")
"""Groups of 4 bits with zero points as AWQ has them, of 8 bits about 0, or none."""

_POOL_BYTES: Final = 32 << 20
_GROUPS: Final = (128, 64, 32)
_END: Final = "<|endoftext|>"
_TEMPLATE: Final = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def random_checkpoint(name: str, quant: str, seed: int = 0) -> RandomCheckpoint:
    """A model of a known shape.

    Raises:
        UsageError: the name or the quantization is none that is known.
    """
    specs = MODELS | TINY
    if name not in specs:
        raise UsageError(f"--random {name}: there are {', '.join(specs)}")
    for known in QUANTS:
        if quant == known:
            return RandomCheckpoint(specs[name], name=f"{name}-random", quant=known, seed=seed)
    raise UsageError(f"--quant {quant}: there are {', '.join(QUANTS)}")


@dataclass(frozen=True)
class RandomCheckpoint:
    """See `Checkpoint`.

    Attributes:
        quant: of every matrix; vectors are float32.
        seed: of all numbers.
        sharpness: standard deviation of a matrix's elements, times the square root of its columns.
    """

    spec: ModelSpec
    name: str
    quant: Quant
    seed: int = 0
    sharpness: float = 1.0

    path = Path("random")
    chat_template: str | None = _TEMPLATE
    bos_id: int | None = None
    add_bos = False
    bos_token = ""
    eos_token = _END

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The one special token."""
        return (min(256, self.spec.vocab_size - 1),)

    @property
    def quantization(self) -> Quantization:
        """Of all matrices whose columns divide into groups."""
        match self.quant:
            case "int4":
                return Quantization(
                    quant_algo="W4A16",
                    group_size=self._group(self.spec.hidden_size) or 0,
                    has_zero_point=True,
                )
            case "int8":
                return Quantization(quant_algo="W8A16", group_size=self._group(self.spec.hidden_size) or 0)
        return Quantization()

    @property
    def stored_bytes(self) -> int:
        """What the matrices would take on disk: their bits alone."""
        bits = {"int4": 4, "int8": 8, "fp16": 16}[self.quant]
        return sum(int(np.prod(shape)) for shape in self._shapes.values()) * bits // 8

    def has(self, name: str) -> bool:
        """Whether the shape has such a tensor."""
        return name in self._shapes

    def tensor(self, name: str) -> Weight:
        """A tensor, made as its rows are read.

        Raises:
            CheckpointError: the shape has none of that name.
        """
        if name not in self._shapes:
            raise CheckpointError(f"a random {self.name} has no {name}")
        shape = self._shapes[name]
        if len(shape) == 1:
            return Dense(name, shape, "f32", self._vector(name))
        n, k = shape
        group = self._group(k)
        if self.quant == "fp16" or group is None:
            return Dense(name, shape, "f16", self._matrix(name, k))
        return Grouped(
            name,
            (n, k),
            4 if self.quant == "int4" else 8,
            group,
            self.quant == "int4",
            self._groups(name, k, group),
        )

    def tokenizer_json(self) -> bytes:
        """A token for each byte, the end, and tokens that no text has."""
        spelled = {byte: letter for letter, byte in BYTE_ALPHABET.items()}
        tokens = [spelled[byte] for byte in range(256)] + [_END]
        tokens += [f"<{index}>" for index in range(len(tokens), self.spec.vocab_size)]
        tokens = tokens[: self.spec.vocab_size]
        types = [CONTROL if token == _END else NORMAL for token in tokens]
        return BpeVocabulary(self.path, tokens, types, [], "llama-bpe", add_bos=False).tokenizer_json()

    @cached_property
    def _pool(self) -> NDArray[np.uint8]:
        """Random bytes, cut anywhere."""
        return np.random.default_rng(self.seed).integers(0, 256, _POOL_BYTES, np.uint8)

    @cached_property
    def _nibbles(self) -> NDArray[np.uint8]:
        return np.bitwise_and(self._pool, 15, dtype=np.uint8)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name → shape, of every tensor that the network has."""
        spec = self.spec
        hidden, size = spec.hidden_size, spec.head_size
        widths = {"q": spec.num_attention_heads * size}
        widths["k"] = widths["v"] = spec.num_key_value_heads * size
        shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (spec.vocab_size, hidden), "norm": (hidden,)}
        if not spec.tie_word_embeddings:
            shapes["lm_head"] = (spec.vocab_size, hidden)
        for layer in range(spec.num_hidden_layers):
            here = f"layers.{layer}"
            shapes[f"{here}.input_layernorm"] = shapes[f"{here}.post_attention_layernorm"] = (hidden,)
            shapes[f"{here}.self_attn.o_proj"] = (hidden, widths["q"])
            for part, width in widths.items():
                shapes[f"{here}.self_attn.{part}_proj"] = (width, hidden)
                if spec.attn_bias:
                    shapes[f"{here}.self_attn.{part}_proj.bias"] = (width,)
            if spec.qk_layernorm:
                shapes[f"{here}.self_attn.q_norm"] = shapes[f"{here}.self_attn.k_norm"] = (size,)
            if spec.moe is not None and spec.is_mixture(layer):
                shapes[f"{here}.mlp.gate"] = (spec.moe.num_experts, hidden)
                for expert in range(spec.moe.num_experts):
                    shapes |= _mlp(f"{here}.mlp.experts.{expert}", hidden, spec.moe_intermediate_size)
            else:
                shapes |= _mlp(f"{here}.mlp", hidden, spec.intermediate_size)
        return shapes

    def _group(self, columns: int) -> int | None:
        """The largest usual group that divides the columns."""
        return next((group for group in _GROUPS if columns % group == 0), None)

    def _cut(self, pool: NDArray[np.uint8], name: str, begin: int, count: int) -> NDArray[np.uint8]:
        """`count` bytes of a pool for a tensor, from its byte `begin` on; another one's are elsewhere."""
        digest = hashlib.blake2b(f"{self.seed} {name}".encode(), digest_size=8).digest()
        # An odd length: rows of a power of two do not repeat in step with the pool.
        length = len(pool) - 1
        start = (int.from_bytes(digest, "little") + begin) % length
        pieces = []
        while count > 0:
            piece = pool[start : min(start + count, length)]
            pieces.append(piece)
            count, start = count - len(piece), 0
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _uniform(self, name: str, begin: int, count: int) -> Float:
        """float32 [count], uniform in −1…1."""
        values: Float = self._cut(self._pool, name, begin, count).astype(np.float32)
        values -= np.float32(127.5)
        values /= np.float32(127.5)
        return values

    def _vector(self, name: str) -> Callable[[int, int], Float]:
        # Gains about 1; biases about 0.
        middle = 0.0 if name.endswith(".bias") else 1.0

        def read(begin: int, end: int) -> Float:
            values: Float = np.float32(middle) + np.float32(0.1) * self._uniform(name, begin, end - begin)
            return values

        return read

    def _matrix(self, name: str, k: int) -> Callable[[int, int], Float]:
        # Uniform in ±1 has a standard deviation of 1/√3.
        size = np.float32(self.sharpness * (3 / k) ** 0.5)

        def read(begin: int, end: int) -> Float:
            values: Float = self._uniform(name, begin * k, (end - begin) * k) * size
            return values.astype(np.float16).astype(np.float32).reshape(-1, k)

        return read

    def _groups(self, name: str, k: int, group: int) -> Callable[[int, int], Groups]:
        per_row = k // group
        four = self.quant == "int4"
        # Numbers uniform in 0…15 and −128…127.
        deviation = ((16**2 if four else 256**2) / 12) ** 0.5
        size = self.sharpness / (deviation * k**0.5)

        def read(begin: int, end: int) -> Groups:
            rows = end - begin
            pool = self._nibbles if four else self._pool
            q = self._cut(pool, name, begin * k, rows * k).reshape(rows, k)
            spread = self._uniform(f"{name} scale", begin * per_row, rows * per_row)
            spread = spread.reshape(rows, per_row)
            scale = (size * (1 + spread / 4)).astype(np.float16).astype(np.float32)
            if not four:
                return Groups(q.view(np.int8), scale)
            zero = 7 + (self._cut(self._pool, f"{name} zero", begin * per_row, rows * per_row) & 1)
            return Groups(q, scale, zero=zero.reshape(rows, per_row))

        return read


def _mlp(name: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.gate_proj": (inner, hidden),
        f"{name}.up_proj": (inner, hidden),
        f"{name}.down_proj": (hidden, inner),
    }

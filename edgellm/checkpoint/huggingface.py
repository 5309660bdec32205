"""A Hugging Face model directory: config.json, safetensors, tokenizer, in whichever quantization.

Tensor names are transformers': canonical names with `model.` in front and `.weight` behind. Quantized layers
have other tensors in place of `.weight`; `quantization_config` in config.json says which.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from edgellm.checkpoint.awq import Awq
from edgellm.checkpoint.compressed_tensors import CompressedTensors
from edgellm.checkpoint.gptq import Gptq
from edgellm.checkpoint.huggingface_config import CONFIG, ConfigFile, Family, family_of, read_spec
from edgellm.checkpoint.huggingface_text import TextFiles
from edgellm.checkpoint.packed import Packing, dense, floats
from edgellm.checkpoint.safetensors import SafetensorsModel
from edgellm.errors import CheckpointError
from edgellm.model.quantization import Quantization
from edgellm.model.spec import ModelSpec
from edgellm.model.weights import Grouped, Weight

_TOP: Final = frozenset({"embed_tokens", "norm", "lm_head"})
_UNUSED: Final = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")
"""Buffers that old transformers saved."""
_METHODS: Final[dict[str, Callable[[ConfigFile], Packing]]] = {
    "awq": Awq.from_config,
    "gptq": Gptq.from_config,
    "compressed-tensors": CompressedTensors.from_config,
}
"""`quant_method` → the layout that a quantization_config describes."""


class HuggingFaceCheckpoint:
    """See `Checkpoint`; opening checks that every tensor of the architecture is there and has its shape.

    Raises:
        CheckpointError: a file is missing or damaged, config and tensors disagree, or the model has a part
            that edgellm does not support; the message names it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.resolve().name
        config = ConfigFile.open(path / CONFIG)
        self.spec = read_spec(config)
        self.model = SafetensorsModel(path)
        if self.spec.num_hidden_layers > len(self.model.tensors):
            raise CheckpointError(
                f"{config.where}: num_hidden_layers is {self.spec.num_hidden_layers}, "
                f"for {len(self.model.tensors)} tensors in all"
            )
        self._packing = _packing(config)
        self._shapes = dict(_shapes(self.spec, family_of(config)))
        self._check_tensors()
        text = self._text = TextFiles(path, config, self.spec.vocab_size)
        self.chat_template = text.chat_template
        self.bos_id, self.add_bos, self.eos_ids = text.bos_id, text.add_bos, text.eos_ids
        self.bos_token, self.eos_token = text.bos_token, text.eos_token

    @property
    def quantization(self) -> Quantization:
        """How most linear weights are stored, by size; `exclude_modules` names the others."""
        kinds = {name: _kind(self.tensor(name)) for name, shape in self._shapes.items() if len(shape) == 2}
        sizes: Counter[tuple[int, int, bool]] = Counter()
        for name, kind in kinds.items():
            if name not in _TOP:
                n, k = self._shapes[name]
                sizes[kind] += n * k
        main = sizes.most_common(1)[0][0]
        bits, group, asymmetric = main
        algorithm: Any = "NO_QUANT" if self._packing is None or bits == 16 else self._packing.quant_algo
        return Quantization(
            quant_algo=algorithm,
            group_size=group,
            has_zero_point=asymmetric,
            exclude_modules=tuple(name for name, kind in kinds.items() if kind != main),
        )

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(info.size for info in self.model.tensors.values())

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this canonical name."""
        return name in self._shapes

    def tensor(self, name: str) -> Weight:
        """The tensor of this canonical name; its bytes are read by its `read()`."""
        shape = self._shapes.get(name)
        if shape is None:
            raise CheckpointError(f"{self.path} has no tensor for {name}")
        if name.endswith(".bias"):
            return dense(self.model, _stored(name), shape)
        layer = _stored(name)
        if len(shape) == 2 and self._is_packed(layer):
            assert self._packing is not None
            return self._packing.weight(self.model, layer, (shape[0], shape[1]))
        return dense(self.model, f"{layer}.weight", shape)

    def tokenizer_json(self) -> bytes:
        """The tokenizer in the format of Hugging Face's `tokenizers`, UTF-8."""
        return self._text.tokenizer_json()

    def _is_packed(self, layer: str) -> bool:
        return self._packing is not None and f"{layer}.{self._packing.suffixes[0]}" in self.model.tensors

    def _check_tensors(self) -> None:
        used: set[str] = set()
        packed = 0
        for name in self._shapes:
            self.tensor(name)
            layer = _stored(name)
            if name.endswith(".bias"):
                used.add(layer)
            elif self._packing is not None and self._is_packed(layer):
                packed += 1
                used.update(f"{layer}.{suffix}" for suffix in self._packing.suffixes)
            else:
                used.add(f"{layer}.weight")
        if self._packing is not None and not packed:
            raise CheckpointError(
                f"{self.path / CONFIG} has a quantization_config, but no layer has a "
                f"{self._packing.suffixes[0]} tensor"
            )
        if self.spec.tie_word_embeddings:
            used.add("lm_head.weight")
        for name in self.model.tensors:
            if name not in used and not name.endswith(_UNUSED) and not self._is_idle_bias(name):
                raise CheckpointError(
                    f"{self.model.where(name)} has no place in {self.spec.architecture} as config.json has it"
                )

    def _is_idle_bias(self, name: str) -> bool:
        # AutoGPTQ gave every layer a bias, of zeros where the model has none.
        layer, _, last = name.rpartition(".")
        return last == "bias" and self._is_packed(layer) and not floats(self.model, name).any()


def _packing(config: ConfigFile) -> Packing | None:
    """The layout that the config's quantization_config describes; None if there is none.

    Raises:
        CheckpointError: edgellm does not read it.
    """
    quantization = config.section("quantization_config")
    if quantization is None:
        return None
    method = quantization.string("quant_method")
    if method not in _METHODS:
        raise CheckpointError(
            f"{quantization.where} has quant_method {method}; edgellm reads {', '.join(_METHODS)}"
        )
    return _METHODS[method](quantization)


def _kind(weight: Weight) -> tuple[int, int, bool]:
    """Bits, group and whether there are offsets that are more than the middle of the range."""
    if isinstance(weight, Grouped):
        return weight.bits, weight.group, weight.asymmetric and not weight.centred
    return 16, 0, False


def _stored(name: str) -> str:
    return name if name == "lm_head" else f"model.{name}"


def _shapes(spec: ModelSpec, family: Family) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(canonical name, shape) of every tensor, in the order in which a model uses them."""
    hidden, inner, head = spec.hidden_size, spec.intermediate_size, spec.head_size
    queries, keys = spec.num_attention_heads * head, spec.num_key_value_heads * head
    attention: dict[str, tuple[int, int]] = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
    }
    dense = {f"mlp.{part}": shape for part, shape in _mlp(inner, hidden).items()}
    mixture: dict[str, tuple[int, int]] = {}
    if spec.moe is not None:
        mixture["mlp.gate"] = (spec.moe.num_experts, hidden)
        for expert in range(spec.moe.num_experts):
            for part, shape in _mlp(spec.moe_intermediate_size, hidden).items():
                mixture[f"mlp.experts.{expert}.{part}"] = shape

    def biased(linear: str) -> bool:
        if linear.startswith("mlp."):
            return spec.mlp_bias
        return spec.attn_bias and not (family.qkv_bias and linear == "self_attn.o_proj")

    yield "embed_tokens", (spec.vocab_size, hidden)
    for layer in range(spec.num_hidden_layers):
        here = f"layers.{layer}"
        yield f"{here}.input_layernorm", (hidden,)
        yield f"{here}.post_attention_layernorm", (hidden,)
        if spec.qk_layernorm:
            yield f"{here}.self_attn.q_norm", (head,)
            yield f"{here}.self_attn.k_norm", (head,)
        mlp = mixture if spec.is_mixture(layer) else dense
        for linear, shape in (attention | mlp).items():
            yield f"{here}.{linear}", shape
            if biased(linear):
                yield f"{here}.{linear}.bias", shape[:1]
    yield "norm", (hidden,)
    if not spec.tie_word_embeddings:
        yield "lm_head", (spec.vocab_size, hidden)


def _mlp(inner: int, hidden: int) -> dict[str, tuple[int, int]]:
    """Projection → shape, of one gated MLP."""
    return {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}

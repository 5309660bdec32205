"""A Hugging Face model directory: config.json, safetensors, tokenizer, in whichever quantization.

Tensor names are transformers': canonical names with `model.` in front and `.weight` behind. Quantized layers
have other tensors in place of `.weight`; `quantization_config` in config.json says which.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from edgellm.checkpoint.awq import Awq
from edgellm.checkpoint.base import name_of
from edgellm.checkpoint.compressed_tensors import CompressedTensors
from edgellm.checkpoint.config_file import ConfigFile
from edgellm.checkpoint.gptq import Gptq
from edgellm.checkpoint.huggingface_config import CONFIG, family_of, read_spec
from edgellm.checkpoint.huggingface_places import FUSED_GATE_UP, places_of
from edgellm.checkpoint.huggingface_qwen import is_qwen, qwen_places, read_qwen
from edgellm.checkpoint.huggingface_text import TextFiles
from edgellm.checkpoint.packed import Packing, dense, floats, stacked
from edgellm.checkpoint.place import Place
from edgellm.checkpoint.safetensors import SafetensorsModel
from edgellm.errors import CheckpointError
from edgellm.model.quantization import Quantization
from edgellm.model.weights import Grouped, Weight, rows_of

_TOP: Final = frozenset({"embed_tokens", "norm", "lm_head"})
_UNUSED: Final = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")
"""Buffers that old transformers saved."""
_PIECE_ELEMENTS: Final = 1 << 22
"""Of two matrices that are compared."""
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
        self.name = name_of(path.resolve().name)
        config = ConfigFile.open(path / CONFIG)
        self.spec = read_qwen(config) if is_qwen(config) else read_spec(config)
        self.model = SafetensorsModel(path)
        if self.spec.num_hidden_layers > len(self.model.tensors):
            raise CheckpointError(
                f"{config.where}: num_hidden_layers is {self.spec.num_hidden_layers}, "
                f"for {len(self.model.tensors)} tensors in all"
            )
        self._packing = _packing(config)
        self._places = dict(
            qwen_places(self.spec)
            if is_qwen(config)
            else places_of(self.spec, family_of(config), fused_experts=self._has_fused_experts())
        )
        self._check_tensors()
        text = self._text = TextFiles(path, config, self.spec.vocab_size)
        self.chat_template = text.chat_template
        self.bos_id, self.add_bos, self.eos_ids = text.bos_id, text.add_bos, text.eos_ids
        self.bos_token, self.eos_token = text.bos_token, text.eos_token

    @property
    def quantization(self) -> Quantization:
        """How most linear weights are stored, by size; `exclude_modules` names the others."""
        matrices = {name: weight for name in self._places if len((weight := self.tensor(name)).shape) == 2}
        kinds = {name: _kind(weight) for name, weight in matrices.items()}
        sizes: Counter[tuple[int, int, bool]] = Counter()
        for name, kind in kinds.items():
            if name not in _TOP:
                n, k = matrices[name].shape
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
        return name in self._places

    def tensor(self, name: str) -> Weight:
        """The tensor of this canonical name; its bytes are read by its `read()`."""
        place = self._places.get(name)
        if place is None:
            raise CheckpointError(f"{self.path} has no tensor for {name}")
        whole = self._whole(place)
        return whole if place.count is None else rows_of(whole, place.first, place.count)

    def _whole(self, place: Place) -> Weight:
        match place.shape:
            case (e, n, k):
                return stacked(self.model, place.stored, (e, n, k))
            case (n, k) if self._is_packed(place.stored):
                assert self._packing is not None
                return self._packing.weight(self.model, place.stored, (n, k))
        return dense(self.model, self._stored(place), place.shape)

    def _stored(self, place: Place) -> str:
        """The tensor's name in the files, of an unquantized one."""
        named_so = place.stored.endswith(".bias") or len(place.shape) == 3
        return place.stored if named_so else f"{place.stored}.weight"

    def tokenizer_json(self) -> bytes:
        """The tokenizer in the format of Hugging Face's `tokenizers`, UTF-8."""
        return self._text.tokenizer_json()

    def _has_fused_experts(self) -> bool:
        return any(name.endswith(FUSED_GATE_UP) for name in self.model.tensors)

    def _is_packed(self, layer: str) -> bool:
        return self._packing is not None and f"{layer}.{self._packing.suffixes[0]}" in self.model.tensors

    def _check_tensors(self) -> None:
        used: set[str] = set()
        packed = 0
        for name, place in self._places.items():
            self.tensor(name)
            if self._packing is not None and self._is_packed(place.stored):
                packed += 1
                used.update(f"{place.stored}.{suffix}" for suffix in self._packing.suffixes)
            else:
                used.add(self._stored(place))
        if self._packing is not None and not packed:
            raise CheckpointError(
                f"{self.path / CONFIG} has a quantization_config, but no layer has a "
                f"{self._packing.suffixes[0]} tensor"
            )
        if self.spec.tie_word_embeddings and "lm_head.weight" in self.model.tensors:
            self._check_tied_head("lm_head.weight", self._stored(self._places["embed_tokens"]))
            used.add("lm_head.weight")
        for name in self.model.tensors:
            if name not in used and not name.endswith(_UNUSED) and not self._is_idle_bias(name):
                raise CheckpointError(
                    f"{self.model.where(name)} has no place in {self.spec.architecture} as config.json has it"
                )

    def _check_tied_head(self, head: str, embedding: str) -> None:
        # Versions of transformers disagree on a head of its own in a tied model: until 4 it is ignored, since
        # 5 it is the head.
        one, other = self.model.tensors[head].shape, self.model.tensors[embedding].shape
        step = max(1, _PIECE_ELEMENTS // other[1])
        pieces = [slice(row, min(row + step, other[0])) for row in range(0, other[0], step)]
        if one != other or not all(
            np.array_equal(floats(self.model, head, piece), floats(self.model, embedding, piece))
            for piece in pieces
        ):
            raise CheckpointError(
                f"{self.model.where(head)} is not {embedding}, though config.json says tie_word_embeddings; "
                "set that to false if it is the model's head, or remove the tensor if it is left over"
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

"""A model in a GGUF file: which tensors it has, under llama.cpp's names (gguf-py's constants.py).

A tensor that this file does not know is refused by name: one that was silently ignored would be a model that
answers a little worse.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Final, Literal

from edgellm.checkpoint.base import name_of
from edgellm.checkpoint.gguf import GgufFile
from edgellm.checkpoint.gguf_layouts import weight
from edgellm.checkpoint.gguf_places import BIASES, HEAD_NORMS, TOP, places_of
from edgellm.checkpoint.gguf_spec import ARCHITECTURES, ROPE_FREQS, read_spec
from edgellm.checkpoint.gguf_tensors import TensorInfo
from edgellm.errors import CheckpointError
from edgellm.model.quantization import Quantization
from edgellm.model.spec import ModelSpec
from edgellm.model.weights import Grouped, Weight
from edgellm.text.bpe import CONTROL, NORMAL, USER_DEFINED, BpeVocabulary
from edgellm.text.sentencepiece import SentencePieceVocabulary

END_OF_ANSWER: Final = frozenset(
    {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>"}
)
"""Control tokens that end an answer, whether or not the file's keys name them: a subset of llama.cpp's list
(llama-vocab.cpp, special_eog_ids). Many files give one of two."""


class GgufCheckpoint:
    """See `Checkpoint`; opening checks that every tensor of the architecture is there and has its shape.

    Raises:
        CheckpointError: the file is damaged, incomplete, or of an architecture, tensor type or scaling that
            edgellm does not support; the message names it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GgufFile(path)
        self.spec = read_spec(self.file)
        self._architecture = ARCHITECTURES[self.file.string("general.architecture")]
        self.name = name_of(path.stem)
        self._places = dict(places_of(self.spec, self._architecture))
        self._check_tensors()
        self.vocabulary = _vocabulary(self.file, self.spec)
        self.chat_template = self.file.string("tokenizer.chat_template", "") or None
        self.bos_id = self._special("bos")
        self.add_bos = self.bos_id is not None and self.vocabulary.add_bos
        self.eos_ids = self._eos_ids()
        self.bos_token = "" if self.bos_id is None else self.vocabulary.tokens[self.bos_id]
        eos = self._special("eos")
        self.eos_token = "" if eos is None else self.vocabulary.tokens[eos]

    @property
    def quantization(self) -> Quantization:
        """How most linear weights are stored, by bytes; `exclude_modules` names the others."""
        kinds = {name: self._kind(name) for name in self._places if self.has(name) and self._is_matrix(name)}
        sizes: Counter[tuple[int, bool, int]] = Counter()
        for name, kind in kinds.items():
            if name not in TOP:
                sizes[kind] += self._info(name).size
        main = sizes.most_common(1)[0][0]
        bits, asymmetric, group = main
        algorithms: dict[int, Literal["W4A16", "W8A16", "NO_QUANT"]] = {
            4: "W4A16",
            8: "W8A16",
            16: "NO_QUANT",
        }
        return Quantization(
            quant_algo=algorithms[bits],
            group_size=group,
            has_zero_point=asymmetric,
            exclude_modules=tuple(name for name, kind in kinds.items() if kind != main),
        )

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors in the file."""
        return sum(info.size for info in self.file.tensors.values())

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this canonical name."""
        place = self._places.get(name)
        return place is not None and place.stored in self.file.tensors

    def tensor(self, name: str) -> Weight:
        """The tensor of this canonical name; its bytes are read by its `read()`."""
        if not self.has(name):
            raise CheckpointError(f"{self.path} has no tensor for {name}")
        heads = None
        if not self._architecture.permuted:
            pass
        elif ".self_attn.q_proj" in name:
            heads = self.spec.num_attention_heads
        elif ".self_attn.k_proj" in name:
            heads = self.spec.num_key_value_heads
        return weight(self.file, self._info(name), rotary_heads=heads)

    def tokenizer_json(self) -> bytes:
        """The tokenizer in the format of Hugging Face's `tokenizers`, UTF-8."""
        return self.vocabulary.tokenizer_json()

    def _info(self, name: str) -> TensorInfo:
        place = self._places[name]
        info = self.file.tensors[place.stored]
        return info if place.count is None else info.rows(place.first, place.count)

    def _is_matrix(self, name: str) -> bool:
        return len(self._info(name).shape) == 2

    def _kind(self, name: str) -> tuple[int, bool, int]:
        tensor = self.tensor(name)
        if isinstance(tensor, Grouped):
            return tensor.bits, tensor.asymmetric, tensor.group
        return 16, False, 0

    def _check_tensors(self) -> None:
        known = {place.stored for place in self._places.values()}
        for stored in self.file.tensors:
            if stored not in known and stored != ROPE_FREQS:
                raise CheckpointError(
                    f"{self.path} has tensor {stored}, which edgellm's {self.spec.architecture} lacks"
                )
        for canonical, place in self._places.items():
            info = self.file.tensors.get(place.stored)
            if info is None:
                if self._required(canonical):
                    raise CheckpointError(f"{self.path} has no tensor {place.stored}")
            elif info.shape != place.shape:
                raise CheckpointError(
                    f"{self.path}: tensor {place.stored} has shape {info.shape}, its keys say {place.shape}"
                )

    def _required(self, canonical: str) -> bool:
        part = canonical.split(".", 2)[-1]
        if part in BIASES:
            return self.spec.attn_bias
        if part in HEAD_NORMS:
            return self.spec.qk_layernorm
        return part != "lm_head"

    def _special(self, role: str) -> int | None:
        key = f"tokenizer.ggml.{role}_token_id"
        if key not in self.file.values:
            return None
        token = self.file.integer(key)
        if token >= self.spec.vocab_size:
            raise CheckpointError(
                f"{self.path}: {key} is {token}, but there are {self.spec.vocab_size} tokens"
            )
        return token

    def _eos_ids(self) -> tuple[int, ...]:
        named = {self._special(role) for role in ("eos", "eot", "eom")} - {None}
        vocabulary = self.vocabulary
        known = {
            token
            for token, kind in enumerate(vocabulary.types)
            if kind == CONTROL and vocabulary.tokens[token] in END_OF_ANSWER
        }
        eos_ids = tuple(sorted(token for token in named | known if token is not None))
        if not eos_ids:
            raise CheckpointError(
                f"{self.path} has no key tokenizer.ggml.eos_token_id: nothing would end an answer"
            )
        return eos_ids


def _vocabulary(file: GgufFile, spec: ModelSpec) -> BpeVocabulary | SentencePieceVocabulary:
    model = file.string("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise CheckpointError(
            f"{file.path} has tokenizer.ggml.model {model}; edgellm reads gpt2 (byte-level BPE) and llama "
            "(SentencePiece)"
        )
    types = file.integers("tokenizer.ggml.token_type")
    if len(types) != spec.vocab_size:
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.token_type has {len(types)} entries for {spec.vocab_size} tokens"
        )
    tokens = file.strings("tokenizer.ggml.tokens")
    # Some converters have made them words; llama.cpp corrects that, too (llama-vocab.cpp, special_eog_ids).
    types = [
        CONTROL if token in END_OF_ANSWER and kind in (NORMAL, USER_DEFINED) else kind
        for token, kind in zip(tokens, types, strict=True)
    ]
    # Of the keys that may be absent, llama.cpp's defaults.
    if model == "llama":
        scores = file.reals("tokenizer.ggml.scores")
        if len(scores) != spec.vocab_size:
            raise CheckpointError(
                f"{file.path}: tokenizer.ggml.scores has {len(scores)} entries for {spec.vocab_size} tokens"
            )
        return SentencePieceVocabulary(
            source=file.path,
            tokens=tokens,
            scores=scores,
            types=types,
            prefix="every" if file.boolean("tokenizer.ggml.add_space_prefix", True) else "none",
            add_bos=file.boolean("tokenizer.ggml.add_bos_token", True),
        )
    pre = file.string("tokenizer.ggml.pre")
    return BpeVocabulary(
        source=file.path,
        tokens=tokens,
        types=types,
        merges=file.strings("tokenizer.ggml.merges"),
        pre=pre,
        add_bos=file.boolean("tokenizer.ggml.add_bos_token", pre == "llama-bpe"),
    )

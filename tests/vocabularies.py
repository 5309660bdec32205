"""Small vocabularies of each kind, and what their own tokenizers read: tests/golden/vocabularies.

tools/make_vocabulary_golden.py writes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from ggufs import MERGES, token_types, tokens

from edgellm.checkpoint.sentencepiece_model import read_sentencepiece
from edgellm.text.bpe import BpeVocabulary
from edgellm.text.tiktoken import tiktoken_json
from edgellm.text.tokenizer import Tokenizer

_DIRECTORY = Path(__file__).parent / "golden" / "vocabularies"
GOLDEN: dict[str, Any] = json.loads((_DIRECTORY / "golden.json").read_text())
MODEL, RANKS = _DIRECTORY / "tokenizer.model", _DIRECTORY / "qwen.tiktoken"


def load(tokenizer_json: bytes, *, bos_id: int | None = None) -> Tokenizer:
    """The tokenizer of a tokenizer.json."""
    return Tokenizer(tokenizers.Tokenizer.from_str(tokenizer_json.decode()), bos_id=bos_id)


TINY = BpeVocabulary(
    source=Path("tiny.gguf"), tokens=tokens(), types=token_types(), merges=MERGES, pre="smollm", add_bos=False
)
LEGACY = read_sentencepiece(MODEL, legacy=True, add_bos=True)
SPM = load(LEGACY.tokenizer_json())
QWEN = load(tiktoken_json(RANKS.read_bytes(), RANKS))

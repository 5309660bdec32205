"""Write tests/golden/vocabularies: small vocabularies, and what the tokenizers they are made for read.

    pip install sentencepiece protobuf tiktoken transformers gguf llama-cpp-python
    python tools/make_vocabulary_golden.py

`tokenizer.model` is trained by SentencePiece, its runs of spaces given one score as in Llama 2's;
SentencePiece, llama.cpp (the pieces in a GGUF file) and transformers read it. `qwen.tiktoken` has the ranks
of a byte-level BPE that `tokenizers` trained; tiktoken reads it, with Qwen-7B's pattern and special tokens.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import shutil
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import sentencepiece
import tiktoken
import tokenizers
import transformers  # type: ignore[import-not-found]
from make_tokenizer_golden import ALPHABET, TEXTS
from sentencepiece import sentencepiece_model_pb2

PIECES = 900
RANKS = 700
SPACES = (2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11, 1)
"""Runs in the order that Mistral 7B has them; all have the lowest score, there and in Llama 2."""
USER_DEFINED = ("<user_defined>", "[TOOL]")

MORE_TEXTS = (
    "<s>x</s>y",
    "</s> y",
    "a <user_defined> b[TOOL]c  [TOOL]",
    "▁ literal ▁▁ underscores",
    " ",
    "  two",
    *(" " * run + "x" + " " * run for run in range(3, 24, 4)),
    *("=-" * run for run in (3, 9)),
    "[INST] Who are you? [/INST] I am 12345 nobodies.</s><s>[INST] ok [/INST]",
    "\ud55c\uae00 \u1112\u1161\u11ab\u1100\u1173\u11af cafe\u0301 \u212b \u1fbe\u0308\u0301",
)

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""PAT_STR of Qwen-7B's tokenization_qwen.py."""
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))


def main() -> None:
    """Train, read and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("tests/golden/vocabularies"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    chance = random.Random(4)
    drawn = ("".join(chance.choices(ALPHABET, k=chance.randint(1, 24))) for _ in range(80))
    texts = [*TEXTS, *MORE_TEXTS, *drawn]
    model = args.output / "tokenizer.model"
    ranks = args.output / "qwen.tiktoken"
    _train_sentencepiece(model)
    _train_ranks(ranks)
    golden = {
        "made_by": f"sentencepiece {sentencepiece.__version__}, llama-cpp-python {llama_cpp.__version__}, "
        f"transformers {transformers.__version__}, tiktoken {tiktoken.__version__}",
        "texts": texts,
        "sentencepiece": _read_sentencepiece(model, texts),
        "llama.cpp": _read_llama_cpp(model, texts),
        "transformers": _read_transformers(model, texts),
        "tiktoken": _read_tiktoken(ranks, texts),
    }
    (args.output / "golden.json").write_text(
        json.dumps(golden, ensure_ascii=True, separators=(",", ":")) + "\n", encoding="utf-8"
    )


def _train_sentencepiece(path: Path) -> None:
    sentences = [line for text in TEXTS for line in text.splitlines() if line.strip() and "<|" not in line]
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=trained,
        model_type="bpe",
        vocab_size=PIECES,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        user_defined_symbols=list(USER_DEFINED),
        num_threads=1,
        minloglevel=2,
    )
    message = sentencepiece_model_pb2.ModelProto()
    message.ParseFromString(trained.getvalue())
    for piece in [*message.pieces]:
        if set(piece.piece) == {"▁"}:
            message.pieces.remove(piece)
    for run in SPACES:
        message.pieces.add(piece="▁" * run, score=-1e9)
    message.trainer_spec.vocab_size = len(message.pieces)
    path.write_bytes(message.SerializeToString())


def _read_sentencepiece(path: Path, texts: list[str]) -> dict[str, Any]:
    """Ids and what they are decoded to; None for texts with control tokens, which it does not look for, and
    with user-defined ones, after which it puts no space.
    """
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    others = ("<s>", "</s>", "<unk>", *USER_DEFINED)
    ids = [None if any(map(text.__contains__, others)) else model.encode(text) for text in texts]
    return {"ids": ids, "decoded": [None if each is None else model.decode(each) for each in ids]}


def _read_llama_cpp(path: Path, texts: list[str]) -> list[list[int]]:
    message = sentencepiece_model_pb2.ModelProto()
    message.ParseFromString(path.read_bytes())
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "vocabulary.gguf"
        writer = gguf.GGUFWriter(target, "llama")
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([piece.piece for piece in message.pieces])
        writer.add_token_scores([piece.score for piece in message.pieces])
        writer.add_token_types([piece.type for piece in message.pieces])
        for key in ("context_length", "embedding_length", "block_count", "feed_forward_length"):
            writer.add_uint32(f"llama.{key}", 64)
        writer.add_uint32("llama.attention.head_count", 1)
        writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        model = llama_cpp.Llama(str(target), vocab_only=True, verbose=False)
        return [model.tokenize(text.encode(), add_bos=False, special=True) for text in texts]


def _read_transformers(path: Path, texts: list[str]) -> list[list[int]]:
    with tempfile.TemporaryDirectory() as directory:
        shutil.copy(path, directory)
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": False}
        (Path(directory) / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def _train_ranks(path: Path) -> None:
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN_PATTERN), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=RANKS, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([text for text in TEXTS if "<|" not in text], trainer)
    by_id = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    lines = [f"{base64.b64encode(bytes(map(_byte_of, token))).decode()} {rank}\n" for token, rank in by_id]
    path.write_text("".join(lines))


def _byte_of(letter: str) -> int:
    """GPT-2's bytes_to_unicode, inverted."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    if ord(letter) in printable:
        return ord(letter)
    return [byte for byte in range(256) if byte not in printable][ord(letter) - 256]


def _read_tiktoken(path: Path, texts: list[str]) -> list[list[int]]:
    lines = [line.split() for line in path.read_text().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    encoding = tiktoken.Encoding(
        "qwen",
        pat_str=QWEN_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={token: len(ranks) + index for index, token in enumerate(QWEN_SPECIAL)},
    )
    return [encoding.encode(unicodedata.normalize("NFC", text), allowed_special="all") for text in texts]


if __name__ == "__main__":
    main()

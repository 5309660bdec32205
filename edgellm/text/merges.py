"""Merges from ranks: SentencePiece and tiktoken store what each token is worth, `tokenizers` wants pairs.

Both join, again and again, the two neighbours whose concatenation is worth most. A list of all pairs that
make each token, the tokens in the order of their worth, says the same; it is what Hugging Face's converters
write (transformers, convert_slow_tokenizer.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def merges_of(ids: Mapping[str, int], ranked: Iterable[str]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token.

    Args:
        ids: of every token that may be a part. Equal tokens' pairs are in the order of their parts' ids.
        ranked: the tokens to make, the most urgent first.
    """
    merges: list[tuple[str, str]] = []
    for token in ranked:
        pairs = [
            (ids[token[:cut]], ids[token[cut:]], cut)
            for cut in range(1, len(token))
            if token[:cut] in ids and token[cut:] in ids
        ]
        merges += [(token[:cut], token[cut:]) for _, _, cut in sorted(pairs)]
    return merges

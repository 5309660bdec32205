"""What serving takes in the process, whichever executor runs the model; docs/memory.md has where from."""

from __future__ import annotations

from typing import Final

from edgellm.memory.plan import Line, Shape
from edgellm.model.spec import ModelSpec

TOKENIZER_PER_TOKEN: Final = 305
"""`tokenizers`' two maps of the vocabulary, its merges, and our table of their bytes, per token."""
SERVING: Final = 12_000_000
"""The first thousands of requests: allocator arenas that fill, CPython's free lists, libzmq's buffers."""
MESSAGES: Final = 4
"""Of the largest size, on their way at the same time."""
REQUEST: Final = 16 << 10
"""A request on its way: its fields, texts and queues, beside its tokens."""
TOKEN: Final = 200
"""A token of an open answer: Python's int, its piece of text, and its share of the final message."""

TOKEN_ID: Final = 4


def tokenizer_line(spec: ModelSpec) -> Line:
    """The tokenizer's."""
    vocabulary = spec.vocab_size
    return Line(
        "tokenizer",
        vocabulary * TOKENIZER_PER_TOKEN,
        f"vocabulary {number(vocabulary)} × {TOKENIZER_PER_TOKEN} B",
    )


def requests_line(shape: Shape, *, max_queue: int, max_message_bytes: int) -> Line:
    """What comes in with requests."""
    batch, length = shape.max_batch_size, shape.max_seq_len
    return Line(
        "requests",
        SERVING
        + MESSAGES * max_message_bytes
        + (max_queue + batch) * REQUEST
        + length * (max_queue * TOKEN_ID + batch * TOKEN),
        f"{number(SERVING)} B + messages {MESSAGES} × {number(max_message_bytes)} B "
        f"+ (waiting {max_queue} + slots {batch}) × {number(REQUEST)} B "
        f"+ tokens {number(length)} × (waiting {max_queue} × {TOKEN_ID} B + slots {batch} × {TOKEN} B)",
        "serving",
    )


def number(value: int) -> str:
    """As people read it: 1,234,567."""
    return f"{value:,}"

"""llama.cpp behind a pipe, for compare_llamacpp.py: run by the interpreter that has llama-cpp-python.

One JSON map a line in, one out. The first line in is the configuration:
    {"model": path, "threads": n, "sequences": n, "length": tokens of a sequence}
and is answered with {"version": …, "system": …}. Then:
    {"op": "prefill", "tokens": […]}                           → {"seconds": s}
    {"op": "fill", "sequences": n, "tokens": […]}              → {}
    {"op": "decode", "sequences": n, "past": p, "steps": k}    → {"seconds": [each step's]}
    {"op": "logits", "tokens": […], "path": file}              → {}; float32 [tokens, vocab], fed one by one
All but threads and sizes is llama.cpp's default: flash attention `auto`, an f16 cache. A step of all
sequences is one decode call.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from typing import Any

import llama_cpp

BATCH = 512
"""n_batch: tokens of one decode call while prefilling."""
TOKEN = 5
"""What is fed while decoding: it does not change what a step costs."""


class Peer:
    """A model and a context of llama.cpp's low-level interface."""

    def __init__(self, model: str, threads: int, sequences: int, length: int) -> None:
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(model.encode(), model_params)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = sequences * length
        params.n_seq_max = sequences
        params.n_batch = BATCH
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, sequences)
        self._sequences = sequences

    def prefill(self, tokens: list[int], sequence: int = 0) -> float:
        """Feed a prompt into an empty sequence; seconds until its last logits are there."""
        llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        started = time.perf_counter()
        for first in range(0, len(tokens), BATCH):
            piece = tokens[first : first + BATCH]
            last = len(tokens) - 1
            self._decode([(t, first + i, sequence, first + i == last) for i, t in enumerate(piece)])
        return time.perf_counter() - started

    def fill(self, sequences: int, tokens: list[int]) -> None:
        """Feed the same prompt into sequences 0 … n − 1 and empty the others."""
        for sequence in range(self._sequences):
            llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        for sequence in range(sequences):
            self.prefill(tokens, sequence)

    def decode(self, sequences: int, past: int, steps: int) -> list[float]:
        """Advance sequences 0 … n − 1 together, then forget it; seconds of each step."""
        seconds = []
        for step in range(steps):
            started = time.perf_counter()
            self._decode([(TOKEN, past + step, sequence, True) for sequence in range(sequences)])
            seconds.append(time.perf_counter() - started)
        for sequence in range(sequences):
            llama_cpp.llama_memory_seq_rm(self._memory, sequence, past, -1)
        return seconds

    def logits(self, tokens: list[int], path: str) -> None:
        """Feed the tokens one by one and write each one's logits."""
        llama_cpp.llama_memory_seq_rm(self._memory, 0, -1, -1)
        with open(path, "wb") as file:  # noqa: PTH123 - llama-cpp-python's interpreter may be any
            for position, token in enumerate(tokens):
                self._decode([(token, position, 0, True)])
                row = llama_cpp.llama_get_logits_ith(self._context, 0)
                file.write(ctypes.string_at(row, 4 * self._vocab))

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """One call for rows of (token, position, sequence, whether its logits are wanted), waited for."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wanted
        status = llama_cpp.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        llama_cpp.llama_synchronize(self._context)


def main() -> int:
    """Answer until standard input ends."""
    peer: Peer | None = None
    for line in sys.stdin:
        message: dict[str, Any] = json.loads(line)
        op = message.pop("op", None)
        answer: dict[str, Any] = {}
        if peer is None:
            peer = Peer(**message)
            system = llama_cpp.llama_print_system_info().decode()
            answer = {"version": llama_cpp.__version__, "system": system}
        elif op == "prefill":
            answer = {"seconds": peer.prefill(**message)}
        elif op == "fill":
            peer.fill(**message)
        elif op == "decode":
            answer = {"seconds": peer.decode(**message)}
        elif op == "logits":
            peer.logits(**message)
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Checkpoints as TensorRT networks, fed step by step through the interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from network_interpreter import Interpreter
from numpy.typing import NDArray

from edgellm.checkpoint import Checkpoint
from edgellm.enginedir import BuildConfig
from edgellm.model.trt import emit_network
from edgellm.model.trt_network import Compute, TrtNetwork
from edgellm.tensorrt.api import Api, find_api

MAX_SEQ_LEN = 48
SLOTS = 3


def trt_api(*, lengths: bool = True) -> Api:
    """The TensorRT at hand; without lengths as an older one is, whose attention takes a mask."""
    return replace(find_api(), has_lengths=lengths)


def emitted(
    checkpoint: Checkpoint, api: Api, *, compute: Compute = "fp16", max_seq_len: int = MAX_SEQ_LEN
) -> TrtNetwork:
    """The checkpoint's network."""
    build = BuildConfig(
        max_input_len=max_seq_len - 1,
        max_seq_len=max_seq_len,
        max_batch_size=SLOTS,
        max_num_tokens=max_seq_len,
        opt_batch_size=1,
        opt_num_tokens=1,
    )
    trt: Any = api.module
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    net = emit_network(checkpoint, api, network, build, compute=compute, progress=lambda part, done: None)
    net.builder = builder  # type: ignore[attr-defined]  # which must outlive its network
    return net


class InterpretedModel:
    """A network and its caches, poisoned where nothing was written."""

    def __init__(self, net: TrtNetwork, *, rounded: bool = False) -> None:
        self._interpreter = Interpreter(net, rounded=rounded)
        inputs = [net.network.get_input(i) for i in range(net.network.num_inputs)]
        self._lengths = any(tensor.name == "lengths" for tensor in inputs)
        self._caches = {
            tensor.name: np.full((SLOTS, *tuple(tensor.shape)[1:]), np.nan, np.float32)
            for tensor in inputs
            if tensor.name.startswith("past.")
        }
        self.kinds = self._interpreter.kinds

    def step(self, rows: Sequence[tuple[int, int, Sequence[int]]]) -> NDArray[np.float32]:
        """Logits [B, vocab] of the last tokens of rows (slot, past, tokens), all of one length."""
        slots = [slot for slot, _, _ in rows]
        past = np.array([past for _, past, _ in rows])
        tokens = np.array([tokens for _, _, tokens in rows])
        count = tokens.shape[1]
        feeds = {name: cache[slots] for name, cache in self._caches.items()}
        feeds |= {"tokens": tokens, "positions": past[:, None] + np.arange(count), "past": past}
        feeds |= {"last": np.full(len(rows), count - 1)}
        if self._lengths:
            feeds["lengths"] = past + count
        values = self._interpreter.run(feeds)
        for name, cache in self._caches.items():
            cache[slots] = feeds[name]
        logits: NDArray[np.float32] = values["logits"]
        return logits

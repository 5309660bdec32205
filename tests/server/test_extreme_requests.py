"""Whatever numbers the protocol lets through, both samplers can take the request: nothing overflows."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
from fake_engine import DIRECTORY, INFO, MAX_SEQ_LEN, VOCAB_SIZE, ByteTokenizer
from hypothesis import example, given
from hypothesis import strategies as st

from edgellm.executor.sampler import Sampler
from edgellm.kernels.adjust import AdjustmentsShape, adjustments_state
from edgellm.kernels.sample import sampling_state
from edgellm.protocol import Generate, decode_request
from edgellm.server.admission import admit
from edgellm.server.served import ServedModel

MODEL = ServedModel.of(tokenizer=ByteTokenizer(), template=None, directory=DIRECTORY, info=INFO)
MOST = 2**64 - 1
TOKENS = st.integers(0, VOCAB_SIZE - 1)


def between(low: float, high: float, *, exclude_min: bool = False) -> st.SearchStrategy[float]:
    return st.sampled_from([high] if exclude_min else [low, high]) | st.floats(
        low, high, exclude_min=exclude_min
    )


FIELDS = st.fixed_dictionaries(
    {"prompt": st.lists(TOKENS, min_size=1, max_size=8)},
    optional={
        "temperature": between(0, 100),
        "top_k": st.sampled_from([1, VOCAB_SIZE, 2**31, MOST]) | st.integers(0, MOST),
        "top_p": between(0, 1, exclude_min=True),
        "min_p": between(0, 1),
        "repetition_penalty": between(0.01, 100),
        "presence_penalty": between(-100, 100),
        "frequency_penalty": between(-100, 100),
        "logit_bias": st.dictionaries(TOKENS, st.floats(allow_nan=False, allow_infinity=False)),
        "seed": st.integers(0, MOST),
        "min_tokens": st.integers(0, 4),
        "logprobs": st.booleans(),
    },
)
SMALL = 5e-324
LARGE = 1.7e308


@given(FIELDS, st.integers(0, 2**32 - 1))
@example({"prompt": [7], "repetition_penalty": 0.01, "logit_bias": {7: LARGE}, "temperature": SMALL}, 1)
@example({"prompt": [7], "repetition_penalty": 100.0, "logit_bias": {7: -LARGE}, "top_p": SMALL}, 1)
@example({"prompt": [7], "logit_bias": dict.fromkeys(range(VOCAB_SIZE), -LARGE), "min_tokens": 4}, 1)
@example({"prompt": [7], "top_k": MOST}, 1)
def test_what_the_protocol_lets_through_can_be_sampled(fields: dict[str, Any], noise: int) -> None:
    request = decode_request(msgpack.packb({"v": 1, "id": 1, "op": "generate", "max_tokens": 4, **fields}))
    assert isinstance(request, Generate)
    admitted = admit(MODEL, request, default_max_tokens=4)

    sampler = Sampler(1, VOCAB_SIZE, max_seq_len=MAX_SEQ_LEN)
    sampler.bind(0, admitted.sampling, admitted.prompt)
    rng = np.random.default_rng(noise)
    for _ in range(4):
        logits = (rng.standard_normal((1, VOCAB_SIZE)) * 30).astype(np.float32)
        assert 0 <= sampler.sample([0], logits).token[0] < VOCAB_SIZE

    # What the device is told: all of it must be numbers, in float32 too.
    shape = AdjustmentsShape(VOCAB_SIZE, MAX_SEQ_LEN)
    for state in (
        sampling_state(admitted.sampling, adjusting=True),
        adjustments_state(shape, admitted.sampling, admitted.prompt),
    ):
        for name in state.dtype.names or ():
            if state[name].dtype.kind == "f":
                assert np.isfinite(state[name]).all(), name

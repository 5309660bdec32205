"""What KV caches hold: the emitter writes attention for it, the executor allocates it."""

from __future__ import annotations

from typing import Any, Final, Literal

import numpy as np

KvCache = Literal["fp32", "fp16", "int8"]
"""`int8` (CUDA's) has a float16 scale for each token and head beside the numbers."""

KV_DTYPES: Final[dict[KvCache, type[np.number[Any]]]] = {
    "fp32": np.float32,
    "fp16": np.float16,
    "int8": np.int8,
}

"""What the host says of a step before it is launched; `rows.cuh` declares the same layout.

A decode graph reads an array of rows, one for each row of its bucket, a prefill graph one chunk. Both are
four int32, with slot and flags at the same places, so that sampling takes either.
"""

from __future__ import annotations

from typing import Final

import numpy as np

ROW: Final = np.dtype([("slot", "<i4"), ("past", "<i4"), ("token", "<i4"), ("flags", "<i4")])
"""One decode row: `token` goes to position `past` of `slot`. A slot below 0 marks nobody's row, a token below
0 stands for the one sampled last for the slot."""

CHUNK: Final = np.dtype([("slot", "<i4"), ("past", "<i4"), ("count", "<i4"), ("flags", "<i4")])
"""A piece of one slot's prompt: `count` tokens from position `past` on."""

WANTS_TOKEN: Final = 1
"""In `flags` of both: a token is to be sampled."""

"""The inputs of a TensorRT plan, made on a device, against what numpy makes of the same step.

python tools/gpu/feed_checks.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import numpy as np
from runner import Runner, poisoned

from edgellm.cuda.launch import At
from edgellm.kernels.feed import Inputs, feed_chunk, feed_rows
from edgellm.kernels.rows import CHUNK, ROW

INPUTS = Inputs(At("tokens"), At("positions"), At("past"), At("last"), At("lengths"))


def check_rows(runner: Runner, rng: np.random.Generator) -> Iterator[tuple[str, bool]]:
    """Tokens given and sampled last, of slots in any order."""
    for count in (1, 2, 7, 16, 129, 256):
        rows = np.zeros(count, ROW)
        rows["slot"] = rng.permutation(count)
        rows["past"] = rng.integers(0, 40_000, count)
        rows["token"] = rng.integers(-1, 150_000, count)
        rows["token"][rng.integers(count)] = -1
        last = rng.integers(0, 150_000, count).astype("<i4")
        arrays = {
            name: poisoned((count,), "<i4") for name in ("tokens", "positions", "past", "last", "lengths")
        }
        launches = feed_rows(count, rows_at=At("rows"), last_token=At("sampled"), inputs=INPUTS)
        after = runner.run(launches, {**arrays, "rows": rows, "sampled": last})
        expected = {
            "tokens": np.where(rows["token"] < 0, last[rows["slot"]], rows["token"]),
            "positions": rows["past"],
            "past": rows["past"],
            "last": np.zeros(count, np.int32),
            "lengths": rows["past"] + 1,
        }
        good = all(np.array_equal(after[name], values) for name, values in expected.items())
        yield f"{count} rows {'ok' if good else 'FAIL'}", good


def check_chunk(runner: Runner, rng: np.random.Generator) -> Iterator[tuple[str, bool]]:
    """Every token of a piece, and nothing behind it."""
    for count in (1, 2, 127, 128, 129, 1000):
        past = int(rng.integers(0, 40_000))
        chunk = np.zeros(CHUNK.itemsize // 4 + count, "<i4")
        chunk[:4] = (0, past, count, 0)
        chunk[4:] = rng.integers(0, 150_000, count)
        arrays = {name: poisoned((count + 8,), "<i4") for name in ("tokens", "positions")}
        arrays |= {name: poisoned((2,), "<i4") for name in ("past", "last", "lengths")}
        launches = feed_chunk(count, chunk=At("chunk"), inputs=INPUTS)
        after = runner.run(launches, {**arrays, "chunk": chunk})
        expected = {
            "tokens": [*chunk[4:].tolist(), *[-1] * 8],
            "positions": [*range(past, past + count), *[-1] * 8],
            "past": [past, -1],
            "last": [count - 1, -1],
            "lengths": [past + count, -1],
        }
        good = all(after[name].tolist() == values for name, values in expected.items())
        yield f"{count} tokens {'ok' if good else 'FAIL'}", good


def main() -> int:
    """Print a line for each check; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    runner, rng = Runner(), np.random.default_rng(arguments.seed)
    failed = 0
    for check in (check_rows, check_chunk):
        for line, good in check(runner, rng):
            print(line, flush=True)
            failed += not good
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

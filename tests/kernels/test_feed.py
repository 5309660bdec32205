"""The launches that make a plan's inputs: enough threads, and kernels that fit."""

from __future__ import annotations

import pytest
from compiled import DEVICES, assert_fits, compile_for, kernels_of

from edgellm.cuda.launch import At
from edgellm.kernels.feed import Inputs, feed_chunk, feed_rows
from edgellm.kernels.rows import CHUNK

INPUTS = Inputs(At("tokens"), At("positions"), At("past"), At("last"), At("lengths"))


@pytest.mark.parametrize("count", [1, 127, 128, 129, 2048])
def test_every_token_has_a_thread_and_no_block_is_idle(count: int) -> None:
    for launch in (
        *feed_rows(count, rows_at=At("rows"), last_token=At("last_token"), inputs=INPUTS),
        *feed_chunk(count, chunk=At("chunk"), inputs=INPUTS),
    ):
        threads = launch.grid[0] * launch.kernel.threads
        assert count <= threads < count + launch.kernel.threads
        assert launch.grid[1:] == (1, 1)


def test_ids_lie_behind_the_chunk() -> None:
    (launch,) = feed_chunk(5, chunk=At("chunk"), inputs=INPUTS)
    assert launch.arguments[:2] == (At("chunk"), At("chunk", CHUNK.itemsize))


@pytest.mark.parametrize("name", ["a100", "agx orin", "h100"])
def test_kernels_fit(name: str) -> None:
    device = DEVICES[name]
    launches = [
        *feed_rows(4, rows_at=At("rows"), last_token=At("last_token"), inputs=INPUTS),
        *feed_chunk(4, chunk=At("chunk"), inputs=INPUTS),
    ]
    assert_fits(compile_for(kernels_of(launches), device.sm), device)

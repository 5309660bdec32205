"""The CUDA executor's host side on a device that computes in Python: what is sent, fed back, and told.

The device's model gives logits that depend on every token in a slot's cache, so any token that is lost,
doubled, or fed to another slot changes all that follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_device
import numpy as np
import pytest
from device_texts import (
    BY_HOST,
    GREEDY,
    NOTHING,
    PENALISED,
    RANDOM,
    VOCAB,
    Expected,
    bind,
    check_a_row_without_a_choice,
    row,
    run,
)
from fake_device import FakeDevice, logits_of
from fake_driver import Status
from tiny_networks import NETWORKS, SHAPE, build

from edgellm.cuda.driver import Driver
from edgellm.errors import DeviceError, DeviceLost, EngineError, ExecutorFault, TemporaryShortage
from edgellm.executor.base import FEEDBACK, NO_TOKEN, Step, Want
from edgellm.executor.cuda import CudaExecutor
from edgellm.sampling import SamplingParams


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("engine")
    build("llama", "int4", directory)
    return directory


def make(engine: Path, device: FakeDevice, step_limit_s: float = 30.0) -> CudaExecutor:
    return CudaExecutor(
        engine,
        NETWORKS["llama"],
        max_batch_size=SHAPE.max_batch_size,
        max_seq_len=SHAPE.max_seq_len,
        max_num_tokens=SHAPE.max_num_tokens,
        step_limit_s=step_limit_s,
        open_driver=lambda: Driver(api=device),
    )


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice(VOCAB, SHAPE.max_batch_size)


@pytest.fixture
def executor(engine: Path, device: FakeDevice) -> Iterator[CudaExecutor]:
    made = make(engine, device)
    made.load(lambda _what, _done: None)
    device.strict = True
    yield made
    made.close()


@pytest.mark.parametrize(
    "params",
    [
        [GREEDY, RANDOM, GREEDY],
        [RANDOM, BY_HOST, GREEDY],
        [BY_HOST, BY_HOST, BY_HOST],
        [PENALISED, RANDOM, PENALISED],
    ],
)
def test_tokens_are_those_of_the_hosts_sampler(executor: CudaExecutor, params: list[SamplingParams]) -> None:
    expected = bind(executor, params)
    prompts = [[7, 8, 9], list(range(40)), [5]]
    steps = [Step([row(slot, 0, prompt) for slot, prompt in enumerate(prompts)])]
    steps += [Step([row(slot, len(prompts[slot]) + n, FEEDBACK) for slot in (2, 0, 1)]) for n in range(12)]
    for step, result in zip(steps, run(executor, steps), strict=True):
        assert result.token.tolist() == expected.step(list(step.rows))


def test_a_slots_choice_does_not_depend_on_who_makes_it(executor: CudaExecutor) -> None:
    """LOGITS and masks bring in the host for a step; the device then goes on with the right index."""
    expected = bind(executor, [RANDOM, RANDOM])
    mask = np.full((2, -(-VOCAB // 32)), 0x55555555, np.uint32)
    kinds = [Want.LOGITS if n in (1, 4, 5) else Want.TOKEN for n in range(8)]
    steps = [Step([row(0, 0, [1, 2]), row(1, 0, [3])])]
    for n, want in enumerate(kinds):
        rows = [row(0, 2 + n, FEEDBACK, want), row(1, 1 + n, FEEDBACK)]
        steps.append(Step(rows, mask if n in (2, 5) else None))
    results = run(executor, steps)
    for step, result in zip(steps, results, strict=True):
        assert result.token.tolist() == expected.step(list(step.rows), step.mask)
    assert results[2].logits is not None
    assert np.array_equal(results[2].logits[0], logits_of(expected.texts[0][:4], VOCAB))
    assert not results[2].logits[1].any()
    assert results[1].logits is None


def test_the_host_goes_on_with_a_penalised_request_that_it_has_sampled_for(executor: CudaExecutor) -> None:
    expected = bind(executor, [PENALISED, GREEDY])
    steps = [Step([row(0, 0, [1, 2]), row(1, 0, [3])])]
    for n in range(9):
        want = Want.LOGITS if n == 4 else Want.TOKEN
        steps.append(Step([row(0, 2 + n, FEEDBACK, want), row(1, 1 + n, FEEDBACK)]))
    for step, result in zip(steps, run(executor, steps), strict=True):
        assert result.token.tolist() == expected.step(list(step.rows))


def test_a_mask_that_allows_nothing_costs_only_its_row(executor: CudaExecutor) -> None:
    check_a_row_without_a_choice(executor)


def test_what_the_device_finds_nothing_for_costs_only_its_row(
    executor: CudaExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bind(executor, [PENALISED, RANDOM])
    chosen = fake_device._sampled

    def sampled(state: Any, logits: Any, changes: Any, before: list[int]) -> int:
        return NO_TOKEN if changes is not None else chosen(state, logits, changes, before)

    monkeypatch.setattr(fake_device, "_sampled", sampled)
    steps = [Step([row(0, 0, [1, 2]), row(1, 0, [3])]), Step([row(0, 2, FEEDBACK), row(1, 1, FEEDBACK)])]
    for step, result in zip(steps, run(executor, steps), strict=True):
        assert result.token.tolist() == [NO_TOKEN, *expected.step(list(step.rows[1:]))]


def test_log_probabilities_and_alternatives(executor: CudaExecutor) -> None:
    bind(executor, [GREEDY, BY_HOST])
    (result,) = run(executor, [Step([row(0, 0, [1, 2]), row(1, 0, [3])])])
    assert result.top_ids.shape == (2, 2)
    assert result.top_ids[0].tolist() == [-1, -1]
    assert np.isnan(result.logprob[0])
    logits = logits_of([3], VOCAB).astype(np.float64)
    probabilities = logits - np.log(np.exp(logits).sum())
    assert result.top_ids[1].tolist() == np.argsort(-logits)[:2].tolist()
    assert result.logprob[1] == pytest.approx(probabilities[result.token[1]], abs=1e-5)


def test_a_prompt_longer_than_any_graph_comes_in_pieces(executor: CudaExecutor, device: FakeDevice) -> None:
    expected = bind(executor, [GREEDY, GREEDY, GREEDY])
    prompt = [n % 90 for n in range(95)]
    for start, end, want in ((0, 60, Want.NONE), (60, 95, Want.TOKEN)):
        step = [row(1, start, prompt[start:end], want), row(0, 0 if start == 0 else 1, [4])]
        (result,) = run(executor, [Step(step)])
        assert result.token.tolist() == expected.step(step)
    assert device.caches[1] == prompt


def test_a_slot_is_taken_back_and_used_again(executor: CudaExecutor) -> None:
    bind(executor, [GREEDY])
    run(executor, [Step([row(0, 0, [1, 2, 3, 4])]), Step([row(0, 4, FEEDBACK)])])
    executor.bind(0, RANDOM, NOTHING)
    expected = Expected([RANDOM])
    expected.texts[0] = [1, 2, 3, 4]
    step = [row(0, 2, [9, 9])]
    assert run(executor, [Step(step)])[0].token.tolist() == expected.step(step)


def test_a_prefix_is_copied_for_every_layer_in_whole_tiles(
    executor: CudaExecutor, device: FakeDevice
) -> None:
    bind(executor, [GREEDY])
    run(executor, [Step([row(0, 0, [1, 2, 3, 4])])])
    before = len(device.calls)
    executor.copy_prefix(0, 2, 3)
    copies = [call[1][0] for call in device.calls[before:] if call[0] == "cuMemcpy2DAsync"]
    spec = NETWORKS["llama"]
    assert len(copies) == spec.num_hidden_layers
    token = spec.num_key_value_heads * 2 * spec.head_size * 2
    assert len({copy.srcDevice for copy in copies}) == len(copies)
    for copy in copies:
        # 100 tokens, rounded up to whole tiles.
        assert copy.dstDevice - copy.srcDevice == 2 * 112 * token
        assert copy.Height * copy.WidthInBytes == 16 * token


def test_a_step_allocates_and_compiles_nothing(executor: CudaExecutor, device: FakeDevice) -> None:
    bind(executor, [GREEDY, BY_HOST, RANDOM])
    device.calls.clear()
    run(
        executor,
        [Step([row(0, 0, [1] * 20), row(1, 0, [2] * 33), row(2, 0, [3])]), Step([row(0, 20, FEEDBACK)])],
    )
    used = {name for name, _ in device.calls}
    assert used <= {
        "cuMemcpyHtoDAsync",
        "cuMemcpyDtoHAsync",
        "cuGraphLaunch",
        "cuEventRecord",
        "cuEventQuery",
    }


def test_close_gives_all_memory_back(engine: Path, device: FakeDevice) -> None:
    made = make(engine, device)
    report = made.load(lambda _what, _done: None)
    assert len(device.live) == 2  # one allocation on the device, one page-locked
    sizes = sorted(memory._length_ for memory in device.live.values())
    assert sum(sizes) == report.total
    made.close()
    made.close()
    assert not device.live
    created = [name for name, _ in device.calls if name == "cuEventCreate"]
    assert len(created) == len([name for name, _ in device.calls if name == "cuEventDestroy"])


def test_weights_and_rotary_table_arrive_whole(engine: Path, device: FakeDevice) -> None:
    from edgellm.model.weights_file import read_weights_header

    made = make(engine, device)
    made.load(lambda _what, _done: None)
    header = read_weights_header(engine / "weights.safetensors")
    expected = (engine / "weights.safetensors").read_bytes()[header.data :]
    held = [bytes(memory) for memory in device.live.values()]
    assert any(expected in memory for memory in held)
    made.close()


@pytest.mark.parametrize("at", ["cuGraphLaunch", "cuEventQuery", "cuMemcpyHtoDAsync", "cuEventRecord"])
def test_a_lost_device_is_told_and_close_still_ends(
    executor: CudaExecutor, device: FakeDevice, at: str
) -> None:
    bind(executor, [GREEDY])
    device.fails[at] = Status.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(DeviceLost, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        run(executor, [Step([row(0, 0, [1, 2])])])
    device.fails["cuStreamSynchronize"] = Status.CUDA_ERROR_ILLEGAL_ADDRESS
    executor.close()


def test_a_step_that_hangs_is_a_lost_device(engine: Path, device: FakeDevice) -> None:
    executor = make(engine, device, step_limit_s=0.05)
    executor.load(lambda _what, _done: None)
    bind(executor, [GREEDY])
    device.fails["cuEventQuery"] = Status.CUDA_ERROR_NOT_READY
    with pytest.raises(DeviceLost, match="the device hangs"):
        run(executor, [Step([row(0, 0, [1, 2])])])


def test_logits_that_are_no_numbers_name_the_slot(
    executor: CudaExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    bind(executor, [GREEDY, GREEDY])
    monkeypatch.setattr("fake_device.CHOSEN", 2)  # sample.NOT_FINITE
    with pytest.raises(ExecutorFault, match="slot 1 are not finite"):
        run(executor, [Step([row(1, 0, [1, 2])])])


def test_what_keeps_it_from_loading(engine: Path, tmp_path: Path) -> None:
    too_small = FakeDevice(VOCAB, SHAPE.max_batch_size)
    too_small.fails["cuMemAlloc"] = Status.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(TemporaryShortage, match=r"engine\.max_batch_size"):
        make(engine, too_small).load(lambda _what, _done: None)
    with pytest.raises(DeviceError, match="compute capability 7"):
        make(engine, FakeDevice(VOCAB, 3, sm=72)).load(lambda _what, _done: None)
    with pytest.raises(EngineError, match=r"network\.json"):
        make(tmp_path, FakeDevice(VOCAB, 3)).load(lambda _what, _done: None)

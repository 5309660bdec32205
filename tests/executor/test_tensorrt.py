"""The TensorRT executor on a device and a TensorRT that compute in Python: no machine at hand runs a plan."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from device_texts import (
    BY_HOST,
    GREEDY,
    PENALISED,
    RANDOM,
    VOCAB,
    Expected,
    bind,
    check_a_row_without_a_choice,
    row,
    run,
)
from fake_driver import Status
from fake_tensorrt import CONTEXT_BYTES, WEIGHT_BYTES, FakeTensorRt, PlanDevice, plan_bytes, tensors_of
from msgspec import structs
from tiny_networks import NETWORKS
from trt_models import emitted, trt_api

from edgellm.checkpoint.random import RandomCheckpoint
from edgellm.config import EngineConfig as Wanted
from edgellm.cuda.driver import Driver
from edgellm.engine_config import (
    FORMAT_VERSION,
    BuildConfig,
    EdgellmSection,
    EngineConfig,
    FileRecord,
    PlanRecord,
    PretrainedConfig,
)
from edgellm.enginedir import EngineDir
from edgellm.errors import DeviceLost, EngineError, ExecutorFault, TemporaryShortage
from edgellm.executor.base import FEEDBACK, Step, Want
from edgellm.executor.cuda_kernels import write_cubins
from edgellm.executor.factory import make_executor
from edgellm.executor.tensorrt import TensorRtExecutor, decode_runs
from edgellm.executor.tensorrt_launches import kernels_around
from edgellm.memory.footprints import footprint_of
from edgellm.memory.plan import Shape, make_plan
from edgellm.sampling import SamplingParams
from edgellm.server_config import ServerConfig
from edgellm.tensorrt.runtime import RuntimeLog

SPEC = structs.replace(NETWORKS["llama"], num_key_value_heads=3)
BUILD = BuildConfig(
    max_input_len=111,
    max_seq_len=112,
    max_batch_size=3,
    max_num_tokens=64,
    opt_batch_size=3,
    opt_num_tokens=64,
)
SHAPE = Shape(3, 100, 64)
RECORD = PlanRecord(
    library="tensorrt",
    version="10.16.1",
    targets=(87,),
    software=None,
    lengths=True,
    emitted_bytes=6000,
    weight_bytes=WEIGHT_BYTES,
    prefill_bytes=CONTEXT_BYTES[0],
    decode_bytes=CONTEXT_BYTES[1],
    kernels=40,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the kernels around the plan, for Orin."""
    path = tmp_path_factory.mktemp("engine")
    write_cubins(path, kernels_around(VOCAB), 87, lambda _done: None)
    (path / "rank0.engine").write_bytes(plan_bytes(SPEC, BUILD))
    return path


def directory(path: Path, record: PlanRecord | None = RECORD) -> EngineDir:
    size = (path / "rank0.engine").stat().st_size
    section = EdgellmSection(
        format_version=FORMAT_VERSION,
        executor="tensorrt",
        compute="fp16",
        kv_cache="fp16",
        model_name="tiny",
        bos_id=None,
        add_bos=False,
        eos_ids=(0,),
        plan=record,
        files={"rank0.engine": FileRecord(sha256="", bytes=size)},
    )
    pretrained = PretrainedConfig(**structs.asdict(SPEC))
    config = EngineConfig(version="0", pretrained_config=pretrained, build_config=BUILD, edgellm=section)
    return EngineDir(path, config)


@pytest.fixture
def library() -> FakeTensorRt:
    return FakeTensorRt(PlanDevice(VOCAB, SHAPE.max_batch_size))


def make(
    path: Path, library: FakeTensorRt, record: PlanRecord = RECORD, shape: Shape = SHAPE
) -> TensorRtExecutor:
    return TensorRtExecutor(
        directory(path, record),
        shape,
        open_driver=lambda: Driver(api=library.device),
        find_library=library.api,
    )


@pytest.fixture
def executor(path: Path, library: FakeTensorRt) -> Iterator[TensorRtExecutor]:
    made = make(path, library)
    made.load(lambda _what, _done: None)
    library.strict = True
    yield made
    made.close()


@pytest.mark.parametrize(
    "params",
    [[GREEDY, RANDOM, GREEDY], [RANDOM, BY_HOST, GREEDY], [BY_HOST] * 3, [PENALISED, RANDOM, PENALISED]],
)
def test_tokens_are_those_of_the_hosts_sampler(
    executor: TensorRtExecutor, params: list[SamplingParams]
) -> None:
    expected = bind(executor, params)
    prompts = [[7, 8, 9], list(range(40)), [5]]
    steps = [Step([row(slot, 0, prompt) for slot, prompt in enumerate(prompts)])]
    steps += [Step([row(slot, len(prompts[slot]) + n, FEEDBACK) for slot in (2, 0, 1)]) for n in range(12)]
    for step, result in zip(steps, run(executor, steps), strict=True):
        assert result.token.tolist() == expected.step(list(step.rows))


def test_rows_move_together_and_nobody_loses_what_it_holds(executor: TensorRtExecutor) -> None:
    """Any subset of slots decodes, beside prompts: rows change places, while two steps are in flight."""
    chance = np.random.default_rng(11)
    expected = bind(executor, [GREEDY, RANDOM, GREEDY])
    held = [0, 0, 0]
    steps = []
    for _ in range(60):
        rows = []
        for slot in chance.permutation(3)[: chance.integers(1, 4)].tolist():
            count = int(chance.integers(1, 9))
            if held[slot] + count > SHAPE.max_seq_len:
                held[slot] = int(chance.integers(0, 20))  # a prefix is used again
            if held[slot] and chance.random() < 0.6:
                rows.append(row(slot, held[slot], FEEDBACK))
                held[slot] += 1
            else:
                rows.append(row(slot, held[slot], chance.integers(0, VOCAB, count).tolist()))
                held[slot] += count
        steps.append(Step(rows))
    for step, result in zip(steps, run(executor, steps), strict=True):
        assert result.token.tolist() == expected.step(list(step.rows))


def test_masks_and_logits_come_from_the_host(executor: TensorRtExecutor) -> None:
    expected = bind(executor, [RANDOM, RANDOM])
    mask = np.full((2, -(-VOCAB // 32)), 0x55555555, np.uint32)
    steps = [Step([row(0, 0, [1, 2]), row(1, 0, [3])])]
    for n in range(6):
        want = Want.LOGITS if n in (1, 4) else Want.TOKEN
        rows = [row(0, 2 + n, FEEDBACK, want), row(1, 1 + n, FEEDBACK)]
        steps.append(Step(rows, mask if n in (2, 4) else None))
    results = run(executor, steps)
    for step, result in zip(steps, results, strict=True):
        assert result.token.tolist() == expected.step(list(step.rows), step.mask)
    assert results[2].logits is not None


def test_a_mask_that_allows_nothing_costs_only_its_row(executor: TensorRtExecutor) -> None:
    check_a_row_without_a_choice(executor)


def test_a_prompt_longer_than_the_profile_comes_in_pieces(
    executor: TensorRtExecutor, library: FakeTensorRt
) -> None:
    expected = bind(executor, [GREEDY, GREEDY])
    prompt = [n % 90 for n in range(95)]
    library.calls.clear()
    for start, end, want in ((0, 60, Want.NONE), (60, 95, Want.TOKEN)):
        step = [row(1, start, prompt[start:end], want), row(0, 0 if start == 0 else 1, [4])]
        (result,) = run(executor, [Step(step)])
        assert result.token.tolist() == expected.step(step)
    shapes = [arguments[0]["tokens"] for _, name, arguments in library.calls if name == "execute"]
    assert shapes == [(1, 60), (1, 35)]  # exact, and the decode rows are graphs


def test_a_copied_prefix_is_whole(executor: TensorRtExecutor) -> None:
    bind(executor, [GREEDY, GREEDY, GREEDY])
    expected = Expected([GREEDY, GREEDY, GREEDY])
    first = [row(0, 0, [1, 2, 3, 4]), row(1, 0, [9])]
    assert run(executor, [Step(first)])[0].token.tolist() == expected.step(first)
    executor.copy_prefix(0, 2, 3)
    expected.texts[2] = expected.texts[0][:3]
    then = [row(2, 3, [7]), row(1, 1, [8])]
    assert run(executor, [Step(then)])[0].token.tolist() == expected.step(then)


def test_every_tensor_is_bound_once_for_every_run(executor: TensorRtExecutor, library: FakeTensorRt) -> None:
    """Within a run's bindings no name comes twice; that none is missing, and shapes, the stand-in asserts."""
    bind(executor, [GREEDY])
    library.calls.clear()
    run(executor, [Step([row(0, 0, [1, 2, 3])])])
    names = [arguments[0] for _, name, arguments in library.calls if name == "address"]
    assert len(names) == len(set(names))
    inputs, outputs = tensors_of(SPEC, BUILD.max_seq_len)
    assert set(names) == {*inputs, *outputs}
    assert [name for _, name, _ in library.calls][-1] == "execute"


@pytest.mark.tensorrt
@pytest.mark.parametrize("lengths", [True, False], ids=["lengths", "mask"])
def test_the_stand_ins_tensors_are_the_emitted_networks(lengths: bool) -> None:
    net = emitted(RandomCheckpoint(SPEC, "tiny", "int4"), trt_api(lengths=lengths), max_seq_len=112)
    network = net.network
    names = {"int32": net.trt.int32, "float16": net.trt.float16, "float32": net.trt.float32}
    sides = (
        [network.get_input(i) for i in range(network.num_inputs)],
        [network.get_output(i) for i in range(network.num_outputs)],
    )
    for real, said in zip(sides, tensors_of(SPEC, 112, lengths=lengths), strict=True):
        shapes = {tensor.name: (tensor.dtype, list(tensor.shape)) for tensor in real}
        assert shapes == {name: (names[dtype], shape) for name, (dtype, shape) in said.items()}


@pytest.mark.parametrize("rtx", [False, True])
def test_contexts_are_made_before_anything_runs(path: Path, library: FakeTensorRt, rtx: bool) -> None:
    library.rtx = rtx
    record = structs.replace(RECORD, library="tensorrt_rtx") if rtx else RECORD
    made = make(path, library, record)
    report = made.load(lambda _what, _done: None)
    order = [(profile, name) for profile, name, _ in library.calls if name != "address"]
    assert order[:4] == [(0, "profile"), (0, "memory"), (1, "profile"), (1, "memory")]
    memories = {arguments for _, name, arguments in library.calls if name == "memory"}
    assert len(memories) == 1
    # Each number of rows ran before it was captured.
    runs = [call for call in library.calls if call[:2] == (1, "execute")]
    assert [arguments[0]["tokens"][0] for _, _, arguments in runs] == [1, 2, 3, 1, 2, 3]
    assert report.lines["weights"] == WEIGHT_BYTES
    made.close()


def test_decode_steps_are_graphs_and_allocate_nothing(
    executor: TensorRtExecutor, library: FakeTensorRt
) -> None:
    bind(executor, [GREEDY, GREEDY, GREEDY])
    run(executor, [Step([row(slot, 0, [1, 2]) for slot in range(3)])])
    library.device.calls.clear()
    library.calls.clear()
    run(executor, [Step([row(slot, 2 + n, FEEDBACK) for slot in range(3)]) for n in range(5)])
    used = [name for name, _ in library.device.calls]
    assert set(used) <= {
        "cuMemcpyHtoDAsync",
        "cuMemcpyDtoHAsync",
        "cuGraphLaunch",
        "cuEventRecord",
        "cuEventQuery",
    }
    assert used.count("cuGraphLaunch") == 5
    assert library.calls == []


def test_what_cannot_be_captured_runs_without_graphs(path: Path, library: FakeTensorRt) -> None:
    library.capturable = False
    made = make(path, library)
    made.load(lambda _what, _done: None)
    library.strict = True
    expected = bind(made, [GREEDY, RANDOM])
    steps = [Step([row(0, 0, [1, 2]), row(1, 0, [3, 4, 5])])]
    steps += [Step([row(0, 2 + n, FEEDBACK), row(1, 3 + n, FEEDBACK)]) for n in range(4)]
    for step, result in zip(steps, run(made, steps), strict=True):
        assert result.token.tolist() == expected.step(list(step.rows))
    assert not any(name == "cuGraphLaunch" for name, _ in library.device.calls)
    made.close()


def test_slots_beyond_one_run_are_several() -> None:
    runs = list(decode_runs(35))
    assert len(runs) == 35
    assert [run for run in runs if run[0] == 32] == [(32, 1), (32, 2), (32, 3)]
    assert max(count for _, count in runs) == 16


def test_the_memory_plan_says_what_is_allocated(path: Path, library: FakeTensorRt) -> None:
    made = make(path, library)
    report = made.load(lambda _what, _done: None)
    footprint = footprint_of(directory(path), threads=1, server=ServerConfig())
    planned = {line.name: line.bytes for line in make_plan(footprint, SHAPE).lines}
    for name in ("weights", "kv_cache", "activations", "pinned"):
        assert abs(planned[name] - report.lines[name]) < 256, name
    made.close()


def test_close_gives_all_memory_back(path: Path, library: FakeTensorRt) -> None:
    made = make(path, library)
    report = made.load(lambda _what, _done: None)
    assert sum(memory._length_ for memory in library.device.live.values()) == report.total
    made.close()
    made.close()
    assert not library.device.live
    names = [name for name, _ in library.device.calls]
    assert names.count("cuEventCreate") == names.count("cuEventDestroy")
    assert names.count("cuGraphExecDestroy") == SHAPE.max_batch_size


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": "10.16.0"}, r"built by tensorrt 10\.16\.0, here is tensorrt 10\.16\.1"),
        ({"library": "tensorrt_rtx"}, r"built by tensorrt_rtx 10\.16\.1"),
        ({"targets": (86, 89)}, r"compute capability 8\.6, 8\.9, Fake Orin has 8\.7"),
        ({"software": "JetPack 7.2 (L4T 39.0)"}, r"built on JetPack 7\.2 \(L4T 39\.0\), here is none"),
    ],
)
def test_a_plan_of_something_else_is_refused_before_it_is_read(
    path: Path, library: FakeTensorRt, change: dict[str, object], says: str
) -> None:
    library.refuses = "must not be asked"
    made = make(path, library, structs.replace(RECORD, **change))
    with pytest.raises(EngineError, match=says + r".*[Bb]uild the engine again here: edgellm build"):
        made.load(lambda _what, _done: None)
    assert library.calls == []
    assert not library.device.live


def test_what_tensorrt_refuses_is_told(path: Path, library: FakeTensorRt) -> None:
    library.refuses = "serialization version mismatch"
    with pytest.raises(EngineError, match=r"does not load .*serialization version mismatch.*edgellm build"):
        make(path, library).load(lambda _what, _done: None)
    library.refuses, library.aliased = None, False
    with pytest.raises(EngineError, match=r"keeps present\.0\.key apart from past\.0\.key"):
        make(path, library).load(lambda _what, _done: None)
    library.aliased = True
    with pytest.raises(EngineError, match=r"not a plan of this edgellm: it differs in lengths"):
        make(path, library, structs.replace(RECORD, lengths=False)).load(lambda _what, _done: None)
    library.device.fails["cuMemAlloc"] = Status.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(TemporaryShortage, match=r"too little memory free.*weights"):
        make(path, library).load(lambda _what, _done: None)


def test_a_plan_without_lengths_gets_none(path: Path, tmp_path: Path, library: FakeTensorRt) -> None:
    (tmp_path / "rank0.engine").write_bytes(plan_bytes(SPEC, BUILD, lengths=False))
    (tmp_path / "kernels").symlink_to(path / "kernels")
    made = make(tmp_path, library, structs.replace(RECORD, lengths=False))
    made.load(lambda _what, _done: None)
    library.strict = True
    expected = bind(made, [GREEDY])
    steps = [Step([row(0, 0, [1, 2])]), Step([row(0, 2, FEEDBACK)])]
    for step, result in zip(steps, run(made, steps), strict=True):
        assert result.token.tolist() == expected.step(list(step.rows))
    made.close()


def test_memory_asked_for_after_ready_is_refused(executor: TensorRtExecutor, library: FakeTensorRt) -> None:
    bind(executor, [GREEDY])
    library.allocates = 1 << 20
    before = dict(library.device.live)
    with pytest.raises(ExecutorFault, match=r"asked for 1\.0 MiB after READY"):
        run(executor, [Step([row(0, 0, [1, 2])])])
    assert library.device.live == before


def test_what_tensorrt_says_is_passed_on_and_not_kept(caplog: pytest.LogCaptureFixture) -> None:
    said = RuntimeLog()
    for number in range(1000):
        said.add("VERBOSE", f"a run {number}")
        said.add("ERROR", f"bad {number}")
    said.add("WARNING", "the driver is old")
    assert len(said.errors) == 8
    assert vars(said).keys() == {"errors"}
    assert [record.levelname for record in caplog.records].count("ERROR") == 1000
    assert caplog.records[-1].getMessage() == "TensorRT: the driver is old"
    assert "a run" not in caplog.text


@pytest.mark.parametrize(
    ("code", "kind"),
    [("FAILED_EXECUTION", DeviceLost), ("INTERNAL_ERROR", DeviceLost), ("INVALID_ARGUMENT", ExecutorFault)],
)
def test_what_tensorrt_reports_is_a_typed_fault(
    executor: TensorRtExecutor, library: FakeTensorRt, code: str, kind: type[ExecutorFault]
) -> None:
    bind(executor, [GREEDY])
    library.reports = (code, "illegal memory access")
    with pytest.raises(ExecutorFault, match=f"a step failed .{code}: illegal memory access") as raised:
        run(executor, [Step([row(0, 0, [1, 2])])])
    assert type(raised.value) is kind


def test_the_factory_makes_it(path: Path) -> None:
    made = make_executor(directory(path), Wanted(max_batch_size=2))
    assert isinstance(made, TensorRtExecutor)
    assert (made.info.name, made.info.max_batch_size, made.info.pipeline_depth) == ("tensorrt", 2, 2)
    assert made.info.kv_bytes_per_token == 2 * 2 * 3 * 64 * 2
    made.close()

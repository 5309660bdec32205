"""Real plans, built by TensorRT-RTX without a GPU: what the build log says they hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from tiny_llama import TINY, TinyLlama
from trt_models import trt_api

from edgellm.checkpoint import open_checkpoint
from edgellm.checkpoint.random import RandomCheckpoint
from edgellm.checkpoint.random_models import MODELS, model_of
from edgellm.enginedir import BuildConfig
from edgellm.errors import BuildError
from edgellm.tensorrt.build_log import BuildLog, constants_by_type
from edgellm.tensorrt.plan import build_plan, reason_of

pytestmark = pytest.mark.tensorrt

SMALL = TinyLlama(256, 4, 2, 64, 512, tied=False, rotary_base=1e4)


def _config(**changes: Any) -> BuildConfig:
    sizes = {"max_input_len": 127, "max_seq_len": 128, "max_batch_size": 4, "max_num_tokens": 32}
    return BuildConfig(**{**sizes, "opt_batch_size": 1, "opt_num_tokens": 32, **changes})


def _nothing(part: str, done: float) -> None:
    assert 0 <= done <= 1


def test_four_bit_weights_stay_packed_in_the_plan(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(SMALL.write_gguf(tmp_path / "small.gguf", "Q4_1", "Q8_0"))
    plan = build_plan(checkpoint, trt_api(), _config(), targets=[86], progress=_nothing)
    linears = sum(
        w.size for name, w in SMALL.weights().items() if "_proj" in name and not name.endswith("bias")
    )
    elements = constants_by_type(plan.layers)
    # Two profiles see the same constants under names of their own; what is more is the head.
    assert elements["Int4"] >= 2 * linears
    assert elements["Half"] < linears / 4
    assert all(size > 0 for size in plan.activation_bytes)


@pytest.mark.model
def test_the_real_model_is_held_once_and_computes_in_little(smollm2_gguf: Path) -> None:
    config = _config(max_seq_len=1024, max_input_len=1023, max_batch_size=8, max_num_tokens=256)
    plan = build_plan(open_checkpoint(smollm2_gguf), trt_api(), config, targets=[86], progress=_nothing)
    assert plan.warnings == []
    assert plan.weight_bytes <= 1.05 * plan.emitted_bytes
    assert max(plan.activation_bytes) <= 20e6


def test_a_plan_for_several_targets(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(SMALL.write_gguf(tmp_path / "small.gguf", "Q4_0", "Q8_0"))
    plan = build_plan(checkpoint, trt_api(), _config(), targets=[80, 86, 89, 120], progress=_nothing)
    plan.write(tmp_path / "rank0.engine")
    assert (tmp_path / "rank0.engine").stat().st_size == plan.data.nbytes > plan.weight_bytes


@pytest.mark.parametrize("name", ["qwen2, 7/1 heads, tied", "qwen3, untied", "qwen3moe, tied"])
@pytest.mark.parametrize("lengths", [True, False], ids=["lengths", "mask"])
def test_other_families_build(name: str, lengths: bool, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(replace(TINY[name], head_size=64).write_gguf(tmp_path / "tiny.gguf"))
    plan = build_plan(checkpoint, trt_api(lengths=lengths), _config(), targets=[86], progress=_nothing)
    assert {"logits", "present.0.key"} <= {tensor.name for layer in plan.layers for tensor in layer.outputs}


def test_a_target_that_the_library_does_not_know_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(SMALL.write_gguf(tmp_path / "small.gguf", "Q4_0", "Q8_0"))
    with pytest.raises(BuildError, match=r"--sm 87: tensorrt_rtx .* builds for 75, 80, 86"):
        build_plan(checkpoint, trt_api(), _config(), targets=[87], progress=_nothing)


def test_a_cache_beyond_what_kernels_index_is_refused_with_what_would_do() -> None:
    spec = model_of(
        "llama", vocabulary=64, hidden=256, layers=1, heads=(8, 8), head=128, inner=64, context=1 << 20
    )
    build = _config(max_seq_len=1 << 18, max_input_len=1000, max_batch_size=8)
    with pytest.raises(BuildError, match=r"--max-seq-len 262143 or --max-batch-size 7 would do"):
        build_plan(RandomCheckpoint(spec, name="wide", quant="int4"), trt_api(), build, progress=_nothing)


def test_rows_of_caches_are_aligned() -> None:
    spec = RandomCheckpoint(MODELS["qwen2.5-0.5b"], name="odd", quant="int4")
    with pytest.raises(BuildError, match=r"--max-seq-len 33: .*256 bytes; 48 would do"):
        narrow = structs.replace(spec.spec, num_key_value_heads=1, num_attention_heads=7)
        odd = _config(max_seq_len=33, max_input_len=32)
        build_plan(replace(spec, spec=narrow), trt_api(), odd, targets=[86], progress=_nothing)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("[defaultAllocator.cpp::allocate] Cuda failure: out of memory", "memory ran out"),
        ("Requested amount of GPU memory could not be allocated: OutOfMemory", "memory ran out"),
        (
            "no tactics to implement the operation within workspace limit",
            "--builder-memory allows; allow more",
        ),
        ("Cannot compile HW-specific datatypes: int4", "compute capability 8.0"),
        ("something that nobody has seen", "something that nobody has seen"),
    ],
)
def test_known_failures_say_what_helps(message: str, says: str) -> None:
    log = BuildLog()
    log.add("ERROR", message)
    assert says in reason_of(log)


def test_chunks_are_never_longer_than_a_cache(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(SMALL.write_gguf(tmp_path / "small.gguf", "Q4_0", "Q8_0"))
    plan = build_plan(checkpoint, trt_api(), _config(max_num_tokens=512), targets=[86], progress=_nothing)
    assert plan.warnings == []


def test_int4_on_turing_is_refused_with_what_would_work(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(SMALL.write_gguf(tmp_path / "small.gguf", "Q4_0", "Q8_0"))
    with pytest.raises(BuildError, match="no INT4"):
        build_plan(checkpoint, trt_api(), _config(), targets=[75], progress=_nothing)


def test_a_library_that_builds_for_the_device_at_hand_takes_no_target(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(SMALL.write_gguf(tmp_path / "small.gguf", "Q4_0", "Q8_0"))
    with pytest.raises(BuildError, match="leave --sm out"):
        build_plan(
            checkpoint, replace(trt_api(), builds_ahead=False), _config(), targets=[86], progress=_nothing
        )

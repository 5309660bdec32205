"""What is planned for a TensorRT engine before it is built, beside what it takes once it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import TINY, TinyLlama

from edgellm.checkpoint import open_checkpoint
from edgellm.checkpoint.random import RandomCheckpoint, random_checkpoint
from edgellm.checkpoint.random_models import MODELS
from edgellm.cli import main
from edgellm.enginedir import open_engine
from edgellm.errors import BuildError, UsageError
from edgellm.memory.footprints import tensorrt_estimate
from edgellm.memory.plan import Shape
from edgellm.memory.tensorrt_estimate import TensorRtEstimate, emitted_bytes
from edgellm.model.inventory import Matrices, take_inventory
from edgellm.tensorrt.engine_files import plan_record

SIZES = ["--max-batch-size", "2", "--max-seq-len", "256", "--max-num-tokens", "64"]
NETWORKS = {
    "llama, offsets": (TinyLlama(256, 4, 2, 64, 512, tied=True, rotary_base=1e4), "Q4_1"),
    "llama, 8 bits": (TinyLlama(256, 4, 2, 64, 512, tied=False, rotary_base=1e4), "Q8_0"),
    "qwen2": (TinyLlama(256, 4, 1, 64, 768, tied=True, rotary_base=1e4, family="Qwen2"), "Q4_0"),
    "qwen3moe": (replace(TINY["qwen3moe, tied"], head_size=64, inner=64), "Q4_0"),
    "qwen3": (TinyLlama(512, 4, 2, 128, 512, tied=False, rotary_base=1e6, family="Qwen3"), "Q4_1"),
}


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["plan", *arguments, "--json", "--budget", "16GiB"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.tensorrt
@pytest.mark.parametrize("name", NETWORKS)
def test_a_built_engine_takes_what_was_planned(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, quantization = NETWORKS[name]
    checkpoint = str(model.write_gguf(tmp_path / "tiny.gguf", quantization, "Q8_0"))
    engine = str(tmp_path / "engine")
    flags = ["--executor", "tensorrt", "--sm", "86"]
    unbuilt = plan(capsys, checkpoint, *flags, *SIZES)
    assert main(["build", checkpoint, "-o", engine, *flags, *SIZES]) == 0
    built = plan(capsys, engine)
    record = plan_record(open_engine(Path(engine)))
    before, after = ({line["name"]: line["bytes"] for line in each["lines"]} for each in (unbuilt, built))
    assert set(before) == set(after)
    assert before["weights"] == pytest.approx(record.emitted_bytes, rel=0.005, abs=8192)
    assert before["kv_cache"] == after["kv_cache"]
    # An upper bound, but not a wild one; what TensorRT reserves for itself is most of it.
    assert after["activations"] <= before["activations"] <= 1.5 * after["activations"] + (8 << 20)
    assert after["code"] <= before["code"] <= 3 * after["code"]
    same = set(before) - {"weights", "activations", "code", "graphs", "loading"}
    assert {part: before[part] for part in same} == {part: after[part] for part in same}
    sums = [each["on_device"] + each["total"] for each in (unbuilt, built)]
    assert sums[1] <= sums[0] <= 1.05 * sums[1]


def test_smollm2s_figures_are_near_its_plans() -> None:
    """A real build said 132.4 MB of weights, 22.1 MB for a chunk, a plan of 165.1 MB (docs/tensorrt.md)."""
    spec = MODELS["smollm2-135m"]
    linears = ((576, 576, 2), (192, 576, 2), (1536, 576, 2), (576, 1536, 1))
    weights = (
        Matrices(role="embedding", rows=49152, columns=576, bits=8, group=32),
        *(
            Matrices(role="linear", count=30 * n, rows=rows, columns=k, bits=4, group=32, offsets=True)
            for rows, k, n in linears
        ),
        Matrices(role="head", rows=49152, columns=576, bits=8, group=32),
    )
    estimate = TensorRtEstimate(spec, weights, (86,))
    lines = {line.name: line for line in estimate.lines(Shape(8, 1024, 512))}
    assert lines["weights"].bytes == pytest.approx(132.4e6, rel=0.05)
    assert 22.1e6 <= lines["activations"].bytes <= 1.25 * 22.1e6
    assert lines["weights"].bytes + lines["code"].bytes == pytest.approx(165.1e6, rel=0.05)
    assert lines["activations"].formula.startswith("estimated: ")


def test_every_size_takes_more() -> None:
    estimate = tensorrt_estimate(RandomCheckpoint(MODELS["qwen3-8b"], "qwen3-8b", "int4"))
    base = Shape(4, 2048, 256)
    for field, more in (("max_batch_size", 8), ("max_seq_len", 4096), ("max_num_tokens", 512)):
        bigger = Shape(**{**{name: getattr(base, name) for name in base.__slots__}, field: more})
        for few, many in zip(estimate.lines(base), estimate.lines(bigger), strict=True):
            assert few.bytes <= many.bytes, few.name
    targets = tensorrt_estimate(RandomCheckpoint(MODELS["qwen3-8b"], "qwen3-8b", "int4"), sms=(86, 89, 120))
    code = [
        next(line.bytes for line in each.lines(base) if line.name == "code") for each in (estimate, targets)
    ]
    assert code[1] == 3 * code[0]


def test_weights_are_counted_as_they_are_emitted(tmp_path: Path) -> None:
    """By hand: 4 bits with scales, and as many offsets."""
    model = TinyLlama(256, 4, 2, 64, 512, tied=False, rotary_base=1e4)
    checkpoint = open_checkpoint(model.write_gguf(tmp_path / "tiny.gguf", "Q4_1", "Q8_0"))
    tables = 2 * 2 * 128 * 32 * 2
    linears = model.layers * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256)
    vectors = (2 * model.layers + 1) * 256 * 4
    table = model.vocab * 256
    expected = tables + vectors + linears // 2 + 2 * linears // 32 * 2
    # The embedding in 8 bits as they are; the head in 4.
    expected += table + table // 32 * 2 + table // 2 + 2 * table // 32 * 2
    assert emitted_bytes(checkpoint.spec, take_inventory(checkpoint), Shape(1, 128, 32)) == expected


def test_what_tensorrt_has_no_form_for_is_refused() -> None:
    weights = (Matrices(role="linear", rows=64, columns=64, bits=4, group=8),)
    with pytest.raises(BuildError, match="groups of 8; TensorRT multiplies by groups of 16, 32, 64, 128"):
        TensorRtEstimate(MODELS["smollm2-135m"], weights)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-qwen3-moe"])
def test_a_cuda_engine_takes_what_its_checkpoint_was_planned_for(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every line, of every family: the same code says it before and after."""
    from edgellm.memory.cuda import DEVICES
    from edgellm.memory.footprints import cuda_footprint

    engine = str(tmp_path / "engine")
    assert (
        main(["build", "--random", name, "--quant", "int4", "--executor", "cuda", "-o", engine, *SIZES]) == 0
    )
    built = plan(capsys, engine)
    checkpoint = random_checkpoint(name, "int4")
    shape = Shape(**built["shape"])
    unbuilt = cuda_footprint(checkpoint, kv_cache="fp16")
    assert [structs_of(line) for line in unbuilt.lines(shape)] == built["lines"]
    assert unbuilt.devices == DEVICES
    orin = cuda_footprint(checkpoint, kv_cache="fp16", sms=(87,))
    assert {device.multiprocessors for device in orin.devices} == {16, 14, 8, 4}
    assert sum(line.bytes for line in orin.lines(shape)) <= sum(line["bytes"] for line in built["lines"])


def structs_of(line: Any) -> dict[str, Any]:
    """As JSON has it."""
    return {name: getattr(line, name) for name in ("name", "bytes", "formula", "kind")}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--sm", "87"], "--sm: only --executor cuda and tensorrt"),
        (["--executor", "cuda", "--sm", "12"], "--sm 12: kernels can be built ahead for"),
        (["--executor", "tensorrt", "--sm", "orin"], "'orin' is no compute capability"),
        (["--executor", "tensorrt", "--kv-cache", "int8"], "the tensorrt executor has fp16"),
    ],
)
def test_what_makes_no_sense_for_a_device_is_named(
    flags: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = NETWORKS["qwen3"][0].write_gguf(tmp_path / "tiny.gguf")
    assert main(["plan", str(checkpoint), *flags]) == UsageError.exit_code
    assert says in capsys.readouterr().err

"""The inventory and the plan's weights against the tensors that a build wrote, as `onnx` reads them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from gguf import GGMLQuantizationType as Type
from ggufs import HIDDEN, INNER, KV_HEADS, LAYERS, Llama, tokens
from tiny_llama import TINY

from edgellm.checkpoint import open_checkpoint
from edgellm.cli import main
from edgellm.enginedir import EngineDir, open_engine
from edgellm.memory.footprints import footprint_of
from edgellm.memory.plan import Line, Shape, make_plan
from edgellm.model.inventory import Matrices, take_inventory
from edgellm.server_config import ServerConfig

FLOAT = 4


def build(directory: Path, kind: Type, *flags: str) -> EngineDir:
    Llama(linear=kind).write(directory / "tiny.gguf")
    assert main(["build", str(directory / "tiny.gguf"), "-o", str(directory / "engine"), *flags]) == 0
    return open_engine(directory / "engine")


def written(engine: EngineDir, ending: str) -> dict[str, int]:
    """Bytes of each tensor whose name ends so."""
    graph = onnx.load(engine.path / "model.onnx").graph
    return {t.name: len(t.raw_data) for t in graph.initializer if t.name.endswith(ending)}


def lines(engine: EngineDir) -> dict[str, Line]:
    footprint = footprint_of(engine, threads=1, server=ServerConfig())
    return {line.name: line for line in make_plan(footprint, Shape(2, 64, 16)).lines}


@pytest.mark.parametrize(
    ("kind", "bits", "name"),
    [(Type.Q4_0, 4, "4-bit"), (Type.Q4_1, 4, "4-bit with offsets"), (Type.Q8_0, 8, "8-bit")],
)
def test_quantized_weights(kind: Type, bits: int, name: str, tmp_path: Path) -> None:
    engine = build(tmp_path, kind)
    numbers, scales, offsets = (written(engine, ending) for ending in (".weight", ".scale", ".rest"))
    # The head's tensors are the embedding's: ONNX Runtime packs a copy of them.
    in_linears = sum(size for tensor, size in numbers.items() if not tensor.startswith("embedding"))
    groups = sum(size for tensor, size in scales.items() if not tensor.startswith("embedding")) // FLOAT
    assert in_linears * 8 // bits == 32 * groups
    # Panels of 16 rows: the tiny model's linears have 64, 32, 64 and 96, so nothing is added.
    expected = in_linears + 2 * groups * FLOAT + sum(offsets.values())
    found = lines(engine)
    assert bool(offsets) == (kind is Type.Q4_1)
    head = numbers["embedding.weight"] + 2 * scales["embedding.scale"]
    if bits == 8:
        assert found["weights 8-bit"].bytes == expected + head
    else:
        assert found[f"weights {name}"].bytes == expected
        assert found["weights 8-bit"].bytes == head
    assert found["embedding"].bytes == numbers["embedding.weight"] + scales["embedding.scale"]


@pytest.mark.parametrize(
    ("kind", "flags"), [(Type.F16, []), (Type.F32, []), (Type.Q4_1, ["--compute", "fp32"])]
)
def test_dense_weights_are_floats(kind: Type, flags: list[str], tmp_path: Path) -> None:
    engine = build(tmp_path, kind, *flags)
    sizes = written(engine, ".weight")
    found = lines(engine)
    linears = sum(size for name, size in sizes.items() if not name.startswith("embedding"))
    rows = -(-len(tokens()) // 16) * 16
    head = rows * HIDDEN * FLOAT if flags else 0  # otherwise Q8_0, which stays so
    assert found["weights float"].bytes == linears + head
    assert ("weights 8-bit" in found) == (not flags)
    if flags:
        assert found["embedding"].bytes == sizes["embedding.weight"]


@pytest.mark.parametrize("linear", ["Q4_0", "Q4_1"])
def test_experts_and_their_products(linear: str, tmp_path: Path) -> None:
    tiny = replace(TINY["qwen3moe, tied"], inner=64)
    tiny.write_gguf(tmp_path / "tiny.gguf", linear, "Q8_0")
    assert main(["build", str(tmp_path / "tiny.gguf"), "-o", str(tmp_path / "engine")]) == 0
    engine = open_engine(tmp_path / "engine")
    experts = [each for each in engine.config.edgellm.weights if each.role == "expert"]
    assert sum(each.elements for each in experts) == 2 * tiny.experts * 3 * tiny.hidden * tiny.inner
    found = lines(engine)
    stored = sum(
        size for name, size in written(engine, ".weight").items() if name.startswith(("moe", "qkv", "linear"))
    )
    # The router is dense.
    router = 2 * tiny.experts * tiny.hidden * FLOAT
    quantized = sum(
        each.elements for each in engine.config.edgellm.weights if each.role in ("linear", "expert")
    )
    assert stored - router == (quantized - router // FLOAT) // 2
    assert found["weights 4-bit" + (" with offsets" if linear == "Q4_1" else "")].bytes > stored - router
    graph = onnx.load(engine.path / "model.onnx").graph
    products = [
        node
        for node in graph.node
        if node.name.split(":")[1].startswith("moe")
        and node.op_type in ("MatMulNBits", "FusedMatMul")
        and ".router" not in node.name
    ]
    assert f"products {len(products) // 2})" in found["graph"].formula


def test_each_matrix_is_counted_once(tmp_path: Path) -> None:
    Llama().write(tmp_path / "tiny.gguf")
    found = take_inventory(open_checkpoint(tmp_path / "tiny.gguf"))
    assert found == open_engine(build(tmp_path, Type.Q4_1).path).config.edgellm.weights
    linears = {(each.rows, each.columns): each.count for each in found if each.role == "linear"}
    head = HIDDEN // 4
    assert linears == {
        (HIDDEN, HIDDEN): 2 * LAYERS,  # q and o
        (KV_HEADS * head, HIDDEN): 2 * LAYERS,  # k and v
        (INNER, HIDDEN): 2 * LAYERS,  # gate and up
        (HIDDEN, INNER): LAYERS,  # down
    }
    assert [each.role for each in found].count("head") == 1  # tied, and yet a head
    vectors = [each for each in found if each.role == "vector"]
    assert vectors == [Matrices(role="vector", count=2 * LAYERS + 1, rows=HIDDEN, columns=1, bits=32)]


def test_a_separate_head_and_biases(tmp_path: Path) -> None:
    biases = {f"blk.{layer}.attn_q.bias": (HIDDEN,) for layer in range(LAYERS)}
    Llama(
        extra={"output.weight": (len(tokens()), HIDDEN), **biases}
        | {f"blk.{i}.attn_{p}.bias": (KV_HEADS * HIDDEN // 4,) for i in range(LAYERS) for p in "kv"}
    ).write(tmp_path / "tiny.gguf")
    found = take_inventory(open_checkpoint(tmp_path / "tiny.gguf"))
    (head,) = (each for each in found if each.role == "head")
    assert (head.bits, head.rows, head.offsets) == (4, len(tokens()), True)
    assert sum(each.count for each in found if each.role == "vector") == 2 * LAYERS + 1 + 3 * LAYERS

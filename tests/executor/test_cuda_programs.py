"""What the CUDA executor launches, checked without a device: every weight used, no buffer left."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
from compiled import DEVICES, assert_fits, compile_for
from safetensors.numpy import load_file
from tiny_networks import NETWORKS, build, lowering

from edgellm.checkpoint.random import Quant, RandomCheckpoint
from edgellm.cuda.launch import At, Device
from edgellm.errors import BuildError, EngineError
from edgellm.executor.buckets import decode_buckets, prefill_buckets
from edgellm.executor.program import Program, kernels_of
from edgellm.kernels.packing import pack, packed_shape
from edgellm.memory.plan import Shape
from edgellm.model.decoder import Expert, build_decoder
from edgellm.model.kernels import KernelGraph
from edgellm.model.network import LAYOUT_VERSION, Mixture, read_network
from edgellm.model.spec import Mixture as SpecMixture
from edgellm.model.weights_file import PAGE, read_weights_header

KINDS = ("decode", "prefill")
PARTS = ("gate", "up", "down")


def places(program: Program, buffer: str) -> Counter[int]:
    """Offsets in a buffer that launches name, and how often."""
    return Counter(
        argument.offset
        for launch in program.launches
        for argument in launch.arguments
        if isinstance(argument, At) and argument.buffer == buffer
    )


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("quant", ["int4", "int8", "fp16"])
def test_every_tensor_is_read_once_by_every_program(network: str, quant: str, tmp_path: Path) -> None:
    build(network, quant, tmp_path)
    offsets = read_weights_header(tmp_path / "weights.safetensors").offsets
    made = lowering(tmp_path, network)
    for rows in (1, 8):
        assert places(made.decode(rows), "weights") == Counter(offsets.values())
    assert places(made.prefill(64), "weights").keys() == set(offsets.values())


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES.keys())
def test_launches_stay_within_known_buffers(network: str, device: Device, tmp_path: Path) -> None:
    build(network, "int4", tmp_path)
    made = lowering(tmp_path, network, device=device, kv_cache="int8")
    programs = [made.decode(rows) for rows in (1, 2, 4, 8, 16)] + [made.prefill(n) for n in (16, 64)]
    lasting = {buffer.name: buffer.bytes for buffer in made.lasting()}
    for program in programs:
        own = {buffer.name: buffer for buffer in program.buffers}
        assert not own.keys() & lasting.keys()
        for number, launch in enumerate(program.launches):
            assert all(0 < each < 65_536 for each in launch.grid[1:])
            for argument in launch.arguments:
                if not isinstance(argument, At):
                    continue
                size = own[argument.buffer].bytes if argument.buffer in own else lasting[argument.buffer]
                assert 0 <= argument.offset < size, (argument, size)
                if argument.buffer in own:
                    assert own[argument.buffer].first <= number <= own[argument.buffer].last


@pytest.mark.parametrize("network", NETWORKS)
def test_caches_of_layers_do_not_touch(network: str, tmp_path: Path) -> None:
    build(network, "int4", tmp_path)
    for kv_cache in ("fp16", "int8"):
        made = lowering(tmp_path, network, kv_cache=kv_cache)
        size = next(buffer.bytes for buffer in made.lasting() if buffer.name == "kv_cache")
        attention, slots = made.caches.any_attention, 3
        pieces = []
        for layer in range(NETWORKS[network].num_hidden_layers):
            cache = made.caches.of(layer)
            for at, length in (
                (cache.held, attention.cache_bytes(slots)),
                (cache.scales, attention.scale_bytes(slots)),
            ):
                if at is not None:
                    pieces.append((at.offset, at.offset + length))
        pieces.sort()
        assert pieces[0][0] >= 0
        assert pieces[-1][1] <= size
        for (_, end), (begin, _) in pairwise(pieces):
            assert end <= begin


def test_a_chain_of_layers_needs_no_more_than_one(tmp_path: Path) -> None:
    """Values of a layer take the place of those of the one before."""
    for layers in (1, 4):
        (tmp_path / str(layers)).mkdir()
        build("qwen3", "int4", tmp_path / str(layers), layers=layers)
    sizes = {
        layers: lowering(tmp_path / str(layers), "qwen3", layers=layers).decode(8).placement.bytes
        for layers in (1, 4)
    }
    assert sizes[4] == sizes[1]


def test_the_file_is_safetensors_and_holds_what_was_packed(tmp_path: Path) -> None:
    checkpoint = build("qwen2", "int4", tmp_path)
    header = read_weights_header(tmp_path / "weights.safetensors")
    assert header.data % PAGE == 0
    tensors = load_file(tmp_path / "weights.safetensors")
    assert set(tensors) == set(header.offsets)
    assert sum(tensor.nbytes for tensor in tensors.values()) == header.bytes
    down = checkpoint.tensor("layers.1.mlp.down_proj")
    expected = np.concatenate(list(pack([down], packed_shape([down]))))
    assert np.array_equal(tensors["layers.1.down"][: expected.nbytes], expected)
    gain = checkpoint.tensor("norm").dequantize()
    network = read_network(tmp_path / "network.json")
    assert np.array_equal(tensors[network.norm.gain].view(np.float32)[: len(gain)], gain)
    raw = (tmp_path / "weights.safetensors").read_bytes()[header.data :]
    for name, offset in header.offsets.items():
        assert raw[offset : offset + tensors[name].nbytes] == tensors[name].tobytes()


@pytest.mark.parametrize("sm", [87, 90])
@pytest.mark.parametrize("network", ["llama", "qwen3-moe"])
def test_all_kernels_of_a_network_compile_and_fit(network: str, sm: int, tmp_path: Path) -> None:
    build(network, "int4", tmp_path)
    device = next(each for each in DEVICES.values() if each.sm == sm)
    made = lowering(tmp_path, network, device=device)
    assert_fits(compile_for(kernels_of([made.decode(1), made.prefill(16)]), sm), device)


def test_buckets_hold_what_a_step_can_have() -> None:
    assert decode_buckets(1) == (1,)
    assert decode_buckets(5) == (1, 2, 4, 8)
    assert decode_buckets(16) == decode_buckets(200) == (1, 2, 4, 8, 16)
    assert prefill_buckets(Shape(1, 2048, 1024))[-1] == 1024
    assert prefill_buckets(Shape(4, 2048, 1000))[-1] == 1024
    assert prefill_buckets(Shape(4, 100, 1000))[-1] == 128
    assert prefill_buckets(Shape(1, 8192, 8192))[-1] == 2048
    assert prefill_buckets(Shape(1, 2, 1)) == (16,)


def test_another_layout_and_damage_are_refused_with_what_to_do(tmp_path: Path) -> None:
    build("llama", "int4", tmp_path)
    path = tmp_path / "network.json"
    raw = path.read_text()
    path.write_text(raw.replace(f'"layout":{LAYOUT_VERSION}', '"layout":99'))
    with pytest.raises(EngineError, match=r"layout 99, this edgellm reads 1; build the engine again"):
        read_network(path)
    path.write_text(raw[:-20])
    with pytest.raises(EngineError, match=r"network.json is damaged"):
        read_network(path)
    path.unlink()
    with pytest.raises(EngineError, match=r"cannot read .*network.json"):
        read_network(path)
    weights = tmp_path / "weights.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:100], b"", whole[:8] + b"x" + whole[9:], (1 << 40).to_bytes(8, "little")):
        weights.write_bytes(damaged)
        with pytest.raises(EngineError, match=r"weights.safetensors is (cut off|damaged)"):
            read_weights_header(weights)


def test_experts_lie_one_behind_the_other_and_are_packed_alike(tmp_path: Path) -> None:
    checkpoint = build("qwen3-moe", "int4", tmp_path)
    tensors = load_file(tmp_path / "weights.safetensors")
    mixture = read_network(tmp_path / "network.json").layers[1].mlp
    assert isinstance(mixture, Mixture) and (mixture.top_k, mixture.normalize) == (2, True)
    for linear, parts, swiglu in ((mixture.gate_up, ("gate", "up"), True), (mixture.down, ("down",), False)):
        held = tensors[linear.weights]
        for expert in range(6):
            weights = [checkpoint.tensor(f"layers.1.mlp.experts.{expert}.{part}_proj") for part in parts]
            assert packed_shape(weights, swiglu=swiglu) == linear.shape
            expected = np.concatenate(list(pack(weights, linear.shape)))
            assert np.array_equal(held[expert * len(expected) :][: len(expected)], expected)


def test_experts_of_different_kinds_take_the_form_that_holds_all() -> None:
    """One of 8 bits, in smaller groups than the others' 4: exactly, both."""

    def expert(number: int, quant: Quant) -> Expert:
        spec = NETWORKS["qwen3-moe"]
        there = RandomCheckpoint(spec, "tiny", quant, number)
        return Expert(*(there.tensor(f"layers.0.mlp.experts.{number}.{part}_proj") for part in PARTS))

    experts = [expert(0, "int4"), expert(1, "int8"), expert(2, "int4")]
    graph = KernelGraph()
    made = graph._experts("experts", [[each.gate, each.up] for each in experts], swiglu=True)
    assert (made.shape.n, made.shape.bits, made.shape.swiglu) == (128, 8, True)
    (entry,) = graph.entries
    packed = np.concatenate(list(entry.pieces()))
    assert len(packed) == entry.bytes == 3 * made.shape.nbytes


@pytest.mark.parametrize(("experts", "top_k"), [(513, 8), (64, 33)])
def test_a_mixture_beyond_the_kernels_is_refused_by_name(experts: int, top_k: int) -> None:
    spec = msgspec.structs.replace(
        NETWORKS["qwen3-moe"], moe=SpecMixture(num_experts=experts, top_k=top_k), num_hidden_layers=1
    )
    checkpoint = RandomCheckpoint(spec, "wide", "fp16")
    message = rf"layers\.0\.mlp\.gate has {experts} experts, {top_k} for a token; .* --executor cpu"
    with pytest.raises(BuildError, match=message):
        build_decoder(KernelGraph(), checkpoint)

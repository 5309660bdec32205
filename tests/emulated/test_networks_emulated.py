"""Whole networks of every family through the CUDA executor on an emulated device, beside float32 numpy.

As tools/gpu_check.py does on a GPU: token by token, whole prompts, in chunks behind others, ragged batches,
copied prefixes, tokens fed back on the device, all from captured graphs.
"""

from __future__ import annotations

import network_checks
import numpy as np
import pytest
import step_checks
from emulator.compile import EmulatedCompiler
from emulator.driver import HOPPER, ORIN, EmulatedDriver

from edgellm.checkpoint.random import Quant, RandomCheckpoint
from edgellm.checkpoint.random_models import TINY
from edgellm.cuda.driver import Driver
from edgellm.cuda.launch import Device
from edgellm.executor import cuda_kernels
from edgellm.kernels.attention_shape import CacheKind
from edgellm.memory.plan import Shape

pytestmark = pytest.mark.emulated


@pytest.fixture(autouse=True)
def _emulated_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernels, "Compiler", EmulatedCompiler)


@pytest.mark.parametrize(
    ("name", "quant", "kv_cache", "device", "seed"),
    [
        ("tiny-llama", "int8", "int8", HOPPER, 0),
        ("tiny-qwen2", "int4", "fp16", ORIN, 1),
        ("tiny-qwen3", "fp16", "int8", ORIN, 0),
        ("tiny-qwen3-moe", "int4", "fp16", HOPPER, 1),
    ],
)
def test_networks_compute_what_float32_does(
    name: str, quant: Quant, kv_cache: CacheKind, device: Device, seed: int
) -> None:
    checkpoint = RandomCheckpoint(TINY[name], name, quant, 5, 2.0)
    api = EmulatedDriver(device, seed=seed, copies="either" if seed else "late")
    cases = network_checks.prove_network(
        checkpoint,
        kv_cache,
        np.random.default_rng(3),
        shape=Shape(max_batch_size=3, max_seq_len=48, max_num_tokens=32),
        length=40,
        open_driver=lambda: Driver(api=api),
    )
    most = network_checks.most_kl(checkpoint.spec, kv_cache)
    found = {case.name: case.mean_kl for case in cases}
    assert len(found) >= 8
    assert all(kl <= most for kl in found.values()), found
    api.check_red_zones()


@pytest.mark.parametrize("device", [HOPPER, ORIN], ids=["sm_90", "sm_87"])
def test_tokens_are_sampled_on_the_device_and_fed_back(device: Device) -> None:
    said: list[str] = []
    good = step_checks.check_sampling(
        7,
        said.append,
        spec=TINY["tiny-llama"],
        tokens=14,
        open_driver=lambda: Driver(api=EmulatedDriver(device, seed=2)),
    )
    assert good, "\n".join(said)

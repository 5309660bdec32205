"""The emulated machine itself: it computes as CUDA does, and sees what kernels may not do."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulator.compile import EmulatedCompiler
from emulator.driver import HOPPER, ORIN, EmulatedDriver, EmulationError
from numpy.typing import NDArray
from runner import Runner, poisoned

from edgellm.cuda.driver import Driver
from edgellm.cuda.launch import Argument, At, Device, Kernel, Launch
from edgellm.cuda.nvrtc import SOURCES

pytestmark = pytest.mark.emulated

KERNELS = """
#include "common.cuh"

template <int N> __global__ void __launch_bounds__(N)
    add(int count, float factor, const float* x, float* out) {
  __shared__ float sums[N / 32];
  const int i = blockIdx.x * N + threadIdx.x;
  const float sum = warp_sum(i < count ? x[i] : 0.f);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  float all = 0.f;
  for (int w = 0; w < N / 32; w++) all += sums[w];
  if (threadIdx.x == 0) out[blockIdx.x] = all * factor;
}

// Everything about halves: out[i] = the half of x[i]; back[i] = the float of bits i.
template <int N> __global__ void halves(const float* x, u16* out, float* back) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = round_to_half(x[i]);
  back[i] = half_to_float(u16(i));
}

// c = a · b + c of 16 × 16 and 16 × 8 halves, a and b by way of ldmatrix.
template <int N> __global__ void product(const u16* a, const u16* b, float* c) {
  __shared__ __align__(16) u16 left[16][16], right[16][8];
  const int lane = threadIdx.x, g = lane >> 2, t = lane & 3;
  for (int i = lane; i < 32; i += 32) copy_async(&left[i / 2][i % 2 * 8], a + i * 8);
  if (lane < 16) copy_async(right[lane], b + lane * 8);
  copy_async_commit();
  copy_async_wait<0>();
  __syncwarp();
  u32 x[4], y[4];
  load_matrices(x, &left[lane % 16][lane / 16 * 8]);
  load_matrices_transposed(y, right[lane % 16]);
  float sum[4];
  for (int i = 0; i < 4; i++) sum[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  mma(sum, x[0], x[1], x[2], x[3], transpose_matrix(transpose_matrix(y[0])), y[1]);
  for (int i = 0; i < 4; i++) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

// What a kernel may do wrong.
template <int WRONG> __global__ void __launch_bounds__(64) wrong(const float* x, float* out) {
  DYNAMIC_SHARED(shared);
  __shared__ float one[64];
  __shared__ u32 count;
  float* const many = (float*)shared;
  const int i = threadIdx.x;
  if (WRONG != 15) wait_for_previous();
  if (WRONG == 0) {
    one[i] = x[i];
    out[i] = one[63 - i];
  } else if (WRONG == 1) {
    many[i] = x[i];
    out[i] = many[i ^ 1];
  } else if (WRONG == 2) {
    if (i < 33) __syncthreads();
    else __syncwarp();
  } else if (WRONG == 3) {
    out[i] = load_l2(x + i + 1);
  } else if (WRONG == 4) {
    out[i + 1] = x[i];
  } else if (WRONG == 5) {
    many[i + 1] = x[i];
  } else if (WRONG == 6) {
    const float4 four = *(const float4*)(x + 1);
    out[i] = four.x + four.w;
  } else if (WRONG == 7) {
    if (i < 16) copy_async(many + i * 4, x + i * 4);
    copy_async_commit();
    __syncthreads();
    out[i] = many[i];
  } else if (WRONG == 8) {
    if (i < 16) copy_async(many + i * 4, x + i * 4);
    copy_async_commit();
    copy_async_wait<0>();
    out[i] = many[i];
  } else if (WRONG == 9) {
    if (i % 2) return;
    out[i] = __shfl_xor_sync(FULL_WARP, x[i], 1);
  } else if (WRONG == 10) {
    if (i % 32 < 16) out[i] = __shfl_xor_sync(FULL_WARP, x[i], 1);
    else __syncwarp();
  } else if (WRONG == 11) {
    copy_async(shared + 8, x + i);
  } else if (WRONG == 12) {
    one[i] = x[i];
    __syncthreads();
    const float there = one[63 - i];
    one[i] = there;
    out[i] = there;
  } else if (WRONG == 13) {
    if (i == 0) count = 0;
    __syncthreads();
    count++;
    __syncthreads();
    out[i] = count;
  } else if (WRONG == 14) {
    named_barrier<64>(i < 32 ? 1 : 2);
  } else if (WRONG == 15) {
    out[i] = x[i];
  } else if (WRONG == 16) {
    ((float*)x)[i] = 0.f;
    out[i] = 1.f / x[i + 10000];
  }
}

// What looks wrong, and is not.
template <int N> __global__ void __launch_bounds__(64) right(const float* x, float* out) {
  DYNAMIC_SHARED(shared);
  __shared__ u32 count;
  __shared__ bool found;
  float* const many = (float*)shared;
  const int i = threadIdx.x, warp = i / 32;
  if (i == 0) count = 0, found = false;
  __syncthreads();
  atomicAdd(&count, 1u);
  if (i % 3 == 0) found = true;
  many[i] = x[i];
  named_barrier<32>(1 + warp);
  float sum = many[i ^ 1];
  many[64 + i] = sum;
  __syncwarp();
  sum += many[64 + (i ^ 2)];
  __syncthreads();
  out[i] = sum + count + found;
  if (warp == 0) return;
  __syncthreads();  // of those that are left
}

// Blocks leave parts of a sum; whoever comes last adds them up. WRONG leaves out a barrier, or the counter.
template <int WRONG> __global__ void __launch_bounds__(64)
    join(const float* x, float* parts, int* counter, float* out) {
  __shared__ bool last;
  const int i = threadIdx.x;
  parts[blockIdx.x * 64 + i] = x[blockIdx.x * 64 + i];
  if (WRONG != 1) __syncthreads();
  if (i == 0) {
    __threadfence();
    if (WRONG != 2) last = atomicAdd(counter, 1) == int(gridDim.x) - 1;
    else last = blockIdx.x == gridDim.x - 1;
    if (last) *counter = 0;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  float sum = 0.f;
  for (int block = 0; block < int(gridDim.x); block++) sum += load_l2(parts + block * 64 + (i ^ 1));
  out[i] = sum;
}

// Blocks write side by side, or all the same place.
template <int WRONG> __global__ void __launch_bounds__(32) beside(u16* out) {
  out[(WRONG ? 0 : blockIdx.x * 32) + threadIdx.x] = u16(blockIdx.x);
}

// Blocks count where, with WRONG, block 0 leaves something else.
template <int WRONG> __global__ void __launch_bounds__(32) count_among(float* parts) {
  if (WRONG && blockIdx.x == 0 && threadIdx.x < 2) parts[threadIdx.x] = 1.f;
  if (threadIdx.x == 0) atomicAdd((u32*)parts + blockIdx.x, 1u), atomicAdd((u32*)parts + 1, 1u);
}

template <int N> __global__ void __launch_bounds__(32) first(float* y) { y[threadIdx.x] = 1.f; }

// Waits too late, or, with N 1, in time.
template <int N> __global__ void __launch_bounds__(32) second(const float* x, const float* y, float* out) {
  launch_dependents();
  float sum = x[threadIdx.x];
  if (N == 0) sum += y[threadIdx.x];
  if (N == 2 && blockIdx.x == 1) return;
  wait_for_previous();
  if (N != 0) sum += y[threadIdx.x];
  out[blockIdx.x * 32 + threadIdx.x] = sum;
}

#if __CUDA_ARCH__ >= 900
// Neighbours exchange x by way of shared memory.
template <int WRONG, int BLOCKS> __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(32)
    neighbours(const float* x, float* out) {
  __shared__ float mine[32], theirs[32];
  const int i = threadIdx.x, rank = blockIdx.x % BLOCKS;
  mine[i] = x[blockIdx.x * 32 + i];
  theirs[i] = 0.f;
  if (WRONG != 1) cluster_barrier();
  if (WRONG == 2 && rank == 1) return;
  store_cluster(cluster_address(shared_address(theirs + i), (rank + 1) % BLOCKS), mine[i]);
  cluster_barrier();
  const float left = load_cluster(cluster_address(shared_address(mine + i), (rank + BLOCKS - 1) % BLOCKS));
  out[blockIdx.x * 32 + i] = theirs[i] + left;
  if (WRONG != 3) cluster_barrier();
}

// Whoever has arrived may leave; block 0 has the sum of what all brought.
template <int BLOCKS> __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(64)
    gather(const float* x, float* out) {
  DYNAMIC_SHARED(shared);
  float* const brought = (float*)shared;
  const int i = threadIdx.x;
  cluster_barrier();
  const u32 here = shared_address(brought + blockIdx.x % BLOCKS * 64 + i);
  store_cluster(cluster_address(here, 0), x[blockIdx.x * 64 + i]);
  cluster_arrive();
  if (blockIdx.x % BLOCKS) return;
  cluster_wait();
  float sum = 0.f;
  for (int block = 0; block < BLOCKS; block++) sum += brought[block * 64 + (i + 1) % 64];
  out[blockIdx.x / BLOCKS * 64 + i] = sum;
}
#endif
"""

Array = NDArray[Any]


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> EmulatedCompiler:
    sources = tmp_path_factory.mktemp("kernels")
    for name in ("common.cuh", "ptx.cuh"):
        shutil.copy(SOURCES / name, sources)
    (sources / "probes.cu").write_text(KERNELS)
    return EmulatedCompiler(sources)


def probe(
    expression: str, *arguments: Argument, threads: int = 32, blocks: int = 1, shared: int = 0
) -> Launch:
    return Launch(Kernel("probes.cu", expression, threads, shared), (blocks, 1, 1), arguments)


def run(
    compiler: EmulatedCompiler,
    launches: list[Launch],
    arrays: dict[str, Array],
    *,
    device: Device = HOPPER,
    seed: int = 0,
    copies: str = "late",
    early: bool = False,
) -> dict[str, Any]:
    runner = Runner(Driver(api=EmulatedDriver(device, seed=seed, copies=copies)), compiler)
    return runner.run(launches, arrays, early=early)


ORDERS = pytest.mark.parametrize("seed", [0, 1, 2])


@ORDERS
def test_blocks_warps_and_arguments(compiler: EmulatedCompiler, seed: int) -> None:
    x = np.arange(200, dtype=np.float32)
    launch = probe("add<128>", 200, 0.5, At("x"), At("out"), threads=128, blocks=2)
    got = run(compiler, [launch], {"x": x, "out": poisoned((2,), np.float32)}, seed=seed)
    assert got["out"].tolist() == [x[:128].sum() / 2, x[128:].sum() / 2]


def test_halves_round_as_numpy_rounds_them(compiler: EmulatedCompiler) -> None:
    rng = np.random.default_rng(0)
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    # Each half, what lies between it and its neighbour, and either side of that.
    with np.errstate(invalid="ignore", over="ignore"):
        wide = every.astype(np.float32)
        middle = (wide + np.roll(wide, -1)) / 2
        cases = [wide, middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(9e9))]
        cases.append(rng.integers(0, 1 << 32, 1 << 16, np.uint32).view(np.float32))
        cases.append(np.resize(np.array([65504, 65519.99, 65520, 1e9, np.inf, 2**-25, 2**-24]), 1 << 16))
        for case in cases:
            x = case.astype(np.float32)
            arrays = {"x": x, "out": np.zeros(1 << 16, np.uint16), "back": np.zeros(1 << 16, np.float32)}
            launch = probe("halves<0>", At("x"), At("out"), At("back"), threads=1024, blocks=64)
            got = run(compiler, [launch], arrays)
            np.testing.assert_array_equal(got["out"].view(np.float16), x.astype(np.float16))
            np.testing.assert_array_equal(got["back"], wide)


@ORDERS
@pytest.mark.parametrize("copies", ["late", "at once", "either"])
def test_a_product_of_matrices(compiler: EmulatedCompiler, seed: int, copies: str) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((16, 16)).astype(np.float16), rng.standard_normal((16, 8)).astype(np.float16)
    c = rng.standard_normal((16, 8)).astype(np.float32)
    launch = probe("product<0>", At("a"), At("b"), At("c"))
    got = run(compiler, [launch], {"a": a, "b": b, "c": c}, seed=seed, copies=copies)
    np.testing.assert_allclose(got["c"], a.astype(float) @ b.astype(float) + c, rtol=1e-6, atol=1e-6)


WRONG = {
    "shared memory without __syncthreads": (0, "without a barrier since"),
    "shared memory without __syncwarp": (1, "without a barrier since"),
    "a barrier that not all reach": (2, "31 threads in __syncwarp"),
    "load_l2 beyond an allocation": (3, "reads 4 bytes at 256 of an allocation of 256"),
    "a store beyond an allocation": (4, "writes 4 bytes at 256 of an allocation of 256"),
    "a store beyond dynamic shared memory": (5, "of 256 of dynamic shared memory"),
    "a misaligned vector": (6, "no multiple of 16"),
    "a copy that nobody waits for": (7, "under way"),
    "a copy by others without a barrier": (8, "without a barrier since"),
    "a shuffle with lanes that have left": (9, "left|gone|leaves"),
    "lanes of a warp that call different things": (10, "__shfl_xor_sync"),
    "a misaligned copy": (11, "no multiple of 16"),
    "a write that others may not have read yet": (12, "without a barrier since thread"),
    "a counter without an atomic": (13, "without a barrier"),
    "two halves that wait for each other": (14, "64 threads in a named barrier"),
    "an address that is none": (16, "where there is no allocation|of an allocation"),
}


@pytest.mark.parametrize(("number", "message"), WRONG.values(), ids=WRONG)
def test_what_a_kernel_does_wrong_is_told(compiler: EmulatedCompiler, number: int, message: str) -> None:
    x = np.arange(64, dtype=np.float32)
    launch = probe(f"wrong<{number}>", At("x"), At("out"), threads=64, shared=256)
    with pytest.raises(EmulationError, match=message):
        run(compiler, [launch], {"x": x, "out": poisoned((64,), np.float32)})


def test_the_message_names_kernel_place_and_line(compiler: EmulatedCompiler) -> None:
    x = np.zeros(64, np.float32)
    launch = probe("wrong<4>", At("x"), At("out"), threads=64, shared=256)
    line = KERNELS[: KERNELS.index("out[i + 1] = x[i]")].count("\n") + 1
    with pytest.raises(
        EmulationError, match=rf"^wrong<4>: block \(0, 0, 0\), thread 63: .*probes.cu:{line}\b"
    ):
        run(compiler, [launch], {"x": x, "out": x})


@ORDERS
@pytest.mark.parametrize("device", [HOPPER, ORIN], ids=["sm_90", "sm_87"])
def test_what_looks_wrong_and_is_not(compiler: EmulatedCompiler, device: Device, seed: int) -> None:
    x = np.arange(64, dtype=np.float32)
    launch = probe("right<0>", At("x"), At("out"), threads=64, shared=512)
    got = run(compiler, [launch], {"x": x, "out": x}, device=device, seed=seed)
    swapped = x[np.arange(64) ^ 1]
    assert np.array_equal(got["out"], swapped + swapped[np.arange(64) ^ 2] + 65)


@ORDERS
def test_blocks_join_by_a_counter(compiler: EmulatedCompiler, seed: int) -> None:
    x = np.arange(5 * 64, dtype=np.float32)
    arrays = {"x": x, "parts": poisoned((320,), np.float32), "counter": np.zeros(1, np.int32), "out": x[:64]}
    arguments = (At("x"), At("parts"), At("counter"), At("out"))
    got = run(compiler, [probe("join<0>", *arguments, threads=64, blocks=5)] * 2, arrays, seed=seed)
    assert np.array_equal(got["out"], x.reshape(5, 64).sum(0)[np.arange(64) ^ 1])
    # Without a counter the last block must not be the first to run: only what was written before is seen.
    for number, order in ((1, seed), (2, 0)):
        launch = probe(f"join<{number}>", *arguments, threads=64, blocks=5)
        with pytest.raises(EmulationError, match="of the same launch wrote, without an atomic and barriers"):
            run(compiler, [launch], arrays, seed=order)


def test_blocks_do_not_write_the_same_place(compiler: EmulatedCompiler) -> None:
    out = np.zeros(96, np.uint16)
    got = run(compiler, [probe("beside<0>", At("out"), blocks=3)], {"out": out})
    assert np.array_equal(got["out"], np.repeat(np.arange(3), 32))
    with pytest.raises(EmulationError, match=r"writes what thread 0 of block [01] of the same launch wrote"):
        run(compiler, [probe("beside<1>", At("out"), blocks=3)], {"out": out})


@ORDERS
def test_counters_do_not_lie_among_what_others_write(compiler: EmulatedCompiler, seed: int) -> None:
    parts = np.zeros(3, np.uint32)
    got = run(compiler, [probe("count_among<0>", At("parts"), blocks=3)], {"parts": parts}, seed=seed)
    assert got["parts"].tolist() == [1, 4, 1]
    message = r"writes what thread \d (of block \d of the same launch wrote|wrote .* without a barrier since)"
    with pytest.raises(EmulationError, match=message):
        run(compiler, [probe("count_among<1>", At("parts"), blocks=3)], {"parts": parts}, seed=seed)


def test_early_kernels_wait_for_what_they_read(compiler: EmulatedCompiler) -> None:
    x = np.arange(32, dtype=np.float32)
    arrays = {"x": x, "y": poisoned((32,), np.float32), "out": poisoned((64,), np.float32)}

    def chain(number: int) -> list[Launch]:
        return [
            probe("first<0>", At("y")),
            probe(f"second<{number}>", At("x"), At("y"), At("out"), blocks=2),
        ]

    with pytest.raises(
        EmulationError, match=r"first.*writes to the device's memory before wait_for_previous"
    ):
        run(compiler, chain(1), arrays, early=True)
    late = [Launch(chain(0)[0].kernel, (1, 1, 1), (At("y"),), early=False)]
    got = run(compiler, late + chain(1)[1:], arrays, early=True)
    assert np.array_equal(got["out"].reshape(2, 32), np.stack([x + 1] * 2))
    with pytest.raises(EmulationError, match="reads, before wait_for_previous, what the launch 1 in front"):
        run(compiler, late + chain(0)[1:], arrays, early=True)
    with pytest.raises(EmulationError, match=r"block \(1, 0, 0\) never called wait_for_previous"):
        run(compiler, late + chain(2)[1:], arrays, early=True)


@ORDERS
def test_clusters_exchange(compiler: EmulatedCompiler, seed: int) -> None:
    x = np.arange(8 * 32, dtype=np.float32)
    launch = probe("neighbours<0, 4>", At("x"), At("out"), blocks=8)
    got = run(compiler, [launch], {"x": x, "out": poisoned((256,), np.float32)}, seed=seed)
    rings = x.reshape(2, 4, 32)
    assert np.array_equal(got["out"].reshape(2, 4, 32), 2 * np.roll(rings, 1, axis=1))


@pytest.mark.parametrize("seed", range(8))
def test_a_clusters_blocks_leave_early(compiler: EmulatedCompiler, seed: int) -> None:
    x = np.arange(3 * 8 * 64, dtype=np.float32)
    launch = probe("gather<8>", At("x"), At("out"), threads=64, blocks=24, shared=8 * 64 * 4)
    got = run(compiler, [launch], {"x": x, "out": poisoned((192,), np.float32)}, seed=seed)
    assert np.array_equal(got["out"].reshape(3, 64), np.roll(x.reshape(3, 8, 64).sum(1), -1, axis=1))


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (1, "before it is known that the cluster's blocks have started"),
        (2, "has ended|ended while|nobody can go on"),
        (3, "ended while blocks of its cluster may still use its shared memory|which has ended"),
    ],
)
def test_clusters_that_do_not_wait(compiler: EmulatedCompiler, number: int, message: str) -> None:
    x = np.zeros(64, np.float32)
    launch = probe(f"neighbours<{number}, 2>", At("x"), At("out"), blocks=2)
    with pytest.raises(EmulationError, match=message):
        run(compiler, [launch], {"x": x, "out": x})


def test_launches_that_a_device_refuses(compiler: EmulatedCompiler) -> None:
    x = np.zeros(200, np.float32)
    arrays = {"x": x, "out": x}
    good: tuple[Argument, ...] = (200, 0.5, At("x"), At("out"))
    for launch, message in (
        (probe("add<128>", *good, threads=256), "bound to 128"),
        (probe("add<128>", 200, 1, At("x"), At("out"), threads=128), "takes ifpp, not iipp"),
        (probe("add<128>", 200, 0.5, At("x"), threads=128), "takes ifpp, not ifp"),
        (probe("neighbours<0, 4>", At("x"), At("out"), blocks=6), "none of whole clusters"),
    ):
        with pytest.raises(EmulationError, match=message):
            run(compiler, [launch], arrays)
    driver = Driver(api=EmulatedDriver(ORIN))
    given: list[Any] = [200, 0.5, ctypes.c_void_p(), ctypes.c_void_p()]
    (image,) = compiler.cubins([probe("add<128>", *good).kernel], 87).values()
    function = driver.load(image, "add<128>", 0)
    with pytest.raises(EmulationError, match="49153 bytes of dynamic shared memory"):
        driver.launch(function, (1, 1, 1), threads=128, shared=49153, arguments=given, stream=0)
    with pytest.raises(EmulationError, match=r"dependent launches need compute capability 9\.0"):
        driver.launch(function, (1, 1, 1), threads=128, shared=0, arguments=given, stream=0, early=True)


def test_memory_beyond_an_allocation_is_not_copied_to(tmp_path: Path) -> None:
    driver = Driver(api=EmulatedDriver())
    address = driver.allocate(100)
    host = np.zeros(101, np.uint8)
    driver.call("cuMemcpyHtoD", address, host.ctypes.data, 100)
    with pytest.raises(EmulationError, match="101 bytes"):
        driver.call("cuMemcpyHtoD", address, host.ctypes.data, 101)
    driver.free(address)
    with pytest.raises(EmulationError, match="not within an allocation"):
        driver.call("cuMemcpyDtoH", host.ctypes.data, address, 1)

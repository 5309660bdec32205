"""Kernels on a CPU: the .cu files, compiled by g++ against another ptx.cuh, and a device that runs them.

One launch, or some, over numpy arrays:

    from emulator.device import emulated_runner
    from emulator.driver import HOPPER, ORIN

    runner = emulated_runner(ORIN, seed=1)
    launches = decode_linear(…, x=At("x"), weights=At("w"), out=At("out"), …)
    after = runner.run(launches, {"x": x, "w": packed, "out": poisoned((rows, n), "<f2"), …})
    after["out"]

From a shell: PYTHONPATH=.:tests:tools/gpu python …. `runner` is tools/gpu/runner.py's `Runner`, so every
program of tools/gpu runs on it, too. `Driver(api=EmulatedDriver(device))` is a driver for anything else;
`EmulatedCompiler` stands in for NVRTC's compiler. What was compiled stays in a directory of the temporary
one.

How it works. A block is a thread of the operating system; its CUDA threads are fibers, of which one runs
until it waits for others: for a warp in a shuffle or an mma, for the block at a barrier. `__shared__` is
`thread_local`.

What ends a launch with an `EmulationError` that says which kernel, block, thread and line:

- two accesses to a word of shared memory by different threads, one a write, without a barrier in between:
  __syncthreads, __syncwarp within a warp, the same named barrier, a cluster's; a shuffle is none;
- shared memory that is read, or written again, while a cp.async to it has not been waited for;
- what one block reads, or writes, of what another one of the same launch wrote, unless atomics and barriers
  lie between them; an atomic meets nothing but atomics without them;
- any access beyond an allocation or a block's shared memory, or not aligned to its size;
- a barrier that not all reach, a shuffle with a lane that has left, lanes of a warp that call different
  things;
- more shared memory than was asked for, a grid of no whole clusters, more threads than launch bounds,
  arguments of other types than the parameters;
- a block of a cluster whose shared memory is used before it is known to have started, or when it may have
  ended;
- of a kernel that is launched early: a block that never calls wait_for_previous, and before it a write to
  the device's memory or a read of what launches wrote that may still be under way.

What shows in results: memory that is allocated, and shared memory between blocks, is NaN. `copies="late"` has
cp.async copy when somebody waits for it, at the last moment that the kernel allows, `"at once"` when it is
issued, `"either"` both. With `seed` 0 lanes and warps run in order, each as far as it can; with others in an
order drawn anew at each wait, blocks too.

What it cannot show: how long anything takes, what NVRTC makes of the source, and the memory model (every
store is seen at once, with or without __threadfence).
"""

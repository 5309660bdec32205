"""Tokens per second of known shapes with random weights: the executor, its kernels, and the whole daemon."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from ctypes import c_void_p
from pathlib import Path
from typing import Final

import numpy as np
from figures import Figures
from limited import Say
from loaded import opened
from socket_share import measure_share

from edgellm.bench.bare import BareBench
from edgellm.bench.workloads import Workload
from edgellm.cuda.cubin import read_resources
from edgellm.cuda.driver import Driver
from edgellm.cuda.launch import Kernel
from edgellm.cuda.nvrtc import Compiler
from edgellm.enginedir import EngineDir
from edgellm.executor.cuda import CudaExecutor
from edgellm.memory.plan import Shape
from edgellm.model.weights_file import WEIGHTS_FILE, read_weights_header

DECODED: Final = 128
DEPTH: Final = 512
"""Tokens generated, and in front of them."""
PROMPTS: Final = (64, 512, 2048)
BATCHED_PROMPTS: Final = (4, 2048)
"""Prompts that are fed one behind the other, and tokens of each."""
REPETITIONS: Final = 3
READ_BYTES: Final = 1 << 30
"""Far more than any cache holds."""


def bench_executor(
    engine: EngineDir,
    name: str,
    batches: Sequence[int],
    say: Say,
    figures: Figures,
    *,
    profiled: str = "",
    open_driver: Callable[[], Driver] = Driver,
) -> None:
    """Tables of the bare executor, with and without dependent launches.

    Args:
        name: of the figures.
        profiled: rows, and tokens as t512, whose kernels are timed by themselves: `1,8,t512`.
    """
    weights = read_weights_header(engine.path / WEIGHTS_FILE)
    read = weights.bytes - weights.offsets["layers.0.attention_norm"]  # all but the embedding
    shape = Shape(max(*batches, BATCHED_PROMPTS[0]), engine.build.max_seq_len, engine.build.max_num_tokens)
    for dependent in (True, False):
        started = time.monotonic()
        with opened(
            engine.path, engine.spec, shape, dependent_launch=dependent, open_driver=open_driver
        ) as executor:
            loading = time.monotonic() - started
            bandwidth = _read_bandwidth(executor.driver)
            say(
                f"{name}, int4, {weights.bytes / 1e9:.2f} GB, loaded in {loading:.1f} s; dependent "
                f"launches: {'yes' if dependent else 'no'}; plain reads {bandwidth / 1e9:.0f} GB/s, "
                f"{read / 1e9:.2f} GB of weights in {1e3 * read / bandwidth:.3f} ms\n\n"
                "| test | batch | ms/step | tokens/s | of the read floor |\n"
                "| --- | ---: | ---: | ---: | ---: |"
            )
            bench = BareBench(executor)
            for workload in _workloads(batches, executor, prompts=dependent):
                seconds = float(np.median(bench.run(workload, REPETITIONS)))
                decode = workload.kind == "tg"
                step = seconds / (workload.tokens if decode else 1)
                rate = workload.total_tokens / seconds
                say(
                    f"| {workload.name} | {workload.batch} | {1000 * step:.3f} | {rate:.0f} | "
                    f"{f'{read / bandwidth / step:.0%}' if decode else ''} |"
                )
                figures.add(f"{name} {figure_of(workload, dependent=dependent)}", rate)
            if dependent:
                show_profile(executor, profiled, say)
        say("")


def figure_of(workload: Workload, *, dependent: bool = True) -> str:
    """The figure's name behind its model's, as `figures.H100` has them."""
    without = "" if dependent else " without dependent launches"
    if workload.kind == "tg":
        return f"decode {workload.batch}{without}"
    several = f"{workload.batch} × " if workload.batch > 1 else ""
    return f"prefill {several}{workload.tokens}{without}"


def bench_daemon(
    engine: EngineDir,
    name: str,
    batches: Sequence[int],
    say: Say,
    figures: Figures,
    *,
    rounds: int = 5,
    tokens: int = 256,
) -> None:
    """The whole daemon through its socket beside the bare executor of the same minute."""
    say("| model | batch | bare tok/s | through the socket | share | 95 % of rounds |")
    say("| --- | ---: | ---: | ---: | ---: | --- |")
    shares = measure_share(engine, batches, rounds=rounds, tokens=tokens, start_timeout_s=300)
    for batch, share in shares.items():
        ratio = share.ratio
        say(
            f"| {name} | {batch} | {share.bare_median:.0f} | {share.socket_median:.0f} | {ratio.value:.1%} | "
            f"{ratio.low:.1%} … {ratio.high:.1%} |"
        )
        figures.add(f"{name} share of the bare executor through the socket {batch}", ratio.value)


def show_profile(executor: CudaExecutor, wanted: str, say: Say) -> None:
    """What a step's kernels take, each kind by itself."""
    for word in filter(None, wanted.split(",")):
        count = int(word.strip("t"))
        timings = executor.profile(tokens=count) if word[0] == "t" else executor.profile(rows=count)
        say(f"\n| {count} {'tokens' if word[0] == 't' else 'rows'} | launches | µs each | µs in all |")
        say("| --- | ---: | ---: | ---: |")
        for each in timings:
            micros = 1e6 * each.seconds
            say(f"| {each.name} | {each.count} | {micros / each.count:.2f} | {micros:.0f} |")


def _workloads(batches: Sequence[int], executor: CudaExecutor, *, prompts: bool) -> list[Workload]:
    """Those that the executor has room for."""
    found = [Workload("tg", DECODED, DEPTH, batch) for batch in batches]
    if prompts:
        found += [Workload("pp", count) for count in PROMPTS]
        found.append(Workload("pp", BATCHED_PROMPTS[1], 0, BATCHED_PROMPTS[0]))
    return [each for each in found if each.seq_len <= executor.info.max_seq_len]


def _read_bandwidth(driver: Driver) -> float:
    """Bytes a second that plain reads of memory take."""
    kernel = Kernel("read.cu", "read_all<8>", 512)
    device = driver.facts.device
    (image,) = Compiler(sources=Path(__file__).parent).cubins([kernel], device.sm).values()
    function = driver.load(image, read_resources(image)[0].name, 0)
    stream = driver.stream()
    memory = driver.allocate(READ_BYTES)
    try:
        driver.call("cuMemsetD8Async", memory, 1, READ_BYTES, stream)
        arguments: list[int | float | c_void_p] = [c_void_p(memory), READ_BYTES // 16, c_void_p(memory)]
        grid = (device.multiprocessors * 4, 1, 1)

        def read() -> None:
            driver.launch(function, grid, threads=512, shared=0, arguments=arguments, stream=stream)

        return READ_BYTES / driver.time(read, stream)
    finally:
        driver.free(memory)

"""Does edgellm compute on this GPU, and how fast: what a board's owner runs first.

    python tools/gpu_check.py                       kernels, small networks, sanitizer, benchmark
    python tools/gpu_check.py --checkpoint M.gguf   a real model beside float32, too

Every kernel beside its float64 or float32 reference on fresh random inputs; whole networks beside the same
network in float32 numpy, teacher-forced, KL in nats; device memory before and after; compute-sanitizer, where
it is installed; then a table of tokens per second. Needs the `test` extra and CUDA; the output is markdown.
"""

# ruff: noqa: ARG001 - every part takes the same arguments

from __future__ import annotations

import argparse
import platform
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ctypes import c_void_p
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent / "gpu"))

from reference import NumpyExecutor

from edgellm import __version__
from edgellm.bench.prompts import PASSAGE
from edgellm.checkpoint.base import Checkpoint, open_checkpoint
from edgellm.checkpoint.random import QUANTS, RandomCheckpoint, random_checkpoint
from edgellm.cuda.cubin import read_resources
from edgellm.cuda.driver import Driver
from edgellm.cuda.launch import Kernel
from edgellm.cuda.nvrtc import Compiler
from edgellm.doctor.proof import Case, prove
from edgellm.engine_config import BuildConfig
from edgellm.executor.base import FEEDBACK, Row, Step, Want
from edgellm.executor.cuda import CudaExecutor
from edgellm.executor.cuda_build import cache_kind
from edgellm.kernels.attention_shape import CacheKind
from edgellm.memory.sizes import show_size
from edgellm.model.kernels import emit
from edgellm.model.spec import Mixture, ModelSpec
from edgellm.model.weights_file import WEIGHTS_FILE, read_weights_header
from edgellm.sampling import SamplingParams

MAX_MEAN_KL: Final = 0.001
"""With fp16 caches."""
MAX_MEAN_KL_ROUTED: Final = 0.02
"""Where a token may go to other experts: between two of nearly the same score rounding decides, and random
experts have nothing in common."""
MAX_MEAN_KL_INT8: Final = 1.0
"""With int8 caches: random weights attend, and route to experts, more sharply than any trained model's."""
PARTS: Final = ("kernels", "networks", "sampling", "memory", "sanitizer", "benchmark")
CHECKS: Final = (
    "linear_checks.py",
    "gemm_checks.py",
    "attention_checks.py",
    "sample_checks.py",
    "moe_checks.py",
)
GREEDY: Final = SamplingParams(temperature=0.0)
NOTHING: Final = np.zeros(0, np.int32)

Tokens = NDArray[np.int32]


def _mixture(experts: int, top_k: int) -> ModelSpec:
    return ModelSpec(
        architecture="Qwen3MoeForCausalLM",
        vocab_size=1024,
        hidden_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_size=64,
        intermediate_size=512,
        norm_epsilon=1e-6,
        max_position_embeddings=2048,
        rotary_base=1e6,
        qk_layernorm=True,
        moe=Mixture(num_experts=experts, top_k=top_k),
        moe_intermediate_size=192,
    )


SMALL: Final[dict[str, ModelSpec]] = {
    "llama, 6/2 heads of 64, tied": ModelSpec(
        architecture="LlamaForCausalLM",
        vocab_size=1000,
        hidden_size=384,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_size=64,
        intermediate_size=1024,
        norm_epsilon=1e-5,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    ),
    "qwen2, 7/1 heads of 64, biases": ModelSpec(
        architecture="Qwen2ForCausalLM",
        vocab_size=777,
        hidden_size=448,
        num_hidden_layers=2,
        num_attention_heads=7,
        num_key_value_heads=1,
        head_size=64,
        intermediate_size=640,
        norm_epsilon=1e-6,
        max_position_embeddings=2048,
        rotary_base=1e6,
        attn_bias=True,
    ),
    "qwen3, 8/2 heads of 128, head norms": ModelSpec(
        architecture="Qwen3ForCausalLM",
        vocab_size=2048,
        hidden_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_size=128,
        intermediate_size=1536,
        norm_epsilon=1e-6,
        max_position_embeddings=2048,
        rotary_base=1e6,
        qk_layernorm=True,
    ),
    "qwen3 moe, 4 of 24 experts": _mixture(24, 4),
    "qwen3 moe, all of 6 experts": _mixture(6, 6),
}


def main() -> int:
    """Run the parts asked for; 1 if any failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="a real model to compare")
    parser.add_argument("--parts", default=",".join(PARTS), help="of %(default)s")
    parser.add_argument("--models", default="qwen3-8b,smollm2-135m", help="random shapes to measure")
    parser.add_argument("--engines", help="where engines of these names are already; default: built now")
    parser.add_argument("--batches", default="1,2,4,8,16", help="rows to measure")
    parser.add_argument("--caches", default="fp16,int8", help="of networks (default %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of everything; default: another one each run")
    parser.add_argument("--profile", default="", help="rows, and tokens as t512, whose kernels to time alone")
    parser.add_argument("--small", action="store_true", help="one small network only, for the sanitizer")
    args = parser.parse_args()
    seed = secrets.randbits(31) if args.seed is None else args.seed
    parts = args.parts.split(",")
    print(facts(seed))
    failed = []
    for part in PARTS:
        if part in parts:
            print(f"\n## {part}\n", flush=True)
            started = time.monotonic()
            if not globals()[f"check_{part}"](args, seed):
                failed.append(part)
            print(f"\n{time.monotonic() - started:.1f} s", flush=True)
    print(f"\n**{'FAILED: ' + ', '.join(failed) if failed else 'passed'}**")
    return bool(failed)


def facts(seed: int) -> str:
    """What this ran on."""
    driver = Driver()
    known = driver.facts
    free, total = driver.memory()
    lines = [
        f"- {known.name}, sm_{known.device.sm}, {known.device.multiprocessors} SMs at up to "
        f"{known.clock_khz / 1000:.0f} MHz, {show_size(known.device.shared_per_block)} shared per block, "
        f"{show_size(free)} of {show_size(total)} free" + (", unified memory" if known.integrated else ""),
        f"- driver for CUDA {known.driver[0]}.{known.driver[1]}, {platform.machine()}, "
        f"Python {platform.python_version()}, edgellm {__version__}, seed {seed}",
    ]
    driver.close()
    return "# gpu_check\n\n" + "\n".join(lines)


def check_kernels(args: argparse.Namespace, seed: int) -> bool:
    """K1's and K2's checks, each a program of its own."""
    good = True
    for name in CHECKS:
        path = Path(__file__).parent / "gpu" / name
        if not path.exists():
            continue
        done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False)
        print(f"### {name}\n\n```\n{done.stdout.strip()[-3000:]}\n{done.stderr.strip()[-2000:]}\n```")
        good &= done.returncode == 0
    return good


def check_networks(args: argparse.Namespace, seed: int) -> bool:
    """Whole networks beside float32."""
    print("| network | caches | case | positions | mean KL | largest KL | same best token | |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | --- |")
    good = True
    for name, checkpoint in _checkpoints(args, seed):
        for kv_cache in map(cache_kind, args.caches.split(",")):
            mixture = checkpoint.spec.moe
            routed = mixture is not None and mixture.top_k < mixture.num_experts
            # int8 caches are a choice of precision: what they cost is reported, and that it is a number.
            most = MAX_MEAN_KL_INT8 if kv_cache == "int8" else MAX_MEAN_KL_ROUTED if routed else MAX_MEAN_KL
            for case in _prove(checkpoint, kv_cache, seed):
                passed = case.mean_kl <= most
                good &= passed
                print(
                    f"| {name} | {kv_cache} | {case.name} | {case.positions} | {case.mean_kl:.6f} | "
                    f"{case.max_kl:.6f} | {case.agreeing} | {'passed' if passed else 'FAILED'} |",
                    flush=True,
                )
    return good


def check_sampling(args: argparse.Namespace, seed: int) -> bool:
    """Tokens that the device chose beside the host's sampler on the same logits, and two steps in flight."""
    chance = np.random.default_rng(seed)
    checkpoint = RandomCheckpoint(SMALL["llama, 6/2 heads of 64, tied"], "small", "int4", seed % 1000, 3.0)
    params = [
        GREEDY,
        SamplingParams(temperature=1.0, seed=int(chance.integers(1 << 62))),
        SamplingParams(temperature=0.8, top_k=40, seed=int(chance.integers(1 << 62))),
        SamplingParams(temperature=1.2, top_p=0.9, seed=int(chance.integers(1 << 62))),
        SamplingParams(temperature=1.0, min_p=0.1, seed=int(chance.integers(1 << 62))),
        SamplingParams(
            temperature=0.9,
            seed=int(chance.integers(1 << 62)),
            repetition_penalty=1.2,
            frequency_penalty=0.4,
            presence_penalty=0.3,
            logit_bias={5: 3.0, 17: -4.0},
            min_tokens=8,
            suppressed=(1, 2),
        ),
    ]
    slots = range(len(params))
    with _loaded(checkpoint, slots=len(params), max_seq_len=256) as executor:

        def run(want: Want, fed: Tokens | None) -> Tokens:
            """101 tokens of each slot, two steps in flight; fed back, or as they are given."""
            for slot, each in enumerate(params):
                executor.bind(slot, each, NOTHING)
            steps = [Step([Row(slot, 0, np.array([slot + 5, 7], np.int32), want) for slot in slots])]
            for n in range(100):
                tokens = [FEEDBACK if fed is None else fed[n, slot : slot + 1] for slot in slots]
                steps.append(Step([Row(slot, 2 + n, tokens[slot], want) for slot in slots]))
            found, flying = [], []
            for step in steps:
                flying.append(executor.submit(step))
                if len(flying) == 2:
                    found.append(executor.collect(flying.pop(0)).token)
            return np.stack(found + [executor.collect(ticket).token for ticket in flying])

        # Who wants logits has its token from the host.
        expected = run(Want.LOGITS, None)
        single = (run(Want.TOKEN, expected) == expected).mean(axis=0)
        chained = (run(Want.TOKEN, None) == expected).mean(axis=0)
    for slot, each in enumerate(params):
        print(
            f"- temperature {each.temperature}, top_k {each.top_k}, top_p {each.top_p}, min_p {each.min_p}"
            f"{', penalties and biases' if each.counts_tokens else ''}: "
            f"of 101 tokens {single[slot]:.1%} as the host's sampler, fed back {chained[slot]:.1%}"
        )
    # A token differs where u is within rounding of a border between two.
    return bool((single > 0.97).all() and chained[0] == 1)


def check_memory(args: argparse.Namespace, seed: int) -> bool:
    """Device memory after READY: nothing is allocated by steps of any kind."""
    checkpoint = RandomCheckpoint(SMALL["qwen3, 8/2 heads of 128, head norms"], "small", "int4", seed % 1000)
    with _loaded(checkpoint, slots=8, max_seq_len=512) as executor:
        before, _ = executor.driver.memory()
        for slot in range(8):
            executor.bind(slot, GREEDY, NOTHING)
        for count in (1, 3, 8):
            for length in (1, 2, 17, 60, 128):
                rows = [
                    Row(slot, 0, np.ones(length, np.int32), Want.LOGITS if slot % 2 else Want.TOKEN)
                    for slot in range(min(count, 256 // length))
                ]
                executor.collect(executor.submit(Step(rows)))
                executor.copy_prefix(0, 7, length)
        after, _ = executor.driver.memory()
    print(f"- device memory taken by 15 kinds of steps and copies after READY: {before - after} bytes")
    return before == after


def check_sanitizer(args: argparse.Namespace, seed: int) -> bool:
    """memcheck and racecheck over a small network."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        print("- compute-sanitizer is not installed: not run")
        return True
    good = True
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, __file__]
        command += ["--parts", "networks", "--small", "--seed", str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        summary = [line for line in (done.stdout + done.stderr).splitlines() if "SUMMARY" in line]
        passed = done.returncode == 0
        good &= passed
        print(f"- {check}: {'; '.join(summary) or done.stderr[-500:]}: {'passed' if passed else 'FAILED'}")
        if not passed:
            print(f"\n```\n{(done.stdout + done.stderr)[-3000:]}\n```\n")
    return good


def check_benchmark(args: argparse.Namespace, seed: int) -> bool:
    """Tokens per second, with and without dependent launches."""
    from edgellm.bench.bare import BareBench
    from edgellm.bench.workloads import Workload

    batches = [int(word) for word in args.batches.split(",")]
    sizes = {"slots": max(batches), "max_seq_len": 2560, "max_num_tokens": 2048}
    for name in args.models.split(","):
        checkpoint = random_checkpoint(name, "int4")
        with ExitStack() as stack:
            folder = Path(args.engines) / name if args.engines else None
            if folder is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                _emit(checkpoint, folder, **sizes)
            weights = read_weights_header(folder / WEIGHTS_FILE)
            read = weights.bytes - weights.offsets["layers.0.attention_norm"]  # all but the embedding
            for dependent in (True, False):
                started = time.monotonic()
                with _executor(checkpoint, folder, dependent_launch=dependent, **sizes) as executor:
                    loaded = time.monotonic() - started
                    bandwidth = _read_bandwidth(executor.driver)
                    print(
                        f"{name}, int4, {weights.bytes / 1e9:.2f} GB, loaded in {loaded:.1f} s; dependent "
                        f"launches: {'yes' if dependent else 'no'}; plain reads {bandwidth / 1e9:.0f} GB/s, "
                        f"{read / 1e9:.2f} GB of weights in {1e3 * read / bandwidth:.3f} ms\n"
                    )
                    print("| test | batch | ms/step | tokens/s | of the read floor |")
                    print("| --- | ---: | ---: | ---: | ---: |")
                    bench = BareBench(executor)
                    workloads = [Workload("tg", 128, 512, batch) for batch in batches]
                    if dependent:
                        workloads += [Workload("pp", count, 0, 1) for count in (64, 512, 2048)]
                    for workload in workloads:
                        seconds = float(np.median(bench.run(workload, 3)))
                        decode = workload.kind == "tg"
                        step = seconds / (workload.tokens if decode else 1)
                        print(
                            f"| {workload.name} | {workload.batch} | {1000 * step:.3f} | "
                            f"{workload.total_tokens / seconds:.0f} | "
                            f"{f'{read / bandwidth / step:.0%}' if decode else ''} |",
                            flush=True,
                        )
                    if dependent:
                        _show_profile(executor, args.profile)
                print()
    return True


def _read_bandwidth(driver: Driver) -> float:
    """Bytes a second that plain reads of memory take, of far more than any cache holds."""
    source = Path(__file__).parent / "gpu"
    kernel = Kernel("read.cu", "read_all<8>", 512)
    device = driver.facts.device
    (image,) = Compiler(sources=source).cubins([kernel], device.sm).values()
    function = driver.load(image, read_resources(image)[0].name, 0)
    size, stream = 1 << 30, driver.stream()
    memory = driver.allocate(size)
    try:
        driver.call("cuMemsetD8Async", memory, 1, size, stream)
        arguments: list[int | float | c_void_p] = [c_void_p(memory), size // 16, c_void_p(memory)]
        grid = (device.multiprocessors * 4, 1, 1)

        def read() -> None:
            driver.launch(function, grid, threads=512, shared=0, arguments=arguments, stream=stream)

        return size / driver.time(read, stream)
    finally:
        driver.free(memory)


def _show_profile(executor: CudaExecutor, wanted: str) -> None:
    """What a step's kernels take, each kind by itself."""
    for word in filter(None, wanted.split(",")):
        count = int(word.strip("t"))
        timings = executor.profile(tokens=count) if word[0] == "t" else executor.profile(rows=count)
        print(f"\n| {count} {'tokens' if word[0] == 't' else 'rows'} | launches | µs each | µs in all |")
        print("| --- | ---: | ---: | ---: |")
        for each in timings:
            micros = 1e6 * each.seconds
            print(f"| {each.name} | {each.count} | {micros / each.count:.2f} | {micros:.0f} |", flush=True)


def _checkpoints(args: argparse.Namespace, seed: int) -> Iterator[tuple[str, Checkpoint]]:
    chance = np.random.default_rng(seed)
    for name, spec in SMALL.items():
        for quant in QUANTS:
            if args.small and (quant != "int4" or not name.startswith("qwen3")):
                continue
            made = msgspec.structs.replace(spec, num_hidden_layers=1) if args.small else spec
            kind = "tiny" if args.small else "small"
            yield f"{name}, {quant}", RandomCheckpoint(made, kind, quant, int(chance.integers(1000)), 2.0)
    if args.checkpoint is not None:
        yield args.checkpoint.name, open_checkpoint(args.checkpoint)


def _prove(checkpoint: Checkpoint, kv_cache: CacheKind, seed: int) -> Iterator[Case]:
    chance = np.random.default_rng(seed)
    # The sanitizer takes a hundred times as long.
    length, slots = {"small": (80, 5), "tiny": (20, 2)}.get(checkpoint.name, (96, 4))
    real = checkpoint.name not in ("small", "tiny")
    with _loaded(checkpoint, slots=slots, max_seq_len=128, kv_cache=kv_cache) as executor:
        reference = NumpyExecutor(checkpoint, executor.info)
        if real:
            text = np.array(Tokenizer.from_str(checkpoint.tokenizer_json().decode()).encode(PASSAGE).ids)
            starts = np.linspace(0, len(text) - length, slots).astype(int)
            prompts = [text[at : at + length].astype(np.int32) for at in starts]
        else:
            vocabulary = checkpoint.spec.vocab_size
            prompts = [chance.integers(0, vocabulary, length, dtype=np.int32) for _ in range(slots)]
        reference.announce(prompts)
        yield from prove(executor, reference, prompts)


@contextmanager
def _loaded(checkpoint: Checkpoint, **sizes: Any) -> Iterator[CudaExecutor]:
    with tempfile.TemporaryDirectory() as folder:
        shape = {"max_num_tokens": 256, **sizes}
        kv_cache = shape.pop("kv_cache", "fp16")
        _emit(checkpoint, Path(folder), **shape)
        with _executor(checkpoint, Path(folder), kv_cache=kv_cache, **shape) as executor:
            yield executor


@contextmanager
def _executor(checkpoint: Checkpoint, folder: Path, *, slots: int, **options: Any) -> Iterator[CudaExecutor]:
    # The sanitizer's steps take long.
    executor = CudaExecutor(folder, checkpoint.spec, max_batch_size=slots, step_limit_s=300, **options)
    try:
        executor.load(lambda _what, _done: None)
        yield executor
    finally:
        executor.close()


def _emit(checkpoint: Checkpoint, folder: Path, *, slots: int, max_seq_len: int, max_num_tokens: int) -> None:
    build = BuildConfig(
        max_input_len=max_seq_len - 1,
        max_seq_len=max_seq_len,
        max_batch_size=slots,
        max_num_tokens=max_num_tokens,
        opt_batch_size=slots,
        opt_num_tokens=slots,
    )
    emit(checkpoint, folder, build, progress=lambda _what, _done: None)


if __name__ == "__main__":
    sys.exit(main())

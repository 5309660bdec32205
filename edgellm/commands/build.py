"""`edgellm build CHECKPOINT -o ENGINE`: a checkpoint becomes an engine directory."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from edgellm.commands.quantizing import QuantizedBuild, add_flags

if TYPE_CHECKING:
    from edgellm.checkpoint import Checkpoint
    from edgellm.commands.target import Target
    from edgellm.engine_config import PlanRecord
    from edgellm.enginedir import BuildConfig, EngineConfig
    from edgellm.executor.base import Progress
    from edgellm.model.spec import ModelSpec

DEFAULT_BATCH_SIZE = 4
DEFAULT_SEQ_LEN = 2048
DEFAULT_NUM_TOKENS = {"cpu": 256, "cuda": 1024, "tensorrt": 256}


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser("build", help="make an engine directory of a checkpoint")
    parser.add_argument(
        "checkpoint", nargs="?", type=Path, metavar="CHECKPOINT", help="GGUF file or model directory"
    )
    parser.add_argument(
        "--random",
        metavar="MODEL",
        help="instead of a checkpoint: random weights of a known shape, such as qwen3-8b, to measure with; "
        "--quant is what they are",
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="ENGINE", required=True, help="directory to make"
    )
    parser.add_argument(
        "--max-batch-size",
        type=int,
        metavar="N",
        default=DEFAULT_BATCH_SIZE,
        help="requests that run at the same time (default %(default)s)",
    )
    parser.add_argument(
        "--max-seq-len",
        type=int,
        metavar="N",
        help=f"tokens of prompt and answer together (default {DEFAULT_SEQ_LEN}, or the model's if less)",
    )
    parser.add_argument(
        "--max-num-tokens",
        type=int,
        metavar="N",
        help="tokens that a step may feed, all requests together (default 256, cuda 1024)",
    )
    parser.add_argument(
        "--compute",
        choices=("int8", "fp32", "fp16"),
        help="int8 (cpu's default): weights as stored, activations quantized on the fly; fp32: the exact, "
        "slow reference; fp16: cuda's and tensorrt's",
    )
    parser.add_argument(
        "--kv-cache",
        choices=("fp32", "fp16", "int8"),
        help="cpu: fp32 (default), or fp16, half the memory, attention in half precision; cuda: fp16 "
        "(default), or int8 with a scale for each token and head; tensorrt: fp16",
    )
    parser.add_argument(
        "--executor", choices=("cpu", "cuda", "tensorrt"), default="cpu", help="what is to run it"
    )
    parser.add_argument(
        "--sm",
        metavar="N,…",
        help="cuda: compile the kernels now for these compute capabilities, such as 87 for Orin; without it "
        "the device compiles them at its first start; tensorrt: the devices that the plan is for, where the "
        "library builds ahead (default: the one at hand)",
    )
    parser.add_argument(
        "--builder-memory",
        metavar="SIZE",
        help="tensorrt: most device memory for trying kernels out, such as 1GiB (default: all that is free)",
    )
    parser.add_argument(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="tensorrt: kernels that were measured before, kept for the next build (default: ENGINE.timing)",
    )
    parser.add_argument(
        "--model-name",
        type=_utf8,
        metavar="NAME",
        help="what to call the model (default: the file's or directory's name)",
    )
    add_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Build the engine and print one line about it.

    Raises:
        OperatorError: the flags, the checkpoint or the place to write; see edgellm.errors.
    """
    from msgspec import structs

    from edgellm.commands.progress import progress_bar
    from edgellm.commands.target import read_target
    from edgellm.engine_draft import remove_abandoned_drafts
    from edgellm.engine_place import new_engine, real_path
    from edgellm.engine_seal import seal

    started = time.monotonic()
    target = read_target(args)
    checkpoint = _checkpoint(args)
    build = build_config(
        checkpoint.spec,
        max_batch_size=args.max_batch_size,
        max_seq_len=args.max_seq_len,
        max_num_tokens=args.max_num_tokens,
        usual_num_tokens=DEFAULT_NUM_TOKENS[args.executor],
    )
    if args.executor == "tensorrt":
        # A profile of its own is for prompts; it is to be fastest at whole chunks.
        build = structs.replace(build, opt_num_tokens=build.max_num_tokens)
    # Random weights are made in their quantized form.
    quantized = None if args.random else QuantizedBuild.from_flags(args, checkpoint)
    if quantized is not None:
        checkpoint = quantized.checkpoint
    for draft in remove_abandoned_drafts(real_path(args.output)):
        print(f"removed {draft}, left by a build that was killed", file=sys.stderr)
    with _sigterm_raises(), progress_bar() as progress, new_engine(args.output) as draft:
        complaint = _write_text(checkpoint, draft)
        if quantized is not None:
            quantized.calibrate(draft, progress)
        network = _write_network(target, checkpoint, draft, build, progress)
        config = _engine_config(args, target, checkpoint, build, network)
        if quantized is not None:
            quantized.write_report(draft, progress)
        progress("checksums", 1.0)
        config = seal(draft, config, network.hashed)
    if complaint is not None:
        print(
            f"warning: the engine answers `generate` only, and refuses every `chat`: {complaint}",
            file=sys.stderr,
        )
    for warning in network.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    size = sum(record.bytes for record in config.edgellm.files.values())
    print(
        f"{args.output}: {config.edgellm.model_name}, {size / 1e6:.1f} MB, "
        f"{build.slots}, steps of {build.max_num_tokens}, "
        f"{args.executor} {target.compute}, built in {time.monotonic() - started:.1f} s"
    )
    if quantized is not None:
        quantized.show_report()
    return 0


def build_config(
    spec: ModelSpec,
    *,
    max_batch_size: int | None = None,
    max_seq_len: int | None = None,
    max_num_tokens: int | None = None,
    usual_num_tokens: int = DEFAULT_NUM_TOKENS["cpu"],
) -> BuildConfig:
    """The sizes to build for; None takes the default, for max_num_tokens `usual_num_tokens` if that can be.

    Raises:
        UsageError: they make no sense, by themselves or together; the message names the flag.
    """
    from edgellm.enginedir import BuildConfig
    from edgellm.errors import UsageError

    longest = spec.max_context
    if max_batch_size is None:
        max_batch_size = DEFAULT_BATCH_SIZE
    if max_seq_len is None:
        max_seq_len = min(DEFAULT_SEQ_LEN, longest)
    if max_batch_size < 1:
        raise UsageError(f"--max-batch-size {max_batch_size}: at least 1")
    if not 2 <= max_seq_len <= longest:
        raise UsageError(
            f"--max-seq-len {max_seq_len}: from 2 to the {longest} tokens "
            + ("of the model's sliding window" if longest == spec.sliding_window else "it was trained for")
        )
    most = max_batch_size * max_seq_len
    if max_num_tokens is None:
        max_num_tokens = min(max(usual_num_tokens, max_batch_size), most)
    if not max_batch_size <= max_num_tokens <= most:
        raise UsageError(
            f"--max-num-tokens {max_num_tokens}: from {max_batch_size} (one for each of --max-batch-size) "
            f"to {most} (--max-batch-size × --max-seq-len)"
        )
    return BuildConfig(
        max_input_len=max_seq_len - 1,  # an answer has at least one token
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        max_num_tokens=max_num_tokens,
        opt_batch_size=max_batch_size,
        opt_num_tokens=max_batch_size,
    )


def refuse_model_name(path: Path) -> None:
    """Say what to do with a model's name where a file is wanted.

    Raises:
        UsageError: the path is no file, and a model that `edgellm fetch` knows.
    """
    from edgellm.checkpoint.fetch import MODELS
    from edgellm.errors import UsageError

    if str(path) in MODELS and not path.exists():
        raise UsageError(f"{path} is no file; `edgellm fetch {path}` brings that model and prints its path")


def _utf8(text: str) -> str:
    """An argument's type: text that can be written into config.json."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8") from error
    return text


class _Network(NamedTuple):
    """What was written: the SHA-256 of files that were hashed meanwhile, the plan if it is one, warnings."""

    hashed: dict[str, str]
    plan: PlanRecord | None = None
    warnings: Sequence[str] = ()


def _checkpoint(args: argparse.Namespace) -> Checkpoint:
    from edgellm.checkpoint import open_checkpoint
    from edgellm.enginedir import is_engine
    from edgellm.errors import UsageError

    if (args.checkpoint is None) == (args.random is None):
        raise UsageError("name either a CHECKPOINT or --random MODEL")
    if args.random is not None:
        from edgellm.checkpoint.random import random_checkpoint

        for flag in ("group_size", "quant_head", "calibrate", "evaluate"):
            if getattr(args, flag) is not None:
                raise UsageError(f"--{flag.replace('_', '-')}: random weights are of one kind, --quant")
        return random_checkpoint(args.random, "fp16" if args.quant == "none" else args.quant)
    refuse_model_name(args.checkpoint)
    if is_engine(args.checkpoint):
        raise UsageError(f"{args.checkpoint} is an engine already: `edgellm serve {args.checkpoint}`")
    return open_checkpoint(args.checkpoint)


def _engine_config(
    args: argparse.Namespace,
    target: Target,
    checkpoint: Checkpoint,
    build: BuildConfig,
    network: _Network,
) -> EngineConfig:
    import msgspec

    from edgellm import __version__
    from edgellm.enginedir import FORMAT_VERSION, EdgellmSection, EngineConfig, PretrainedConfig
    from edgellm.model.inventory import take_inventory

    return EngineConfig(
        version=__version__,
        pretrained_config=PretrainedConfig(
            **msgspec.structs.asdict(checkpoint.spec), quantization=checkpoint.quantization
        ),
        build_config=build,
        edgellm=EdgellmSection(
            format_version=FORMAT_VERSION,
            executor=target.executor,
            executor_version=_executor_version(target),
            compute=target.compute,
            kv_cache=target.kv_cache,
            model_name=args.model_name or checkpoint.name,
            bos_id=checkpoint.bos_id,
            add_bos=checkpoint.add_bos,
            eos_ids=checkpoint.eos_ids,
            weights=take_inventory(checkpoint),
            plan=network.plan,
        ),
    )


def _executor_version(target: Target) -> str:
    from importlib.metadata import version

    if target.tensorrt is not None:
        return f"{target.tensorrt.name} {target.tensorrt.version}"
    if target.executor == "cpu":
        return f"onnxruntime {version('onnxruntime')}"
    from edgellm.model.network import LAYOUT_VERSION

    return f"layout {LAYOUT_VERSION}"


def _write_text(checkpoint: Checkpoint, draft: Path) -> str | None:
    """Write what turns text into tokens and back, and see that it can be used.

    Returns:
        Why the chat template is of no use, if there is one that is not.
    """
    from edgellm import enginedir
    from edgellm.errors import CheckpointError, EngineError
    from edgellm.text.chat import ChatTemplate
    from edgellm.text.tokenizer import Tokenizer

    (draft / enginedir.TOKENIZER).write_bytes(checkpoint.tokenizer_json())
    special = {"bos_token": checkpoint.bos_token, "eos_token": checkpoint.eos_token}
    enginedir.write_json(
        draft / enginedir.TOKENIZER_CONFIG,
        {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": checkpoint.add_bos, **special},
    )
    enginedir.write_json(
        draft / enginedir.GENERATION_CONFIG,
        {"bos_token_id": checkpoint.bos_id, "eos_token_id": list(checkpoint.eos_ids)},
    )
    try:
        Tokenizer.from_file(draft / enginedir.TOKENIZER)
        if checkpoint.chat_template is not None:
            (draft / enginedir.CHAT_TEMPLATE).write_text(
                checkpoint.chat_template, encoding="utf-8", newline=""
            )
            return ChatTemplate(
                checkpoint.chat_template, bos=checkpoint.bos_token, eos=checkpoint.eos_token
            ).complaint()
    except EngineError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    return None


def _write_network(
    target: Target, checkpoint: Checkpoint, draft: Path, build: BuildConfig, progress: Progress
) -> _Network:
    if target.executor == "cpu":
        from edgellm.model import onnx

        assert target.compute != "fp16"
        hashed = onnx.emit(
            checkpoint, draft, build, compute=target.compute, kv_cache=target.kv_cache, progress=progress
        )
        return _Network(hashed)
    if target.tensorrt is not None:
        from edgellm.tensorrt.engine_files import write_plan

        plan, warnings = write_plan(
            draft,
            checkpoint,
            target.tensorrt,
            build,
            targets=target.sms,
            builder_memory=target.builder_memory,
            timing_cache=target.timing_cache,
            progress=progress,
        )
        return _Network({}, plan, warnings)
    from edgellm.executor.cuda_build import write_kernels
    from edgellm.model import kernels

    hashed = kernels.emit(checkpoint, draft, build, progress=progress)
    for sm in target.sms:
        write_kernels(draft, checkpoint.spec, build, kv_cache=target.kv_cache, sm=sm, progress=progress)
    return _Network(hashed)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM ends the build like ^C does, so that the half-written directory is removed."""

    def leave(number: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

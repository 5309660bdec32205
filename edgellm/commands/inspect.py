"""`edgellm inspect PATH`: what a checkpoint or an engine is, and what of it edgellm would refuse.

Exit code: 0; 65 if a build would end with something being refused; 66 for a damaged engine.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from edgellm.commands.inspection import BuiltFor, Quantized, Report, Storage


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "inspect",
        help="say what a checkpoint or engine is, and what of it would be refused",
        description="Say what a checkpoint or engine is. Exit code: 0, or 65 if something would be refused.",
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="GGUF file, model directory or engine")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report.

    Raises:
        UsageError: the path is a model's name, and no file.
        EngineError: the engine is damaged.
    """
    from edgellm.commands.build import refuse_model_name
    from edgellm.commands.inspection import inspect_checkpoint, inspect_engine
    from edgellm.enginedir import is_engine
    from edgellm.errors import CheckpointError

    refuse_model_name(args.path)
    report = inspect_engine(args.path) if is_engine(args.path) else inspect_checkpoint(args.path)
    print(json.dumps(asdict(report), ensure_ascii=False, indent=2) if args.json else _as_text(report))
    return CheckpointError.exit_code if report.refused else 0


def _as_text(report: Report) -> str:
    from edgellm.memory.sizes import show_size

    rows = [("path", f"{report.path} ({report.kind})")]
    if report.name is not None:
        rows += [("name", report.name), ("architecture", report.architecture or "")]
    if report.parameters is not None:
        active = report.active_parameters
        of_a_token = "" if active is None else f", of which a token goes through {active:,}"
        rows.append(("parameters", f"{report.parameters:,}{of_a_token}"))
    if report.stored_bytes is not None:
        each = "" if report.bits_per_weight is None else f", {report.bits_per_weight:.2f} bits a weight"
        rows.append(("stored", show_size(report.stored_bytes) + each))
    if report.quantization is not None:
        rows.append(("quantization", report.quantization))
    rows += [("", _as_line(way)) for way in report.storage]
    if report.quantized is not None:
        lines = list(_of_quantized(report.quantized))
        rows += [("quantized", lines[0]), *(("", line) for line in lines[1:])]
    if report.kv_bytes_per_token is not None:
        sizes = [f"{size / 1024:.4g} KiB in {dtype}" for dtype, size in report.kv_bytes_per_token.items()]
        rows.append(("KV cache", f"{', '.join(sizes)} a token"))
    if report.context is not None:
        rows.append(("context", f"{report.context:,} tokens"))
    if report.tokens is not None:
        rows.append(("tokenizer", f"{report.tokens:,} tokens; {_ends(report.eos_ids)}"))
    if report.chat_template is not None:
        works = "yes" if report.chat_error is None else f"yes, but of no use: {report.chat_error}"
        rows.append(("chat template", works if report.chat_template else "no"))
    if report.built_for is not None:
        rows.append(("built for", _of_build(report.built_for)))
    rows += [("refused", reason) for reason in report.refused]
    return "\n".join(f"{name:<13}  {what}" for name, what in rows)


def _as_line(way: Storage) -> str:
    if not way.group:
        return f"{way.weights:,} weights of {way.bits} bits"
    offsets = " with offsets" if way.offsets else ""
    return f"{way.weights:,} weights of {way.bits} bits in groups of {way.group}{offsets}"


def _of_build(built: BuiltFor) -> str:
    slots = f"{built.max_batch_size} slot{'' if built.max_batch_size == 1 else 's'}"
    return (
        f"{slots} of {built.max_seq_len:,} tokens, steps of {built.max_num_tokens:,}, "
        f"{built.executor} {built.compute}"
    )


def _of_quantized(made: Quantized) -> Iterator[str]:
    calibrated = (
        f"calibrated on {made.calibration_tokens:,} tokens" if made.calibration_tokens else "uncalibrated"
    )
    yield f"{made.linear} in groups of {made.group_size}, embedding and head {made.ends}, {calibrated}"
    yield f"relative error of the weights {100 * made.error:.2f} %"
    if (found := made.divergence) is not None:
        yield (
            f"KL from the unquantized model on {found['tokens']:,} tokens: mean {found['kl']:.4f} nats, "
            f"largest {found['largest_kl']:.3f}; same first choice {100 * found['agreement']:.1f} %"
        )


def _ends(eos_ids: Sequence[int]) -> str:
    return f"an answer ends with {' or '.join(map(str, eos_ids))}"

"""`edgellm plan ENGINE|CHECKPOINT`: what serving it takes, line by line, and the largest shapes that fit."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgellm.commands.quantizing import add_recipe_flags, recipe_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgellm.engine_config import Compute
    from edgellm.memory.budget import Budget
    from edgellm.memory.config import MemoryConfig
    from edgellm.memory.cpu import CpuFootprint
    from edgellm.memory.cuda import CudaFootprint
    from edgellm.memory.plan import Line, Plan, Shape
    from edgellm.memory.tensorrt import TensorRtFootprint
    from edgellm.memory.tensorrt_estimate import TensorRtEstimate
    from edgellm.model.kv_cache import KvCache

SIZES = ("max_batch_size", "max_seq_len", "max_num_tokens")


@dataclass(frozen=True, slots=True)
class Subject:
    """What is planned for.

    Attributes:
        name: the model's.
        footprint: the executor's.
        shape: the sizes asked for, or as built, or the defaults of `edgellm build`.
        longest: tokens that the model was trained for.
        executor: `cpu`, `cuda` or `tensorrt`.
        rebuild: flags of `edgellm build` that the engine was not built with.
    """

    name: str
    footprint: CpuFootprint | CudaFootprint | TensorRtFootprint | TensorRtEstimate
    shape: Shape
    longest: int
    executor: str
    rebuild: tuple[str, ...] = ()


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser("plan", help="how much memory an engine takes, and what fits")
    parser.add_argument("path", type=Path, metavar="ENGINE|CHECKPOINT", help="built already, or not yet")
    parser.add_argument(
        "--budget",
        metavar="SIZE",
        default="auto",
        help="such as 480MiB or 4GiB; auto: what is free here and now (default %(default)s)",
    )
    parser.add_argument(
        "--reserve",
        metavar="SIZE",
        default="256MiB",
        help="what auto leaves to everything else (default %(default)s)",
    )
    for size in SIZES:
        flag = "--" + size.replace("_", "-")
        parser.add_argument(flag, type=int, metavar="N", help="as built, or as `edgellm build` would")
    parser.add_argument("--kv-cache", choices=("fp32", "fp16", "int8"), help="element type of the KV cache")
    parser.add_argument("--compute", choices=("int8", "fp32"), help="how the CPU's linear layers compute")
    parser.add_argument(
        "--executor", choices=("cpu", "cuda", "tensorrt"), help="of a checkpoint (default cpu)"
    )
    parser.add_argument(
        "--sm",
        metavar="N,…",
        help="of a checkpoint: compute capabilities of the devices, such as 87 for Orin (cuda: usual ones, "
        "whichever takes most; tensorrt: one)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: one for each core)")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument(
        "--root", type=Path, default=Path("/"), metavar="DIR", help="where /proc is (default /)"
    )
    add_recipe_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan.

    Raises:
        ConfigError: it exceeds an absolute budget, or all that the board has.
        TemporaryShortage: it exceeds what is free now.
        OperatorError: the flags, the engine or the checkpoint; see edgellm.errors.
    """
    from edgellm.memory.budget import find_budget
    from edgellm.memory.plan import frontier, make_plan
    from edgellm.memory.promise import refusal
    from edgellm.memory.sizes import show_size

    budget = find_budget(_memory_config(args), args.root)
    subject = _subject(args)
    plan = make_plan(subject.footprint, subject.shape, budget.bytes)
    fitting = frontier(
        subject.footprint,
        budget=budget.bytes,
        longest=subject.longest,
        max_num_tokens=subject.shape.max_num_tokens,
    )
    print(_as_json(subject, plan, budget, fitting) if args.json else _as_text(subject, plan, budget, fitting))
    if kind := refusal(plan, budget):
        raise kind(f"{show_size(plan.total)} do not fit {show_size(budget.bytes)} ({budget.text})")
    return 0


def _memory_config(args: argparse.Namespace) -> MemoryConfig:
    from edgellm.errors import UsageError
    from edgellm.memory.config import MemoryConfig

    try:
        return MemoryConfig(budget=args.budget, reserve=args.reserve)
    except ValueError as error:
        raise UsageError(f"--{error}") from None


def _subject(args: argparse.Namespace) -> Subject:
    from edgellm.enginedir import is_engine

    return _engine(args) if is_engine(args.path) else _checkpoint(args)


def _engine(args: argparse.Namespace) -> Subject:
    from edgellm.commands.build import build_config
    from edgellm.enginedir import open_engine
    from edgellm.errors import UsageError
    from edgellm.memory.footprints import footprint_of
    from edgellm.memory.plan import Shape, with_tokens
    from edgellm.server_config import ServerConfig

    engine = open_engine(args.path)
    if recipe_of(args) is not None:
        raise UsageError(f"--quant {args.quant} goes with a checkpoint; {args.path} is an engine")
    if args.sm is not None:
        raise UsageError(f"--sm {args.sm} goes with a checkpoint; {args.path} is an engine")
    asked = {name: getattr(args, name) for name in SIZES}
    sizes = {name: getattr(engine.build, name) if size is None else size for name, size in asked.items()}
    shape = Shape(**sizes)
    if args.max_num_tokens is None:
        shape = with_tokens(shape)
    build_config(engine.spec, **asdict(shape))  # refuses what makes no sense
    footprint = footprint_of(engine, threads=_threads(args), server=ServerConfig(), root=args.root)
    executor = engine.config.edgellm.executor
    _refuse(args, executor)
    kv_cache, compute = args.kv_cache or engine.kv_cache, args.compute or engine.compute
    beyond = [name for name in SIZES if getattr(shape, name) > getattr(engine.build, name)]
    beyond += ["kv_cache"] * (kv_cache != engine.kv_cache) + ["compute"] * (compute != engine.compute)
    return Subject(
        engine.model_name,
        _changed(footprint, kv_cache, compute),
        shape,
        engine.spec.max_context,
        executor,
        tuple("--" + name.replace("_", "-") for name in beyond),
    )


def _checkpoint(args: argparse.Namespace) -> Subject:
    from edgellm.checkpoint import open_checkpoint
    from edgellm.commands.build import DEFAULT_NUM_TOKENS, build_config, refuse_model_name
    from edgellm.memory.cpu import CpuFootprint
    from edgellm.memory.footprints import cuda_footprint, tensorrt_estimate
    from edgellm.memory.plan import Shape
    from edgellm.model.inventory import take_inventory
    from edgellm.quantize.checkpoint import QuantizedCheckpoint

    refuse_model_name(args.path)
    checkpoint = open_checkpoint(args.path)
    recipe = recipe_of(args)
    if recipe is not None:
        checkpoint = QuantizedCheckpoint(checkpoint, recipe)
    executor = args.executor or "cpu"
    _refuse(args, executor)
    build = build_config(
        checkpoint.spec,
        **{name: getattr(args, name) for name in SIZES},
        usual_num_tokens=DEFAULT_NUM_TOKENS[executor],
    )
    sms = _compute_capabilities(args, executor)
    footprint: CpuFootprint | CudaFootprint | TensorRtEstimate
    if executor == "cuda":
        footprint = cuda_footprint(checkpoint, kv_cache=args.kv_cache or "fp16", sms=sms, root=args.root)
    elif executor == "tensorrt":
        footprint = tensorrt_estimate(checkpoint, sms=sms, root=args.root)
    else:
        footprint = CpuFootprint(
            spec=checkpoint.spec,
            weights=take_inventory(checkpoint),
            compute=args.compute or "int8",
            kv_cache=args.kv_cache or "fp32",
            threads=_threads(args),
        )
    return Subject(
        checkpoint.name,
        footprint,
        Shape(build.max_batch_size, build.max_seq_len, build.max_num_tokens),
        checkpoint.spec.max_context,
        executor,
    )


def _compute_capabilities(args: argparse.Namespace, executor: str) -> tuple[int, ...]:
    """Those that --sm names.

    Raises:
        UsageError: it goes with another executor, or one is none.
    """
    from edgellm.commands.target import read_compute_capabilities
    from edgellm.errors import UsageError

    if args.sm is not None and executor == "cpu":
        raise UsageError("--sm: only --executor cuda and tensorrt are for a device")
    return read_compute_capabilities(args.sm, executor)


def _refuse(args: argparse.Namespace, executor: str) -> None:
    """Refuse flags of another executor.

    Raises:
        UsageError: naming the flag.
    """
    from edgellm.commands.target import TARGETS
    from edgellm.errors import UsageError

    if args.executor not in (None, executor):
        raise UsageError(f"--executor {args.executor}: {args.path} was built for {executor}")
    for flag, choices in zip(("compute", "kv_cache"), TARGETS[executor], strict=True):
        asked = getattr(args, flag)
        if asked is not None and asked not in choices:
            raise UsageError(
                f"--{flag.replace('_', '-')} {asked}: the {executor} executor has {' and '.join(choices)}"
            )


def _changed(
    footprint: CpuFootprint | CudaFootprint | TensorRtFootprint, kv_cache: KvCache, compute: Compute
) -> CpuFootprint | CudaFootprint | TensorRtFootprint:
    """The footprint with other caches, or of linears that compute otherwise."""
    from edgellm.executor.cuda_build import cache_kind
    from edgellm.memory.cpu import CpuFootprint
    from edgellm.memory.cuda import CudaFootprint

    if isinstance(footprint, CpuFootprint):
        return replace(footprint, kv_cache=kv_cache, compute=compute)
    if not isinstance(footprint, CudaFootprint):
        return footprint  # it has one kind of either
    return replace(footprint, kv_cache=cache_kind(kv_cache))


def _threads(args: argparse.Namespace) -> int:
    from edgellm.config import EngineConfig
    from edgellm.executor.factory import threads_of

    return args.threads or threads_of(EngineConfig())


def _as_text(subject: Subject, plan: Plan, budget: Budget, fitting: Sequence[Shape]) -> str:
    from edgellm.memory.sizes import show_size

    shape, footprint = plan.shape, subject.footprint
    assert plan.headroom is not None
    rows = [(line.name, show_size(line.bytes), _how(line)) for line in plan.lines]
    rows += [
        ("total", show_size(plan.total), f"at READY {show_size(plan.at_ready)}"),
        *_on_device(plan),
        ("budget", show_size(budget.bytes), budget.text),
        ("headroom", show_size(plan.headroom), "" if plan.fits else "it does not fit"),
    ]
    name, size = (max(len(row[column]) for row in rows) for column in (0, 1))
    text = [
        f"{subject.name}: {shape.max_batch_size} slots of {shape.max_seq_len} tokens, "
        f"steps of {shape.max_num_tokens}, {subject.executor} {footprint.compute}, "
        f"KV cache {footprint.kv_cache}",
        "",
        *(f"{part:{name}}  {amount:>{size}}  {how}".rstrip() for part, amount, how in rows),
        "",
        f"What fits, for at most the {subject.longest} tokens that the model was trained for:",
        *_table(fitting),
    ]
    if subject.rebuild:
        text += ["", f"The engine was not built with this {', '.join(subject.rebuild)}: build it again."]
    return "\n".join(text)


def _on_device(plan: Plan) -> list[tuple[str, str, str]]:
    """What a GPU with memory of its own has to have, beside the budget."""
    from edgellm.memory.sizes import show_size

    if plan.unified:
        return []
    return [("on the GPU", show_size(plan.on_device), "of its own memory, not of the budget")]


def _how(line: Line) -> str:
    return line.formula if line.kind == "resident" else f"[{line.kind}] {line.formula}"


def _table(fitting: Sequence[Shape]) -> list[str]:
    if not fitting:
        return ["nothing"]
    cells = [(str(each.max_batch_size), str(each.max_seq_len)) for each in fitting]
    widths = [max(map(len, pair)) for pair in cells]
    return [
        f"{label}  " + "  ".join(f"{pair[i]:>{width}}" for pair, width in zip(cells, widths, strict=True))
        for i, label in enumerate(("max_batch_size", "max_seq_len   "))
    ]


def _as_json(subject: Subject, plan: Plan, budget: Budget, fitting: Sequence[Shape]) -> str:
    return json.dumps(
        {
            "model": subject.name,
            "executor": subject.executor,
            "compute": subject.footprint.compute,
            "kv_cache": subject.footprint.kv_cache,
            "shape": asdict(plan.shape),
            "lines": [asdict(line) for line in plan.lines],
            "total": plan.total,
            "at_ready": plan.at_ready,
            "unified": plan.unified,
            "on_device": plan.on_device,
            "budget": asdict(budget),
            "headroom": plan.headroom,
            "fits": [asdict(shape) for shape in fitting],
            "rebuild": list(subject.rebuild),
        },
        ensure_ascii=False,
        indent=2,
    )

"""`edgellm build --quant`: the flags, and what happens between a checkpoint and the engine."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from edgellm.checkpoint import Checkpoint
    from edgellm.executor.base import Progress
    from edgellm.model.numpy_graph import Tokens
    from edgellm.quantize.recipe import Recipe
    from edgellm.quantize.report import Matrix, QuantizationReport


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what an unquantized checkpoint can be quantized with."""
    flags = add_recipe_flags(parser)
    flags.add_argument(
        "--calibrate",
        type=Path,
        metavar="TEXTFILE",
        help="text like what the model will meet: what matters to it is quantized with less error; without "
        "--evaluate its last fifth is held out and compared on",
    )
    flags.add_argument(
        "--evaluate",
        type=Path,
        metavar="TEXTFILE",
        help="text on which to compare the quantized with the unquantized model",
    )


def add_recipe_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add what says how a quantized weight is stored."""
    flags = parser.add_argument_group("quantizing", "of an unquantized checkpoint (docs/models.md)")
    flags.add_argument(
        "--quant",
        choices=("none", "int4", "int8"),
        default="none",
        help="bits of the linear layers; none keeps every weight as it is (default %(default)s)",
    )
    flags.add_argument(
        "--group-size",
        type=int,
        choices=(32, 64, 128),
        help="weights of a row that share a scale: fewer are more exact and larger (default 64)",
    )
    flags.add_argument(
        "--quant-head",
        choices=("none", "int4", "int8"),
        help="bits of the embedding and the head (default int8)",
    )
    return flags


def recipe_of(args: argparse.Namespace) -> Recipe | None:
    """What the flags ask for; None for `--quant none`.

    Raises:
        UsageError: flags that want --quant without it.
    """
    from edgellm.errors import UsageError
    from edgellm.quantize.recipe import DEFAULT_GROUP_SIZE, Recipe

    if args.quant != "none":
        return Recipe(
            linear=args.quant, ends=args.quant_head or "int8", group=args.group_size or DEFAULT_GROUP_SIZE
        )
    for flag in ("group_size", "quant_head", "calibrate", "evaluate"):
        value = getattr(args, flag, None)
        if value is not None:
            name = flag.replace("_", "-")
            raise UsageError(f"--{name} {value} goes with --quant int4 or --quant int8")
    return None


class QuantizedBuild:
    """What a build with --quant does besides.

    Attributes:
        checkpoint: gives quantized weights.
    """

    def __init__(self, args: argparse.Namespace, checkpoint: Checkpoint, recipe: Recipe) -> None:
        from edgellm.quantize.checkpoint import QuantizedCheckpoint
        from edgellm.quantize.text import read_text, split_text

        self._recipe = recipe
        self._unquantized = checkpoint
        self.checkpoint = QuantizedCheckpoint(checkpoint, self._recipe)
        self._text = self._held_out_text = None
        self._what, self._held_out_what = f"--calibrate {args.calibrate}", f"--evaluate {args.evaluate}"
        if args.calibrate is not None:
            self._text = read_text(args.calibrate, "--calibrate")
        if args.evaluate is not None:
            self._held_out_text = read_text(args.evaluate, "--evaluate")
        elif self._text is not None:
            self._text, self._held_out_text = split_text(self._text)
            self._held_out_what = f"the last fifth of {self._what}, which is held out,"
            self._what += " without its last fifth, which is held out,"
        self._calibration: Tokens | None = None
        self._held_out: Tokens | None = None
        self._report: QuantizationReport | None = None

    @classmethod
    def from_flags(cls, args: argparse.Namespace, checkpoint: Checkpoint) -> QuantizedBuild | None:
        """None for `--quant none`.

        Raises:
            BuildError: the architecture is none that edgellm builds.
            CheckpointError: the weights are quantized already.
            UsageError: flags that want --quant without it, groups that do not fit, or a text that cannot be
                read.
        """
        recipe = recipe_of(args)
        return None if recipe is None else cls(args, checkpoint, recipe)

    def calibrate(self, draft: Path, progress: Progress) -> None:
        """Find what the text of --calibrate says, if there is one.

        Args:
            draft: has the tokenizer.

        Raises:
            UsageError: a text is too short.
        """
        from edgellm.enginedir import TOKENIZER
        from edgellm.quantize import text
        from edgellm.quantize.calibrate import calibrate
        from edgellm.text.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_file(draft / TOKENIZER, bos_id=self._unquantized.bos_id)
        spec, bos = self._unquantized.spec, self._unquantized.add_bos
        cut = partial(text.cut, tokenizer=tokenizer, longest=spec.max_context, bos=bos)
        if self._text is not None:
            self._calibration = cut(
                self._text, most=text.CALIBRATION_TOKENS, fewest=text.FEWEST_CALIBRATION, what=self._what
            )
        if self._held_out_text is not None:
            self._held_out = cut(
                self._held_out_text,
                most=text.HELD_OUT_TOKENS,
                fewest=text.FEWEST_HELD_OUT,
                what=self._held_out_what,
            )
        if self._calibration is not None:
            self.checkpoint.adjust(calibrate(self._unquantized, self._recipe, self._calibration, progress))

    def write_report(self, draft: Path, progress: Progress) -> None:
        """Write quantization.json: what it cost. The quantized weights were read before."""
        import msgspec

        from edgellm.enginedir import QUANTIZATION, write_json
        from edgellm.quantize.divergence import measure_divergence
        from edgellm.quantize.report import make_report

        divergence = None
        if self._held_out is not None:
            divergence = measure_divergence(self._unquantized, self.checkpoint, self._held_out, progress)
        self._report = make_report(
            self._recipe,
            self.checkpoint.errors(),
            calibration_tokens=0 if self._calibration is None else self._calibration.size,
            divergence=divergence,
        )
        write_json(draft / QUANTIZATION, msgspec.to_builtins(self._report))

    def show_report(self) -> None:
        """Print what `write_report` wrote."""
        assert self._report is not None
        _show(self._report)


def _show(report: QuantizationReport) -> None:
    """Print a row for each layer, a column for each kind of matrix: errors in percent."""
    from edgellm.bench.report import Column, Report, show

    rows = list(_rows(report.matrices))
    kinds = list(dict.fromkeys(kind for row in rows for kind in row if kind not in ("layer", "all")))
    columns = [Column("layer", ("layer",), right=False)]
    columns += [Column(kind, (kind,), "{:.2f}") for kind in (*kinds, "all")]
    facts: dict[str, str] = {
        "quantized": f"{report.linear} in groups of {report.group_size}, embedding and head {report.ends}",
        "calibration": f"{report.calibration_tokens} tokens" if report.calibration_tokens else "none",
    }
    notes = ["Relative error of the weights (root mean square), in percent."]
    if (found := report.divergence) is not None:
        notes.append(
            f"KL from the unquantized model on {found.tokens} held-out tokens: mean {found.kl:.4f} nats, "
            f"largest {found.largest_kl:.3f}. Same first choice: {100 * found.agreement:.1f} %. "
            f"Perplexity: {found.perplexity:.3f}, unquantized {found.unquantized_perplexity:.3f}."
        )
    show(Report(facts, columns, rows, notes=notes))


def _rows(errors: Sequence[Matrix]) -> Iterator[dict[str, str | float]]:
    from edgellm.quantize.report import place_of, relative_error

    by_row: dict[str, dict[str, list[Matrix]]] = {}
    for one in errors:
        layer, kind = place_of(one.name)
        row = kind if layer is None else str(layer)
        by_row.setdefault(row, {}).setdefault("all" if layer is None else kind, []).append(one)
    for row, by_kind in by_row.items():
        everything = [one for ones in by_kind.values() for one in ones]
        cells = {kind: 100 * relative_error(ones) for kind, ones in by_kind.items()}
        yield {"layer": row, **cells, "all": 100 * relative_error(everything)}
    yield {"layer": "all", "all": 100 * relative_error(errors)}

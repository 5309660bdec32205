"""Compare edgellm's quantizer with llama.cpp's: one float16 model, the same text, the same float32 engine.

    python tools/compare_quantizers.py MODEL_DIRECTORY --text HELD_OUT --calibrate TRAIN \
        --llama-python OTHER_VENV/bin/python --markdown

The model is written as an F16 GGUF file, which llama.cpp's `llama_model_quantize` (run in the interpreter
that --llama-python names) quantizes. Each result, edgellm's and llama.cpp's, is built with `--compute fp32`
and run by edgellm's executor, so that only weights differ. KL is KL(unquantized ‖ quantized) in nats, the
mean over all positions of sequences of the text; the ratio's interval is a bootstrap over whole sequences.

The model must never have been on a quantizer's grid: `tools/train_tiny.py` makes one. `--noise` adds normal
noise to the layers' matrices, a part of their root mean square, which takes a model that was quantized off
its grid. In the rows marked `layers alone` embedding and head are float16 on both sides. Ends with 1 if int4
in groups of 32 or 64 has a larger KL than Q4_0.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgellm.bench.report import Column, Report, show
from edgellm.checkpoint import Checkpoint, open_checkpoint
from edgellm.enginedir import BuildConfig
from edgellm.executor.base import Row, Step, Want
from edgellm.executor.cpu import CpuExecutor
from edgellm.model.onnx import emit
from edgellm.model.weights import Dense, Float, Weight
from edgellm.quantize.calibrate import calibrate
from edgellm.quantize.checkpoint import QuantizedCheckpoint
from edgellm.quantize.recipe import Kind, Recipe, matrices_of
from edgellm.quantize.text import CALIBRATION_TOKENS, cut
from edgellm.quantize.wrapped import WrappedCheckpoint
from edgellm.text.tokenizer import Tokenizer

RESAMPLES: Final = 10_000

QUANTIZE: Final = """
import ctypes, sys, llama_cpp
source, target, ftype, ends = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + ftype)
if ends == "f16":
    params.output_tensor_type = params.token_embedding_type = llama_cpp.GGML_TYPE_F16
status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
print(llama_cpp.__version__)
sys.exit(status)
"""
_NAMES: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to quantize.

    Attributes:
        name: for the table.
        bits: per weight of the layers' matrices, scales and offsets included.
        make: gives the quantized model.
        against: the row that it is compared with, or None.
    """

    name: str
    bits: float
    make: Callable[[], Checkpoint]
    against: str | None = None


class Noisy(WrappedCheckpoint):
    """A checkpoint as float16, its layers' matrices with normal noise of a part of their root mean square."""

    def __init__(self, inner: Checkpoint, noise: float) -> None:
        super().__init__(inner)
        self._noise = noise

    def tensor(self, name: str) -> Weight:
        """Dense, float16 numbers; the same for each name every time."""
        values = super().tensor(name).dequantize()
        if self._noise and values.ndim == 2 and name.startswith("layers."):
            chance = np.random.default_rng(list(name.encode()))
            size = self._noise * np.sqrt(np.mean(np.square(values)))
            values = values + chance.normal(0, size, values.shape).astype(np.float32)
        if values.ndim == 2:
            values = values.astype(np.float16).astype(np.float32)
        return Dense(name, values.shape, "f16", lambda begin, end: values[begin:end])


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print."""
    args = _arguments(argv)
    with tempfile.TemporaryDirectory() as scratch:
        return _compare(args, Path(scratch))


def _compare(args: argparse.Namespace, scratch: Path) -> int:
    model = Noisy(open_checkpoint(args.model), args.noise)
    tokenizer_file = scratch / "tokenizer.json"
    tokenizer_file.write_bytes(model.tokenizer_json())
    tokenizer = Tokenizer.from_file(tokenizer_file)
    longest = min(args.length, model.spec.max_context)
    tokens = tokenizer.encode(args.text.read_text(encoding="utf-8"))
    begins = np.linspace(0, len(tokens) - longest, args.sequences).astype(int)
    sequences = np.stack([tokens[begin : begin + longest] for begin in begins])
    exact = _log_probabilities(model, sequences)

    f16 = scratch / "f16.gguf"
    write_gguf(model, f16)
    calibration = None
    if args.calibrate is not None:
        calibration = cut(
            args.calibrate.read_text(encoding="utf-8"),
            tokenizer,
            most=CALIBRATION_TOKENS,
            fewest=1,
            longest=model.spec.max_context,
            bos=False,
            what=str(args.calibrate),
        )

    def ours(group: int, ends: Kind, *, calibrated: bool = False) -> Callable[[], Checkpoint]:
        def make() -> Checkpoint:
            recipe = Recipe("int4", ends, group)
            made = QuantizedCheckpoint(model, recipe)
            if calibrated:
                assert calibration is not None
                made.adjust(calibrate(model, recipe, calibration))
            return made

        return make

    versions: list[str] = []

    def theirs(ftype: str, ends: str = "") -> Callable[[], Checkpoint]:
        def make() -> Checkpoint:
            target = scratch / f"{ftype}{ends}.gguf"
            command = [args.llama_python, "-c", QUANTIZE, f16, target, ftype, ends]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            versions.append(done.stdout.split()[-1])
            return open_checkpoint(target)

        return make

    columns = {model.tensor(name).shape[1] for name in matrices_of(model, Recipe("int4", "none", 32))}
    groups = [group for group in (32, 64, 128) if not any(count % group for count in columns)]
    candidates = [
        Candidate("llama.cpp Q4_0", 4.5, theirs("Q4_0")),
        Candidate("llama.cpp Q4_1", 5.0, theirs("Q4_1"), "llama.cpp Q4_0"),
        Candidate("llama.cpp Q4_0, layers alone", 4.5, theirs("Q4_0", "f16")),
    ]
    for group in groups:
        name, bits = f"edgellm int4, groups of {group}", 4 + 32 / group
        candidates.append(Candidate(name, bits, ours(group, "int8"), "llama.cpp Q4_0"))
        alone = ours(group, "none")
        candidates.append(Candidate(f"{name}, layers alone", bits, alone, "llama.cpp Q4_0, layers alone"))
        if calibration is not None:
            candidates.append(
                Candidate(f"{name}, calibrated", bits, ours(group, "int8", calibrated=True), "llama.cpp Q4_0")
            )
    found: dict[str, NDArray[np.float64]] = {}
    rows = []
    for candidate in candidates:
        logs = _log_probabilities(candidate.make(), sequences)
        kl = found[candidate.name] = (np.exp(exact) * (exact - logs)).sum(axis=-1)
        row: dict[str, Any] = {"name": candidate.name, "bits": candidate.bits, "kl": float(kl.mean())}
        row |= {"largest": float(kl.max()), "agreement": _agreement(exact, logs), "ratio": None}
        row |= {"low": None, "high": None}
        if candidate.against is not None:
            row["ratio"], row["low"], row["high"] = _ratio(kl, found[candidate.against])
        rows.append(row)
    show(
        Report(
            {
                "model": f"{model.name}, float16" + (f", noise {args.noise}" if args.noise else ""),
                "text": f"{args.text.name}, {sequences.shape[0]} sequences of {sequences.shape[1]} tokens",
                "perplexity": f"{_perplexity(exact, sequences):.2f}",
                "llama.cpp": f"llama-cpp-python {versions[0]}",
            },
            [
                Column("quantizer", ("name",), right=False),
                Column("bits per weight", ("bits",), "{:.2f}"),
                Column("KL", ("kl",), "{:.5f}"),
                Column("largest", ("largest",), "{:.3f}"),
                Column("same first choice", ("agreement",), "{:.1%}"),
                Column("KL over Q4_0's [95 %]", ("ratio", "low", "high"), "{:.2f} [{:.2f}, {:.2f}]"),
            ],
            rows,
        ),
        "markdown" if args.markdown else None,
    )
    missed = [
        str(row["name"])
        for row in rows
        if row["ratio"] is not None
        and row["ratio"] > 1
        and str(row["name"]).startswith("edgellm")
        and "128" not in str(row["name"])
    ]
    for name in missed:
        print(f"missed: {name}", file=sys.stderr)
    return 1 if missed else 0


def _log_probabilities(checkpoint: Checkpoint, sequences: NDArray[np.int32]) -> NDArray[np.float64]:
    """Of every word behind every position, [sequences, length, vocab]: `--compute fp32` on the CPU."""
    count, length = sequences.shape
    build = BuildConfig(
        max_input_len=length - 1,
        max_seq_len=length,
        max_batch_size=count,
        max_num_tokens=count,
        opt_batch_size=count,
        opt_num_tokens=count,
    )
    with tempfile.TemporaryDirectory() as scratch:
        emit(checkpoint, Path(scratch), build, compute="fp32", progress=lambda _part, _done: None)
        executor = CpuExecutor(
            Path(scratch),
            checkpoint.spec,
            threads=2,
            max_batch_size=count,
            max_seq_len=length,
            max_num_tokens=count,
        )
        executor.load(lambda _part, _done: None)
        steps = []
        for past in range(length):
            step = Step([Row(i, past, sequences[i, past : past + 1], Want.LOGITS) for i in range(count)])
            logits = executor.collect(executor.submit(step)).logits
            assert logits is not None
            steps.append(logits.astype(np.float64))
        executor.close()
    logits = np.stack(steps, axis=1)
    logits = logits - logits.max(axis=-1, keepdims=True)
    logs: NDArray[np.float64] = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return logs


def _ratio(kl: NDArray[np.float64], other: NDArray[np.float64]) -> tuple[float, float, float]:
    """Of the means, and a 95 % interval from resampled sequences."""
    ours, theirs = kl.mean(axis=1), other.mean(axis=1)
    picks = np.random.default_rng(0).integers(0, len(ours), (RESAMPLES, len(ours)))
    low, high = np.quantile(ours[picks].mean(axis=1) / theirs[picks].mean(axis=1), (0.025, 0.975))
    return float(ours.mean() / theirs.mean()), float(low), float(high)


def _agreement(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    return float((one.argmax(axis=-1) == other.argmax(axis=-1)).mean())


def _perplexity(logs: NDArray[np.float64], sequences: NDArray[np.int32]) -> float:
    following = np.take_along_axis(logs[:, :-1], sequences[:, 1:, None].astype(np.int64), axis=-1)
    return float(np.exp(-following.mean()))


def write_gguf(model: Checkpoint, path: Path) -> None:
    """Write a llama as GGUF: matrices F16, norms F32, q and k in llama.cpp's order of rows."""
    import gguf

    spec = model.spec
    if spec.architecture != "LlamaForCausalLM" or spec.rotary_scaling is not None:
        raise SystemExit(f"only an unscaled LlamaForCausalLM can be compared, not {spec.architecture}")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(spec.num_hidden_layers)
    writer.add_context_length(spec.max_position_embeddings)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_attention_heads)
    writer.add_head_count_kv(spec.num_key_value_heads)
    writer.add_key_length(spec.head_size)
    writer.add_value_length(spec.head_size)
    writer.add_layer_norm_rms_eps(spec.norm_epsilon)
    writer.add_rope_freq_base(spec.rotary_base)
    writer.add_rope_dimension_count(spec.head_size)
    writer.add_vocab_size(spec.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"<{number}>" for number in range(spec.vocab_size)])  # read by nobody
    writer.add_token_types([int(gguf.TokenType.NORMAL)] * spec.vocab_size)
    writer.add_token_merges(["< 0"])
    writer.add_eos_token_id(0)
    names = {"embed_tokens": "token_embd", "norm": "output_norm"}
    if model.has("lm_head"):
        names["lm_head"] = "output"
    for layer in range(spec.num_hidden_layers):
        names |= {f"layers.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in _NAMES.items()}
    heads = {"q_proj": spec.num_attention_heads, "k_proj": spec.num_key_value_heads}
    for ours, theirs in names.items():
        values = model.tensor(ours).dequantize()
        if (count := heads.get(ours.rsplit(".", 1)[-1])) is not None:
            values = _interleaved(values, count)
        writer.add_tensor(f"{theirs}.weight", values.astype(np.float16) if values.ndim == 2 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(values: Float, heads: int) -> Float:
    """Rows as llama.cpp rotates them (convert_hf_to_gguf.py, `LlamaModel.permute`)."""
    split = values.reshape(heads, 2, -1, values.shape[1])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(values.shape))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="to compare on")
    parser.add_argument("--calibrate", type=Path, help="to calibrate on; without, nothing is calibrated")
    parser.add_argument("--llama-python", required=True, help="interpreter that has llama-cpp-python")
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--sequences", type=int, default=16, metavar="N")
    parser.add_argument("--length", type=int, default=128, metavar="N", help="tokens of a sequence")
    parser.add_argument("--markdown", action="store_true")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())

"""How fast `edgellm build` is and how much memory it takes, on random checkpoints as wide as real models.

    python tools/measure_build.py --shape qwen3-8b --layers 4 --formats bf16 awq gptq q4_k q8_0
    python tools/measure_build.py --formats bf16 -- --quant int4

A checkpoint of each format is written to --directory with the true widths, vocabulary included, and as many
layers as asked for: the peak of a build does not depend on them. Then `edgellm build` runs in a process of
its own, with the flags after `--`: its whole time, start and fsync included, against the bytes of the
checkpoint's tensors; the peak of its resident set as the kernel counts it (VmHWM; ru_maxrss would count this
process too). Of several --rounds the fastest is printed, and the highest peak. Processor seconds, of all
threads together, are what to compare on a machine or disk that others use, too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import gguf
import numpy as np
import tokenizers
from numpy.typing import NDArray

GROUP: Final = 128
"""Of AWQ and GPTQ; the published models' most common one."""
PATTERN_BYTES: Final = 1 << 22
"""Random numbers are made once and repeated: what they are does not change what a build costs."""

_CHILD: Final = """
import sys
from pathlib import Path
from edgellm.cli import main
code = main(sys.argv[1:])
print(Path("/proc/self/status").read_text())
sys.exit(code)
"""

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Shape:
    """A model's widths, by config.json's names."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """[N, K] of a layer's linears, by transformers' names."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }

    def norms(self) -> dict[str, int]:
        """Sizes of a layer's norms, by transformers' names."""
        heads = {f"self_attn.{part}_norm": self.head_dim for part in "qk"}
        return {"input_layernorm": self.hidden_size, "post_attention_layernorm": self.hidden_size} | heads


SHAPES: Final = {
    "qwen3-8b": Shape(4096, 12288, 32, 8, 128, 151936),
    "qwen3-0.6b": Shape(1024, 3072, 16, 8, 128, 151936),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Write, build, print."""
    args = _parse(argv)
    shape = SHAPES[args.shape]
    print(f"{args.shape}, {args.layers} layers, build {' '.join(args.flags)}, {args.rounds} rounds")
    print(
        f"{'format':8} {'checkpoint MB':>13} {'engine MB':>9} {'seconds':>7} {'MB/s':>5} {'CPU s':>6} "
        f"{'peak MB':>7}"
    )
    with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
        for name in args.formats:
            checkpoint, engine = Path(scratch, name), Path(scratch, "engine")
            stored = FORMATS[name](checkpoint, shape, args.layers)
            found = [_build(checkpoint, engine, args.flags) for _ in range(args.rounds)]
            seconds, processor, peak = (*min(found)[:2], max(build.peak for build in found))
            size = sum(file.stat().st_size for file in engine.iterdir())
            print(
                f"{name:8} {stored / 1e6:13.0f} {size / 1e6:9.0f} {seconds:7.1f} "
                f"{stored / 1e6 / seconds:5.0f} {processor:6.1f} {peak / 1e6:7.0f}",
                flush=True,
            )
            shutil.rmtree(engine)
            shutil.rmtree(checkpoint) if checkpoint.is_dir() else checkpoint.unlink()
    return 0


class Build(NamedTuple):
    """Wall and processor seconds of a build, and the peak of its resident set in bytes."""

    seconds: float
    processor: float
    peak: int


def _build(checkpoint: Path, engine: Path, flags: Sequence[str]) -> Build:
    shutil.rmtree(engine, ignore_errors=True)
    command = [sys.executable, "-c", _CHILD, "build", str(checkpoint), "-o", str(engine), *flags]
    started, used = time.monotonic(), _children_s()
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds = time.monotonic() - started
    peak = int(re.findall(r"VmHWM:\s+(\d+) kB", output)[-1]) * 1024
    return Build(seconds, _children_s() - used, peak)


def _children_s() -> float:
    """Processor seconds of all threads of children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def write_safetensors(path: Path, shape: Shape, layers: int, quantization: str | None) -> int:
    """A directory of float16 and packed tensors, or of bfloat16 alone; gives the tensors' bytes."""
    path.mkdir()
    dense = "BF16" if quantization is None else "F16"
    tensors = dict(_tensors(shape, layers, quantization, dense))
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, size) in tensors.items():
        begin, end = end, end + math.prod(size) * _ITEMSIZE[dtype]
        header[name] = {"dtype": dtype, "shape": size, "data_offsets": [begin, end]}
    patterns = {dtype: _pattern(dtype) for dtype in _ITEMSIZE}
    with (path / "model.safetensors").open("wb") as file:
        encoded = json.dumps(header).encode()
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, (dtype, size) in tensors.items():
            if name.endswith("qzeros") and quantization == "gptq":
                pattern = np.full(PATTERN_BYTES, 0x77, np.uint8)
            else:
                pattern = patterns[dtype]
            _write_repeated(file.write, pattern, math.prod(size) * _ITEMSIZE[dtype])
    _write_config(path, shape, layers, quantization)
    return end


def _tensors(
    shape: Shape, layers: int, quantization: str | None, dense: str
) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        yield name, (dense, (shape.vocab_size, shape.hidden_size))
    for layer in range(layers):
        here = f"model.layers.{layer}"
        for name, size in shape.norms().items():
            yield f"{here}.{name}.weight", (dense, (size,))
        for name, (n, k) in shape.linears().items():
            if quantization is None:
                yield f"{here}.{name}.weight", (dense, (n, k))
                continue
            yield f"{here}.{name}.qweight", ("I32", (k, n // 8) if quantization == "awq" else (k // 8, n))
            yield f"{here}.{name}.qzeros", ("I32", (k // GROUP, n // 8))
            yield f"{here}.{name}.scales", (dense, (k // GROUP, n))
    yield "model.norm.weight", (dense, (shape.hidden_size,))


def _write_config(path: Path, shape: Shape, layers: int, quantization: str | None) -> None:
    settings = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "eos_token_id": 1,
        "hidden_act": "silu",
        "max_position_embeddings": 40960,
        "num_hidden_layers": layers,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        **vars(shape),
    }
    common = {"quant_method": quantization, "bits": 4, "group_size": GROUP}
    if quantization == "awq":
        settings["quantization_config"] = common | {"version": "gemm", "zero_point": True}
    elif quantization == "gptq":
        settings["quantization_config"] = common | {"desc_act": False, "sym": True}
    (path / "config.json").write_text(json.dumps(settings))
    tokens, merges = _vocabulary(shape.vocab_size)
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[(left, right) for left, right in (merge.split(" ") for merge in merges)],
        )
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": tokens[1]}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1]}))


def write_gguf(path: Path, shape: Shape, layers: int, kind: gguf.GGMLQuantizationType) -> int:
    """A GGUF file whose matrices are all of this type; gives the tensors' bytes."""
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(layers)
    writer.add_context_length(40960)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    tokens, merges = _vocabulary(shape.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([int(gguf.TokenType.NORMAL)] * len(tokens))
    writer.add_token_merges(merges)
    writer.add_eos_token_id(1)
    elements, block = gguf.GGML_QUANT_SIZES[kind]
    tensors = {
        name: (size, math.prod(size) // elements * block if len(size) == 2 else math.prod(size) * 4)
        for name, size in _gguf_tensors(shape, layers)
    }
    for name, (size, stored) in tensors.items():
        dtype = kind if len(size) == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor_info(name, size, np.dtype(np.float32), stored, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    # Factors of 0x1111, a small float16, at every place where a block may have one; the rest is random.
    blocks = np.random.default_rng(0).integers(0, 256, (PATTERN_BYTES // block, block), np.uint8)
    blocks[:, :4] = 0x11
    for size, stored in tensors.values():
        pattern = blocks.reshape(-1) if len(size) == 2 else _pattern("F32")
        writer.write_tensor_data(np.resize(pattern, stored))
    writer.close()
    return sum(stored for _, stored in tensors.values())


def _gguf_tensors(shape: Shape, layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
    }
    yield "token_embd.weight", (shape.vocab_size, shape.hidden_size)
    yield "output.weight", (shape.vocab_size, shape.hidden_size)
    for layer in range(layers):
        for name, size in shape.linears().items():
            yield f"blk.{layer}.{names[name]}.weight", size
        for name, width in shape.norms().items():
            yield f"blk.{layer}.{names[name]}.weight", (width,)
    yield "output_norm.weight", (shape.hidden_size,)


def _vocabulary(size: int) -> tuple[list[str], list[str]]:
    """So many byte-level tokens, made of two or three characters each, and the merges that make them."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pairs = [(left, right) for left, right in itertools.product(alphabet, alphabet)]
    triples = ((left + middle, right) for (left, middle), right in itertools.product(pairs, alphabet))
    merges = list(itertools.islice(itertools.chain(pairs, triples), size - len(alphabet)))
    return alphabet + [left + right for left, right in merges], [" ".join(pair) for pair in merges]


_ITEMSIZE: Final = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4}


def _pattern(dtype: str) -> Bytes:
    chance = np.random.default_rng(1)
    values = chance.standard_normal(PATTERN_BYTES // _ITEMSIZE[dtype]).astype(np.float32) * np.float32(0.02)
    numbers: dict[str, NDArray[Any]] = {
        "BF16": (values.view(np.uint32) >> 16).astype("<u2"),
        "F16": values.astype("<f2"),
        "F32": values,
        "I32": chance.integers(0, 256, PATTERN_BYTES, np.uint8),
    }
    return numbers[dtype].view(np.uint8)


def _write_repeated(write: Callable[[memoryview], Any], pattern: Bytes, size: int) -> None:
    for begin in range(0, size, len(pattern)):
        write(pattern[: min(len(pattern), size - begin)].data)


FORMATS: Final[dict[str, Callable[[Path, Shape, int], int]]] = {
    "bf16": partial(write_safetensors, quantization=None),
    "awq": partial(write_safetensors, quantization="awq"),
    "gptq": partial(write_safetensors, quantization="gptq"),
    "q4_k": partial(write_gguf, kind=gguf.GGMLQuantizationType.Q4_K),
    "q8_0": partial(write_gguf, kind=gguf.GGMLQuantizationType.Q8_0),
}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--layers", type=int, default=4, metavar="N")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="FORMAT")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument(
        "--directory", type=Path, metavar="PATH", help="a disk with room for both (default: /tmp)"
    )
    parser.add_argument("flags", nargs="*", metavar="FLAG", help="of edgellm build, after --")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())

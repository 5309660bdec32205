"""Train a small llama on the documentation that Python carries: a float16 model that nobody has quantized.

    python tools/train_tiny.py DIRECTORY

Needs torch and transformers, which edgellm does not; last run with 2.13.0 and 5.23.0 on Python 3.11. The
corpus is `pydoc_data.topics` (the language reference) and every docstring of the standard library, split by
document: every tenth is held out. DIRECTORY becomes a Hugging Face model directory with a byte-level BPE
vocabulary, plus `train.txt` and `held-out.txt`. The same Python, torch and number of threads make the same
model, if --steps ends the training and not --minutes.

Quantizers can only be compared on a model that was never on any quantizer's grid; published small ones that
are at hand as GGUF files all were.
"""

from __future__ import annotations

import argparse
import ast
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Final

import numpy as np

VOCABULARY: Final = 2048
LENGTH: Final = 256
BATCH: Final = 8
END: Final = "<|endoftext|>"
SHORTEST: Final = 200
"""Characters of a docstring that is worth a document."""
HELD_OUT: Final = 10
"""One of so many documents is not trained on."""
CONFIG: Final = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
RATE: Final = 3e-3
WARM_UP: Final = 40


def main() -> int:
    """Train and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=1000, help="of 2048 tokens (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)

    documents = [text for text in python_documentation() if len(text) >= SHORTEST]
    held_out = documents[::HELD_OUT]
    trained = [text for i, text in enumerate(documents) if i % HELD_OUT]
    (args.directory / "train.txt").write_text("\n\n".join(trained), encoding="utf-8")
    (args.directory / "held-out.txt").write_text("\n\n".join(held_out), encoding="utf-8")

    tokenizer = _train_tokenizer(trained)
    tokenizer.save(str(args.directory / "tokenizer.json"))
    end = tokenizer.token_to_id(END)
    tokens = [np.array([end, *tokenizer.encode(text).ids]) for text in trained]
    _train(args, np.concatenate(tokens))
    return 0


def python_documentation() -> Iterator[str]:
    """The language reference topic by topic, then the standard library's docstrings, in a fixed order."""
    for name in sorted(topics):
        yield topics[name]
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root).parts
        if {"site-packages", "test", "tests", "pydoc_data", "lib2to3"} & set(inside):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""


def _train_tokenizer(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train(args: argparse.Namespace, tokens: Any) -> None:
    import torch  # type: ignore[import-not-found]
    import transformers  # type: ignore[import-not-found]

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, initializer_range=0.04, **CONFIG
    )
    model = transformers.LlamaForCausalLM(config)
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=RATE,
        betas=(0.9, 0.95),
    )
    chance = np.random.RandomState(0)
    started = time.monotonic()
    for step in range(args.steps):
        elapsed = (time.monotonic() - started) / 60
        done = max(step / args.steps, elapsed / args.minutes)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARM_UP, (1 - done) / 0.4)
        begins = chance.randint(0, len(tokens) - LENGTH, BATCH)
        batch = torch.from_numpy(np.stack([tokens[b : b + LENGTH] for b in begins]))
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}, loss {loss.item():.3f}, {elapsed:.1f} min", flush=True)
    model.to(torch.float16).save_pretrained(args.directory)
    print(f"{args.directory}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")


if __name__ == "__main__":
    sys.exit(main())

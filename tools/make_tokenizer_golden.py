"""Write tests/golden/tokenizer.json: what llama.cpp makes of a difficult text, to compare our tokenizer with.

    pip install llama-cpp-python
    python tools/make_tokenizer_golden.py "$(edgellm fetch smollm2-135m)"

llama.cpp reads the vocabulary from a copy of the file's header in which `tokenizer.ggml.pre` is set to each
pre-tokenizer that edgellm knows; so the patterns are compared, with one and the same vocabulary.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path

import gguf
import llama_cpp

PRE_TOKENIZERS = ("smollm", "llama-bpe", "qwen2")

TEXTS = (
    "Hello world",
    " leading and trailing spaces  ",
    "The quick brown fox jumps over the lazy dog.",
    "I'm, you're, he's, we've, they'll, she'd, don't; I'M YOU'RE HE'S WE'VE THEY'LL SHE'D DON'T",
    "1 12 123 1234 12345 3.14159 1,000,000 0x7fff 2024-02-29T23:59:60Z ½ ² Ⅷ ٣٤٥",
    "line\nline\n\nline\n\n\nline\r\nline\r\n\r\n  \n \n\t\n",
    "\t\ttabs\tand    spaces     \u00a0no-break\u2003em\u3000ideographic",
    "def f(x):\n    if x > 0:\n        return {'a': [1, 2]}  # comment\n\n\n    return None\n",
    '{"json": true, "list": [1.5e-10, null], "nested": {"k": "v\\n"}}',
    "Schöne Grüße aus Köln, naïve café, ¿Qué tal? ¡Olé! Œuvre, smørrebrød, Łódź, žluťoučký kůň",
    "Привет, как дела? Съешь же ещё этих мягких французских булок.",
    "Καλημέρα κόσμε — τί κάνεις;",
    "你好，世界！今天天气怎么样？ 日本語のテキスト、カタカナ。 안녕하세요 세계",
    "مرحبا بالعالم، كيف حالك؟ שלום עולם",
    "नमस्ते दुनिया สวัสดีชาวโลก",
    "😀 👍🏽 👨‍👩‍👧‍👦 🇩🇪 ❤️ ☃ 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "∀x∈ℝ: x² ≥ 0 ⇒ √x² = |x|; ∫₀^∞ e^{-x²}dx = √π/2",
    "!!!???... --- === *** ___ ~~~ ``` ''' \"\"\" ((([[[{{{<<<>>>}}}]]])))",
    "https://example.org/path?query=a%20b&c=d#fragment user@example.org C:\\Users\\x",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "supercalifragilisticexpialidocious Donaudampfschifffahrtsgesellschaftskapitän",
    "\x00\x01\x02\x7f control \x1b[31mred\x1b[0m \ufeffbom \u200bzero-width \ufffd",
    "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_end|><|endoftext|> <|im_start |> <|im_end|>text<|unknown|> <repo_name>x<file_sep>",
    "x<|im_end|>y <|im_end|> z\n<|im_end|>\n",
    "",
    " ",
    "\n",
    "   \n   a",
    "a\u0020\u0020\u0020b\u0020\u0020\n\u0020c",
)

ALPHABET = "aaeinrst  \n\t'.,-_09🙂éßЖя中あ한ा\u0301\r½Ⅳ <|>{}\u00a0\u2028ﬁ"


def main() -> None:
    """Tokenize and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("-o", "--output", type=Path, default=Path("tests/golden/tokenizer.json"))
    args = parser.parse_args()

    chance = random.Random(2)
    texts = [*TEXTS, *("".join(chance.choices(ALPHABET, k=chance.randint(1, 24))) for _ in range(150))]
    golden = {pre: _tokenize(args.gguf, pre, texts) for pre in PRE_TOKENIZERS}
    args.output.write_text(
        json.dumps(
            {"made_by": f"llama-cpp-python {llama_cpp.__version__}", "texts": texts, "ids": golden},
            ensure_ascii=True,
            separators=(",", ":"),
        )
        + "\n",
        encoding="utf-8",
    )


def _tokenize(source: Path, pre: str, texts: list[str]) -> list[list[int]]:
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "vocabulary.gguf"
        _copy_header(source, copy, pre)
        model = llama_cpp.Llama(str(copy), vocab_only=True, verbose=False)
        return [model.tokenize(text.encode(), add_bos=False, special=True) for text in texts]


def _copy_header(source: Path, target: Path, pre: str) -> None:
    """The keys without the tensors, as the `gguf` package reads and writes them."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        value = pre if key == "tokenizer.ggml.pre" else field.contents()
        writer.add_key_value(key, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()

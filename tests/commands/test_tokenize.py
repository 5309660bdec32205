"""`edgellm tokenize`: ids, pieces, and whether they give the text back."""

from __future__ import annotations

import ast
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_engine import Service
from ggufs import CONTROL_TOKENS, Llama, tokens
from hypothesis import given
from hypothesis import strategies as st
from model_directories import tokenizer_json, write_directory
from tiny_llama import TINY
from vocabularies import LEGACY

from edgellm.cli import main
from edgellm.commands.tokenize import quoted
from edgellm.errors import CheckpointError, EngineError, UsageError

TIED = TINY["3/1 heads of 64, tied"]
END = CONTROL_TOKENS.index("<|im_end|>")
HELLO, SPACE_HELLO = tokens().index("hello"), tokens().index("Ġhello")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_directory(tmp_path / "tiny", TIED)


@pytest.fixture
def pieces(tmp_path: Path) -> Path:
    """A GGUF file with SentencePiece's vocabulary."""
    path = tmp_path / "pieces.gguf"
    keys = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": LEGACY.tokens,
        "tokenizer.ggml.scores": LEGACY.scores,
        "tokenizer.ggml.token_type": LEGACY.types,
        "tokenizer.ggml.add_bos_token": True,
    }
    Llama(keys=keys, extra={"token_embd.weight": (len(LEGACY.tokens), 64)}).write(path)
    return path


def report(capsys: pytest.CaptureFixture[str], *args: Any, code: int = 0) -> dict[str, Any]:
    assert main(["tokenize", *map(str, args), "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_text(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, directory, "hello hello<|im_end|>é")
    assert found["ids"][:3] == [HELLO, SPACE_HELLO, END]
    assert found["pieces"] == ["hello", " hello", "<|im_end|>", "\\xc3", "\\xa9"]
    assert found["special"] == [False, False, True, False, False]
    assert found["difference"] is None
    assert main(["tokenize", str(directory), "hello hello<|im_end|>"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{HELLO:>7}  'hello'",
        f"{SPACE_HELLO:>7}  ' hello'",
        f"{END:>7}  <|im_end|>  special",
        "3 tokens of 21 bytes, 7.00 bytes a token; they give the text back",
    ]
    assert main(["tokenize", str(directory), "é"]) == 0
    assert [row[9:] for row in capsys.readouterr().out.splitlines()[:2]] == [r"'\xc3'", r"'\xa9'"]


@given(st.binary(max_size=8) | st.sampled_from([rb"\udcff", rb"\\udcff", b"\\\xff", b"\xff\xff'"]))
def test_what_is_shown_of_a_token_is_its_bytes(spelled: bytes) -> None:
    decoded = spelled.decode(errors="surrogateescape")
    as_bytes = [chr(ord(char) - 0xDC00) if "\udc80" <= char <= "\udcff" else char for char in decoded]
    assert ast.literal_eval(quoted(spelled)) == "".join(as_bytes)


def test_ids_go_through_a_pipe(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("wörter hello".encode())))
    assert main(["tokenize", str(directory), "-", "--ids"]) == 0
    ids = capsys.readouterr().out
    assert main(["tokenize", str(directory), "--decode", ids]) == 0
    assert capsys.readouterr().out == "wörter hello\n"


def test_a_conversation_is_as_the_daemon_has_it(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, directory, "--chat", "hello<|im_end|>")
    assert found["text"] == "<|im_start|>user\nhello<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert found["ids"].count(END) == 1
    assert found["difference"] is None
    turns = [{"role": "user", "content": "w"}, {"role": "assistant", "content": "hello"}]
    found = report(capsys, directory, "--messages", json.dumps(turns))
    assert found["text"].startswith("<|im_start|>user\nw<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>")


def test_sentencepieces(pieces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, pieces, "--bos", " Hello 堂")
    assert (found["ids"][0], found["pieces"][0], found["difference"]) == (1, "<s>", None)
    assert found["pieces"][-3:] == ["\\xe5", "\\xa0", "\\x82"]
    found = report(capsys, pieces, "x</s>y", code=1)
    assert found["difference"] == "from character 5 on the text is 'y', and the tokens spell ' y'"


def test_what_is_composed_does_not_come_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = json.loads(tokenizer_json())
    made["normalizer"] = {"type": "NFC"}
    path = write_directory(tmp_path / "tiny", TIED, files={"tokenizer.json": made})
    assert main(["tokenize", str(path), "e\u0301", "--ids"]) == 1
    captured = capsys.readouterr()
    assert len(captured.out.split()) == 2
    assert "in NFC" in captured.err


def test_an_engine(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = tmp_path / "engine"
    assert main(["build", str(directory), "-o", str(engine)]) == 0
    capsys.readouterr()
    for args in (["hello w"], ["--chat", "hello"]):
        assert report(capsys, engine, *args) == report(capsys, directory, *args)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--decode", "1 x"], "'x' is no token id"),
        (["--decode", "999999"], "'999999' is no token id"),
        (["--messages", "{"], "--messages wants JSON"),
        (["--messages", '[{"role": "user"}]'], "array of"),
        (["--messages", "[]"], "array of"),
        (["a\udcff"], "byte 1 is 0xff"),
    ],
)
def test_what_makes_no_sense(
    directory: Path, capsys: pytest.CaptureFixture[str], args: list[str], named: str
) -> None:
    assert main(["tokenize", str(directory), *args]) == UsageError.exit_code
    assert named in capsys.readouterr().err


def test_a_model_without_a_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_directory(tmp_path / "tiny", TIED, files={"tokenizer_config.json": None})
    assert main(["tokenize", str(path), "--chat", "hello"]) == UsageError.exit_code
    assert "no chat template" in capsys.readouterr().err


def test_what_cannot_be_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = json.loads(tokenizer_json())
    made["model"]["type"] = "Unknown"
    path = write_directory(tmp_path / "tiny", TIED, files={"tokenizer.json": made})
    assert main(["tokenize", str(path), "hello"]) == CheckpointError.exit_code
    assert "cannot be loaded" in capsys.readouterr().err
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "config.json").write_text('{"edgellm": {"format_version": 0}}')
    assert main(["tokenize", str(tmp_path / "engine"), "hello"]) == EngineError.exit_code


def test_a_daemon_is_asked_for_its_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Service(tmp_path) as service:

        def out(*args: str) -> str:
            assert main(["tokenize", service.endpoint, *args]) == 0
            return capsys.readouterr().out

        assert out("hé", "--ids") == "104 195 169\n"
        assert out("hi") == "104\n105\n2 tokens\n"
        said = "user:hi\nassistant:"
        assert json.loads(out("hi", "--chat", "--json")) == {"ids": list(said.encode())}
        turns = json.dumps([{"role": "user", "content": "hi"}])
        assert out(turns, "--messages", "--ids") == out("hi", "--chat", "--ids")
        assert main(["tokenize", service.endpoint, '[{"role": "tool", "content": "x"}]', "--messages"]) == 1
        assert "this chat template knows no tool" in capsys.readouterr().err
        for flag in ("--decode", "--bos"):
            assert main(["tokenize", service.endpoint, "1 2", flag]) == UsageError.exit_code
            assert f"{flag} is none of what a daemon can be asked" in capsys.readouterr().err
    assert main(["tokenize", service.endpoint, "hi"]) == 69
    assert service.endpoint in capsys.readouterr().err

"""`edgellm tokenize PATH TEXT`: a text's tokens, and whether they give the text back.

Exit code: 0; 1 if the tokens do not give the text back, or a daemon refuses the text; 65 for a checkpoint and
66 for an engine whose tokenizer cannot be used; 69 if no daemon answers.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import unicodedata
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from edgellm.text.chat import ChatTemplate
    from edgellm.text.tokenizer import Tokenizer

LOSSY: Final = 1
SOCKETS: Final = ("ipc://", "tcp://")
"""What a PATH begins with that is a daemon's."""
_SHOWN: Final = 20
"""Characters of a text around where it differs."""
_BYTE: Final = re.compile(r"(?<!\\)((?:\\\\)*)\\udc([89a-f][0-9a-f])")
"""In what repr() gives, a byte that is no UTF-8, as PEP 383 escapes it; pairs of backslashes are others."""


@dataclass(frozen=True, slots=True)
class Report:
    """A text's tokens.

    Attributes:
        text: what was tokenized; of a conversation, as the chat template writes it.
        ids: the tokens.
        pieces: what each stands for: its text, or a special token's name. Bytes of no character: \\xNN.
        special: which of them are special tokens.
        difference: how what the tokens spell differs from the text; None: it does not.
    """

    text: str
    ids: list[int]
    pieces: list[str]
    special: list[bool]
    difference: str | None


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "tokenize",
        help="show a text's tokens, and whether they give it back",
        description="Show a text's tokens. Exit code: 0, or 1 if they do not give the text back.",
    )
    parser.add_argument(
        "path",
        metavar="PATH",
        help="engine, model directory or GGUF file; or a daemon's socket, ipc://…: the ids it makes of TEXT",
    )
    parser.add_argument("text", metavar="TEXT", help="'-': from stdin")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--chat", action="store_true", help="TEXT is what a user says: through the chat template"
    )
    what.add_argument(
        "--messages",
        action="store_true",
        help='TEXT is a conversation in JSON: [{"role": "user", "content": "…"}, …]',
    )
    what.add_argument("--decode", action="store_true", help="TEXT is token ids: print their text")
    parser.add_argument(
        "--bos", action="store_true", help="begin with the model's BOS token, if it wants one"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--ids", action="store_true", help="print the ids alone, on one line")
    form.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the tokens.

    Raises:
        UsageError: the path is a model's name, the text is not UTF-8, or not what the flags say.
        CheckpointError, EngineError: there is no tokenizer to use, or no chat template.
        BadRequest: the chat template refuses the conversation.
    """
    from edgellm.commands.build import refuse_model_name

    if args.path.startswith(SOCKETS):
        return _ask(args)
    path = Path(args.path)
    refuse_model_name(path)
    tokenizer, template = _open(path)
    given = _text(args.text)
    if args.decode:
        print(_decode(tokenizer, _ids(given, tokenizer.vocab_size)))
        return 0
    if (messages := _conversation(args, given)) is not None:
        text, ids = _converse(path, tokenizer, template, messages)
    else:
        text, ids = given, tokenizer.encode(given, bos=args.bos).tolist()
    report = _report(tokenizer, text, ids)
    if args.ids:
        print(*report.ids)
    else:
        print(_as_json(report) if args.json else _as_text(tokenizer, report))
    if report.difference is not None and args.ids:
        print(f"edgellm tokenize: {report.difference}", file=sys.stderr)
    return 0 if report.difference is None else LOSSY


def _ask(args: argparse.Namespace) -> int:
    """Print the ids that a daemon makes of the text; the exit code."""
    from edgellm.client import Client
    from edgellm.errors import ClientError, RequestError, UsageError

    for flag, given_too in (("--decode", args.decode), ("--bos", args.bos)):
        if given_too:
            raise UsageError(
                f"{flag} is none of what a daemon can be asked: name its engine, not {args.path}"
            )
    given = _text(args.text)
    messages = _conversation(args, given)
    with Client(args.path) as client:
        try:
            ids = client.tokenize(given) if messages is None else client.tokenize(messages=messages)
        except (RequestError, ClientError) as error:
            print(f"edgellm tokenize: {error}", file=sys.stderr)
            return error.exit_code if isinstance(error, ClientError) else 1
    if args.json:
        print(json.dumps({"ids": ids}))
    elif args.ids:
        print(*ids)
    else:
        print(*ids, sep="\n")
        print(f"{len(ids)} token{'' if len(ids) == 1 else 's'}")
    return 0


def _open(path: Path) -> tuple[Tokenizer, ChatTemplate | None]:
    from edgellm.enginedir import is_engine, open_engine

    if is_engine(path):
        engine = open_engine(path)
        return engine.tokenizer(), engine.chat_template()
    import tokenizers

    from edgellm.checkpoint import open_checkpoint
    from edgellm.errors import CheckpointError, EngineError
    from edgellm.text.chat import ChatTemplate
    from edgellm.text.tokenizer import Tokenizer

    checkpoint = open_checkpoint(path)
    bos_id = checkpoint.bos_id if checkpoint.add_bos else None
    try:
        inner = tokenizers.Tokenizer.from_buffer(checkpoint.tokenizer_json())
        tokenizer = Tokenizer(inner, bos_id=bos_id)
        if checkpoint.chat_template is None:
            return tokenizer, None
        return tokenizer, ChatTemplate(
            checkpoint.chat_template, bos=checkpoint.bos_token, eos=checkpoint.eos_token
        )
    except (CheckpointError, EngineError):
        raise
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path}: the tokenizer cannot be loaded: {error}") from error


def _text(argument: str) -> str:
    """The argument, or stdin."""
    from edgellm.errors import UsageError

    raw = sys.stdin.buffer.read() if argument == "-" else argument.encode(errors="surrogateescape")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"the text is not UTF-8: byte {error.start} is {raw[error.start]:#04x}") from error


def _ids(text: str, vocab_size: int) -> list[int]:
    from edgellm.errors import UsageError

    ids = []
    for word in text.replace(",", " ").strip(" []\n").split():
        if not word.isdecimal() or int(word) >= vocab_size:
            raise UsageError(f"{word!r} is no token id: they are 0…{vocab_size - 1}")
        ids.append(int(word))
    return ids


def _conversation(args: argparse.Namespace, given: str) -> list[dict[str, str]] | None:
    """What goes through the chat template; None if the text is to be taken as it is."""
    if args.chat:
        return [{"role": "user", "content": given}]
    return _messages(given) if args.messages else None


def _messages(text: str) -> list[dict[str, str]]:
    from edgellm.errors import UsageError

    try:
        messages: Any = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--messages wants JSON: {error}") from error
    match messages:
        case [{"role": str(), "content": str()}, *_] if all(
            isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("role", "content"))
            for turn in messages
        ):
            return [{"role": turn["role"], "content": turn["content"]} for turn in messages]
    raise UsageError('--messages wants an array of {"role": "…", "content": "…"}')


def _converse(
    path: Path, tokenizer: Tokenizer, template: ChatTemplate | None, messages: list[dict[str, str]]
) -> tuple[str, list[int]]:
    """The conversation's text and tokens, as the daemon has them."""
    from edgellm.errors import UsageError

    if template is None:
        raise UsageError(f"{path} has no chat template")
    contents, mark = tokenizer.quote([message["content"] for message in messages])
    turns = zip(messages, contents, strict=True)
    text = template.render([{**message, "content": content} for message, content in turns])
    ids = tokenizer.encode(text, mark=mark).tolist()
    return text.replace(mark, "") if mark else text, ids


def _report(tokenizer: Tokenizer, text: str, ids: list[int]) -> Report:
    special = [tokenizer.is_special(token) for token in ids]
    return Report(
        text=text,
        ids=ids,
        pieces=[_piece(tokenizer, token) for token in ids],
        special=special,
        difference=_difference(text, _spell(tokenizer, text, ids)),
    )


def _piece(tokenizer: Tokenizer, token: int) -> str:
    if tokenizer.is_special(token):
        return tokenizer.piece(token)
    return tokenizer.token_bytes(token).decode(errors="backslashreplace")


def _decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    """What a client of `chat` is sent for these tokens."""
    from edgellm.text.detokenizer import Detokenizer

    detokenizer = Detokenizer(strip_space=tokenizer.strips_space)
    return "".join(detokenizer.push(tokenizer.token_bytes(token)) for token in ids) + detokenizer.flush()


def _spell(tokenizer: Tokenizer, text: str, ids: list[int]) -> str:
    """The tokens' text with the special ones written out; without a BOS token that the text has not."""
    if ids and tokenizer.is_special(ids[0]) and not text.startswith(tokenizer.piece(ids[0])):
        ids = ids[1:]
    pieces = [
        tokenizer.piece(token).encode() if tokenizer.is_special(token) else tokenizer.token_bytes(token)
        for token in ids
    ]
    if pieces and tokenizer.strips_space and not tokenizer.is_special(ids[0]):
        pieces[0] = pieces[0].removeprefix(b" ")
    return b"".join(pieces).decode(errors="replace")


def _difference(text: str, spelled: str) -> str | None:
    if spelled == text:
        return None
    if spelled == unicodedata.normalize("NFC", text):
        return "the tokens spell the text in NFC: this tokenizer composes characters before it reads them"
    pairs = enumerate(zip(text, spelled, strict=False))
    at = next((at for at, (one, other) in pairs if one != other), min(len(text), len(spelled)))
    return (
        f"from character {at} on the text is {text[at : at + _SHOWN]!r}, and the tokens spell "
        f"{spelled[at : at + _SHOWN]!r}"
    )


def _as_json(report: Report) -> str:
    return json.dumps(asdict(report), ensure_ascii=False, indent=2)


def _as_text(tokenizer: Tokenizer, report: Report) -> str:
    rows = [
        f"{token:>7}  {f'{piece}  special' if special else quoted(tokenizer.token_bytes(token))}"
        for token, piece, special in zip(report.ids, report.pieces, report.special, strict=True)
    ]
    size = len(report.text.encode())
    each = f", {size / len(report.ids):.2f} bytes a token" if report.ids else ""
    back = "they give the text back" if report.difference is None else report.difference
    tokens = f"{len(report.ids)} token{'' if len(report.ids) == 1 else 's'}"
    return "\n".join([*rows, f"{tokens} of {size} bytes{each}; {back}"])


def quoted(spelled: bytes) -> str:
    """As Python writes a text, but with the bytes of no character as it writes bytes."""
    text = spelled.decode(errors="surrogateescape")
    return _BYTE.sub(r"\1\\x\2", repr(text))

"""A model directory's files about text: tokenizer, special tokens, chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from edgellm.checkpoint.config_file import MAX_CONFIG_BYTES, ConfigFile
from edgellm.checkpoint.gguf_model import END_OF_ANSWER
from edgellm.checkpoint.safetensors import parse_json, read_bytes, read_json
from edgellm.checkpoint.sentencepiece_model import read_sentencepiece
from edgellm.errors import CheckpointError
from edgellm.text.spelling import Spelling
from edgellm.text.tiktoken import CHATML, tiktoken_json

TOKENIZER: Final = "tokenizer.json"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
CHAT_TEMPLATE: Final = "chat_template.jinja"
GENERATION_CONFIG: Final = "generation_config.json"
SENTENCEPIECE: Final = "tokenizer.model"
ADDED_TOKENS: Final = "added_tokens.json"
TIKTOKEN: Final = "qwen.tiktoken"
MAX_TOKENIZER_BYTES: Final = 1 << 28
_USUAL: Final = {"bos": "<s>", "eos": "</s>"}
"""LlamaTokenizer's defaults, which hold where no tokenizer_config.json says otherwise."""


class TextFiles:
    """tokenizer.json, tokenizer_config.json, generation_config.json and chat_template.jinja of a directory.

    In place of tokenizer.json there may be SentencePiece's tokenizer.model, or qwen.tiktoken.

    Attributes:
        chat_template, bos_id, add_bos, eos_ids, bos_token, eos_token: see `Checkpoint`.

    Raises:
        CheckpointError: one is missing or damaged, or nothing would end an answer.
    """

    def __init__(self, path: Path, config: ConfigFile, vocab_size: int) -> None:
        self._path = path
        self._vocab_size = vocab_size
        special = _optional(path / TOKENIZER_CONFIG)
        generation = _optional(path / GENERATION_CONFIG)
        self._source, self._raw = _read_tokenizer(path, special)
        tokenizer = parse_json(self._raw, str(self._source))
        self._spelling = Spelling.of(tokenizer.get("decoder"))
        self._added = self._added_tokens(tokenizer)
        self._check_vocabulary(tokenizer)
        self.chat_template = _chat_template(path, special)
        if self.chat_template is None and self._source.name == TIKTOKEN:
            self.chat_template = _qwen_template(generation)
        self.bos_token, self.eos_token = (self._special_token(special, role) for role in ("bos", "eos"))
        self.eos_ids = self._eos_ids(config, generation)
        self.bos_id = self._id_of(tokenizer, self.bos_token) if self.bos_token else None
        self.add_bos = self.bos_id is not None and self._adds_bos(tokenizer, special)

    def tokenizer_json(self) -> bytes:
        """tokenizer.json as it is, or made of what is there instead.

        Raises:
            CheckpointError: it is of a kind that edgellm does not know.
        """
        if self._spelling is None:
            raise CheckpointError(
                f"{self._source} has a decoder that is neither ByteLevel nor SentencePiece's (Replace or "
                "Metaspace, ByteFallback, Fuse, Strip)"
            )
        return self._raw

    def _added_tokens(self, tokenizer: dict[str, Any]) -> dict[str, tuple[int, bool]]:
        """Text → id and whether it is special."""
        added: dict[str, tuple[int, bool]] = {}
        for token in tokenizer.get("added_tokens") or ():
            match token:
                case {"id": int(number), "content": str(content), **more}:
                    added[content] = number, more.get("special") is True
                case _:
                    raise CheckpointError(
                        f"{self._source}: added_tokens has {token!r:.80}, without id and content"
                    )
        return added

    def _check_vocabulary(self, tokenizer: dict[str, Any]) -> None:
        vocabulary = _vocabulary(tokenizer)
        ids = [*(number for number, _ in self._added.values()), *vocabulary.values()]
        largest = max((number for number in ids if isinstance(number, int)), default=-1)
        if largest < 0:
            raise CheckpointError(f"{self._source} has no tokens")
        if largest >= self._vocab_size:
            raise CheckpointError(
                f"{self._source} has token {largest}, but config.json's vocab_size is {self._vocab_size}"
            )

    def _id_of(self, tokenizer: dict[str, Any], text: str) -> int:
        if text in self._added:
            return self._added[text][0]
        number = _vocabulary(tokenizer).get(text)
        if not isinstance(number, int):
            raise CheckpointError(
                f"{self._path / TOKENIZER_CONFIG} names token {text!r:.80}, which {self._source.name} lacks"
            )
        return number

    def _special_token(self, special: ConfigFile, role: str) -> str:
        key = f"{role}_token"
        usual = _USUAL[role]
        if key not in special.values and self._source.name == SENTENCEPIECE and usual in self._added:
            return usual
        match special.values.get(key):
            case None:
                return ""
            case str(text) | {"content": str(text)}:
                return text
            case other:
                raise special.wrong(f"{role}_token", other, "a token's text")

    def _eos_ids(self, *configs: ConfigFile) -> tuple[int, ...]:
        named = {
            number for text, (number, special) in self._added.items() if special and text in END_OF_ANSWER
        }
        if self.eos_token in self._added:
            named.add(self._added[self.eos_token][0])
        for config in configs:
            value = config.values.get("eos_token_id")
            for number in value if isinstance(value, list) else [] if value is None else [value]:
                if isinstance(number, bool) or not isinstance(number, int):
                    raise config.wrong("eos_token_id", value, "a token's number, or a list of them")
                if not 0 <= number < self._vocab_size:
                    raise CheckpointError(
                        f"{config.where}: eos_token_id is {number}, but there are {self._vocab_size} tokens"
                    )
                named.add(number)
        if not named:
            raise CheckpointError(
                f"{self._path} has no eos_token_id in config.json or {GENERATION_CONFIG}: "
                "nothing would end an answer"
            )
        return tuple(sorted(named))

    def _adds_bos(self, tokenizer: dict[str, Any], special: ConfigFile) -> bool:
        """Whether a text begins with BOS: as the config says, or else as tokenizer.json's template does."""
        if special.values.get("add_bos_token") is not None:
            return special.boolean("add_bos_token")
        if self._source.name == SENTENCEPIECE:
            return True  # LlamaTokenizer's default
        processor = tokenizer.get("post_processor")
        steps = [processor, *((processor or {}).get("processors") or ())] if processor else []
        first = [(step.get("single") or [None])[0] for step in steps if isinstance(step, dict)]
        return any(
            isinstance(piece, dict) and (piece.get("SpecialToken") or {}).get("id") == self.bos_token
            for piece in first
        )


def _vocabulary(tokenizer: dict[str, Any]) -> dict[str, Any]:
    match tokenizer:
        case {"model": {"vocab": dict(vocabulary)}}:
            return vocabulary
    return {}


def _read_tokenizer(path: Path, special: ConfigFile) -> tuple[Path, bytes]:
    """The file that the vocabulary is in, and the vocabulary as tokenizer.json."""
    if not (path / TOKENIZER).exists():
        if (path / SENTENCEPIECE).is_file():
            return path / SENTENCEPIECE, _sentencepiece_json(path, special)
        if (path / TIKTOKEN).is_file():
            raw = read_bytes(path / TIKTOKEN, MAX_TOKENIZER_BYTES)
            return path / TIKTOKEN, tiktoken_json(raw, path / TIKTOKEN)
    return path / TOKENIZER, read_bytes(path / TOKENIZER, MAX_TOKENIZER_BYTES)


def _sentencepiece_json(path: Path, special: ConfigFile) -> bytes:
    """tokenizer.model, with the tokens that transformers keeps in files beside it.

    Where `legacy` is not given, transformers' LlamaTokenizer is of the legacy kind.
    """
    vocabulary = read_sentencepiece(
        path / SENTENCEPIECE,
        legacy=special.values.get("legacy") is not False,
        add_bos=True,
    )
    extra = {number: (text, False) for text, number in _optional(path / ADDED_TOKENS).values.items()}
    for number, token in (special.values.get("added_tokens_decoder") or {}).items():
        match token:
            case {"lstrip": True} | {"rstrip": True}:
                raise CheckpointError(
                    f"{special.where}: added_tokens_decoder has token {number} with lstrip or rstrip, which "
                    f"edgellm does not do beside {SENTENCEPIECE}"
                )
            case {"content": str(text), **more} if number.isdecimal():
                extra[int(number)] = text, more.get("special") is True
            case _:
                raise special.wrong("added_tokens_decoder", token, "a token by its number")
    return vocabulary.extended(extra).tokenizer_json()


def _qwen_template(generation: ConfigFile) -> str | None:
    """What Qwen's first generation has in its code; its base models say `raw`."""
    return None if generation.values.get("chat_format") == "raw" else CHATML


def _chat_template(path: Path, special: ConfigFile) -> str | None:
    """chat_template.jinja, or the template in tokenizer_config.json: a string, or a list of named ones."""
    if (path / CHAT_TEMPLATE).is_file():
        try:
            return read_bytes(path / CHAT_TEMPLATE, MAX_CONFIG_BYTES).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path / CHAT_TEMPLATE} is not UTF-8") from error
    match special.values.get("chat_template"):
        case None | "" | []:
            return None
        case str(template):
            return template
        case [{"template": str(template)}]:
            return template
        case list(named):
            for one in named:
                match one:
                    case {"name": "default", "template": str(template)}:
                        return template
    raise special.wrong(
        "chat_template", special.values["chat_template"], "a template, or a list with a default one"
    )


def _optional(path: Path) -> ConfigFile:
    return ConfigFile(str(path), read_json(path, MAX_CONFIG_BYTES) if path.is_file() else {})

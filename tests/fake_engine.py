"""An engine that does what a test says: it holds requests, and updates are made by hand or by a script."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import numpy as np
import zmq
from numpy.typing import NDArray

from edgellm.enginedir import BuildConfig, EdgellmSection, EngineConfig, EngineDir, PretrainedConfig
from edgellm.errors import BadRequest
from edgellm.executor.base import ExecutorInfo
from edgellm.scheduler.request import Finish, Request, Timings, Token, Update
from edgellm.server import Server
from edgellm.server_config import ServerConfig

SLOTS = 4
MAX_SEQ_LEN = 256
EOS = 256
VOCAB_SIZE = 257


class ByteTokenizer:
    """Token i < 256 is byte i; 256 ends an answer, `<eos>`. Texts and tokens are easily compared."""

    vocab_size = VOCAB_SIZE
    longest_token: int | None = None
    strips_space = False

    def quote(self, texts: Sequence[str]) -> tuple[list[str], str]:
        if not any("<eos>" in text for text in texts):
            return list(texts), ""
        return [text.replace("<eos>", "<\ufdd0eos>") for text in texts], "\ufdd0"

    def encode(self, text: str, *, bos: bool = False, mark: str = "") -> NDArray[np.int32]:
        first, *parts = (list(part.replace(mark, "").encode()) for part in text.split("<eos>"))
        return np.array([*first, *(token for part in parts for token in [EOS, *part])], np.int32)

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < EOS else b""


class PlainTemplate:
    """`role:content` a line. A tool's turn is refused, as some real templates do."""

    def render(self, messages: list[dict[str, str]]) -> str:
        if any(message["role"] == "tool" for message in messages):
            raise BadRequest("this chat template knows no tool", field="messages")
        return "".join(f"{message['role']}:{message['content']}\n" for message in messages) + "assistant:"


@dataclass(frozen=True)
class Stats:
    running: int = 0
    queued: int = 0
    batch_cap: int = SLOTS
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class FakeEngine:
    """Keeps what was submitted and stopped; `say` and `end` make the updates.

    Args:
        script: called with each request on the I/O thread, to answer it at once.
    """

    def __init__(self, deliver: Callable[[list[Update]], None]) -> None:
        self._deliver = deliver
        self.requests: list[Request] = []
        self.stopped: list[tuple[int, Finish]] = []
        self.script: Callable[[FakeEngine, Request], None] | None = None
        self.obeys = True
        self.limits: list[tuple[int, float]] = []
        self._ended: set[int] = set()
        self._changed = threading.Condition()

    def submit(self, request: Request) -> None:
        with self._changed:
            self.requests.append(request)
            self._changed.notify_all()
        if self.script is not None:
            self.script(self, request)

    def stop(self, key: int, finish: Finish) -> None:
        with self._changed:
            self.stopped.append((key, finish))
            self._changed.notify_all()
        if self.obeys and key not in self._ended:
            self.end(key, finish)

    def limit(self, batch_cap: int, duty: float) -> None:
        self.limits.append((batch_cap, duty))

    def snapshot(self) -> Stats:
        return Stats(
            running=len(self.requests) - len(self._ended),
            batch_cap=self.limits[-1][0] if self.limits else SLOTS,
        )

    def say(self, key: int, data: bytes | list[Token]) -> None:
        """One update that holds a token for each byte."""
        tokens = [Token(byte) for byte in data] if isinstance(data, bytes) else data
        self._deliver([Update(key=key, tokens=tokens)])

    def end(self, key: int, finish: Finish = Finish.STOP, data: bytes = b"") -> None:
        now = time.monotonic()
        self._ended.add(key)
        timings = Timings(arrival=now - 1, admitted=now - 0.75, first_token=now - 0.5, finished=now)
        self._deliver([Update(key, [Token(b) for b in data], finish, cached_tokens=3, timings=timings)])

    def wait(self, condition: Callable[[FakeEngine], bool], timeout: float = 5.0) -> None:
        """Until something that is submitted or stopped makes the condition true."""
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self), timeout)


def echo(engine: FakeEngine, request: Request) -> None:
    """Answer with the prompt, a byte an update, cut at max_tokens."""
    data = bytes(request.prompt.astype(np.uint8))
    for byte in data[: request.max_tokens]:
        engine.say(request.key, bytes([byte]))
    engine.end(request.key, Finish.STOP if len(data) <= request.max_tokens else Finish.LENGTH)


INFO = ExecutorInfo(
    name="fake",
    max_batch_size=SLOTS,
    max_seq_len=MAX_SEQ_LEN,
    max_num_tokens=64,
    vocab_size=VOCAB_SIZE,
    kv_bytes_per_token=1,
)

DIRECTORY = EngineDir(
    path=Path("engine"),
    config=EngineConfig(
        version="0",
        pretrained_config=PretrainedConfig(
            architecture="LlamaForCausalLM",
            vocab_size=VOCAB_SIZE,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_size=8,
            intermediate_size=8,
            norm_epsilon=1e-5,
            max_position_embeddings=MAX_SEQ_LEN,
        ),
        build_config=BuildConfig(
            max_input_len=MAX_SEQ_LEN,
            max_seq_len=MAX_SEQ_LEN,
            max_batch_size=SLOTS,
            max_num_tokens=64,
            opt_batch_size=1,
            opt_num_tokens=1,
        ),
        edgellm=EdgellmSection(
            format_version=1,
            executor="cpu",
            compute="int8",
            model_name="fake-model",
            bos_id=None,
            add_bos=False,
            eos_ids=(EOS,),
        ),
    ),
)


class Service:
    """A server on a socket in `directory`, with a fake engine behind it."""

    def __init__(self, directory: Path, config: ServerConfig | None = None, *, ready: bool = True) -> None:
        self.endpoint = f"ipc://{directory}/edgellm.sock"
        self.server = Server(msgspec.structs.replace(config or ServerConfig(), endpoint=self.endpoint))
        self.events_endpoint = self.server.events_endpoint
        self.engine = FakeEngine(self.server.deliver)
        self.server.bind()
        self.server.start()
        if ready:
            self.attach()

    def attach(self, *, template: bool = True) -> None:
        self.server.attach(
            engine=self.engine,
            tokenizer=ByteTokenizer(),
            template=PlainTemplate() if template else None,
            directory=DIRECTORY,
            info=INFO,
        )

    def close(self) -> None:
        self.server.close(flush_s=0.2)

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Peer:
    """A client that knows no more than docs/protocol.md says: a socket and msgpack."""

    def __init__(self, endpoint: str, kind: int = zmq.DEALER, **options: int) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(kind)
        self.socket.linger = 0
        for name, value in options.items():
            self.socket.setsockopt(getattr(zmq, name), value)
        self.socket.connect(endpoint)

    def send(self, **fields: Any) -> None:
        self.socket.send(msgpack.packb({"v": 1, **fields}))

    def receive(self, timeout: float = 5.0) -> dict[str, Any]:
        assert self.socket.poll(int(1000 * timeout)), "no answer"
        reply: dict[str, Any] = msgpack.unpackb(self.socket.recv(), strict_map_key=False)
        assert reply["v"] == 1
        return reply

    def ask(self, **fields: Any) -> dict[str, Any]:
        self.send(**fields)
        return self.receive()

    def until_end(self, id_: object) -> list[dict[str, Any]]:
        """All replies up to the final one of a request; there must be none of others."""
        replies = [self.receive()]
        while replies[-1]["ev"] not in ("done", "error"):
            replies.append(self.receive())
        assert {reply["id"] for reply in replies} == {id_}
        return replies

    def silent(self) -> bool:
        """Whether nothing has arrived beside the answer to one more question."""
        answer = self.ask(id="silent?", op="health")
        return (answer["id"], answer["ev"]) == ("silent?", "health")

    def vanish(self) -> None:
        self._context.destroy(linger=0)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.vanish()

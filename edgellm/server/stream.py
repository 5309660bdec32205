"""One open request on its way back: tokens to text, stop strings, merged deltas, one final message."""

from __future__ import annotations

from collections.abc import Callable

from edgellm.errors import (
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    InternalError,
    RequestError,
    ShuttingDown,
)
from edgellm.protocol import (
    Accepted,
    Delta,
    Done,
    Error,
    Logprob,
    PriorityName,
    Reply,
    Times,
    Usage,
    error_reply,
)
from edgellm.scheduler.request import Finish, Timings, Token, Update
from edgellm.text.detokenizer import Detokenizer
from edgellm.text.stops import StopStrings


class Stream:
    """What one request's client has been sent, and what it is still to be sent.

    `take` is fed what the engine did; `next` is the message that is due, and `advance` says that it was sent.
    Whatever is not sent yet merges: at most one `accepted`, one `delta` and one final message wait, however
    far the client is behind. The deltas' text and tokens put together are those of `done`.

    Args:
        id: the client's name for it.
        key: the engine's.
        streaming: without it the final message is the only one.
        delimited: whether answers need an empty frame in front.
        min_tokens: stop strings are not looked for in the tokens before.
        token_bytes: the tokenizer's.
        strip_space: the answer is a text of its own, and the tokenizer puts a space in front of texts.
    """

    def __init__(
        self,
        *,
        id: str | int,  # noqa: A002 - the wire's name
        key: int,
        streaming: bool,
        delimited: bool,
        logprobs: bool,
        prompt_tokens: int,
        priority: PriorityName,
        stop: list[str],
        min_tokens: int,
        arrival: float,
        token_bytes: Callable[[int], bytes],
        strip_space: bool = False,
    ) -> None:
        self.id = id
        self.key = key
        self.delimited = delimited
        self.arrival = arrival
        self._streaming = streaming
        self._wants_logprobs = logprobs
        self._prompt_tokens = prompt_tokens
        self._min_tokens = min_tokens
        self._token_bytes = token_bytes
        self._detokenizer = Detokenizer(strip_space=strip_space)
        self._stops = StopStrings(stop) if stop else None
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[Logprob] = []
        self._sent_text = 0  # pieces of _text, and
        self._sent_tokens = 0  # tokens that the client has been sent
        self._cached_tokens = 0
        self._accepted: Accepted | None = (
            Accepted(id=id, prompt_tokens=prompt_tokens, priority=priority) if streaming else None
        )
        self._final: Done | Error | None = None
        self._offered: Reply | None = None
        self.matched: str | None = None
        self.closed = False

    @property
    def ended(self) -> bool:
        """Whether the final message is made."""
        return self._final is not None

    @property
    def outcome(self) -> str:
        """How it ended, for the counters: `done` or an error's code."""
        return self._final.code if isinstance(self._final, Error) else "done"

    def take(self, update: Update, now: float) -> None:
        """Take what a step gave. After the end, and after a stop string, tokens are dropped."""
        if self._final is not None:
            return
        if self.matched is None:
            for token in update.tokens:
                self._push(token)
                if self.matched is not None:
                    break
        self._cached_tokens = update.cached_tokens or self._cached_tokens
        if update.finish is not None:
            self._finish(update.finish, update.timings, now)

    def next(self) -> Reply | None:
        """The message that is due, or None; while it is not sent, it grows."""
        if self._accepted is not None:
            self._offered = self._accepted
        elif self._streaming and (delta := self._delta()) is not None:
            self._offered = delta
        else:
            self._offered = None if self.closed else self._final
        return self._offered

    def advance(self) -> None:
        """What `next` gave was sent."""
        if isinstance(self._offered, Accepted):
            self._accepted = None
        elif isinstance(self._offered, Delta):
            self._sent_text, self._sent_tokens = len(self._text), len(self._tokens)
        else:
            self.closed = True

    def _delta(self) -> Delta | None:
        """Everything since the last delta; tokens without text wait for it, except at the end."""
        text = "".join(self._text[self._sent_text :])
        if not text and (self._final is None or self._sent_tokens == len(self._tokens)):
            return None
        start = self._sent_tokens
        return Delta(id=self.id, text=text, tokens=self._tokens[start:], logprobs=self._logprobs[start:])

    def _push(self, token: Token) -> None:
        watched = self._stops is not None and len(self._tokens) >= self._min_tokens
        self._tokens.append(token.id)
        if self._wants_logprobs:
            logprob = float("nan") if token.logprob is None else token.logprob
            self._logprobs.append(Logprob(token=token.id, logprob=logprob, top=list(token.top)))
        self._say(self._detokenizer.push(self._token_bytes(token.id)), watched)

    def _say(self, text: str, watched: bool) -> None:
        if watched and self._stops is not None:
            text, self.matched = self._stops.push(text)
        if text:
            self._text.append(text)

    def _finish(self, finish: Finish, timings: Timings | None, now: float) -> None:
        usage = Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=len(self._tokens),
            cached_tokens=self._cached_tokens,
        )
        if self.matched is None:
            if finish not in (Finish.STOP, Finish.LENGTH):
                self._final = error_reply(self.id, _failure(finish), usage)
                return
            self._say(self._detokenizer.flush(), watched=self._stops is not None)
            if self._stops is not None and self.matched is None:
                self._say(self._stops.flush(), watched=False)
        # A stop string completes the answer, whatever happened to the request until the engine heard of it.
        self._final = Done(
            id=self.id,
            text="".join(self._text),
            tokens=self._tokens,
            finish_reason="length" if finish is Finish.LENGTH and self.matched is None else "stop",
            usage=usage,
            timings=_times(timings or Timings(self.arrival), now),
            logprobs=self._logprobs,
            stop=self.matched,
        )


def _failure(finish: Finish) -> RequestError:
    match finish:
        case Finish.CANCELLED:
            return Cancelled("the request was cancelled")
        case Finish.DEADLINE:
            return DeadlineExceeded(
                "the request's deadline passed before the answer was done", field="deadline_ms"
            )
        case Finish.NOTHING_ALLOWED:
            return BadRequest("what the request allows leaves no token to go on with: the answer ends here")
        case Finish.SHUTDOWN:
            return ShuttingDown("the daemon stopped before the answer was done")
        case _:
            return InternalError("the engine failed; the daemon's log says why")


def _times(timings: Timings, now: float) -> Times:
    def since_arrival(reading: float | None) -> float | None:
        return None if reading is None else (reading - timings.arrival) * 1000

    end = now if timings.finished is None else timings.finished
    return Times(
        queue_ms=since_arrival(timings.admitted),
        first_token_ms=since_arrival(timings.first_token),
        total_ms=(end - timings.arrival) * 1000,
    )

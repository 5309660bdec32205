"""Every error that edgellm raises on purpose, in one hierarchy.

    EdgellmError
    ├── RequestError          a client asked for something that cannot be done: answered on the wire
    │   ├── BadRequest            bad_request
    │   ├── TooLong               too_long
    │   ├── NotFound              not_found
    │   ├── Forbidden             forbidden
    │   ├── Overloaded            overloaded
    │   ├── Loading               loading
    │   ├── ShuttingDown          shutting_down
    │   ├── DeadlineExceeded      deadline_exceeded
    │   ├── Cancelled             cancelled
    │   └── InternalError         internal
    ├── ClientError       69  a client hears nothing, or nothing it understands; raised in the client only
    │   ├── RequestTimeout        also a TimeoutError
    │   ├── Unreachable           also a ConnectionError
    │   ├── ConnectionLost        also a ConnectionError
    │   ├── BadKeys
    │   └── ProtocolError
    └── OperatorError         whoever runs edgellm must change something: printed, then an exit code
        ├── UsageError            64
        ├── CheckpointError       65
        ├── EngineError           66
        ├── DownloadError         69
        ├── DeviceError           69
        ├── TensorRtMissing       69
        ├── BuildError            73
        ├── ExecutorFault         70
        │   └── DeviceLost            70
        ├── TemporaryShortage     75
        └── ConfigError           78

`code` is part of the wire protocol and never changes once released; `exit_code` follows sysexits(3), because
systemd units match on it (`RestartPreventExitStatus=78`).
"""

from __future__ import annotations

from typing import ClassVar


class EdgellmError(Exception):
    """Base of all errors that edgellm raises on purpose; `str(error)` is a sentence for a person."""


class RequestError(EdgellmError):
    """A request that ends in an `error` message.

    Args:
        message: what is wrong and what would work.
        field: the request field at fault, as a path such as `messages[0].role`, or None.
        retry_after_ms: when trying again could succeed, or None when it could not.
    """

    code: ClassVar[str] = "internal"

    def __init__(self, message: str, *, field: str | None = None, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.field = field
        self.retry_after_ms = retry_after_ms


class BadRequest(RequestError):
    """The message is not what docs/protocol.md describes."""

    code = "bad_request"


class TooLong(RequestError):
    """Prompt and max_tokens together outgrow a slot, so the request could never finish."""

    code = "too_long"


class NotFound(RequestError):
    """The id that a request refers to is not known on this connection."""

    code = "not_found"


class Forbidden(RequestError):
    """The peer's uid or gid may not do this."""

    code = "forbidden"


class Overloaded(RequestError):
    """The queue or the client's quota is full, or the governor admits nothing of the request's priority."""

    code = "overloaded"


class Loading(RequestError):
    """The engine is still loading."""

    code = "loading"


class ShuttingDown(RequestError):
    """The daemon drains and takes no new work."""

    code = "shutting_down"


class DeadlineExceeded(RequestError):
    """The request's own deadline passed before it was done."""

    code = "deadline_exceeded"


class Cancelled(RequestError):
    """The client cancelled the request."""

    code = "cancelled"


class InternalError(RequestError):
    """Something failed inside the daemon; the log says what."""

    code = "internal"


REQUEST_ERRORS: dict[str, type[RequestError]] = {
    kind.code: kind
    for kind in (
        BadRequest,
        TooLong,
        NotFound,
        Forbidden,
        Overloaded,
        Loading,
        ShuttingDown,
        DeadlineExceeded,
        Cancelled,
        InternalError,
    )
}
"""Wire code → exception class: how a client turns an `error` message back into an exception."""


class ClientError(EdgellmError):
    """The daemon could not be asked, or did not answer; a command that asks it ends with `exit_code`."""

    exit_code: ClassVar[int] = 69


class RequestTimeout(ClientError, TimeoutError):
    """The daemon took longer than the client was told to wait; the request has been cancelled."""


class Unreachable(ClientError, ConnectionError):
    """Nothing serves at the endpoints."""


class ConnectionLost(ClientError, ConnectionError):
    """The daemon went away before it had answered."""


class BadKeys(ClientError):
    """The CURVE keys that tcp needs are missing, or are none."""


class ProtocolError(ClientError):
    """What answers does not speak this version of the protocol."""


class OperatorError(EdgellmError):
    """An error for whoever runs edgellm; the command line prints it and exits with `exit_code`."""

    exit_code: ClassVar[int] = 70


class UsageError(OperatorError):
    """The command line makes no sense."""

    exit_code = 64


class CheckpointError(OperatorError):
    """A checkpoint is damaged, or of a kind that edgellm does not read."""

    exit_code = 65


class EngineError(OperatorError):
    """An engine directory is missing, damaged, or made for something else."""

    exit_code = 66


class DownloadError(OperatorError):
    """A model could not be fetched."""

    exit_code = 69


class DeviceError(OperatorError):
    """The GPU that the engine needs cannot be used: no driver, an old one, no permission, an old GPU."""

    exit_code = 69


class TensorRtMissing(OperatorError):
    """There is no TensorRT, or one that is too old to build or run a language model."""

    exit_code = 69


class BuildError(OperatorError):
    """An engine could not be written."""

    exit_code = 73


class ExecutorFault(OperatorError):
    """The executor failed at run time: the daemon answers what is open, exits, and is started again."""

    exit_code = 70


class DeviceLost(ExecutorFault):
    """The device failed in a way that nothing in this process can mend; only a new process can go on."""


class TemporaryShortage(OperatorError):
    """Too little of something right now; trying again later can succeed (systemd restarts on 75)."""

    exit_code = 75


class ConfigError(OperatorError):
    """A configuration that can never work (systemd does not restart on 78)."""

    exit_code = 78

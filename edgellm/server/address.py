"""The socket file: checked before it is bound, locked while it is, and opened to those who may use it."""

from __future__ import annotations

import contextlib
import fcntl
import grp
import os
import stat
from pathlib import Path
from types import TracebackType

from edgellm.endpoint import MAX_IPC_PATH_BYTES
from edgellm.errors import ConfigError


class Address:
    """An `ipc://` endpoint for this process alone: `acquire`, bind, `open_to`, and `release` at the end.

    libzmq unlinks whatever lies at an ipc path and binds it anew, even under a living daemon; hence a lock
    file beside the socket, held for the life of the process. It stays behind: removing it would let two
    daemons hold locks on two files of the same name.

    Raises:
        ConfigError: the endpoint is not one that can be served, naming `field` and what would work.
    """

    def __init__(self, endpoint: str, field: str) -> None:
        self.field = field
        scheme, _, rest = endpoint.partition("://")
        if scheme != "ipc" or not rest:
            raise ConfigError(
                f"{field}: {endpoint!r} is not an endpoint: use ipc://PATH or tcp://ADDRESS:PORT"
            )
        if rest.startswith("@") or rest == "*":
            raise ConfigError(
                f"{field}: {endpoint} names no file, so no permissions could guard it: use ipc://PATH"
            )
        if "\0" in rest:
            raise ConfigError(f"{field}: the path holds a zero byte")
        # libzmq hands the path to bind(2) as it is, so a relative one means this process's directory.
        self.path = Path(rest).absolute()
        if (length := len(os.fsencode(self.path))) > MAX_IPC_PATH_BYTES:
            raise ConfigError(
                f"{field}: the path is {length} bytes long, and a Unix socket's path may have"
                f" {MAX_IPC_PATH_BYTES}: {self.path}"
            )
        self.endpoint = f"ipc://{self.path}"
        self._lock: int | None = None

    def acquire(self) -> None:
        """Make the directory if missing (0750), take the lock, and clear a dead daemon's socket away."""
        directory, lock = self.path.parent, self.path.with_name(self.path.name + ".lock")
        try:
            if not directory.is_dir():
                directory.mkdir(mode=0o750, parents=True, exist_ok=True)
            if not os.access(directory, os.W_OK | os.X_OK):
                raise ConfigError(
                    f"{self.field}: no file can be made in {directory} by uid {os.geteuid()}: make it"
                    f" writable, or set {self.field} to a path that is"
                )
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
        except OSError as error:
            raise ConfigError(
                f"{self.field}: {error.filename or directory} cannot be used ({error.strerror}): make it"
                f" writable for uid {os.geteuid()}, or set {self.field} to a path that is"
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(descriptor, 32).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise ConfigError(
                f"{self.field}: {self.path} is served by another edgellm (process {holder or 'unknown'}):"
                f" stop it, or set {self.field} to another path"
            ) from None
        self._lock = descriptor
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        try:
            self._clear_stale()
        except BaseException:
            self.release()
            raise

    def open_to(self, mode: int, group: str | None) -> None:
        """Give the bound socket its permissions and group."""
        try:
            if group is not None:
                os.chown(self.path, -1, _group_id(group))
            self.path.chmod(mode)
        except OSError as error:
            raise ConfigError(
                f"server.socket_group: {self.path} cannot be given to group {group} ({error.strerror}): name"
                " a group that the daemon's user is in"
            ) from None

    def release(self) -> None:
        """Remove the socket file, if it was bound, and let go of the lock; idempotent."""
        if self._lock is not None:
            with contextlib.suppress(OSError, ConfigError):  # what is not a socket is not ours
                self._clear_stale()
            os.close(self._lock)
            self._lock = None

    def _clear_stale(self) -> None:
        try:
            kind = self.path.lstat().st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(kind):
            raise ConfigError(
                f"{self.field}: {self.path} exists and is not a socket: remove it or name another path"
            )
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()


class Umask:
    """Files made inside get at most `mode`: a socket must not be open to all between bind and chmod.

    The mask is the process's: use it before threads start.
    """

    def __init__(self, mode: int) -> None:
        self._mask = 0o777 & ~mode

    def __enter__(self) -> None:
        self._mask = os.umask(self._mask)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.umask(self._mask)


def _group_id(group: str) -> int:
    if group.isdecimal():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigError(f"server.socket_group: there is no group {group}") from None

"""This process's own memory: locking it, and giving back what is free."""

from __future__ import annotations

import subprocess
import sys

import pytest

from edgellm.errors import ConfigError
from edgellm.memory import resident
from edgellm.memory.resident import give_back_freed, lock_memory, resident_size

LOCK = """
import pathlib, re, resource, sys
from edgellm.errors import ConfigError
from edgellm.memory.resident import lock_memory
try:
    lock_memory()
except ConfigError as error:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    assert limit != resource.RLIM_INFINITY and "LimitMEMLOCK" in str(error), error
else:
    status = pathlib.Path("/proc/self/status").read_text()
    values = {name: int(re.search(rf"{name}:\\s+(\\d+)", status)[1]) for name in ("VmLck", "VmRSS")}
    assert values["VmLck"] > 0
    # Locked as they come in: stacks and the like are not brought in first.
    assert values["VmRSS"] < 60_000, values
"""


def test_locking_works_or_names_the_limit() -> None:
    done = subprocess.run([sys.executable, "-c", LOCK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_refusal_names_the_limit_and_both_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def mlockall(self, flags: int) -> int:
            assert flags == 1 | 2 | 4
            return -1

    monkeypatch.setattr(resident, "_libc", Refusing())
    monkeypatch.setattr("ctypes.get_errno", lambda: 12)
    monkeypatch.setattr("resource.getrlimit", lambda _kind: (8 << 20, 8 << 20))
    with pytest.raises(
        ConfigError, match=r"RLIMIT_MEMLOCK is 8.0 MiB. Set LimitMEMLOCK.*memory.lock = false"
    ):
        lock_memory()


def test_the_resident_set_is_read() -> None:
    before = resident_size()
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    assert resident_size() - before > 60 << 20
    del block
    give_back_freed()
    assert resident_size() - before < 10 << 20

"""A fault for the test under a real systemd, no part of the product: a .pth file imports it into the daemon.

Once /run/edgellm/fault-NAME exists, the loop of that name hangs for ever, holding no lock and using no CPU,
as in a call into a driver that does not return. A restart clears it: systemd makes /run/edgellm anew.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

DIRECTORY = Path("/run/edgellm")
LOOPS = {
    "engine": ("edgellm.engine", "Engine", "_read_inbox"),
    "io": ("edgellm.server.server", "Server", "_turn"),
}
"""Name → a method that the loop calls in every turn."""


def hang_for_ever(*_: object) -> None:
    while True:
        time.sleep(3600)


def watch() -> None:
    while True:
        time.sleep(0.05)
        for name, (module, kind, method) in LOOPS.items():
            if module in sys.modules and (DIRECTORY / f"fault-{name}").exists():
                owner = getattr(sys.modules[module], kind)
                # Loudly, should the loop have been rewritten: the test would wait for nothing.
                assert hasattr(owner, method), f"{module}.{kind} has no {method} to hang in"
                setattr(owner, method, hang_for_ever)


if "serve" in sys.orig_argv:
    threading.Thread(target=watch, name="fault", daemon=True).start()

"""`edgellm serve ENGINE`: the daemon."""

from __future__ import annotations

import argparse
import faulthandler
from pathlib import Path
from typing import Any

FLAGS: dict[str, tuple[str, dict[str, Any]]] = {
    "--endpoint": ("server.endpoint", {"metavar": "URL", "help": "socket to bind, ipc://…"}),
    "--max-queue": ("server.max_queue", {"metavar": "N", "help": "requests that may wait for a slot"}),
    "--max-batch-size": ("engine.max_batch_size", {"metavar": "N", "help": "slots (at most as built)"}),
    "--max-seq-len": ("engine.max_seq_len", {"metavar": "N", "help": "tokens in a slot (at most as built)"}),
    "--max-num-tokens": ("engine.max_num_tokens", {"metavar": "N", "help": "tokens fed in a step"}),
    "--threads": ("engine.threads", {"metavar": "N", "help": "CPU threads that run the model"}),
    "--max-step-ms": ("scheduler.max_step_ms", {"metavar": "MS", "help": "bound on a step's time"}),
    "--drain-timeout": ("scheduler.drain_timeout_s", {"metavar": "S", "help": "grace on SIGTERM"}),
    "--log-level": ("log.level", {"metavar": "LEVEL", "help": "debug, info, warning or error"}),
}
"""Flag → the configuration key that it sets, and how argparse shows it. The configuration validates."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser("serve", help="serve an engine over a local ZeroMQ socket")
    parser.add_argument("engine", nargs="?", metavar="ENGINE", help="engine directory (or engine.path)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file")
    for flag, (key, options) in FLAGS.items():
        parser.add_argument(flag, dest=key, **options)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any configuration key, section.key"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the daemon until it is told to stop."""
    from edgellm.config import load_config
    from edgellm.daemon import Daemon
    from edgellm.journal import set_up_logging

    flags, typed = _flags(args)
    set_up_logging("info")  # what goes wrong before the configuration is known is logged, too
    # On SIGABRT, which is how systemd's watchdog kills, every thread's stack goes to the journal.
    faulthandler.enable()
    daemon = Daemon(lambda: load_config(args.config, flags=flags, typed=typed))
    return daemon.run()


def _flags(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    """Configuration keys with their values, and with the words that set them."""
    from edgellm.errors import UsageError

    flags: dict[str, Any] = {}
    typed: dict[str, str] = {}
    for assignment in args.set:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise UsageError(f"--set {assignment}: write KEY=VALUE, as in --set server.max_queue=8")
        flags[key], typed[key] = value, f"--set {assignment}"
    named = {"engine.path": ("ENGINE", args.engine)}
    named |= {key: (flag, getattr(args, key)) for flag, (key, _) in FLAGS.items()}
    for key, (flag, value) in named.items():
        if value is not None:
            flags[key], typed[key] = value, f"{flag} {value}"
    return flags, typed

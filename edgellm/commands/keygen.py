"""`edgellm keygen DIR --name NAME`: a pair of CURVE keys, for the daemon or a client, over tcp."""

from __future__ import annotations

import argparse
from pathlib import Path


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "keygen",
        help="make CURVE keys for tcp",
        description="Make a pair of CURVE keys, NAME.key and NAME.key_secret; nothing is overwritten.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="made if it is missing")
    parser.add_argument("--name", metavar="NAME", required=True, help="whose: how the rules name a client")
    whose = parser.add_mutually_exclusive_group()
    whose.add_argument("--server", action="store_true", help="the daemon's keys: say what goes where")
    whose.add_argument("--client", action="store_true", help="a client's keys: say what goes where (default)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make the files, print what is to be done with them."""
    from edgellm.curve import write_new_pair
    from edgellm.errors import BadKeys, UsageError

    try:
        public, secret = write_new_pair(args.directory, args.name)
    except BadKeys as error:
        raise UsageError(str(error)) from None
    print(_server(public, secret) if args.server else _client(args.name, public, secret))
    return 0


def _server(public: Path, secret: Path) -> str:
    return f"""\
{secret}  stays with the daemon: owned by its user, mode 0600
  server.curve_secret_key = "{secret.absolute()}"
{public}  goes to every client
  EDGELLM_CURVE_SERVER_KEY, or CurveKeys(server_public_key_file=…)"""


def _client(name: str, public: Path, secret: Path) -> str:
    return f"""\
{secret}  goes to the client alone: owned by its user, mode 0600
  EDGELLM_CURVE_SECRET_KEY, or CurveKeys(secret_key_file=…)
{public}  goes into the daemon's directory server.curve_clients; then SIGHUP
  in a rule: key = "{name}\""""

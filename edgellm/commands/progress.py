"""The progress bar of the commands that take a while."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from edgellm.executor.base import Progress


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on stderr while the block runs; nothing where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda _name, _fraction: None
        return

    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description:<24}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda name, fraction: bar.update(task, description=name, completed=fraction)

"""Types of command line flags that argparse lacks."""

from __future__ import annotations

import argparse
import math


def seconds(text: str) -> float:
    """A time that may be waited for."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds, 0 or more")
    return value

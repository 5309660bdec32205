"""Where edgellm keeps what it can bring or make again: downloaded models, compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "EDGELLM_CACHE"


def cache_directory(kind: str) -> Path:
    """The directory for one kind: below $EDGELLM_CACHE, or `edgellm` in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get(VARIABLE)
    if own:
        return Path(own) / kind
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "edgellm" / kind

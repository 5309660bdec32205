"""Checkpoint readers: every file format becomes canonical weights."""

from edgellm.checkpoint.base import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]

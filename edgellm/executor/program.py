"""A program: launches over named buffers, and from which launch to which each buffer lives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from edgellm.cuda.launch import At, Kernel, Launch
from edgellm.memory.arena import Buffer, Placement, place


@dataclass(frozen=True, slots=True)
class Program:
    """Launches in order, and the buffers that they alone use.

    Attributes:
        launches: what a graph is captured of.
        buffers: with their lives, in launches.
    """

    launches: tuple[Launch, ...]
    buffers: tuple[Buffer, ...]

    @property
    def placement(self) -> Placement:
        """Where the buffers lie, from the beginning of the memory that programs share."""
        return place(self.buffers)

    @classmethod
    def of(cls, launches: Iterable[Launch], sizes: Mapping[str, int]) -> Program:
        """A program of launches.

        Args:
            sizes: bytes of each kind of buffer that is the program's alone; other buffers last.
        """
        launches = tuple(launches)
        lives: dict[str, list[int]] = {}
        for index, launch in enumerate(launches):
            for argument in launch.arguments:
                if isinstance(argument, At) and _kind(argument.buffer) in sizes:
                    lives.setdefault(argument.buffer, []).append(index)
        # The host may look at the logits afterwards.
        lives["logits"].append(len(launches))
        buffers = [Buffer(name, sizes[_kind(name)], min(used), max(used)) for name, used in lives.items()]
        return cls(launches, tuple(buffers))


def kernels_of(programs: Iterable[Program]) -> tuple[Kernel, ...]:
    """Every kernel that programs launch, each once."""
    return tuple(dict.fromkeys(launch.kernel for program in programs for launch in program.launches))


def _kind(buffer: str) -> str:
    """A layer's buffers are named after it, so that each has a life of its own: `qkv.3` is a `qkv`."""
    return buffer.partition(".")[0]

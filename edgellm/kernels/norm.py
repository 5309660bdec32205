"""RMSNorm in front of a decode step's linears, in two halves, so that no product waits for a norm.

y = w · (gain · x / rms(x)), and the rms is one number for a row: it can wait until after the product. Whoever
writes the residual x leaves for the linear behind the next norm

    h = float16(x · gain · scale[row])         and sums of squares of 16 neighbours of x,

and that linear multiplies its result by 1 / (scale[row] · rms(x)). The scale only has to bring h into
float16's range, so it is taken from the row's norm before: scale = 1 / (ROOM · rms), ROOM = 16. What the
layer in between added makes rms(x) `growth` times as large; an element of h is then
(x / rms(x)) · gain · growth / 16, where

    the first factor is at most √hidden, of an outlier (64 for Qwen3-8B, 91 for 8,192 columns). float16
    ends at 65,504, so growth · gain may reach 11,500 for one that is all of the row;
    an element of the size of the rms keeps its 11 bits while growth · gain is above 1/1024; at 1/8192
    rounding makes an error of 2e-3 of it, where it makes 3e-4 of every number anyway.

The largest changes known are of rows with massive activations, which appear within one layer, are 100 to
200 times the rms before (Sun et al. 2024, arXiv 2402.17762) and vanish in the last ones. SmolLM2-135M has
them in its first token: growth from 0.23 to 124, the largest element of h 19. Beyond float16 h saturates.

Scales are read by all blocks of the launch that writes the next ones, so they alternate between two buffers.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgellm.cuda.launch import Argument, At


@dataclass(frozen=True, slots=True)
class Norm:
    """The norm in front of a linear, whose x is then h.

    Attributes:
        epsilon: added to the mean of squares.
        squares: float32 [rows, K / 16], sums of squares of 16 neighbours of the residual.
        scales: float32 [rows], with which h was made.
        next_scales: float32 [rows], another buffer, where those for the next h go; None: nobody needs them.
    """

    epsilon: float
    squares: At
    scales: At
    next_scales: At | None


@dataclass(frozen=True, slots=True)
class NormAhead:
    """The norm behind what writes the residual, and what it leaves for the linear there.

    Attributes:
        gain: float32 [hidden].
        scales: float32 [rows], read (by the embedding, which knows a row's rms itself: written).
        out: float16 [rows, hidden], h.
        squares: float32 [rows, hidden / 16], see `Norm`.
    """

    gain: At
    scales: At
    out: At
    squares: At

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """In the order in which every kernel that leaves them has its parameters."""
        return (self.gain, self.scales, self.out, self.squares)

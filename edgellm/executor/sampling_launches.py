"""What chooses tokens of a network's logits: a launch over buffers that executors on a device share."""

from __future__ import annotations

from edgellm.cuda.launch import At, Device, Kernel, Launch
from edgellm.executor.buckets import HISTORY
from edgellm.kernels.adjust import AdjustmentsShape
from edgellm.kernels.sample import SAMPLED, SAMPLING, sample, sample_kernel, sample_workspace
from edgellm.memory.arena import Buffer


def tokens_of_logits(vocab: int, rows: int, rows_at: At, device: Device) -> list[Launch]:
    """From `logits` to `results` and `last_token`, for the rows that want a token."""
    return sample(
        AdjustmentsShape(vocab, HISTORY),
        rows=rows,
        device=device,
        rows_at=rows_at,
        sampling=At("sampling"),
        adjustments=At("adjustments"),
        logits=At("logits"),
        last_token=At("last_token"),
        results=At("results"),
        workspace=At("sample_workspace"),
    )


def sampling_kernel(vocab: int) -> Kernel:
    """The one that is launched, on any device."""
    return sample_kernel(AdjustmentsShape(vocab, HISTORY))


def sampling_buffers(vocab: int, *, slots: int, rows: int) -> tuple[Buffer, ...]:
    """What it needs besides logits, which keeps something between steps.

    Args:
        rows: of the largest launch.
    """
    sizes = {
        "last_token": slots * 4,
        "sampling": slots * SAMPLING.itemsize,
        "adjustments": slots * AdjustmentsShape(vocab, HISTORY).dtype.itemsize,
        "results": rows * SAMPLED.itemsize,
        "sample_workspace": sample_workspace(vocab, rows=rows),
    }
    return tuple(Buffer(name, size) for name, size in sizes.items())

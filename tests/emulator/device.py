"""A device that is this CPU, with a runner of kernels."""

from __future__ import annotations

from runner import Runner

from edgellm.cuda.driver import Driver
from edgellm.cuda.launch import Device
from emulator.compile import EmulatedCompiler
from emulator.driver import HOPPER, EmulatedDriver


def emulated_runner(device: Device = HOPPER, *, seed: int = 0, copies: str = "late") -> Runner:
    """Runs launches over arrays, see `EmulatedDriver` for the options."""
    return Runner(Driver(api=EmulatedDriver(device, seed=seed, copies=copies)), EmulatedCompiler())

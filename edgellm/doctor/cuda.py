"""Whether the cuda executor can run here: the driver and its device, the compiler, the engine's kernels.

Libraries are asked in this process, and only where it runs on the machine that is examined. No context is
made: that would take hundreds of megabytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from edgellm.doctor.finding import Finding, Level
from edgellm.doctor.host import Host
from edgellm.errors import OperatorError

CHECK = "executor cuda"


def check_cuda(host: Host, *, present: bool) -> Iterator[Finding]:
    """The executor's line, and for an engine of its own whether there are kernels for the device.

    Args:
        present: whether the driver's library is installed.
    """
    if not present:
        yield Finding(CHECK, Level.OK, "cannot run", "the driver's library is missing, see CUDA above")
        return
    if not host.live:
        yield Finding.not_asked(CHECK, "another system's root: its driver cannot be asked")
        return
    from edgellm.cuda.driver import Driver

    try:
        facts = Driver(context=False).facts
    except OperatorError as error:
        # A machine without a GPU may well have the library; a Jetson's should work.
        yield Finding(
            CHECK,
            Level.WARN if host.tegra else Level.OK,
            "cannot run",
            str(error),
            "see docs/operations.md" if host.tegra else "",
        )
        return
    sm, driver = facts.device.sm, ".".join(map(str, facts.driver))
    compiler = _compiler()
    yield Finding(
        CHECK,
        Level.OK,
        f"can run: {facts.name}, sm_{sm}, {facts.device.multiprocessors} SMs, driver for CUDA {driver}, "
        + (f"NVRTC {compiler}" if compiler else "no NVRTC"),
        "" if compiler else f"engines need kernels of their own: edgellm build --executor cuda --sm {sm}",
    )
    yield from _engine(host, sm, compiler)


def _compiler() -> str | None:
    from edgellm.cuda.bindings import load_nvrtc

    try:
        _, major, minor = load_nvrtc().nvrtcVersion()
    except OperatorError:
        return None
    return f"{major}.{minor}"


def _engine(host: Host, sm: int, compiler: str | None) -> Iterator[Finding]:
    from edgellm.enginedir import open_engine

    path = host.config.engine.path
    if path is None:
        return
    try:
        engine = open_engine(Path(path))
    except OperatorError:
        return  # the configuration's own line says so
    if engine.config.edgellm.executor != "cuda":
        return
    built = sorted({name.split("/")[1] for name in engine.config.edgellm.files if name.endswith(".cubin")})
    if f"sm_{sm}" in built:
        yield Finding("kernels", Level.OK, f"the engine has them for {', '.join(built)}")
    elif compiler:
        yield Finding(
            "kernels",
            Level.OK,
            f"the engine has none for sm_{sm}",
            "they are compiled at the first start and kept",
            f"edgellm build --executor cuda --sm {sm} puts them into the engine",
        )
    else:
        yield Finding(
            "kernels",
            Level.FAIL,
            f"the engine has none for sm_{sm}",
            "and there is no NVRTC to compile them: the service exits with 66",
            f"edgellm build --executor cuda --sm {sm}, on any machine",
        )

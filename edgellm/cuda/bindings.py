"""NVIDIA's cuda-bindings, of CUDA 11.8, 12.9 or 13: the one place that knows how they differ.

driver: before 12, cuGraphInstantiate takes a log buffer; WithFlags is what later ones call by that name.
NVRTC: before 12.9 the library is looked up by its soname alone; wheels put it where nothing looks.
missing libraries: a RuntimeError, or cuda-pathfinder's, from the first call.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from edgellm.errors import DeviceError

INSTALL: Final = (
    "pip install 'edgellm[cuda12]' (JetPack 6; cuda11 for JetPack 5 and DRIVE OS 6, cuda13 for JetPack 7)"
)


def load_driver() -> ModuleType:
    """The driver API's functions; libcuda itself is loaded by the first call.

    Raises:
        DeviceError: cuda-bindings is not installed.
    """
    return _import("driver")


def load_nvrtc() -> ModuleType:
    """NVRTC's functions; the library is known to be there.

    Raises:
        DeviceError: cuda-bindings or the NVRTC library is not installed.
    """
    nvrtc = _import("nvrtc")
    _find_in_wheels()
    try:
        nvrtc.nvrtcVersion()
    except (RuntimeError, OSError) as error:
        raise DeviceError(f"CUDA's compiler library, libnvrtc, is not installed; {INSTALL}") from error
    return nvrtc


def instantiate_graph(driver: Any, graph: Any) -> Any:
    """cuGraphInstantiate without flags, as a tuple of status and graph."""
    with_flags = getattr(driver, "cuGraphInstantiateWithFlags", None)
    return driver.cuGraphInstantiate(graph, 0) if with_flags is None else with_flags(graph, 0)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise DeviceError(f"cuda-bindings is not installed ({error}); {INSTALL}") from error


def _find_in_wheels() -> None:
    """Load the wheel's libnvrtc, so that asking for its soname finds it; the linker's own comes after."""
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for library in sorted(Path(place).glob("cuda_nvrtc/lib/libnvrtc.so.*"), reverse=True):
            try:
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue
            return

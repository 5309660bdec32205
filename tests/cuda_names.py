"""Types and constants of cuda-bindings' driver module that `edgellm.cuda.driver` names, in plain Python."""

from __future__ import annotations

from types import SimpleNamespace


class CudaNames:
    """What every stand-in for that module has beside its functions."""

    CUDA_VERSION = 12090
    CUdevice_attribute = staticmethod(int)
    CUfunction_attribute = staticmethod(int)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
    CUlaunchAttributeID = SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=6)
    CUdeviceptr = staticmethod(int)
    CUmemorytype = SimpleNamespace(CU_MEMORYTYPE_DEVICE=2)
    CUlaunchConfig = CUDA_MEMCPY2D = CUlaunchAttribute = CUlaunchAttributeValue = SimpleNamespace

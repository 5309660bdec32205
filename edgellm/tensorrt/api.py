"""Which TensorRT is at hand, and in what its versions differ.

| | TensorRT 10.15, 10.16 (JetPack 7.2) | TensorRT 11 | TensorRT-RTX 1.4 and later |
|---|---|---|---|
| attention | `add_attention`, explicit mask | `add_attention_v2`, lengths | `add_attention_v2`, lengths |
| KV-cache and rotary layers | yes | yes | yes |
| mixture-of-experts layer | no | where `add_moe` exists | where `add_moe` exists |
| plans for other devices than the one at hand | no | no | `set_compute_capability` |
| runs on | every device it has kernels for | the same | GeForce and RTX, compute capability 7.5, 8.x, 12 |

What differs is read off the library, never off its version; the version is checked against a floor only.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final, Literal

from edgellm.errors import TensorRtMissing

MODULES: Final = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
"""In order of preference. TensorRT-RTX's wheel of bindings can be imported by itself, too."""
OLDEST: Final = {"tensorrt": (10, 15), "tensorrt_rtx": (1, 4)}
"""The first versions with attention, KV-cache and rotary layers."""


@dataclass(frozen=True, slots=True)
class Api:
    """A TensorRT and what it can do.

    Attributes:
        module: the bindings.
        name: `tensorrt` or `tensorrt_rtx`.
        version: as the library says.
        has_lengths: attention takes the number of valid cache positions of each row.
        has_moe: there is a layer for a mixture of experts.
        builds_ahead: plans can be built for devices that are not at hand.
    """

    module: ModuleType
    name: Literal["tensorrt", "tensorrt_rtx"]
    version: str
    has_lengths: bool
    has_moe: bool
    builds_ahead: bool


def find_api(names: tuple[str, ...] = MODULES) -> Api:
    """The first of the libraries that is installed.

    Raises:
        TensorRtMissing: none is, or the one found has no layers for a language model; says what would do.
    """
    module, reasons = None, []
    for name in names:
        try:
            module = importlib.import_module(name)
            break
        except ModuleNotFoundError:
            continue
        except (ImportError, OSError) as error:  # the bindings are there, the libraries are not
            reasons.append(f"{name} cannot be loaded: {error}")
    if module is None:
        found = "; ".join(reasons) if reasons else "no TensorRT is installed"
        raise TensorRtMissing(
            f"{found}. On a Jetson it comes with JetPack (apt, --system-site-packages), on a PC `pip install "
            "tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13-libs`; without it use `--executor cuda`"
        )
    return describe(module)


def describe(module: ModuleType) -> Api:
    """What this library can do.

    Raises:
        TensorRtMissing: it is older than the layers that a language model needs.
    """
    name: Literal["tensorrt", "tensorrt_rtx"] = (
        "tensorrt_rtx" if module.__name__.startswith("tensorrt_rtx") else "tensorrt"
    )
    version = str(module.__version__)
    network: Any = module.INetworkDefinition
    oldest = OLDEST[name]
    if _numbers(version) < oldest or not hasattr(network, "add_kv_cache_update"):
        raise TensorRtMissing(
            f"{name} {version} has no attention, KV-cache and rotary layers: {'.'.join(map(str, oldest))} is "
            "the oldest that has. Use `--executor cuda`, which needs no TensorRT"
        )
    return Api(
        module=module,
        name=name,
        version=version,
        has_lengths=hasattr(network, "add_attention_v2"),
        has_moe=hasattr(network, "add_moe"),
        builds_ahead=hasattr(module.IBuilderConfig, "set_compute_capability"),
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())

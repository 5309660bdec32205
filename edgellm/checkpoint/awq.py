"""AutoAWQ's GEMM layout → canonical weights.

For a layer [N, K] in groups of g of its columns (Lin et al. 2023; AutoAWQ, awq/modules/linear/gemm.py):
    qweight int32 [K, N / 8] · qzeros int32 [K / g, N / 8] · scales float16 [K / g, N]
    w[n, k] = scales[k // g, n] · (q[k, n] − z[k // g, n])
A word holds 8 columns in the order of `ORDER`, lowest bits first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from edgellm.checkpoint.config_file import ConfigFile
from edgellm.checkpoint.packed import (
    FLOATS,
    Bytes,
    check_group,
    floats,
    require,
    transposed,
    words,
    words_around,
)
from edgellm.checkpoint.safetensors import SafetensorsModel
from edgellm.errors import CheckpointError
from edgellm.model.weights import Grouped, Groups

ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
"""Bits 4i … 4i + 3 of a word are of column 8c + ORDER[i]."""
_ROWS: Final = 8
_KNOWN: Final = frozenset(
    {"quant_method", "bits", "w_bit", "group_size", "q_group_size", "version", "zero_point"}
    | {
        "modules_to_not_convert",
        "backend",
        "do_fuse",
        "exllama_config",
        "fuse_max_seq_len",
        "modules_to_fuse",
    }
)


@dataclass(frozen=True, slots=True)
class Awq:
    """See `Packing`.

    Attributes:
        group: columns that share a scale; −1: all.
    """

    group: int
    quant_algo: Literal["W4A16_AWQ"] = "W4A16_AWQ"
    suffixes: tuple[str, ...] = ("qweight", "qzeros", "scales")

    @classmethod
    def from_config(cls, config: ConfigFile) -> Awq:
        """What a quantization_config with quant_method `awq` describes.

        Raises:
            CheckpointError: another layout than GEMM with zero points in 4 bits.
        """
        config.require_known(_KNOWN)
        for key in ("bits", "w_bit"):
            if config.integer(key, 4) != 4:
                raise config.unsupported(key)
        if config.string("version", "gemm").lower() != "gemm":
            raise config.unsupported("version")
        if not config.boolean("zero_point", True):
            raise config.unsupported("zero_point")
        key = "group_size" if "group_size" in config.values else "q_group_size"
        return cls(config.integer(key, minimum=-1))

    def weight(self, model: SafetensorsModel, layer: str, shape: tuple[int, int]) -> Grouped:
        """The weight [N, K] of a layer; its bytes are read by its `read()`."""
        n, k = shape
        where = f"{model.path}: {layer}"
        group = check_group(where, self.group, k)
        if n % 8:
            raise CheckpointError(f"{where} has {n} rows; AWQ packs 8 into a word")
        require(model, f"{layer}.qweight", (k, n // 8), ("I32",))
        require(model, f"{layer}.qzeros", (k // group, n // 8), ("I32",))
        require(model, f"{layer}.scales", (k // group, n), FLOATS)

        def read_rows(begin: int, end: int) -> Groups:
            columns, inside = words_around(begin, end, 8)
            return Groups(
                q=_unpack(words(model, f"{layer}.qweight", columns=columns))[inside],
                scale=floats(model, f"{layer}.scales", columns=slice(begin, end)).T,
                zero=_unpack(words(model, f"{layer}.qzeros", columns=columns))[inside],
            )

        return Grouped(layer, shape, 4, group, True, read_rows)


def _unpack(packed: NDArray[np.int32]) -> Bytes:
    """uint8 [N, R] from int32 [R, N / 8]."""
    # Words first, so that what is transposed is an eighth as many elements.
    columns = transposed(packed)
    numbers = np.empty((len(columns), 8, columns.shape[1]), np.uint8)
    for begin in range(0, len(columns), _ROWS):
        some = columns[begin : begin + _ROWS]
        in_bytes = some.view(np.uint8).reshape(*some.shape, 4)
        for byte in range(4):
            pair = np.ascontiguousarray(in_bytes[..., byte])
            numbers[begin : begin + _ROWS, ORDER[2 * byte]] = pair & 0x0F
            numbers[begin : begin + _ROWS, ORDER[2 * byte + 1]] = pair >> 4
    return numbers.reshape(-1, columns.shape[1])

"""The TensorRT executor's caches: rows of device memory, moved by the device's own copies."""

from __future__ import annotations

from typing import Any

from edgellm.cuda.driver import Driver
from edgellm.executor.kv_rows import RowMap


class DeviceRows(RowMap):
    """See `RowMap`; copies go into the stream, behind the steps that wrote and before those that read.

    Args:
        rows: slots.
        caches: address of each layer's keys, then values: float16 [rows, kv_heads, max_seq_len, head_size].
        spare: address of room for one row of one of them.
        token_bytes: of one token's keys of one head.
    """

    def __init__(
        self,
        driver: Driver,
        stream: Any,
        *,
        rows: int,
        caches: list[int],
        spare: int,
        kv_heads: int,
        max_seq_len: int,
        token_bytes: int,
    ) -> None:
        super().__init__(rows)
        self._driver = driver
        self._stream = stream
        self._caches = caches
        self._spare = spare
        self._kv_heads = kv_heads
        self._pitch = max_seq_len * token_bytes
        self._token_bytes = token_bytes

    def address(self, cache: int, row: int) -> int:
        """Where a row of a cache begins."""
        return self._caches[cache] + row * self._kv_heads * self._pitch

    def _copy(self, source: int, target: int, length: int) -> None:
        for cache in range(len(self._caches)):
            self._send(self.address(cache, source), self.address(cache, target), length)

    def _exchange(self, a: int, b: int, n: int, m: int) -> None:
        for cache in range(len(self._caches)):
            one, other = self.address(cache, a), self.address(cache, b)
            self._send(other, self._spare, m)
            self._send(one, other, n)
            self._send(self._spare, one, m)

    def _send(self, source: int, target: int, length: int) -> None:
        if length:
            self._driver.copy_rows(
                source,
                target,
                pitch=self._pitch,
                width=length * self._token_bytes,
                rows=self._kv_heads,
                stream=self._stream,
            )

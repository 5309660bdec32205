"""JSON files of a model directory: values fetched with their types checked, and errors that name them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

from edgellm.checkpoint.safetensors import read_json
from edgellm.errors import CheckpointError

MAX_CONFIG_BYTES: Final = 1 << 24


class ConfigFile:
    """A config.json, or an object inside it, whose values are fetched with their types checked.

    Raises:
        CheckpointError: by every method, when a value is missing or not what it should be; it is named.
    """

    def __init__(self, where: str, values: dict[str, Any]) -> None:
        self.where = where
        self.values = values

    @classmethod
    def open(cls, path: Path) -> ConfigFile:
        """Read the file."""
        return cls(str(path), read_json(path, MAX_CONFIG_BYTES))

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        """An integer ≥ minimum; without a default it must be there."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(key, value, "an integer")
        if value < minimum:
            raise CheckpointError(f"{self.where}: {key} is {value}, which is below {minimum}")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above 0; without a default it must be there."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(key, value, "a number")
        if not 0 < value < math.inf:
            raise CheckpointError(f"{self.where}: {key} is {value}, which should be positive and finite")
        return float(value)

    def string(self, key: str, default: str | None = None) -> str:
        """A string; without a default it must be there."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, value, "a string")
        return value

    def boolean(self, key: str, default: bool | None = None) -> bool:
        """A boolean; without a default it must be there."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def section(self, key: str) -> ConfigFile | None:
        """An object; None if it is not there."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(key, value, "an object")
        return ConfigFile(f"{self.where}: {key}", value)

    def wrong(self, key: str, value: object, wanted: str) -> CheckpointError:
        """The error of a value that is not what it should be."""
        return CheckpointError(f"{self.where}: {key} should be {wanted}, but it is {value!r:.80}")

    def unsupported(self, key: str) -> CheckpointError:
        """The error of a value that asks for what edgellm does not do."""
        return CheckpointError(
            f"{self.where} has {key} = {self.values[key]!r:.80}, which edgellm does not support"
        )

    def require_known(self, known: frozenset[str]) -> None:
        """Refuse keys beyond the known ones, unless they are off or begin with an underscore."""
        for key, value in self.values.items():
            off = value is None or value is False or value in ("", [], {})
            if key not in known and not off and not key.startswith("_"):
                raise self.unsupported(key)

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.where} has no {key}, which edgellm needs")
        return value

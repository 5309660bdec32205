"""Types of fields that several messages have."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

VERSION = 1
MAX_ID_LENGTH = 128

Id = Annotated[str, Meta(min_length=1, max_length=MAX_ID_LENGTH)] | Annotated[int, Meta(ge=0)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Role = Literal["system", "user", "assistant", "tool"]
PriorityName = Literal["critical", "high", "normal", "background"]
Phase = Literal["loading", "ready", "draining"]
StateName = Literal["NORMAL", "THROTTLED", "SHED", "CRITICAL"]
Millis = Annotated[int, Meta(ge=1, le=86_400_000)]

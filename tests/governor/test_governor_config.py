"""Thresholds whose order makes no sense are refused, by name."""

from __future__ import annotations

import msgspec
import pytest

from edgellm.governor.config import GovernorConfig, LimitsConfig, SensorsConfig


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"shed_below_c": 13.0}, "shed_below_c must be less than target_below_c"),
        ({"target_below_c": 17.0}, "target_below_c must be less than normal_below_c"),
        ({"throttle_below_c": 16.0}, "throttle_below_c must be less than normal_below_c"),
        ({"memory_hard_mib": 600}, "memory_hard_mib must not be more than memory_soft_mib"),
        ({"duty_floor": 0.0}, "duty_floor"),
        ({"heat": True}, "unknown field `heat`"),
    ],
)
def test_what_makes_no_sense_is_refused(values: dict[str, object], says: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=says):
        msgspec.convert(values, GovernorConfig)


def test_defaults_are_consistent() -> None:
    for kind in (GovernorConfig, LimitsConfig, SensorsConfig):
        assert msgspec.convert({}, kind) == kind()
    with pytest.raises(msgspec.ValidationError, match="duty"):
        msgspec.convert({"duty": 0}, LimitsConfig)

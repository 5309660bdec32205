"""How things are: what `status` answers, and what is published once a second."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import psutil

from edgellm.governor.causes import module_watts
from edgellm.governor.sensors import Readings, Zone
from edgellm.protocol import Phase, StatusReply
from edgellm.server.gate import STATE_NAMES
from edgellm.server.served import EngineHandle, GovernorHandle, ServedModel


class Statistics:
    """Puts engine, governor and the daemon's own counters together. Reads no sensor: the last sweep's values.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._started = clock()
        self._process = psutil.Process()

    def gather(
        self,
        id_: str | int | None,
        *,
        status: Phase,
        clients: int,
        requests: Mapping[str, int],
        served: tuple[ServedModel, EngineHandle] | None,
        governor: GovernorHandle | None,
    ) -> StatusReply:
        """A `status` reply; what is not known yet is 0 or None."""
        slots, stats = (served[0].max_batch_size, served[1].snapshot()) if served else (0, None)
        decision = governor.decision if governor else None
        readings = governor.readings if governor else None
        hottest = _hottest(readings)
        return StatusReply(
            id=id_,
            status=status,
            uptime_s=self._clock() - self._started,
            running=stats.running if stats else 0,
            queued=stats.queued if stats else 0,
            slots=slots,
            batch_cap=stats.batch_cap if stats else 0,
            clients=clients,
            requests=dict(requests),
            prompt_tokens=stats.prompt_tokens if stats else 0,
            cached_tokens=stats.cached_tokens if stats else 0,
            completion_tokens=stats.completion_tokens if stats else 0,
            steps=stats.steps if stats else 0,
            rss_bytes=self._process.memory_info().rss,
            state=STATE_NAMES[decision.state] if decision else None,
            reason=decision.reason if decision else None,
            detail=decision.detail if decision else None,
            duty=decision.duty if decision else 0.0,
            transitions={state.name: count for state, count in governor.transitions.items()}
            if governor
            else {},
            hottest_zone=hottest.name if hottest else None,
            hottest_c=hottest.celsius if hottest else None,
            watts=module_watts(readings) if readings else None,
            available_bytes=readings.memory.available if readings else None,
        )


def _hottest(readings: Readings | None) -> Zone | None:
    """The readable zone closest to its trip, as the governor judges; where none has a trip, the warmest."""
    return max(
        (zone for zone in (readings.zones if readings else ()) if zone.celsius is not None),
        key=lambda zone: (zone.margin is not None, zone.margin or 0.0, zone.celsius),
        default=None,
    )

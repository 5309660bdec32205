"""The [governor], [limits] and [sensors] sections of the configuration."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

Degrees = Annotated[float, Meta(ge=0, le=60)]
Seconds = Annotated[float, Meta(ge=0, le=3600)]
Duty = Annotated[float, Meta(gt=0, le=1)]
Mebibytes = Annotated[int, Meta(ge=0, le=1 << 20)]
Percent = Annotated[float, Meta(gt=0, le=100)]


class GovernorConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When edgellm backs off, and how. All of it can be reloaded.

    Temperatures are degrees below a zone's own passive trip, so they hold on every board.

    Attributes:
        enabled: false: nothing is read, and only [limits] and the ops limit and suspend act.
        throttle_below_c: THROTTLED is entered here.
        normal_below_c: below this, in every zone, heat is no cause for THROTTLED any more.
        shed_below_c: SHED is entered here.
        shed_exit_below_c: SHED is left below this.
        critical_exit_below_c: CRITICAL, which is entered at the trip itself, is left below this.
        target_below_c: where the duty controller holds the hottest zone while THROTTLED.
        dwell_s: a state is left when what caused it has been gone for this long; where states come and go,
            the time doubles with each return, up to 20 times this.
        duty_floor: the least duty of THROTTLED, and the duty of SHED.
        duty_unknown: the most duty while a required sensor is unknown.
        duty_gain: duty per °C of change of the hottest zone (the proportional part).
        duty_reset_s: time in which the integral part repeats the proportional one.
        duty_fall_per_s, duty_rise_per_s: the controller's rate limits.
        smooth_s: time constant of the temperature filter in front of the controller.
        look_ahead_s: THROTTLED is entered early when the hottest zone would reach the SHED line in this time.
        escalate_s: SHED becomes CRITICAL when the hottest zone, above the SHED line, is 1 °C hotter than so
            long before.
        step_s: time between two steps, down or up, of the batch cap, and of the duty under causes other than
            heat.
        hold_unknown_s: a hot zone that becomes unreadable counts as hot as it last was for this long.
        memory_soft_mib, memory_hard_mib: less available memory (MemAvailable − CmaFree) is THROTTLED, SHED; 0
            switches the line off.
        psi_some_percent, psi_full_percent: memory pressure over 10 s: more is THROTTLED, SHED.
        swap_growth_mib: swap taken within a minute: more is THROTTLED; 0 switches it off.
        power_limit_w: the module's rail (VDD_IN, or all rails but the always-on one) above this is THROTTLED;
            0 switches it off.
        gpu_clock_share: a busy GPU that runs below this share of its maximal clock for 3 s is THROTTLED; 0
            switches it off.
        stale_s: readings older than this are unknown.
    """

    enabled: bool = True
    throttle_below_c: Degrees = 12.0
    normal_below_c: Degrees = 16.0
    shed_below_c: Degrees = 6.0
    shed_exit_below_c: Degrees = 10.0
    critical_exit_below_c: Degrees = 12.0
    target_below_c: Degrees = 10.0
    dwell_s: Seconds = 30.0
    duty_floor: Duty = 0.05
    duty_unknown: Duty = 0.25
    duty_gain: Annotated[float, Meta(ge=0, le=1)] = 0.08
    duty_reset_s: Annotated[float, Meta(gt=0, le=3600)] = 90.0
    duty_fall_per_s: Annotated[float, Meta(gt=0, le=1)] = 0.2
    duty_rise_per_s: Annotated[float, Meta(gt=0, le=1)] = 0.02
    smooth_s: Seconds = 3.0
    look_ahead_s: Seconds = 5.0
    escalate_s: Annotated[float, Meta(gt=0, le=3600)] = 30.0
    step_s: Annotated[float, Meta(gt=0, le=3600)] = 5.0
    hold_unknown_s: Seconds = 120.0
    memory_soft_mib: Mebibytes = 512
    memory_hard_mib: Mebibytes = 256
    psi_some_percent: Percent = 20.0
    psi_full_percent: Percent = 10.0
    swap_growth_mib: Mebibytes = 64
    power_limit_w: Annotated[float, Meta(ge=0, le=1000)] = 0.0
    gpu_clock_share: Annotated[float, Meta(ge=0, le=1)] = 0.85
    stale_s: Annotated[float, Meta(gt=0, le=3600)] = 5.0

    def __post_init__(self) -> None:
        """Refuse thresholds whose order makes no sense; msgspec turns ValueError into ValidationError."""
        for hotter, cooler in (
            ("shed_below_c", "target_below_c"),
            ("target_below_c", "normal_below_c"),
            ("shed_below_c", "throttle_below_c"),
            ("throttle_below_c", "normal_below_c"),
            ("shed_below_c", "shed_exit_below_c"),
            ("shed_exit_below_c", "normal_below_c"),
        ):
            hot, cool = getattr(self, hotter), getattr(self, cooler)
            if hot >= cool:
                raise ValueError(
                    f"{hotter} must be less than {cooler}, as it is the hotter line: {hot:g} is not less"
                    f" than {cool:g}"
                )
        if self.memory_soft_mib and self.memory_hard_mib > self.memory_soft_mib:
            raise ValueError(
                f"memory_hard_mib must not be more than memory_soft_mib: {self.memory_hard_mib} is more than"
                f" {self.memory_soft_mib}"
            )


class LimitsConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Permanent ceilings: what the model may take at the best of times. They can be reloaded.

    Attributes:
        batch: rows that run at once; 0: as many as there are slots.
        duty: share of the time in which steps run; 1: no pauses.
    """

    batch: Annotated[int, Meta(ge=0, le=256)] = 0
    duty: Duty = 1.0


class SensorsConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is read, and what must be readable.

    Attributes:
        required: names as in `Readings.known`; a missing or unknown one throttles. None: the board's own
            expectation; []: nothing is required, for a guest under a hypervisor that has no sensors.
        interval_s: between two sweeps. Reads may be calls into firmware: not below 0.5 s.
        root: where /sys, /proc and /etc are; another one than `/` is for tests and containers.
        rediscover_s: after a sensor vanished, at most this often is looked for it again.
    """

    required: list[str] | None = None
    root: str = "/"
    interval_s: Annotated[float, Meta(ge=0.5, le=60)] = 1.0
    rediscover_s: Annotated[float, Meta(ge=1, le=86_400)] = 60.0

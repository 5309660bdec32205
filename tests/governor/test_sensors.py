"""Each tree yields what a person would read off it; whatever is off, garbled or absurd is unknown."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from trees import TREES, break_read, expand, put, remove

from edgellm.governor.sensors import Readings, Sensors

THERMAL = "sys/class/thermal"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def temperatures(readings: Readings) -> dict[str, float | None]:
    return {zone.name: zone.celsius for zone in readings.zones}


def trips(readings: Readings) -> dict[str, tuple[float | None, float | None, float | None]]:
    return {zone.name: (zone.passive, zone.hot, zone.critical) for zone in readings.zones}


def test_agx_r35(tmp_path: Path) -> None:
    readings = Sensors(expand("agx-orin-r35", tmp_path), clock=Clock()).read()
    assert temperatures(readings) == {
        "tboard_tegra": 41.0,
        "tdiode_tegra": 43.5,
        "cpu-therm": 52.031,
        "gpu-therm": 49.5,
        "cv0-therm": None,  # −256000: powered down
        "cv1-therm": None,
        "cv2-therm": None,
        "soc0-therm": 48.781,
        "soc1-therm": 48.5,
        "soc2-therm": 47.906,
        "tj-therm": 52.031,
    }
    # 99 °C lowers clocks; the passive trip at 70 °C is bound to hot-surface-alert alone and lowers nothing.
    assert trips(readings)["cpu-therm"] == (99.0, None, 104.5)
    assert trips(readings)["tj-therm"] == (99.0, None, 104.5)
    assert trips(readings)["tboard_tegra"] == (99.0, None, 104.5)  # has none of its own
    assert readings.throttling["gpu-throttle-alert"] == 0
    assert "hot-surface-alert" not in readings.throttling
    assert "pwm-fan" not in readings.throttling
    assert readings.over_current == {"oc1_event_cnt": 0, "oc2_event_cnt": 0, "oc3_event_cnt": 3}
    assert readings.gpu is not None
    assert (readings.gpu.hertz, readings.gpu.max_hertz, readings.gpu.load) == (306e6, 1300.5e6, 0.12)
    assert readings.rails == pytest.approx(
        {
            "VDD_GPU_SOC": 19.112 * 0.320,
            "VDD_CPU_CV": 19.096 * 0.112,
            "VIN_SYS_5V0": 4.976 * 0.960,
            "VDDQ_VDD2_1V8AO": 19.096 * 0.064,
        }
    )
    assert readings.memory.total == 62_799_840 * 1024
    assert readings.memory.available == (55_574_528 - 196_608) * 1024
    assert readings.memory.swap_free == readings.memory.swap_total == 31_399_904 * 1024
    assert (readings.memory.psi_some, readings.memory.psi_full) == (None, None)  # r35 kernels have no PSI
    assert readings.at == 100.0


def test_nx_r36(tmp_path: Path) -> None:
    readings = Sensors(expand("orin-nx-r36", tmp_path)).read()
    assert temperatures(readings) == {
        "cpu-thermal": 88.5,
        "gpu-thermal": 97.25,
        "cv0-thermal": None,  # an I/O error
        "cv1-thermal": None,
        "cv2-thermal": None,
        "soc0-thermal": 86.031,
        "soc1-thermal": 85.468,
        "soc2-thermal": 86.812,
        "tj-thermal": 97.25,
    }
    assert set(trips(readings).values()) == {(99.0, None, 104.5)}
    assert {name for name, state in readings.throttling.items() if state} == {
        "devfreq-17000000.gpu",
        "gpu-throttle-alert",
    }
    assert readings.over_current == {"oc1_event_cnt": 0, "oc2_event_cnt": 2, "oc3_event_cnt": 117}
    assert readings.gpu is not None
    assert (readings.gpu.hertz, readings.gpu.load) == (510e6, 0.998)
    assert readings.rails["VDD_IN"] == pytest.approx(4.968 * 4.120)
    assert readings.memory.available == (1_228_800 - 65_536) * 1024
    assert (readings.memory.psi_some, readings.memory.psi_full) == (4.25, 1.5)


def test_nano_r39(tmp_path: Path) -> None:
    readings = Sensors(expand("orin-nano-r39", tmp_path)).read()
    assert temperatures(readings) == {
        "cpu-thermal": 47.718,
        "gpu-thermal": None,  # the GPU is powered down
        "cv0-thermal": None,
        "cv1-thermal": None,
        "cv2-thermal": None,
        "soc0-thermal": 46.5,
        "soc1-thermal": 46.593,
        "soc2-thermal": 45.906,
        "tj-thermal": 47.718,
    }
    assert trips(readings)["tj-thermal"] == (95.0, 99.0, 104.5)  # the fan's steps at 50, 65, 80 do not count
    assert trips(readings)["cv0-thermal"] == (99.0, None, 104.5)
    assert readings.throttling == {"cpufreq-cpu0": 0, "cpufreq-cpu4": 0, "devfreq-17000000.gpu": 0}
    assert readings.rails == pytest.approx({"VDD_IN": 4.5, "VDD_CPU_GPU_CV": 0.6, "VDD_SOC": 1.3})
    assert readings.memory.psi_some == 0.0


def test_drive_os(tmp_path: Path) -> None:
    readings = Sensors(expand("drive-os-6", tmp_path)).read()
    assert temperatures(readings) == {
        "cpu-therm": 61.0,
        "gpu-therm": 58.5,
        "soc0-therm": None,  # an I/O error
        "soc1-therm": None,  # "n/a"
    }
    assert set(trips(readings).values()) == {(99.0, None, 104.5)}  # a guest sees no trips: Orin's are assumed
    assert (readings.throttling, readings.over_current, readings.rails) == ({}, {}, {})
    assert readings.gpu is not None
    assert (readings.gpu.hertz, readings.gpu.load) == (1275e6, 0.64)
    assert readings.memory.available == 20_971_520 * 1024


def test_pc(tmp_path: Path) -> None:
    readings = Sensors(expand("pc", tmp_path)).read()
    assert temperatures(readings) == {
        "acpitz": 54.0,
        "acpitz#2": 20.0,
        "x86_pkg_temp": 57.0,
        "iwlwifi_1": None,
    }
    assert all(zone.passive is None and zone.margin is None for zone in readings.zones)  # none governs
    assert (readings.throttling, readings.over_current, readings.rails, readings.gpu) == ({}, {}, {}, None)
    assert readings.memory.psi_some == 0.12


def test_a_zone_that_shuts_down_earlier_is_assumed_to_throttle_earlier(tmp_path: Path) -> None:
    root = expand("agx-orin-r35", tmp_path)
    put(
        root, f"{THERMAL}/thermal_zone7/trip_point_0_temp", "95000"
    )  # SOC0: a critical trip and no passive one
    assert trips(Sensors(root).read())["soc0-therm"] == (89.5, None, 95.0)


def test_nothing_at_all_reads_as_nothing(tmp_path: Path) -> None:
    readings = Sensors(tmp_path, clock=Clock()).read()
    assert readings == Readings(at=100.0)


@pytest.mark.parametrize(
    "text", ["", "n/a", "52.5", "0x20", "1e4", "٤٥٠٠٠", "-256000", "-41000", "150001", "9" * 30]
)
def test_garbled_and_absurd_temperatures_are_unknown(text: str, tmp_path: Path) -> None:
    root = expand("orin-nano-r39", tmp_path)
    put(root, f"{THERMAL}/thermal_zone8/temp", text)
    assert temperatures(Sensors(root).read())["tj-thermal"] is None


@pytest.mark.parametrize(
    ("text", "celsius"), [("-40000", -40.0), ("0", 0.0), ("150000", 150.0), (" 45500 ", 45.5)]
)
def test_the_whole_plausible_range_is_known(text: str, celsius: float, tmp_path: Path) -> None:
    root = expand("orin-nano-r39", tmp_path)
    put(root, f"{THERMAL}/thermal_zone8/temp", text)
    assert temperatures(Sensors(root).read())["tj-thermal"] == celsius


def test_a_zone_that_vanishes_is_unknown_until_discovery_drops_it(tmp_path: Path) -> None:
    clock = Clock()
    root = expand("orin-nx-r36", tmp_path)
    sensors = Sensors(root, clock=clock, rediscover_s=60)
    assert temperatures(sensors.read())["gpu-thermal"] == 97.25
    remove(root, f"{THERMAL}/thermal_zone1")
    assert temperatures(sensors.read())["gpu-thermal"] is None
    clock.now += 59
    assert temperatures(sensors.read())["gpu-thermal"] is None
    clock.now += 1
    assert "gpu-thermal" not in temperatures(sensors.read())


def test_a_zone_whose_index_was_given_to_another_is_unknown_not_the_other(tmp_path: Path) -> None:
    clock = Clock()
    root = expand("orin-nx-r36", tmp_path)
    sensors = Sensors(root, clock=clock, rediscover_s=60)
    put(root, f"{THERMAL}/thermal_zone1/type", "nvme-thermal")
    put(root, f"{THERMAL}/thermal_zone1/temp", "31000")
    put(root, f"{THERMAL}/thermal_zone9/type", "gpu-thermal")
    put(root, f"{THERMAL}/thermal_zone9/temp", "91000")
    assert temperatures(sensors.read())["gpu-thermal"] is None
    clock.now += 60
    found = temperatures(sensors.read())
    assert (found["gpu-thermal"], found["nvme-thermal"]) == (91.0, 31.0)


def test_a_renumbered_hwmon_is_unknown_then_found_again(tmp_path: Path) -> None:
    clock = Clock()
    root = expand("orin-nx-r36", tmp_path)
    sensors = Sensors(root, clock=clock, rediscover_s=60)
    assert sensors.read().over_current["oc3_event_cnt"] == 117
    hwmon = root / "sys/class/hwmon"
    (hwmon / "hwmon2").rename(hwmon / "hwmon7")  # soctherm_oc moves, and the fan takes its number
    (hwmon / "hwmon3").rename(hwmon / "hwmon2")
    assert sensors.read().over_current == {
        "oc1_event_cnt": None,
        "oc2_event_cnt": None,
        "oc3_event_cnt": None,
    }
    clock.now += 60
    assert sensors.read().over_current == {"oc1_event_cnt": 0, "oc2_event_cnt": 2, "oc3_event_cnt": 117}


def test_a_counter_reset_is_reported_as_it_is(tmp_path: Path) -> None:
    root = expand("orin-nx-r36", tmp_path)
    sensors = Sensors(root)
    sensors.read()
    put(root, "sys/devices/platform/soctherm-oc-event/hwmon/hwmon2/oc3_event_cnt", "2")
    assert sensors.read().over_current["oc3_event_cnt"] == 2


def test_zones_that_appear_late_are_found_on_a_board_that_should_have_some(tmp_path: Path) -> None:
    clock = Clock()
    root = expand("orin-nx-r36", tmp_path)
    (root / THERMAL).rename(tmp_path / "aside")
    sensors = Sensors(root, clock=clock, rediscover_s=60)
    assert sensors.read().zones == ()
    (tmp_path / "aside").rename(root / THERMAL)
    clock.now += 60
    assert temperatures(sensors.read())["tj-thermal"] == 97.25


def test_rails_are_read_in_turn_after_the_first_sweep(tmp_path: Path) -> None:
    root = expand("orin-nx-r36", tmp_path)
    sensors = Sensors(root)
    sensors.read()
    chip = "sys/devices/platform/c240000.i2c/i2c-1/1-0040/hwmon/hwmon1"
    for channel in (1, 2, 3):
        put(root, f"{chip}/curr{channel}_input", "1000")
    fresh = [sum(watts == 4.968 for watts in sensors.read().rails.values()) for _ in range(3)]
    assert fresh == [1, 2, 3]


def test_a_rail_that_fails_is_unknown(tmp_path: Path) -> None:
    root = expand("orin-nx-r36", tmp_path)
    break_read(root, "sys/devices/platform/c240000.i2c/i2c-1/1-0040/hwmon/hwmon1/curr1_input")
    assert Sensors(root).read().rails["VDD_IN"] is None


def test_what_is_required_is_looked_up_by_name(tmp_path: Path) -> None:
    readings = Sensors(expand("orin-nx-r36", tmp_path)).read()
    for known in (
        "tj",
        "gpu",
        "CPU-thermal",
        "vdd_in",
        "oc3_event_cnt",
        "cv0-throttle-alert",
        "gpu-clock",
        "memory",
    ):
        assert readings.known(known), known
    for unknown in ("cv0", "t", "tdiode_tegra", "VDD_GPU_SOC", ""):
        assert not readings.known(unknown), unknown


@pytest.mark.parametrize("tree", TREES)
def test_a_sweep_opens_few_files(tree: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figure is 5 ms a sweep; this bounds what it is made of, independently of the machine."""
    sensors = Sensors(expand(tree, tmp_path))
    sensors.read()
    opened: list[object] = []
    real = os.open

    def count(path: str, flags: int) -> int:
        opened.append(path)
        return real(path, flags)

    monkeypatch.setattr(os, "open", count)
    monkeypatch.setattr(os, "listdir", lambda path: pytest.fail(f"a sweep listed {path}"))
    sensors.read()
    assert 0 < len(opened) <= 80

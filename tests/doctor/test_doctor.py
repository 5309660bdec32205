"""The doctor on boards as files, and on what a board can do wrong."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from fake_engine import Service
from trees import TREES, expand, put, remove

from edgellm.commands import doctor
from edgellm.doctor.examination import CHECKS, as_json, as_text, examine, worst
from edgellm.doctor.finding import Finding, Level
from edgellm.doctor.host import CONFIGURATION, Host, run_command
from edgellm.doctor.power import power_modes
from edgellm.errors import UsageError
from edgellm.governor.sensors import Readings

NOBODY = 65534
NVPMODEL = """
< POWER_MODEL ID=0 NAME=MAXN >
CPU_ONLINE CORE_0 1
GPU MIN_FREQ 0
GPU MAX_FREQ -1
EMC MAX_FREQ 0
< POWER_MODEL ID=1 NAME=10W >
GPU MAX_FREQ 625000000
EMC MAX_FREQ 2133000000
< POWER_MODEL ID=2 NAME=25W >
GPU MAX_FREQ 408000000
EMC MAX_FREQ 0
< PM_CONFIG DEFAULT=2 >
"""


def findings(root: Path, run: Callable[[Sequence[str]], str | None] | None = None) -> dict[str, Finding]:
    return {finding.check: finding for finding in examine(Host(root, run))}


@pytest.fixture
def agx(tmp_path: Path) -> Path:
    return expand("agx-orin-r35", tmp_path / "agx")


@pytest.fixture
def pc(tmp_path: Path) -> Path:
    return expand("pc", tmp_path / "pc")


@pytest.mark.parametrize(
    ("tree", "not_ok"),
    [
        # What a person reads off each tree by hand.
        ("agx-orin-r35", {"CUDA": Level.WARN, "over-current": Level.WARN}),
        (
            "orin-nx-r36",
            {
                "CUDA": Level.WARN,
                "power mode": Level.WARN,
                "thermal": Level.WARN,
                "throttling": Level.WARN,
                "over-current": Level.WARN,
                "nvmap": Level.WARN,
            },
        ),
        ("orin-nano-r39", {"CUDA": Level.WARN, "power mode": Level.WARN}),
        ("drive-os-6", {"CUDA": Level.WARN}),
        ("pc", {}),
    ],
)
def test_each_board_is_read_as_a_person_would(tree: str, not_ok: dict[str, Level], tmp_path: Path) -> None:
    found = examine(Host(expand(tree, tmp_path)))
    assert {finding.check: finding.level for finding in found if finding.level} == not_ok


def test_figures_are_those_in_the_files(tmp_path: Path) -> None:
    nx = findings(expand("orin-nx-r36", tmp_path))
    assert nx["board"].value == "Jetson Orin NX 16GB"
    assert nx["release"].value == "JetPack 6.2.1 (L4T 36.4.7)"
    assert nx["thermal"].value == "gpu-thermal 97.2 °C, 1.8 °C below its trip at 99.0 °C"
    assert nx["memory"].value.startswith("1.1 GiB of 15.3 GiB available")  # (1228800 − 65536) kB
    assert nx["swap"].value == "swap: 499 MiB of 7.6 GiB used"
    assert nx["pressure"].value == "some 4.2 %, full 1.5 % of the last 10 s"
    assert "gpu-throttle-alert (1)" in nx["throttling"].value


@pytest.mark.parametrize("tree", [*TREES, None])
def test_every_line_that_is_not_ok_says_what_it_means_and_what_to_do(
    tree: str | None, tmp_path: Path
) -> None:
    host = Host(run=run_command) if tree is None else Host(expand(tree, tmp_path))
    for finding in examine(host):
        assert finding.value
        assert finding.level is Level.OK or (finding.meaning and finding.remedy), finding


@pytest.mark.parametrize(
    ("celsius", "level", "state"),
    [
        (86.9, Level.OK, ""),
        (87.0, Level.WARN, "THROTTLED"),
        (93.0, Level.WARN, "SHED"),
        (99.0, Level.FAIL, "CRITICAL"),
    ],
)
def test_heat_is_judged_by_the_zones_own_trip(agx: Path, celsius: float, level: Level, state: str) -> None:
    put(agx, "sys/class/thermal/thermal_zone0/temp", str(round(celsius * 1000)))
    thermal = findings(agx)["thermal"]
    assert thermal.level is level
    assert state in thermal.meaning


def test_thresholds_and_required_sensors_are_the_configured_ones(agx: Path) -> None:
    put(
        agx,
        CONFIGURATION,
        "[governor]\nnormal_below_c = 60\nthrottle_below_c = 50\n[sensors]\nrequired = ['cv0']",
    )
    found = findings(agx)
    assert found["thermal"].level is Level.WARN  # 47 °C below its trip
    assert "THROTTLED" in found["thermal"].meaning
    assert found["sensors"].level is Level.WARN
    assert found["sensors"].value == "cv0 cannot be read"


def test_an_orin_without_zones_fails_and_a_pc_without_does_not(agx: Path, pc: Path) -> None:
    for root in (agx, pc):
        remove(root, "sys/class/thermal")
        (root / "sys/class/thermal").mkdir()
    assert findings(agx)["thermal"].level is Level.FAIL
    assert findings(pc)["thermal"].level is Level.OK


@pytest.mark.parametrize(
    ("release", "level"),
    [
        ("R35 (release), REVISION: 6.3", Level.WARN),
        ("R35 (release), REVISION: 6.4", Level.OK),
        ("R36 (release), REVISION: 4.7", Level.WARN),
        ("R36 (release), REVISION: 5.0", Level.OK),
        ("R38 (release), REVISION: 2.2", Level.WARN),
    ],
)
def test_releases_that_refuse_free_memory(agx: Path, release: str, level: Level) -> None:
    put(agx, "etc/nv_tegra_release", f"# {release}, GCID: 1, BOARD: generic, EABI: aarch64")
    assert findings(agx)["nvmap"].level is level


@pytest.mark.parametrize(
    ("available_kb", "level"), [(2_000_000, Level.OK), (500_000, Level.WARN), (200_000, Level.FAIL)]
)
def test_too_little_memory(pc: Path, available_kb: int, level: Level) -> None:
    put(pc, "proc/meminfo", f"MemTotal: 8000000 kB\nMemAvailable: {available_kb} kB")
    assert findings(pc)["memory"].level is level


def test_no_meminfo_is_a_failure(pc: Path) -> None:
    remove(pc, "proc/meminfo")
    assert findings(pc)["memory"].level is Level.FAIL


def test_zram_is_told_from_disk(pc: Path) -> None:
    put(
        pc,
        "proc/meminfo",
        "MemTotal: 8000000 kB\nMemAvailable: 4000000 kB\nSwapTotal: 1000 kB\nSwapFree: 100 kB",
    )
    put(pc, "proc/swaps", "Filename Type Size Used Priority\n/dev/zram0 partition 1000 900 5")
    swap = findings(pc)["swap"]
    assert swap.level is Level.WARN
    assert swap.value.startswith("zram: ")
    assert "DRAM" in swap.meaning


def test_nvpmodel_modes_and_their_ceilings() -> None:
    assert [(mode.number, mode.name, mode.gpu, mode.emc) for mode in power_modes(NVPMODEL)] == [
        (0, "MAXN", float("inf"), float("inf")),
        (1, "10W", 625e6, 2133e6),
        (2, "25W", 408e6, float("inf")),
    ]


@pytest.mark.parametrize(
    ("status", "level", "words"),
    [
        ("pmode:0000", Level.OK, "MAXN (mode 0): GPU without a ceiling"),
        ("pmode:0001", Level.WARN, "memory clock at most 2133 MHz"),
        ("pmode:0002", Level.OK, "25W (mode 2): GPU at most 408 MHz"),
        ("pmode:0007", Level.OK, "mode 7"),
        ("garbage", Level.WARN, "unknown (garbage)"),
    ],
)
def test_a_power_mode_that_slows_the_memory_is_a_warning(
    agx: Path, status: str, level: Level, words: str
) -> None:
    put(agx, "etc/nvpmodel.conf", NVPMODEL)
    put(agx, "var/lib/nvpmodel/status", status)
    mode = findings(agx)["power mode"]
    assert (mode.level, words in mode.value) == (level, True), mode


def test_cuda_and_tensorrt_are_found_by_their_files(agx: Path) -> None:
    put(agx, "usr/lib/aarch64-linux-gnu/tegra/libcuda.so.1.1", "")
    put(agx, "usr/lib/aarch64-linux-gnu/libnvinfer.so.8", "")
    put(agx, "usr/lib/aarch64-linux-gnu/libnvinfer.so.8.5.2", "")
    put(agx, "usr/local/cuda/version.json", '{"cuda": {"name": "CUDA SDK", "version": "11.4.19"}}')
    found = findings(agx)
    assert found["CUDA"] == Finding("CUDA", Level.OK, "driver library present, toolkit 11.4.19")
    assert found["TensorRT"].value == "8.5.2"
    assert "10.15" in found["TensorRT"].meaning
    assert found["executor tensorrt"].value == "cannot run"
    put(agx, "usr/lib/aarch64-linux-gnu/libnvinfer.so.10.16.1", "")
    assert findings(agx)["executor tensorrt"].value == "can run"


def test_a_toolkit_without_version_file_is_named_by_its_directory(agx: Path) -> None:
    for version in ("9.2", "12.6", "11.4"):
        (agx / f"usr/local/cuda-{version}").mkdir(parents=True)
    put(agx, "usr/local/cuda/version.json", "[]")
    assert "toolkit 12.6" in findings(agx)["CUDA"].value


def test_device_nodes_and_groups(agx: Path) -> None:
    put(agx, "dev/nvmap", "")
    put(agx, "dev/nvgpu/igpu0/channel", "")
    put(agx, "etc/passwd", "edgellm:x:996:996::/:/usr/sbin/nologin")
    put(agx, "etc/group", "video:x:44:edgellm\nrender:x:104:\nedgellm:x:996:planner,hmi")
    found = findings(agx)
    assert found["devices"].value == "2 GPU nodes"
    assert found["groups"].level is Level.WARN
    assert found["groups"].value == "edgellm is not in render"
    put(agx, "etc/group", "video:x:44:edgellm\nrender:x:104:edgellm\nedgellm:x:996:planner,hmi")
    groups = findings(agx)["groups"]
    assert groups.level is Level.OK
    assert groups.meaning == "may connect to it: hmi, planner"


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ('[engine]\npath = "/var/lib/edgellm/engine"', Level.OK),
        ("[engine]\npaht = 1", Level.FAIL),
        ("not toml", Level.FAIL),
    ],
)
def test_the_configuration_is_read_as_the_service_would(pc: Path, text: str, level: Level) -> None:
    put(pc, CONFIGURATION, text)
    assert findings(pc)["configuration"].level is level


@contextlib.contextmanager
def ordinary_user() -> Iterator[None]:
    """Root is refused nothing, so whoever is root becomes nobody for a while."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("closed", ["etc/edgellm", CONFIGURATION])
def test_a_configuration_that_this_user_may_not_read(closed: str) -> None:
    # Not in tmp_path: pytest's own directories are closed to nobody.
    with tempfile.TemporaryDirectory() as directory:
        root = expand("pc", Path(directory))
        root.chmod(0o755)
        put(root, CONFIGURATION, "[log]\nlevel = 'info'")
        (root / closed).chmod(0)
        with ordinary_user():
            found = findings(root, run=lambda _words: None)
        (root / closed).chmod(0o700)
    configuration = found["configuration"]
    assert configuration.level is Level.WARN
    assert "cannot be read as uid " in configuration.value
    assert "group edgellm" in configuration.remedy
    assert "engine" not in found
    assert found["memory"].level is Level.OK


def test_an_image_is_not_asked_what_only_a_running_system_says(agx: Path) -> None:
    for name in ("proc", "sys"):
        remove(agx, name)
        (agx / name).mkdir()
    directory = agx / "run/edgellm"
    directory.mkdir(parents=True)
    directory.chmod(0o777)
    found = findings(agx)
    assert {name for name, finding in found.items() if finding.value == "not asked"} >= {
        *("board", "python", "power mode", "thermal", "memory", "devices", "socket", "systemd"),
    }
    assert not {"pressure", "swap", "GPU clock", "sensors", "daemon"} & set(found)
    # Its files are still looked at.
    assert found["release"].value.startswith("JetPack 5")
    assert {name for name, finding in found.items() if finding.level is Level.FAIL} == set()


def test_sensors_that_hang_are_a_finding_and_memory_is_known_all_the_same(agx: Path) -> None:
    release = threading.Event()

    class Hanging:
        def read(self) -> Readings:
            release.wait()
            return Readings(at=0.0)

    try:
        host = Host(agx, sensors=Hanging(), sensors_timeout_s=0.05)
        found = {finding.check: finding for finding in examine(host)}
    finally:
        release.set()
    assert found["sensors"].value == "sensors did not answer"
    assert found["sensors"].level is Level.FAIL
    assert "thermal" not in found
    assert found["memory"].value == findings(agx)["memory"].value


def test_a_daemon_that_runs_without_a_unit_is_named(pc: Path) -> None:
    run = pc / "run/edgellm"
    run.mkdir(parents=True)
    assert findings(pc, lambda _words: None)["daemon"].value == "none answers"
    with Service(run):
        found = findings(pc, lambda _words: None)
    assert found["daemon"] == Finding("daemon", Level.OK, "ready at ipc:///run/edgellm/edgellm.sock")


def test_an_engine_that_is_not_there_is_a_failure(pc: Path) -> None:
    put(pc, CONFIGURATION, f'[engine]\npath = "{pc}/nowhere"')
    found = findings(pc, run=lambda _words: None)
    assert found["engine"].level is Level.FAIL
    assert "66" in found["engine"].meaning


def test_a_socket_directory_that_anyone_may_write_to(pc: Path) -> None:
    directory = pc / "run/edgellm"
    directory.mkdir(parents=True)
    for mode, level in ((0o750, Level.OK), (0o777, Level.FAIL), (0o1777, Level.OK)):
        directory.chmod(mode)
        assert findings(pc)["socket"].level is level


def systemctl(version: str, **properties: str) -> Callable[[Sequence[str]], str | None]:
    def run(words: Sequence[str]) -> str | None:
        if words[0] != "systemctl":
            return None
        if words[1] == "--version":
            return f"systemd {version}\n+PAM"
        return "\n".join(f"{name}={value}" for name, value in properties.items())

    return run


@pytest.mark.parametrize(
    ("properties", "level", "value"),
    [
        ({"ActiveState": "active", "SubState": "running", "NRestarts": "0"}, Level.OK, "active (running)"),
        (
            {"ActiveState": "active", "SubState": "running", "NRestarts": "3"},
            Level.WARN,
            "active (running), restarted 3 times",
        ),
        (
            {
                "ActiveState": "activating",
                "SubState": "auto-restart",
                "Result": "exit-code",
                "ExecMainStatus": "75",
                "NRestarts": "2",
            },
            Level.FAIL,
            "activating (auto-restart): exit-code, exit code 75",
        ),
        (
            {"ActiveState": "failed", "Result": "exit-code", "ExecMainStatus": "78"},
            Level.FAIL,
            "failed: exit-code, exit code 78",
        ),
    ],
)
def test_the_units_state(pc: Path, properties: dict[str, str], level: Level, value: str) -> None:
    put(pc, "usr/lib/systemd/system/edgellm.service", "[Service]")
    found = findings(pc, systemctl("249 (249.11)", LoadState="loaded", **properties))
    assert (found["unit"].level, found["unit"].value) == (level, value)
    assert found["systemd"].value == "version 249"


def test_an_old_systemd_and_none_at_all(pc: Path) -> None:
    assert findings(pc, systemctl("237"))["systemd"].level is Level.WARN
    assert findings(pc, lambda _words: None)["systemd"].level is Level.OK


def test_a_check_that_breaks_is_a_finding(pc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_planet(_host: Host) -> list[Finding]:
        raise RuntimeError("it is flat")

    monkeypatch.setattr("edgellm.doctor.examination.CHECKS", (check_planet, *CHECKS))
    found = findings(pc)
    assert found["planet"].level is Level.WARN
    assert "it is flat" in found["planet"].value
    assert "board" in found


def test_both_forms_say_the_same(agx: Path) -> None:
    found = examine(Host(agx))
    document = json.loads(as_json(found))
    lines = as_text(found).splitlines()
    assert document["worst"] == "warn"
    assert len(document["findings"]) == len(lines)
    for row, line in zip(document["findings"], lines, strict=True):
        assert line.startswith(row["level"])
        assert all(row[part] in line for part in ("check", "value", "meaning", "remedy"))


def test_the_exit_code_is_the_worst(agx: Path, pc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(root: Path, *, as_json: bool) -> int:
        return doctor.run(
            argparse.Namespace(root=root, json=as_json, prove=False, record=None, engine=None, reference=None)
        )

    assert run(pc, as_json=False) == 0
    assert run(agx, as_json=True) == 1
    put(agx, "sys/class/thermal/thermal_zone0/temp", "101000")
    assert run(agx, as_json=False) == 2
    assert worst([]) is Level.OK
    assert "°C" in capsys.readouterr().out
    with pytest.raises(UsageError, match="not a directory"):
        run(pc / "nowhere", as_json=False)


def test_the_command_line_knows_it() -> None:
    parser = argparse.ArgumentParser()
    doctor.register(parser.add_subparsers())
    assert parser.parse_args(["doctor", "--json", "--root", "/x"]).root == Path("/x")

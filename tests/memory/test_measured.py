"""Plan against fact, with the real model: a daemon's resident set as the kernel counts it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_daemon import READY_S, daemon, stop

from edgellm import Client
from edgellm.cli import main

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def half_engine(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    engine = tmp_path_factory.mktemp("half") / "engine"
    assert main(["build", str(smollm2_gguf), "-o", str(engine), "--kv-cache", "fp16"]) == 0
    return engine


@pytest.fixture(scope="module")
def reference_engine(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    engine = tmp_path_factory.mktemp("reference") / "engine"
    flags = ["--compute", "fp32", "--max-batch-size", "2", "--max-seq-len", "512"]
    assert main(["build", str(smollm2_gguf), "-o", str(engine), *flags]) == 0
    return engine


def plan(engine: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["plan", str(engine), "--json", "--budget", "4GiB", *flags]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def memory(pid: int) -> dict[str, int]:
    """proc(5) status: bytes resident now, and at the most so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    return {name: int(re.findall(rf"{name}:\s+(\d+) kB", status)[0]) * 1024 for name in ("VmRSS", "VmHWM")}


@pytest.mark.parametrize(
    ("fixture", "flags"),
    [
        ("smollm2_engine", []),
        ("smollm2_engine", ["--max-batch-size", "1", "--max-seq-len", "256", "--max-num-tokens", "32"]),
        ("smollm2_engine", ["--max-batch-size", "2", "--threads", "1"]),
        ("half_engine", []),
        ("reference_engine", []),
    ],
)
def test_the_plan_is_within_5_percent(
    fixture: str,
    flags: list[str],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine: Path = request.getfixturevalue(fixture)
    expected = plan(engine, capsys, *flags)
    endpoint = f"ipc://{tmp_path}/e.sock"
    with daemon(engine, endpoint, *flags) as process, Client(endpoint) as client:
        client.wait_ready(READY_S)
        measured = memory(process.pid)
        code, log = stop(process)
    assert code == 0
    assert measured["VmRSS"] == pytest.approx(expected["at_ready"], rel=0.05)
    # Loading took no more than was promised in all.
    assert measured["VmHWM"] <= 1.05 * expected["total"]
    assert re.search(r"INFO .*memory: [\d.]+ MiB resident, planned [\d.]+ MiB \([+-][\d.]+ %\); at most", log)


def test_used_to_the_full_it_stays_below_the_total(
    smollm2_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every row of the embedding and every slot to its end: the promise is an upper bound, and a near one."""
    expected = plan(smollm2_engine, capsys, "--max-batch-size", "2")
    endpoint = f"ipc://{tmp_path}/e.sock"
    with (
        daemon(smollm2_engine, endpoint, "--max-batch-size", "2") as process,
        Client(endpoint) as client,
    ):
        client.wait_ready(READY_S)
        client.generate(list(range(0, 49152, 64))[:1000], max_tokens=4, ignore_eos=True)
        client.generate(list(range(32, 49152, 64))[:1000], max_tokens=4, ignore_eos=True)
        measured = memory(process.pid)
        assert stop(process)[0] == 0
    assert measured["VmRSS"] <= 1.05 * expected["total"]
    assert measured["VmRSS"] >= 0.93 * expected["total"]

"""Runs as root inside the booted tree: what systemd/ and docs/operations.md promise, tried on the real thing.

Writes a table to /findings and whether all is well to /findings.code.
"""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

UNIT = "edgellm.service"
RETRY = "edgellm-retry.service"
PYTHON = "/opt/edgellm/current/bin/python"
COMMAND = Path("/opt/edgellm/bin/edgellm")
CONFIGURATION = Path("/etc/edgellm/edgellm.toml")
ENDPOINT = "ipc:///run/edgellm/edgellm.sock"
SECRET = "Zanzibar"
READY_S = 60.0
WATCHDOG_S = 5.0
"""As in the drop-in of tools/test_systemd.sh; the other times are the shipped ones."""

DRAIN_S = 7

STREAM = """
import sys
from edgellm import Client
with Client(sys.argv[1]) as client:
    with client.stream_chat("Count.", temperature=0, ignore_eos=True, max_tokens=int(sys.argv[2])) as stream:
        tokens = 0
        for delta in stream:
            tokens += len(delta.tokens)
            print(tokens, flush=True)
"""

CHECKS: list[tuple[str, Callable[[], str]]] = []


def check(what: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    def register(function: Callable[[], str]) -> Callable[[], str]:
        CHECKS.append((what, function))
        return function

    return register


def sh(*words: str, check: bool = True, timeout: float = 90.0) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=False)
    if check:
        assert done.returncode == 0, f"{' '.join(words)}: {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def show(name: str, unit: str = UNIT) -> str:
    return sh("systemctl", "show", "--property", name, "--value", unit).strip()


def until(what: str, true: Callable[[], object], timeout: float) -> float:
    started = time.monotonic()
    while time.monotonic() - started < timeout:
        if true():
            return time.monotonic() - started
        time.sleep(0.05)
    raise AssertionError(f"not within {timeout} s: {what}; {sh('systemctl', 'status', UNIT, check=False)}")


def serving() -> bool:
    return show("ActiveState") == "active" and show("SubState") == "running"


def start() -> None:
    sh("systemctl", "reset-failed", UNIT, check=False)
    sh("systemctl", "start", UNIT)
    until("active", serving, READY_S)


def cursor() -> str:
    """Where the journal ends now, as journalctl's option."""
    found = re.search(r"-- cursor: (\S+)", sh("journalctl", "--lines", "0", "--show-cursor"))
    assert found
    return f"--after-cursor={found[1]}"


def journal(since: str = "--boot") -> list[dict[str, str]]:
    """The entries of the unit and about it."""
    sh("journalctl", "--sync", check=False)
    # journalctl 252 with --after-cursor and a filter skips the first entry that matches: hence no filter.
    lines = sh("journalctl", "--output", "json", since).splitlines()
    entries = [json.loads(line) for line in lines if line.startswith("{")]
    return [entry for entry in entries if UNIT in (entry.get("_SYSTEMD_UNIT"), entry.get("UNIT"))]


def messages(since: str = "--boot", *, most: str = "7") -> str:
    """Their text, one a line; only those of priority `most` and more urgent."""
    return "\n".join(str(entry.get("MESSAGE", "")) for entry in journal(since) if entry["PRIORITY"] <= most)


def chat(user: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["runuser", "-u", user, "--", str(COMMAND), "chat", "--endpoint", ENDPOINT, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def stream(tokens: int) -> subprocess.Popen[str]:
    """A client of the group that reads an answer of so many tokens; returns once it has the first."""
    client = subprocess.Popen(
        ["runuser", "-u", "insider", "--", PYTHON, "-c", STREAM, ENDPOINT, str(tokens)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert client.stdout is not None
    assert client.stdout.readline().strip().isdecimal(), client.communicate()[1]
    return client


def received(client: subprocess.Popen[str]) -> int:
    output, errors = client.communicate(timeout=60)
    assert client.returncode == 0, errors
    return int(output.split()[-1])


def edit(old: str, new: str) -> None:
    text = CONFIGURATION.read_text()
    assert old in text
    CONFIGURATION.write_text(text.replace(old, new))


@check("the units are valid")
def verify() -> str:
    output = sh("systemd-analyze", "verify", UNIT, RETRY)
    assert not output.strip(), output
    return "systemd-analyze verify says nothing"


@check("exposure at most 1.5")
def exposure() -> str:
    found = re.search(
        r"exposure level for \S+: ([\d.]+)", sh("systemd-analyze", "security", "--no-pager", UNIT)
    )
    assert found
    assert float(found[1]) <= 1.5, found[0]
    return found[1]


@check("enabled: READY after boot")
def ready() -> str:
    until("active", serving, READY_S)
    started, active = (
        int(show(name)) / 1e6 for name in ("ExecMainStartTimestampMonotonic", "ActiveEnterTimestampMonotonic")
    )
    return f"{active - started:.2f} s after exec"


@check("STATUS in systemctl status")
def status() -> str:
    text = sh("systemctl", "status", "--no-pager", UNIT)
    found = re.search(r'Status: "(.+)"', text)
    assert found, text
    return found[1]


@check("the sandbox holds the process")
def sandbox() -> str:
    process = Path("/proc") / show("MainPID")
    fields = dict(
        line.split(":\t", 1) for line in (process / "status").read_text().splitlines() if ":\t" in line
    )
    assert int(fields["CapBnd"], 16) == int(fields["CapEff"], 16) == 0, fields
    assert fields["NoNewPrivs"] == "1"
    assert fields["Seccomp"] == "2"
    assert fields["Uid"].split()[0] == sh("id", "-u", "edgellm").strip()
    limits = (process / "limits").read_text()
    assert re.search(r"Max core file size\s+0\s+0", limits), limits
    assert int((process / "oom_score_adj").read_text()) == 500
    mounts = [line.split() for line in (process / "mountinfo").read_text().splitlines()]
    assert [row for row in mounts if row[4] == "/"][-1][5].split(",")[0] == "ro", "the root is not read-only"
    return "no capability, seccomp, no new privileges, read-only, no core file, OOM +500"


@check("who may open the socket")
def permissions() -> str:
    found = []
    for path, mode in ((Path("/run/edgellm"), 0o750), (Path("/run/edgellm/edgellm.sock"), 0o660)):
        status = path.stat()
        assert stat.S_IMODE(status.st_mode) == mode, f"{path}: {status.st_mode:o}"
        assert (path.owner(), path.group()) == ("edgellm", "edgellm")
        found.append(f"{path.name} {mode:04o}")
    return ", ".join(found)


@check("a client of the group is served")
def insider() -> str:
    done = chat("insider", "--max-tokens", "8", "--temperature", "0", f"Where is {SECRET}?")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    return f"answer of {len(done.stdout.strip())} characters"


@check("a client outside is refused")
def outsider() -> str:
    done = chat("outsider", "--wait", "2", "--max-tokens", "8", "Hello?")
    assert done.returncode != 0
    assert not done.stdout.strip()
    return f"exit {done.returncode}: {done.stderr.strip().splitlines()[-1]}"


@check("journal entries with fields")
def fields() -> str:
    entries = [entry for entry in journal() if "REQUEST_ID" in entry]
    assert entries, messages()
    entry = entries[-1]
    uid = sh("id", "-u", "insider").strip()
    assert entry["CLIENT"].startswith(f"uid={uid} "), entry["CLIENT"]
    assert entry["PRIORITY"] == "6"
    assert entry["SYSLOG_IDENTIFIER"] == "edgellm"
    assert entry["LOGGER"].startswith("edgellm.")
    return f"REQUEST_ID={entry['REQUEST_ID']} CLIENT={entry['CLIENT']}"


@check("no prompt in the journal, no telemetry")
def privacy() -> str:
    entries = [json.dumps(entry) for entry in journal()]
    assert entries
    assert not [entry for entry in entries if SECRET in entry]
    assert not [entry for entry in entries if "telemetry" in entry.lower()], "something wants to phone home"
    return f"{len(entries)} entries, nothing phones home"


@check("reload: what can change does, requests go on")
def reload() -> str:
    pid, since = show("MainPID"), cursor()
    client = stream(80)
    edit('level = "info"', 'level = "debug"\n[scheduler]\nmax_step_ms = 77')
    sh("systemctl", "reload", UNIT)
    until("reloaded", lambda: "log.level" in messages(since), 10)
    until("active again", serving, 10)
    assert "scheduler.max_step_ms" in messages(since)
    assert show("MainPID") == pid
    tokens = received(client)
    assert tokens >= 75
    edit('level = "debug"\n[scheduler]\nmax_step_ms = 77', 'level = "info"')
    sh("systemctl", "reload", UNIT)
    until("reloaded", lambda: messages(since).count("reload: log.level") == 2, 10)
    return f"log.level at once, max_step_ms named as needing a restart, {tokens} tokens went on"


@check("reload: a broken file changes nothing")
def reload_broken() -> str:
    pid, since, good = show("MainPID"), cursor(), CONFIGURATION.read_text()
    CONFIGURATION.write_text("[engine]\npaht = 1\n")
    sh("systemctl", "reload", UNIT)
    until("an error", lambda: "did you mean engine.path" in messages(since, most="3"), 10)
    until("active", serving, 10)
    CONFIGURATION.write_text(good)
    assert show("MainPID") == pid
    assert chat("insider", "--max-tokens", "2", "Hello.").returncode == 0
    return "an error in the journal, the same process serves"


def stuck(loop: str, name: str) -> str:
    pid, restarts, since = show("MainPID"), int(show("NRestarts")), cursor()
    Path(f"/run/edgellm/fault-{loop}").touch()
    silent = until("the kill", lambda: show("Result") == "watchdog", 2 * WATCHDOG_S)
    took = until("a restart", lambda: serving() and show("MainPID") != pid, READY_S)
    assert int(show("NRestarts")) == restarts + 1
    said = messages(since)
    assert f"in: {name};" in said, said
    assert "hang_for_ever" in said, "no stacks in the journal"
    assert chat("insider", "--max-tokens", "2", "Hello.").returncode == 0
    return f"Result=watchdog after {silent:.1f} s (WatchdogSec={WATCHDOG_S:.0f}), served {took:.1f} s later"


@check("a stuck engine loop")
def stuck_engine() -> str:
    return stuck("engine", "engine")


@check("a stuck I/O loop")
def stuck_io() -> str:
    return stuck("io", "io")


@check("SIGTERM drains")
def drain() -> str:
    since = cursor()
    client = stream(60)
    started = time.monotonic()
    sh("systemctl", "stop", UNIT)
    took = time.monotonic() - started
    tokens = received(client)
    assert tokens >= 55
    assert show("Result") == "success"
    assert show("ActiveState") == "inactive"
    assert took <= 11, took
    assert not Path("/run/edgellm").exists()
    assert "draining" in messages(since)
    return f"the open answer of {tokens} tokens was finished, stopped in {took:.1f} s"


@check("a long drain is neither hung nor late")
def long_drain() -> str:
    # Longer than WatchdogSec and than TimeoutStopSec of the drop-in, and still bounded.
    good = CONFIGURATION.read_text()
    edit("[log]", f"[scheduler]\ndrain_timeout_s = {DRAIN_S}\n[limits]\nduty = 0.05\n[log]")
    sh("systemctl", "restart", UNIT)
    until("active", serving, READY_S)
    CONFIGURATION.write_text(good)
    client = stream(900)
    started = time.monotonic()
    sh("systemctl", "stop", UNIT)
    took = time.monotonic() - started
    _, errors = client.communicate(timeout=60)
    assert client.returncode != 0
    assert "ShuttingDown" in errors, errors
    assert show("Result") == "success", show("Result")
    assert DRAIN_S <= took <= DRAIN_S + 1, took
    return f"an answer without end was ended, stopped in {took:.1f} s (drain_timeout_s = {DRAIN_S})"


@check("exit 78 is not tried again")
def hopeless() -> str:
    sh("systemctl", "stop", UNIT)
    good = CONFIGURATION.read_text()
    CONFIGURATION.write_text("[engine]\npaht = 1\n")
    sh("systemctl", "start", UNIT, check=False)
    CONFIGURATION.write_text(good)
    until("failed", lambda: show("ActiveState") == "failed", READY_S)
    until("the retry to decline", lambda: show("ActiveState", RETRY) == "inactive", 10)
    time.sleep(3)  # longer than RestartSec
    assert show("ActiveState") == "failed"
    assert (show("ExecMainStatus"), show("NRestarts"), show("Result")) == ("78", "0", "exit-code")
    return "failed, 0 restarts, no slow try"


@check("exit 75 is tried until it heals")
def shortage() -> str:
    sh("systemctl", "stop", UNIT)
    good, since = COMMAND.read_text(), cursor()
    COMMAND.write_text("#!/bin/sh\necho too little memory >&2\nexit 75\n")
    sh("systemctl", "reset-failed", UNIT)
    sh("systemctl", "start", "--no-block", UNIT)
    # Five quick tries, then the slow one, which fails too and begins anew.
    until("the slow try", lambda: show("ActiveState", RETRY) == "activating", READY_S)
    quick = messages(since).count("too little memory")
    assert quick == 5, quick
    until("the sixth try", lambda: messages(since).count("too little memory") >= 6, READY_S)
    COMMAND.write_text(good)
    until("healed", serving, READY_S)
    return f"{quick} quick tries, then slow ones; served once the shortage was over"


@check("stop ends the slow tries")
def stop_retry() -> str:
    good = COMMAND.read_text()
    COMMAND.write_text("#!/bin/sh\nexit 75\n")
    sh("systemctl", "restart", "--no-block", UNIT)
    until("the slow try", lambda: show("ActiveState", RETRY) == "activating", READY_S)
    sh("systemctl", "stop", UNIT)
    COMMAND.write_text(good)
    until("the retry to end", lambda: show("ActiveState", RETRY) in {"inactive", "failed"}, 10)
    time.sleep(4)  # longer than the pause of the slow try in the drop-in
    assert show("ActiveState") in {"inactive", "failed"}
    return "stopped while waiting, not started again"


@check("without systemd-python")
def plain() -> str:
    configuration = Path("/opt/edgellm/current/pyvenv.cfg")
    text = configuration.read_text()
    assert "include-system-site-packages = true" in text
    configuration.write_text(text.replace("= true", "= false"))
    assert subprocess.run(
        [PYTHON, "-c", "import systemd.daemon"], capture_output=True, check=False
    ).returncode
    since = cursor()
    start()
    entries = [entry for entry in journal(since) if entry.get("_TRANSPORT") == "stdout"]
    assert [entry for entry in entries if "READY" in str(entry["MESSAGE"]) and entry["PRIORITY"] == "6"], (
        entries
    )
    assert not [entry for entry in entries if str(entry["MESSAGE"]).startswith("<")]
    line = show("StatusText")
    assert line
    sh("systemctl", "stop", UNIT)
    configuration.write_text(text)
    start()
    return f"READY and STATUS over the plain protocol, priorities by prefix: {line}"


@check("edgellm doctor")
def doctor() -> str:
    done = subprocess.run([COMMAND, "doctor", "--json"], capture_output=True, text=True, check=False)
    document = json.loads(done.stdout)
    rows = {row["check"]: row for row in document["findings"]}
    assert done.returncode in (0, 1), done.stdout
    for name in ("configuration", "engine", "unit", "daemon", "systemd", "executor cpu"):
        assert rows[name]["level"] == "ok", rows[name]
    return f"{document['worst']}; unit {rows['unit']['value']}"


@check("edgellm doctor, as anyone")
def doctor_of_anyone() -> str:
    done = subprocess.run(
        ["runuser", "-u", "outsider", "--", "edgellm", "doctor", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.stderr.strip(), done.stderr
    assert done.returncode == 1, done.stdout
    rows = {row["check"]: row for row in json.loads(done.stdout)["findings"]}
    assert rows["configuration"]["level"] == "warn", rows
    assert rows["daemon"]["level"] == "warn", rows
    return f"{rows['configuration']['value']}; daemon: {rows['daemon']['value']}"


@check("install again changes nothing")
def install_again() -> str:
    pid = show("MainPID")
    output = sh(
        "/source/tools/install.sh",
        "--wheels",
        "/source/wheels",
        "--engine",
        "/var/lib/edgellm/engines/smollm2",
    )
    assert "wrote" not in output, output
    assert "making" not in output
    assert show("MainPID") == pid, "restarted for nothing"
    return "nothing written, not restarted"


@check("uninstall leaves nothing but data")
def uninstall() -> str:
    sh("/source/tools/install.sh", "--uninstall")
    gone = ("/opt/edgellm", "/usr/local/bin/edgellm", f"/usr/lib/systemd/system/{UNIT}", "/run/edgellm")
    left = [path for path in gone if Path(path).exists()]
    assert not left, left
    assert show("LoadState") == "not-found"
    assert CONFIGURATION.exists()
    sh("/source/tools/install.sh", "--uninstall", "--purge")
    assert not CONFIGURATION.exists()
    return "then --purge took the data too"


def main() -> int:
    rows, good = [], True
    configuration, command = CONFIGURATION.read_text(), COMMAND.read_text()
    for what, function in CHECKS:
        started = time.monotonic()
        try:
            detail, verdict = function(), "ok"
        except Exception as error:
            good, verdict = False, "FAIL"
            detail = str(error) if isinstance(error, AssertionError) else traceback.format_exc()
            # The next check begins where this one should have ended.
            CONFIGURATION.write_text(configuration)
            COMMAND.write_text(command)
            if not serving():
                sh("systemctl", "reset-failed", UNIT, check=False)
                sh("systemctl", "restart", UNIT, check=False)
        rows.append(f"{verdict:4}  {time.monotonic() - started:5.1f} s  {what:46}  {detail}")
        Path("/findings").write_text("\n".join(rows) + "\n")
        if function is ready and verdict != "ok":
            break  # whatever follows needs a service that starts
    if not good:
        log = sh("journalctl", "--no-pager", "--lines", "300", check=False)
        Path("/findings").write_text("\n".join(rows) + "\n\n" + log)
    Path("/findings.code").write_text("0" if good else "1")
    return 0


if __name__ == "__main__":
    sys.exit(main())

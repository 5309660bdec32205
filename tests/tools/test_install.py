"""tools/install.sh into a tree, with stand-ins for what needs root or a running system."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools/install.sh"
STAND_INS = {
    "id": "echo 0",
    "chroot": 'shift; exec "$@"',
    "systemctl": "exit 0",
    "systemd-sysusers": "exit 0",
    "systemd-tmpfiles": "exit 0",
}
DROP_INS = "etc/systemd/system/edgellm.service.d"
LINK = "usr/local/bin/edgellm"


class Tree:
    def __init__(self, directory: Path) -> None:
        self.root = directory / "root"
        self.root.mkdir()
        self._stand_ins = directory / "bin"
        self._stand_ins.mkdir()
        for name, script in STAND_INS.items():
            (self._stand_ins / name).write_text(f"#!/bin/sh\n{script}\n")
            (self._stand_ins / name).chmod(0o755)

    def install(self, *words: str, code: int = 0) -> str:
        """What it says; an interpreter that has edgellm stands for a new environment."""
        done = subprocess.run(
            ["bash", SCRIPT, "--root", self.root, "--python", sys.executable, *words],
            env={"PATH": f"{self._stand_ins}:/usr/sbin:/usr/bin:/sbin:/bin"},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*") if not path.is_dir())


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_the_command_is_on_the_path_and_goes_with_the_rest(tree: Tree) -> None:
    assert f"/{LINK} is /opt/edgellm/bin/edgellm" in tree.install()
    assert str((tree.root / LINK).readlink()) == "/opt/edgellm/bin/edgellm"
    before = tree.files()
    again = tree.install()
    assert "wrote" not in again
    assert LINK not in again
    assert tree.files() == before
    tree.install("--uninstall")
    assert tree.files() == ["etc/edgellm/edgellm.toml"]


def test_another_command_of_that_name_is_left_alone(tree: Tree) -> None:
    theirs = tree.root / LINK
    theirs.parent.mkdir(parents=True)
    theirs.write_text("theirs")
    assert f"kept /{LINK}, which is not ours" in tree.install()
    tree.install("--uninstall", "--purge")
    assert tree.files() == [LINK]


def test_drop_ins_are_switched_on_and_off(tree: Tree) -> None:
    tree.install("--drop-in", "cpu", "--drop-in", "memory")
    assert {path.name for path in (tree.root / DROP_INS).iterdir()} == {"cpu.conf", "memory.conf"}
    assert f"removed /{DROP_INS}/cpu.conf" in tree.install("--no-drop-in", "cpu")
    assert {path.name for path in (tree.root / DROP_INS).iterdir()} == {"memory.conf"}
    assert "removed" not in tree.install("--no-drop-in", "cpu")
    tree.install("--no-drop-in", "memory")
    assert not (tree.root / DROP_INS).exists()
    assert "there is no systemd/drop-ins/gpu.conf" in tree.install("--no-drop-in", "gpu", code=1)
    assert "which?" in tree.install("--drop-in", "cpu", "--no-drop-in", "cpu", code=1)


def test_what_uninstall_says_is_what_stays(tree: Tree) -> None:
    tree.install()
    assert "the user edgellm, /etc/edgellm and /var/lib/edgellm stay\n" in tree.install("--uninstall")
    assert (tree.root / "etc/edgellm").exists()
    assert "removed; only the user edgellm stays\n" in tree.install("--uninstall", "--purge")
    assert not (tree.root / "etc/edgellm").exists()


def test_purge_alone_installs_nothing(tree: Tree) -> None:
    assert "--purge goes with --uninstall" in tree.install("--purge", code=1)
    assert tree.files() == []

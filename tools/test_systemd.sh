#!/usr/bin/env bash
# Boots a real systemd in a container and tries the shipped units in it, as installed by tools/install.sh, with the
# real model. Prints a table of findings; exit code 1 if one of them failed.
#
# Needs root, debootstrap and systemd-nspawn (apt-get install debootstrap systemd-container), and a network for the
# first run. The bare system and the wheels are kept in ${XDG_CACHE_HOME:-~/.cache}/edgellm-ci: remove it to renew them.
#
#   PYTHON    an interpreter with edgellm installed (.venv/bin/python)
#   TIMEOUT   seconds that the booted system may take (240)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$here/.venv/bin/python}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/edgellm-ci
suite=bookworm
suite_python=3.11

step() { printf '· %s (%ss)\n' "$*" "$SECONDS"; }
die() { printf 'test_systemd: %s\n' "$*" >&2; exit 1; }

[ "$(id -u)" = 0 ] || die "must run as root: it boots a system in a container"
for tool in debootstrap systemd-nspawn; do
    command -v "$tool" >/dev/null || die "$tool is missing: apt-get install debootstrap systemd-container"
done
mkdir -p "$cache"
work=$(mktemp -d "$cache/run.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
tree=$work/tree

bare=$cache/$suite
if [ ! -d "$bare" ]; then
    step "debootstrap $suite"
    rm -rf "$bare.partial"
    debootstrap --variant=minbase --include=systemd,systemd-sysv,dbus,python3,python3-venv,python3-systemd \
        "$suite" "$bare.partial" >"$work/debootstrap.log" 2>&1 || { tail "$work/debootstrap.log"; die "debootstrap failed"; }
    rm -rf "$bare.partial/var/cache/apt/archives" "$bare.partial/var/lib/apt/lists"
    mv "$bare.partial" "$bare"
fi

step "wheels"
mkdir "$work/source"
cp -r "$here"/{edgellm,systemd,tools,docs,pyproject.toml,README.md} "$work/source"
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$work/source/wheels" "$work/source" >"$work/pip.log" 2>&1 ||
    { cat "$work/pip.log"; die "no wheel of edgellm could be made"; }
dependencies=$cache/wheels-$(sha256sum "$here/pyproject.toml" | cut -c1-12)
if [ ! -d "$dependencies" ]; then
    rm -rf "$cache"/wheels-*
    platforms=()
    for version in manylinux2014 manylinux_2_17 manylinux_2_26 manylinux_2_27 manylinux_2_28; do
        platforms+=(--platform "${version}_$(uname -m)")
    done
    # For the Python of the tree, which need not be this one.
    "$python" -m pip download --quiet --dest "$dependencies.partial" --only-binary=:all: \
        --python-version "$suite_python" --implementation cp --abi "cp${suite_python/./}" "${platforms[@]}" \
        "$work"/source/wheels/edgellm-*.whl >"$work/pip.log" 2>&1 || { cat "$work/pip.log"; die "no wheels for $suite"; }
    rm -f "$dependencies.partial"/edgellm-*
    mv "$dependencies.partial" "$dependencies"
fi
cp "$dependencies"/*.whl "$work/source/wheels"

step "engine"
checkpoint=$("$python" -m edgellm fetch smollm2-135m | tail -n 1)
"$python" -m edgellm build "$checkpoint" -o "$work/engine" --max-seq-len 1024 >/dev/null

step "tree"
cp -a "$bare" "$tree"
mkdir -p "$tree/var/lib/edgellm/engines"
mv "$work/engine" "$tree/var/lib/edgellm/engines/smollm2"
mv "$work/source" "$tree/source"
"$tree/source/tools/install.sh" --root "$tree" --wheels "$tree/source/wheels" \
    --engine /var/lib/edgellm/engines/smollm2
chroot "$tree" useradd --groups edgellm insider
chroot "$tree" useradd outsider
# For the test: its fault, and shorter times; everything else is as shipped.
site=$tree/opt/edgellm/current/lib/python$suite_python/site-packages
cp "$here/tests/systemd/boot/edgellm_fault.py" "$site"
echo "import edgellm_fault" >"$site/edgellm_fault.pth"
mkdir -p "$tree"/etc/systemd/system/{edgellm.service.d,edgellm-retry.service.d,multi-user.target.wants}
printf '[Service]\nWatchdogSec=5\nTimeoutStopSec=6\n' >"$tree/etc/systemd/system/edgellm.service.d/test.conf"
# An empty assignment clears the list; what follows the pause is the shipped command.
{
    printf '[Service]\nExecStart=\nExecStart=/bin/sleep 3\n'
    grep '^ExecStart=/bin/sh' "$here/systemd/edgellm-retry.service"
} >"$tree/etc/systemd/system/edgellm-retry.service.d/test.conf"
cp "$here/tests/systemd/boot/findings.py" "$tree/findings.py"
cat >"$tree/etc/systemd/system/findings.service" <<'UNIT'
[Unit]
After=dbus.service systemd-user-sessions.service
[Service]
Type=oneshot
TimeoutStartSec=infinity
ExecStart=-/opt/edgellm/current/bin/python /findings.py
ExecStartPost=/bin/systemctl poweroff --no-block
UNIT
ln -s ../findings.service "$tree/etc/systemd/system/multi-user.target.wants/findings.service"

step "boot"
timeout --kill-after=10 "${TIMEOUT:-240}" systemd-nspawn --quiet --directory="$tree" --boot --register=no --keep-unit \
    </dev/null >"$work/boot.log" 2>&1 || true
if [ ! -s "$tree/findings.code" ]; then
    tail -n 40 "$work/boot.log"
    cat "$tree/findings" 2>/dev/null || true
    die "the booted system did not finish"
fi
step "findings"
cat "$tree/findings"
[ "$(cat "$tree/findings.code")" = 0 ] || die "see FAIL above"

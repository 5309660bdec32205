#!/usr/bin/env bash
# Install edgellm as a system service, or bring an installation up to date, or take it away. See usage below.
set -euo pipefail

usage() {
    cat <<'USAGE'
tools/install.sh [OPTION…]: install edgellm as a system service. Run again at any time: it changes what differs.

  --engine DIR        serve this engine directory (a path on the target) and enable the service
  --root DIR          install into the tree of another system, such as an image being built
  --wheels DIR        take edgellm and what it needs from the wheels there, without a network
  --base-python PY    interpreter of the target that the virtual environment is made with (python3; 3.10 or later)
  --python PY         use this interpreter of the target, which has edgellm installed, and make no environment
  --drop-in NAME      switch on systemd/drop-ins/NAME.conf (may be repeated): cpu, gpu-devices, memory, memory-lock,
                      no-devices, tcp
  --no-drop-in NAME   switch it off again (may be repeated)
  --uninstall         take everything away except /etc/edgellm, /var/lib/edgellm and the user
  --purge             with --uninstall: also /etc/edgellm and /var/lib/edgellm
USAGE
}

say() { printf 'install: %s\n' "$*"; }
die() { printf 'install: %s\n' "$*" >&2; exit 1; }

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
root=
engine=
wheels=
base_python=python3
python=
drop_ins=()
no_drop_ins=()
uninstall=
purge=
changed=

while [ $# -gt 0 ]; do
    case $1 in
        --engine | --root | --wheels | --base-python | --python | --drop-in | --no-drop-in)
            [ $# -ge 2 ] || die "$1 needs a value"
            case $1 in
                --engine) engine=$2 ;;
                --root) root=$2 ;;
                --wheels) wheels=$2 ;;
                --base-python) base_python=$2 ;;
                --python) python=$2 ;;
                --drop-in) drop_ins+=("$2") ;;
                --no-drop-in) no_drop_ins+=("$2") ;;
            esac
            shift 2
            ;;
        --uninstall) uninstall=yes; shift ;;
        --purge) purge=yes; shift ;;
        --help | -h) usage; exit 0 ;;
        *) usage >&2; die "there is no option $1" ;;
    esac
done

[ -z "$purge" ] || [ -n "$uninstall" ] || die "--purge goes with --uninstall; nothing was changed"
[ "$(id -u)" = 0 ] || die "must run as root: it writes to /opt, /usr/lib and /etc of ${root:-this system}"
if [ -n "$root" ]; then
    [ -d "$root" ] || die "--root $root is no directory"
    root=$(cd "$root" && pwd)
    [ "$root" = / ] && root=
fi

prefix=/opt/edgellm
units=$root/usr/lib/systemd/system
own_drop_ins=$root/etc/systemd/system/edgellm.service.d
link=$root/var/lib/edgellm/engine
on_path=$root/usr/local/bin/edgellm

live() { [ -z "$root" ] && [ -d /run/systemd/system ]; }
on_target() { if [ -n "$root" ]; then chroot "$root" "$@"; else "$@"; fi; }
systemctl_target() { systemctl ${root:+"--root=$root"} --quiet "$@"; }

# put FILE TARGET MODE: write it if it differs, whole or not at all.
put() {
    if cmp --silent "$1" "$2" && [ "$(stat --format=%a "$2")" = "$3" ]; then return; fi
    install -D --mode="$3" "$1" "$2.new"
    mv --force "$2.new" "$2"
    say "wrote ${2#"$root"}"
    changed=yes
}

remove() {
    if live; then systemctl disable --quiet --now edgellm.service edgellm-retry.service 2>/dev/null || true
    else systemctl_target disable edgellm.service 2>/dev/null || true
    fi
    rm -f "$units/edgellm.service" "$units/edgellm-retry.service"
    rm -f "$root/usr/lib/sysusers.d/edgellm.conf" "$root/usr/lib/tmpfiles.d/edgellm.conf"
    for file in "$here"/systemd/drop-ins/*.conf; do rm -f "$own_drop_ins/${file##*/}"; done
    rm -f "$own_drop_ins/engine-mount.conf"
    rmdir "$own_drop_ins" 2>/dev/null || true
    if [ "$(readlink "$on_path" || true)" = "$prefix/bin/edgellm" ]; then rm -f "$on_path"; fi
    rm -rf "$root$prefix" "$root/usr/share/doc/edgellm"
    if live; then systemctl daemon-reload; fi
    if [ -n "$purge" ]; then
        rm -rf "$root/etc/edgellm" "$root/var/lib/edgellm"
        say "removed; only the user edgellm stays"
    else
        say "removed; the user edgellm, /etc/edgellm and /var/lib/edgellm stay"
    fi
}

# The release's directory is named by version and content, so the same sources are installed once, and a changed
# version never touches the files of the running one.
release_name() {
    local version digest
    if [ -n "$wheels" ]; then
        set -- "$wheels"/edgellm-*.whl
        [ -f "$1" ] || die "--wheels $wheels holds no edgellm-*.whl: make one with pip wheel --no-deps --wheel-dir $wheels ."
        [ $# = 1 ] || die "--wheels $wheels holds several edgellm wheels: leave one"
        version=$(basename "$1" | cut -d- -f2)
        digest=$(sha256sum <"$1")
    else
        version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/pyproject.toml")
        digest=$(cd "$here" && find pyproject.toml edgellm -type f ! -name '*.pyc' -print0 | sort -z | xargs -0 sha256sum | sha256sum)
    fi
    printf '%s-%.8s' "$version" "$digest"
}

install_release() {
    local release=$1 source stage
    local path=$prefix/releases/$release
    if [ -e "$root$path/complete" ]; then return; fi
    on_target "$base_python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        die "$base_python on the target is missing or older than 3.10: name a newer one with --base-python"
    say "making $path"
    rm -rf "${root:?}$path"
    mkdir -p "$root$path"
    # With the system's packages: on a Jetson TensorRT and systemd's bindings come from apt.
    on_target "$base_python" -m venv --system-site-packages "$path" ||
        die "no virtual environment could be made: apt-get install python3-venv on the target"
    stage=$(mktemp -d "$root/var/tmp/edgellm-install.XXXXXX")
    # shellcheck disable=SC2064  # the path as it is now
    trap "rm -rf '$stage'" EXIT
    source=${stage#"$root"}
    if [ -n "$wheels" ]; then
        cp "$wheels"/*.whl "$stage"
        # Isolated: whatever indexes this shell or user is set up for, only the wheels count.
        on_target "$path/bin/python" -m pip --isolated install --quiet --disable-pip-version-check --no-cache-dir \
            --no-index --find-links "$source" edgellm
    else
        cp -r "$here/pyproject.toml" "$here/README.md" "$here/edgellm" "$stage"
        on_target "$path/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir "$source"
    fi
    rm -rf "$stage"
    trap - EXIT
    touch "$root$path/complete"
}

# Switch the link in one step; the release before it stays for the way back.
activate() {
    local target=releases/$1 current=$root$prefix/current old=
    old=$(readlink "$current" || true)
    if [ "$old" != "$target" ]; then
        ln --symbolic --force --no-dereference "$target" "$current.new"
        mv --force --no-target-directory "$current.new" "$current"
        say "$prefix/current is $target${old:+; it was $old}"
        changed=yes
        for directory in "$root$prefix"/releases/*; do
            case releases/${directory##*/} in "$target" | "$old") ;; *) rm -rf "$directory" ;; esac
        done
    fi
    put_command "$prefix/current/bin/python"
}

# A command of its own rather than a link: the unit names one path, whatever interpreter is behind it.
put_command() {
    local file
    file=$(mktemp)
    printf '#!/bin/sh\nexec %s -m edgellm "$@"\n' "$1" >"$file"
    put "$file" "$root$prefix/bin/edgellm" 755
    rm -f "$file"
    # For people: the unit does not need it.
    if [ "$(readlink "$on_path" || true)" = "$prefix/bin/edgellm" ]; then return; fi
    if [ -e "$on_path" ] || [ -L "$on_path" ]; then
        say "kept ${on_path#"$root"}, which is not ours: $prefix/bin/edgellm is the command"
        return
    fi
    mkdir -p "${on_path%/*}"
    ln --symbolic "$prefix/bin/edgellm" "$on_path"
    say "${on_path#"$root"} is $prefix/bin/edgellm"
}

use_engine() {
    case $engine in
        /home/* | /root/* | /run/user/* | /tmp/* | /var/tmp/*)
            die "--engine $engine: the service sees no home and no temporary directory; move it to /var/lib/edgellm/engines" ;;
        /*) ;;
        *) die "--engine $engine: give the whole path, as on the target" ;;
    esac
    [ -f "$root$engine/config.json" ] || die "--engine $engine: no engine directory there (edgellm build makes one)"
    if [ "$(readlink "$link" || true)" != "$engine" ]; then
        mkdir -p "${link%/*}"
        ln --symbolic --force --no-dereference "$engine" "$link.new"
        mv --force --no-target-directory "$link.new" "$link"
        say "/var/lib/edgellm/engine is $engine"
        changed=yes
    fi
    local file
    file=$(mktemp)
    # A disk that is mounted late must not look like an engine that is missing: that ends without another try.
    printf '[Unit]\nRequiresMountsFor=%s\n' "$engine" >"$file"
    put "$file" "$own_drop_ins/engine-mount.conf" 644
    rm -f "$file"
}

if [ -n "$uninstall" ]; then
    remove
    exit 0
fi

for name in "${drop_ins[@]}"; do
    [ -f "$here/systemd/drop-ins/$name.conf" ] || die "--drop-in $name: there is no systemd/drop-ins/$name.conf"
done
for name in "${no_drop_ins[@]}"; do
    # Also one that an earlier version brought.
    [ -f "$here/systemd/drop-ins/$name.conf" ] || [ -f "$own_drop_ins/$name.conf" ] ||
        die "--no-drop-in $name: there is no systemd/drop-ins/$name.conf, and none is switched on"
    for other in "${drop_ins[@]}"; do [ "$other" != "$name" ] || die "--drop-in and --no-drop-in $name: which?"; done
done

if [ -n "$python" ]; then
    on_target "$python" -c 'import edgellm' 2>/dev/null || die "--python $python: edgellm is not installed there"
    put_command "$python"
else
    release=$(release_name)
    install_release "$release"
    activate "$release"
fi
put "$here/systemd/edgellm.service" "$units/edgellm.service" 644
put "$here/systemd/edgellm-retry.service" "$units/edgellm-retry.service" 644
put "$here/systemd/sysusers.d/edgellm.conf" "$root/usr/lib/sysusers.d/edgellm.conf" 644
put "$here/systemd/tmpfiles.d/edgellm.conf" "$root/usr/lib/tmpfiles.d/edgellm.conf" 644
put "$here/docs/operations.md" "$root/usr/share/doc/edgellm/operations.md" 644
for name in "${drop_ins[@]}"; do put "$here/systemd/drop-ins/$name.conf" "$own_drop_ins/$name.conf" 644; done
for name in "${no_drop_ins[@]}"; do
    if [ -e "$own_drop_ins/$name.conf" ]; then
        rm "$own_drop_ins/$name.conf"
        say "removed ${own_drop_ins#"$root"}/$name.conf"
        changed=yes
    fi
done
rmdir "$own_drop_ins" 2>/dev/null || true
if [ -e "$root/etc/edgellm/edgellm.toml" ]; then
    say "kept /etc/edgellm/edgellm.toml"
else
    put "$here/systemd/edgellm.toml" "$root/etc/edgellm/edgellm.toml" 640
fi
systemd-sysusers ${root:+"--root=$root"} edgellm.conf
systemd-tmpfiles ${root:+"--root=$root"} --create edgellm.conf
if [ -n "$engine" ]; then
    use_engine
    systemctl_target enable edgellm.service
fi
if live && [ -n "$changed" ]; then
    systemctl daemon-reload
    systemctl try-restart edgellm.service
fi
if [ -L "$link" ]; then say "done: systemctl start edgellm; then systemctl status edgellm and edgellm doctor"
else say "done, without an engine: run again with --engine DIR"
fi

#!/usr/bin/env bash
# Runs edgellm on aarch64 without such a machine: Debian for arm64 in a directory, its programs under qemu-user. Installs
# it from wheels as a Jetson would, builds SmolLM2's engine there, compares it with float32 logits of this machine, serves
# it and asks it something, then runs the unit tests named below. It shows that the packages, the Python and the numbers are right on aarch64; it says nothing about
# speed (about a hundredth of a real one's), about a Jetson's kernel or its GPU.
#
# Needs root, debootstrap and qemu-user-static (apt-get install debootstrap qemu-user-static), binfmt_misc, and a
# network for the first run; takes about half an hour. The system and the wheels are kept in
# ${XDG_CACHE_HOME:-~/.cache}/edgellm-ci: remove it to renew them.
#
#   PYTHON    an interpreter with edgellm installed (.venv/bin/python)
#   TESTS     what pytest is given
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$here/.venv/bin/python}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/edgellm-ci
suite=bookworm
suite_python=3.11
read -ra tests <<<"${TESTS:-tests/memory tests/scheduler tests/governor tests/text tests/checkpoint tests/quantize tests/cuda tests/kernels/test_packing.py tests/test_protocol.py tests/test_config.py tests/test_enginedir.py}"

step() { printf '· %s (%ss)\n' "$*" "$SECONDS"; }
die() { printf 'test_aarch64: %s\n' "$*" >&2; exit 1; }

[ "$(id -u)" = 0 ] || die "must run as root: it changes its root directory"
for tool in debootstrap qemu-aarch64-static; do
    command -v "$tool" >/dev/null || die "$tool is missing: apt-get install debootstrap qemu-user-static"
done
handlers=/proc/sys/fs/binfmt_misc
[ -e $handlers/register ] || mount -t binfmt_misc binfmt_misc $handlers || die "this kernel has no binfmt_misc"
if [ ! -e $handlers/qemu-aarch64 ]; then
    # An ELF file, 64 bits, little-endian, a program or a library, for AArch64; F: opened now, so a chroot finds it.
    magic='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
    mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
    echo ":qemu-aarch64:M::$magic:$mask:$(command -v qemu-aarch64-static):F" >$handlers/register
fi

mkdir -p "$cache"
bare=$cache/$suite-arm64
if [ ! -d "$bare" ]; then
    step "debootstrap $suite for arm64"
    rm -rf "$bare.partial"
    debootstrap --arch=arm64 --foreign --variant=minbase --include=python3,python3-venv \
        "$suite" "$bare.partial" >"$cache/debootstrap.log" 2>&1 || { tail "$cache/debootstrap.log"; die "debootstrap failed"; }
    chroot "$bare.partial" /debootstrap/debootstrap --second-stage >"$cache/debootstrap.log" 2>&1 ||
        { tail "$cache/debootstrap.log"; die "debootstrap's second stage failed"; }
    rm -rf "$bare.partial"/var/{cache/apt/archives,lib/apt/lists}
    mv "$bare.partial" "$bare"
fi

step "wheels"
wheels=$cache/wheels-arm64-$(sha256sum "$here/pyproject.toml" | cut -c1-12)
if [ ! -d "$wheels" ]; then
    rm -rf "$cache"/wheels-arm64-*
    platforms=(--platform manylinux2014_aarch64)
    for version in 17 26 27 28 31 34 35; do
        platforms+=(--platform "manylinux_2_${version}_aarch64")
    done
    "$python" -m pip download --quiet --disable-pip-version-check --dest "$wheels.partial" --only-binary=:all: \
        --python-version "$suite_python" --implementation cp "${platforms[@]}" \
        "${here}[test]" pip setuptools wheel >"$cache/pip.log" 2>&1 || { cat "$cache/pip.log"; die "no wheels for aarch64"; }
    mv "$wheels.partial" "$wheels"
fi
work=$(mktemp -d "$cache/arm64.XXXXXX")
tree=$work/tree
leave() {
    umount -l "$tree/proc" "$tree/dev" 2>/dev/null || true
    rm -rf --one-file-system "$work"
}
trap leave EXIT

step "what float32 says, on this machine"
checkpoint=$("$python" -m edgellm fetch smollm2-135m | tail -n 1)
"$python" -m edgellm build "$checkpoint" -o "$work/float32" --compute fp32 --max-batch-size 4 --max-seq-len 64 >/dev/null
"$python" -m edgellm doctor --record "$work/reference.npz" --reference "$work/float32" --length 12 --seed 1

step "install"
cp -a "$bare" "$tree"
mkdir -p "$tree/srv/edgellm"
cp -r "$wheels" "$tree/srv/wheels"
cp "$checkpoint" "$tree/srv/checkpoint.gguf"
cp "$work/reference.npz" "$tree/srv"
git -C "$here" ls-files -z | (cd "$here" && xargs -0 cp --parents -t "$tree/srv/edgellm")
# No /sys: it would describe another processor, on which ONNX Runtime fails under qemu.
mount -t proc proc "$tree/proc"
mount --bind /dev "$tree/dev"
enter=(chroot "$tree" env -i PATH=/srv/venv/bin:/usr/bin:/bin HOME=/root LC_ALL=C.UTF-8 XDG_RUNTIME_DIR=/run)
inside() { "${enter[@]}" "$@"; }
inside python3 -m venv /srv/venv
inside python -m pip install --quiet --no-index --find-links /srv/wheels pip setuptools wheel
inside python -m pip install --quiet --no-index --find-links /srv/wheels --no-build-isolation -e '/srv/edgellm[test]'
inside python -c 'import onnxruntime, platform; print(platform.machine(), "ONNX Runtime", onnxruntime.__version__)'

step "build"
inside edgellm build /srv/checkpoint.gguf -o /srv/engine --max-batch-size 2 --max-seq-len 64
step "prove"
inside edgellm doctor --prove --engine /srv/engine --reference /srv/reference.npz 2>"$work/prove.log" | tee "$work/table" ||
    { cat "$work/prove.log"; die "it does not compute the model"; }
# Kernels that round whole rows of activations alike pass, and have 0.04 here.
awk -F'|' '/token by token/ { exit !($4 < 0.02) }' "$work/table" || die "it computes the model badly"
step "serve"
# Not by way of `inside`: it is the daemon itself that SIGTERM must reach.
"${enter[@]}" edgellm serve /srv/engine >"$work/serve.log" 2>&1 &
daemon=$!
until grep -q ' READY in ' "$work/serve.log"; do
    kill -0 $daemon 2>/dev/null || { cat "$work/serve.log"; die "the daemon did not become ready"; }
    sleep 1
done
answer=$(inside edgellm chat --max-tokens 12 --temperature 0 "What is the capital of France?")
echo "$answer"
kill $daemon
wait $daemon || die "the daemon did not end well"
[ -n "$answer" ] || die "that is no answer"

step "unit tests"
inside bash -c 'cd /srv/edgellm && exec python -m pytest -m "not model" -p no:cacheprovider "$@"' pytest "${tests[@]}"
step "done"

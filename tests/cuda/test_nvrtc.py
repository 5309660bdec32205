"""The compiler: what its cache depends on, and what its errors say. NVRTC itself is real."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from edgellm.cuda import nvrtc
from edgellm.cuda.cubin import BadCubin, read_resources
from edgellm.cuda.launch import Kernel
from edgellm.cuda.nvrtc import Compiler, Program, read_program
from edgellm.errors import BuildError

SOURCE = """
#include "one.cuh"
template <int N> __global__ void scale(float* x) { x[threadIdx.x] *= N * ONE; }
template <int N> __global__ void swap(float* x) {
    __shared__ float s[N];
    s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = s[N - 1 - threadIdx.x];
}
template <int N> __global__ void array(float* x) {
    float a[N];
    for (int i = 0; i < N; i++) a[i] = 0;
    for (int i = 0; i < 999; i++) a[(int)x[i]] += x[i + 1];
    x[threadIdx.x] = a[(int)x[threadIdx.x]];
}
"""


def kernel(expression: str) -> Kernel:
    return Kernel("some.cu", expression, 64)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "sources"
    directory.mkdir()
    (directory / "some.cu").write_text(SOURCE)
    (directory / "one.cuh").write_text('#include "two.cuh"\n#define ONE TWO\n')
    (directory / "two.cuh").write_text("#define TWO 1.5f\n")
    monkeypatch.setattr(nvrtc, "read_program", lambda k, sm: read_program(k, sm, directory))
    nvrtc._text_of.cache_clear()
    return directory


@pytest.mark.parametrize("sm", [80, 86, 87, 90])
def test_resources_are_those_of_the_code(sources: Path, tmp_path: Path, sm: int) -> None:
    cubins = Compiler(tmp_path / "cache").cubins([kernel("swap<512>"), kernel("array<100>")], sm)
    (swap,) = read_resources(cubins[kernel("swap<512>")])
    (array,) = read_resources(cubins[kernel("array<100>")])
    assert "swap" in swap.name
    # From sm_90 on the driver's 1 KiB is counted with the block's.
    assert swap.shared == 512 * 4 + 1024 * (sm >= 90)
    assert swap.stack == 0
    assert 400 <= array.stack < 500  # an array that is indexed by a variable lives in local memory
    assert 4 <= swap.registers < 40
    assert swap.code > 100


def test_a_second_compiler_finds_what_the_first_made(sources: Path, tmp_path: Path) -> None:
    wanted = [kernel("scale<1>"), kernel("scale<2>"), kernel("scale<1>")]
    first, second = Compiler(tmp_path / "cache"), Compiler(tmp_path / "cache")
    made = first.cubins(wanted, 87)
    assert (first.compiled, first.found) == (2, 0)
    assert second.cubins(wanted, 87) == made
    assert (second.compiled, second.found) == (0, 2)
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_kernels_that_differ_in_launch_alone_are_compiled_once(sources: Path, tmp_path: Path) -> None:
    compiler = Compiler(tmp_path / "cache")
    narrow, wide = Kernel("some.cu", "scale<1>", 32), Kernel("some.cu", "scale<1>", 64, 1024)
    made = compiler.cubins([narrow, wide], 87)
    assert compiler.compiled == 1
    assert made[narrow] == made[wide]


def test_a_damaged_file_in_the_cache_is_compiled_again(sources: Path, tmp_path: Path) -> None:
    made = Compiler(tmp_path / "cache").cubins([kernel("scale<1>")], 87)
    (file,) = (tmp_path / "cache").iterdir()
    raw = bytearray(file.read_bytes())
    for damaged in (raw[:-1], raw[:50], b"", bytes(raw[:99]) + b"!" + bytes(raw[100:])):
        file.write_bytes(damaged)
        again = Compiler(tmp_path / "cache")
        assert again.cubins([kernel("scale<1>")], 87) == made
        assert again.compiled == 1


def test_the_key_depends_on_everything_that_the_cubin_does(sources: Path) -> None:
    base = read_program(kernel("scale<1>"), 87, sources)
    assert set(base.headers) == {"one.cuh", "two.cuh"}
    others = [
        Program(kernel("scale<2>"), 87, base.text, base.headers),
        Program(base.kernel, 86, base.text, base.headers),
        Program(base.kernel, 87, base.text + " ", base.headers),
        Program(base.kernel, 87, base.text, {**base.headers, "two.cuh": "#define TWO 2\n"}),
        Program(base.kernel, 87, base.text, {"one.cuh": base.headers["one.cuh"]}),
    ]
    keys = {program.key((12, 9)) for program in (base, *others)} | {base.key((13, 0)), base.key((12, 8))}
    assert len(keys) == len(others) + 3


def test_without_write_access_it_works_and_says_what_to_set(
    sources: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    compiler = Compiler(tmp_path / "file" / "cache")
    made = compiler.cubins([kernel("scale<1>"), kernel("scale<2>")], 87)
    assert len(made) == 2
    (record,) = caplog.records
    assert "EDGELLM_CACHE" in record.getMessage()
    assert "--sm" in record.getMessage()


def test_two_compilers_at_once_leave_whole_files(sources: Path, tmp_path: Path) -> None:
    wanted = [kernel(f"scale<{n}>") for n in range(6)]
    compilers = [Compiler(tmp_path / "cache", threads=2) for _ in range(2)]
    results = []
    threads = [
        threading.Thread(target=lambda each=each: results.append(each.cubins(wanted, 87)))
        for each in compilers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1]
    reader = Compiler(tmp_path / "cache")
    assert reader.cubins(wanted, 87) == results[0]
    assert reader.compiled == 0
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {
        f"{read_program(each, 87, sources).key(reader.version)}.cubin" for each in wanted
    }


def test_what_does_not_compile_is_told_in_the_compilers_words(sources: Path, tmp_path: Path) -> None:
    broken = "template <int N> __global__ void broken(float* x) { x = missing; }"
    (sources / "some.cu").write_text(broken)
    nvrtc._text_of.cache_clear()
    with pytest.raises(
        BuildError, match=r'broken<1> of some.cu does not compile for sm_87: (.|\n)*"missing"'
    ):
        Compiler(tmp_path / "cache").cubins([kernel("broken<1>")], 87)


def test_a_kernel_that_is_no_template_is_refused(sources: Path, tmp_path: Path) -> None:
    (sources / "some.cu").write_text(SOURCE + "__global__ void plain(float* x) { *x = 0; }")
    nvrtc._text_of.cache_clear()
    with pytest.raises(BuildError, match=r"scale<1> of some.cu brings 2 kernels .*plain.*template"):
        Compiler(tmp_path / "cache").cubins([kernel("scale<1>")], 87)


def test_a_missing_file_and_an_unknown_device_are_named(sources: Path, tmp_path: Path) -> None:
    compiler = Compiler(tmp_path / "cache")
    with pytest.raises(BuildError, match=r"NVRTC .* does not compile for sm_12; it knows .*sm_87"):
        compiler.cubins([kernel("scale<1>")], 12)
    (sources / "two.cuh").unlink()
    with pytest.raises(BuildError, match=r"one.cuh needs the kernel source two.cuh"):
        compiler.cubins([kernel("scale<1>")], 87)


@pytest.mark.parametrize("raw", [b"", b"\x7fELF", b"\x7fELF\x02" + bytes(100), bytes(200)])
def test_what_is_no_cubin_is_refused(raw: bytes) -> None:
    with pytest.raises(BadCubin):
        read_resources(raw)

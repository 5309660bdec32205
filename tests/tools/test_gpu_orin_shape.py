"""Part of a device in an Orin's shape: where streams come from, what is compiled, what the figures are."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_driver import FakeDriver, Status

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "gpu"))

import orin_shape
from few_sms import FewMultiprocessors
from figures import H100, Figures, read_figures
from orin_shape import ORINS, Measured, headroom

from edgellm.cuda.cubin import read_resources
from edgellm.cuda.launch import Device, Kernel
from edgellm.executor import cuda_kernels


class Green(FakeDriver):
    """A Hopper whose driver has green contexts."""

    CUdevResourceType = staticmethod(int)

    def _results(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if name == "cuDevSmResourceSplitByCount":
            groups = [SimpleNamespace(sm=SimpleNamespace(smCount=arguments[3]))]
            return (groups, 1, None)
        if name == "cuDevResourceGenerateDesc":
            return (7,)
        return super()._results(name, arguments)


def test_streams_are_of_the_part_and_launches_cut_for_an_orin() -> None:
    api = Green(sm=90, version=13000)
    driver = FewMultiprocessors(14, api=api)
    assert driver.partition == 14
    assert driver.facts.device == Device(87, 14, 163 << 10)
    assert not driver.facts.device.has_dependent_launch
    driver.stream()
    names = [name for name, _ in api.calls]
    assert "cuGreenCtxStreamCreate" in names
    assert "cuStreamCreate" not in names
    driver.close()
    assert [name for name, _ in api.calls][-3:] == [
        "cuStreamDestroy",
        "cuDevicePrimaryCtxRelease",
        "cuGreenCtxDestroy",
    ]


@pytest.mark.parametrize("refused", [True, False])
def test_without_green_contexts_launches_are_cut_all_the_same(refused: bool) -> None:
    """Because the driver refuses them, or the bindings have none."""
    api = Green(sm=90, version=13000) if refused else FakeDriver(sm=90, version=13000)
    if refused:
        api.fails["cuGreenCtxCreate"] = Status.CUDA_ERROR_INVALID_VALUE
    driver = FewMultiprocessors(8, api=api)
    assert driver.partition is None
    assert driver.facts.device == Device(87, 8, 163 << 10)
    driver.stream()
    assert api.calls[-1][0] == "cuStreamCreate"
    driver.close()


def test_kernels_are_compiled_for_the_device_at_hand() -> None:
    driver = FewMultiprocessors(8, api=Green(sm=80))
    kernel = Kernel("elementwise.cu", "permute_columns<128>", 128)
    with driver.compiles():
        (image,) = vars(cuda_kernels)["Compiler"]().cubins([kernel], 87).values()
    assert len(read_resources(image)) == 1
    # ELF's flags; the capability is in their second byte since CUDA 13, in the first before.
    flags = int.from_bytes(image[48:52], "little")
    assert 80 in (flags & 0xFF, flags >> 8 & 0xFF)
    assert vars(cuda_kernels)["Compiler"] is not driver.compiler


def test_a_rate_is_scaled_by_the_clocks_and_held_against_the_memory() -> None:
    measured = Measured("linear", "down", 1, us=100.0, read=39_600_000)
    here, scaled, share = headroom(measured, ORINS[0], 1.98)
    assert (here, scaled, share) == pytest.approx((396.0, 260.0, 260 / 204.8))


def test_the_smallest_headroom_of_each_kind_is_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(runner: SimpleNamespace) -> list[Measured]:
        sms = runner.sms
        return [
            Measured("linear", "qkv", 1, 1.0, sms * 50_000),
            Measured("linear", "qkv", 8, 1.0, sms * 40_000),
            Measured("linear", "tiny", 1, 1.0, 1, bounded=False),
        ]

    def driver_of(multiprocessors: int) -> Any:
        facts = SimpleNamespace(name="a GPU", clock_khz=1_000_000)
        return SimpleNamespace(
            partition=multiprocessors,
            sms=multiprocessors,
            facts=facts,
            compiler=lambda: None,
            close=lambda: None,
        )

    monkeypatch.setattr(orin_shape, "FewMultiprocessors", driver_of)
    monkeypatch.setattr(orin_shape, "Runner", lambda driver, _compiler: driver)
    monkeypatch.setattr(orin_shape, "linears", measured)
    monkeypatch.setattr(orin_shape, "attention", lambda _runner: [])
    said: list[str] = []
    orin_shape.run(said.append, Figures(tmp_path / "figures"))
    assert sum(line.startswith("| ") for line in said) == 9
    figures = read_figures(tmp_path / "figures")
    # 8 SMs at 0.918 GHz are the narrower ones; 14 have no bound.
    assert figures == {"Orin's shape linear least × its memory": pytest.approx(320 * 0.918 / 102.4)}
    assert set(figures) <= {gate.figure for gate in H100}

"""Instructions of decode linears, counted in what NVRTC makes of them: no GPU needed.

    python tools/linear_instructions.py [--nvdisasm PATH]      (pip install nvidia-cuda-nvdisasm)

Of Qwen3-8B's gate-up and down, as cut for an Orin NX and an H100, the table says how many instructions a warp
issues for each panel (128 columns of 16 rows) that it multiplies, from the wait for it to the last product,
and for each round of row blocks beside that: sums over warps and the epilogue, of which no warp takes every
branch.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent / "gpu"))

from linear_bench import AHEAD, NORM, QWEN3_8B

from edgellm.cuda.cubin import read_resources
from edgellm.cuda.launch import At, Device
from edgellm.cuda.nvrtc import Compiler
from edgellm.kernels.linear import BUCKETS, decode_linear
from edgellm.kernels.linear_tuned import tuned
from edgellm.kernels.packing import PackedShape

DEVICES: Final = {"Orin NX": Device(87, 8, 163 << 10), "H100": Device(90, 132, 227 << 10)}
PRODUCT: Final = "HMMA"
WAIT: Final = "DEPBAR.LE"


def loop_of(sass: str) -> list[str]:
    """The instructions of the innermost loop that multiplies and asks for weights.

    Raises:
        ValueError: there is none.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label.group(1)] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(found.group(1).strip())
    loops = []
    for end, instruction in enumerate(instructions):
        jump = re.search(r"BRA.*`\((\.L\w+)\)", instruction)
        if jump and labels.get(jump.group(1), end + 1) <= end:
            body = instructions[labels[jump.group(1)] : end + 1]
            if all(any(word in each for each in body) for word in (PRODUCT, "LDGSTS")):
                loops.append(body)
    if not loops:
        raise ValueError("no loop of products in this kernel")
    return min(loops, key=len)


def counted(loop: Sequence[str], mmas: int) -> tuple[float, int]:
    """Instructions for each panel, of `mmas` products, and for each round beside them."""
    panels = sum(PRODUCT in each for each in loop) / mmas
    last = max(index for index, each in enumerate(loop) if PRODUCT in each)
    # What comes of the products is stored for the other warps, unless the loop is over panels alone.
    stores = [index for index, each in enumerate(loop) if index > last and re.search(r"\bSTS\b", each)]
    if not stores:
        return len(loop) / panels, 0
    inner = stores[0] - next(index for index, each in enumerate(loop) if WAIT in each)
    return inner / panels, len(loop) - inner


def lines(nvdisasm: str) -> Iterator[str]:
    """The table."""
    yield "| as on | linear | rows | cut | registers | a panel | a round beside |"
    yield "| --- | --- | ---: | --- | ---: | ---: | ---: |"
    compiler = Compiler()
    for device_name, device in DEVICES.items():
        for name in ("gate-up", "down"):
            linear = QWEN3_8B.linears[name]
            for rows in BUCKETS:
                cut = tuned(linear.shape, rows=rows, device=device)
                (launch,) = decode_linear(
                    linear.shape,
                    rows=rows,
                    device=device,
                    x=At("x"),
                    norm=NORM if linear.normed else None,
                    weights=At("weights"),
                    bias=None,
                    epilogue=linear.epilogue,
                    out=At("out"),
                    workspace=At("workspace"),
                    ahead=AHEAD if linear.epilogue == "residual" else None,
                )
                image = compiler.cubins([launch.kernel], device.sm)[launch.kernel]
                panel, beside = counted(loop_of(_disassembled(nvdisasm, image)), _mmas(linear.shape, rows))
                x = "registers" if cut.held else "shared memory"
                what = f"{cut.join} {cut.slabs}, {cut.warps} warps, {cut.abreast} abreast, x in {x}"
                (took,) = read_resources(image)
                yield (
                    f"| {device_name} | {name} | {rows} | {what} | {took.registers} | {panel:.0f} "
                    f"| {beside or '–'} |"
                )


def _mmas(shape: PackedShape, rows: int) -> int:
    return shape.panel // 16 * (2 if rows > 8 else 1)


def _disassembled(nvdisasm: str, image: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        done = subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True, check=True)
    return done.stdout


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nvdisasm", default=shutil.which("nvdisasm"), help="path of NVIDIA's disassembler")
    options = parser.parse_args()
    if options.nvdisasm is None:
        parser.error("there is no nvdisasm in PATH; pip install nvidia-cuda-nvdisasm, or name it: --nvdisasm")
    for line in lines(options.nvdisasm):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

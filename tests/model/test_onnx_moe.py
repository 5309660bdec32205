"""Mixtures of experts on ONNX Runtime: what is computed, and that it is no more than what was chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from edgellm.model.decoder import Expert
from edgellm.model.onnx_file import OnnxFile
from edgellm.model.onnx_linear import Compute, Linears, Value
from edgellm.model.onnx_moe import Mixtures
from edgellm.model.weights import Dense, Grouped, Groups, Weight

HIDDEN, INNER, EXPERTS, TOP_K = 64, 32, 10, 3


def _dense(name: str, n: int, k: int, seed: int) -> Dense:
    values = (np.random.default_rng(seed).standard_normal((n, k)) / np.sqrt(k)).astype(np.float32)
    return Dense(name, (n, k), "f32", lambda begin, end: values[begin:end])


def _grouped(name: str, n: int, k: int, seed: int, *, offsets: bool, group: int = 32) -> Grouped:
    chance = np.random.default_rng(seed)
    scale = chance.uniform(0.01, 0.03, (n, k // group)).astype(np.float32)
    noise = chance.normal(0, 0.1 if offsets else 0, scale.shape).astype(np.float32)
    groups = Groups(chance.integers(0, 16, (n, k), np.uint8), scale, offset=-8 * scale + noise)
    return Grouped(name, (n, k), 4, group, True, groups.rows)


def _weight(kind: str, name: str, n: int, k: int, seed: int) -> Weight:
    """`mixed`: experts of different groups, with offsets and without."""
    match kind, seed % 3:
        case ("dense", _) | ("mixed", 2):
            return _dense(name, n, k, seed)
        case ("symmetric", _) | ("mixed", 0):
            return _grouped(name, n, k, seed, offsets=False)
    return _grouped(name, n, k, seed, offsets=True, group=16 if kind == "mixed" else 32)


def _experts(kind: str) -> list[Expert]:
    return [
        Expert(
            _weight(kind, f"{e}.gate", INNER, HIDDEN, 3 * e),
            _weight(kind, f"{e}.up", INNER, HIDDEN, 3 * e + (100 if kind != "mixed" else 0)),
            _weight(kind, f"{e}.down", HIDDEN, INNER, 3 * e + 2),
        )
        for e in range(EXPERTS)
    ]


def _session(
    path: Path, experts: list[Expert], router: Dense, *, compute: Compute, normalize: bool, rank: int = 2
) -> ort.InferenceSession:
    file = OnnxFile(path / "model.onnx")
    shape: list[int | str] = ["T", HIDDEN] if rank == 2 else ["B", "S", HIDDEN]
    x = Value(file.input("x", np.float32, shape), rank, HIDDEN)
    y = Mixtures(file, Linears(file, compute)).mix(x, router, experts, TOP_K, "y", normalize=normalize)
    file.output(y.name, np.float32, shape)
    file.close()
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(path / "profile")
    return ort.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"])


def _chosen(x: NDArray[Any], router: Dense) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Probabilities [T, E] and the chosen experts [T, top_k]."""
    scores = np.exp(x.astype(np.float64) @ router.dequantize().T)
    probabilities = scores / scores.sum(axis=-1, keepdims=True)
    return probabilities, np.argsort(-probabilities, axis=-1)[:, :TOP_K]


def _expected(
    x: NDArray[Any], router: Dense, experts: list[Expert], *, normalize: bool
) -> NDArray[np.float64]:
    out = np.zeros(x.shape, np.float64)
    probabilities, chosen = _chosen(x, router)
    for token, row in enumerate(x.astype(np.float64)):
        total = probabilities[token, chosen[token]].sum() if normalize else 1
        for e in chosen[token]:
            gate, up = (row @ w.dequantize().T for w in (experts[e].gate, experts[e].up))
            inner = gate / (1 + np.exp(-gate)) * up
            out[token] += probabilities[token, e] / total * (inner @ experts[e].down.dequantize().T)
    return out


@pytest.mark.parametrize("kind", ["dense", "symmetric", "offsets", "mixed"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("compute", "bound"), [("fp32", 1e-5), ("int8", 0.02)])
def test_a_mixture(kind: str, normalize: bool, compute: Compute, bound: float, tmp_path: Path) -> None:
    experts, router = _experts(kind), _dense("router", EXPERTS, HIDDEN, 99)
    session = _session(tmp_path, experts, router, compute=compute, normalize=normalize)
    for tokens in (1, 2, 17):
        x = np.random.default_rng(tokens).standard_normal((tokens, HIDDEN)).astype(np.float32)
        (y,) = session.run(None, {"x": x})
        expected = _expected(x, router, experts, normalize=normalize)
        assert np.sqrt(np.mean((y - expected) ** 2) / np.mean(expected**2)) < bound


def test_rows_of_a_batch_keep_their_places(tmp_path: Path) -> None:
    experts, router = _experts("offsets"), _dense("router", EXPERTS, HIDDEN, 99)
    session = _session(tmp_path, experts, router, compute="fp32", normalize=True, rank=3)
    x = np.random.default_rng(0).standard_normal((3, 5, HIDDEN)).astype(np.float32)
    (y,) = session.run(None, {"x": x})
    expected = _expected(x.reshape(-1, HIDDEN), router, experts, normalize=True)
    assert np.abs(y.reshape(-1, HIDDEN) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(("kind", "compute"), [("dense", "fp32"), ("symmetric", "int8"), ("offsets", "int8")])
@pytest.mark.parametrize("tokens", [1, 4])
def test_only_chosen_experts_are_read(kind: str, compute: Compute, tokens: int, tmp_path: Path) -> None:
    """ONNX Runtime's profile has the shape of every product: those of other experts have no rows."""
    experts, router = _experts(kind), _dense("router", EXPERTS, HIDDEN, 99)
    session = _session(tmp_path, experts, router, compute=compute, normalize=True)
    x = np.random.default_rng(7).standard_normal((tokens, HIDDEN)).astype(np.float32)
    session.run(None, {"x": x})
    events = json.loads(Path(session.end_profiling()).read_text())
    rows: dict[int, list[int]] = {}
    for event in events:
        name = event["name"]
        product = event.get("args", {}).get("op_name") in ("MatMulNBits", "FusedMatMul", "MatMul", "Gemm")
        if product and name.endswith("_kernel_time") and ".router" not in name:
            expert = int(name.removesuffix("_kernel_time").removesuffix(".offsets").rsplit(".", 1)[1])
            (shape,) = event["args"]["output_type_shape"][0].values()
            rows.setdefault(expert, []).append(shape[0])
    _, chosen = _chosen(x, router)
    expected = np.bincount(chosen.reshape(-1), minlength=EXPERTS)
    products = 4 if kind == "offsets" else 2
    assert rows == {e: [count] * products for e, count in enumerate(expected)}
    assert 0 in expected

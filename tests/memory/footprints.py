"""Models to plan for, none of which exists."""

from __future__ import annotations

from hypothesis import strategies as st

from edgellm.checkpoint.random_models import model_of
from edgellm.memory.cpu import CpuFootprint
from edgellm.memory.plan import Shape
from edgellm.model.inventory import Matrices


def footprint(
    *,
    layers: int = 30,
    hidden: int = 576,
    inner: int = 1536,
    heads: int = 9,
    kv_heads: int = 3,
    vocabulary: int = 49152,
    **options: object,
) -> CpuFootprint:
    """SmolLM2-135M's shape unless told otherwise, in Q4_1 with a tied Q8_0 embedding."""
    head = hidden // heads
    spec = model_of(
        "llama",
        vocabulary=vocabulary,
        hidden=hidden,
        layers=layers,
        heads=(heads, kv_heads),
        head=head,
        inner=inner,
        context=8192,
        tied=True,
    )
    linears = (
        (heads * head, hidden, 2),
        (kv_heads * head, hidden, 2),
        (inner, hidden, 2),
        (hidden, inner, 1),
    )
    weights = (
        Matrices(role="embedding", rows=vocabulary, columns=hidden, bits=8, group=32),
        *(
            Matrices(role="linear", count=n * layers, rows=rows, columns=k, bits=4, group=32, offsets=True)
            for rows, k, n in linears
        ),
        Matrices(role="head", rows=vocabulary, columns=hidden, bits=8, group=32),
    )
    defaults: dict[str, object] = {"compute": "int8", "kv_cache": "fp32"}
    return CpuFootprint(spec=spec, weights=weights, **{**defaults, **options})  # type: ignore[arg-type]


footprints = st.builds(
    footprint,
    layers=st.integers(1, 80),
    hidden=st.sampled_from([64, 576, 4096]),
    inner=st.sampled_from([96, 1536, 14336]),
    heads=st.just(8),
    kv_heads=st.sampled_from([1, 2, 8]),
    vocabulary=st.sampled_from([265, 49152, 151936]),
    compute=st.sampled_from(["int8", "fp32"]),
    kv_cache=st.sampled_from(["fp32", "fp16"]),
    threads=st.integers(1, 64),
)
shapes = st.builds(Shape, st.integers(1, 256), st.integers(2, 131072), st.integers(1, 8192))

"""Whole networks on a device beside the same network in float32, teacher-forced: KL in nats.

Small networks of each family and quantization beside numpy; a real model, all of it, beside the CPU
executor's float32 mode on a real text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from figures import Figures
from limited import Say
from loaded import exact, loaded
from numpy.typing import NDArray
from reference import NumpyExecutor
from tokenizers import Tokenizer

from edgellm.bench.prompts import PASSAGE
from edgellm.checkpoint.base import Checkpoint, open_checkpoint
from edgellm.checkpoint.random import QUANTS, RandomCheckpoint
from edgellm.checkpoint.random_models import SMALL
from edgellm.cuda.driver import Driver
from edgellm.doctor.proof import Case, prove
from edgellm.doctor.reference import compute_reference
from edgellm.kernels.attention_shape import CacheKind
from edgellm.memory.plan import Shape
from edgellm.model.spec import ModelSpec

MAX_MEAN_KL: Final = 0.001
"""With fp16 caches."""
MAX_MEAN_KL_ROUTED: Final = 0.02
"""Where a token may go to other experts: between two of nearly the same score rounding decides, and random
experts have nothing in common."""
MAX_MEAN_KL_INT8: Final = 1.0
"""With int8 caches: random weights attend, and route to experts, more sharply than any trained model's."""
MAX_MEAN_KL_INT8_REAL: Final = 0.01
"""With int8 caches, trained weights."""

SHAPE: Final = Shape(max_batch_size=5, max_seq_len=128, max_num_tokens=256)
"""Of small networks' executors."""

HEADING: Final = (
    "| network | caches | case | positions | mean KL | largest KL | same best token | |\n"
    "| --- | --- | --- | ---: | ---: | ---: | ---: | --- |"
)

Tokens = NDArray[np.int32]


def check_networks(
    caches: Sequence[CacheKind],
    seed: int,
    say: Say,
    *,
    networks: Sequence[str] = tuple(SMALL),
    open_driver: Callable[[], Driver] = Driver,
) -> bool:
    """Small networks beside numpy's; whether all are the same network."""
    chance = np.random.default_rng(seed)
    good = True
    say(HEADING)
    for name in networks:
        for quant in QUANTS:
            checkpoint = RandomCheckpoint(SMALL[name], "small", quant, int(chance.integers(1000)), 2.0)
            for kv_cache in caches:
                most = most_kl(checkpoint.spec, kv_cache)
                for case in prove_network(checkpoint, kv_cache, chance, open_driver=open_driver):
                    good &= _tell(say, f"{name}, {quant}", kv_cache, case, most)
    return good


def most_kl(spec: ModelSpec, kv_cache: CacheKind) -> float:
    """What a case's mean KL may be with random weights."""
    if kv_cache == "int8":
        # A choice of precision: what it costs is reported, and that it is a number.
        return MAX_MEAN_KL_INT8
    routed = spec.moe is not None and spec.moe.top_k < spec.moe.num_experts
    return MAX_MEAN_KL_ROUTED if routed else MAX_MEAN_KL


def prove_network(
    checkpoint: RandomCheckpoint,
    kv_cache: CacheKind,
    chance: np.random.Generator,
    *,
    shape: Shape = SHAPE,
    length: int = 80,
    open_driver: Callable[[], Driver] = Driver,
) -> Iterator[Case]:
    """A network on the device beside numpy's, over random texts of this length, one for each slot."""
    with loaded(checkpoint, shape, kv_cache=kv_cache, open_driver=open_driver) as executor:
        reference = NumpyExecutor(checkpoint, executor.info)
        vocabulary = checkpoint.spec.vocab_size
        prompts = [
            chance.integers(0, vocabulary, length, dtype=np.int32) for _ in range(shape.max_batch_size)
        ]
        reference.announce(prompts)
        yield from prove(executor, compute_reference(reference, prompts))


def check_checkpoint(
    path: Path,
    caches: Sequence[CacheKind],
    say: Say,
    figures: Figures,
    *,
    open_driver: Callable[[], Driver] = Driver,
) -> bool:
    """A real model, whole, beside the CPU executor's float32 mode; whether they are the same model.

    Raises:
        CheckpointError: the file is none that edgellm reads.
    """
    checkpoint = open_checkpoint(path)
    good = True
    say(HEADING)
    shape = Shape(max_batch_size=4, max_seq_len=128, max_num_tokens=256)
    prompts = passages(checkpoint, count=4, length=96)
    with exact(checkpoint, shape) as reference:
        for kv_cache in caches:
            most = MAX_MEAN_KL_INT8_REAL if kv_cache == "int8" else MAX_MEAN_KL
            worst = 0.0
            with loaded(checkpoint, shape, kv_cache=kv_cache, open_driver=open_driver) as executor:
                for case in prove(executor, compute_reference(reference, prompts)):
                    worst = max(worst, case.mean_kl)
                    good &= _tell(say, checkpoint.name, kv_cache, case, most)
            if kv_cache == "fp16":
                figures.add("real model mean KL", worst)
    return good


def passages(checkpoint: Checkpoint, *, count: int, length: int) -> list[Tokens]:
    """Pieces of a text in everyday words, from different places: int32 [length] each."""
    text = np.array(Tokenizer.from_str(checkpoint.tokenizer_json().decode()).encode(PASSAGE).ids, np.int32)
    starts = np.linspace(0, max(0, len(text) - length), count).astype(int)
    return [text[at : at + length] for at in starts]


def _tell(say: Say, name: str, kv_cache: CacheKind, case: Case, most: float) -> bool:
    # NaN never passes.
    passed = case.mean_kl <= most
    say(
        f"| {name} | {kv_cache} | {case.name} | {case.positions} | {case.mean_kl:.6f} | "
        f"{case.max_kl:.6f} | {case.agreeing} | {'passed' if passed else 'FAILED'} |"
    )
    return passed

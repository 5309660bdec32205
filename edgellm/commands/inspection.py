"""What `edgellm inspect` finds out: a report on a checkpoint or an engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from edgellm.checkpoint import Checkpoint
    from edgellm.enginedir import EngineDir
    from edgellm.model.inventory import Matrices
    from edgellm.model.kv_cache import KvCache
    from edgellm.model.spec import ModelSpec
    from edgellm.text.chat import ChatTemplate

_Found = TypeVar("_Found")

KV_BYTES: Final[dict[KvCache, tuple[int, int]]] = {"int8": (1, 2), "fp16": (2, 0), "fp32": (4, 0)}
"""Of each number in a cache, and beside each head's numbers."""

NETWORKS = ("model.", "weights.safetensors", "rank0.engine")
"""What an engine's weights are in, by executor: ONNX, CUDA, TensorRT."""


@dataclass(frozen=True, slots=True)
class Storage:
    """Weights that are stored in one way.

    Attributes:
        weights: how many numbers.
        bits: of each, its group's scale apart.
        group: how many share a scale; 0: unquantized.
        offsets: whether groups have an offset or zero point that is more than the middle of the range.
    """

    weights: int
    bits: int
    group: int
    offsets: bool


@dataclass(frozen=True, slots=True)
class BuiltFor:
    """What an engine was built for: see `BuildConfig` and `EdgellmSection`."""

    max_batch_size: int
    max_seq_len: int
    max_num_tokens: int
    executor: str
    compute: str


@dataclass(frozen=True, slots=True)
class Quantized:
    """What `edgellm build --quant` did, of the engine's quantization.json.

    Attributes:
        linear, ends, group_size, calibration_tokens, error, divergence: see `QuantizationReport`.
    """

    linear: str
    ends: str
    group_size: int
    calibration_tokens: int
    error: float
    divergence: dict[str, float] | None


@dataclass(frozen=True, slots=True)
class Report:
    """What there is to say. None where it cannot be known, because of what `refused` says.

    Attributes:
        kind: what it is.
        name: the model's.
        architecture: Hugging Face's class name.
        parameters: numbers in all tensors; a tied head counts once.
        active_parameters: of them, those that a token goes through, where it does not go through all.
        stored_bytes: of the tensors on disk.
        bits_per_weight: the quotient of these.
        quantization: TensorRT-LLM's name of how most linear layers are stored.
        storage: every way in which matrices are stored, most used first.
        kv_bytes_per_token: in the caches of all layers, by their element type.
        context: tokens of the longest text that edgellm runs it with.
        tokens: of the tokenizer.
        chat_template: whether there is one.
        chat_error: why it cannot write a user's single message, if so.
        eos_ids: the tokens that end an answer.
        built_for: an engine's sizes and executor.
        quantized: None: not by edgellm.
        refused: what edgellm would not build or serve, and why.
    """

    path: str
    kind: Literal["checkpoint", "engine"]
    name: str | None = None
    architecture: str | None = None
    parameters: int | None = None
    active_parameters: int | None = None
    stored_bytes: int | None = None
    bits_per_weight: float | None = None
    quantization: str | None = None
    storage: tuple[Storage, ...] = ()
    kv_bytes_per_token: dict[str, int] | None = None
    context: int | None = None
    tokens: int | None = None
    chat_template: bool | None = None
    chat_error: str | None = None
    eos_ids: tuple[int, ...] = ()
    built_for: BuiltFor | None = None
    quantized: Quantized | None = None
    refused: tuple[str, ...] = ()


def inspect_checkpoint(path: Path) -> Report:
    """Say what a checkpoint is; what a build would refuse is part of the report."""
    from edgellm.checkpoint import open_checkpoint
    from edgellm.errors import CheckpointError, OperatorError
    from edgellm.model.inventory import take_inventory

    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError as error:
        return Report(str(path), "checkpoint", refused=(str(error),))
    refused: list[str] = []

    def unless_refused(look: Callable[[], _Found]) -> _Found | None:
        try:
            return look()
        except OperatorError as error:
            refused.append(str(error))
            return None

    weights = unless_refused(lambda: take_inventory(checkpoint)) or ()
    tokens = unless_refused(lambda: _tokens_of(checkpoint.tokenizer_json()))
    template = unless_refused(lambda: _template_of(checkpoint))
    unless_refused(lambda: _require_head_size(checkpoint.spec))
    parameters = _parameters(weights, checkpoint.spec) if weights else None
    return Report(
        str(path),
        "checkpoint",
        name=checkpoint.name,
        architecture=checkpoint.spec.architecture,
        parameters=parameters,
        active_parameters=_active(weights, checkpoint.spec),
        stored_bytes=checkpoint.stored_bytes,
        bits_per_weight=_bits(checkpoint.stored_bytes, parameters),
        quantization=checkpoint.quantization.quant_algo,
        storage=_storage(weights, checkpoint.spec),
        kv_bytes_per_token=_kv_bytes(checkpoint.spec),
        context=checkpoint.spec.max_context,
        tokens=tokens,
        chat_template=checkpoint.chat_template is not None,
        chat_error=None if template is None else template.complaint(),
        eos_ids=checkpoint.eos_ids,
        refused=(*refused, *_without_kernel(weights)),
    )


def inspect_engine(path: Path) -> Report:
    """Say what an engine is.

    Raises:
        EngineError: it is damaged.
    """
    from edgellm.enginedir import open_engine

    engine = open_engine(path)
    config = engine.config
    weights, spec = config.edgellm.weights, engine.spec
    template = engine.chat_template()
    parameters = _parameters(weights, spec) if weights else None
    stored = sum(record.bytes for name, record in config.edgellm.files.items() if name.startswith(NETWORKS))
    return Report(
        str(path),
        "engine",
        name=engine.model_name,
        architecture=spec.architecture,
        parameters=parameters,
        active_parameters=_active(weights, spec),
        stored_bytes=stored,
        bits_per_weight=_bits(stored, parameters),
        quantization=config.pretrained_config.quantization.quant_algo,
        storage=_storage(weights, spec),
        kv_bytes_per_token={engine.kv_cache: _kv_bytes(spec)[engine.kv_cache]},
        context=spec.max_context,
        tokens=engine.tokenizer().vocab_size,
        chat_template=template is not None,
        chat_error=None if template is None else template.complaint(),
        eos_ids=engine.eos_ids,
        built_for=BuiltFor(
            max_batch_size=engine.build.max_batch_size,
            max_seq_len=engine.build.max_seq_len,
            max_num_tokens=engine.build.max_num_tokens,
            executor=config.edgellm.executor,
            compute=engine.compute,
        ),
        quantized=_quantized(engine),
    )


def _quantized(engine: EngineDir) -> Quantized | None:
    import msgspec

    from edgellm.enginedir import QUANTIZATION
    from edgellm.errors import EngineError
    from edgellm.quantize.report import QuantizationReport

    if QUANTIZATION not in engine.config.edgellm.files:
        return None
    path = engine.path / QUANTIZATION
    try:
        found = msgspec.json.decode(path.read_bytes(), type=QuantizationReport)
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise EngineError(f"{path} is damaged: {error}; build the engine again") from error
    return Quantized(
        linear=found.linear,
        ends=found.ends,
        group_size=found.group_size,
        calibration_tokens=found.calibration_tokens,
        error=found.error,
        divergence=None if found.divergence is None else msgspec.structs.asdict(found.divergence),
    )


def _tokens_of(tokenizer_json: bytes) -> int:
    import tokenizers

    from edgellm.errors import CheckpointError
    from edgellm.text.tokenizer import Tokenizer

    try:
        return Tokenizer(tokenizers.Tokenizer.from_buffer(tokenizer_json)).vocab_size
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"the tokenizer cannot be loaded: {error}") from error


def _template_of(checkpoint: Checkpoint) -> ChatTemplate | None:
    from edgellm.text.chat import ChatTemplate

    if checkpoint.chat_template is None:
        return None
    return ChatTemplate(checkpoint.chat_template, bos=checkpoint.bos_token, eos=checkpoint.eos_token)


def _parameters(weights: Sequence[Matrices], spec: ModelSpec) -> int:
    return sum(each.elements for each in _once(weights, spec))


def _active(weights: Sequence[Matrices], spec: ModelSpec) -> int | None:
    if spec.moe is None or not weights:
        return None
    experts = sum(each.elements for each in weights if each.role == "expert")
    return _parameters(weights, spec) - experts // spec.moe.num_experts * (
        spec.moe.num_experts - spec.moe.top_k
    )


def _bits(stored: int, parameters: int | None) -> float | None:
    return None if parameters is None else round(8 * stored / parameters, 3)


def _once(weights: Sequence[Matrices], spec: ModelSpec) -> list[Matrices]:
    """The inventory without a head that is the embedding."""
    return [each for each in weights if not (each.role == "head" and spec.tie_word_embeddings)]


def _storage(weights: Sequence[Matrices], spec: ModelSpec) -> tuple[Storage, ...]:
    sums: dict[tuple[int, int, bool], int] = {}
    for each in _once(weights, spec):
        if each.role != "vector":
            how = each.bits, each.group, each.offsets
            sums[how] = sums.get(how, 0) + each.elements
    ways = [Storage(count, *how) for how, count in sums.items()]
    return tuple(sorted(ways, key=lambda way: -way.weights))


def _kv_bytes(spec: ModelSpec) -> dict[str, int]:
    elements = spec.kv_elements_per_token()
    return {
        dtype: elements * each + elements // spec.head_size * beside
        for dtype, (each, beside) in KV_BYTES.items()
    }


def _require_head_size(spec: ModelSpec) -> None:
    from edgellm.model.onnx import require_head_size

    require_head_size(spec)


def _without_kernel(weights: Sequence[Matrices]) -> Iterator[str]:
    from edgellm.model.onnx_linear import MIN_GROUP, has_kernel

    for group in sorted({each.group for each in weights if each.group and not has_kernel(each.group)}):
        yield f"groups of {group}: the CPU executor needs a power of two from {MIN_GROUP} up"

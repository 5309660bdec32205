"""config.json of an engine directory, typed. Names are TensorRT-LLM's; the `edgellm` section is ours."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from edgellm.model.inventory import Matrices
from edgellm.model.kv_cache import KvCache
from edgellm.model.quantization import Quantization
from edgellm.model.spec import ModelSpec

CONFIG: Final = "config.json"
FORMAT_VERSION: Final = 1
UNSEALED: Final = "0" * 64

Compute = Literal["int8", "fp32", "fp16"]
"""`int8`: weights as stored, activations quantized on the fly; `fp32`: the reference; both the CPU's. `fp16`:
weights as stored, activations in half precision, sums in single: CUDA's and TensorRT's."""


class Mapping(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """TensorRT-LLM's parallel mapping; edgellm runs on one device."""

    world_size: int = 1
    tp_size: int = 1
    pp_size: int = 1


class PretrainedConfig(ModelSpec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The model: ModelSpec's fields and how the checkpoint stores it.

    Attributes:
        dtype: of the activations between the linear layers.
        logits_dtype: of the logits.
    """

    dtype: str = "float32"
    logits_dtype: str = "float32"
    mapping: Mapping = Mapping()
    quantization: Quantization = Quantization()

    def spec(self) -> ModelSpec:
        """The ModelSpec inside."""
        return ModelSpec(**{name: getattr(self, name) for name in ModelSpec.__struct_fields__})


class BuildConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an engine was built for. Names and meanings are TensorRT-LLM's.

    Attributes:
        max_input_len: tokens of a prompt.
        max_seq_len: tokens of prompt and answer together.
        max_batch_size: requests that run at the same time.
        max_num_tokens: tokens that one step may feed, all requests together.
        opt_batch_size, opt_num_tokens: the sizes to be fastest at.
        kv_cache_type: `continuous`: each request has a slot of max_seq_len tokens.
        strongly_typed: types in the network are kept as written.
    """

    max_input_len: int
    max_seq_len: int
    max_batch_size: int
    max_num_tokens: int
    opt_batch_size: int
    opt_num_tokens: int
    kv_cache_type: Literal["continuous"] = "continuous"
    strongly_typed: bool = True

    @property
    def slots(self) -> str:
        """For people: `4 slots of 2048 tokens`."""
        plural = "" if self.max_batch_size == 1 else "s"
        return f"{self.max_batch_size} slot{plural} of {self.max_seq_len} tokens"


class FileRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file of the engine: its SHA-256 in hex and its size in bytes."""

    sha256: str
    bytes: int


class PlanRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A TensorRT plan: what it can run on, and what it takes there.

    Attributes:
        library: `tensorrt` or `tensorrt_rtx`.
        version: of the library that built it, which alone can run it.
        targets: compute capabilities that it runs on, 87 for 8.7.
        software: the board's, such as `JetPack 7.2 (L4T 39.0)`, where it was built for the board at hand.
        lengths: whether attention takes lengths, so that there is an input for them.
        emitted_bytes: of the network's constants.
        weight_bytes: of the plan's weights on the device.
        prefill_bytes, decode_bytes: of the activations of a prompt's chunk and of a decode step.
        kernels: that a decode step launches, about.
    """

    library: Literal["tensorrt", "tensorrt_rtx"]
    version: str
    targets: tuple[int, ...]
    software: str | None = None
    lengths: bool
    emitted_bytes: int
    weight_bytes: int
    prefill_bytes: int
    decode_bytes: int
    kernels: int


class EdgellmSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What TensorRT-LLM's config.json has no place for.

    Attributes:
        format_version: of this directory's layout; another one is refused.
        executor: which executor runs it.
        executor_version: of the library that the network was written for, or None.
        compute: `int8` (weights as stored, activations quantized on the fly) or `fp32` (the reference).
        kv_cache: element type of the KV cache.
        model_name: what to call the model.
        bos_id: the token that opens a text, or None.
        add_bos: whether a plain text prompt starts with bos_id.
        eos_ids: the tokens that end an answer.
        weights: every matrix, for the memory plan.
        plan: of the tensorrt executor's engines.
        files: every other file, by name.
        config_sha256: of config.json itself; see `engine_seal.py`.
    """

    format_version: int
    executor: Literal["cpu", "cuda", "tensorrt"]
    executor_version: str | None = None
    compute: Compute
    kv_cache: KvCache = "fp32"
    model_name: str
    bos_id: int | None
    add_bos: bool
    eos_ids: tuple[int, ...]
    weights: tuple[Matrices, ...] = ()
    plan: PlanRecord | None = None
    files: dict[str, FileRecord] = {}
    config_sha256: str = UNSEALED


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """config.json. `version` is edgellm's, where TensorRT-LLM has its own."""

    version: str
    pretrained_config: PretrainedConfig
    build_config: BuildConfig
    edgellm: EdgellmSection

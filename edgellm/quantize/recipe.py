"""What becomes of which tensor: the choices of `edgellm build --quant`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from edgellm.checkpoint.base import Checkpoint
from edgellm.errors import CheckpointError, UsageError
from edgellm.model.inventory import take_inventory
from edgellm.model.quantization import Quantization
from edgellm.model.weights import Dense
from edgellm.quantize.groups import Bits
from edgellm.quantize.named import Named

Kind = Literal["none", "int4", "int8"]
BITS: Final[dict[Kind, Bits | None]] = {"none": None, "int4": 4, "int8": 8}
GROUP_SIZES: Final = (32, 64, 128)
DEFAULT_GROUP_SIZE: Final = 64

_ENDS: Final = ("embed_tokens", "lm_head")
_ROUTER: Final = ".mlp.gate"
"""Which experts a token goes to hangs on small differences, and the matrix is small: it stays as it is."""
_NAMED: Final = 5
"""Tensors that a message names before it says how many more there are."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to quantize.

    Attributes:
        linear: the linear layers, experts included: `int4` with scale and offset, `int8` with a scale.
        ends: the embedding and the head.
        group: elements of a row that share a scale.
    """

    linear: Literal["int4", "int8"]
    ends: Kind = "int8"
    group: int = DEFAULT_GROUP_SIZE

    def bits(self, name: str) -> Bits | None:
        """Of the matrix with this canonical name; None: it stays as it is."""
        if name.endswith(_ROUTER):
            return None
        return BITS[self.ends if name in _ENDS else self.linear]

    def quantization(self, names: tuple[str, ...], *, calibrated: bool) -> Quantization:
        """What config.json says of an engine with these matrices."""
        bits = BITS[self.linear]
        algorithm: Literal["W4A16", "W4A16_AWQ", "W8A16"] = "W8A16"
        if bits == 4:
            algorithm = "W4A16_AWQ" if calibrated else "W4A16"
        return Quantization(
            quant_algo=algorithm,
            group_size=self.group,
            has_zero_point=bits == 4,
            exclude_modules=tuple(name for name in names if self.bits(name) != bits),
        )


def matrices_of(checkpoint: Checkpoint, recipe: Recipe) -> tuple[str, ...]:
    """The canonical names of all matrices, in the order of their use, if the recipe can be followed.

    Raises:
        BuildError: the architecture is none that edgellm builds.
        CheckpointError: a tensor is missing, or quantized already.
        UsageError: a group does not divide a row.
    """
    watched = Named(checkpoint)
    take_inventory(watched)
    matrices = {name: weight for name, weight in watched.found.items() if len(weight.shape) == 2}
    quantized = [name for name, weight in matrices.items() if not isinstance(weight, Dense)]
    if quantized:
        raise CheckpointError(
            f"{checkpoint.path} is quantized already ({_some(quantized)}); "
            "--quant wants the unquantized model. Without --quant it is built as it is"
        )
    _require_division(
        {name: weight.shape[1] for name, weight in matrices.items() if recipe.bits(name) is not None},
        recipe.group,
    )
    return tuple(matrices)


def _require_division(columns: dict[str, int], group: int) -> None:
    uneven = [name for name, count in columns.items() if count % group]
    if not uneven:
        return
    fitting = [size for size in GROUP_SIZES if all(count % size == 0 for count in columns.values())]
    work = " or ".join(f"--group-size {size}" for size in fitting)
    raise UsageError(
        f"--group-size {group} does not divide the {columns[uneven[0]]} columns of {_some(uneven)}; "
        + (f"{work} divides every row" if work else "no group size divides every row: use --quant none")
    )


def _some(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")

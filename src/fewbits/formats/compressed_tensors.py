"""compressed-tensors: how a linear's numbers lie in safetensors files that vLLM, SGLang and transformers load.

| format          | schemes                   | tensors under `<module>.`                                       |
|-----------------|---------------------------|-----------------------------------------------------------------|
| pack-quantized  | int 2, 4, 8, weights only | weight_packed, weight_scale, weight_shape (, weight_zero_point) |
| int-quantized   | int8, dynamic activations | weight (int8), weight_scale                                     |
| float-quantized | fp8, dynamic activations  | weight (float8_e4m3fn), weight_scale                            |
| naive-quantized | fp8, weights only         | weight (float8_e4m3fn), weight_scale                            |

Plans are made without torch, so it is imported where tensors are at hand.
Codes pack along the inputs of a row, zero points along the outputs of a group column; docs/decisions/0002 says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fewbits.errors import CheckpointError
from fewbits.formats.compressed_tensors_config import format_of, quantization_config, schemes_from_config
from fewbits.formats.compressed_tensors_rows import encode_rows
from fewbits.formats.stored import DAMAGED, Shaped, check, method_of, required
from fewbits.layout import WEIGHT_DTYPES, OutputTensor, stored_dtype
from fewbits.schemes import Scheme

if TYPE_CHECKING:
    import torch

    from fewbits.tensors import QuantizedWeight

__all__ = [
    "CONFIG_FILES",
    "NAME",
    "PARTS",
    "ROW_AXIS",
    "decode",
    "encode",
    "encode_rows",
    "quantization_config",
    "quantized_modules",
    "reads",
    "remark",
    "scale_dtype",
    "schemes_from_config",
    "settled",
    "shape_of",
    "stored_rows",
    "tensors_for",
    "why_not",
    "why_not_together",
]

NAME = "compressed-tensors"
PARTS = ("weight",)
CONFIG_FILES: tuple[str, ...] = ()
ROW_AXIS = 0
PACKED_BITS = (2, 4, 8)
# Zero points of 32 rows fill whole words at every width.
ROW_MULTIPLE = 32


def reads(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with this quantization_config is in this format."""
    return config.get("quant_method") == NAME


def scale_dtype(weight_dtype: str) -> str:
    """What the scales of a weight are stored in."""
    return weight_dtype


def remark(module: str, tensors: Mapping[str, torch.Tensor], scheme: Scheme, rows: int) -> str | None:
    """Nothing: what is stored cannot contradict the config."""
    return None


def quantized_modules(tensors: Iterable[str]) -> list[str]:
    """The modules that stored tensors show to be quantized, in order."""
    suffixes = (".weight_packed", ".weight_scale")
    return list(dict.fromkeys(name.rpartition(".")[0] for name in tensors if name.endswith(suffixes)))


def why_not(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """The reason why a weight [out, in] of this scheme cannot be stored, or None."""
    if scheme.kind == "float":
        if scheme != Scheme("float", 8, symmetric=True, activations=scheme.activations):
            return f"compressed-tensors stores floats as fp8 per channel, not {scheme}"
        return None
    if scheme.activations is not None:
        if (scheme.bits, scheme.symmetric, scheme.group_size) != (8, True, 0):
            return f"compressed-tensors takes dynamic activations with symmetric int8 per channel, not {scheme}"
        return None
    if scheme.bits not in PACKED_BITS:
        return f"compressed-tensors stores ints of 2, 4 or 8 bits; readers disagree on the layout of {scheme.bits}"
    if not scheme.divides(shape[1]):
        return f"group size {scheme.group_size} does not divide {shape[1]} inputs"
    return None


def why_not_together(schemes: Mapping[str, Scheme | None]) -> str | None:
    """Nothing: every layer may have a scheme of its own."""
    return None


def settled(schemes: Iterable[Scheme]) -> str:
    """This format: it has no variations."""
    return NAME


def tensors_for(module: str, scheme: Scheme, shape: tuple[int, int], scale_dtype: str) -> tuple[OutputTensor, ...]:
    """The tensors that hold a weight [out, in] of this scheme.

    Args:
        scale_dtype: safetensors name of the dtype of the scales ("BF16").
    """
    rows, columns = shape
    scale = OutputTensor(f"{module}.weight_scale", scale_dtype, (rows, scheme.groups(columns)))
    if not _is_packed(scheme):
        return (OutputTensor(f"{module}.weight", "I8" if scheme.kind == "int" else "F8_E4M3", shape), scale)
    packed = OutputTensor(f"{module}.weight_packed", "I32", (rows, _words(columns, scheme.bits)))
    size = OutputTensor(f"{module}.weight_shape", "I64", (2,))
    if scheme.symmetric:
        return (packed, scale, size)
    zeros = (_words(rows, scheme.bits), scheme.groups(columns))
    return (packed, scale, size, OutputTensor(f"{module}.weight_zero_point", "I32", zeros))


def stored_rows(tensor: str, scheme: Scheme, start: int, stop: int) -> tuple[int, int]:
    """The rows of a stored tensor that hold rows [start, stop) of the weight; `start` is a multiple of 32."""
    if tensor.endswith(".weight_zero_point"):
        return start * scheme.bits // 32, _words(stop, scheme.bits)
    return (0, 2) if tensor.endswith(".weight_shape") else (start, stop)


def shape_of(
    module: str, scheme: Scheme, tensors: Mapping[str, Shaped], read: Callable[[str], torch.Tensor]
) -> tuple[int, int]:
    """[out, in] of a stored weight.

    Args:
        tensors: what is stored, by full name: tensors or their headers. read: fetches a small tensor by name.

    Raises:
        CheckpointError: a tensor is missing, or it has no two dimensions.
    """
    name = f"{module}.weight_shape" if _is_packed(scheme) else f"{module}.weight"
    found = required(module, tensors, name)
    sizes = read(name).tolist() if _is_packed(scheme) and tuple(found.shape) == (2,) else list(found.shape)
    if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise CheckpointError(f"{module} has the shape {sizes}; a linear's weight has two sizes.", DAMAGED)
    return sizes[0], sizes[1]


def encode(module: str, weight: QuantizedWeight, shape: tuple[int, int], first_row: int = 0) -> dict[str, torch.Tensor]:
    """The stored tensors of a weight, or of a tile of its rows.

    Tiles are encoded in order; each tensor's parts follow each other in the file. `weight_shape` comes with the first.

    Args:
        weight: rows [first_row, first_row + R) of the weight. `first_row` is a multiple of 32, and so is R unless the
            tile is the last.
        shape: [out, in] of the whole weight.
    """
    import torch

    from fewbits.packing import flip_top_bit, pack_columns

    scheme, rows = weight.method.scheme, weight.shape[0]
    if first_row % ROW_MULTIPLE or (rows % ROW_MULTIPLE and first_row + rows != shape[0]):
        raise ValueError(f"{module}: rows {first_row} to {first_row + rows} of {shape[0]} are no tile of whole words")
    if not _is_packed(scheme):
        return {f"{module}.weight": weight.data, f"{module}.weight_scale": weight.scales}
    data = _words_of_bytes(flip_top_bit(weight.data, torch.uint8)) if scheme.bits == 8 else weight.data
    encoded = {f"{module}.weight_packed": data, f"{module}.weight_scale": weight.scales}
    if first_row == 0:
        encoded[f"{module}.weight_shape"] = torch.tensor(shape, dtype=torch.int64)
    if weight.zero_points is not None:
        zeros = weight.zero_points
        unsigned = flip_top_bit(zeros, torch.uint8) if scheme.bits == 8 else zeros
        encoded[f"{module}.weight_zero_point"] = pack_columns(unsigned, scheme.bits)
    return encoded


def decode(
    module: str, tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int] | None = None
) -> QuantizedWeight:
    """The weight that stored tensors hold.

    Args:
        tensors: by full name, whole or the rows that `stored_rows` names for a tile.
        shape: [rows, in] of what is given; read from the tensors by default.

    Raises:
        CheckpointError: a tensor is missing, or has another dtype or shape than the scheme asks for.
    """
    import torch

    from fewbits.packing import flip_top_bit, unpack_columns
    from fewbits.tensors import QuantizedWeight

    shape = shape or shape_of(module, scheme, tensors, lambda name: tensors[name])
    scale: torch.Tensor = required(module, tensors, f"{module}.weight_scale")
    scale_dtype = stored_dtype(scale.dtype)
    for expected in tensors_for(module, scheme, shape, scale_dtype if scale_dtype in WEIGHT_DTYPES else "F32"):
        if not expected.name.endswith(".weight_shape"):
            check(required(module, tensors, expected.name), expected, scheme)
    if not _is_packed(scheme):
        data, zeros = tensors[f"{module}.weight"], None
    else:
        data, zeros = tensors[f"{module}.weight_packed"], tensors.get(f"{module}.weight_zero_point")
        zeros = None if zeros is None or scheme.symmetric else unpack_columns(zeros, scheme.bits, shape[0])
        if scheme.bits == 8:
            data = flip_top_bit(data.contiguous().view(torch.uint8)[:, : shape[1]], torch.int8)
            zeros = None if zeros is None else flip_top_bit(zeros, torch.int8)
    return QuantizedWeight(data, scale, zeros, shape, method_of(scheme), scheme.group_size)


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _is_packed(scheme: Scheme) -> bool:
    return format_of(scheme) == "pack-quantized"


def _words_of_bytes(codes: torch.Tensor) -> torch.Tensor:
    """Four codes of 8 bits to a word, the first in the lowest byte."""
    import torch

    missing = -codes.shape[1] % 4
    padded = torch.nn.functional.pad(codes, (0, missing)) if missing else codes.contiguous()
    return padded.view(torch.int32)

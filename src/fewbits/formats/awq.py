"""AWQ: the layout of AutoAWQ's "gemm" kernels, 4 bits with zero points, which vLLM, SGLang and transformers load.

| tensor    | dtype, shape    | what                                                                      |
|-----------|-----------------|---------------------------------------------------------------------------|
| `qweight` | int32 [K, N/8]  | nibble i of word c is the code of output 8c + ORDER[i]                     |
| `qzeros`  | int32 [G, N/8]  | zero points, packed alike                                                 |
| `scales`  | fp16 [G, N]     | W = (code − zero point) · scale, both unsigned                            |

The codes 0 … 7 of outputs 0 … 7 make the word 0x75316420.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fewbits.errors import CheckpointError
from fewbits.formats.rounded_rows import as_tensors, check_scales, rows_of
from fewbits.formats.stored import DAMAGED, Shaped, check, check_groups, method_of, required
from fewbits.layers import block_index
from fewbits.layout import WEIGHT_DTYPES, OutputTensor, stored_dtype
from fewbits.schemes import Scheme

if TYPE_CHECKING:
    import torch

    from fewbits.kernels.rows import Array, RoundedRows
    from fewbits.tensors import QuantizedWeight

NAME = "awq"
PARTS = ("qweight", "qzeros", "scales", "weight")
CONFIG_FILES: tuple[str, ...] = ()
ROW_AXIS = 1
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PER_CHANNEL = -1
_HINT = "use a checkpoint of AutoAWQ or fewbits with version gemm, 4 bits and zero points"


def reads(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with this quantization_config is in this format."""
    return config.get("quant_method") == NAME


def quantized_modules(tensors: Iterable[str]) -> list[str]:
    """The modules that stored tensors show to be quantized, in order."""
    return [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]


def why_not(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """The reason why a weight [out, in] of this scheme cannot be stored, or None."""
    if scheme != Scheme("int", 4, symmetric=False, group_size=scheme.group_size):
        return f"awq stores asymmetric ints of 4 bits with activations left alone, not {scheme}"
    if not scheme.divides(shape[1]):
        return f"group size {scheme.group_size} does not divide {shape[1]} inputs"
    if shape[0] % 8:
        return f"awq packs 8 outputs into a word, which {shape[0]} outputs do not fill"
    return None


def why_not_together(schemes: Mapping[str, Scheme | None]) -> str | None:
    """Why modules of these schemes cannot be in one checkpoint: its config has room for one scheme, and no more."""
    quantized = {name: scheme for name, scheme in schemes.items() if scheme is not None}
    first = next(iter(quantized), "")
    for name, scheme in quantized.items():
        if scheme != quantized[first]:
            return f"awq stores one scheme for all layers, and {first} is {quantized[first]}, but {name} {scheme}"
        if block_index(name) is None:
            return f"readers of awq leave layers outside of the decoder blocks alone, such as {name}"
        hidden = next((other for other, found in schemes.items() if found is None and other in name), None)
        if hidden is not None:
            return f"readers of awq leave every layer alone whose name contains that of an unquantized one: {hidden}"
    return None


def settled(schemes: Iterable[Scheme]) -> str:
    """This format: it has no variations."""
    return NAME


def tensors_for(module: str, scheme: Scheme, shape: tuple[int, int], scale_dtype: str) -> tuple[OutputTensor, ...]:
    """The tensors that hold a weight [out, in], or a tile of its rows."""
    rows, columns = shape
    groups = scheme.groups(columns)
    return (
        OutputTensor(f"{module}.qweight", "I32", (columns, rows // 8)),
        OutputTensor(f"{module}.qzeros", "I32", (groups, rows // 8)),
        OutputTensor(f"{module}.scales", scale_dtype, (groups, rows)),
    )


def stored_rows(tensor: str, scheme: Scheme, start: int, stop: int) -> tuple[int, int]:
    """The columns of a stored tensor that hold rows [start, stop) of the weight; both are multiples of 8."""
    return (start, stop) if tensor.endswith(".scales") else (start // 8, stop // 8)


def shape_of(
    module: str, scheme: Scheme, tensors: Mapping[str, Shaped], read: Callable[[str], torch.Tensor]
) -> tuple[int, int]:
    """[out, in] of a stored weight. Raises CheckpointError if its words are missing or no matrix."""
    sizes = tuple(required(module, tensors, f"{module}.qweight").shape)
    if len(sizes) != 2 or 0 in sizes:
        raise CheckpointError(f"{module}.qweight has the shape {list(sizes)}; expected [in, out / 8].", DAMAGED)
    check_groups(module, scheme, sizes[0])
    return sizes[1] * 8, sizes[0]


def scale_dtype(weight_dtype: str) -> str:
    """What the scales of a weight are stored in."""
    return "F16"


def encode_rows(
    module: str, rows: RoundedRows, scheme: Scheme, shape: tuple[int, int], first_row: int
) -> dict[str, Array]:
    """The stored columns of a tile of rows, by full name.

    Args:
        shape: [out, in] of the whole weight.
    """
    import numpy as np

    check_scales(module, rows.scales)
    assert rows.zeros is not None
    pairs = rows.codes.view(np.uint8)
    codes = np.empty((*pairs.shape, 2), np.uint8)
    codes[:, :, 0], codes[:, :, 1] = pairs & np.uint8(15), pairs >> np.uint8(4)
    return {
        f"{module}.qweight": _packed(codes.reshape(len(pairs), -1)[:, : shape[1]]),
        f"{module}.qzeros": _packed(rows.zeros),
        f"{module}.scales": rows.scales.T,
    }


def _packed(codes: Array) -> Array:
    """Words [C, R/8] of uint8 codes [R, C]."""
    import numpy as np

    eights = codes.reshape(-1, 8, codes.shape[1])
    words = np.zeros((eights.shape[0], codes.shape[1]), np.uint32)
    for nibble, output in enumerate(ORDER):
        words |= eights[:, output].astype(np.uint32) << np.uint32(4 * nibble)
    return words.T


def encode(module: str, weight: QuantizedWeight, shape: tuple[int, int], first_row: int = 0) -> dict[str, torch.Tensor]:
    """`encode_rows` for a weight, or a tile of its rows, with fp16 scales."""
    return as_tensors(encode_rows(module, rows_of(weight), weight.method.scheme, shape, first_row))


def decode(
    module: str, tensors: Mapping[str, torch.Tensor], scheme: Scheme, shape: tuple[int, int] | None = None
) -> QuantizedWeight:
    """The weight that stored tensors hold.

    Args:
        tensors: by full name, whole or the columns that `stored_rows` names for a tile.
        shape: [rows, in] of what is given; read from the tensors by default.

    Raises:
        CheckpointError: a tensor is missing, or has another dtype or shape than the scheme asks for.
    """
    from fewbits.tensors import QuantizedWeight

    shape = shape or shape_of(module, scheme, tensors, lambda name: tensors[name])
    scales = required(module, tensors, f"{module}.scales")
    scale_dtype = stored_dtype(scales.dtype)
    for expected in tensors_for(module, scheme, shape, scale_dtype if scale_dtype in WEIGHT_DTYPES else "F16"):
        check(required(module, tensors, expected.name), expected, scheme)
    codes = _unpacked(tensors[f"{module}.qweight"]).t()
    zeros = _unpacked(tensors[f"{module}.qzeros"]).t().contiguous()
    return QuantizedWeight(_nibbles(codes), scales.t().contiguous(), zeros, shape, method_of(scheme), scheme.group_size)


def remark(module: str, tensors: Mapping[str, torch.Tensor], scheme: Scheme, rows: int) -> str | None:
    """Nothing: what is stored cannot contradict the config."""
    return None


def _unpacked(words: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [R, 8·C] of words [R, C]."""
    import torch

    pairs = words.contiguous().view(torch.uint8).view(words.shape[0], -1, 4)
    codes = torch.empty(*words.shape, 8, dtype=torch.uint8, device=words.device)
    for nibble, output in enumerate(ORDER):
        codes[:, :, output] = (pairs[:, :, nibble // 2] >> (nibble % 2 * 4)) & 15
    return codes.view(words.shape[0], -1)


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """`packing.pack_rows` at 4 bits, in an eighth of the memory."""
    import torch

    padded = torch.zeros(codes.shape[0], -(-codes.shape[1] // 8) * 8, dtype=torch.uint8, device=codes.device)
    padded[:, : codes.shape[1]] = codes
    return (padded[:, 0::2] | (padded[:, 1::2] << 4)).view(torch.int32)


def quantization_config(schemes: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """What goes into config.json.

    Args:
        schemes: every linear module of the model by name; None where it is not quantized.
    """
    reason = why_not_together(schemes)
    if reason is not None:
        raise ValueError(reason)
    scheme = next(scheme for scheme in schemes.values() if scheme is not None)
    skipped = [name for name, found in schemes.items() if found is None]
    # Readers leave the head alone by themselves.
    skipped = skipped if any(block_index(name) is not None for name in skipped) else []
    return {
        "quant_method": NAME,
        "bits": 4,
        "group_size": scheme.group_size or PER_CHANNEL,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": skipped or None,
    }


def schemes_from_config(config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Scheme | None]:
    """The scheme of each linear module by name; None where the config leaves it unquantized.

    Raises:
        CheckpointError: the config is no AWQ config, or asks for what fewbits does not know.
    """
    version = config.get("version", "gemm")
    bits, size = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size"))
    for key, found, known in (
        ("quant_method", config.get("quant_method"), NAME),
        ("version", version.lower() if isinstance(version, str) else version, "gemm"),
        ("bits", bits, 4),
        ("zero_point", config.get("zero_point", True), True),
    ):
        if found != known or type(found) is not type(known):
            raise _unknown(key, found, repr(known))
    if type(size) is not int or (size <= 0 and size != PER_CHANNEL):
        raise _unknown("group_size", size, "a positive number, or -1 for one scale per output")
    skipped = config.get("modules_to_not_convert") or []
    if not isinstance(skipped, list) or not all(isinstance(name, str) for name in skipped):
        raise _unknown("modules_to_not_convert", skipped, "a list of module names")
    scheme = Scheme("int", 4, symmetric=False, group_size=0 if size == PER_CHANNEL else size)

    def is_quantized(module: str) -> bool:
        return block_index(module) is not None and not any(name in module for name in skipped)

    return {module: scheme if is_quantized(module) else None for module in modules}


def _unknown(key: str, found: object, expected: str) -> CheckpointError:
    shown = "nothing" if found is None else f"{found!r:.80}"
    return CheckpointError(f"config.json: {key} of quantization_config is {shown}; expected {expected}.", _HINT)

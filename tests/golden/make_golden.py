"""Make the golden bytes anew: what the reference libraries pack, stored with their versions (`make golden`).

compressed_tensors.safetensors: for each case, signed codes and zero points as given to compressed-tensors' own
`pack_to_int32`, and the words that came out; and one whole weight as its compressor stores it.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import save

FOLDER = Path(__file__).parent
# Rows and columns that fill words and that do not.
SHAPES = ((32, 64), (33, 50), (5, 96), (7, 3))
BITS = (2, 4, 8)


def packed_cases() -> dict[str, torch.Tensor]:
    """Codes and zero points of every width and shape, and their words."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for bits in BITS:
        for rows, columns in SHAPES:
            low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
            codes = torch.randint(low, high, (rows, columns), generator=generator, dtype=torch.int8)
            codes.view(-1)[0], codes.view(-1)[-1] = low, high - 1
            name = f"{bits}.{rows}x{columns}"
            tensors[f"{name}.codes"] = codes
            tensors[f"{name}.along_columns"] = pack_to_int32(codes, bits)
            tensors[f"{name}.along_rows"] = pack_to_int32(codes, bits, packed_dim=0)
    return tensors


def compressed_weight() -> dict[str, torch.Tensor]:
    """A weight whose values lie on its grid exactly, as the library's compressor stores it."""
    generator = torch.Generator().manual_seed(1)
    rows, columns, group_size = 40, 96, 32
    codes = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)
    zeros = torch.randint(-8, 8, (rows, columns // group_size), generator=generator, dtype=torch.int8)
    scales = 2.0 ** torch.randint(-8, -2, (rows, columns // group_size), generator=generator).to(torch.float32)
    spread = scales.repeat_interleave(group_size, 1)
    weight = (codes - zeros.repeat_interleave(group_size, 1)).to(torch.float32) * spread
    arguments = {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": group_size}
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    given = {"weight": weight.bfloat16(), "weight_scale": scales.bfloat16(), "weight_zero_point": zeros}
    stored = compressor.compress(given, scheme)
    return {
        "weight.codes": codes,
        "weight.zeros": zeros,
        "weight.values": weight.bfloat16(),
        **{f"weight.stored.{name}": tensor.contiguous() for name, tensor in stored.items()},
    }


def main() -> None:
    """Write all golden files."""
    # One entry of metadata: the library writes several in no fixed order.
    versions = ", ".join(f"{name} {version(name)}" for name in ("compressed-tensors", "torch", "safetensors"))
    path = FOLDER / "compressed_tensors.safetensors"
    path.write_bytes(save({**packed_cases(), **compressed_weight()}, {"made": f"by make golden with {versions}"}))


if __name__ == "__main__":
    main()

"""Make gptqmodel.safetensors anew: what GPTQModel packs, beside the codes, zero points and scales it was given.

GPTQModel wants a newer torch than the other golden bytes, so this runs in an environment of its own:

    pip install gptqmodel==7.7.0 && python tests/golden/make_golden_gptqmodel.py
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import QuantizeConfig
from gptqmodel.quantization.awq.utils.packing_utils import pack_awq
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import save

FOLDER = Path(__file__).parent
ROWS, COLUMNS, GROUP_SIZE = 32, 96, 32


def random_weight(bits: int, symmetric: bool, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [N, K], zero points and scales [N, G]; scales are powers of two, so that packing finds the codes again."""
    generator = torch.Generator().manual_seed(seed)
    groups = (ROWS, COLUMNS // GROUP_SIZE)
    codes = torch.randint(0, 2**bits, (ROWS, COLUMNS), generator=generator)
    zeros = torch.randint(1, 2**bits, groups, generator=generator)
    zeros = torch.full(groups, 2 ** (bits - 1)) if symmetric else zeros
    scales = 2.0 ** torch.randint(-8, -2, groups, generator=generator).float()
    return codes, zeros, scales


def gptq_case(bits: int, symmetric: bool, ordered: bool) -> dict[str, torch.Tensor]:
    """A weight as version 2 and as version 1."""
    codes, zeros, scales = random_weight(bits, symmetric, seed=bits)
    index = torch.arange(COLUMNS) // GROUP_SIZE
    if ordered:
        index = index[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(bits))]
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data = (codes - zeros[:, index]).float() * scales[:, index]
    packed = TorchLinear(
        bits=bits, group_size=GROUP_SIZE, sym=symmetric, desc_act=ordered, in_features=COLUMNS, out_features=ROWS,
        bias=False,
    )  # fmt: skip
    packed.pack_original(linear, scales, zeros, index.to(torch.int32))
    stored = {name: getattr(packed, name).clone() for name in ("qweight", "qzeros", "scales", "g_idx")}
    convert_gptq_v2_to_v1_format_module(packed, QuantizeConfig(bits=bits, group_size=GROUP_SIZE, sym=symmetric))
    name = f"gptq.{bits}.{'symmetric' if symmetric else 'ordered' if ordered else 'asymmetric'}"
    return {
        f"{name}.codes": codes.to(torch.uint8),
        f"{name}.zeros": zeros.to(torch.uint8),
        **{f"{name}.v2.{part}": tensor.contiguous() for part, tensor in stored.items()},
        f"{name}.v1.qzeros": packed.qzeros.clone().contiguous(),
    }


def awq_case() -> dict[str, torch.Tensor]:
    """A weight as AutoAWQ's layout packs it."""
    codes, zeros, _ = random_weight(4, False, seed=0)
    qweight, qzeros = pack_awq(codes.t().contiguous(), zeros.t().contiguous(), 4)
    named = {"codes": codes.to(torch.uint8), "zeros": zeros.to(torch.uint8), "qweight": qweight, "qzeros": qzeros}
    return {f"awq.{name}": tensor.contiguous() for name, tensor in named.items()}


def main() -> None:
    """Write the file."""
    tensors = awq_case()
    for bits in (2, 3, 4, 8):
        for symmetric, ordered in ((True, False), (False, False), (False, True)):
            tensors |= gptq_case(bits, symmetric, ordered)
    versions = ", ".join(f"{name} {version(name)}" for name in ("gptqmodel", "torch", "safetensors"))
    made = {"made": f"by {Path(__file__).name} with {versions}"}
    (FOLDER / "gptqmodel.safetensors").write_bytes(save(tensors, made))


if __name__ == "__main__":
    main()

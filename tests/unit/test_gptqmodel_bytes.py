"""The GPTQ and AWQ layouts against bytes that GPTQModel packed (tests/golden/make_golden_gptqmodel.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewbits.formats import FORMATS
from fewbits.methods import GPTQ, Int4Asymmetric
from fewbits.schemes import Scheme
from fewbits.tensors import seal

GOLDEN = load_file(Path(__file__).parent.parent / "golden" / "gptqmodel.safetensors")
CASES = sorted({name.removesuffix(".codes") for name in GOLDEN if name.startswith("gptq.") and "codes" in name})
VERSIONS = ("v1", "v2")


def golden(case: str, version: str) -> dict[str, torch.Tensor]:
    """What GPTQModel stored, as tensors of the module `m`."""
    parts = {part: GOLDEN[f"{case}.v2.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
    return {f"m.{part}": tensor for part, tensor in (parts | {"qzeros": GOLDEN[f"{case}.{version}.qzeros"]}).items()}


def scheme_of(case: str) -> Scheme:
    _, bits, kind = case.split(".")
    return Scheme("int", int(bits), symmetric=kind == "symmetric", group_size=32)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", CASES)
def test_what_gptqmodel_packed_decodes_to_what_it_was_given(case: str, version: str) -> None:
    stored = golden(case, version)
    index = stored["m.g_idx"].long()
    exact = GOLDEN[f"{case}.codes"].float() - GOLDEN[f"{case}.zeros"].float()[:, index]
    exact *= stored["m.scales"].float().t()[:, index]
    back = FORMATS["gptq" if version == "v1" else "gptq_v2"].decode("m", stored, scheme_of(case))
    assert torch.equal(back.dequantize(torch.float32), exact)
    assert (back.input_order is not None) == ("ordered" in case)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", [case for case in CASES if "ordered" not in case])
def test_the_same_codes_make_the_same_bytes(case: str, version: str) -> None:
    scheme, stored = scheme_of(case), golden(case, version)
    zeros = None if scheme.symmetric else GOLDEN[f"{case}.zeros"]
    codes = GOLDEN[f"{case}.codes"]
    weight = seal(codes, stored["m.scales"].t().contiguous(), zeros, GPTQ(scheme.bits, 32, scheme.symmetric))
    encoded = FORMATS["gptq" if version == "v1" else "gptq_v2"].encode("m", weight, (codes.shape[0], codes.shape[1]))
    assert encoded.keys() == stored.keys()
    for name, tensor in stored.items():
        assert (encoded[name].dtype, encoded[name].tolist()) == (tensor.dtype, tensor.tolist()), name


def test_awq_words_are_those_that_gptqmodel_packs() -> None:
    codes, zeros = GOLDEN["awq.codes"], GOLDEN["awq.zeros"]
    weight = seal(codes, torch.ones(zeros.shape).half(), zeros, Int4Asymmetric(32))
    encoded = FORMATS["awq"].encode("m", weight, (codes.shape[0], codes.shape[1]))
    assert torch.equal(encoded["m.qweight"], GOLDEN["awq.qweight"])
    assert torch.equal(encoded["m.qzeros"], GOLDEN["awq.qzeros"])

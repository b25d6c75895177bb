"""Saving: what `save_pretrained` writes of a loaded model is the packed checkpoint again, readable by others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fewbits.formats import FORMATS
from fewbits.linear import QuantLinear


def keep_packed_when_saved(model: Any, quantization_config: Mapping[str, Any], format_name: str, whole: bool) -> None:
    """Make transformers save the model's packed linears in the format they came in.

    Args:
        quantization_config: as config.json had it.
        whole: every quantized layer of the files is still packed; a model with decoded ones cannot be saved.
    """
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class PackedLinears(HfQuantizer):  # type: ignore[misc]
        """What transformers asks about a model whose linears are packed."""

        def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
            return packed_state(model, format_name), {}

        def is_serializable(self) -> bool:
            return whole

        @property
        def is_trainable(self) -> bool:
            return False

    model.hf_quantizer = PackedLinears(QuantizationConfigMixin(quant_method=quantization_config["quant_method"]))
    model.config.quantization_config = dict(quantization_config)


def packed_state(model: Any, format_name: str) -> dict[str, torch.Tensor]:
    """The model's tensors, those of packed linears under the names that files have."""
    state = dict(model.state_dict())
    for path, module in model.named_modules():
        if isinstance(module, QuantLinear):
            for key in ("codes", "scales", "zero_points", "input_order"):
                state.pop(f"{path}.{key}", None)
            weight = module.quantized_weight()
            state |= FORMATS[format_name].encode(path, weight, weight.shape)
    # Rows of a stack share memory with their siblings, which a file cannot say.
    return {name: value.clone() if value._base is not None else value for name, value in state.items()}

"""fewbits makes transformer models small and runs them.

Names are imported when first used: `import fewbits` loads neither torch nor numba.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewbits.arrays import (
        dequantize_fp8_e4m3,
        dequantize_int4_asymmetric,
        dequantize_int8_symmetric,
        estimate_memory_savings,
        pack_int4,
        quantize_fp8_e4m3,
        quantize_int4_asymmetric,
        quantize_int8_symmetric,
        smooth_quant_scales,
        unpack_int4,
    )
    from fewbits.config import QuantConfig
    from fewbits.errors import (
        CalibrationError,
        CheckpointError,
        ConfigError,
        FewbitsError,
        KernelError,
        MissingDependencyError,
        OutputError,
        PlanError,
        QuantizationError,
        VerificationError,
    )
    from fewbits.evaluate import evaluate
    from fewbits.inspect import inspect
    from fewbits.linear import QuantLinear
    from fewbits.load import load
    from fewbits.methods import AWQ, GPTQ, Fp8E4M3, Int4Asymmetric, Int8Symmetric, QuantMethod, SmoothQuant
    from fewbits.plan import plan
    from fewbits.quantize import quantize
    from fewbits.tensors import QuantizedTensor, QuantizedWeight
    from fewbits.verify import verify

__version__ = "0.1.0"

_HOME = {
    "arrays": (
        "dequantize_fp8_e4m3",
        "dequantize_int4_asymmetric",
        "dequantize_int8_symmetric",
        "estimate_memory_savings",
        "pack_int4",
        "quantize_fp8_e4m3",
        "quantize_int4_asymmetric",
        "quantize_int8_symmetric",
        "smooth_quant_scales",
        "unpack_int4",
    ),
    "config": ("QuantConfig",),
    "errors": (
        "CalibrationError",
        "CheckpointError",
        "ConfigError",
        "FewbitsError",
        "KernelError",
        "MissingDependencyError",
        "OutputError",
        "PlanError",
        "QuantizationError",
        "VerificationError",
    ),
    "evaluate": ("evaluate",),
    "inspect": ("inspect",),
    "linear": ("QuantLinear",),
    "load": ("load",),
    "methods": ("AWQ", "GPTQ", "Fp8E4M3", "Int4Asymmetric", "Int8Symmetric", "QuantMethod", "SmoothQuant"),
    "plan": ("plan",),
    "quantize": ("quantize",),
    "tensors": ("QuantizedTensor", "QuantizedWeight"),
    "verify": ("verify",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [  # noqa: RUF022 - by kind, as one looks for them
    "quantize", "plan", "load", "evaluate", "verify", "inspect",
    "QuantConfig", "QuantMethod", "Int8Symmetric", "Int4Asymmetric", "Fp8E4M3", "AWQ", "SmoothQuant", "GPTQ",
    "quantize_int8_symmetric", "dequantize_int8_symmetric", "quantize_int4_asymmetric", "dequantize_int4_asymmetric",
    "quantize_fp8_e4m3", "dequantize_fp8_e4m3", "smooth_quant_scales", "pack_int4", "unpack_int4",
    "estimate_memory_savings", "QuantizedTensor", "QuantizedWeight", "QuantLinear",
    "FewbitsError", "QuantizationError", "ConfigError", "PlanError", "CheckpointError", "CalibrationError",
    "MissingDependencyError", "KernelError", "OutputError", "VerificationError",
]  # fmt: skip


class _Package(ModuleType):
    """Keeps `fewbits.plan` the function, though importing the module of that name would put the module there."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'fewbits' has no attribute {name!r}")
        value = getattr(import_module(f"fewbits.{_MODULE_OF[name]}"), name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package

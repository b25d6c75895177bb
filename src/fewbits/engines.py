"""What inference engines make of a planned checkpoint: whether they load it, whether on a fast kernel, and why not.

Facts as read and tried with vLLM 0.32 and transformers 5.23 (with gptqmodel 7.7 for GPTQ and AWQ); see docs/formats.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fewbits.schemes import Scheme

PACKED_KERNEL_GROUPS = (0, 32, 64, 128)
CPU_PANEL = 32


@dataclass(frozen=True)
class PlannedScheme:
    """One quantized linear as an engine sees it."""

    name: str
    out_features: int
    in_features: int
    scheme: Scheme


@dataclass(frozen=True)
class EngineSupport:
    """Whether one engine loads the result; `reasons` say why not, or why slowly."""

    engine: str
    loads: bool
    fast: bool
    reasons: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """One word for a table."""
        return "fast" if self.fast else "loads" if self.loads else "no"


Refusal = Callable[[PlannedScheme], str | None]


def _vllm_refuses(layer: PlannedScheme) -> str | None:
    scheme = layer.scheme
    if scheme.kind == "int" and scheme.bits not in (4, 8):
        return f"no kernel for {scheme.bits} bits"
    if scheme.kind == "int" and scheme.bits == 8 and not scheme.symmetric:
        return "no kernel for asymmetric 8 bits"
    return None


def _packed_kernel_slow(layer: PlannedScheme) -> str | None:
    scheme = layer.scheme
    if scheme.activations is not None or scheme.kind == "float":
        return None
    if scheme.group_size not in PACKED_KERNEL_GROUPS:
        return f"group size {scheme.group_size}: the packed kernels know 32, 64, 128 and per channel"
    if layer.out_features % 64:
        return f"{layer.out_features} outputs are no multiple of 64"
    if layer.in_features % 128:
        return f"{layer.in_features} inputs are no multiple of 128"
    return None


def _vllm_cpu_refuses(layer: PlannedScheme) -> str | None:
    scheme = layer.scheme
    if scheme.bits == 8 and scheme.activations is None:
        return f"no CPU kernel for weight-only {scheme}"
    return _vllm_refuses(layer)


def _vllm_cpu_slow(layer: PlannedScheme) -> str | None:
    return "fp8 is emulated on CPUs" if layer.scheme.kind == "float" else None


def _transformers_slow(layer: PlannedScheme) -> str | None:
    return "decodes weights to the model's dtype"


def _never(layer: PlannedScheme) -> str | None:
    return None


def _gptq_refuses(layer: PlannedScheme) -> str | None:
    scheme = layer.scheme
    if not scheme.symmetric:
        return "no kernel for zero points in this layout; awq has them at 4 bits"
    if scheme.bits not in (4, 8):
        return f"no kernel for {scheme.bits} bits"
    if scheme.group_size not in PACKED_KERNEL_GROUPS:
        return f"no kernel for group size {scheme.group_size}"
    return None


def _gptq_cpu_refuses(layer: PlannedScheme) -> str | None:
    return f"no CPU kernel for {layer.scheme}" if layer.scheme.bits == 8 else _gptq_refuses(layer) or _ragged(layer)


def _ragged(layer: PlannedScheme) -> str | None:
    """The CPU kernel takes whole panels."""
    for count, what in ((layer.out_features, "outputs"), (layer.in_features, "inputs")):
        if count % CPU_PANEL:
            return f"{count} {what} are no multiple of {CPU_PANEL}"
    return None


def _needs_gptqmodel(layer: PlannedScheme) -> str | None:
    return "needs gptqmodel"


# engine: (fuses q/k/v and gate/up, why it refuses a layer, why a layer runs slowly)
_Engines = dict[str, tuple[bool, Refusal, Refusal]]
_GPTQ: _Engines = {
    "vLLM (GPU)": (True, _gptq_refuses, _packed_kernel_slow),
    "vLLM (CPU)": (True, _gptq_cpu_refuses, _never),
    "SGLang (GPU)": (True, _gptq_refuses, _packed_kernel_slow),
    "transformers": (False, _never, _needs_gptqmodel),
}
_ENGINES: dict[str, _Engines] = {
    "compressed-tensors": {
        "vLLM (GPU)": (True, _vllm_refuses, _packed_kernel_slow),
        "vLLM (CPU)": (True, _vllm_cpu_refuses, _vllm_cpu_slow),
        "SGLang (GPU)": (True, _vllm_refuses, _packed_kernel_slow),
        "transformers": (False, _never, _transformers_slow),
    },
    "gptq": _GPTQ,
    "gptq_v2": _GPTQ,
    "awq": {
        "vLLM (GPU)": (True, _never, _packed_kernel_slow),
        "vLLM (CPU)": (True, _ragged, _never),
        "SGLang (GPU)": (True, _never, _packed_kernel_slow),
        "transformers": (False, _never, _needs_gptqmodel),
    },
}


def _tally(layers: Iterable[PlannedScheme], reason_of: Refusal) -> tuple[str, ...]:
    first: dict[str, str] = {}
    count: dict[str, int] = {}
    for layer in layers:
        reason = reason_of(layer)
        if reason is not None:
            first.setdefault(reason, layer.name)
            count[reason] = count.get(reason, 0) + 1
    return tuple(
        f"{reason} ({first[reason]}{f' and {count[reason] - 1} more' if count[reason] > 1 else ''})" for reason in first
    )


def _asymmetric_in_a_mix(layers: Iterable[PlannedScheme]) -> tuple[str, ...]:
    """docs/decisions/0002: asymmetric zero points load in transformers if every layer has the same scheme."""
    schemes = {layer.scheme for layer in layers}
    if len(schemes) == 1 or all(scheme.symmetric for scheme in schemes):
        return ()
    return ("asymmetric layers beside others: transformers from 5.23 on mistakes the shape of their zero points",)


def engine_support(layers: list[PlannedScheme], unlike_fusions: list[str], format: str) -> tuple[EngineSupport, ...]:
    """What each engine makes of these layers.

    Args:
        layers: every quantized linear. format: how they lie on disk.
        unlike_fusions: descriptions of groups that engines fuse (q/k/v, gate/up) whose members differ in scheme.
    """
    supports = []
    for engine, (fuses, refuses, slow) in _ENGINES[format].items():
        reasons = _tally(layers, refuses)
        if fuses:
            reasons += tuple(f"fused layers of unlike schemes: {fusion}" for fusion in unlike_fusions[:3])
        if (engine, format) == ("transformers", "compressed-tensors"):
            reasons += _asymmetric_in_a_mix(layers)
        loads = not reasons
        slow_reasons = _tally(layers, slow) if loads else ()
        supports.append(EngineSupport(engine, loads, loads and not slow_reasons, reasons + slow_reasons))
    supports.append(EngineSupport("llama.cpp", False, False, (f"reads GGUF, not {format}",)))
    return tuple(supports)

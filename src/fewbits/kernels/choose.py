"""The kernels in order of preference, and the choice: the first that has no reason against it."""

from __future__ import annotations

from functools import lru_cache

from fewbits.errors import KernelError
from fewbits.kernels.cuda import CudaFp8, CudaInt8
from fewbits.kernels.decoded_rows import DecodedRows
from fewbits.kernels.few_tokens import FewTokens
from fewbits.kernels.int8_dynamic import FloatInt8, Int8FewTokens, Int8Rows, Int8Tiles, OneDnnInt8
from fewbits.kernels.panels import Panels
from fewbits.kernels.reference import Reference
from fewbits.kernels.rows_abreast import RowsAbreast
from fewbits.kernels.spec import Kernel, LinearSpec
from fewbits.kernels.tiles import Tiles
from fewbits.kernels.triton_int4 import TritonInt4

KERNELS: tuple[Kernel, ...] = (
    CudaFp8(),
    CudaInt8(),
    TritonInt4(),
    Int8FewTokens(),
    Int8Rows(),
    Int8Tiles(),
    OneDnnInt8(),
    RowsAbreast(),
    FewTokens(),
    DecodedRows(),
    Tiles(),
    Panels(),
    FloatInt8(),
    Reference(),
)


@lru_cache(maxsize=4096)
def choose(spec: LinearSpec) -> Kernel:
    """The first kernel that can run `spec`. Raises KernelError with every kernel's reason if none can."""
    for kernel in KERNELS:
        if kernel.why_not(spec) is None:
            return kernel
    reasons = "; ".join(f"{name}: {reason}" for name, reason in reasons_against(spec).items())
    raise KernelError(f"no kernel multiplies {spec.scheme} weights on {spec.device} here: {reasons}")


def reasons_against(spec: LinearSpec) -> dict[str, str | None]:
    """Every kernel, in order, with what keeps it from running `spec`; None for those that can."""
    return {kernel.name: kernel.why_not(spec) for kernel in KERNELS}

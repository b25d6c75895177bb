"""Memory that files are read into and written from: NumPy's arrays, and torch's tensors where torch is in use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import torch

    Content: TypeAlias = np.ndarray[Any, Any] | torch.Tensor


def bytes_of(content: Content) -> memoryview:
    """The bytes of an array or a tensor on the CPU, in place.

    Raises:
        ValueError: it is not contiguous.
    """
    import numpy as np

    if not isinstance(content, np.ndarray):
        import torch

        if not content.is_contiguous():
            raise ValueError("expected contiguous memory")
        content = content.view(-1).view(torch.uint8).numpy()
    if not content.flags.c_contiguous:
        raise ValueError("expected contiguous memory")
    return content.reshape(-1).view(np.uint8).data


def contiguous(content: Content) -> Content:
    """The same numbers side by side in the CPU's memory; a copy only where they are not."""
    import numpy as np

    if isinstance(content, np.ndarray):
        return np.ascontiguousarray(content)
    return content.detach().cpu().contiguous()

"""Safetensors files and checkpoint folders put together by hand, right or wrong on purpose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CONFIG = {"model_type": "llama", "vocab_size": 32, "hidden_size": 8}


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_bytes(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header (an object, or the very bytes), whether it is true or not."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(content) if length is None else length).to_bytes(8, "little") + content + data


def make_folder(path: Path, files: dict[str, bytes | str | object], config: object = CONFIG) -> Path:
    """A folder with these files; config.json among them unless None. Anything but bytes and text is written as JSON."""
    path.mkdir(parents=True, exist_ok=True)
    for name, content in {**({} if config is None else {"config.json": config}), **files}.items():
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, bytes | str):
            content = json.dumps(content)
        target.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def make_checkpoint(path: Path, tensors: dict[str, torch.Tensor], config: object = CONFIG) -> Path:
    """A checkpoint whose one file the safetensors library wrote."""
    make_folder(path, {}, config)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def tiny_tensors() -> dict[str, torch.Tensor]:
    """A few tensors of unlike dtypes and shapes, scalars and empty ones among them."""
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(32, 8, generator=generator).bfloat16(),
        "model.layers.0.mlp.up_proj.weight": torch.randn(16, 8, generator=generator).half(),
        "model.layers.0.mlp.up_proj.bias": torch.randn(16, generator=generator),
        "model.layers.0.conv.weight": torch.randn(4, 3, 2, generator=generator),
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
        "nothing": torch.empty(0, 5),
    }

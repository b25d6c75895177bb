"""A checkpoint's own tokenizer, as transformers loads it; never one of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewbits.checkpoints.folder import require_folder
from fewbits.errors import CheckpointError, MissingDependencyError
from fewbits.unusable import reason_of, unusable


def load_tokenizer(folder: str | Path, instead: str = "") -> Any:
    """The tokenizer of a checkpoint's folder.

    Args:
        instead: what would do without one, for the error's hint: ", or give token ids".

    Raises:
        CheckpointError: the folder is missing, or holds no tokenizer that transformers can load.
        MissingDependencyError: transformers is not installed.
    """
    require_folder(Path(folder))
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        hint = f"pip install 'fewbits[transformers]'{instead}"
        raise MissingDependencyError(f"Tokenizing text needs transformers ({error}).", hint) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except unusable() as error:
        raise CheckpointError(
            f"{folder}: its tokenizer cannot be loaded: {reason_of(error)}",
            f"copy the tokenizer files of the original model there{instead}",
        ) from error
    # Long texts are cut where they are used; the tokenizer's warning about their length would only mislead.
    tokenizer.model_max_length = int(1e30)
    return tokenizer

"""Calibration without a file: the model writes its own text, sampled at temperature 1 from one random token a sample.

What a model writes has its own statistics, which serve nearly as well as text from outside. The whole model is loaded
for this; the pass that follows needs one block at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fewbits.calibration import OWN_TEXT, Calibration
from fewbits.errors import CalibrationError, MissingDependencyError
from fewbits.notes import Note
from fewbits.progress import Progress
from fewbits.skeleton import EXTRA_HINT
from fewbits.unusable import reason_of, unusable

# Samples written together.
BATCH = 32


def own_text(
    model_dir: str | Path, samples: int, length: int, seed: int, dtype: torch.dtype, device: str, progress: Progress
) -> Calibration:
    """Load the model and let it write.

    Raises:
        CalibrationError: transformers cannot load the model.
    """
    if samples < 1 or length < 2:
        raise CalibrationError(f"Calibration needs at least 1 sample of 2 tokens, got {samples} of {length}.")
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(f"Running a model needs transformers ({error}).", EXTRA_HINT) from error
    transformers.utils.logging.disable_progress_bar()
    try:
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(str(model_dir), dtype=dtype, local_files_only=True).to(device).eval()
    except unusable() as error:
        raise CalibrationError(
            f"{model_dir}: transformers cannot load this model: {reason_of(error)}",
            "give a text with --calibration FILE",
        ) from error
    progress.begin("writing its own text", samples, "samples")
    try:
        return write_own_text(model, samples, length, seed, progress)
    finally:
        progress.end()


def write_own_text(
    model: Any, samples: int, length: int, seed: int = 0, progress: Progress | None = None
) -> Calibration:
    """Samples of `length` tokens, as likely as the model thinks them.

    Args:
        model: a transformers model for generation, with its weights.
    """
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, config.vocab_size, (samples, 1), generator=generator)
    start = getattr(config, "bos_token_id", None)
    if isinstance(start, int) and 0 <= start < config.vocab_size:
        first = torch.cat([torch.full((samples, 1), start), first], 1)
    pieces = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for part in torch.split(first.to(model.device), BATCH):
            new = length - part.shape[1]
            pieces.append(
                model.generate(
                    part, attention_mask=torch.ones_like(part), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                    min_new_tokens=new, max_new_tokens=new, pad_token_id=0,
                )[:, :length].cpu()
            )  # fmt: skip
            if progress is not None:
                progress.advance(len(part))
    note = Note(OWN_TEXT, "calibrated with text that the model wrote itself", "--calibration self asks for it")
    return Calibration(torch.cat(pieces), OWN_TEXT, (note,))

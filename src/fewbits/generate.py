"""Generate: text from a loaded model, token by token, with what it took.

The prompt goes through the model's own forward, with attention by fewbits' kernels. Further tokens take the short way
of `fewbits.token_step` where the model allows it and the prompt proves it, and the model's own forward with a growing
cache where not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from fewbits.allocator import return_free_memory
from fewbits.attention import own_attention
from fewbits.errors import CheckpointError, QuantizationError
from fewbits.notes import Note
from fewbits.skeleton import find_blocks
from fewbits.token_parts import why_not
from fewbits.token_step import Seen, TokenStep


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature: 0 takes the likeliest. top_p: only the likeliest tokens that together have this probability.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < float("inf")):
            raise QuantizationError(f"temperature must be a number of 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise QuantizationError(f"top_p must be above 0 and at most 1, got {self.top_p}")


@dataclass
class Generation:
    """One generation under way and, in the end, what it took.

    short_way: why tokens did not take it, or None. stopped: by what, "length", "stop" or "interrupted".
    decode_s: seconds for all tokens but the first, which the prompt's forward gives.
    """

    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    prompt_s: float = 0.0
    decode_s: float = 0.0
    short_way: str | None = None
    stopped: str = "length"

    @property
    def prompt_rate(self) -> float:
        """Tokens of the prompt per second."""
        return self.prompt_tokens / self.prompt_s if self.prompt_s else 0.0

    @property
    def decode_rate(self) -> float:
        """Further tokens per second."""
        return (len(self.tokens) - 1) / self.decode_s if self.decode_s and len(self.tokens) > 1 else 0.0

    @property
    def notes(self) -> tuple[Note, ...]:
        """What did not go the plain way."""
        if self.short_way is None:
            return ()
        return (Note("decoding", "every token takes the model's own forward", self.short_way),)


class Generator:
    """Generates from one loaded model.

    short_way: False keeps to the model's own forward and attention.
    """

    def __init__(self, model: Any, *, short_way: bool = True) -> None:
        self.model = model
        self._short_way = short_way
        self._why_not = why_not(model) if short_way else "not asked for"
        self._spare: TokenStep | None = None

    def stream(
        self,
        ids: Sequence[int],
        max_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[int] | None = None,
    ) -> tuple[Generation, Iterator[int]]:
        """The generation, and its tokens as they come; the one that stops is not among them.

        Args:
            ids: the prompt's tokens. stop: tokens that end it; the model's own by default.
        """
        if not len(ids):
            raise QuantizationError("the prompt is empty; a model needs at least one token.")
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and len(ids) + max_tokens > limit:
            raise QuantizationError(
                f"{len(ids)} tokens of prompt and {max_tokens} to write are more than the model's {limit}.",
                "shorten the prompt, or ask for fewer tokens",
            )
        generation = Generation(len(ids))
        stops = set(_stops(self.model) if stop is None else stop)
        return generation, self._tokens(generation, list(ids), max_tokens, sampling or Sampling(), stops)

    def _tokens(
        self, generation: Generation, ids: list[int], max_tokens: int, sampling: Sampling, stops: set[int]
    ) -> Iterator[int]:
        choose = _chooser(sampling)
        with torch.inference_mode():
            started_s = time.perf_counter()
            logits, step = self._prompt(generation, ids, max_tokens)
            token = choose(logits)
            generation.prompt_s = time.perf_counter() - started_s
            try:
                for _ in range(max_tokens):
                    if token in stops:
                        generation.stopped = "stop"
                        return
                    generation.tokens.append(token)
                    yield token
                    if len(generation.tokens) == max_tokens:
                        return
                    started_s = time.perf_counter()
                    token = choose(step(token))
                    generation.decode_s += time.perf_counter() - started_s
            finally:
                if isinstance(step, TokenStep):
                    self._spare = step

    def _prompt(
        self, generation: Generation, ids: list[int], max_tokens: int
    ) -> tuple[torch.Tensor, Callable[[int], torch.Tensor]]:
        """Logits after the prompt, and what gives those after another token."""
        from transformers import DynamicCache

        # The model's masks do what windows ask for; a cache that forgets would be of no use to the short way.
        cache = DynamicCache() if self._why_not is None else DynamicCache(config=self.model.config)
        prompt = torch.tensor([ids], device=self.model.device)
        # Made before the prompt runs: where it stacks weights, kernels prepare them anew.
        step = self._token_step(len(ids) + max_tokens) if self._why_not is None else None
        seen = Seen([], [])
        hooks = [_with_plain_strides(self.model), *(_watch(self.model, seen) if self._why_not is None else [])]
        try:
            with own_attention(self.model) if self._short_way else nullcontext():
                logits = self._forward(prompt, cache)
        finally:
            for hook in hooks:
                hook.remove()
        generation.short_way = self._why_not
        if step is not None:
            step.adopt(cache, len(ids) - 1)
            where = step.differs(ids[-1], seen, logits)
            if where is None:
                step.position = len(ids)
                return logits, step
            generation.short_way = f"{where} of {type(self.model).__name__} computes something else"
        return logits, lambda token: self._forward(torch.tensor([[token]], device=self.model.device), cache)

    def _token_step(self, capacity: int) -> TokenStep:
        """The short way with room for so many positions: the last stream's, if that is over. Each prompt proves it."""
        spare, self._spare = self._spare, None
        if spare is not None and spare.capacity >= capacity:
            return spare
        step = TokenStep(self.model, capacity)
        # Stacking leaves holes where each layer's weights were.
        return_free_memory()
        return step

    def _forward(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        logits: torch.Tensor = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        return logits.float()


def _with_plain_strides(model: Any) -> Any:
    """A hook that gives the head the last token as if there were no others: beside the strides of a whole prompt,
    oneDNN takes a hundred times as long."""

    def copied(head: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = args
        return hidden.clone(memory_format=torch.contiguous_format), *rest

    return model.get_output_embeddings().register_forward_pre_hook(copied)


def _watch(model: Any, seen: Seen) -> list[Any]:
    """Hooks that keep each block's input and output for the last token."""

    def keep(module: Any, args: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        given = args[0] if args else options["hidden_states"]
        made = output[0] if isinstance(output, tuple) else output
        seen.inputs.append(given[0, -1:].clone())
        seen.outputs.append(made[0, -1:].clone())

    return [block.register_forward_hook(keep, with_kwargs=True) for block in find_blocks(model)[1]]


def _stops(model: Any) -> list[int]:
    stop = model.generation_config.eos_token_id
    if stop is None:
        stop = getattr(model.config.get_text_config(), "eos_token_id", None)
    return [] if stop is None else list(stop) if isinstance(stop, list) else [stop]


def _chooser(sampling: Sampling) -> Callable[[torch.Tensor], int]:
    generator = torch.Generator().manual_seed(sampling.seed)

    def choose(logits: torch.Tensor) -> int:
        if sampling.temperature == 0:
            return int(logits.argmax())
        probabilities = (logits.float().cpu() / sampling.temperature).softmax(-1)
        if sampling.top_p == 1:
            return int(torch.multinomial(probabilities, 1, generator=generator))
        ordered, order = probabilities.sort(descending=True)
        # The token that reaches top_p is still among them.
        kept = ordered.masked_fill(ordered.cumsum(-1) - ordered >= sampling.top_p, 0)
        return int(order[torch.multinomial(kept, 1, generator=generator)])

    return choose


class TextStream:
    """Text of tokens as they come, held back while a character is not whole."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []
        self._written = ""

    def push(self, token: int) -> str:
        """The text that the token adds."""
        self._pending.append(token)
        text = self._decoded()
        if text.endswith("�"):
            return ""
        added = text[len(self._written) :]
        self._written = text
        if text.endswith("\n"):
            # A line is over: what comes next needs no context, and decoding stays short.
            self._pending, self._written = [], ""
        return added

    def finish(self) -> str:
        """What is still held back."""
        added = self._decoded()[len(self._written) :]
        self._pending, self._written = [], ""
        return added

    def _decoded(self) -> str:
        text: str = self._tokenizer.decode(self._pending, skip_special_tokens=True)
        return text


def prompt_tokens(tokenizer: Any, prompt: str, *, raw: bool = False) -> list[int]:
    """The prompt's tokens, as a chat's first message if the tokenizer has a chat template."""
    if raw or not getattr(tokenizer, "chat_template", None):
        ids: list[int] = tokenizer(prompt).input_ids
        return ids
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the chat template cannot be applied: {error}", "give --raw to go without") from error
    templated: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return templated

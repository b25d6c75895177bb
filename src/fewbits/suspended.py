"""Suspended forwards: every micro-batch runs the model's own forward in a greenlet, and all go on in step.

A greenlet is a call stack that can be left and entered again. Each micro-batch waits in front of every decoder block
until the block's weights are there, and wherever else `suspend` is called from below its forward. One runs at a time,
so nothing in the model needs to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from fewbits.errors import CalibrationError, MissingDependencyError
from fewbits.skeleton import EXTRA_HINT, Skeleton


@dataclass(frozen=True)
class BlockEntry:
    """The place in front of a block."""

    block: int


@dataclass
class MicroBatch:
    """Some consecutive samples and where their forward stands.

    waiting: what it is suspended at; None before the start and after the end. arguments: those of the block it waits
    for. output: what the last block returned. result: the decoder's last hidden states, once it ended, and what it
    returned them in.
    """

    index: int
    ids: torch.Tensor
    first_token: int
    run: Any = None
    waiting: object = None
    arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    output: Any = None
    result: torch.Tensor | None = None
    result_type: type = tuple

    @property
    def tokens(self) -> slice:
        """Its tokens among those of all samples, sample after sample."""
        return slice(self.first_token, self.first_token + self.ids.numel())

    @property
    def hidden(self) -> torch.Tensor:
        """The hidden states that enter the block it waits for."""
        args, kwargs = self.arguments
        return _first_tensor((*args, *kwargs.values()))


@dataclass
class SuspendedForward:
    """The forwards of all micro-batches through one decoder.

    ids: [samples, length]. micro_batch: samples in one. skip: blocks that are not run, because `outputs` holds what the
    last of them returned, one tensor a micro-batch, with `structure` telling in what form.
    """

    skeleton: Skeleton
    ids: torch.Tensor
    micro_batch: int
    skip: int = 0
    outputs: list[torch.Tensor] = field(default_factory=list)
    structure: str = "tensor"
    after_last_block: Callable[[MicroBatch, Any], Any] | None = None

    def __post_init__(self) -> None:
        length = self.ids.shape[1]
        self.micro_batches = [
            MicroBatch(index, ids, index * self.micro_batch * length)
            for index, ids in enumerate(torch.split(self.ids, self.micro_batch))
        ]
        self._forwards: list[Callable[..., Any]] = []
        self._running: MicroBatch | None = None

    def __enter__(self) -> SuspendedForward:
        greenlet = _greenlet()
        self._hub = greenlet.getcurrent()
        for number, block in enumerate(self.skeleton.blocks):
            self._forwards.append(block.forward)
            block.forward = self._wrapped(number, block.forward)
        for micro_batch in self.micro_batches:
            micro_batch.run = greenlet.greenlet(self._forward)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for micro_batch in self.micro_batches:
            micro_batch.run.throw()  # ends those that still wait somewhere
            micro_batch.run = None
        for block in self.skeleton.blocks:
            del block.forward  # what hides the class's own

    def start(self) -> None:
        """Run every micro-batch up to the first block."""
        for micro_batch in self.micro_batches:
            self.resume(micro_batch)

    def resume(self, micro_batch: MicroBatch) -> None:
        """Let one go on until it is suspended again or ends."""
        micro_batch.waiting = None
        self._running = micro_batch
        micro_batch.run.switch(micro_batch) if not micro_batch.run else micro_batch.run.switch()
        self._running = None

    def suspend(self, place: object) -> None:
        """Called from below a forward: wait here until resumed."""
        self.running.waiting = place
        self._hub.switch()

    @property
    def running(self) -> MicroBatch:
        """The micro-batch whose forward is calling."""
        assert self._running is not None, "nothing is running"
        return self._running

    def run_alone(self, block: int, micro_batch: MicroBatch) -> Any:
        """Run just the block on what the micro-batch waits with, leaving the micro-batch where it is."""
        args, kwargs = micro_batch.arguments
        with self.as_running(micro_batch):
            return self._forwards[block](*args, **kwargs)

    @contextmanager
    def as_running(self, micro_batch: MicroBatch) -> Iterator[None]:
        """Calls from below count as the micro-batch's."""
        self._running = micro_batch
        try:
            yield
        finally:
            self._running = None

    def waiting_at(self, block: int) -> None:
        """Check that all wait in front of the block."""
        for micro_batch in self.micro_batches:
            self.check_waiting(micro_batch, block)

    def check_waiting(self, micro_batch: MicroBatch, block: int) -> None:
        """Check that one waits in front of the block."""
        if micro_batch.waiting != BlockEntry(block):
            raise CalibrationError(
                f"{type(self.skeleton.model).__name__} does not call its blocks one after the other: expected "
                f"{self.skeleton.block_names[block]}, found {_place(micro_batch.waiting)}.",
                "use a method without calibration, such as int4",
            )

    def _forward(self, micro_batch: MicroBatch) -> None:
        result = self.skeleton.decoder(input_ids=micro_batch.ids, use_cache=False)
        micro_batch.result, micro_batch.result_type = result[0], type(result)

    def _wrapped(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            micro_batch = self.running
            if number < self.skip:
                hidden = _first_tensor((*args, *kwargs.values()))
                if number == self.skip - 1:
                    hidden = self.outputs[micro_batch.index]
                return hidden if self.structure == "tensor" else (hidden, *[None] * (int(self.structure) - 1))
            micro_batch.arguments = args, kwargs
            self.suspend(BlockEntry(number))
            args, kwargs = micro_batch.arguments
            micro_batch.arguments, micro_batch.output = ((), {}), None
            output = forward(*args, **kwargs)
            self._check_finite(number, output)
            if number == len(self._forwards) - 1 and self.after_last_block is not None:
                output = self.after_last_block(micro_batch, output)
            micro_batch.output = output
            return output

        return wrapped

    def _check_finite(self, number: int, output: Any) -> None:
        if torch.isfinite(hidden_of(output)).all():
            return
        names = self.skeleton.block_names
        last = f"; the last good block is {names[number - 1]}" if number else ""
        raise CalibrationError(
            f"{names[number]} returned NaN or infinite hidden states{last}.",
            "check the checkpoint's weights with `fewbits inspect`, or skip this block's layers",
        )


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states in what a block returned."""
    return _first_tensor(output if isinstance(output, tuple | list) else (output,))


def with_hidden(output: Any, hidden: torch.Tensor) -> Any:
    """What a block returned, with other hidden states in it."""
    if isinstance(output, torch.Tensor):
        return hidden
    first = next(place for place, item in enumerate(output) if isinstance(item, torch.Tensor))
    return (*output[:first], hidden, *output[first + 1 :])


def structure_of(output: Any) -> str | None:
    """How a block returns its hidden states: "tensor", the length of a tuple whose rest is None, or None if neither."""
    if isinstance(output, torch.Tensor):
        return "tensor"
    if isinstance(output, tuple) and isinstance(output[0], torch.Tensor) and all(item is None for item in output[1:]):
        return str(len(output))
    return None


def _first_tensor(values: tuple[Any, ...] | list[Any]) -> torch.Tensor:
    return next(value for value in values if isinstance(value, torch.Tensor))


def _place(waiting: object) -> str:
    return f"block {waiting.block}" if isinstance(waiting, BlockEntry) else "the end"


def _greenlet() -> Any:
    try:
        import greenlet
    except ImportError as error:
        raise MissingDependencyError(f"The calibrated pass needs greenlet ({error}).", EXTRA_HINT) from error
    return greenlet

"""Suspended forwards: every micro-batch runs the model's own forward in a greenlet, and all go on in step.

A greenlet is a call stack that can be left and entered again. Each micro-batch waits in front of every decoder block
until the block's weights are there, and wherever else `suspend` is called from below its forward. One runs at a time,
so nothing in the model needs to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

import torch

from fewbits.block_inputs import BlockInputs
from fewbits.errors import CalibrationError, MissingDependencyError
from fewbits.paging import Pager
from fewbits.skeleton import EXTRA_HINT, Skeleton


@dataclass(frozen=True)
class BlockEntry:
    """The place in front of a block."""

    block: int


@dataclass
class MicroBatch:
    """Some consecutive samples and where their forward stands.

    waiting: what it is suspended at; None before the start and after the end. arguments: those of the block it waits
    for. output: what the last block returned. ready: what the block it waits for is to return without being run.
    result: the decoder's last hidden states, once it ended, and what it returned them in.
    """

    index: int
    ids: torch.Tensor
    first_token: int
    run: Any = None
    waiting: object = None
    arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    output: Any = None
    ready: Any = None
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
    stash: where hidden states in front of blocks are put away, so that forwards hold stand-ins without memory.
    pager: what hidden states between blocks lie in, so that they take no memory while nobody reads them.
    """

    skeleton: Skeleton
    ids: torch.Tensor
    micro_batch: int
    skip: int = 0
    outputs: Sequence[torch.Tensor] = ()
    structure: str = "tensor"
    stash: BlockInputs | None = None
    pager: Pager | None = None
    after_last_block: Callable[[MicroBatch, Any], Any] | None = None

    def __post_init__(self) -> None:
        length = self.ids.shape[1]
        self.micro_batches = [
            MicroBatch(index, ids, index * self.micro_batch * length)
            for index, ids in enumerate(torch.split(self.ids.to(self.skeleton.device), self.micro_batch))
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
        self._embedding_hook = None
        if self.pager is not None:
            embeddings = cast(Any, self.skeleton.decoder).get_input_embeddings()
            self._embedding_hook = embeddings.register_forward_hook(self._page_embeddings)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for micro_batch in self.micro_batches:
            micro_batch.run.throw()  # ends those that still wait somewhere
            # Whoever still knows this forward is not to keep its states in memory.
            micro_batch.run = micro_batch.output = micro_batch.ready = None
            micro_batch.arguments = (), {}
        for block in self.skeleton.blocks:
            del block.forward  # what hides the class's own
        if self._embedding_hook is not None:
            self._embedding_hook.remove()

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
        return self.call(block, micro_batch, self.arguments_of(block, micro_batch))

    def arguments_of(self, block: int, micro_batch: MicroBatch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the block will be called with for a micro-batch that waits in front of it."""
        args, kwargs = micro_batch.arguments
        if self.stash is None:
            return args, kwargs
        hidden = self.stash.look(block, micro_batch.index).to(self.skeleton.device)
        return with_first_tensor(args, kwargs, hidden)

    def call(self, block: int, micro_batch: MicroBatch, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        """Run just the block on given arguments, on behalf of a micro-batch."""
        args, kwargs = arguments
        with self.as_running(micro_batch):
            return self._forwards[block](*args, **kwargs)

    def finish_block(self, block: int, micro_batch: MicroBatch, output: Any) -> None:
        """Put away what the block returned, and have it returned as the micro-batch goes on."""
        assert self.stash is not None
        self._check_finite(block, output)
        hidden, structure = hidden_of(output), structure_of(output)
        if structure is None:
            raise CalibrationError(
                f"{self.skeleton.block_names[block]} returns more than its hidden states, which cannot be put away.",
                "give a larger --memory, or none",
            )
        self.stash.drop(block, micro_batch.index)
        self.stash.keep(block + 1, micro_batch.index, hidden)
        stand_in = _stand_in(hidden)
        self.structure = structure
        micro_batch.output = micro_batch.ready = _returned(stand_in, structure)

    def hidden_behind(self, block: int, micro_batch: MicroBatch) -> torch.Tensor:
        """The hidden states that the block just run has returned."""
        return hidden_of(micro_batch.output) if self.stash is None else self.stash.look(block + 1, micro_batch.index)

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
        if self.after_last_block is not None:
            micro_batch.result, micro_batch.result_type = result[0], type(result)

    def _wrapped(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            micro_batch = self.running
            if number < self.skip:
                hidden = _first_tensor((*args, *kwargs.values()))
                if number == self.skip - 1:
                    hidden = self.outputs[micro_batch.index].to(self.skeleton.device)
                return _returned(hidden, self.structure)
            if self.stash is not None:
                args, kwargs = self._put_away(number, micro_batch, args, kwargs)
            micro_batch.arguments = args, kwargs
            self.suspend(BlockEntry(number))
            if micro_batch.ready is not None:
                ready, micro_batch.ready = micro_batch.ready, None
                return ready
            args, kwargs = micro_batch.arguments
            micro_batch.arguments, micro_batch.output = ((), {}), None
            output = forward(*args, **kwargs)
            self._check_finite(number, output)
            if number == len(self._forwards) - 1 and self.after_last_block is not None:
                output = self.after_last_block(micro_batch, output)
            if self.pager is not None:
                output = with_hidden(output, self.pager.paged(hidden_of(output)))
            micro_batch.output = output
            return output

        return wrapped

    def _page_embeddings(self, module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        assert self.pager is not None
        return self.pager.paged(output)

    def _put_away(
        self, number: int, micro_batch: MicroBatch, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with a stand-in for the hidden states, which are put away unless the block before did."""
        assert self.stash is not None
        hidden = _first_tensor((*args, *kwargs.values()))
        if micro_batch.output is None:
            self.stash.keep(number, micro_batch.index, hidden)
            return with_first_tensor(args, kwargs, _stand_in(hidden))
        if hidden is not hidden_of(micro_batch.output):
            raise CalibrationError(
                f"{type(self.skeleton.model).__name__} computes between its blocks; their states cannot be put away.",
                "give a larger --memory, or none",
            )
        return args, kwargs

    def _check_finite(self, number: int, output: Any) -> None:
        hidden = hidden_of(output)
        # A sum of what is finite is, as a rule; and it costs a fifth of looking at each.
        if bool(torch.isfinite(hidden.sum(dtype=torch.float32))) or bool(torch.isfinite(hidden).all()):
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


def with_first_tensor(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a block with other hidden states."""
    for place, value in enumerate(args):
        if isinstance(value, torch.Tensor):
            return (*args[:place], hidden, *args[place + 1 :]), kwargs
    first = next(name for name, value in kwargs.items() if isinstance(value, torch.Tensor))
    return args, kwargs | {first: hidden}


def structure_of(output: Any) -> str | None:
    """How a block returns its hidden states: "tensor", the length of a tuple whose rest is None, or None if neither."""
    if isinstance(output, torch.Tensor):
        return "tensor"
    if isinstance(output, tuple) and isinstance(output[0], torch.Tensor) and all(item is None for item in output[1:]):
        return str(len(output))
    return None


def _returned(hidden: torch.Tensor, structure: str) -> Any:
    return hidden if structure == "tensor" else (hidden, *[None] * (int(structure) - 1))


def _stand_in(hidden: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape that takes no memory."""
    return torch.zeros((), dtype=hidden.dtype, device=hidden.device).expand(hidden.shape)


def _first_tensor(values: tuple[Any, ...] | list[Any]) -> torch.Tensor:
    return next(value for value in values if isinstance(value, torch.Tensor))


def _place(waiting: object) -> str:
    return f"block {waiting.block}" if isinstance(waiting, BlockEntry) else "the end"


def require_packages() -> None:
    """Find out before any work whether a calibrated pass can run at all.

    Raises:
        MissingDependencyError: transformers or greenlet is not installed.
    """
    _greenlet()
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(f"Running a model needs transformers ({error}).", EXTRA_HINT) from error


def _greenlet() -> Any:
    try:
        import greenlet
    except ImportError as error:
        raise MissingDependencyError(f"The calibrated pass needs greenlet ({error}).", EXTRA_HINT) from error
    return greenlet

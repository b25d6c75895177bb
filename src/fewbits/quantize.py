"""Quantize: a Hugging Face checkpoint in, a quantized one out, written beside its final name until it is whole."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fewbits.checkpoints.folder import CONFIG_FILE, INDEX_FILE
from fewbits.checkpoints.journal import Journal
from fewbits.checkpoints.partial import PartialFolder
from fewbits.checkpoints.writer import ShardWriter
from fewbits.config import QuantConfig
from fewbits.convert import Conversion, FinishedShard, NonFiniteWeights, ShardWork
from fewbits.errors import CalibrationError, PlanError
from fewbits.formats import DEFAULT_FORMAT, FORMATS
from fewbits.kernels.threads import rest_between_products
from fewbits.notes import Note
from fewbits.plan import Plan, plan, without
from fewbits.progress import Progress, Silent
from fewbits.report import MANIFEST, LayerRecord, Report

if TYPE_CHECKING:
    from fewbits.calibration import Calibration


def quantize(
    model_dir: str | Path,
    out_dir: str | Path,
    config: QuantConfig,
    calibration: str | Path | None = None,
    *,
    format: str = DEFAULT_FORMAT,
    samples: int = 128,
    length: int = 2048,
    importance: Literal["auto", "loss", "none"] = "auto",
    seed: int = 0,
    memory_limit: int | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    strict: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Quantize the checkpoint in `model_dir` into `out_dir`.

    Memory stays at a few tiles of weights whatever the size of the model. Killed at any instant, nothing stands under
    `out_dir`, and the same call goes on from the last finished shard to the same bytes.

    Args:
        model_dir: a Hugging Face checkpoint folder with safetensors in bf16, fp16 or fp32.
        out_dir: folder to make; refused if it exists, unless `overwrite`.
        config: methods by layer.
        calibration: text (or token ids) for methods that look at activations; "self" has the model write its own.
        format: how the result lies on disk: "compressed-tensors", "gptq" or "awq" (docs/formats.md).
        samples, length: how many samples of how many tokens of it are used.
        importance: "loss" weighs tokens by how much the loss cares about them; "none" counts all alike; "auto" is
            "loss" where a method's solver is GPTQ.
        seed: of the labels that importance draws, and of text that the model writes itself.
        memory_limit: bytes that hidden states of calibration data may take in memory; past them they wait in a file and
            blocks run some three times, with a note. None sets no limit.
        device: where calibration forwards run: "cpu", "cuda", "cuda:1".
        allow_nonfinite: carry layers that hold NaN or infinite weights over unquantized, with a note, instead of
            failing.
        strict: raise PlanError where otherwise a note would be made.
        progress: who is told of progress.

    Raises:
        CheckpointError: the source is damaged, missing or quantized already.
        PlanError: config and model do not go together.
        QuantizationError: the config is invalid, or a weight is not finite.
        CalibrationError: a method needs calibration data, and none is given.
        OutputError: the result cannot be written.
    """
    planned = plan(model_dir, config, format=format, samples=samples, length=length, importance=importance)
    needing = planned.needs_calibration
    if needing and calibration is None:
        raise CalibrationError(
            f"{needing[0].method} looks at activations and no calibration data was given "
            f"({needing[0].name}{f' and {len(needing) - 1} more layers' if len(needing) > 1 else ''}).",
            "give a text with --calibration FILE, or use int8, int4 or fp8, which need none",
        )
    if strict and planned.notes:
        raise PlanError(f"strict: {planned.notes[0]}", "resolve it in the config, or run without --strict")
    text = None
    if needing and calibration is not None:
        weighed = "loss" if planned.calibration.importance else "none"
        text = _calibration_choice(
            calibration, model_dir, samples, length, weighed, seed, memory_limit, device, progress or Silent()
        )
    with PartialFolder(out_dir, planned.source, planned.bytes_after, overwrite=overwrite) as folder:
        with Journal.open(folder.path, _fingerprint(planned, text)) as journal:
            run = _Run(planned, folder, journal, text, progress or Silent(), allow_nonfinite, strict)
            run.convert()
        return run.finish()


def _calibration_choice(
    source: str | Path,
    model_dir: str | Path,
    samples: int,
    length: int,
    importance: str,
    seed: int,
    memory_limit: int | None,
    device: str,
    progress: Progress,
) -> CalibrationChoice:
    rest_between_products()
    from fewbits.calibration import OWN_TEXT, read_calibration
    from fewbits.forward_dtype import forward_dtype, require_device
    from fewbits.suspended import require_packages

    require_packages()
    require_device(device)
    dtype = forward_dtype(device)
    if str(source) == OWN_TEXT:
        from fewbits.own_text import own_text

        data = own_text(model_dir, samples, length, seed, dtype, device, progress)
    else:
        data = read_calibration(source, model_dir, samples, length)
    return CalibrationChoice(data, importance, seed, str(dtype).removeprefix("torch."), memory_limit, device)


@dataclass(frozen=True)
class CalibrationChoice:
    """The samples, how their tokens are weighed, and how the model is run on them."""

    data: Calibration
    importance: str
    seed: int
    dtype: str
    memory_limit: int | None
    device: str

    @property
    def facts(self) -> dict[str, Any]:
        """All that the result depends on."""
        samples, length = self.data.ids.shape
        return {
            "source": self.data.source,
            "samples": samples,
            "length": length,
            "tokens": self.data.tokens,
            "digest": self.data.digest,
            "importance": self.importance,
            "seed": self.seed,
            "forward": self.dtype,
            "memory_limit": self.memory_limit,
            "device": self.device,
        }


@dataclass
class _Run:
    """One call of `quantize` under way."""

    plan: Plan
    folder: PartialFolder
    journal: Journal
    calibration: CalibrationChoice | None
    progress: Progress
    allow_nonfinite: bool
    strict: bool
    started_s: float = field(default_factory=time.monotonic)
    stages: dict[str, float] = field(default_factory=dict)
    resumed_shards: int = 0

    @property
    def _beforehand(self) -> tuple[Note, ...]:
        """Notes that are known before the work."""
        return self.plan.notes + (() if self.calibration is None else self.calibration.data.notes)

    def convert(self) -> None:
        """Write every shard that the journal does not hold yet."""
        if self.journal.carried:
            self.plan = without(self.plan, self.journal.carried)
        self.resumed_shards = len(self.journal.finished)
        for note in self._beforehand:
            self.progress.note(note)
        if self.strict and self.calibration is not None and self.calibration.data.notes:
            note = self.calibration.data.notes[0]
            raise PlanError(f"strict: {note}", "give more text, or run without --strict")
        while True:
            try:
                self._convert_once()
                return
            except NonFiniteWeights as error:
                if not self.allow_nonfinite or self.strict or error.layer is None:
                    raise
                self.journal.carry(error.layer)
                self.plan = without(self.plan, self.journal.carried)
                self.progress.note(self.plan.notes[-1])
            finally:
                self.progress.end()

    def _convert_once(self) -> None:
        remaining = self._remaining()
        blocks = {} if self.calibration is None else _blocks(self.plan)
        calibrated = {work.number for work in blocks.values()}
        streamed = [work for work in remaining if work.number not in calibrated]
        if streamed:
            self.progress.begin(
                "quantizing", sum(entry.nbytes for work in streamed for entry, _ in work.sources), "bytes"
            )
            Conversion(self.plan, self._open, self._record, self.progress, self.allow_nonfinite).run(streamed)
            self.progress.end()
        if self.calibration is not None:
            from fewbits.calibrated import CalibratedConversion

            conversion = CalibratedConversion(
                self.plan, self.folder, self.journal, self.calibration.data, self.progress,
                importance=self.calibration.importance == "loss", seed=self.calibration.seed, strict=self.strict,
                memory_limit=self.calibration.memory_limit, device=self.calibration.device,
                dtype=self.calibration.dtype,
            )  # fmt: skip
            conversion.run(remaining, blocks)
            self.stages = {"importance_s": conversion.importance_s} | asdict(conversion.timings)

    def _remaining(self) -> list[ShardWork]:
        return [work for work in _work(self.plan) if self.plan.shards[work.number].file not in self.journal.finished]

    def _open(self, number: int) -> ShardWriter:
        return ShardWriter(self.folder.path, self.plan.shards[number])

    def _record(self, shard: FinishedShard) -> None:
        if self.strict and shard.notes:
            raise PlanError(f"strict: {shard.notes[0]}", "resolve it in the config, or run without --strict")
        layers, notes = [asdict(record) for record in shard.layers], [asdict(note) for note in shard.notes]
        self.journal.append(self.plan.shards[shard.number].file, shard.digests, layers, notes)

    def finish(self) -> Report:
        """Write config, index, companions and manifest, and give the folder its final name."""
        records = [self.journal.finished[shard.file] for shard in self.plan.shards]
        layers = tuple(
            LayerRecord(**layer | {"shape": tuple(layer["shape"])}) for record in records for layer in record["layers"]
        )
        report = Report(
            out_dir=self.folder.out,
            plan=self.plan,
            layers=layers,
            notes=self._beforehand + tuple(Note(**note) for record in records for note in record["notes"]),
            tensor_digests={name: digest for record in records for name, digest in record["tensors"].items()},
            elapsed_s=0.0,
            peak_memory_bytes=0,
            stages=self.stages,
            resumed_shards=self.resumed_shards,
            calibration=None if self.calibration is None else self.calibration.facts,
            folds=tuple(fold for record in records for fold in record["extra"].get("folds", ())),
        )
        self.folder.copy_companions()
        if len(self.plan.shards) > 1:
            self.folder.write_json(INDEX_FILE, _index(self.plan))
        self.folder.write_json(MANIFEST, report.manifest())
        config = _model_config(self.plan)
        for name in FORMATS[self.plan.format].CONFIG_FILES:
            self.folder.write_json(name, config["quantization_config"])
        self.folder.write_json(CONFIG_FILE, config)
        self.folder.finish()
        elapsed_s = time.monotonic() - self.started_s
        return replace(report, elapsed_s=elapsed_s, peak_memory_bytes=peak_memory_bytes())


def _fingerprint(planned: Plan, calibration: CalibrationChoice | None) -> dict[str, Any]:
    return {
        "source": planned.source.fingerprint(),
        "config": planned.config.to_dict(),
        "format": planned.format,
        "calibration": None if calibration is None else calibration.facts,
    }


def _blocks(planned: Plan) -> dict[int, ShardWork]:
    """The shard of each decoder block that has something to solve."""
    blocks = {layer.layer.tensor: layer.layer.block for layer in planned.layers if layer.layer.block is not None}
    found = {}
    for work in _work(planned):
        numbers = {blocks[entry.name] for entry, _ in work.sources if entry.name in blocks}
        if len(numbers) == 1:
            found[numbers.pop()] = work
    return found


def _work(planned: Plan) -> list[ShardWork]:
    shard_of = {tensor.name: number for number, shard in enumerate(planned.shards) for tensor in shard.tensors}
    layers = {layer.layer.tensor: layer for layer in planned.layers if layer.method is not None}
    sources: list[list[Any]] = [[] for _ in planned.shards]
    for name, entry in planned.source.tensors.items():
        layer = layers.get(name)
        sources[shard_of[name if layer is None else layer.outputs[0].name]].append((entry, layer))
    return [ShardWork(number, tuple(entries)) for number, entries in enumerate(sources)]


def _index(planned: Plan) -> dict[str, Any]:
    tensors = [(tensor, shard.file) for shard in planned.shards for tensor in shard.tensors]
    return {
        "metadata": {"total_size": sum(tensor.nbytes for tensor, _ in tensors)},
        "weight_map": {tensor.name: file for tensor, file in sorted(tensors, key=lambda pair: pair[0].name)},
    }


def _model_config(planned: Plan) -> dict[str, Any]:
    return planned.source.config | {"quantization_config": FORMATS[planned.format].quantization_config(planned.schemes)}


def peak_memory_bytes() -> int:
    """The largest resident size this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

"""Calibration files of every kind give the tokens that the tokenizer gives, in order, from the start."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fewbits.calibration import read_calibration
from fewbits.errors import CalibrationError
from fewbits.own_text import write_own_text
from tiny_transformers import VOCABULARY, config_of, tiny_model

WORDS = [f"w{number}" for number in range(90)]
IDS = {word: number + 3 for number, word in enumerate(WORDS)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config and a tokenizer whose tokens are words."""
    folder = tmp_path_factory.mktemp("model")
    config_of("llama").save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2} | IDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


def words(count: int, start: int = 0) -> str:
    return " ".join(WORDS[(start + number) % len(WORDS)] for number in range(count))


def expected(count: int, start: int = 0) -> list[int]:
    return [IDS[word] for word in words(count, start).split()]


def write(path: Path, kind: str) -> tuple[Path, list[int]]:
    """A file of each kind, and the tokens in it."""
    file = path / f"data.{kind.split()[0]}"
    if kind == "txt":
        file.write_text(words(100))
    elif kind == "jsonl text":
        file.write_text("".join(json.dumps({"id": 1, "text": words(50, start)}) + "\n\n" for start in (0, 50)))
    elif kind == "jsonl messages":
        conversation = [{"role": "user", "content": words(50)}, {"role": "assistant", "content": words(50, 50)}]
        file.write_text(json.dumps({"messages": conversation}))
    elif kind == "jsonl ids":
        file.write_text(json.dumps(expected(50)) + "\n" + json.dumps({"input_ids": expected(50, 50)}))
    elif kind == "npy":
        np.save(file, np.array(expected(100), dtype=np.uint16).reshape(4, 25))
    else:
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(arrow.table({"n": [1, 2], "text": [words(50), words(50, 50)]}), file)
    return file, expected(100)


KINDS = ["txt", "jsonl text", "jsonl messages", "jsonl ids", "npy", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_every_kind_are_cut_into_samples_from_the_start(kind: str, model: Path, tmp_path: Path) -> None:
    file, tokens = write(tmp_path, kind)
    found = read_calibration(file, model, samples=4, length=20)
    assert found.ids.dtype == torch.int64
    assert found.ids.tolist() == [tokens[start : start + 20] for start in (0, 20, 40, 60)]
    assert (found.tokens, found.source, found.notes) == (80, file.name, ())


@pytest.mark.parametrize("kind", KINDS)
def test_what_fills_no_whole_sample_is_left_out_and_noted(kind: str, model: Path, tmp_path: Path) -> None:
    file, tokens = write(tmp_path, kind)
    found = read_calibration(file, model, samples=4, length=30)
    assert found.ids.tolist() == [tokens[start : start + 30] for start in (0, 30, 60)]
    [note] = found.notes
    assert note.what == "calibrated with 3 samples in place of 4"


def test_a_long_text_gives_the_tokens_of_its_beginning(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewbits.calibration.CHUNK", 64)
    (tmp_path / "long.txt").write_text((words(90) + "\n") * 50)
    found = read_calibration(tmp_path / "long.txt", model, samples=3, length=100)
    assert found.ids.flatten().tolist() == (expected(90) * 4)[:300]


def test_the_digest_tells_tokens_and_their_arrangement_apart(model: Path, tmp_path: Path) -> None:
    file, _ = write(tmp_path, "npy")
    one, same = (read_calibration(file, model, 4, 20).digest for _ in range(2))
    assert one == same
    assert one != read_calibration(file, model, 8, 10).digest != read_calibration(file, model, 4, 10).digest


@pytest.mark.parametrize(("samples", "length"), [(0, 16), (1, 1), (-1, 16)])
def test_sizes_that_make_no_sample_are_refused(samples: int, length: int, model: Path, tmp_path: Path) -> None:
    file, _ = write(tmp_path, "npy")
    with pytest.raises(CalibrationError, match="at least 1 sample of 2 tokens"):
        read_calibration(file, model, samples, length)


def test_own_text_has_the_wanted_shape_follows_from_the_seed_and_leaves_global_randomness_alone() -> None:
    model = tiny_model("llama", torch.float32)
    torch.manual_seed(5)
    untouched = torch.rand(3)
    torch.manual_seed(5)
    found = write_own_text(model, samples=5, length=12, seed=3)
    assert torch.equal(torch.rand(3), untouched)
    assert found.ids.shape == (5, 12)
    assert bool(((found.ids >= 0) & (found.ids < VOCABULARY)).all())
    assert torch.equal(found.ids, write_own_text(model, samples=5, length=12, seed=3).ids)
    assert not torch.equal(found.ids, write_own_text(model, samples=5, length=12, seed=4).ids)
    assert len({tuple(row) for row in found.ids.tolist()}) == 5
    assert [note.layer for note in found.notes] == ["self"]

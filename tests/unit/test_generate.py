"""Generated tokens against the model's own forward, and the text that is made of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch

import fewbits
from fewbits import Fp8E4M3, Int4Asymmetric, Int8Symmetric, QuantConfig, QuantizationError, QuantLinear, QuantMethod
from fewbits.generate import Generator, Sampling, TextStream, prompt_tokens
from fewbits.kernels import one_token as fields
from fewbits.kernels import one_token_attention as attention
from fewbits.kernels.lanes import HAS_BF16
from fewbits.kernels.one_token import exponential
from fewbits.kernels.team import Program, Work
from fewbits.skeleton import find_blocks
from fewbits.stacked import stacked
from tiny_llms import VOCABULARY, write_model

PROMPT = [3, 9, 27, 17, 51, 25, 11, 33, 35, 41, 59, 49]

INT4 = Int4Asymmetric(32)


def loaded(folder: Path, architecture: str, dtype: torch.dtype = torch.bfloat16, method: QuantMethod = INT4) -> Any:
    fewbits.quantize(write_model(folder / "model", architecture, dtype), folder / "out", QuantConfig(method))
    return fewbits.load(folder / "out")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_the_short_way_is_taken_and_gives_the_logits_of_the_model(architecture: str, tmp_path: Path) -> None:
    model = loaded(tmp_path, architecture)
    generator = Generator(model)
    generation, tokens = generator.stream(PROMPT, 12, stop=())
    written = list(tokens)
    assert generation.short_way is None and generation.notes == ()
    # Its choices must be likeliest, or as good as, by the model's own forward over the whole sequence.
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + written])).logits[0, len(PROMPT) - 1 : -1].float()
    chosen = logits.gather(1, torch.tensor(written)[:, None])[:, 0]
    assert bool((logits.amax(-1) - chosen <= 2.0**-5 * logits.abs().amax(-1)).all())


def test_a_linear_that_no_compiled_kernel_multiplies_is_called_in_between(tmp_path: Path) -> None:
    """One of three that share an input, and one alone, in a model of several schemes."""
    left = {"model.layers.0.self_attn.k_proj": Int4Asymmetric(4), "model.layers.1.mlp.down_proj": Int4Asymmetric(4)}
    mixed = {"model.layers.0.mlp.*": Int8Symmetric(), "model.layers.1.self_attn.*": Fp8E4M3()}
    fewbits.quantize(write_model(tmp_path / "model", "llama", torch.bfloat16), tmp_path / "out",
                     QuantConfig(INT4, mixed | left))  # fmt: skip
    model = fewbits.load(tmp_path / "out")
    assert [model.get_submodule(name).kernels([1]) for name in left] == [{1: "panels"}] * 2
    generation, tokens = Generator(model).stream(PROMPT, 12, stop=())
    written = list(tokens)
    assert generation.short_way is None
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + written])).logits[0, len(PROMPT) - 1 : -1].float()
    chosen = logits.gather(1, torch.tensor(written)[:, None])[:, 0]
    assert bool((logits.amax(-1) - chosen <= 2.0**-4 * logits.abs().amax(-1)).all())


@pytest.mark.parametrize("method", [INT4, Int8Symmetric()], ids=str)
def test_a_model_that_computes_something_else_is_found_out(method: QuantMethod, tmp_path: Path) -> None:
    model = loaded(tmp_path, "llama", method=method)
    layer = find_blocks(model)[1][1]
    plain = layer.mlp.forward
    layer.mlp.forward = lambda x: 0.5 * plain(x)
    generation, tokens = Generator(model).stream(PROMPT, 6, stop=())
    written = list(tokens)
    assert generation.short_way == "block 1 of LlamaForCausalLM computes something else"
    assert [note.layer for note in generation.notes] == ["decoding"]
    expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert written == expected[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("factor", [20, 30])
def test_rounded_activations_do_not_pass_for_another_computation(factor: int, tmp_path: Path) -> None:
    """One channel far larger than the rest leaves these few codes, which the last bit of an input decides on."""
    model = loaded(tmp_path, "llama", method=Int8Symmetric())
    with torch.no_grad():
        for block in find_blocks(model)[1]:
            block.input_layernorm.weight[3] *= factor
            block.post_attention_layernorm.weight[3] *= factor
    generator = Generator(model)
    random = torch.Generator().manual_seed(0)
    for _ in range(100):
        generation, tokens = generator.stream(torch.randint(VOCABULARY, (16,), generator=random).tolist(), 2, stop=())
        list(tokens)
        assert generation.short_way is None


def test_logits_far_from_zero_do_not_pass_for_another_head(tmp_path: Path) -> None:
    """bf16 rounds logits around 500 by up to 1, more than they differ by from each other."""
    model = loaded(tmp_path, "llama")
    with torch.no_grad():
        hidden = model.model(torch.tensor([PROMPT])).last_hidden_state[0, -1].float()
        model.lm_head.weight += (500 * hidden / hidden.square().sum()).bfloat16()
    generation, tokens = Generator(model).stream(PROMPT, 2, stop=())
    list(tokens)
    assert generation.short_way is None


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("mixtral", "MixtralDecoderLayer has a gate"),
        ("gpt2", "GPT2Model has no embed_tokens"),
    ],
)
def test_other_architectures_take_the_models_own_forward(architecture: str, reason: str, tmp_path: Path) -> None:
    model = fewbits.load(write_model(tmp_path, architecture, torch.bfloat16))
    generation, tokens = Generator(model).stream(PROMPT, 4, stop=())
    assert len(list(tokens)) == 4
    assert re.search(reason, generation.short_way or "")


def test_hooks_see_every_token(tmp_path: Path) -> None:
    model = loaded(tmp_path, "llama")
    seen = []
    model.model.layers[0].register_forward_hook(lambda *call: seen.append(1))
    generation, tokens = Generator(model).stream(PROMPT, 4, stop=())
    assert (len(list(tokens)), len(seen), generation.short_way) == (4, 4, "modules have hooks")


@pytest.mark.skipif(not HAS_BF16, reason="no bf16 products on this processor")
@pytest.mark.parametrize("short_way", [True, False])
def test_prompts_take_own_attention_and_leave_the_models(short_way: bool, tmp_path: Path) -> None:
    model = loaded(tmp_path, "llama")
    chosen, strides = [], []
    model.model.layers[0].register_forward_hook(lambda *args: chosen.append(model.config._attn_implementation))
    model.lm_head.register_forward_hook(lambda head, args, output: strides.append(args[0].stride()))
    _, tokens = Generator(model, short_way=short_way).stream([5, 6, 7], 1)
    list(tokens)
    assert chosen == ["fewbits" if short_way else "sdpa"]
    assert model.config._attn_implementation == "sdpa"
    # A last token of a whole prompt, but as if there were no others.
    assert strides[0][0] == strides[0][1] == model.config.hidden_size


def test_fp32_takes_the_models_own_forward_exactly(tmp_path: Path) -> None:
    model = loaded(tmp_path, "llama", torch.float32)
    generation, tokens = Generator(model).stream(PROMPT, 8)
    expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False)[0, len(PROMPT) :].tolist()
    assert list(tokens) == [token for token in expected if token != 1]
    assert generation.short_way == "it is compiled for bf16 on the CPU, not float32 on cpu"


def test_sampling_repeats_by_its_seed_and_a_tiny_nucleus_is_the_likeliest(tmp_path: Path) -> None:
    generator = Generator(loaded(tmp_path, "llama"))

    def tokens(sampling: Sampling) -> list[int]:
        return list(generator.stream(PROMPT, 10, sampling, stop=())[1])

    assert tokens(Sampling(1.5, 1.0, 7)) == tokens(Sampling(1.5, 1.0, 7)) != tokens(Sampling(1.5, 1.0, 8))
    assert tokens(Sampling(1.0, 1e-6, 3)) == tokens(Sampling())


def test_streams_side_by_side_and_after_one_another_give_what_each_gives_alone(tmp_path: Path) -> None:
    model = loaded(tmp_path, "llama")
    longer = [*PROMPT, *PROMPT]
    alone = {len(ids): list(Generator(model).stream(ids, 6, stop=())[1]) for ids in (PROMPT, longer)}
    generator = Generator(model)
    _, first = generator.stream(PROMPT, 6, stop=())
    begun = [next(first), next(first)]
    assert list(generator.stream(longer, 6, stop=())[1]) == alone[len(longer)]
    assert [*begun, *first] == alone[len(PROMPT)]
    for ids in (longer, PROMPT, longer):
        generation, tokens = generator.stream(ids, 6, stop=())
        assert list(tokens) == alone[len(ids)]
        assert generation.short_way is None


def test_a_stop_token_ends_it_unseen(tmp_path: Path) -> None:
    generator = Generator(loaded(tmp_path, "llama"))
    free = list(generator.stream(PROMPT, 8, stop=())[1])
    stop = free[3]
    generation, tokens = generator.stream(PROMPT, 8, stop=(stop,))
    assert list(tokens) == free[: free.index(stop)]
    assert generation.stopped == "stop"


def test_one_token_of_prompt_is_enough_and_none_is_not(tmp_path: Path) -> None:
    generator = Generator(loaded(tmp_path, "llama"))
    assert len(list(generator.stream([5], 4, stop=())[1])) == 4
    with pytest.raises(QuantizationError, match="the prompt is empty"):
        generator.stream([], 4)
    with pytest.raises(QuantizationError, match="12 tokens of prompt and 117 to write are more than the model's 128"):
        generator.stream(PROMPT, 117)


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}])
def test_impossible_sampling_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(QuantizationError, match=f"{next(iter(options))} must be"):
        Sampling(**options)  # type: ignore[arg-type]


class Bytes:
    """A tokenizer whose tokens are bytes."""

    chat_template: str | None = None

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")

    def __call__(self, text: str, **options: Any) -> Any:
        return type("Encoding", (), {"input_ids": list(text.encode())})

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        return f"<user>{messages[0]['content']}<reply>"


def test_characters_come_whole_and_nothing_is_lost() -> None:
    text = "naïve\n日本 🙂\nend"
    stream = TextStream(Bytes())
    parts = [stream.push(byte) for byte in text.encode()]
    assert "".join(parts) + stream.finish() == text
    assert not any("�" in part for part in parts)


def test_a_cut_character_comes_at_the_end() -> None:
    stream = TextStream(Bytes())
    assert stream.push("🙂".encode()[0]) == ""
    assert stream.finish() == "�"


def test_a_chat_template_is_applied_unless_raw_text_is_asked_for() -> None:
    tokenizer = Bytes()
    assert bytes(prompt_tokens(tokenizer, "hi")) == b"hi"
    tokenizer.chat_template = "some"
    assert bytes(prompt_tokens(tokenizer, "hi")) == b"<user>hi<reply>"
    assert bytes(prompt_tokens(tokenizer, "hi", raw=True)) == b"hi"


def test_compiled_attention_is_softmax_over_the_window() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 40, 16, generator=generator).bfloat16()
    queries, out = torch.randn(6, 16, generator=generator).bfloat16(), torch.empty(6, 16, dtype=torch.bfloat16)
    cosines, sines, scratch = torch.ones(40, 16), torch.zeros(40, 16), torch.zeros(6, 40 + 16)
    for window, position in ((0, 0), (0, 37), (7, 36), (50, 5)):
        at = torch.tensor([position])
        step = Work(attention.attention(), {}).step(6, {
            fields.HEADS_AT: queries.data_ptr(), fields.HEAD_WIDTH: 16, fields.COSINES_AT: cosines.data_ptr(),
            fields.SINES_AT: sines.data_ptr(), fields.ROTATED: 16, fields.KEYS_AT: keys.data_ptr(),
            fields.VALUES_AT: values.data_ptr(), fields.CAPACITY: 40, fields.POSITION_AT: at.data_ptr(),
            attention.SCALING: fields.bits_of(0.25), attention.SHARED: 3, attention.WINDOW: window,
            attention.SCRATCH_AT: scratch.data_ptr(), attention.OUT_AT: out.data_ptr(),
        })  # fmt: skip
        Program([step]).run(2)
        first = max(0, position + 1 - window) if window else 0
        for head in range(6):
            k, v = (side[head // 3, first : position + 1].double() for side in (keys, values))
            expected = (k @ queries[head].double() * 0.25).softmax(0) @ v
            torch.testing.assert_close(out[head].double(), expected, rtol=2.0**-8, atol=2.0**-9)


def test_the_vectorized_exponential_is_that_of_numpy() -> None:
    @numba.njit
    def over(values: Any, out: Any) -> None:
        for i in range(values.size):
            out[i] = exponential(values[i])

    values = np.concatenate([np.linspace(-87, 87, 20001), [0.0, -0.0, 1e-30]]).astype(np.float32)
    out = np.empty_like(values)
    over(values, out)
    np.testing.assert_allclose(out, np.exp(values.astype(np.float64)), rtol=4e-7)
    over(np.array([-1e30, -np.inf], np.float32), out[:2])
    assert (out[:2] < 2e-38).all()


@pytest.mark.parametrize("method", [Int4Asymmetric(32), Int8Symmetric(), Fp8E4M3(activations=None)], ids=str)
def test_stacked_linears_give_the_same_and_share_their_memory(method: QuantMethod) -> None:
    torch.manual_seed(0)
    linears = [QuantLinear.from_linear(torch.nn.Linear(64, n).bfloat16(), method) for n in (64, 32, 96)]
    x = torch.randn(1, 64).bfloat16()
    expected = [linear(x) for linear in linears]
    before = sum(linear.codes.nbytes for linear in linears)
    product = stacked(linears, torch.bfloat16)
    assert product is not None
    assert torch.equal(product(x), torch.cat(expected, 1))
    assert all(torch.equal(linear(x), y) for linear, y in zip(linears, expected, strict=True))
    assert len({linear.codes.untyped_storage().data_ptr() for linear in linears}) == 1
    assert linears[0].codes.untyped_storage().nbytes() == before
    again = stacked(linears, torch.bfloat16)
    assert again is not None and torch.equal(again(x), product(x))


def test_weights_are_stacked_once_in_inference_mode_too() -> None:
    linears = [QuantLinear.from_linear(torch.nn.Linear(64, 8), INT4) for _ in range(2)]
    with torch.inference_mode():
        stacked(linears, torch.bfloat16)
        places = [linear.codes.data_ptr() for linear in linears]
        stacked(linears, torch.bfloat16)
    assert [linear.codes.data_ptr() for linear in linears] == places


def test_unlike_linears_are_not_stacked() -> None:
    int4, int8 = (QuantLinear.from_linear(torch.nn.Linear(64, 32), m) for m in (Int4Asymmetric(32), Int8Symmetric()))
    biased = QuantLinear.from_linear(torch.nn.Linear(64, 32, bias=False), Int4Asymmetric(32))
    plain = torch.nn.Linear(64, 32)
    assert [stacked([int4, other], torch.bfloat16) for other in (int8, biased, plain)] == [None] * 3


def test_a_model_that_generated_is_saved_as_before(tmp_path: Path) -> None:
    model = loaded(tmp_path, "llama")
    model.save_pretrained(tmp_path / "before")
    list(Generator(model).stream(PROMPT, 3, stop=())[1])
    model.save_pretrained(tmp_path / "after")
    name = "model.safetensors"
    assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()

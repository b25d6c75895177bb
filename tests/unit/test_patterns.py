"""Patterns: which layers a key means, against fnmatch and re used by hand; and what a mistyped one is told."""

import pytest

from fewbits import GPTQ, ConfigError, Int8Symmetric, QuantConfig
from fewbits.patterns import is_left_alone, matches, nearest_layer

NAMES = [
    f"model.layers.{block}.{part}"
    for block in range(12)
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("model.layers.1.mlp.up_proj", ["model.layers.1.mlp.up_proj"]),
        ("*.layers.1.*", [name for name in NAMES if ".layers.1." in name]),
        ("model.layers.[0-3].*", [name for name in NAMES if name.split(".")[2] in ("0", "1", "2", "3")]),
        ("model.layers.[!0-9].*", []),
        ("model.layers.1?.mlp.*", [name for name in NAMES if len(name.split(".")[2]) == 2 and ".mlp." in name]),
        ("*down_proj", [name for name in NAMES if name.endswith("down_proj")]),
        ("down_proj", []),
        ("*.DOWN_proj", []),
        (r"re:.*\.(q|o)_proj", [name for name in NAMES if name.endswith(("q_proj", "o_proj"))]),
        (r"re:.*\.q_", []),
        (r"re:layers.*", []),
        ("re:", []),
    ],
)
def test_a_key_means_these_layers(key: str, meant: list[str]) -> None:
    assert [name for name in NAMES if matches(key, name)] == meant
    assert QuantConfig(GPTQ(), {key: None}).unmatched_patterns(NAMES) == ([] if meant else [key])


def test_a_name_with_brackets_is_found_exactly() -> None:
    config = QuantConfig(None, {"odd[0]": GPTQ()})
    assert config.method_for_layer("odd[0]") == GPTQ()
    assert config.unmatched_patterns(["odd[0]"]) == []


@pytest.mark.parametrize(
    "name",
    ["lm_head", "language_model.lm_head", "embed_out", "model.embed_tokens", "transformer.wte", "word_embeddings"],
)
@pytest.mark.parametrize("key", ["*", "re:.*", "model.*", "re:.*(head|tokens|wte|out|embeddings)?", "l[m]_head"])
def test_heads_and_embeddings_are_reached_only_by_keys_that_spell_them_out(name: str, key: str) -> None:
    config = QuantConfig(GPTQ(), {key: Int8Symmetric()})
    assert is_left_alone(name) or name in key
    expected = Int8Symmetric() if name.rpartition(".")[2] in key and matches(key, name) else None
    assert config.method_for_layer(name) == expected
    config.set_layer_method("*" + name.rpartition(".")[2], Int8Symmetric())
    assert config.method_for_layer(name) == Int8Symmetric()


@pytest.mark.parametrize("name", ["model.embedding_projection", "mlp.up_proj", "head.dense", "embed_hidden_mapping_in"])
def test_other_layers_are_not_taken_for_embeddings(name: str) -> None:
    assert not is_left_alone(name)


def test_a_pattern_that_reaches_only_what_is_left_alone_counts_as_unmatched() -> None:
    names = [*NAMES, "lm_head"]
    assert QuantConfig(GPTQ(), {"*head": Int8Symmetric()}).unmatched_patterns(names) == ["*head"]
    assert "'lm_head'" in nearest_layer("*head", names)
    assert QuantConfig(GPTQ(), {"*head": None, "*lm_head": Int8Symmetric()}).unmatched_patterns(names) == []


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("*.mlp.down_prj", "'*.mlp.down_proj'"),
        ("model.layers.3.mlp.upproj", "'model.layers.3.mlp.up_proj'"),
        ("model.layers.99.mlp.up_proj", "'model.layers.*.mlp.up_proj'"),
        ("model.layer.3.mlp.up_proj", "'model.layers.*.mlp.up_proj'"),
        ("re:.*experts.*", "q_proj, o_proj, up_proj, down_proj"),
        ("nothing like it", "q_proj, o_proj, up_proj, down_proj"),
    ],
)
def test_a_mistyped_key_is_told_what_it_may_have_meant(key: str, hint: str) -> None:
    assert hint in nearest_layer(key, NAMES)


def test_a_model_without_linear_layers_is_told_so() -> None:
    assert nearest_layer("*.mlp", []) == "the model has no linear layers"


@pytest.mark.parametrize(
    ("key", "found"),
    [("re:a(b", "position 1"), ("re:[z-a]", "position 1"), ("re:*", "position 0"), ("re:a{99999999999999}", "number")],
)
def test_a_bad_regular_expression_is_refused_with_its_place(key: str, found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        QuantConfig(GPTQ(), {key: None}).validate()
    assert f"layer '{key}'" in str(caught.value) and found in str(caught.value)


def test_thousands_of_overrides_are_looked_up() -> None:
    # In a moment; looking at every override for every layer would take minutes.
    names = [f"model.layers.{block}.mlp.experts.{expert}.up_proj" for block in range(100) for expert in range(200)]
    config = QuantConfig(GPTQ(), dict.fromkeys(names, Int8Symmetric()) | {"*.mlp.*": None})
    overrides = config.overrides()
    assert all(overrides.find(name) == (True, Int8Symmetric()) for name in names)
    assert config.unmatched_patterns(names) == []
    assert "did you mean" in nearest_layer("model.layers.1.mlp.experts.1.upproj", names)

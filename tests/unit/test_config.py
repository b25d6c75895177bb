"""QuantConfig: precedence, files, and what a wrong file is told."""

from pathlib import Path

import pytest

from fewbits import AWQ, GPTQ, ConfigError, Int4Asymmetric, Int8Symmetric, OutputError, QuantConfig, QuantizationError
from fewbits.methods import METHODS

RECIPE = r"""
method = { name = "gptq", bits = 4, group_size = 128 }   # or just "gptq": its defaults
[per_layer]
"lm_head" = "int8"
"model.layers.[0-3].*" = { name = "int4", group_size = 32 }
"re:.*\\.experts\\..*" = { name = "gptq", bits = 3, group_size = 64 }
"*.mlp.down_proj" = "skip"
"""


def test_the_recipe_of_the_documentation_means_what_it_says() -> None:
    config = QuantConfig.from_toml(RECIPE)
    assert config.method_for_layer("model.layers.7.self_attn.q_proj") == GPTQ()
    assert config.method_for_layer("model.layers.2.self_attn.q_proj") == Int4Asymmetric(32)
    assert config.method_for_layer("model.layers.20.self_attn.q_proj") == GPTQ()
    assert config.method_for_layer("model.layers.2.mlp.down_proj") is None
    assert config.method_for_layer("model.layers.7.mlp.experts.5.up_proj") == GPTQ(bits=3, group_size=64)
    assert config.method_for_layer("lm_head") == Int8Symmetric()
    assert config.method_for_layer("model.embed_tokens") is None


def test_exact_beats_pattern_and_a_later_pattern_beats_an_earlier_one() -> None:
    config = QuantConfig(GPTQ(), {"a.b": None, "a.*": Int8Symmetric(), "*.b": AWQ(), "*.c": AWQ()})
    assert config.method_for_layer("a.b") is None
    assert config.method_for_layer("x.b") == AWQ()
    assert config.method_for_layer("a.c") == AWQ()
    config.set_layer_method("a.*", Int8Symmetric())
    assert config.method_for_layer("a.c") == Int8Symmetric()
    assert config.method_for_layer("elsewhere") == GPTQ()


def test_the_given_overrides_are_copied() -> None:
    given = {"a": GPTQ()}
    config = QuantConfig(GPTQ(), given)
    given["b"] = GPTQ()
    assert list(config.per_layer) == ["a"]
    assert QuantConfig(GPTQ()).per_layer is not QuantConfig(GPTQ()).per_layer


def test_configs_compare_by_what_they_do() -> None:
    first = QuantConfig(GPTQ(), {"a": None, "b": AWQ(), "*.c": None, "x.*": AWQ()})
    assert first == QuantConfig(GPTQ(), {"b": AWQ(), "*.c": None, "a": None, "x.*": AWQ()})
    assert first != QuantConfig(GPTQ(), {"a": None, "b": AWQ(), "x.*": AWQ(), "*.c": None})
    assert first != QuantConfig(AWQ(), first.per_layer) and first != "gptq"


def test_an_invalid_override_is_named() -> None:
    config = QuantConfig(GPTQ())
    config.set_layer_method("model.layers.0.mlp.up_proj", GPTQ(bits=9))
    with pytest.raises(QuantizationError) as caught:
        config.validate()
    assert str(caught.value).startswith("layer 'model.layers.0.mlp.up_proj': GPTQ bits must be in [1, 8]")


@pytest.mark.parametrize(
    ("method", "per_layer"),
    [("gptq", {}), (GPTQ, {}), (GPTQ(bits=0), {}), (GPTQ(), {"a": "int8"}), (GPTQ(), {"": None}), (GPTQ(), {3: None})],
)
def test_what_is_no_method_or_no_key_is_refused(method: object, per_layer: dict[str, object]) -> None:
    with pytest.raises(QuantizationError):
        QuantConfig(method, per_layer).validate()  # type: ignore[arg-type]


def test_overrides_that_are_no_mapping_are_refused() -> None:
    with pytest.raises(ConfigError, match="per_layer must map"):
        QuantConfig(GPTQ(), ["lm_head"])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", METHODS)
def test_a_short_name_means_the_defaults_in_any_case(name: str) -> None:
    assert QuantConfig.from_dict({"method": name.upper()}) == QuantConfig(METHODS[name]())
    assert QuantConfig.from_dict({"method": {"name": name}}) == QuantConfig(METHODS[name]())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('method = "gptq"\nper_layers = {}', ["unknown key 'per_layers'", "'per_layer'"]),
        ('method = { name = "gptq", bit = 4 }', ["method: gptq: unknown key 'bit'", "'bits'"]),
        ('method = "gtpq"', ["unknown method 'gtpq'", "'gptq'"]),
        ('method = "nonsense"', ["unknown method 'nonsense'", "smoothquant", "skip"]),
        ('method = "gptq"\n[per_layer]\n"*.up_proj" = "in8"', ["per_layer.'*.up_proj'", "'in8'", "'int8'"]),
        (
            'method = "gptq"\n[per_layer]\n"*.up_proj" = { name = "skip", bits = 4 }',
            ["unknown key 'bits'", "no options"],
        ),
        ('method = "gptq"\n[per_layer]\n"x" = { bits = 4 }', ["per_layer.'x'", "the keys bits"]),
        ('method = "gptq"\n[per_layer]\nmodel.lm_head = "int8"', ["per_layer.'model'", "the keys lm_head", "quotes"]),
        ('method = "gptq"\n[per_layer]\n"x" = 4', ["per_layer.'x'", "got 4"]),
        ('method = "gptq"\n[per_layer]\n"re:(" = "skip"', ["'re:('", "position 0"]),
        ('method = "gptq"\nper_layer = ["lm_head"]', ["per_layer must be a table", "['lm_head']"]),
        ('method = { name = "gptq", bits = "4" }', ["GPTQ bits must be a whole number, got '4'"]),
        ('method = { name = "gptq", bits = 4.0 }', ["GPTQ bits must be a whole number, got 4.0"]),
        ('method = { name = "smoothquant", alpha = nan }', ["alpha must be in [0.0, 1.0], got nan"]),
        ('method = { name = "gptq", bits = 9 }', ["GPTQ bits must be in [1, 8], got 9"]),
        ("method = 4", ["method", "got 4"]),
        ("", ["no method given"]),
        ('method = "gptq"\nmethod = "int8"', ["not valid TOML", "overwrite"]),
        ('method = "gptq"\nx = [', ["not valid TOML", "end of document"]),
        ("method = " + "[" * 100_000, ["not valid TOML"]),
        ("method = " + "1" * 5000, ["not valid TOML"]),
    ],
)
def test_a_wrong_file_is_told_where_and_what(tmp_path: Path, text: str, said: list[str]) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        QuantConfig.from_file(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert all(words in str(caught.value) for words in said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "expected an object"),
        ('{"method": "gptq", "method": "int8"}', "'method' is given twice"),
        ('{"method": {"name": "smoothquant", "alpha": NaN}}', "got nan"),
        ('{"method": ', "not valid JSON"),
        ('{"method": ' + "9" * 5000 + "}", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"method": "gptq", "per_layer": {"\\ud800": "skip"}}', "no text that a file can hold"),
        ("", "not valid JSON"),
    ],
)
def test_wrong_json_is_told_what(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        QuantConfig.from_json(text)


def test_null_in_json_skips_as_none_does() -> None:
    assert QuantConfig.from_json('{"method": "gptq", "per_layer": {"a": null}}') == QuantConfig(GPTQ(), {"a": None})


def test_a_file_that_cannot_be_read_or_written_is_told_why(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "latin.toml").write_bytes(b'method = "gptq" # \xe9')
    for name, said in [
        ("none.toml", "No such file"),
        ("folder.toml", "Is a directory"),
        ("latin.toml", "not UTF-8"),
        ("recipe.yaml", ".toml or .json"),
        ("recipe", ".toml or .json"),
        ("a\0.toml", "null"),
    ]:
        with pytest.raises(ConfigError, match=said):
            QuantConfig.from_file(tmp_path / name)
    with pytest.raises(OutputError, match="Is a directory"):
        QuantConfig(GPTQ()).to_file(tmp_path / "folder.toml")
    with pytest.raises(OutputError, match="No such file"):
        QuantConfig(GPTQ()).to_file(tmp_path / "none" / "recipe.json")


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    for name, text in (("a.toml", 'method = "gptq"'), ("a.json", '{"method": "gptq"}')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert QuantConfig.from_file(tmp_path / name) == QuantConfig(GPTQ())


def test_an_impossible_config_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError):
        QuantConfig(GPTQ(bits=0)).to_file(tmp_path / "recipe.toml")
    assert not list(tmp_path.iterdir())


def test_a_written_file_looks_like_this(tmp_path: Path) -> None:
    config = QuantConfig(GPTQ(bits=3), {"lm_head": Int8Symmetric(activations=None), "*.mlp.*": None})
    config.to_file(tmp_path / "recipe.toml")
    assert (tmp_path / "recipe.toml").read_text(encoding="utf-8") == (
        'method = { name = "gptq", bits = 3, group_size = 128, symmetric = true }\n'
        "\n[per_layer]\n"
        '"lm_head" = { name = "int8", activations = "none" }\n'
        '"*.mlp.*" = "skip"\n'
    )

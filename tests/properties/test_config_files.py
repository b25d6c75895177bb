"""Every valid config reads back from TOML, JSON and files as it was, order of patterns included."""

from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given
from hypothesis import strategies as st

from fewbits import AWQ, GPTQ, Fp8E4M3, Int4Asymmetric, Int8Symmetric, QuantConfig, SmoothQuant

group_sizes = st.integers(1, 10**6) | st.just("channel")
activations = st.sampled_from(["dynamic", None])
methods = st.one_of(
    st.builds(Int8Symmetric, activations),
    st.builds(Int4Asymmetric, group_sizes),
    st.builds(Fp8E4M3, activations),
    st.builds(AWQ, group_sizes, st.sampled_from(["rtn", "gptq"])),
    st.builds(SmoothQuant, st.floats(0, 1) | st.just("auto") | st.sampled_from([0, 1])),
    st.builds(GPTQ, st.integers(1, 8), group_sizes, st.booleans()),
)
# Text with quotes, escapes, control characters and characters beyond the basic plane; `re:` alone needs valid syntax.
keys = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda key: not key.startswith("re:"))
globs = st.text("model.layers*?[!0-3]_", min_size=1)
regexes = st.sampled_from([r"re:.*\.mlp\..*", 're:"quoted"\\d+', "re:ä|𝄞", "re:"])
configs = st.builds(
    QuantConfig, st.none() | methods, st.dictionaries(keys | globs | regexes, st.none() | methods, max_size=8)
)


def same(first: QuantConfig, second: QuantConfig) -> bool:
    return first == second and list(first.per_layer.items()) == list(second.per_layer.items())


@given(configs)
def test_text_reads_back_as_it_was(config: QuantConfig) -> None:
    assert same(config, QuantConfig.from_dict(config.to_dict()))
    assert same(config, QuantConfig.from_toml(config.to_toml()))
    assert same(config, QuantConfig.from_json(config.to_json()))


@given(configs, st.sampled_from(["recipe.toml", "recipe.JSON"]))
def test_files_read_back_as_they_were(config: QuantConfig, name: str) -> None:
    with TemporaryDirectory() as folder:
        config.to_file(Path(folder) / name)
        assert same(config, QuantConfig.from_file(Path(folder) / name))


@given(st.text() | st.from_regex(r'method = ("gptq"|\{.*\})\n.*'))
def test_any_text_is_read_or_refused_in_words(text: str) -> None:
    from fewbits import ConfigError

    for read in (QuantConfig.from_toml, QuantConfig.from_json):
        try:
            read(text).validate()
        except ConfigError as error:
            assert error.message

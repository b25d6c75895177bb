"""Every example in the docstrings and in the pages about recipes and kernels does what it says."""

import doctest
import re
from importlib import import_module
from pathlib import Path

import pytest

import fewbits
from fewbits import QuantConfig
from fewbits.methods import METHODS, method_options

SOURCE = Path(fewbits.__file__).parent
RECIPES = SOURCE.parents[1] / "docs" / "config.md"
KERNELS = SOURCE.parents[1] / "docs" / "kernels.md"
WITH_EXAMPLES = sorted(
    ".".join(file.relative_to(SOURCE.parent).with_suffix("").parts)
    for file in SOURCE.rglob("*.py")
    if re.search(r"^ *>>> ", file.read_text(encoding="utf-8"), re.MULTILINE)
)


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_the_examples_of_a_module_hold(module: str) -> None:
    failed, tried = doctest.testmod(import_module(module))
    assert tried > 0 and failed == 0


def test_the_examples_of_the_page_about_recipes_hold() -> None:
    failed, tried = doctest.testfile(str(RECIPES), module_relative=False)
    assert tried > 10 and failed == 0


def test_the_examples_of_the_page_about_kernels_hold() -> None:
    failed, tried = doctest.testfile(str(KERNELS), module_relative=False)
    assert tried > 3 and failed == 0


def test_the_recipe_on_the_page_can_be_read() -> None:
    recipes = re.findall(r"```toml\n(.*?)```", RECIPES.read_text(encoding="utf-8"), re.DOTALL)
    assert len(QuantConfig.from_toml(recipes[0]).per_layer) == 4


def test_the_page_lists_every_method_with_every_option() -> None:
    page = RECIPES.read_text(encoding="utf-8")
    for name, method_class in METHODS.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert all(option in row for option in method_options(method_class)) and method_class.__name__ in row

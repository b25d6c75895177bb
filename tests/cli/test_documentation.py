"""Every command in the README and in docs/ runs, in the order in which its page has it, on a tiny model."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import Cli
from tiny_llama import TEXT, small_llama

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
# What the pages call the reader's own things; 64 and 128 divide no row of a tiny model.
PLACES = {"MODEL": "model", "FILE": "text.txt", "text.txt": "text.txt"}
SMALLER = {
    "--samples": "8",
    "--length": "64",
    "--windows": "1",
    "-g": "32",
    "--group-size": "32",
    "--max-tokens": "4",
    "--prompt": "16",
    "--tokens": "3",
}


def commands(page: Path) -> Iterator[list[str]]:
    """The `fewbits …` lines of a page's shell blocks, as words."""
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["fewbits"]:
                yield words[1:]


def on_a_tiny_model(words: list[str]) -> list[str]:
    """The same command with the tiny model in place of the reader's, and fewer tokens."""
    placed = [PLACES.get(word, word) for word in words]
    return [SMALLER.get(before, word) for before, word in zip(["", *placed], placed, strict=False)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(commands(page))], ids=lambda page: str(page.relative_to(REPOSITORY))
)
def test_the_commands_of_a_page_run(page: Path, cli: Cli, model: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "text.txt").write_text(" ".join([TEXT] * 48))
    for recipe in re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        (tmp_path / "recipe.toml").write_text(recipe.replace("group_size = 64", "group_size = 32"))
    for words in commands(page):
        if words == ["demo"]:
            continue  # It installs a model; test_verbs_output.py runs it on the tiny one.
        outcome = cli(*on_a_tiny_model(words))
        assert outcome.status == 0, f"fewbits {shlex.join(words)}\n{outcome.err}"


def test_the_readme_names_every_command() -> None:
    readme = PAGES[0].read_text(encoding="utf-8")
    for command in ("quantize", "plan", "inspect", "verify", "evaluate", "generate", "kernels", "demo"):
        assert f"fewbits {command}" in readme

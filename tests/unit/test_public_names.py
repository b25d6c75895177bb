"""The package's face: names, laziness, and verbs that stay functions."""

import subprocess
import sys

import fewbits


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_every_public_name_can_be_had() -> None:
    assert all(getattr(fewbits, name) is not None for name in fewbits.__all__)
    assert set(fewbits.__all__) <= set(dir(fewbits))


def test_importing_the_package_loads_neither_torch_nor_numba() -> None:
    found = run("import sys, fewbits; fewbits.GPTQ; print(sorted({'torch', 'numba', 'numpy'} & set(sys.modules)))")
    assert found == "[]"


def test_planning_loads_no_torch() -> None:
    found = run("import sys, fewbits; fewbits.plan; print('torch' in sys.modules)")
    assert found == "False"


def test_a_verb_stays_a_function_after_its_module_is_imported() -> None:
    found = run(
        "import fewbits, fewbits.plan\nfrom fewbits.plan import Plan\nimport fewbits.quantize\n"
        "from fewbits import plan\nprint(callable(fewbits.plan), callable(fewbits.quantize), plan is fewbits.plan)"
    )
    assert found == "True True True"


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(fewbits, "quantise")

"""A verb and its module share a name: the package gives the function, in whatever order things are imported."""

import subprocess
import sys
from itertools import permutations

VERBS = ("plan", "quantize", "load", "verify", "evaluate", "inspect")
STEPS = (
    "import fewbits.{verb}",
    "assert callable(fewbits.{verb})",
    "import importlib; assert hasattr(importlib.import_module('fewbits.{verb}'), '{verb}')",
    "from fewbits import {verb}; assert callable({verb})",
    "from fewbits.{verb} import {verb} as again; assert again is fewbits.{verb}",
)


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_every_verb_is_the_function_in_every_order_of_imports() -> None:
    # In one process, because torch is slow to import: the package is forgotten before each order.
    forget = "for name in [n for n in sys.modules if n.split('.')[0] == 'fewbits']: del sys.modules[name]"
    lines = ["import sys"]
    for verb in VERBS:
        for order in list(permutations(STEPS))[::23]:
            lines += [forget, "import fewbits", *(step.format(verb=verb) for step in order)]
    run("\n".join(lines))


def test_a_star_import_gives_functions() -> None:
    assert run("from fewbits import *\nprint(callable(plan), callable(quantize), QuantConfig.__name__)") == (
        "True True QuantConfig"
    )


def test_a_verb_can_be_replaced_and_put_back() -> None:
    code = (
        "import fewbits\nfrom unittest import mock\noriginal = fewbits.plan\n"
        "with mock.patch('fewbits.plan', lambda: 7): print(fewbits.plan())\n"
        "import fewbits.plan\nprint(fewbits.plan is original)"
    )
    assert run(code).split() == ["7", "True"]


def test_functions_and_classes_can_be_sent_to_another_process() -> None:
    code = (
        "import pickle, fewbits\n"
        "for thing in (fewbits.plan, fewbits.QuantConfig(fewbits.GPTQ()), fewbits.GPTQ, fewbits.PlanError('a', 'b')):\n"
        "    again = pickle.loads(pickle.dumps(thing))\n"
        "    print(again == thing or (str(again), again.hint) == (str(thing), thing.hint))"
    )
    assert run(code).split() == ["True"] * 4

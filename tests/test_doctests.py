"""The examples in the docstrings: each one runs, and every public name has one.

`python -m pytest --doctest-modules keras_bandmf` runs them without this file.
"""

import doctest
import importlib
import importlib.util
import inspect
import pathlib

import pytest

import keras_bandmf

PACKAGE = pathlib.Path(keras_bandmf.__file__).parent
ROOMS = (
    "audit",
    "callbacks",
    "clipping",
    "layers",
    "noise",
    "rgp",
    "sampling",
    "sources",
    "strategies",
    "tfx_input",
)


def module_names():
    """The dotted names of all modules of the package."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found.append(".".join(parts).removesuffix(".__init__"))
    return found


@pytest.mark.parametrize("name", module_names())
def test_examples_run(name):
    if name == "keras_bandmf.tf_privacy" and not importlib.util.find_spec("tensorflow_privacy"):
        pytest.skip("the extra tf-privacy is not installed")
    results = doctest.testmod(
        importlib.import_module(name),
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
    )
    assert results.failed == 0, "see the captured output"


def public_objects():
    """The functions and classes that users can reach: name -> object."""
    found = {}
    for module in (keras_bandmf, *(importlib.import_module(f"keras_bandmf.{r}") for r in ROOMS)):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value) or inspect.isclass(value):
                found[f"{module.__name__}.{name}"] = value
    return found


@pytest.mark.parametrize("name", sorted(public_objects()))
def test_every_public_function_and_class_has_an_example(name):
    # Of a class, in its own docstring or in that of a method.
    found = doctest.DocTestFinder().find(public_objects()[name], name, module=False)
    assert any(test.examples for test in found)

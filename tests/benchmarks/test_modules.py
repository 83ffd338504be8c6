"""Every benchmark can be loaded: what they measure moves, and nobody runs them daily."""

import importlib
import pkgutil

import pytest

import benchmarks

# Only where it was installed for the comparison.
NOT_LOCKED = {"granian"}


@pytest.mark.parametrize(
    "name", [module.name for module in pkgutil.iter_modules(benchmarks.__path__)]
)
def test_it_loads(name):
    try:
        importlib.import_module(f"benchmarks.{name}")
    except ModuleNotFoundError as error:
        if error.name not in NOT_LOCKED:
            raise
        pytest.skip(f"needs {error.name}")

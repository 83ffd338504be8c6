"""Every benchmark can be loaded: what they measure moves, and nobody runs them daily."""

import importlib
import pkgutil

import pytest

import benchmarks


@pytest.mark.parametrize(
    "name", [module.name for module in pkgutil.iter_modules(benchmarks.__path__)]
)
def test_it_loads(name):
    importlib.import_module(f"benchmarks.{name}")

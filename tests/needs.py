"""What some tests cannot run without, and how to install it."""

import re
import shutil
from collections.abc import Iterable
from importlib.util import find_spec

import pytest

needs_openvino = pytest.mark.skipif(
    find_spec("openvino") is None, reason="the extra openvino is not installed"
)


def needs_program(program: str, package: str) -> pytest.MarkDecorator:
    """Skip a test where a program is not on the PATH; the reason names its Debian package."""
    return pytest.mark.skipif(
        shutil.which(program) is None, reason=f"needs {program} (Debian package {package})"
    )


def advice(reasons: Iterable[str]) -> str:
    """Return one line on how to run the tests that were skipped for want of a program, or ""."""
    named = (re.search(r"Debian package (\S+)\)", reason) for reason in reasons)
    wanted = [found[1] for found in named if found]
    if not wanted:
        return ""
    packages = " ".join(sorted(set(wanted)))
    return f"{len(wanted)} tests need programs that are missing: apt-get install {packages}"

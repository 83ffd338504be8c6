"""Prints a pyproject.toml that holds nothing but the dependencies of another.

The images install from it, so that a change to the settings of a tool rebuilds none of their heavy
layers.
"""

import json
import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["project"]
# JSON's strings and lists of strings are TOML as well.
print("[project]")
for key in ("name", "version", "requires-python", "dependencies"):
    print(key, "=", json.dumps(project[key]))
print("[project.optional-dependencies]")
for extra, dependencies in project["optional-dependencies"].items():
    print(extra, "=", json.dumps(dependencies))

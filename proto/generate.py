"""Regenerates the Python stubs in proto/gen from the sources beside this file.

    python proto/generate.py          # write proto/gen
    python proto/generate.py --check  # exit 1 if proto/gen is not what the sources give

The sources lie under the path that Python imports (proto/convoy/v1/classifier.proto becomes
convoy.v1.classifier_pb2), so the stubs need no rewriting. The version of grpcio-tools in the
environment is the lowest grpcio, and its protoc the lowest protobuf, that the stubs run on.
"""

import filecmp
import importlib.resources
import shutil
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

PROTO_DIR = Path(__file__).resolve().parent
STUBS_DIR = PROTO_DIR / "gen" / "convoy"


def generate(target: Path) -> None:
    """Write the stubs of every .proto under proto/convoy into target (proto/gen's layout)."""
    sources = sorted(PROTO_DIR.glob("convoy/**/*.proto"))
    include = importlib.resources.files("grpc_tools") / "_proto"
    plugins = [f"--{name}_out={target}" for name in ("python", "grpc_python")]
    for name in ("mypy", "mypy_grpc"):
        # Beside this Python: the environment need not be activated.
        program = Path(sys.executable).parent / f"protoc-gen-{name}"
        plugins += [f"--plugin={program}", f"--{name}_out=quiet:{target}"]
    arguments = ["protoc", f"-I{PROTO_DIR}", f"-I{include}", *plugins, *map(str, sources)]
    if protoc.main(arguments) != 0:
        sys.exit("protoc failed; its message is above")
    # `convoy` itself is a namespace package: it must have no __init__.py.
    for portion in (target / "convoy").iterdir():
        (portion / "py.typed").touch()
        for folder in [portion, *(path for path in portion.rglob("*") if path.is_dir())]:
            (folder / "__init__.py").touch()


def files_below(folder: Path) -> set[Path]:
    """Return the stubs below folder, relative to it, without compiled Python."""
    return {
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def differences(fresh: Path) -> list[Path]:
    """Return the stubs that are missing, left over or different in proto/gen."""
    expected, found = files_below(fresh), files_below(STUBS_DIR)
    changed = {
        path
        for path in expected & found
        if not filecmp.cmp(fresh / path, STUBS_DIR / path, shallow=False)
    }
    return sorted((expected ^ found) | changed)


def main() -> None:
    """Generate into a temporary folder, then compare with proto/gen or replace it."""
    with tempfile.TemporaryDirectory() as temporary:
        generate(Path(temporary))
        fresh = Path(temporary) / "convoy"
        if "--check" in sys.argv[1:]:
            if stale := differences(fresh):
                sys.exit(
                    f"proto/gen is out of date, run `make proto`: {', '.join(map(str, stale))}"
                )
            return
        shutil.rmtree(STUBS_DIR, ignore_errors=True)
        shutil.copytree(fresh, STUBS_DIR)


if __name__ == "__main__":
    main()

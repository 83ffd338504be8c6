"""Train, export, serve and classify real handwritten digits; `make demo` runs it.

    python examples/demo.py [FOLDER]

Each step is a command that you can run yourself. FOLDER (demo) keeps the images, the model, the
reports and the predictions.
"""

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

LEAST_ACCURACY = 0.9
MADE = ("digits", "runs", "models", "predictions.csv", "predictions.csv.summary.json")

console = Console(highlight=False)


def main(folder: Path) -> None:
    started_s = time.monotonic()
    remove_earlier(folder)
    explain("Save scikit-learn's 1,797 handwritten digits as PNG files, one folder per class.")
    run(f"convoy-train save-images digits {folder}/digits")
    explain("Train a small residual net on them.")
    data = f"--data imagefolder:{folder}/digits --recipe digits --model net_res_deep"
    small = "--set model_arguments={n_blocks=3}"
    run(f"convoy-train {data} {small} --epochs 6 --out {folder}/runs/digits")
    explain("Export it, and compare each artifact with the trained net.")
    run(f"convoy-export {folder}/runs/digits/best.pt --repository {folder}/models --name digits")
    explain("Start a server, and classify the test images with it.")
    command = f"convoy-server --repository {folder}/models"
    show(command)
    with subprocess.Popen(
        program(f"{command} --port 0 --metrics-port 0 --log-format json"),
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            address = address_of(server)
            run(
                f"convoy-client batch {folder}/digits/test --model digits --address {address} "
                f"--evaluate --out {folder}/predictions.csv"
            )
        finally:
            server.terminate()
            server.stderr.read()
    summary = json.loads((folder / "predictions.csv.summary.json").read_text())
    accuracy = summary["accuracy"]
    say_what_is_left(folder, accuracy, time.monotonic() - started_s)
    if accuracy < LEAST_ACCURACY:
        sys.exit(f"expected an accuracy of at least {LEAST_ACCURACY}, got {accuracy:.4f}")


def remove_earlier(folder: Path) -> None:
    """Remove the output of an earlier demo, and nothing else."""
    for name in MADE:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def explain(text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]")


def show(command: str) -> None:
    console.print(f"[green]$ {command}[/green]", soft_wrap=True)


def run(command: str) -> None:
    """Show a command and run it; its failure ends the demo."""
    show(command)
    if code := subprocess.run(program(command), check=False).returncode:
        sys.exit(code)


def program(command: str) -> list[str]:
    """Return the arguments of a command of this environment."""
    name, *arguments = shlex.split(command)
    return [str(Path(sys.executable).parent / name), *arguments]


def address_of(server: subprocess.Popen[str]) -> str:
    """Wait until the server is ready, and return its address."""
    for line in server.stderr:
        if not line.startswith("{"):
            sys.exit(line.strip())
        event = json.loads(line)
        if event["event"] == "serving":
            console.print(f"serving on {event['address']}")
            return event["address"]
    sys.exit("the server ended before it was ready")


def say_what_is_left(folder: Path, accuracy: float, elapsed_s: float) -> None:
    console.print(
        f"\n[bold]Accuracy through the server: {accuracy:.4f}[/bold], in {elapsed_s:.0f} s."
    )
    console.print(f"""
{folder}/digits                  the images
{folder}/runs/digits/report.png  loss, accuracy and confusion matrix of the training
{folder}/models/digits/1         the verified version, with its own report.png
{folder}/predictions.csv         the predictions for the test images

Continue with a running server and its page, http://127.0.0.1:8001:""")
    show(f"convoy-server --repository {folder}/models")
    console.print("The tutorial in README.md explains each step.")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))

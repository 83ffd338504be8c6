"""`classify`, `health` and `models`: one call to a server and what it said."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from clients.cli.options import Address, Model, Timeout, TopK, complain
from clients.client import Client
from clients.connection import DEFAULT_ADDRESS
from clients.errors import ClientError
from clients.results import Classification

NOT_READY = 1


def classify(
    images: Annotated[list[Path], typer.Argument(help="Image files.", show_default=False)],
    *,
    model: Model = "",
    top_k: TopK = 3,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line, for programs.")
    ] = False,
    address: Address = DEFAULT_ADDRESS,
    timeout_s: Timeout = 10.0,
) -> None:
    """Classifies image files and shows their most probable classes."""
    failed = False
    with Client(address, timeout_s=timeout_s) as client:
        for path in images:
            try:
                answer = client.classify(path, model=model, top_k=top_k)
            except ClientError as error:
                failed = True
                complain(error if str(path) in str(error) else f"{path}: {error}")
                continue
            if as_json:
                print(json.dumps({"path": str(path), **asdict(answer)}))
            else:
                _show(path, answer)
    if failed:
        raise typer.Exit(1)


def health(
    model: Annotated[str, typer.Option(help="Ask for this model alone.")] = "",
    address: Address = DEFAULT_ADDRESS,
    timeout_s: Timeout = 2.0,
) -> None:
    """Exits 0 if the server takes requests, 1 if not."""
    with Client(address, timeout_s=timeout_s) as client:
        answer = client.health(model)
    if not answer.ready:
        complain(f"{model or 'the server'} is not ready")
        raise typer.Exit(NOT_READY)
    print("ready")


def models(address: Address = DEFAULT_ADDRESS, timeout_s: Timeout = 10.0) -> None:
    """Lists the model versions in service."""
    table = Table("model", "version", "ready", "size", "classes", "backend", "device", "provider")
    with Client(address, timeout_s=timeout_s) as client:
        for model in client.models():
            table.add_row(
                model.name,
                str(model.version),
                "yes" if model.ready else "no",
                f"{model.height_px} x {model.width_px}",
                str(len(model.labels)),
                model.backend,
                model.device,
                model.provider,
            )
    Console().print(table)


def _show(path: Path, answer: Classification) -> None:
    classes = "  ".join(f"{score.label} {score.probability:.1%}" for score in answer.classes)
    print(f"{path}: {classes}  ({answer.model} version {answer.version})")

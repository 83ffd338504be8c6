"""`classify`, `health` and `models`: single calls to a server."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from convoy.client.cli.options import Address, Model, Timeout, TopK, complain
from convoy.client.client import Client
from convoy.client.connection import DEFAULT_ADDRESS
from convoy.client.errors import ClientError
from convoy.client.results import Classification

NOT_READY = 1


def classify(
    images: Annotated[list[Path], typer.Argument(help="Image files.", show_default=False)],
    *,
    model: Model = "",
    top_k: TopK = 3,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per line.")
    ] = False,
    address: Address = DEFAULT_ADDRESS,
    timeout_s: Timeout = 10.0,
) -> None:
    """Classify image files and show their most probable classes."""
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
    model: Annotated[str, typer.Option(help="Check this model only.")] = "",
    address: Address = DEFAULT_ADDRESS,
    timeout_s: Timeout = 2.0,
) -> None:
    """Exit with 0 if the server accepts requests, otherwise with 1."""
    with Client(address, timeout_s=timeout_s) as client:
        answer = client.health(model)
    if not answer.ready:
        restart = "" if answer.live else "; the server is not live: restart it"
        complain(f"{model or 'the server'} is not ready{restart}")
        raise typer.Exit(NOT_READY)
    print("ready")


def models(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per line, including the labels.")
    ] = False,
    address: Address = DEFAULT_ADDRESS,
    timeout_s: Timeout = 10.0,
) -> None:
    """List the model versions in service."""
    with Client(address, timeout_s=timeout_s) as client:
        found = client.models()
    if as_json:
        for model in found:
            print(json.dumps(asdict(model), ensure_ascii=False))
        return
    table = Table("model", "version", "ready", "size", "classes", "backend", "device", "provider")
    for model in found:
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

"""The command line of `convoy-export`."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from convoy.export import __version__, flags
from convoy.export.errors import InputError
from convoy.export.repository import model_in

if TYPE_CHECKING:
    from convoy.export.description import InputDescription
    from convoy.export.source import ModelSource

_log = logging.getLogger(__name__)

_DEFAULT_SIZE = "224"
DEFAULT_COMMAND = "publish"


class _PublishByDefault(TyperGroup):
    """Treats `convoy-export CHECKPOINT …` as `convoy-export publish CHECKPOINT …`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ours = {*self.commands, "--help", "--version", "--install-completion", "--show-completion"}
        return super().parse_args(
            ctx, args if args and args[0] in ours else [DEFAULT_COMMAND, *args]
        )


app = typer.Typer(
    cls=_PublishByDefault,
    help="Publish a trained model as a verified version of a model repository. "
    "A CHECKPOINT as the first word is short for 'publish CHECKPOINT'.",
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"convoy-export {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None: ...


@app.command(DEFAULT_COMMAND)
def publish(
    checkpoint: Annotated[
        Path,
        typer.Argument(exists=True, dir_okay=False, help="A checkpoint written by convoy-train."),
    ],
    *,
    name: flags.ServedName,
    model: Annotated[
        str | None,
        typer.Option(
            help="The factory of the net, if it is your own code. This "
            "runs: FILE.py:NAME or PACKAGE.MODULE:NAME."
        ),
    ] = None,
    repository: flags.Repository = "models",
    data: flags.Data = None,
    images: flags.Images = None,
    samples: flags.Samples = None,
    formats: flags.Formats = None,
    precisions: flags.Precisions = None,
    openvino: flags.OpenVino = None,
    script: flags.Script = False,
    abstain_below: flags.AbstainBelow = 0.0,
    sign_key: flags.SigningKey = None,
) -> None:
    """Export a checkpoint, prove every artifact and publish the next version of NAME.

    If any output differs by more than the tolerance, the export fails and nothing is published.
    """
    from convoy.export.source import from_checkpoint

    target = model_in(repository, name)
    source = from_checkpoint(checkpoint, model)
    if source.architecture_arguments.get("shared_blocks"):
        _log.warning(
            "all blocks share one batch norm (shared_blocks): expect less accuracy than in training"
        )
    _publish(
        source,
        target=target,
        data=data or (None if images else source.data.spec or None),
        images=images,
        samples=samples,
        formats=formats or (),
        precisions=precisions or (),
        openvino=openvino,
        script=script,
        abstain_below=abstain_below,
        sign_key=sign_key,
    )


@app.command()
def weights(
    file: Annotated[
        Path,
        typer.Argument(
            exists=True, dir_okay=False, help="A state_dict: .safetensors, or saved by torch.save."
        ),
    ],
    *,
    name: flags.ServedName,
    architecture: Annotated[
        str,
        typer.Option(
            help="A torchvision classifier, e.g. resnet18, timm:NAME, or a net of convoy-train."
        ),
    ],
    settings: flags.Settings = None,
    state_dict_key: flags.StateDictKey = None,
    strip_prefix: flags.StripPrefix = None,
    ema: flags.Ema = False,
    labels: flags.Labels = None,
    mean: flags.Mean = None,
    std: flags.Std = None,
    image_size_px: flags.ImageSize = None,
    resize_shorter_px: flags.ResizeShorter = None,
    interpolation: flags.Interpolation = None,
    antialias: flags.Antialias = None,
    decode: flags.Decoding = None,
    channel_order: flags.Channels = None,
    output: flags.Output = None,
    data: flags.ProofData = None,
    images: flags.Images = None,
    samples: flags.Samples = None,
    repository: flags.Repository = "models",
    formats: flags.Formats = None,
    precisions: flags.Precisions = None,
    openvino: flags.OpenVino = None,
    script: flags.Script = False,
    abstain_below: flags.AbstainBelow = 0.0,
    sign_key: flags.SigningKey = None,
) -> None:
    """Export weights that another program trained, with the same proof.

    For a timm net, the defaults of mean, std, size, crop and interpolation are the published ones.
    """
    from convoy.export.source import from_weights
    from convoy.training.weights import WeightsOptions

    described = _describe(
        labels=labels,
        mean=mean,
        std=std,
        image_size_px=image_size_px,
        resize_shorter_px=resize_shorter_px,
        interpolation=interpolation,
        antialias=antialias,
        decode=decode,
        channel_order=channel_order,
        output=output,
        data=data,
    )
    described = _published_input(architecture, described)
    if architecture and image_size_px is None and described.image_size_px is None:
        described = described.or_else(_describe(image_size_px=_DEFAULT_SIZE))
    target = model_in(repository, name)
    options = WeightsOptions(state_dict_key, strip_prefix, ema)
    source = from_weights(file, architecture, _arguments(settings), described, options)
    _publish(
        source,
        target=target,
        data=data,
        images=images,
        samples=samples,
        formats=formats or (),
        precisions=precisions or (),
        openvino=openvino,
        script=script,
        abstain_below=abstain_below,
        sign_key=sign_key,
    )


@app.command()
def module(
    factory: Annotated[
        str,
        typer.Argument(
            help="FILE.py:NAME or PACKAGE.MODULE:NAME of a class or function that returns a "
            "torch.nn.Module, or timm:NAME. Its code runs during the export, never in the server."
        ),
    ],
    *,
    name: flags.ServedName,
    weights: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="A state_dict: .safetensors, or saved by torch.save. By default the weights that "
            "the factory sets.",
        ),
    ] = None,
    settings: flags.Settings = None,
    state_dict_key: flags.StateDictKey = None,
    strip_prefix: flags.StripPrefix = None,
    ema: flags.Ema = False,
    labels: flags.Labels = None,
    mean: flags.Mean = None,
    std: flags.Std = None,
    image_size_px: flags.ImageSize = None,
    resize_shorter_px: flags.ResizeShorter = None,
    interpolation: flags.Interpolation = None,
    antialias: flags.Antialias = None,
    decode: flags.Decoding = None,
    channel_order: flags.Channels = None,
    output: flags.Output = None,
    data: flags.ProofData = None,
    images: flags.Images = None,
    samples: flags.Samples = None,
    repository: flags.Repository = "models",
    formats: flags.Formats = None,
    precisions: flags.Precisions = None,
    openvino: flags.OpenVino = None,
    script: flags.Script = False,
    abstain_below: flags.AbstainBelow = 0.0,
    sign_key: flags.SigningKey = None,
) -> None:
    """Export your own net, which a factory in your code creates, with the same proof."""
    from convoy.export.source import from_weights
    from convoy.training.weights import WeightsOptions

    described = _describe(
        labels=labels,
        mean=mean,
        std=std,
        image_size_px=image_size_px,
        resize_shorter_px=resize_shorter_px,
        interpolation=interpolation,
        antialias=antialias,
        decode=decode,
        channel_order=channel_order,
        output=output,
        data=data,
    )
    described = _published_input(factory, described)
    target = model_in(repository, name)
    options = WeightsOptions(state_dict_key, strip_prefix, ema)
    source = from_weights(weights, factory, _arguments(settings), described, options)
    _publish(
        source,
        target=target,
        data=data,
        images=images,
        samples=samples,
        formats=formats or (),
        precisions=precisions or (),
        openvino=openvino,
        script=script,
        abstain_below=abstain_below,
        sign_key=sign_key,
    )


@app.command("import")
def import_foreign(
    path: Annotated[
        Path,
        typer.Argument(
            exists=True,
            help="ONNX, TorchScript or torch.export's .pt2; a Hugging Face folder; a Triton model "
            "folder; a TorchServe .mar with the image_classifier handler.",
        ),
    ],
    *,
    name: flags.ServedName,
    labels: flags.Labels = None,
    mean: flags.Mean = None,
    std: flags.Std = None,
    image_size_px: flags.ImageSize = None,
    resize_shorter_px: flags.ResizeShorter = None,
    interpolation: flags.Interpolation = None,
    antialias: flags.Antialias = None,
    decode: flags.Decoding = None,
    channel_order: flags.Channels = None,
    output: flags.Output = None,
    layout: flags.InputLayout = None,
    output_name: flags.OutputName = None,
    data: flags.ProofData = None,
    images: flags.Images = None,
    samples: flags.Samples = None,
    repository: flags.Repository = "models",
    formats: flags.Formats = None,
    precisions: flags.Precisions = None,
    openvino: flags.OpenVino = None,
    abstain_below: flags.AbstainBelow = 0.0,
    sign_key: flags.SigningKey = None,
) -> None:
    """Publish a model that another tool wrote, with the same proof.

    Hugging Face folders, Triton folders and .mar archives contain some of these values; flags take
    precedence. An ONNX file is published as ONNX, TorchScript as TorchScript.
    """
    from convoy.export.foreign import read_foreign

    described = _describe(
        labels=labels,
        mean=mean,
        std=std,
        image_size_px=image_size_px,
        resize_shorter_px=resize_shorter_px,
        interpolation=interpolation,
        antialias=antialias,
        decode=decode,
        channel_order=channel_order,
        output=output,
        layout=layout,
        output_name=output_name,
        data=data,
    )
    target = model_in(repository, name)
    _publish(
        read_foreign(path, described),
        target=target,
        data=data,
        images=images,
        samples=samples,
        formats=formats or (),
        precisions=precisions or (),
        openvino=openvino,
        abstain_below=abstain_below,
        sign_key=sign_key,
    )


@app.command()
def check(
    path: Annotated[Path, typer.Argument(exists=True, help="A file or folder with a model.")],
) -> None:
    """Identify a file, list what is missing, and print the command that would publish it."""
    from convoy.export.inspection import inspect

    for line in inspect(path):
        typer.echo(line)


def _describe(
    *,
    labels: Path | None = None,
    image_size_px: str | None = None,
    interpolation: str | None = None,
    decode: str | None = None,
    **known: Any,
) -> "InputDescription":
    from convoy.export.description import InputDescription, read_labels

    if interpolation not in (None, "bilinear", "bicubic"):
        raise InputError(f"interpolation: expected bilinear or bicubic, got {interpolation!r}")
    if decode not in (None, "exact", "scaled"):
        raise InputError(f"decode: expected exact or scaled, got {decode!r}")
    return InputDescription(
        labels=read_labels(labels) if labels else None,
        image_size_px=flags.parse_size(image_size_px),
        interpolation=interpolation,  # type: ignore[arg-type]
        decode=decode,  # type: ignore[arg-type]
        **known,
    )


def _published_input(name: str, described: "InputDescription") -> "InputDescription":
    """Return a description, completed with timm's published input if it is a timm net."""
    if not name.startswith("timm:"):
        return described
    from convoy.export.source import describe_timm

    return described.or_else(describe_timm(name, described.image_size_px))


def _arguments(settings: list[str] | None) -> dict[str, object]:
    from convoy.export.source import parse_arguments

    return parse_arguments(settings or [])


def _publish(source: "ModelSource", **wanted: Any) -> None:
    from convoy.export.publisher import Order, publish_source
    from convoy.export.tables import layers_line, parity_table

    with Console(stderr=True).status("") as status:
        # Shown on a terminal only.
        order = Order(**wanted, progress=lambda step: status.update(f"{step} …"))
        published = publish_source(source, order)
    manifest = published.manifest
    title = f"{manifest.name} version {manifest.version} against the eager net"
    Console().print(parity_table(title, published.parities, published.openvino))
    if published.int8_layers:
        Console().print(f"model.int8.onnx: {layers_line(published.int8_layers)}", highlight=False)
    Console().print(f"published {published.path}", highlight=False, soft_wrap=True)


@app.command()
def verify(
    version: flags.VersionFolder,
    *,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Verify against this checkpoint's net on real data, not only golden samples.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The factory of the checkpoint's net, if it is your own code."),
    ] = None,
    data: flags.Data = None,
    public_key: Annotated[
        Path | None, typer.Option(help="Require a signature by this Ed25519 key (PEM).")
    ] = None,
) -> None:
    """Verify a published version again: digests, signature, and the outputs of every artifact."""
    from convoy.export.reference import expect
    from convoy.export.samples import load_samples
    from convoy.export.signing import check_signature, read_public_key
    from convoy.export.source import from_checkpoint
    from convoy.export.tables import parity_table
    from convoy.export.versions import check_origin, golden_expectation, local_folder, read_version
    from convoy.export.versions import verify as prove_again

    folder = local_folder(version)
    if public_key:
        check_signature(folder, read_public_key(public_key))
    found = read_version(folder)
    if checkpoint:
        source = from_checkpoint(checkpoint, model)
        check_origin(found, source)
        spec = data or source.data.spec
        described = source.data
        proof_data = load_samples(
            spec,
            described.classes,
            described.preprocessing,
            shares=described.shares if spec == described.spec else None,
        )
        expected = expect(source, proof_data)
    else:
        expected = golden_expectation(found)
    title = f"{found.manifest.name} version {found.manifest.version}, proved again"
    Console().print(parity_table(title, prove_again(found, expected)))


@app.command()
def diff(
    before: flags.VersionFolder, after: flags.VersionFolder, *, data: flags.Data = None
) -> None:
    """Compare two versions: accuracy, agreement, speed, size, and the images that changed."""
    from convoy.export.manifest import preprocessing_of
    from convoy.export.samples import load_samples
    from convoy.export.tables import comparison_table
    from convoy.export.versions import compare, local_folder, read_version

    old, new = read_version(local_folder(before)), read_version(local_folder(after))
    manifest = new.manifest
    spec = data or manifest.provenance.data
    samples = load_samples(spec, manifest.labels, preprocessing_of(manifest))
    Console().print(comparison_table(old.manifest, compare(old, new, samples.validation)))


@app.command()
def show(
    version: flags.VersionFolder,
    *,
    state_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder where a server records the verdicts of canaries (its --state-dir). By "
            "default it records them in the repository.",
            file_okay=False,
        ),
    ] = None,
) -> None:
    """Describe a published version, and show the verdict of its canary.

    The command first compares the files of the version with its manifest.
    """
    from convoy.export.repository import read_canary_record
    from convoy.export.tables import canary_line, version_table
    from convoy.export.versions import local_folder, read_version

    folder = local_folder(version)
    found = read_version(folder)
    table = version_table(found.manifest, found.int8_layers())
    if record := read_canary_record(folder, state_dir or folder.parents[1]):
        table.add_row("canary", canary_line(record, found.manifest_sha256))
    Console().print(table)


@app.command("list")
def list_versions(name: flags.Name, *, repository: flags.Repository = "models") -> None:
    """List the published versions of NAME, one number a line."""
    for version in model_in(repository, name).versions():
        typer.echo(version)


@app.command()
def promote(
    name: flags.Name,
    version: Annotated[int, typer.Argument(help="Number of a published version.")],
    *,
    repository: flags.Repository = "models",
) -> None:
    """Make servers serve VERSION of NAME, even if newer versions are published."""
    from convoy.export.repository import promote as write_policy

    policy = write_policy(model_in(repository, name), version)
    Console().print(f"{name}: servers will serve version {policy.version}")


@app.command()
def rollback(name: flags.Name, *, repository: flags.Repository = "models") -> None:
    """Undo the last promotion of NAME."""
    from convoy.export.repository import rollback as write_policy

    policy = write_policy(model_in(repository, name))
    Console().print(f"{name}: servers will serve version {policy.version} again")

"""The command line of `convoy-export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from export.errors import InputError, one_line
from export.formats import ArtefactFormat, Precision, Variant, choose_variants
from export.publishing import ModelFolder

if TYPE_CHECKING:
    from export.source import ModelSource

DEFAULT_COMMAND = "publish"


class _PublishByDefault(TyperGroup):
    """Takes `convoy-export CHECKPOINT …` for `convoy-export publish CHECKPOINT …`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ours = {*self.commands, "--help", "--install-completion", "--show-completion"}
        return super().parse_args(
            ctx, args if args and args[0] in ours else [DEFAULT_COMMAND, *args]
        )


app = typer.Typer(
    cls=_PublishByDefault,
    help="Turns a checkpoint into a proved model repository version. "
    "A CHECKPOINT as the first word is short for 'publish CHECKPOINT'.",
    pretty_exceptions_enable=False,
)

Repository = Annotated[
    Path, typer.Option(help="The model repository; versions appear in REPOSITORY/NAME/.")
]
Name = Annotated[str, typer.Argument(help="Name the model is served under.")]
VersionFolder = Annotated[
    Path,
    typer.Argument(exists=True, file_okay=False, help="A published version, as models/digits/3."),
]
Data = Annotated[
    str | None,
    typer.Option(help="Data with true classes; by default what the model was trained on."),
]


Formats = Annotated[
    list[ArtefactFormat], typer.Option("--format", help="Artefact to write; repeat for more.")
]
DEFAULT_FORMATS = [ArtefactFormat.ONNX, ArtefactFormat.TORCHSCRIPT]
Precisions = Annotated[
    list[Precision],
    typer.Option(
        "--precision",
        help="Write further artefacts beside the float32 ones: fp16 and bf16 (not ONNX) for CUDA, "
        "whose proof takes minutes on a CPU without such arithmetic; int8 for ONNX on a CPU; "
        "repeat for more.",
    ),
]
DEFAULT_PRECISIONS = [Precision.FP32]
Script = Annotated[
    bool,
    typer.Option(
        "--script",
        help="Compile TorchScript from the source code, with control flow, instead of tracing.",
    ),
]
SigningKey = Annotated[
    Path | None,
    typer.Option(help="Ed25519 private key (PEM) to sign with; `verify` can demand it."),
]
AbstainBelow = Annotated[
    float,
    typer.Option(
        min=0,
        max=1,
        help="Largest probability below which a reply says that the model had better not answer; "
        "0 for never.",
    ),
]
ServedName = Annotated[str, typer.Option(help="Name the model is served under.")]
Triple = tuple[float, float, float]
Labels = Annotated[
    Path,
    typer.Option(exists=True, dir_okay=False, help="Class names in the net's order, a line each."),
]
Mean = Annotated[Triple, typer.Option(help="Of red, green and blue, for pixels from 0 to 1.")]
Std = Annotated[Triple, typer.Option(help="As the mean; a pixel becomes (x - mean) / std.")]
ProofData = Annotated[str, typer.Option(help="Data with these classes to prove the artefacts on.")]
ResizeShorter = Annotated[
    int, typer.Option(min=0, help="Shorter side before the crop; 0 resizes without cropping.")
]


@app.command(DEFAULT_COMMAND)
def publish(
    checkpoint: Annotated[
        Path,
        typer.Argument(exists=True, dir_okay=False, help="A checkpoint written by convoy-train."),
    ],
    *,
    name: ServedName,
    repository: Repository = Path("models"),
    data: Data = None,
    formats: Formats = DEFAULT_FORMATS,
    precisions: Precisions = DEFAULT_PRECISIONS,
    script: Script = False,
    abstain_below: AbstainBelow = 0.0,
    sign_key: SigningKey = None,
) -> None:
    """Exports a checkpoint, proves every artefact and publishes the next version of NAME.

    An artefact that differs from the eager net by more than its tolerance publishes nothing.
    """
    from export.source import from_checkpoint

    variants = choose_variants(formats, precisions)
    order = _Order(ModelFolder(repository, name), variants, script, abstain_below, sign_key)
    source = from_checkpoint(checkpoint)
    if source.architecture_arguments.get("shared_blocks"):
        message = (
            "one batch norm serves all depths (shared_blocks): expect less accuracy than trained"
        )
        typer.echo(f"convoy-export: warning: {message}", err=True)
    _publish(source, data, order)


@app.command()
def weights(
    file: Annotated[
        Path,
        typer.Argument(
            exists=True, dir_okay=False, help="A state_dict: .safetensors, or saved by torch.save."
        ),
    ],
    *,
    name: ServedName,
    architecture: Annotated[
        str, typer.Option(help="A torchvision classifier, e.g. resnet18, or a net of convoy-train.")
    ],
    labels: Labels,
    mean: Mean,
    std: Std,
    data: ProofData,
    image_size_px: Annotated[int, typer.Option(min=1, help="Height and width of the input.")] = 224,
    resize_shorter_px: ResizeShorter = 0,
    repository: Repository = Path("models"),
    formats: Formats = DEFAULT_FORMATS,
    precisions: Precisions = DEFAULT_PRECISIONS,
    script: Script = False,
    abstain_below: AbstainBelow = 0.0,
    sign_key: SigningKey = None,
) -> None:
    """Exports weights that something else trained, with the same proof."""
    from export.source import from_weights
    from training.checkpoints import DataDescription
    from training.data import Preprocessing

    variants = choose_variants(formats, precisions)
    order = _Order(ModelFolder(repository, name), variants, script, abstain_below, sign_key)
    classes = _read_labels(labels)
    steps = Preprocessing(image_size_px, image_size_px, resize_shorter_px)
    arguments = {"n_classes": len(classes), "image_size": image_size_px}
    described = DataDescription(data, classes, mean, std, steps)
    _publish(from_weights(file, architecture, arguments, described), data, order)


@app.command("import")
def import_onnx(
    file: Annotated[
        Path,
        typer.Argument(
            exists=True,
            dir_okay=False,
            help="An ONNX classifier: normalised float32 [N, 3, H, W] in, logits [N, K] out.",
        ),
    ],
    *,
    name: ServedName,
    labels: Labels,
    mean: Mean,
    std: Std,
    data: ProofData,
    resize_shorter_px: ResizeShorter = 0,
    repository: Repository = Path("models"),
    precisions: Precisions = DEFAULT_PRECISIONS,
    abstain_below: AbstainBelow = 0.0,
    sign_key: SigningKey = None,
) -> None:
    """Admits an ONNX file made elsewhere, with the same proof, as ONNX only.

    Weights outside the file and operators that are not ONNX's own are refused.
    """
    from export.onnx_import import from_onnx, image_size_px
    from training.checkpoints import DataDescription
    from training.data import Preprocessing

    variants = choose_variants([ArtefactFormat.ONNX], precisions)
    if any(variant.precision is Precision.FP16 for variant in variants):
        raise InputError("precision: expected fp32 or int8 for an imported graph, got fp16")
    order = _Order(ModelFolder(repository, name), variants, False, abstain_below, sign_key)
    steps = Preprocessing(*image_size_px(file), resize_shorter_px)
    described = DataDescription(data, _read_labels(labels), mean, std, steps)
    _publish(from_onnx(file, described), data, order)


def _read_labels(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"labels {path}: expected UTF-8 text: {one_line(error)}") from error
    return tuple(line.strip() for line in lines if line.strip())


@dataclass(frozen=True, slots=True)
class _Order:
    """What to write, and where."""

    target: ModelFolder
    variants: list[Variant]
    script: bool
    abstain_below: float
    sign_key: Path | None


def _publish(source: "ModelSource", data: str | None, order: _Order) -> None:
    from export.pipeline import ExportOptions, export
    from export.samples import load_samples
    from export.signing import read_private_key
    from export.tables import parity_table

    key = read_private_key(order.sign_key) if order.sign_key else None
    options = ExportOptions(order.variants, order.script, order.abstain_below, key)
    spec = data or source.data.spec
    proof_data = load_samples(spec, source.data.classes, source.data.preprocessing)
    published = export(source, proof_data, order.target, options)
    manifest = published.manifest
    title = f"{manifest.name} version {manifest.version} against the eager net"
    Console().print(parity_table(title, published.parities))
    Console().print(f"published {published.path}", highlight=False, soft_wrap=True)


@app.command()
def verify(
    version: VersionFolder,
    *,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Prove against this checkpoint's net on real data, not on golden samples only.",
        ),
    ] = None,
    data: Data = None,
    public_key: Annotated[
        Path | None, typer.Option(help="Demand a signature by this Ed25519 key (PEM).")
    ] = None,
) -> None:
    """Proves a published version again: digests, signature, and every artefact's answers."""
    from export.proof import expect
    from export.samples import load_samples
    from export.signing import check_signature, read_public_key
    from export.source import from_checkpoint
    from export.tables import parity_table
    from export.versions import check_origin, golden_expectation, read_version
    from export.versions import verify as prove_again

    if public_key:
        check_signature(version, read_public_key(public_key))
    found = read_version(version)
    if checkpoint:
        source = from_checkpoint(checkpoint)
        check_origin(found, source)
        spec = data or source.data.spec
        proof_data = load_samples(spec, source.data.classes, source.data.preprocessing)
        expected = expect(source, proof_data)
    else:
        expected = golden_expectation(found)
    title = f"{found.manifest.name} version {found.manifest.version}, proved again"
    Console().print(parity_table(title, prove_again(found, expected)))


@app.command()
def diff(before: VersionFolder, after: VersionFolder, *, data: Data = None) -> None:
    """Compares two versions: accuracy, agreement, speed, size, and the images that changed."""
    from export.comparison import compare
    from export.manifest import preprocessing_of
    from export.samples import load_samples
    from export.tables import comparison_table
    from export.versions import read_version

    old, new = read_version(before), read_version(after)
    manifest = new.manifest
    spec = data or manifest.provenance.data
    samples = load_samples(spec, manifest.labels, preprocessing_of(manifest))
    Console().print(comparison_table(old.manifest, compare(old, new, samples.validation)))


@app.command()
def show(version: VersionFolder) -> None:
    """Shows what a published version says about itself, after checking its files."""
    from export.tables import version_table
    from export.versions import read_version

    Console().print(version_table(read_version(version).manifest))


@app.command()
def promote(
    name: Name,
    version: Annotated[int, typer.Argument(help="Number of a published version.")],
    *,
    repository: Repository = Path("models"),
) -> None:
    """Has VERSION of NAME served, whatever is published later."""
    from export.policy import promote as write_policy

    policy = write_policy(ModelFolder(repository, name), version)
    Console().print(f"{name}: version {policy.version} is to be served")


@app.command()
def rollback(name: Name, *, repository: Repository = Path("models")) -> None:
    """Takes the last promotion of NAME back."""
    from export.policy import rollback as write_policy

    policy = write_policy(ModelFolder(repository, name))
    Console().print(f"{name}: version {policy.version} is to be served again")

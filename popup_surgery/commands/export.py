from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .shared import Base, File, a_file, busy, new_file, show, size

if TYPE_CHECKING:
    from ..experiment.export import Exported
    from ..exporting.packing import PackedLayer


def run(
    artifact: Annotated[File, a_file("A popup artifact.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="File to write; its suffix, .safetensors, .onnx or .pt2, decides.")
    ],
    base: Base = None,
    input_size: Annotated[
        tuple[int, int, int] | None,
        typer.Option(help="Channels, height and width of the images, if the file does not say them."),
    ] = None,
    packed: Annotated[
        bool, typer.Option("--packed", help="Weights of −c, 0, +c at 2 bits or int8 (.onnx); prints what that did.")
    ] = False,
    fast: Annotated[
        bool, typer.Option("--fast", help="Packed products as int8: faster, four times the bytes.")
    ] = False,
    rounded: Annotated[bool, typer.Option("--rounded", help="Also pack other weights, rounded to int8.")] = False,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the data set, for --packed: sets its ranges and measures accuracy.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Write an artifact's network for timm (.safetensors), ONNX Runtime (.onnx) or torch.export.load (.pt2).

    \b
    $ popup-surgery export digits.popup.safetensors -o digits.onnx
    wrote digits.onnx, 98 kB: popup_surgery/conv2, differs by 4e-07 of the largest output
    """
    new_file(output, force, [".safetensors", ".onnx", ".pt2"], reads=[artifact, base, data_dir])
    with busy("exporting"):
        from ..experiment.export import export, random_images

        example = None if input_size is None else random_images(input_size)
        done = export(
            artifact, output, base=base, example=example, packed=packed, fast=fast, rounded=rounded, data_dir=data_dir
        )
    if done.layers:
        _show_layers(done)
    if done.tensors is not None:
        show(f"wrote {output}, {size(output)}: {done.tensors} tensors of {done.network}")
    else:
        show(f"wrote {output}, {size(output)}: {done.network}, differs by {done.difference:.0e} of the largest output")


def _show_layers(done: "Exported") -> None:
    """Show what became of each kind of layer, and what packing did to the outputs."""
    kinds: dict[tuple[bool, str], list[PackedLayer]] = {}
    for layer in done.layers:
        kinds.setdefault((not layer.packed, layer.how), []).append(layer)
    table = Table("layers", "", "bytes", "before", box=None, padding=(0, 2, 0, 0))
    for (left, how), layers in sorted(kinds.items()):
        before, after = sum(layer.before for layer in layers), sum(layer.after for layer in layers)
        table.add_row(str(len(layers)), f"float32: {how}" if left else how, f"{after:,}", f"{before:,}")
    show(table)
    if done.time is not None:
        show(f"takes {done.time:.2f} × the time of the float32 file on this machine, one input at a time")
    if done.accuracy is not None and done.packed_accuracy is not None and done.same is not None:
        show(
            f"accuracy {100 * done.packed_accuracy:.2f} %, of the network {100 * done.accuracy:.2f} %; the same first "
            f"class on {100 * done.same:.2f} % of the validation images"
        )

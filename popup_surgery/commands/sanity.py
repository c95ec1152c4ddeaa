from pathlib import Path
from typing import Annotated

import typer

from ..hub import Address, is_address
from ..plots import PICTURES
from .shared import Base, File, a_file, busy, new_file, progress, show


def run(
    artifact: Annotated[File, a_file("A popup artifact.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="data.key=value, in place of the value in the file; repeatable.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the data set.")] = None,
    base: Base = None,
    repeats: Annotated[
        int, typer.Option(min=1, help="Number of other seeds, and of shuffles. Pretrained weights have no other seeds.")
    ] = 5,
    value: Annotated[
        list[float] | None, typer.Option(help="A value that all weights share; repeatable; default: ±0.5, ±1 and ±2.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Picture to write; default: beside the artifact, or here.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace an existing picture.")] = False,
) -> None:
    """Measure what an artifact's accuracy owes to weights, mask and statistics; print and write a table and a picture.

    \b
    $ popup-surgery sanity digits.popup.safetensors
    network            accuracy
    as it is           99.16 %
    other seeds (5)    10.97 ± 4.55 %
    mask shuffled (5)  10.31 ± 2.50 %
    mask inverted      5.85 %
    all weights −2     7.52 %
    all weights −1     7.52 %
    all weights −0.5   7.52 %
    all weights 0.5    8.64 %
    all weights 1      8.64 %
    all weights 2      8.64 %
    359 validation images of digits; chance is 10.00 %
    wrote digits.sanity.png and digits.sanity.json, which push puts into the model card
    """
    file = Path(Address.parse(str(artifact)).name) if is_address(artifact) else Path(artifact)
    name = file.name.partition(".")[0]
    picture = output or file.with_name(f"{name}.sanity.png")
    table = picture.with_suffix(".json")
    new_file(picture, force, PICTURES, reads=[artifact, base, data_dir])
    new_file(table, force, reads=[artifact, base, data_dir])
    with busy("loading"):
        from ..analysis.sanity import VALUES, sanity
        from ..artifact import Artifact
        from ..experiment.evaluate import recorded_data
        from ..plots import draw_sanity
        from ..sharing.sanity_table import write_sanity

        opened = Artifact.open(artifact)
        data = recorded_data(opened, set_ or [])
        if data.root is not None:
            new_file(picture, force, reads=[Path(data.root)])
            new_file(table, force, reads=[Path(data.root)])
    values = value or VALUES
    found = sanity(opened, data=data, data_dir=data_dir, base=base, repeats=repeats, values=values, progress=progress)
    draw_sanity(picture, name, found.groups(), found.chance)
    write_sanity(table, opened.manifest, found.rows(), found.notes())
    use = "" if is_address(artifact) else ", which push puts into the model card"
    show(str(found), f"wrote {picture} and {table}{use}")

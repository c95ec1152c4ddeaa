from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .shared import busy, new_file, show, size


class Scope(StrEnum):
    layer = "layer"
    global_ = "global"


class Rest(StrEnum):
    frozen = "frozen"
    train = "train"


def run(
    arch: Annotated[str, typer.Argument(help="A network: resnet101, timm/vit_tiny_patch16_224, torchvision/…, conv4.")],
    k: Annotated[
        float | None, typer.Option(help="Share of each layer's weights that is kept, in (0, 1]; 0.3 if not given.")
    ] = None,
    scheme: Annotated[
        str, typer.Option(help="Weight scheme; pretrained keeps the library's weights.")
    ] = "signed_kaiming_constant",
    weights: Annotated[str | None, typer.Option(help="For pretrained: a tag of the library's, or a file.")] = None,
    scaled: Annotated[bool | None, typer.Option(help="Widen the weights by √(1/k), as if not given.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and scores, 0 to 2**64 - 1.")] = 0,
    learner: Annotated[str, typer.Option(help="How the mask is learnt.")] = "edge_popup",
    scope: Annotated[Scope, typer.Option(help="Rank each layer by itself, or all together.")] = Scope.layer,
    others: Annotated[Rest, typer.Option(help="What becomes of all that is not masked.")] = Rest.frozen,
    norm: Annotated[Rest, typer.Option(help="What becomes of the scales and biases of norms.")] = Rest.frozen,
    include: Annotated[list[str] | None, typer.Option(help="Glob pattern of layers to convert; repeatable.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Glob pattern of layers to leave; repeatable.")] = None,
    num_classes: Annotated[int | None, typer.Option(help="Outputs of the network.")] = None,
    in_chans: Annotated[int | None, typer.Option(help="Channels of its images.")] = None,
    img_size: Annotated[int | None, typer.Option(help="Side of its images, for networks that ask for it.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File; <arch>.popup.safetensors if not given.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Print the whole plan and write nothing.")] = False,
    force: Annotated[bool, typer.Option(help="Replace a file that is there.")] = False,
) -> None:
    """Convert a network and write it, untrained, as a file of a seed and one bit per weight.

    \b
    $ popup-surgery convert conv4 --k 0.5 --seed 7
    7 layers masked, 2,425,024 weights, 1,212,512 kept (50.0%)
    0 tensors not masked, 0 parameters; 100.00% of all parameters are masked
    signed_kaiming_constant, scaled, seed 7, edge_popup, ranked layer by layer
    wrote conv4.popup.safetensors, 307 kB
    """
    file = output or Path(f"{arch.rsplit('/', 1)[-1]}.popup.safetensors")
    if not dry_run:
        new_file(file, force)
    with busy(f"converting {arch}"):
        from ..artifact import save
        from ..errors import ConversionError
        from ..masking.convert import convert
        from ..masking.planning import plan
        from ..models.build import build, build_meta
        from ..models.libraries import architecture_of
        from ..weights import PRETRAINED

        given: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans, "img_size": img_size}
        kwargs = {key: value for key, value in given.items() if value is not None}
        settings: dict[str, Any] = {"scheme": scheme, "seed": seed, "learner": learner}
        settings |= {} if scaled is None else {"scaled": scaled}
        settings |= {"scope": scope.value, "include": include or None, "exclude": exclude or None}
        settings |= {"others": others.value, "norm": norm.value}
        if weights is not None and scheme != PRETRAINED:
            raise ConversionError(f"--weights {weights} is for --scheme {PRETRAINED}; {scheme} draws its own")
        architecture = architecture_of(arch, **kwargs)
        model = build(arch, pretrained=weights or True, **kwargs) if scheme == PRETRAINED else None
        planned = plan(model or build_meta(architecture), k, **settings)
        if not dry_run:
            save(convert(model or architecture, k, **settings), file)
    if dry_run:
        show(str(planned))
    else:
        show(planned.totals())
        show(f"wrote {file}, {size(file)}")

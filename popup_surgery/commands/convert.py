from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConversionError, PopupError
from ..masking.settings import DEFAULT, OF_PRETRAINED, RULES
from .shared import EncodingOption, busy, new_file, refuse_file, show, size

if TYPE_CHECKING:
    from ..masking.plan import Plan


class Scope(StrEnum):
    layer = "layer"
    global_ = "global"


class Rest(StrEnum):
    frozen = "frozen"
    train = "train"


LearnerOption = Annotated[
    str | None,
    typer.Option(
        help=f"How the mask is learned; default: {DEFAULT.learner.value}, or {OF_PRETRAINED} with --scheme pretrained "
        "and no --k."
    ),
]
IncludeOption = Annotated[list[str] | None, typer.Option(help="Glob pattern of layers to convert; repeatable.")]
ExcludeOption = Annotated[
    list[str] | None, typer.Option(help="Glob pattern of layers to leave as they are; repeatable.")
]
TrainOption = Annotated[
    list[str] | None,
    typer.Option(help="Glob pattern of layers and parameters to train and store, not to mask; repeatable."),
]
PatternOption = Annotated[
    str | None,
    typer.Option(help="Such as 2:4, which keeps 2 of each 4 neighbours along the input channels, in place of --k."),
]
RuleOption = Annotated[
    str | None,
    typer.Option(help=f"Spread --k over the layers by a rule: {', '.join(RULES)}; default: the same share in each."),
]
FloorOption = Annotated[
    float | None,
    typer.Option(help="With --scope global: what each layer keeps at least, a share below 1 or a number of weights."),
]
FixedOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FATE=SHARE",
        help="dropped=SHARE or kept=SHARE of each layer's weights, which the seed fixes before training; repeatable.",
    ),
]
ImgSizeOption = Annotated[int | None, typer.Option(help="Height and width of its images, for networks that need it.")]
OutputOption = Annotated[
    Path | None, typer.Option("-o", "--output", help="File to write; default: <arch>.popup.safetensors.")
]
SCOPE, OTHERS, NORM = Scope(DEFAULT.scope.value), Rest(DEFAULT.others.value), Rest(DEFAULT.norm.value)


def run(
    arch: Annotated[str, typer.Argument(help="A network: resnet101, timm/vit_tiny_patch16_224, torchvision/…, conv4.")],
    k: Annotated[
        float | None,
        typer.Option(help=f"Share of each layer's weights that is kept, in (0, 1]; default: {DEFAULT.k}."),
    ] = None,
    pattern: PatternOption = None,
    k_rule: RuleOption = None,
    scheme: Annotated[
        str, typer.Option(help="Distribution of the random weights; pretrained keeps the library's weights.")
    ] = DEFAULT.scheme.value,
    weights: Annotated[
        str | None, typer.Option(help="With --scheme pretrained: a tag of the library, or a file of weights.")
    ] = None,
    scaled: Annotated[bool | None, typer.Option(help="Multiply the weights by √(1/k); default: on.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and scores, 0 to 2**64 - 1.")] = DEFAULT.seed.value,
    learner: LearnerOption = None,
    scope: Annotated[
        Scope, typer.Option(help="Rank the scores of each layer by itself, or of all layers together.")
    ] = SCOPE,
    floor: FloorOption = None,
    fixed: FixedOption = None,
    others: Annotated[Rest, typer.Option(help="Freeze or train whatever is not masked.")] = OTHERS,
    norm: Annotated[Rest, typer.Option(help="Freeze or train the scales and biases of norms.")] = NORM,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    train: TrainOption = None,
    num_classes: Annotated[int | None, typer.Option(help="Number of the network's outputs.")] = None,
    in_chans: Annotated[int | None, typer.Option(help="Number of channels of its images.")] = None,
    img_size: ImgSizeOption = None,
    encoding: EncodingOption = "bitpack",
    output: OutputOption = None,
    dry_run: Annotated[bool, typer.Option(help="Print the whole plan and write nothing.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="With --dry-run: print the plan as JSON.")] = False,
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Convert a network and write it, untrained, as a file of a seed and one bit per weight.

    \b
    $ popup-surgery convert conv4 --k 0.5 --seed 7
    7 layers masked, 2,425,024 weights, 1,212,512 kept (50.0%)
    0 tensors not masked, 0 parameters; 100.00% of all parameters are masked
    signed_kaiming_constant, scaled, seed 7, edge_popup, ranked layer by layer
    wrote conv4.popup.safetensors, 307 kB
    """
    refuse_file(arch, "network's name")
    if json_ and not dry_run:
        raise PopupError("--json prints the plan; add --dry-run")
    file = output or Path(f"{arch.rsplit('/', 1)[-1]}.popup.safetensors")
    if not dry_run:
        new_file(file, force, ("", ".safetensors"), reads=[None if weights is None else Path(weights)])
    given: dict[str, Any] = {
        "k": k if k_rule is None else {"rule": k_rule, "k": DEFAULT.k.value if k is None else k},
        "pattern": pattern, "scheme": scheme, "scaled": scaled, "seed": seed, "learner": learner,
        "scope": scope.value, "floor": floor, "include": include or None, "exclude": exclude or None,
        "others": others.value, "norm": norm.value, "train": train or None,
        "fixed": _fixed(fixed) if fixed else None,
    }  # fmt: skip
    kwargs = {"num_classes": num_classes, "in_chans": in_chans, "img_size": img_size}
    with busy(f"converting {arch}"):
        to = None if dry_run else file
        planned = _convert(arch, _without_none(kwargs), weights, _without_none(given), to, encoding)
    if json_:
        print(planned.to_json(indent=2))
    elif dry_run:
        show(str(planned))
    else:
        show(planned.totals(), f"wrote {file}, {size(file)}")


def _fixed(texts: list[str]) -> dict[str, float]:
    """Split texts such as `dropped=0.5` and `kept=0.1`."""
    found: dict[str, float] = {}
    for text in texts:
        name, _, share = text.partition("=")
        if name in found:
            raise PopupError(f"--fixed {text!r}; expected {name} once")
        try:
            found[name] = float(share)
        except ValueError:
            raise PopupError(f"--fixed {text!r}; expected dropped=SHARE or kept=SHARE, such as dropped=0.5") from None
    return found


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _convert(
    arch: str, kwargs: dict[str, Any], weights: str | None, given: dict[str, Any], file: Path | None, encoding: str
) -> "Plan":
    """Convert a network and write it to `file`; without `file` only plan. Returns the plan."""
    from ..artifact import save
    from ..codecs import get_codec
    from ..masking.convert import convert_as_given, seeded
    from ..masking.planning import plan_as_given
    from ..models.build import build, build_meta
    from ..models.libraries import architecture_and_tag
    from ..weights import PRETRAINED
    from ..weights.streams import check_seed

    if get_codec(encoding).needs_pattern and "pattern" not in given:
        raise ConversionError(f"--encoding {encoding} is for masks of a pattern; add one, such as --pattern 2:4")
    scheme = given["scheme"]
    if weights is not None and scheme != PRETRAINED:
        raise ConversionError(
            f"--weights {weights} needs --scheme {PRETRAINED}; the scheme {scheme} draws random weights"
        )
    architecture, tag = architecture_and_tag(arch, **kwargs)
    if tag and scheme != PRETRAINED:
        name = f"{architecture.library}/{architecture.name}"
        raise ConversionError(
            f"{arch} names the pretrained weights {tag}, which the scheme {scheme} would replace; "
            f"expected {name}, or --scheme {PRETRAINED}"
        )
    with seeded(check_seed(given["seed"])):
        model = build(arch, pretrained=weights or True, **kwargs) if scheme == PRETRAINED else None
    if file is None:
        return plan_as_given(model or build_meta(architecture), given)
    converted, planned = convert_as_given(model or architecture, given)
    save(converted, file, encoding=encoding)
    return planned

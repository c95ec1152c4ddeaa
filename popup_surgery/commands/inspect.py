import json
from collections import Counter
from typing import Annotated

import typer
from rich.table import Table

from .shared import File, a_file, show


def run(
    artifact: Annotated[File, a_file("A popup artifact.")],
    json_: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Print what an artifact says about itself, without building anything.

    \b
    $ popup-surgery inspect digits.popup.safetensors
    popup_surgery/conv2(img_size=8, in_chans=1, width=0.25)
    layer                shape            kept   of      share  weights from
    features.0.weight    16 × 1 × 3 × 3   72     144     50.0%  signed_constant, std 0.4714
    features.2.weight    16 × 16 × 3 × 3  1,152  2,304   50.0%  signed_constant, std 0.11785
    classifier.1.weight  64 × 256         8,192  16,384  50.0%  signed_constant, std 0.088388
    classifier.3.weight  64 × 64          2,048  4,096   50.0%  signed_constant, std 0.17678
    classifier.5.weight  10 × 64          320    640     50.0%  signed_constant, std 0.17678
    5 layers, 11,784 of 23,568 weights kept (50.0%), seed 0
    masks: bitpack, 1.000 bits a weight
    bytes: masks 2,946, planes 0, stored tensors 0, manifest and header 4,712; 7,658 in all
    accuracy when it was saved: 98.33%; popup-surgery verify checks the weights
    """
    from ..artifact import Artifact

    opened = Artifact.open(artifact)
    manifest = opened.manifest
    if json_:
        print(json.dumps(manifest.text(), indent=2, sort_keys=True))
        return
    architecture = manifest.architecture
    kwargs = ", ".join(f"{key}={value!r}" for key, value in architecture.kwargs.items())
    show(f"{architecture.library}/{architecture.name}({kwargs})")
    table = Table(
        "layer", "shape", "kept", "of", "share", "weights from", box=None, header_style="", padding=(0, 2, 0, 0)
    )
    for entry in manifest.masked:
        kept = entry.kept or 0
        shape = " × ".join(map(str, entry.shape))
        source = f"{entry.distribution}, std {entry.std:.5g}" if entry.std else entry.distribution
        table.add_row(entry.name, shape, f"{kept:,}", f"{entry.numel:,}", f"{kept / entry.numel:.1%}", source)
    show(table)
    share = manifest.kept / manifest.weights
    seed = f"seed {manifest.seed}"
    show(f"{len(manifest.masked)} layers, {manifest.kept:,} of {manifest.weights:,} weights kept ({share:.1%}), {seed}")
    encodings = ", ".join(sorted({entry.encoding for entry in manifest.masked}))
    layers, of_layers = Counter(str(entry.pattern) for entry in manifest.masked if entry.pattern), len(manifest.masked)
    patterns = "".join(
        f", {pattern} of neighbours{'' if count == of_layers else f' in {count} of {of_layers} layers'}"
        for pattern, count in sorted(layers.items())
    )
    sizes = opened.sizes
    assert sizes is not None
    if fixed := [entry.fixed for entry in manifest.masked if entry.fixed]:
        dropped, kept = (sum(getattr(one, name) for one in fixed) for name in ("dropped", "kept"))
        show(f"fixed by the seed: {dropped:,} weights dropped, {kept:,} kept")
    show(f"masks: {encodings}{patterns}, {8 * sizes.masks / manifest.weights:.3f} bits a weight")
    if planes := sorted({kind for entry in manifest.masked for kind in entry.planes}):
        show(f"planes: {', '.join(planes)}, {8 * sizes.planes / max(manifest.kept, 1):.3f} bits a kept weight")
    show(
        f"bytes: masks {sizes.masks:,}, planes {sizes.planes:,}, stored tensors {sizes.stored:,}, manifest and header "
        f"{sizes.header:,}; {sizes.total:,} in all"
    )
    if (base := manifest.base) is not None:
        show(f"base: {base.library}/{base.name} {base.tag or '(no tag)'}, SHA-256 {base.sha256}")
    accuracy = manifest.provenance.get("accuracy")
    if isinstance(accuracy, float):
        show(f"accuracy when it was saved: {accuracy:.2%}; popup-surgery verify checks the weights")

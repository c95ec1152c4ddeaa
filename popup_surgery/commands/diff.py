import json
from typing import Annotated

import typer

from .shared import File, a_file, busy, show


def run(
    a: Annotated[File, a_file("A popup artifact, or the masks that a run wrote beside dense weights.")],
    b: Annotated[File, a_file("Another one, of the same network.")],
    json_: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Compare the masks of two files: the shares of each layer's weights that both keep, one, or neither.

    Beside each share stands its average for masks that keep as many weights, chosen at random.

    \b
    $ popup-surgery diff digits.popup.safetensors other.popup.safetensors
    layer                weights  kept by both  chance  by one  chance  by neither  chance
    features.0.weight    144      43.1 %        25.0 %  13.9 %  50.0 %  43.1 %      25.0 %
    features.2.weight    2,304    38.8 %        25.0 %  22.4 %  50.0 %  38.8 %      25.0 %
    classifier.1.weight  16,384   40.8 %        25.0 %  18.4 %  50.0 %  40.8 %      25.0 %
    classifier.3.weight  4,096    41.2 %        25.0 %  17.6 %  50.0 %  41.2 %      25.0 %
    classifier.5.weight  640      37.7 %        25.0 %  24.7 %  50.0 %  37.7 %      25.0 %
    5 layers             23,568   40.6 %        25.0 %  18.8 %  50.0 %  40.6 %      25.0 %
    """
    with busy("comparing"):
        from ..analysis.overlap import overlap

        found = overlap(a, b)
    if json_:
        print(json.dumps(found.to_json(), indent=2))
    else:
        show(str(found))

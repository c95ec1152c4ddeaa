"""Draw what a hidden network is, from one that is trained for it: weights × mask = subnetwork, with their accuracies.

    python docs/hidden_network.py --data-dir DIR [--set data.name=folder] [--output runs/hidden-network]

Trains Conv2 on CIFAR-10 for two epochs, about ten minutes of one CPU core. DIR is torchvision's folder of CIFAR-10, or
DIR/{train,validation}/<class>/ with `--set data.name=folder`. Writes hidden-network-light.png and
hidden-network-dark.png to docs/images/, or to `--images`, and prints the accuracies. A run that is in the output folder
already is resumed; a finished one is only measured and drawn.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

import popup_surgery as ps
from popup_surgery.analysis.sanity import AS_IT_IS, SHUFFLED
from popup_surgery.data.batches import quiet
from popup_surgery.experiment.evaluate import class_names, data_of
from popup_surgery.experiment.setup import open_for
from popup_surgery.plots import canvas, write_figure
from popup_surgery.training.evaluation import accuracy_of

RECIPE, LENGTH = "cifar10/conv2", "training.epochs=2"
ROWS, COLUMNS = 6, 8  # kernels that are drawn
THEMES = {  # text, positive, negative, dropped
    "light": ("#333333", "#0072b2", "#d55e00", "#e9e9ee"),
    "dark": ("#d8d8de", "#56b4e9", "#e69f00", "#343741"),
}


def accuracies(file: ps.Artifact, data_dir: Path | None) -> dict[str, float]:
    """Accuracy, 0 … 1, of the network with all of its weights, under a shuffled mask, and under its own."""
    whole, data = file.network(masked=False), data_of(file, None, data_dir)
    batches = open_for(whole, data, quiet, train=False, classes=class_names(file))
    everything, _ = accuracy_of(whole, batches.validation(), nullcontext)
    found = {one.change: one.accuracy for one in ps.sanity(file, data_dir=data_dir, repeats=1, values=()).variations}
    return {"all weights": everything, "shuffled mask": found[SHUFFLED], "learned mask": found[AS_IT_IS]}


def kernels(file: ps.Artifact) -> tuple[np.ndarray, np.ndarray]:
    """The first kernels of the first layer: the weights, and which of them are kept; each [kernels, height, width]."""
    name = file.manifest.masked[0].name
    weights, kept = file.network(masked=False).get_parameter(name).detach(), file.masks()[name]
    return tuple(each.flatten(0, 1)[: ROWS * COLUMNS].numpy() for each in (weights, kept))  # type: ignore[return-value]


def draw(path: Path, weights: np.ndarray, kept: np.ndarray, shown: dict[str, float], theme: str) -> None:
    """Draw the picture for a page whose background is light or dark; its own is transparent."""
    ink, positive, negative, dropped = THEMES[theme]
    figure, panels = canvas(10, 3.4, 3)
    figure.patch.set_alpha(0)
    signs = np.where(weights > 0, positive, negative)
    for axes, colours, title, accuracy, note in (
        (panels[0], signs, "random weights", shown["all weights"], "with all of them"),
        (panels[1], np.where(kept, ink, dropped), "learned mask", None, "one bit for each weight"),
        (
            panels[2],
            np.where(kept, signs, dropped),
            "hidden network",
            shown["learned mask"],
            "with those that are kept",
        ),
    ):
        _squares(axes, colours)
        axes.set_title(title, color=ink, fontsize=18)
        words = [(note, 14)] if accuracy is None else [(f"{100 * accuracy:.1f} % right", 20), (note, 14)]
        for (text, size), height in zip(words, (-0.04, -0.16)):
            axes.text(0.5, height, text, transform=axes.transAxes, ha="center", va="top", color=ink, fontsize=size)
    for axes, sign in zip(panels, "×="):
        axes.text(1.08, 0.5, sign, transform=axes.transAxes, ha="center", va="center", color=ink, fontsize=26)
    write_figure(figure, path)


def _squares(axes: Any, colours: np.ndarray) -> None:
    """A square for each weight, in blocks of one kernel."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    count, height, width = colours.shape
    places = [
        (kernel % COLUMNS * (width + 0.7) + x, kernel // COLUMNS * (height + 0.7) + y)
        for kernel in range(count)
        for y in range(height)
        for x in range(width)
    ]
    squares = [Rectangle(place, 0.92, 0.92) for place in places]
    axes.add_collection(PatchCollection(squares, facecolors=colours.ravel(), linewidths=0))
    axes.set(xlim=(0, COLUMNS * (width + 0.7) - 0.7), ylim=(ROWS * (height + 0.7) - 0.7, 0), aspect="equal")
    axes.set_axis_off()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="another value of a recipe key")
    parser.add_argument("--output", type=Path, default=Path("runs/hidden-network"))
    parser.add_argument("--images", type=Path, default=Path(__file__).parent / "images")
    given = parser.parse_args()
    run = ps.train(
        RECIPE,
        overrides=[LENGTH, *given.set],
        output=given.output,
        data_dir=given.data_dir,
        resume=True,
        after_epoch=lambda epoch: print(f"epoch {epoch.epoch}: {epoch.accuracy:.2%}", flush=True),
    )
    file = ps.Artifact.open(run.file)
    shown = accuracies(file, given.data_dir)
    for theme in THEMES:
        draw(given.images / f"hidden-network-{theme}.png", *kernels(file), shown, theme)
    for name, accuracy in shown.items():
        print(f"{name:14} {accuracy:.4f}")


if __name__ == "__main__":
    main()

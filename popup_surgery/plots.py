"""Pictures of runs."""

import io
from collections.abc import Sequence
from pathlib import Path

from .files import write_atomically


def draw_curve(path: Path, title: str, train: Sequence[float], validation: Sequence[float]) -> None:
    """Accuracy by epoch on both splits, shares of 0 … 1, as a PNG at `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    epochs = range(1, len(train) + 1)
    marker = "o" if len(train) < 10 else None
    axes.plot(epochs, [100 * a for a in train], color="#999999", linestyle="--", marker=marker, label="training")
    axes.plot(epochs, [100 * a for a in validation], color="#0072b2", marker=marker, label="validation")
    axes.set(xlabel="epoch", ylabel="accuracy (%)", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
    write_atomically(path, lambda file: file.write(picture.getvalue()))

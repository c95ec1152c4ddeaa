"""The picture of a mask that stands in a model card."""

from pathlib import Path

from ..artifact import Artifact
from ..plots import draw_mask
from .escape import clean

PIECE = 64  # rows and columns of the mask that are shown
NAME = 24  # characters of a layer's name


def draw_picture(artifact: Artifact, path: Path) -> None:
    """Draw how much each layer keeps, and a piece of the largest layer's mask, as a PNG.

    Raises:
        ArtifactError: the file is damaged.
    """
    masks, entries = artifact.masks(), artifact.manifest.masked
    names = [_plain(entry.name.removesuffix(".weight")) for entry in entries]
    density = [(entry.kept or 0) / entry.numel if entry.numel else 0.0 for entry in entries]
    place = max(range(len(entries)), key=lambda i: entries[i].numel)
    mask = masks[entries[place].name]
    rows = mask.reshape(mask.shape[0], -1) if mask.ndim else mask.reshape(1, 1)
    piece = rows[:PIECE, :PIECE].numpy()
    what = f"{names[place]}: {piece.shape[0]} × {piece.shape[1]} weights of its mask;\ndark ones are kept"
    draw_mask(path, "share of weights kept, by layer", names, density, piece, what)


def _plain(name: str) -> str:
    """Return a layer's name as text that matplotlib takes for nothing more, such as a formula."""
    text = clean(name).replace("$", "S").replace("\\", "/")
    return text if len(text) <= NAME else f"…{text[1 - NAME :]}"

"""What a model card says of one artifact."""

import json
from contextlib import suppress
from typing import Any
from urllib.parse import quote

from .. import __version__
from ..artifact.manifest import Manifest
from ..config.schema import Recipe
from ..config.yaml import to_yaml
from ..errors import PopupError
from ..hub import Address
from ..learners import get_learner
from ..weights.source import source_of
from .escape import clean, code, fence, markdown, table
from .sanity_table import SanityTable
from .summary import Summary, recipe_of

LISTED = 20  # classes whose names are shown
INSTALL = "pip install git+https://github.com/popup-surgery/popup-surgery"
RECIPE = 20_000  # characters of a recipe that are shown


def section(
    path: str,
    manifest: Manifest,
    summary: Summary,
    *,
    repo: str | None = None,
    revision: str | None = None,
    picture: str | None = None,
    sanity: SanityTable | None = None,
) -> str:
    """Return Markdown about one artifact. Text from the file means nothing in it.

    Args:
        path: of the artifact in its repository.
        manifest, summary: what it says.
        repo, revision: the repository `user/name`, and the branch if it is not the main one; None for a file at hand.
        picture: the path of its mask's picture in the repository.
        sanity: the table of its sanity checks.
    """
    lines, notes = loading(path, manifest, summary, repo, revision)
    parts = [f"## {markdown(path)}", _what(manifest, summary), fence(INSTALL, "bash")]
    parts += [fence(lines, "python"), *notes]
    parts.append(table(_rows(manifest, summary), ("", "")))
    if picture is not None:
        parts.append(f"![The share of weights that each layer keeps, and a piece of the mask]({quote(picture)})")
    if sanity is not None:
        head, *rows = [tuple(map(markdown, row)) for row in sanity.rows]
        parts += ["### What weights, mask and statistics contribute", table(rows, head), *map(markdown, sanity.notes)]
    if recipe := recipe_of(manifest):
        parts += [
            f"### Recipe\n\nWhat differs from the defaults of {_version(manifest)}:",
            fence(_recipe(recipe), "yaml"),
        ]
    return "\n\n".join(parts) + "\n"


def _what(manifest: Manifest, one: Summary) -> str:
    """Return a paragraph that says what the artifact is."""
    name = code(one.name if one.library != "custom" else one.network)
    pretrained = any(source_of(entry.distribution).in_base for entry in manifest.masked)
    weights = (
        "pretrained weights stay as they were" if pretrained else f"weights are random, drawn from seed {one.seed}"
    )
    kept = f"{one.kept:,} of {one.weights:,} weights ({_percent(one.kept, one.weights)})"
    text = f"A hidden network: {name}, whose {weights}. A mask says which of them take part: {kept}."
    if one.accuracy is not None:
        of = f" of {markdown(one.data)}" if one.data else ""
        text += f" Its accuracy is {100 * one.accuracy:.2f} % on the validation images{of}."
    return text


def loading(
    path: str, manifest: Manifest, one: Summary, repo: str | None, revision: str | None = None
) -> tuple[str, list[str]]:
    """Return the three lines of Python that load an artifact, and sentences of Markdown on what they need."""
    arguments, notes = [json.dumps(str(Address(repo, revision, path)) if repo else path)], []
    if one.library == "custom":
        arguments.append("model")
        notes.append(
            f"`model` is your own network, a {code(one.network)}, which is not converted and which `load` fills."
        )
    if manifest.base is not None and not manifest.base.tag:
        arguments.append('base="weights.safetensors"')
        notes.append(
            "`weights.safetensors` are the pretrained weights under the mask. They are in no library and not in this "
            f"repository: ask whoever made the mask. `inspect` shows their SHA-256, `{manifest.base.sha256}`."
        )
    shape = manifest.probe.shape if manifest.probe is not None else None
    images = f"torch.zeros({', '.join(map(str, shape))})" if shape else "images"
    lines = ["import popup_surgery as ps", f"network = ps.load({', '.join(arguments)})", f"scores = network({images})"]
    if shape:
        lines[0] = "import torch, popup_surgery as ps"
    return "\n".join(lines), notes


def _rows(manifest: Manifest, one: Summary) -> list[tuple[str, ...]]:
    arguments = ", ".join(f"{key}={value}" for key, value in one.arguments.items())
    network = code(one.name) + (f" ({markdown(arguments)})" if arguments else "")
    notes = [entry.note for entry in manifest.masked]
    scaled = {"scaled" if note.get("scaled") is True else "not scaled" for note in notes}
    rows: list[tuple[str, ...]] = [
        ("network", network),
        ("weights kept", f"{one.kept:,} of {one.weights:,} ({_percent(one.kept, one.weights)}) in {len(notes)} layers"),
        ("scheme", f"{_several(note.get('scheme') for note in notes)}, {_several(scaled)}"),
    ]
    surgery = recipe_of(manifest).get("surgery")
    if _takes_k(one.learner, surgery.get("learner_options") if isinstance(surgery, dict) else None):
        rows.insert(2, ("k, the share that is kept", _several(note.get("k") for note in notes)))
    if patterns := sorted({str(entry.pattern) for entry in manifest.masked if entry.pattern}):
        rows.append(("pattern", f"{', '.join(patterns)} of neighbours along the input channels"))
    if fixed := [entry.fixed for entry in manifest.masked if entry.fixed]:
        dropped, kept = (_percent(sum(getattr(f, name) for f in fixed), one.weights) for name in ("dropped", "kept"))
        rows.append(("fixed before training", f"{dropped} of the weights dropped, {kept} kept"))
    if one.learner:
        rows.append(("learner", code(one.learner)))
    if planes := sorted({kind for entry in manifest.masked for kind in entry.planes}):
        rows.append(("beside the mask, for kept weights", ", ".join(map(code, planes))))
    if any(source_of(entry.distribution).drawn for entry in manifest.masked):
        rows.append(("seed", str(one.seed)))
    if (base := manifest.base) is not None:
        known = f"[{markdown(one.base)}](https://huggingface.co/{one.base})" if one.base else ""
        name = markdown(
            f"{base.library}/{base.name}" + (f", {base.tag}" if base.tag else ", weights that no library has")
        )
        rows.append(("pretrained weights", known or name))
    times = f" ({one.dense / one.size:,.1f} ×)" if one.size else ""
    rows.append(("size", f"{_bytes(one.size)}; as dense float32 {_bytes(one.dense)}{times}"))
    if one.accuracy is not None:
        rows.append(("accuracy", f"{100 * one.accuracy:.2f} %"))
    if one.data:
        split = f", {markdown(one.split)}" if one.split else ""
        rows.append(("data", markdown(one.data) + split))
    if one.classes:
        more = f", and {len(one.classes) - LISTED:,} more" if len(one.classes) > LISTED else ""
        names = ", ".join(markdown(name, 40) for name in one.classes[:LISTED])
        rows.append(("classes", f"{one.outputs:,}: {names}{more}"))
    elif one.outputs:
        rows.append(("classes", f"{one.outputs:,}"))
    return rows


def _takes_k(learner: str, options: Any) -> bool:
    """Return whether k is a setting of the learner; of one that is not known here, it may be."""
    try:
        return get_learner(learner, options).takes_k
    except PopupError:
        return True


def _several(values: Any) -> str:
    """Return the different values as one cell, at most five of them."""
    found = list(dict.fromkeys(f"{value:g}" if type(value) is float else clean(value) for value in values))
    return ", ".join(map(markdown, found[:5])) + (", …" if found[5:] else "")


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "none"


def _bytes(count: int) -> str:
    return (
        f"{count:,} bytes"
        if count < 10_000
        else f"{count / 1000:,.0f} kB"
        if count < 10**7
        else f"{count / 10**6:,.1f} MB"
    )


def _version(manifest: Manifest) -> str:
    software = manifest.provenance.get("software")
    version = software.get("popup_surgery", __version__) if isinstance(software, dict) else __version__
    return f"popup-surgery {markdown(version, 40)}"


def _recipe(values: dict[str, Any]) -> str:
    """Return a recipe as YAML in ASCII: what differs from the defaults, or all of it if it is no recipe of today."""
    with suppress(PopupError):
        values = Recipe.parse(values).model_dump(exclude_defaults=True)
    text = to_yaml(values)  # in ASCII, and only lines of its own keys begin at the margin
    return text if len(text) <= RECIPE else f"{text[:RECIPE]}\n# …"

"""What cards, lists and config.json say of one artifact: values of known types, out of a file that says anything."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..artifact import Artifact
from ..artifact.container import Container
from ..artifact.manifest import Manifest
from ..config.sections import data_title, is_hub_id
from ..models.architecture import KWARGS, Base
from .escape import clean

FLOAT = 4  # bytes of a dense float32
CLASSES = 1000  # names that are listed; more are only counted

# Data sets that recipes name otherwise than the Hub does.
HUB_DATA = {
    "torch/cifar10": "uoft-cs/cifar10",
    "torch/cifar100": "uoft-cs/cifar100",
    "torch/mnist": "ylecun/mnist",
    "torch/fashion_mnist": "zalando-datasets/fashion_mnist",
}


@dataclass(frozen=True)
class Summary:
    """One artifact in one line. Text in it is a stranger's, on one line and short.

    Attributes:
        library, network, arguments: how its network is built; the library is `custom` if none builds it.
        weights, kept: number of masked weights, and how many of them take part.
        size: of the file, in bytes.
        dense: bytes of all tensors as float32.
        seed: of the random weights.
        sha256: digest of the manifest, which has digests of all else.
        accuracy: on the validation images, 0 … 1; None if the file has none.
        data, split: the data set as a recipe names it, and the part of it that the accuracy is of; empty if unknown.
        classes: the names of the outputs; empty if unknown.
        outputs: the number of outputs; 0 if unknown.
        learner: empty if unknown.
        base: id on the Hub of the pretrained weights under the mask; empty if there are none, or no id is known.
    """

    library: str
    network: str
    arguments: dict[str, Any]
    weights: int
    kept: int
    size: int
    dense: int
    seed: int
    sha256: str
    accuracy: float | None
    data: str
    split: str
    classes: tuple[str, ...]
    outputs: int
    learner: str
    base: str

    @classmethod
    def of(cls, artifact: Artifact) -> "Summary":
        """Summarise an artifact that is in a file. Its tensors stay unread."""
        manifest, container = artifact.manifest, artifact.container
        assert container is not None, "an artifact in memory is written first"
        recipe = recipe_of(manifest)
        data, surgery = _object(recipe.get("data")), _object(recipe.get("surgery"))
        classes = manifest.provenance.get("classes")
        named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
        names = tuple(map(clean, classes)) if named and classes else ()
        count = manifest.architecture.kwargs.get("num_classes")
        accuracy = manifest.provenance.get("accuracy")
        share = isinstance(accuracy, float) and 0 <= accuracy <= 1
        return cls(
            library=clean(manifest.architecture.library),
            network=clean(manifest.architecture.name),
            arguments={k: v for k, v in manifest.architecture.kwargs.items() if k in KWARGS and KWARGS[k][1](v)},
            weights=manifest.weights,
            kept=manifest.kept,
            size=container.data_start + max((tensor.stop for tensor in container.tensors.values()), default=0),
            dense=FLOAT * _elements(manifest, container),
            seed=manifest.seed,
            sha256=manifest.text()["manifest_sha256"],
            accuracy=accuracy if share else None,
            data=_data(data),
            split=_text(data.get("val_split")),
            classes=names[:CLASSES],
            outputs=len(names) or (count if type(count) is int and count >= 0 else 0),
            learner=_text(surgery.get("learner")),
            base=hub_id(manifest.base),
        )

    @property
    def name(self) -> str:
        """The network's name in its library."""
        return f"{self.library}/{self.network}"

    @property
    def classifies(self) -> bool:
        """Whether the network is known to tell classes of images apart."""
        return bool(self.data) or (self.library in ("timm", "popup_surgery") and self.arguments.get("num_classes") != 0)

    @property
    def hub_data(self) -> str:
        """Id on the Hub of the data set; empty if none is known."""
        library, _, rest = self.data.partition("/")
        found = rest if library in ("hfds", "hfids") else HUB_DATA.get(self.data, "")
        return found if is_hub_id(found) else ""

    def record(self) -> dict[str, Any]:
        """Return the entry of config.json."""
        values = asdict(self) | {"classes": list(self.classes)}
        return {"library": "popup-surgery", "architecture": {key: values.pop(key) for key in _BUILD}} | values

    @classmethod
    def read(cls, entry: Any) -> "Summary | None":
        """Read an entry of config.json; None if it is not what `record` writes."""
        try:
            values = {key: entry["architecture"][key] for key in _BUILD}
            values |= {key: entry[key] for key in cls.__dataclass_fields__ if key not in _BUILD}
        except (KeyError, TypeError):
            return None
        for key, kind in _KINDS.items():
            if type(values[key]) is not kind or (kind is str and clean(values[key]) != values[key]):
                return None
        accuracy = values["accuracy"]
        if not (accuracy is None or (isinstance(accuracy, float) and 0 <= accuracy <= 1)):
            return None
        if not all(isinstance(name, str) and clean(name) == name for name in values["classes"]):
            return None
        return cls(**values | {"classes": tuple(values["classes"])})


_BUILD = ("library", "network", "arguments")
_KINDS: dict[str, type] = dict.fromkeys(("library", "network", "data", "split", "learner", "base", "sha256"), str)
_KINDS |= dict.fromkeys(("weights", "kept", "size", "dense", "seed", "outputs"), int)
_KINDS |= {"arguments": dict, "classes": list}


def recipe_of(manifest: Manifest) -> dict[str, Any]:
    """Return the recipe in a file's provenance, as it stands there; empty if there is none."""
    return _object(manifest.provenance.get("recipe"))


def hub_id(base: Base | None) -> str:
    """Return where on the Hub the pretrained weights are; empty if timm's own list, which the id is from, has none."""
    if base is None or base.library != "timm" or not base.tag:
        return ""
    from timm.models import get_pretrained_cfg

    try:
        found = get_pretrained_cfg(f"{base.name}.{base.tag}")
    except RuntimeError:  # no such tag
        return ""
    identity = "" if found is None else str(found.hf_hub_id or "")
    return identity if is_hub_id(identity) else ""


def _elements(manifest: Manifest, container: Container) -> int:
    """Return the number of elements of all tensors of the network."""
    bits = {name for entry in manifest.masked for name in entry.tensors}
    count = sum(entry.numel for entry in (*manifest.masked, *manifest.generated))
    count += sum(math.prod(constant.shape) for constant in manifest.constants.values())
    return count + sum(math.prod(t.shape) for name, t in container.tensors.items() if name not in bits)


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _data(section: dict[str, Any]) -> str:
    """Return what the data set of a recipe is called; empty if there is none."""
    name, seed = _text(section.get("name")), section.get("permute_seed")
    return data_title(name, seed if type(seed) is int else None) if name else ""


def _text(value: Any) -> str:
    return clean(value) if isinstance(value, str) else ""

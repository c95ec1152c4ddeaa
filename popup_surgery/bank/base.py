"""The base of a bank: the network that all tasks run on, and the weights that their masks select from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..artifact import Artifact
from ..artifact.manifest import TensorSpec
from ..artifact.reader import naming
from ..artifact.restore import check_memory, derived
from ..errors import ConversionError
from ..masking.packed import refuse_packed
from ..masking.walk import masked_weights, unwrap
from ..models.architecture import origin_of
from ..models.build import build
from ..models.libraries import architecture_and_tag
from .parts import Held, Kept, Part, Signs, Source, Whole


@dataclass(frozen=True)
class Place:
    """Where a tensor of the network is: its module, the name of that module, and the tensor's own name there."""

    layer: str
    module: nn.Module
    name: str

    def tensor(self, module: nn.Module | None = None) -> Tensor | None:
        """Return the tensor that is there now, also if `module` stands in for the layer."""
        module = module or self.module
        found = module._parameters.get(self.name)
        return module._buffers.get(self.name) if found is None else found


@dataclass(eq=False)
class Base:
    """A network, and what it is with no task in use.

    Attributes:
        network: as it was given, or built. `core` is the same without wrappers.
        places: every tensor of the `state_dict`, by its first key.
        aliases: keys of the same tensors, as in a manifest.
        parts: the tensors with no task in use.
        seed: the seed of its weights; None if they are pretrained.
        drawn: the weights that the seed gives, by name.
        what: what the weights are, for messages.
        digests: of its pretrained weights, by the names that they cover: computed once.
        agreed: architectures, as text, that were found to be this network.
        shapes: shape and dtype of each tensor, with no task in use. `order` has the keys of the `state_dict`.
        layers: the modules of all tensors by name, with no task in use. `classes` is the network's `num_classes`.
    """

    network: nn.Module
    core: nn.Module
    places: dict[str, Place]
    aliases: dict[str, str]
    parts: dict[str, Part]
    seed: int | None
    drawn: dict[str, TensorSpec]
    what: str
    sources: dict[str, Source] = field(default_factory=dict)
    digests: dict[tuple[str, ...], str] = field(default_factory=dict)
    agreed: set[str] = field(default_factory=set)

    def entries(self) -> dict[str, Tensor]:
        """Return every tensor of the network with no task in use, by `state_dict` key, on the meta device.

        Keys of one tensor have one object.
        """
        first = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in self.shapes.items()}
        return {name: first[self.aliases.get(name, name)] for name in self.order}

    def __post_init__(self) -> None:
        tensors = {name: place.tensor() for name, place in self.places.items()}
        self.shapes = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items() if t is not None}
        self.order = list(self.core.state_dict(keep_vars=True))
        self.layers = {place.layer: place.module for place in self.places.values()}
        self.classes = getattr(self.core, "num_classes", None)


def open_base(base: nn.Module | str | Path | Artifact, weights: str | Path | None, model: nn.Module | None) -> Base:
    """Return the base that the arguments of `MaskBank` describe.

    Raises:
        ConversionError: they name no network with weights, or the network cannot be switched.
        ArtifactError: the artifact is damaged, or its network cannot be built.
        UnknownName: there is no such network.
    """
    if isinstance(base, nn.Module):
        if weights is not None or model is not None:
            raise ConversionError(
                f"{'weights' if model is None else 'model'} was given beside a network; expected none, as the network "
                "has its weights"
            )
        return _pretrained(base, _named(base))
    if isinstance(base, str) and not _is_file(base):
        if model is not None:
            raise ConversionError("model was given beside a network's name; expected it beside an artifact")
        _, tag = architecture_and_tag(base)
        if weights is None and not tag:
            raise ConversionError(
                f"{base} names a network and no weights, and masks are for certain weights; expected weights, a tag as "
                f"in {base}.TAG, or an artifact"
            )
        return _pretrained(build(base, pretrained=weights if weights is not None else True), base)
    if not isinstance(base, str | Path | Artifact):
        raise ConversionError(f"base is {base!r}; expected a network, its name, or a popup artifact")
    artifact = Artifact.open(base)
    network = artifact.network(model, weights, masked=False)
    manifest = artifact.manifest
    if manifest.base is not None:
        return _pretrained(network, f"{manifest.base.library}/{manifest.base.name} {manifest.base.tag}".rstrip())
    with naming(artifact.path):
        return _drawn(network, manifest.seed, {entry.name: entry for entry in manifest.masked})


def _is_file(base: str) -> bool:
    return base.startswith("hf://") or base.endswith(".safetensors") or Path(base).is_file()


def _named(network: nn.Module) -> str:
    """Return what the weights of a network are, as far as it says."""
    origin = origin_of(unwrap(network))
    if origin.base is not None:
        return f"{origin.base.library}/{origin.base.name} {origin.base.tag}".rstrip()
    return type(unwrap(network)).__name__


def _pretrained(network: nn.Module, what: str) -> Base:
    core, places, aliases = _places(network)
    parts = {name: Whole(_copy(tensor)) for name, tensor in _tensors(places)}
    base = Base(network, core, places, aliases, dict(parts), None, {}, what)
    base.sources = {name: Held(part.values) for name, part in parts.items() if part.values.is_floating_point()}
    return base


def _drawn(network: nn.Module, seed: int, drawn: dict[str, TensorSpec]) -> Base:
    core, places, aliases = _places(network)
    everything = np.full(-(-max((entry.numel for entry in drawn.values()), default=0) // 8), 255, np.uint8)
    sources: dict[str, Source] = {}
    parts: dict[str, Part] = {}
    for name, tensor in _tensors(places):
        entry = drawn.get(name)
        if entry is not None and entry.distribution == "signed_constant":
            sources[name] = Signs(entry.numel, entry.std, seed, entry.stream, tensor.dtype)
            parts[name] = Kept(sources[name], everything)
            continue
        parts[name] = whole = Whole(_copy(tensor))
        if entry is not None:
            sources[name] = Held(whole.values)
    return Base(network, core, places, aliases, parts, seed, drawn, f"seed {seed}", sources)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _tensors(places: Mapping[str, Place]) -> Iterator[tuple[str, Tensor]]:
    for name, place in places.items():
        tensor = place.tensor()
        assert tensor is not None
        yield name, tensor


def _places(network: nn.Module) -> tuple[nn.Module, dict[str, Place], dict[str, str]]:
    """Return a network without wrappers, its tensors by first key, and the other keys of the same tensors.

    Raises:
        ConversionError: the network is converted, has no values, or has entries that are no tensors of its own.
    """
    core = unwrap(network)
    if any(True for _ in masked_weights(core)):
        raise ConversionError(
            "the network is converted; a bank needs the plain network whose weights the masks select from"
        )
    refuse_packed(core, "be switched between tasks", ConversionError)
    check_memory(core, "the network of the bank")
    entries: dict[str, Any] = core.state_dict(keep_vars=True)
    if made := derived(core, entries):
        raise ConversionError(
            f"{made[0]!r} of the network's state_dict is made when it is read, and a bank writes tensors in place"
        )
    found: dict[int, Place] = {}
    for layer, module in core.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found.setdefault(id(tensor), Place(layer, module, name))
    places: dict[str, Place] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for key, tensor in entries.items():
        if tensor.is_meta:
            raise ConversionError(f"{key!r} of the network is on the meta device and has no values")
        if id(tensor) in first:
            aliases[key] = first[id(tensor)]
        else:
            first[id(tensor)] = key
            places[key] = found[id(tensor)]
    return core, places, aliases

"""Dense weights that this library wrote: a network's plain `state_dict`, and what the file says about it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import nn

from ..artifact.about import About, read_about
from ..artifact.compare import check_architecture
from ..artifact.container import local, open_file, read_safetensors
from ..artifact.description import as_libraries_build, cast_like, describe_network
from ..artifact.kinds import DENSE
from ..artifact.reader import naming
from ..atomic import write_atomically
from ..config.schema import Model
from ..config.yaml import read_yaml
from ..errors import ArtifactError, PopupError
from ..models.architecture import Architecture
from ..models.build import build_architecture, build_meta
from ..models.libraries import resolve

if TYPE_CHECKING:
    from ..hub.files import HubFile


@dataclass(frozen=True)
class Dense:
    """A file of dense weights that a run or an export wrote, from `open_result(path)`.

    Attributes:
        path: the file's path, as given.
        manifest: what the file says about its network; for a file of version 0.1.0, what the recipe in its folder says.
        file: where it is: `path`, or a file on the Hub.
    """

    path: str | Path
    manifest: About = field(repr=False)
    file: "str | Path | HubFile" = field(repr=False)

    def network(self, *, base: object = None) -> nn.Module:
        """Return the plain network, in eval mode.

        Raises:
            ArtifactError: its architecture is in no library, or other than the weights; or there is a `base`.
        """
        with naming(self.path):
            if base is not None:
                raise ArtifactError("a base was given, and these weights are dense")
            check_architecture(self.manifest.architecture)
            state = load_file(local(self.file))
            shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
            meta = build_meta(self.manifest.architecture).state_dict()
            expected = {key: tuple(tensor.shape) for key, tensor in meta.items()}
            if shapes != expected:
                name = min(key for key in shapes | expected if shapes.get(key) != expected.get(key))
                raise ArtifactError(
                    f"{name!r} is {shapes.get(name, 'not there')}; {self.manifest.architecture.name} has "
                    f"{expected.get(name, 'no such tensor')}"
                )
            with as_libraries_build():
                network = build_architecture(self.manifest.architecture)
            cast_like(network, state)
            network.load_state_dict(state, assign=True)
            return network.eval()


def write_dense(model: nn.Module, path: Path, provenance: Mapping[str, Any]) -> int:
    """Write a plain network's `state_dict` as safetensors, each tied tensor in full. Return the number of tensors.

    The metadata says how the network is built, if a library builds it, and how it was made.
    """
    tensors = {key: tensor.contiguous().clone() for key, tensor in model.state_dict().items()}
    about = About(describe_network(model, model.state_dict(keep_vars=True))[0], provenance)
    known = {DENSE: about.text()} if about.architecture.library != "custom" else {}
    write_atomically(path, _ordered(serialize(tensors, metadata={"format": "pt"} | known)))
    return len(tensors)


def _ordered(data: bytes) -> bytes:
    """Return a safetensors file with its metadata sorted; safetensors orders them at random."""
    stop = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:stop])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return data[:8] + text.ljust(stop - 8) + data[stop:]


def open_dense(source: "str | Path | HubFile") -> Dense | None:
    """Open dense weights that this library wrote; None if the file holds something else."""
    with naming(source):
        with open_file(source) as file:
            header = read_safetensors(file)
        metadata = header.metadata if isinstance(header.metadata, dict) else {}
        shown = source if isinstance(source, str | Path) else source.shown
        if DENSE in metadata:
            return Dense(shown, read_about(metadata[DENSE], DENSE), source)
        if not isinstance(source, str | Path):
            return None
        recipe = Path(source).parent / "recipe.yaml"
        if metadata.get("format") != "pt" or not recipe.is_file():
            return None
        try:
            return Dense(source, _from_recipe(read_yaml(recipe)), source)
        except PopupError as error:
            raise ArtifactError(f"its run's {recipe} cannot be read: {error}") from error


def _from_recipe(values: Mapping[str, Any]) -> About:
    """Return what a run's recipe says about its network and data. Nothing else in it is looked at."""
    model = Model.model_validate({**values.get("model", {}), "pretrained": False, "init_from": None})
    architecture = Architecture(*resolve(model.name), model.kwargs)
    return About(architecture, {"recipe": {"data": values.get("data", {})}})

"""Build and fill the network that a file describes."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ArtifactError, ConversionError
from ..masking.memory import overlapping
from ..masking.packed import pack, packed_class, refuse_packed
from ..masking.walk import masked_weights, places_of, unwrap
from ..models.build import build_architecture, build_meta, build_uninitialised
from ..models.structure import is_extra_state
from ..weights.fill import fill
from ..weights.streams import CONSTANTS
from .base_weights import base_weights, library_tag
from .compare import check_architecture, compare, entries_of
from .description import as_libraries_build, cast_like
from .manifest import Manifest
from .planes import Bits
from .reader import Contents
from .rebuild import WITH_SIGNS, codes, effective_pieces, generated_pieces, stored_tensor


def fill_network(
    contents: Contents,
    model: nn.Module | None,
    base: nn.Module | str | Path | None,
    masked: bool = True,
    packed: bool = False,
) -> nn.Module:
    """Build and fill the network that `contents` describes, or fill `model` if it is given.

    Masks are decoded once the shapes have matched. With `masked=False`, all weights have the values that the seed or
    the base first gave, whatever planes say. With `packed=True`, masked weights are held as bits; `check_packable` must
    have allowed it.
    """
    manifest = contents.manifest
    if base is not None and manifest.base is None:
        raise ArtifactError("`base` was given, but the file's weights come from its seed; leave out `base`")
    if model is None:
        check_architecture(manifest.architecture, manifest.provenance.get("custom"))
        tag = library_tag(manifest) if manifest.base is not None and base is None else None
        entries = entries_of(contents)
        try:
            with as_libraries_build():
                bare = build_meta(manifest.architecture)
                cast_like(bare, entries)
                compare(contents, bare.state_dict(keep_vars=True))
                contents.decode()
                network = (
                    build_architecture(manifest.architecture, tag)
                    if tag
                    else build_uninitialised(manifest.architecture)[0]
                )
        except ConversionError as error:
            raise ArtifactError(f"the architecture cannot be built: {error}") from error
        cast_like(network, entries)
        core = network
    elif not isinstance(model, nn.Module):
        raise ArtifactError(f"model is {model!r}; expected a plain torch.nn.Module to fill")
    else:
        network, core = model, unwrap(model)
        if any(True for _ in masked_weights(core)):
            raise ArtifactError("the network to fill is converted; expected a plain one")
        refuse_packed(core, "be filled", ArtifactError)
    if model is not None:
        check_memory(core)
    compare(contents, core.state_dict(keep_vars=True))
    bits = contents.decode()
    if not masked:
        bits = {name: Bits(np.full_like(each.mask, 255)) for name, each in bits.items()}
    if packed:
        places = _places_to_pack(manifest, core)
        _fill(contents, bits, core, {}, drawn=False)
        _pack(manifest, bits, core, places)
    else:
        _fill(contents, bits, core, base_weights(manifest, core, base))
    return network.eval()


def check_memory(core: nn.Module, what: str = "the network to fill") -> None:
    """Raise `ArtifactError` if filling one entry of the network would change another."""
    entries = core.state_dict(keep_vars=True).items()
    named = list({id(tensor): (key, tensor) for key, tensor in entries if isinstance(tensor, Tensor)}.values())
    for one, other in overlapping([tensor for _, tensor in named]):
        raise ArtifactError(
            f"{named[one][0]!r} and {named[other][0]!r} of {what} share memory and are not the same tensor; "
            "give one a copy of its own with clone()"
        )


def check_packable(manifest: Manifest) -> None:
    """Raise `ArtifactError` if a masked weight's values are no constants."""
    if manifest.base is not None:
        raise ArtifactError(
            "the file is a mask on pretrained weights, which are needed in full; packed=True takes masks on constants. "
            "To share such weights among tasks, use MaskBank"
        )
    for entry in manifest.masked:
        if entry.distribution not in CONSTANTS:
            raise ArtifactError(
                f"the values of {entry.name!r} are {entry.distribution}, not one constant; "
                f"packed=True takes {', '.join(CONSTANTS)}, so leave it out"
            )
        if entry.planes not in WITH_SIGNS:
            raise ArtifactError(
                f"{entry.name!r} has the planes {', '.join(entry.planes)}, and its values are more than −c, 0 and c; "
                "packed=True holds these alone, so leave it out"
            )


Places = dict[nn.Module, dict[str, str]]  # of each module the keys in the file, by parameter name


def _places_to_pack(manifest: Manifest, core: nn.Module) -> Places:
    """Return where the masked weights are, in every module that has them."""
    entries = core.state_dict(keep_vars=True)
    keys = {id(entries[spec.name]): spec.name for spec in manifest.masked}
    found: Places = {}
    for place in places_of(core):
        if (key := keys.get(id(place.tensor))) is not None:
            found.setdefault(place.module, {})[place.name] = key
    for module, names in found.items():
        try:
            packed_class(type(module), tuple(names))
        except TypeError as error:  # its class allows no subclass
            raise ArtifactError(f"a {type(module).__name__} cannot be packed: {error}") from error
    held = {key for names in found.values() for key in names.values()}
    if missing := [spec.name for spec in manifest.masked if spec.name not in held]:
        raise ArtifactError(f"{missing[0]!r} is no parameter of the network, and cannot be packed; leave out packed")
    return found


def _pack(manifest: Manifest, given: Mapping[str, Bits], core: nn.Module, places: Places) -> None:
    """Replace the masked weights by bits; weights of several modules by the same ones."""
    entries: dict[str, Tensor] = core.state_dict(keep_vars=True)
    bits: dict[str, tuple[Tensor, Tensor]] = {}
    for spec in manifest.masked:
        weight = entries[spec.name]
        value = torch.tensor([np.float32(spec.std)]).to(weight.device, weight.dtype)
        bits[spec.name] = torch.from_numpy(codes(spec, manifest.seed, given[spec.name])).to(weight.device), value
    for module, names in places.items():
        pack(module, {name: bits[key] for name, key in names.items()})


def _fill(
    contents: Contents, bits: Mapping[str, Bits], core: nn.Module, base: dict[str, Tensor], drawn: bool = True
) -> None:
    """Write every tensor of the file into the network, in place; with `drawn=False` all but the masked weights."""
    manifest = contents.manifest
    entries: dict[str, Tensor] = core.state_dict(keep_vars=True)
    meta = [name for name, tensor in entries.items() if tensor.is_meta]
    if meta:
        raise ArtifactError(f"{meta[0]!r} of the network to fill is on the meta device and cannot hold values")
    made = derived(core, entries)
    for name in made:
        entry = entries_of(contents)[name]
        entries[name] = torch.empty(entry.shape, dtype=entry.dtype)
    with torch.no_grad():
        for spec in manifest.masked if drawn else ():
            fill(
                entries[spec.name],
                effective_pieces(spec, manifest.seed, bits[spec.name], base.get(spec.name)),
            )
        for spec in manifest.generated:
            fill(entries[spec.name], generated_pieces(spec, manifest.seed))
        for name, constant in manifest.constants.items():
            entries[name].detach().fill_(constant.value)
        for name, (stored, data) in contents.stored.items():
            entries[name].detach().copy_(stored_tensor(stored, data))
        for name, target in manifest.aliases.items():
            if entries[name] is not entries[target]:
                entries[name].detach().copy_(entries[target].detach())
    if made:
        try:
            core.load_state_dict(entries)
        except Exception as error:  # a module may raise anything for a state that does not fit it
            raise ArtifactError(f"the network does not take {made[0]!r} of the file: {error}") from error


def derived(core: nn.Module, entries: Mapping[str, Tensor]) -> list[str]:
    """Return the `state_dict` entries that are no tensors of the network, but made when they are read."""
    own = {
        id(tensor) for module in core.modules() for tensor in (*module._parameters.values(), *module._buffers.values())
    }
    return [name for name, tensor in entries.items() if id(tensor) not in own or is_extra_state(name)]

"""The libraries that networks come from, and the names of their networks."""

from importlib import import_module
from typing import Any

from ..errors import ConversionError, UnknownName, unknown
from .architecture import Architecture, check_kwargs

LIBRARIES = ("popup_surgery", "timm", "torchvision")
HUB = ("hf-hub:", "hf_hub:", "https://huggingface.co/")  # how names of repositories on the Hugging Face Hub begin


def names(library: str) -> list[str]:
    """Return the names of all networks in `library`."""
    if library == "timm":
        import timm

        return timm.list_models()
    if library == "torchvision":
        import torchvision

        return torchvision.models.list_models()
    from .paper_nets import NETS

    return list(NETS)


def resolve(name: str) -> tuple[str, str]:
    """Split `timm/resnet50` into library and name; find the library of a bare `resnet50`.

    A bare name is looked up in popup_surgery first, then in timm, then in torchvision.

    Raises:
        UnknownName: the name is in no library; the message gives the three nearest names.
        ConversionError: the name has a tag of pretrained weights too.
    """
    library, bare, tag = resolve_with_tag(name)
    if tag:
        raise ConversionError(
            f"{name} names the pretrained weights {tag} too; expected the network alone, {library}/{bare}"
        )
    return library, bare


def resolve_with_tag(name: str) -> tuple[str, str, str]:
    """Split a name as `resolve` does, and the tag of pretrained weights from it; the tag is empty if there is none.

    A tag follows a dot: `timm/resnet18.a1_in1k`, `hf-hub:timm/resnet18.a1_in1k`, `torchvision/resnet18.IMAGENET1K_V1`,
    or torchvision's own `ResNet18_Weights.IMAGENET1K_V1`. Whether the network has such weights is not checked.

    Raises:
        UnknownName: as for `resolve`; or the name is that of a repository on the Hugging Face Hub that is not timm's.
    """
    hub = next((start for start in HUB if name.startswith(start)), "")
    path = name.removeprefix(hub)
    if hub and not path.startswith("timm/"):
        raise UnknownName(
            f"{name} is a repository on the Hugging Face Hub; expected one of timm's own, such as "
            "hf-hub:timm/resnet18.a1_in1k, or a network's name, with the repository's file of weights as `pretrained`"
        )
    library, slash, last = path.rpartition("/")
    bare, _, tag = last.partition(".")
    if bare.endswith("_Weights") and library in ("", "torchvision"):
        library, slash, bare = "torchvision", "/", _network_of(bare)
    return (*_find(library, slash, bare), tag)


def _network_of(weights: str) -> str:
    """Return the torchvision network with the weights enum of this name, or the name itself if there is none."""
    from torchvision.models import get_model_weights

    return next((n for n in names("torchvision") if get_model_weights(n).__name__ == weights), weights)


def _find(library: str, slash: str, bare: str) -> tuple[str, str]:
    for candidate in [library] if slash else LIBRARIES:
        if candidate not in LIBRARIES:
            raise unknown("library", candidate, LIBRARIES)
        if bare in names(candidate):
            return candidate, bare
    raise unknown("architecture", bare, names(library) if slash else [n for each in LIBRARIES for n in names(each)])


def architecture_of(name: str, **kwargs: Any) -> Architecture:
    """Return the description of the network that `build` with the same arguments builds. Raises the same errors."""
    library, bare = resolve(name)
    return _described(library, bare, kwargs)


def architecture_and_tag(name: str, **kwargs: Any) -> tuple[Architecture, str]:
    """Return what `architecture_of` does, and the tag of pretrained weights in the name, empty if there is none."""
    library, bare, tag = resolve_with_tag(name)
    return _described(library, bare, kwargs), tag


def _described(library: str, bare: str, kwargs: dict[str, Any]) -> Architecture:
    check_kwargs(kwargs)
    kwargs = {key: list(value) if isinstance(value, tuple) else value for key, value in kwargs.items()}
    return Architecture(library, bare, kwargs, import_module(library).__version__)

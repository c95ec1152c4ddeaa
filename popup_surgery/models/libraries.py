"""The libraries that networks come from, and the names of their networks."""

from importlib import import_module
from typing import Any

from ..errors import unknown
from .architecture import Architecture, check_kwargs

LIBRARIES = ("popup_surgery", "timm", "torchvision")


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
    """
    library, slash, bare = name.rpartition("/")
    for candidate in [library] if slash else LIBRARIES:
        if candidate not in LIBRARIES:
            raise unknown("library", candidate, LIBRARIES)
        if bare in names(candidate):
            return candidate, bare
    raise unknown("architecture", bare, names(library) if slash else [n for each in LIBRARIES for n in names(each)])


def architecture_of(name: str, **kwargs: Any) -> Architecture:
    """Return the description of the network that `build` with the same arguments builds. Raises the same errors."""
    library, bare = resolve(name)
    check_kwargs(kwargs)
    kwargs = {key: list(value) if isinstance(value, tuple) else value for key, value in kwargs.items()}
    return Architecture(library, bare, kwargs, import_module(library).__version__)

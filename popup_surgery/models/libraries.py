"""The libraries that networks come from, and the names in them."""

from importlib import import_module
from typing import Any

from ..errors import unknown
from .architecture import Architecture, check_kwargs

LIBRARIES = ("popup_surgery", "timm", "torchvision")


def names(library: str) -> list[str]:
    """All names of networks in `library`."""
    if library == "timm":
        import timm

        return timm.list_models()
    if library == "torchvision":
        import torchvision

        return torchvision.models.list_models()
    from .paper_nets import NETS

    return list(NETS)


def resolve(name: str) -> tuple[str, str]:
    """Library and name of `timm/resnet50`, or of a bare `resnet50`: ours first, then timm, then torchvision.

    Raises:
        UnknownName: no library has it; the message has the three nearest names.
    """
    library, slash, bare = name.rpartition("/")
    for candidate in [library] if slash else LIBRARIES:
        if candidate not in LIBRARIES:
            raise unknown("library", candidate, LIBRARIES)
        if bare in names(candidate):
            return candidate, bare
    raise unknown("architecture", bare, names(library) if slash else [n for each in LIBRARIES for n in names(each)])


def architecture_of(name: str, **kwargs: Any) -> Architecture:
    """The description of what `build` with the same arguments builds, with the same errors."""
    library, bare = resolve(name)
    check_kwargs(kwargs)
    kwargs = {key: list(value) if isinstance(value, tuple) else value for key, value in kwargs.items()}
    return Architecture(library, bare, kwargs, import_module(library).__version__)

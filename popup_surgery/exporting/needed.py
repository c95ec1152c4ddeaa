"""The packages of the extra `[onnx]`."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from types import ModuleType

from ..errors import PopupError

OLDEST = {"onnx": (1, 18), "onnxruntime": (1, 22), "onnxscript": (0, 5)}  # the same as in pyproject.toml
INSTALL = "run pip install -U 'popup-surgery[onnx]'"


def check_packages() -> None:
    """Check that everything which writes ONNX files is there. Raises as `needed` does."""
    for name in OLDEST:
        needed(name)


def needed(name: str) -> ModuleType:
    """Import a package of the extra.

    Raises:
        PopupError: it is missing, too old, or cannot be imported.
    """
    try:
        module = import_module(name)
    except Exception as error:  # a package that does not fit the others may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise PopupError(f"the package {name} is not installed; {INSTALL}") from None
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise PopupError(f"the package {name} cannot be imported ({why}); {INSTALL}") from error
    oldest, version = OLDEST[name], _version(name, module)
    if tuple(map(int, re.findall(r"\d+", version)[: len(oldest)])) < oldest:
        raise PopupError(f"{name} is {version}; expected {'.'.join(map(str, oldest))} or newer: {INSTALL}")
    return module


def _version(name: str, module: ModuleType) -> str:
    if isinstance(version := getattr(module, "__version__", None), str):
        return version
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # Python takes any folder of that name for a package
        where = ", ".join(getattr(module, "__path__", ())) or name
        raise PopupError(f"the package {name} is not installed, and {where} is none; {INSTALL}") from None


@contextmanager
def silence() -> Iterator[None]:
    """Context manager: the exporters' warnings and advice, which are about their own graphs, are not shown."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

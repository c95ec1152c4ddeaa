"""Code of others that registers learners, codecs and the like: files and modules that the user names, and packages.

A plugin is code, so it is imported only because this user named it: in a recipe file, by `--import`, or by installing a
package with an entry point. Nothing that an artifact, a checkpoint or provenance says is ever imported.
"""

import hashlib
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import PopupError

log = logging.getLogger("popup_surgery")

_loaded: dict[str, ModuleType] = {}  # by absolute path, or by the module's name


def load_plugins(plugins: Iterable[str], folder: Path = Path()) -> list[str]:
    """Import files and modules, each once in a process. Return them with absolute paths, for other processes.

    Args:
        plugins: paths of Python files, and names of modules.
        folder: paths are relative to it.

    Raises:
        PopupError: there is no such file or module, or it raises an error.
    """
    return [_load(plugin, folder) for plugin in plugins]


def loaded_plugins() -> dict[str, bytes]:
    """Return what `load_plugins` has imported in this process, with the content of files, for `restore_plugins`."""
    return {name: Path(name).read_bytes() if _is_file(name) else b"" for name in _loaded}


def restore_plugins(plugins: Mapping[str, bytes]) -> None:
    """Import what another process has imported. A file that this machine does not have is run from its content."""
    for name, content in plugins.items():
        if name not in _loaded and content and not os.path.isfile(name):
            module = ModuleType(_module_name(name))
            _run(name, module, lambda: exec(compile(content, name, "exec"), module.__dict__))  # noqa: B023
        else:
            _load(name, Path())


def load_entry_points(group: str, take: Callable[[str, Any], None]) -> None:
    """Pass the name and the object of each entry point of `popup_surgery.<group>` in installed packages to `take`.

    One that fails is left out, with a warning.
    """
    for point in entry_points(group=f"popup_surgery.{group}"):
        try:
            take(point.name, point.load())
        except Exception as error:  # any fault of a package must not take the others with it
            log.warning("the entry point %s = %s cannot be used: %s", point.name, point.value, error)


def _is_file(plugin: str) -> bool:
    return plugin.endswith(".py") or "/" in plugin or os.sep in plugin


def _module_name(path: str) -> str:
    return f"popup_surgery_plugin_{Path(path).stem}_{hashlib.sha256(path.encode(errors='replace')).hexdigest()[:8]}"


def _load(plugin: str, folder: Path) -> str:
    if not _is_file(plugin):
        if plugin not in _loaded:
            sys.path.insert(0, os.getcwd())  # as `python -m` does
            try:
                _run(plugin, None, lambda: importlib.import_module(plugin))
            finally:
                sys.path.pop(0)
        return plugin
    path = os.path.abspath(folder / plugin)
    if path in _loaded:
        return path
    if not os.path.isfile(path):
        raise PopupError(f"the plugin {path} does not exist; expected a Python file, or the name of a module")
    main = sys.modules["__main__"]
    if os.path.exists(getattr(main, "__file__", None) or "") and os.path.samefile(str(main.__file__), path):
        _loaded[path] = main  # the script that runs; other processes import it
        return path
    spec = importlib.util.spec_from_file_location(_module_name(path), path)
    if spec is None or spec.loader is None:
        raise PopupError(f"the plugin {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    _run(path, module, lambda: spec.loader.exec_module(module))  # type: ignore[union-attr]
    return path


def _run(name: str, module: ModuleType | None, execute: Callable[[], Any]) -> None:
    """Import a plugin by `execute`; `module` is the one of a file, which is found by its name while it runs."""
    if module is not None:
        sys.modules[module.__name__] = module
    try:
        found = execute()
    except Exception as error:
        if module is not None:
            del sys.modules[module.__name__]
        raise PopupError(f"the plugin {name} cannot be imported: {type(error).__name__}: {error}") from error
    _loaded[name] = found if module is None else module

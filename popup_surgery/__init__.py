"""Hidden networks: random frozen weights, a learnt mask, one small file to share.

`convert(model, k=0.3)` turns a network into a hidden one, `train` learns which weights take part, `save` and `load`
move the result as a seed and one bit a weight. Names are imported when they are first used, so that `import
popup_surgery` is light and the command line answers without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "analysis.sanity": ("Sanity", "sanity"),
    "artifact": ("inspect", "load", "save", "start_from", "verify"),
    "config": ("Recipe",),
    "errors": (
        "ArtifactError", "ConversionError", "DataError", "MaskedWeightError", "NothingToConvert", "PopupError",
        "RecipeError", "RunError", "UnknownName",
    ),
    "experiment.train": ("Evaluation", "Result", "evaluate", "predict", "train"),
    "learners": ("sampled",),
    "masking.convert": ("bake", "convert", "masks"),
    "masking.layer": ("Tracer",),
    "masking.planning": ("Coverage", "Plan", "plan"),
    "models.build": ("Architecture", "build"),
}  # fmt: skip
_HOME = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from .analysis.sanity import Sanity, sanity
    from .artifact import inspect, load, save, start_from, verify
    from .config import Recipe
    from .errors import (
        ArtifactError,
        ConversionError,
        DataError,
        MaskedWeightError,
        NothingToConvert,
        PopupError,
        RecipeError,
        RunError,
        UnknownName,
    )
    from .experiment.train import Evaluation, Result, evaluate, predict, train
    from .learners import sampled
    from .masking.convert import bake, convert, masks
    from .masking.layer import Tracer
    from .masking.planning import Coverage, Plan, plan
    from .models.build import Architecture, build


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})

"""Hidden networks: random frozen weights, a learned mask, one small file to share.

`convert(model, k=0.3)` turns a network into a hidden one. `train` learns which weights take part. `save` writes the
result as a seed and one bit per weight, and `load` reads it back. Names are imported on first use, so that
`import popup_surgery` is light and the command line answers without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .deprecated import OLD, install

__version__ = "0.1.0"

_HOMES = {
    "analysis.overlap": ("LayerOverlap", "Overlap", "overlap"),
    "analysis.sanity": ("Sanity", "sanity"),
    "artifact": ("Artifact", "inspect", "load", "masks", "repack", "save", "start_from", "verify"),
    "bank": ("Inference", "MaskBank"),
    "bank.combine": ("combine",),
    "config": ("Recipe",),
    "errors": (
        "ArtifactError", "ConversionError", "DataError", "HubError", "MaskedWeightError", "NothingToConvert",
        "PopupError", "RecipeError", "RunError", "UnknownName",
    ),
    "experiment.bench": ("Bench", "Way", "bench"),
    "experiment.evaluate": ("Evaluation", "evaluate", "predict"),
    "experiment.export": ("Exported", "export"),
    "experiment.results": ("Result",),
    "experiment.tasks": ("TaskResult", "TaskTable", "evaluate_tasks"),
    "experiment.train": ("train",),
    "learners": ("sampled",),
    "masking.bake": ("bake",),
    "masking.convert": ("convert",),
    "masking.density": ("density_penalty",),
    "masking.k_schedule": ("KSchedule", "set_k"),
    "masking.layer": ("Tracer",),
    "masking.plan": ("Coverage", "Plan"),
    "masking.planning": ("plan",),
    "masking.recycle": ("recycle",),
    "masking.redraw": ("redraw",),
    "models.architecture": ("Architecture",),
    "models.build": ("build",),
    "sharing.card": ("model_card",),
    "sharing.listing": ("Listing", "list_repo"),
    "sharing.push": ("Pushed", "push_to_hub"),
}  # fmt: skip
_HOME = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from .analysis.overlap import LayerOverlap, Overlap, overlap
    from .analysis.sanity import Sanity, sanity
    from .artifact import Artifact, inspect, load, masks, repack, save, start_from, verify
    from .bank import Inference, MaskBank
    from .bank.combine import combine
    from .config import Recipe
    from .errors import (
        ArtifactError,
        ConversionError,
        DataError,
        HubError,
        MaskedWeightError,
        NothingToConvert,
        PopupError,
        RecipeError,
        RunError,
        UnknownName,
    )
    from .experiment.bench import Bench, Way, bench
    from .experiment.evaluate import Evaluation, evaluate, predict
    from .experiment.export import Exported, export
    from .experiment.results import Result
    from .experiment.tasks import TaskResult, TaskTable, evaluate_tasks
    from .experiment.train import train
    from .learners import sampled
    from .masking.bake import bake
    from .masking.convert import convert
    from .masking.density import density_penalty
    from .masking.k_schedule import KSchedule, set_k
    from .masking.layer import Tracer
    from .masking.plan import Coverage, Plan
    from .masking.planning import plan
    from .masking.recycle import recycle
    from .masking.redraw import redraw
    from .models.architecture import Architecture
    from .models.build import build
    from .sharing.card import model_card
    from .sharing.listing import Listing, list_repo
    from .sharing.push import Pushed, push_to_hub


install()


def __getattr__(name: str) -> Any:
    if name in OLD:
        return import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})

"""Names from before the modules moved into folders. They still work, with a warning that gives the new name.

`OLD` lists the modules that are gone. Importing one gives a stand-in, which looks up each name where it is today.
`METHODS` maps the old names of a learner's methods to the new ones.
"""

import sys
import warnings
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = __package__

# old module: the modules that have its names today, lower ones first; and the names that have changed
OLD: dict[str, tuple[str, dict[str, str]]] = {
    "ablation": ("analysis.sanity", {}),
    "artifact.packing": ("codecs.bitpack", {}),
    "artifact.start": ("artifact.warm_start artifact.file", {}),
    "artifact.strict": ("artifact.strict_json", {}),
    "blank": ("models.skip_init", {}),
    "files": ("atomic", {}),
    "filling": ("weights.fill", {}),
    "kinds": ("models.layer_types", {"Kind": "LayerType", "KINDS": "LAYER_TYPES", "kind_of": "layer_type_of"}),
    "layers": (
        "masking.ranking masking.masked_weight masking.state masking.layer",
        {"Slot": "MaskedParam", "Ranking": "RankGroup"},
    ),
    "nets": ("models.paper_nets", {}),
    "planning": ("masking.settings masking.state masking.walk masking.plan masking.planning", {}),
    "radix": ("selection.radix_triton", {}),
    "rest": ("masking.unmasked", {"Treatment": "UnmaskedRule"}),
    "run": ("data.batches experiment.setup experiment.results experiment.evaluate experiment.train", {}),
    "streams": ("weights.streams", {"PIECE": "CHUNK"}),
    "surgery": ("masking.bake masking.apply masking.convert", {}),
    "survey": ("analysis.coverage", {}),
    "training.data": (
        "data.seeding data.transforms data.batches data.workers data.reading data.in_memory data.streamed data.open",
        {"Part": "ProcessShard", "Piece": "MicroBatch"},
    ),
    "training.folder": ("config.keys training.run_folder", {}),
    "training.loop": ("training.metrics training.evaluation training.trainer", {"Fit": "Trainer"}),
    "training.processes": ("training.distributed", {}),
    "training.recipe": ("config.yaml config.overrides config.catalog config.schema", {}),
    "training.schedule": ("config.schedule", {}),
    "training.sources": ("data.sources", {}),
    "zoo": (
        "models.architecture models.libraries models.pretrained models.build",
        {
            "architecture": "architecture_of",
            "build_bare": "build_meta",
            "build_blank": "build_uninitialised",
            "build_described": "build_architecture",
        },
    ),
}

# names in networks pickled by version 0.1.0; no warning, since whoever loads such a network did not write them
PICKLED = {
    "layers": ("_new", "_Hold", "Slot", "Ranking"),
    "nets": ("ConvNet",),
    "rest": ("Generated", "Treatment"),
    "zoo": ("Architecture", "Base"),
}

METHODS = {"favour": "seed_from_mask", "shown": "describe_sample", "trace": "select_traced"}


class OldModules:
    """Import finder and loader for the modules that are gone."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        old = name.removeprefix(f"{PACKAGE}.")
        return ModuleSpec(name, self) if name != old and old in OLD else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = partial(look_up, module.__name__.removeprefix(f"{PACKAGE}."))  # type: ignore[method-assign]


def install() -> None:
    """Make the modules that are gone importable."""
    if not any(isinstance(finder, OldModules) for finder in sys.meta_path):
        sys.meta_path.append(OldModules())


def look_up(old: str, name: str) -> Any:
    """Return what `name` of the module `old` is today. Warns with the new name, unless only pickles use the old."""
    homes, renamed = OLD[old]
    new = renamed.get(name, name)
    for home in homes.split() if not name.startswith("__") else ():
        names = vars(import_module(f"{PACKAGE}.{home}"))
        if new in names:
            if name not in PICKLED.get(old, ()):
                text = f"{PACKAGE}.{old}.{name} is {PACKAGE}.{home}.{new} now; the old name will be removed"
                warnings.warn(text, DeprecationWarning, stacklevel=2)
            return names[new]
    raise AttributeError(f"module '{PACKAGE}.{old}' has no attribute {name!r}")


def link_methods(learner: type) -> None:
    """Make each method of a learner class available under its old and its new name, whichever the class uses."""
    own = vars(learner)
    for old, new in METHODS.items():
        if new in own:
            setattr(learner, old, own[new])  # for a subclass that calls super() by the old name
        elif old in own:
            setattr(learner, new, own[old])


def warn_of_methods(learner: object) -> None:
    """Emit a DeprecationWarning if the class of a learner that is being registered uses old method names."""
    used = {
        old: new
        for cls in type(learner).__mro__
        for old, new in METHODS.items()
        if getattr(vars(cls).get(old), "__name__", None) == old
    }
    if used:
        text = ", ".join(f"{old} is {new} now" for old, new in used.items())
        warnings.warn(
            f"{type(learner).__name__}: {text}; the old name will be removed", DeprecationWarning, stacklevel=3
        )

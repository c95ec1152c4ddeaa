"""Names from before the modules moved: they work, and say what they are called now."""

import pickle
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn

import popup_surgery
from popup_surgery import convert, masks
from popup_surgery.deprecated import METHODS, OLD, PICKLED, look_up
from popup_surgery.learners import LEARNERS, Learner, register_learner
from popup_surgery.learners.edge_popup import EdgePopup
from popup_surgery.learners.supermask import Supermask
from popup_surgery.models.layer_types import LAYER_TYPES, Fans, LayerType, layer_type_of

NAMES = {  # of each module that is gone, and their place today
    "ablation.sanity": "analysis.sanity.sanity",
    "artifact.packing.pack": "codecs.bitpack.pack",
    "artifact.start.start_from": "artifact.warm_start.start_from",
    "artifact.strict.canonical": "artifact.strict_json.canonical",
    "blank.Blank": "models.skip_init.Blank",
    "files.write_atomically": "atomic.write_atomically",
    "filling.fill": "weights.fill.fill",
    "kinds.Fans": "models.layer_types.Fans",
    "kinds.KINDS": "models.layer_types.LAYER_TYPES",
    "kinds.Kind": "models.layer_types.LayerType",
    "kinds.RecurrentWeights": "models.layer_types.RecurrentWeights",
    "kinds.kind_of": "models.layer_types.layer_type_of",
    "layers.is_masked": "masking.layer.is_masked",
    "layers.slots_of": "masking.state.slots_of",
    "nets.conv4": "models.paper_nets.conv4",
    "planning.masked_weights": "masking.walk.masked_weights",
    "planning.plan": "masking.planning.plan",
    "rest.treatment": "masking.unmasked.treatment",
    "run.quiet": "data.batches.quiet",
    "run.train": "experiment.train.train",
    "streams.DISTRIBUTIONS": "weights.streams.DISTRIBUTIONS",
    "streams.PIECE": "weights.streams.CHUNK",
    "streams.draw": "weights.streams.draw",
    "surgery.bake": "masking.bake.bake",
    "survey.survey": "analysis.coverage.survey",
    "training.data.Part": "data.batches.ProcessShard",
    "training.data.open_data": "data.open.open_data",
    "training.folder.RunFolder": "training.run_folder.RunFolder",
    "training.loop.Fit": "training.trainer.Trainer",
    "training.loop.Epoch": "training.metrics.Epoch",
    "training.processes.start": "training.distributed.start",
    "training.recipe.Recipe": "config.schema.Recipe",
    "training.recipe.to_yaml": "config.yaml.to_yaml",
    "training.schedule.rates": "config.schedule.rates",
    "training.sources.Shards": "data.sources.Shards",
    "zoo.architecture": "models.libraries.architecture_of",
    "zoo.build_bare": "models.build.build_meta",
    "zoo.build_described": "models.build.build_architecture",
}


@pytest.fixture
def registered() -> Iterator[None]:
    """Whatever the test registers is forgotten."""
    learners, types = dict(LEARNERS), list(LAYER_TYPES)
    yield
    LEARNERS.clear()
    LEARNERS.update(learners)
    LAYER_TYPES[:] = types


@pytest.mark.parametrize(("old", "new"), NAMES.items())
def test_an_old_name_is_the_new_one_and_says_so(old: str, new: str) -> None:
    home, _, name = new.rpartition(".")
    module, _, old_name = old.rpartition(".")
    gone = import_module(f"popup_surgery.{module}")
    with pytest.warns(DeprecationWarning, match=rf"^popup_surgery\.{old} is popup_surgery\.{new} now; ") as caught:
        value = getattr(gone, old_name)
    assert value is getattr(import_module(f"popup_surgery.{home}"), name)
    assert caught[0].filename == __file__


def test_every_module_that_is_gone_is_tried() -> None:
    assert {old.rpartition(".")[0] for old in NAMES} == OLD.keys() - {"radix"}  # which needs Triton
    for homes, renamed in OLD.values():
        names = {name for home in homes.split() if "triton" not in home for name in vars(modules(home))}
        assert set(renamed.values()) <= names


def modules(home: str) -> object:
    return import_module(f"popup_surgery.{home}")


def test_a_module_that_is_gone_is_an_attribute_of_the_package() -> None:
    assert popup_surgery.kinds is sys.modules["popup_surgery.kinds"]
    with pytest.raises(ImportError, match="nothing"):
        from popup_surgery.kinds import nothing  # type: ignore[import-not-found,import-untyped,unused-ignore]  # noqa: F401
    with pytest.raises(ModuleNotFoundError):
        import_module("popup_surgery.nowhere")


def test_a_layer_type_appended_under_the_old_name_is_registered(registered: None) -> None:
    with pytest.warns(DeprecationWarning, match="LAYER_TYPES"):
        from popup_surgery.kinds import KINDS

    class Bilinear(nn.Bilinear):
        pass

    KINDS.append(LayerType((Bilinear,), lambda module: {"weight": Fans(12.0, 5.0)}))
    assert layer_type_of(Bilinear) is KINDS[-1]
    net = convert(nn.Sequential(Bilinear(3, 4, 5)), 0.5)
    assert masks(net)["0.weight"].shape == (5, 3, 4)


def test_a_learner_with_methods_of_old_names_is_registered_and_called(registered: None) -> None:
    called = []

    class Mine(EdgePopup):
        def favour(self, scores: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
            called.append("favour")
            return super().favour(scores, masks)  # type: ignore[misc]

        def trace(self, scores: Sequence[Tensor], kept: int, names: Sequence[str] = ()) -> Sequence[Tensor]:
            called.append("trace")
            return super().trace(scores, kept, names)  # type: ignore[misc]

    with pytest.warns(DeprecationWarning, match="^Mine: favour is seed_from_mask now, trace is ") as caught:
        register_learner("mine", Mine())
    assert len(caught) == 1
    assert caught[0].filename == __file__
    net = convert(nn.Sequential(nn.Linear(6, 4)), 0.5, learner="mine")
    x = torch.randn(2, 6)
    assert torch.equal(torch.func.functional_call(net, dict(net.named_parameters()), x), net(x))
    torch.compile(net, backend="eager", fullgraph=True)(x)
    learner = LEARNERS["mine"]
    scores, mask = [torch.randn(8)], [torch.arange(8) < 3]
    assert torch.equal(learner.select(learner.seed_from_mask(scores, mask), 3).masks[0], mask[0])
    assert set(called) == {"favour", "trace"}


def test_methods_of_new_names_are_found_under_the_old_ones_and_warn_of_nothing(registered: None) -> None:
    class Mine(Supermask):
        def describe_sample(self) -> str:
            return "mine"

    assert Mine().shown() == "mine"  # type: ignore[attr-defined]
    for cls in (Learner, EdgePopup, Supermask, Mine):
        assert all(getattr(cls, old) is getattr(cls, new) for old, new in METHODS.items())
    register_learner("mine", Mine())


def test_what_old_pickles_are_made_of_is_found_in_silence() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for module, names in PICKLED.items():
            for name in names:
                found = pickle.loads(f"cpopup_surgery.{module}\n{name}\n.".encode())
                assert found is look_up(module, name)
    assert not caught

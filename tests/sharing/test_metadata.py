"""The metadata of a card: the fields of the Hub's documentation, and what stays of an owner's."""

from dataclasses import replace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from hypothesis import given
from hypothesis import strategies as st

from hub_server import card_errors
from popup_surgery.artifact import Artifact
from popup_surgery.errors import PopupError
from popup_surgery.models.architecture import Base
from popup_surgery.sharing.metadata import edit_yaml, metadata, read_yaml, renewed, to_yaml
from popup_surgery.sharing.summary import Summary, hub_id
from support import GOLDEN

# https://huggingface.co/docs/hub/model-cards and modelcard.md of huggingface/hub-docs: the keys of each level
FIELDS = {
    "": {
        "language", "license", "license_name", "license_link", "library_name", "tags", "datasets", "metrics",
        "base_model", "base_model_relation", "pipeline_tag", "thumbnail", "model-index",
    },
    "model": {"name", "results"},
    "result": {"task", "dataset", "metrics", "source"},
    "task": {"type", "name"},
    "dataset": {"type", "name", "config", "split", "revision", "args"},
    "metric": {"type", "value", "name", "config", "args", "verified", "verifyToken"},
}  # fmt: skip
RELATIONS = {"adapter", "merge", "quantized", "finetune"}

OPENED = Artifact.open(GOLDEN / "finished" / "tiny" / "tiny.popup.safetensors")
TINY = Summary.of(OPENED)
CIFAR = replace(
    TINY, library="timm", network="resnet10t", data="torch/cifar10", split="test", accuracy=0.884,
    learner="piggyback", base="timm/resnet10t.c3_in1k",
)  # fmt: skip
BOTH = {"cifar.popup.safetensors": CIFAR, "tiny.popup.safetensors": TINY}


def test_fields_are_those_of_the_documentation() -> None:
    found = metadata(BOTH, "masks", "apache-2.0")
    assert not list(card_errors(found)), "what the Hub refuses"
    assert found.keys() <= FIELDS[""]
    assert {key: found[key] for key in found if key != "model-index"} == {
        "library_name": "popup-surgery", "pipeline_tag": "image-classification", "license": "apache-2.0",
        "tags": ["hidden-network", "supermask", "piggyback", "edge-popup"], "datasets": ["uoft-cs/cifar10"],
        "metrics": ["accuracy"], "base_model": "timm/resnet10t.c3_in1k", "base_model_relation": "adapter",
    }  # fmt: skip
    assert found["base_model_relation"] in RELATIONS
    (model,) = found["model-index"]
    assert model.keys() == FIELDS["model"]
    assert model["name"] == "masks"
    for result in model["results"]:
        assert result.keys() <= FIELDS["result"]
        for part in ("task", "dataset"):
            assert result[part].keys() <= FIELDS[part]
        for metric in result["metrics"]:
            assert metric.keys() <= FIELDS["metric"]
    values = {result["dataset"]["type"]: result["metrics"][0]["value"] for result in model["results"]}
    assert values == {"uoft-cs/cifar10": 0.884, "digits": 0.445}


def test_round_trip_through_the_hubs_own_classes() -> None:
    found = metadata(BOTH, "masks", "mit")
    assert ModelCardData(**found).to_dict() == found
    card = ModelCard(f"---\n{to_yaml(found)}\n---\n# A card\n")
    assert card.data.to_dict() == found
    assert ModelCard(str(card)).data.to_dict() == found
    assert isinstance(card.data, ModelCardData)
    assert {result.metric_value for result in card.data.eval_results or []} == {0.884, 0.445}


def test_only_what_is_known() -> None:
    plain = replace(TINY, library="custom", network="Net", data="", accuracy=None, learner="", split="")
    assert metadata({"a.safetensors": plain}, "masks") == {
        "library_name": "popup-surgery", "tags": ["hidden-network", "supermask"]
    }  # fmt: skip
    assert "datasets" not in metadata({"a.safetensors": TINY}, "masks"), "digits is none of the Hub's"
    headless = replace(TINY, data="", library="timm", arguments={"num_classes": 0})
    assert "pipeline_tag" not in metadata({"a.safetensors": headless}, "masks")


@pytest.mark.parametrize(
    ("data", "identity"),
    [("hfds/me/flowers", "me/flowers"), ("hfids/beans", "beans"), ("torch/mnist", "ylecun/mnist"), ("folder", ""),
     ("digits", ""), ("hfds/../x", ""), ("hfds/a b", ""), ("hfds/<b>", ""), ("hfds/a/b/c", ""), ("wds/me/x", "")],
)  # fmt: skip
def test_data_sets_of_the_hub(data: str, identity: str) -> None:
    assert replace(TINY, data=data).hub_data == identity


@pytest.mark.parametrize(
    ("base", "identity"),
    [
        (Base("timm", "1", "resnet10t", "c3_in1k"), "timm/resnet10t.c3_in1k"),
        (Base("timm", "1", "resnet10t", "another"), ""),
        (Base("timm", "1", "../evil", "x"), ""),
        (Base("timm", "1", "resnet10t", ""), ""),
        (Base("torchvision", "1", "resnet18", "IMAGENET1K_V1"), ""),
        (None, ""),
    ],
)
def test_a_base_of_the_hub_is_one_of_timms_list(base: Base | None, identity: str) -> None:
    assert hub_id(base) == identity


@given(st.text(max_size=300), st.text(max_size=300), st.lists(st.text(max_size=30), max_size=3))
def test_hostile_text_in_yaml(data: str, network: str, classes: list[str]) -> None:
    recipe = {"data": {"name": data, "val_split": network}, "surgery": {"learner": data}}
    manifest = replace(OPENED.manifest, provenance={"accuracy": 0.5, "recipe": recipe, "classes": classes})
    summary = Summary.of(replace(OPENED, manifest=manifest))
    found = metadata({"a.safetensors": summary}, "masks")
    card = ModelCard(f"---\n{to_yaml(found)}\n---\n# A card\n")
    assert card.data.to_dict() == found
    assert card.text == "# A card\n"
    assert found.keys() <= FIELDS[""]
    assert Summary.read(summary.record()) == summary


@pytest.mark.parametrize("provenance", [
    {"recipe": [], "classes": "abc", "accuracy": "high"}, {"recipe": {"data": 3, "surgery": "none"}, "accuracy": 7.0},
    {"recipe": {"data": {"name": ["a"]}, "surgery": {"learner": {}}}, "classes": [1, 2]}, {"accuracy": True},
])  # fmt: skip
def test_values_of_other_types_are_unknown(provenance: dict[str, Any]) -> None:
    found = Summary.of(replace(OPENED, manifest=replace(OPENED.manifest, provenance=provenance)))
    assert (found.data, found.learner, found.classes, found.accuracy) == ("", "", (), None)


def test_records_of_another_form_are_none() -> None:
    whole = TINY.record()
    assert Summary.read(whole) == TINY
    broken: Any
    for broken in (None, 3, [], {}, whole | {"kept": "all"}, whole | {"accuracy": 3.0}, whole | {"classes": [1]},
                   whole | {"data": "a\nb"}, {k: v for k, v in whole.items() if k != "size"}):  # fmt: skip
        assert Summary.read(broken) is None


# what stays of an owner's


def after(there: dict[str, Any], before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in (there | renewed(there, before, now)).items() if value is not None}


def test_what_the_owner_set_added_and_removed_stays() -> None:
    first = metadata({"tiny.popup.safetensors": TINY}, "masks")
    owners = first | {"license": "mit", "tags": ["mine", "supermask"], "pipeline_tag": "other", "thumbnail": "a.png"}
    del owners["metrics"]
    now = metadata(BOTH, "masks")
    found = after(owners, first, now)
    assert found["license"] == "mit"
    assert found["thumbnail"] == "a.png"
    assert found["pipeline_tag"] == "other"
    assert found["tags"] == ["mine", "supermask", "piggyback"], "removed tags stay removed, a new one comes"
    assert "metrics" not in found
    assert found["datasets"] == ["uoft-cs/cifar10"]
    assert found["base_model"] == "timm/resnet10t.c3_in1k"
    assert len(found["model-index"][0]["results"]) == 2
    assert after(found, now, now) == found
    gone = after(found, now, first)
    assert gone.keys() == owners.keys(), "what was ours goes with its artifact"


def test_results_of_the_owner_stay() -> None:
    own = {
        "task": {"type": "image-classification"},
        "dataset": {"type": "me/x", "name": "x"},
        "metrics": [{"type": "f1", "value": 1}],
    }
    first = metadata({"tiny.popup.safetensors": TINY}, "masks")
    there = {"model-index": [{"name": "their name", "results": [own, *first["model-index"][0]["results"]]}]}
    now = metadata({"tiny.popup.safetensors": replace(TINY, accuracy=0.5)}, "masks")
    (model,) = after(there, first, now)["model-index"]
    assert model["name"] == "their name"
    assert own in model["results"]
    values = [metric["value"] for result in model["results"] for metric in result["metrics"]]
    assert sorted(values) == [0.5, 1], "ours is renewed"
    edited = {"model-index": [{"name": "m", "results": [own]}]}
    assert "model-index" not in renewed(edited, first, now), "the owner removed it"
    for strange in ("text", {"a": 1}, [{"name": "x"}], [3]):
        assert "model-index" not in renewed({"model-index": strange}, first, now)


def test_yaml_of_the_owner_keeps_its_lines() -> None:
    text = (
        "# ours\nlicense: mit  # since 2020\n\n# tags of the model\ntags:\n- a\n- b\n\n# about data\ndatasets: [x/y]\n"
        "extra: {deep: [1, 2]}\n# end"
    )
    found = edit_yaml(text, {"tags": ["a", "c"], "library_name": "popup-surgery", "datasets": None})
    assert found == (
        "# ours\nlicense: mit  # since 2020\n\n# tags of the model\ntags:\n- a\n- c\n\n# about data\n"
        "extra: {deep: [1, 2]}\n# end\nlibrary_name: popup-surgery"
    )
    assert edit_yaml("{license: mit}", {"tags": ["a"]}) == "license: mit\ntags:\n- a"
    assert edit_yaml("", {"tags": ["a"]}) == "tags:\n- a"
    assert edit_yaml("# only a comment", {"license": "mit"}) == "# only a comment\nlicense: mit"
    shared = "a: &x [1, 2]\nb: *x\ntags: [t]"
    assert yaml.safe_load(edit_yaml(shared, {"a": None})) == {"b": [1, 2], "tags": ["t"]}
    assert edit_yaml('"tags": &t\n  - a\nother: 1', {"tags": ["b"]}) == "tags:\n- b\nother: 1"


KEYS = st.sampled_from(["license", "tags", "a b", "datasets", "x-y", "é", "model-index"])
TEXT = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), max_size=20)  # PyYAML itself loses some others
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=5,
)


@given(st.dictionaries(KEYS, VALUES, max_size=5), st.dictionaries(KEYS, VALUES, max_size=3))
def test_edited_yaml_has_the_values(there: dict[str, Any], changes: dict[str, Any]) -> None:
    text = yaml.safe_dump(there, allow_unicode=True, sort_keys=False) if there else ""
    wanted = {key: value for key, value in (there | changes).items() if value is not None}
    assert {k: v for k, v in read_yaml(edit_yaml(text, changes), "it").items() if v is not None} == wanted


@pytest.mark.parametrize("text", ["a: [", "- a\n- b", "just text", "a: b: c", "\t- x: y"])
def test_metadata_that_is_none(text: str) -> None:
    with pytest.raises(PopupError, match="mend it first"):
        read_yaml(text, "me/x: README.md")

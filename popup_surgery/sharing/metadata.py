"""The metadata of a model card, as the Hub's documentation has it, and its renewal in a card that has an owner."""

import copy
import re
from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import CardData, EvalResult, ModelCardData

from ..errors import PopupError
from .summary import Summary

LIBRARY = "popup-surgery"
TASK = "image-classification"
INDEX = "model-index"
LISTS = ("tags", "datasets", "metrics", "base_model")  # a key of these may have several values, each added by somebody

Metadata = dict[str, Any]


def metadata(artifacts: Mapping[str, Summary], name: str, license: str | None = None) -> Metadata:
    """Return the metadata of a repository, as plain values.

    Args:
        artifacts: what it holds, by path.
        name: the name of the model in `model-index`.
        license: an identifier of the Hub's list; the metadata has none if it is None.
    """
    found = artifacts.values()
    learners = (one.learner.replace("_", "-") for one in found if re.fullmatch("[a-z][a-z0-9_]{1,39}", one.learner))
    bases = _each(one.base for one in found)
    results = [
        EvalResult(
            task_type=TASK,
            task_name="Image Classification",
            dataset_type=one.hub_data or re.sub(r"[^\w.-]+", "_", one.data, flags=re.ASCII)[:96],
            dataset_name=one.data,
            dataset_split=one.split or None,
            metric_type="accuracy",
            metric_name=f"Accuracy ({path})",
            metric_value=one.accuracy,
        )
        for path, one in artifacts.items()
        if one.accuracy is not None and one.data
    ]
    data = ModelCardData(
        library_name=LIBRARY,
        pipeline_tag=TASK if all(one.classifies for one in found) else None,
        license=license,
        tags=_each(["hidden-network", "supermask", *learners]),
        datasets=_each(one.hub_data for one in found) or None,
        metrics=["accuracy"] if results else None,
        base_model=bases[0] if len(bases) == 1 else bases or None,
        base_model_relation="adapter" if bases else None,  # frozen weights and, beside them, what selects some of them
        model_name=name if results else None,
        eval_results=results or None,
    )
    values: Metadata = data.to_dict()
    return values


def to_yaml(values: Metadata) -> str:
    """Return metadata as YAML, as the Hub's own library writes it."""
    return CardData(**values).to_yaml()


def renewed(there: Metadata, before: Metadata, now: Metadata) -> Metadata:
    """Return the keys to change in a card that has an owner, with their new values; None to remove a key.

    What the owner set, added or removed since this library wrote `before` stays so.

    Args:
        there: the card's metadata.
        before: what this library wrote when it last pushed; empty if it never did.
        now: what it would write into a new card.
    """
    changes: Metadata = {}
    for key in {**before, **now}:
        old, value = there.get(key), now.get(key)
        if key == INDEX:
            value = _index(old, before.get(key), value)
        elif key in LISTS:
            value = _members(old, before.get(key), value)
        elif old != before.get(key):  # the owner's
            value = old
        if value != old:
            changes[key] = value
    return changes


def _each(values: Any) -> list[str]:
    return [value for value in dict.fromkeys(values) if value]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _members(there: Any, before: Any, now: Any) -> Any:
    """Renew the values of one of `LISTS`. A single value is a list only if it was one."""
    old, gone, new = _list(there), _list(before), _list(now)
    kept = [value for value in old if value not in gone or value in new]
    merged = kept + [value for value in new if value not in old and value not in gone]
    if len(merged) == 1 and not isinstance(there if there is not None else now, list):
        return merged[0]
    return merged or None


def _results(index: Any) -> list[tuple[Any, Any, Any]]:
    """Return task, data set and metric of each result in a `model-index`."""
    try:
        return [
            (result["task"], result["dataset"], metric)
            for model in index or []
            for result in model["results"]
            for metric in result["metrics"]
        ]
    except (KeyError, TypeError):
        return []


def _same(one: tuple[Any, Any, Any], other: tuple[Any, Any, Any]) -> bool:
    """Return whether two results are of the same thing, whatever the value."""
    names = [metric.get("name") if isinstance(metric, dict) else metric for metric in (one[2], other[2])]
    return one[:2] == other[:2] and names[0] == names[1]


def _index(there: Any, before: Any, now: Any) -> Any:
    """Renew our results in a `model-index`, among those of the owner."""
    if there is not None and not _results(there):
        return there  # an owner's, of another form
    old, gone = _results(there), _results(before)
    index: Any = copy.deepcopy(there) or []
    for model in index:
        for result in model["results"]:
            task, data = result["task"], result["dataset"]
            result["metrics"] = [m for m in result["metrics"] if (task, data, m) not in gone]
        model["results"] = [result for result in model["results"] if result["metrics"]]
    for task, data, metric in _results(now):
        found = (task, data, metric)
        known = any(_same(found, other) for other in gone)
        if known != any(other in gone and _same(found, other) for other in old):
            continue  # the owner changed or removed it
        if any(_same(found, other) for other in old if other not in gone):
            continue  # the owner's own
        if not index:
            index.append({"name": now[0]["name"], "results": []})
        results = index[0]["results"]
        place = next((r for r in results if r["task"] == task and r["dataset"] == data), None)
        if place is None:
            results.append({"task": task, "dataset": data, "metrics": [metric]})
        else:
            place["metrics"].append(metric)
    return [model for model in index if model["results"]] or None


def read_yaml(text: str, what: str) -> Metadata:
    """Read the metadata of a card that is there; a `PopupError` calls it `what`."""
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise PopupError(
            f"{what} has metadata that is not YAML: {' '.join(str(error).split())}; mend it first"
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise PopupError(
            f"{what} has metadata that is a {type(values).__name__}; expected keys with values: mend it first"
        )
    return values


def edit_yaml(text: str, changes: Metadata) -> str:
    """Change keys of a mapping in YAML text. All other lines stay as they are, comments included.

    Args:
        text: YAML that `read_yaml` takes.
        changes: new values; None removes a key.
    """
    wanted = {key: value for key, value in (read_yaml(text, "the card") | changes).items() if value is not None}
    edited = _edit_lines(text, changes)
    try:
        if yaml.safe_load(edited) == wanted or not (edited or wanted):
            return edited
    except (yaml.YAMLError, ValueError):
        pass
    return to_yaml(wanted)  # a form in which keys have no lines of their own, such as {license: mit}


def _edit_lines(text: str, changes: Metadata) -> str:
    node = yaml.compose(text, yaml.SafeLoader)
    spans = {key.value: (key.start_mark.index, value.end_mark.index) for key, value in node.value} if node else {}
    for key in sorted(changes.keys() & spans.keys(), key=lambda key: -spans[key][0]):  # from the last one up
        first, last = spans[key]
        last = first + len(_AFTER.sub("", text[first:last]))
        new = to_yaml({key: changes[key]}) if changes[key] is not None else ""
        if not new and text[last : last + 1] == "\n":
            last += 1
        text = text[:first] + new + text[last:]
    added = {key: value for key, value in changes.items() if key not in spans and value is not None}
    return "\n".join(filter(None, [text.rstrip("\n"), to_yaml(added) if added else ""]))


_AFTER = re.compile(r"(\n[ \t]*(#[^\n]*)?)+\Z")  # what stands before the next key belongs to it

"""Runs from recipe to artifact: what they reach, what they write, and that they are functions of the recipe alone."""

import dataclasses
import json
import math
import os
import random
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import popup_surgery
from popup_surgery import (
    ArtifactError,
    DataError,
    PopupError,
    Recipe,
    RecipeError,
    Result,
    RunError,
    build,
    convert,
    evaluate,
    inspect,
    load,
    predict,
    save,
    train,
    verify,
)
from popup_surgery.config.schedule import rates
from popup_surgery.config.schema import Data, Training
from support import TWO_EPOCHS, equal_states, numpy_state, short, slow_except


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# the full run


@pytest.mark.slow
def test_digits_reach_97_percent_in_a_file_of_a_few_kilobytes(tmp_path: Path) -> None:
    found = train("digits", output=tmp_path / "run")
    assert found.accuracy >= 0.97
    assert found.file.stat().st_size < 10_000
    assert (found.weights, found.kept) == (23_568, 11_784)
    assert verify(found.file)
    assert inspect(found.file).kept == found.kept


def test_a_run_writes_recipe_metrics_curve_and_artifact_and_nothing_else(digits_run: Result) -> None:
    names = {path.name for path in digits_run.output.iterdir()}
    assert names == {"recipe.yaml", "metrics.jsonl", "curve.png", "masks.png", digits_run.file.name}


def digits_run_recipe() -> Recipe:
    return Recipe.load("digits", ["training.epochs=10"])


def test_metrics_have_a_line_of_json_for_each_epoch(digits_run: Result) -> None:
    lines = [json.loads(line) for line in (digits_run.output / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 11))
    assert [line["accuracy"] for line in lines] == [epoch.accuracy for epoch in digits_run.history]
    assert lines[-1]["accuracy"] == digits_run.accuracy, "the last epoch's, not the best"
    assert lines[0]["train_loss"] > 5 * lines[-1]["train_loss"]
    assert all(0 <= line["train_accuracy"] <= 1 and line["seconds"] > 0 for line in lines)
    training = digits_run_recipe().training
    assert [line["lr"] for line in lines] == pytest.approx([rates(training)(e, 1.0) for e in range(10)])


@pytest.mark.parametrize("name", ["curve.png", "masks.png"])
def test_the_pictures_have_something_in_them(name: str, digits_run: Result) -> None:
    with Image.open(digits_run.output / name) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
        pixels = np.array(picture.convert("RGB")).reshape(-1, 3)
    assert (pixels != 255).any(1).mean() > 0.01
    assert (np.abs(pixels.astype(int) - (0x00, 0x72, 0xB2)).max(1) < 10).sum() > 100, "the curve, and the dots"


def test_the_result_is_what_the_file_gives(digits_run: Result) -> None:
    loaded = load(digits_run.file)
    assert equal_states(digits_run.model, loaded)
    assert not digits_run.model.training
    images = torch.randn(9, 1, 8, 8)
    assert torch.equal(digits_run.model(images), loaded(images))
    assert {type(module) for module in digits_run.model.modules()} == {type(module) for module in loaded.modules()}


def test_evaluate_gives_the_runs_accuracy(digits_run: Result) -> None:
    result = evaluate(digits_run.file)
    assert result.accuracy == digits_run.accuracy
    assert (result.images, result.data) == (359, "digits")


def test_the_file_says_where_it_comes_from(digits_run: Result) -> None:
    provenance = inspect(digits_run.file).provenance
    assert provenance["accuracy"] == digits_run.accuracy
    assert provenance["epochs"] == 10
    assert provenance["classes"] == [str(i) for i in range(10)]
    assert Recipe.parse(provenance["recipe"]) == digits_run_recipe()
    assert provenance["software"]["popup_surgery"] == popup_surgery.__version__


# a function of the recipe


def test_the_written_recipe_runs_again_to_the_same_file(first: Result, tmp_path: Path) -> None:
    again = train(first.output / "recipe.yaml", output=tmp_path / "again")
    assert Recipe.load(again.output / "recipe.yaml") == Recipe.load(first.output / "recipe.yaml")
    assert again.file.read_bytes() == first.file.read_bytes()


def test_the_same_recipe_gives_the_same_bytes_whatever_the_ambient_seeds(first: Result, tmp_path: Path) -> None:
    random.seed(11)
    np.random.seed(12)
    torch.manual_seed(13)
    states = random.getstate(), numpy_state(), torch.get_rng_state()
    again = short(tmp_path / "elsewhere" / "with another name")
    assert again.file.read_bytes() == first.file.read_bytes()
    assert [dataclasses.replace(e, seconds=0, images_per_second=0) for e in again.history] == [
        dataclasses.replace(e, seconds=0, images_per_second=0) for e in first.history
    ]
    assert random.getstate() == states[0], "a run leaves the caller's generators alone"
    assert numpy_state() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.slow
@pytest.mark.parametrize("override", ["training.seed=1", "surgery.seed=1"])
def test_another_seed_gives_another_file(first: Result, tmp_path: Path, override: str) -> None:
    other = short(tmp_path / "run", override)
    assert inspect(other.file).masks_sha256 != inspect(first.file).masks_sha256
    assert inspect(other.file).seed == (1 if "surgery" in override else 0)


def test_the_seed_of_the_training_leaves_the_weights_alone(first: Result, tmp_path: Path) -> None:
    other = short(tmp_path / "run", "training.seed=1")
    for key, weight in other.model.state_dict().items():
        both = (weight != 0) & (first.model.state_dict()[key] != 0)
        assert torch.equal(weight[both], first.model.state_dict()[key][both])


def test_no_path_clock_or_speed_in_the_file(first: Result, images: Path, tmp_path: Path) -> None:
    values = tiny_folder_recipe(images)
    values["data"]["download"] = False
    for result in (first, train(values, output=tmp_path / "run")):
        data = result.file.read_bytes().lower()
        for secret in (tmp_path, first.output, images, images.parent, Path.cwd(), Path.home() / "x", Path("/tmp")):
            assert str(secret).lower().encode() not in data
        for word in ("second", "images_per", "2026", "date", "duration", "hostname", os.uname().nodename):
            assert word.lower().encode() not in data, word


def tiny_folder_recipe(images: Path) -> dict[str, Any]:
    return {
        "model": {
            "name": "popup_surgery/fc",
            "kwargs": {"width": 0.05, "in_chans": 3, "img_size": 16, "num_classes": 3},
        },
        "surgery": {"k": 0.5, "scaled": False},
        "data": {"name": "folder", "root": str(images), "batch_size": 4, "workers": 0},
        "training": {"epochs": 1, "lr": 0.1},
    }


# the output folder


def test_a_folder_with_a_run_is_refused_and_stays_as_it_is(first: Result) -> None:
    before = contents(first.output)
    with pytest.raises(RunError, match="holds a run"):
        short(first.output)
    assert contents(first.output) == before


@pytest.mark.parametrize("left", ["metrics.jsonl", "digits.popup.safetensors", "curve.png"])
def test_a_folder_with_what_a_run_left_is_refused_and_stays_as_it_is(tmp_path: Path, left: str) -> None:
    (tmp_path / left).write_text("somebody's work")
    with pytest.raises(RunError):
        train("digits", overrides=["training.epochs=1"], output=tmp_path)
    assert contents(tmp_path) == {left: b"somebody's work"}


def test_runs_go_to_runs_and_the_recipes_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = train("digits", overrides=["training.epochs=1"])
    assert (tmp_path / "runs" / "digits" / "digits.popup.safetensors").samefile(result.file)


def test_an_output_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(PopupError, match="file"):
            short(output)


def test_a_recipe_that_cannot_be_run_leaves_no_folder(tmp_path: Path) -> None:
    for bad in (
        "data.input_size=[1, 9, 9]",
        "surgery.k=1e-17",
        "surgery.include=nothing",
        "model.kwargs.num_classes=9",
    ):
        with pytest.raises(PopupError):
            short(tmp_path / "run", bad)
        assert not (tmp_path / "run").exists(), bad


@pytest.mark.slow
def test_metrics_are_written_while_it_runs(tmp_path: Path) -> None:
    seen = []
    short(tmp_path, after_epoch=lambda epoch: seen.append((tmp_path / "metrics.jsonl").read_text().count("\n")))
    assert seen == [1, 2]


def test_progress_is_called_for_each_step(tmp_path: Path) -> None:
    from contextlib import contextmanager

    steps: dict[str, list[int]] = {}

    @contextmanager
    def progress(total: int | None, what: str) -> Any:
        steps[what] = [total or 0, 0]

        def step() -> None:
            steps[what][1] += 1

        yield step

    short(tmp_path, progress=progress)
    assert steps == {"epoch 1/2": [45, 45], "epoch 2/2": [45, 45]}


# other ways to train


def test_a_dense_run_trains_and_writes_its_weights(tmp_path: Path) -> None:
    result = short(tmp_path, "surgery=none", "training.lr=0.1")
    assert result.accuracy > 0.7
    assert result.file.suffix == ".safetensors"
    assert ".popup" not in result.file.name
    written = load_file(result.file)
    state = result.model.state_dict()
    assert sorted(written) == sorted(state)
    assert all(torch.equal(written[key], state[key]) for key in state)
    assert result.weights == result.kept == 23_568
    again = short(tmp_path / "again", "surgery=none", "training.lr=0.1")
    assert again.file.read_bytes() == result.file.read_bytes()


def test_training_changes_the_scores_and_nothing_else(first: Result) -> None:
    fresh = convert(build("popup_surgery/conv2", width=0.25, in_chans=1, img_size=8), 0.5, scaled=False)
    raw = {
        name: fresh.get_submodule(name)._parameters["weight"]
        for name, m in fresh.named_modules()
        if hasattr(m, "weight")
    }
    start = popup_surgery.masks(fresh)
    changed = 0
    for name, weight in raw.items():
        trained: Any = first.model.get_submodule(name).weight
        kept: Any = trained != 0
        assert weight is not None
        assert int(kept.sum()) == weight.numel() // 2
        assert torch.equal(trained[kept], weight[kept]), "what is kept is the seed's weight, to the bit"
        changed += int((kept != start[f"{name}.weight"]).sum())
    assert changed > 100


def test_the_loop_leaves_raw_weights_alone_and_moves_scores() -> None:
    from popup_surgery.data.batches import quiet
    from popup_surgery.data.open import open_data
    from popup_surgery.training.distributed import start
    from popup_surgery.training.trainer import Trainer

    recipe = Recipe.load("digits", ["training.epochs=1"])
    model = convert(build("conv2", width=0.25, in_chans=1, img_size=8), 0.5, scaled=False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    data = open_data(recipe.data, (1, 8, 8), 0, torch.device("cpu"), quiet)
    Trainer(model, data, recipe.training, start(recipe.training), quiet).run(lambda epoch: None)
    after = dict(model.named_parameters())
    assert [name for name in before if not torch.equal(before[name], after[name])] == [
        name for name in before if name.endswith("_score")
    ]
    assert all(parameter.grad is None for name, parameter in after.items() if not name.endswith("_score"))


@pytest.mark.parametrize(
    ("epochs", "warmup", "schedule"),
    [(10, 0, "cosine"), (10, 3, "cosine"), (5, 0, "constant"), (5, 2, "constant"), (3, 3, "cosine")],
)
def test_the_learning_rate_follows_the_papers_formula(epochs: int, warmup: int, schedule: Any) -> None:
    training = Training(epochs=epochs, lr=0.1, schedule=schedule, warmup_epochs=warmup)
    for e in range(epochs):
        if e < warmup:
            wanted = (e + 1) / warmup
        elif schedule == "constant":
            wanted = 1.0
        else:
            wanted = 0.5 * (1 + math.cos(math.pi * (e - warmup) / (epochs - warmup)))
        assert rates(training)(e, 1.0) == pytest.approx(0.1 * wanted, abs=1e-12), e


def test_the_optimiser_runs_at_that_rate(tmp_path: Path) -> None:
    result = train("digits", overrides=["training.epochs=4", "training.warmup_epochs=2"], output=tmp_path)
    assert [epoch.lr for epoch in result.history] == pytest.approx([0.05, 0.1, 0.1, 0.05])


def test_more_warm_up_than_epochs_is_refused_or_warms_up(tmp_path: Path) -> None:
    try:
        result = train("digits", overrides=["training.epochs=2", "training.warmup_epochs=4"], output=tmp_path)
    except RecipeError:
        return
    assert [epoch.lr for epoch in result.history] == pytest.approx([0.025, 0.05])


@pytest.mark.slow
def test_bfloat16_runs_and_the_precision_may_change_between_runs(first: Result, tmp_path: Path) -> None:
    low = short(tmp_path / "low", "training.precision=bfloat16")
    assert low.accuracy > 0.6
    assert inspect(low.file).masks_sha256 != inspect(first.file).masks_sha256
    assert {tensor.dtype for tensor in low.model.state_dict().values()} == {torch.float32}
    assert evaluate(low.file).accuracy == pytest.approx(low.accuracy, abs=0.02)
    full = short(tmp_path / "full")
    assert full.file.read_bytes() == first.file.read_bytes()


@pytest.mark.parametrize("optimizer", slow_except(["adamw", "lion", "nadam"], ["lion"]))
def test_other_optimisers_of_timm(tmp_path: Path, optimizer: str) -> None:
    overrides = [f"training.optimizer={optimizer}", "training.lr=1e-3", "training.epochs=1"]
    result = train("digits", overrides=overrides, output=tmp_path)
    assert result.history[0].train_accuracy > 0.12


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"the loss of step \d+, in epoch 1, is not finite at the rate 1e\+30"):
        short(tmp_path / "run", "surgery=none", "training.lr=1e30")
    assert not list((tmp_path / "run").glob("*.safetensors"))
    with pytest.raises(
        RunError,
        match=r"not finite at the rate \S+; the last checkpoint before it is \d{10}\.json; try a lower training\.lr$",
    ) as caught:
        short(
            tmp_path / "late", "surgery=none", "training.lr=3e4", "training.schedule_per=step",
            "training.checkpoint_minutes=0.00001",
        )  # fmt: skip
    ((step, rate),) = re.findall(r"of step (\d+), .* at the rate (\S+);", str(caught.value))
    assert float(rate) == pytest.approx(3e4 / 2 * (1 + math.cos(math.pi * (int(step) - 1) / 90)), rel=1e-4)


def test_scores_that_are_not_finite_are_never_kept(tmp_path: Path) -> None:
    """No loss shows them: the mask of such scores is as good as another."""
    with pytest.raises(
        RunError, match=r"^\S+_score after the update of step 45, in epoch 1, is not finite at the rate "
    ):
        short(tmp_path / "run", "training.lr=1e38", "training.weight_decay=100")
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_a_recipe_may_be_values_or_a_recipe_object(first: Result, tmp_path: Path) -> None:
    recipe = Recipe.load("digits", TWO_EPOCHS)
    one = train(recipe, output=tmp_path / "one")
    other = train(recipe.dump(), output=tmp_path / "other")
    assert one.file.read_bytes() == other.file.read_bytes() == first.file.read_bytes()


def test_overrides_of_a_recipe_object_are_not_dropped_in_silence(tmp_path: Path) -> None:
    recipe = Recipe.load("digits", TWO_EPOCHS)
    for given in (recipe, recipe.dump()):
        try:
            result = train(given, overrides=["training.epochs=1"], output=tmp_path / type(given).__name__)
        except PopupError:
            continue
        assert len(result.history) == 1


def test_batch_norm_statistics_belong_to_the_result(images: Path, tmp_path: Path) -> None:
    values = tiny_folder_recipe(images)
    values["model"] = {"name": "timm/test_resnet", "kwargs": {"num_classes": 3}}
    values["data"]["input_size"] = [3, 16, 16]
    result = train(values, output=tmp_path)
    means = [buffer for name, buffer in result.model.named_buffers() if name.endswith("running_mean")]
    assert means
    assert all(mean.abs().sum() > 0 for mean in means)
    assert equal_states(result.model, load(result.file))
    assert verify(result.file)
    assert evaluate(result.file, data_dir=images).accuracy == result.accuracy


@pytest.mark.slow
def test_dropout_and_the_like_follow_the_recipes_seed(tmp_path: Path) -> None:
    overrides = ["model={name: timm/test_vit, kwargs: {img_size: 16, patch_size: 8, in_chans: 1, drop_rate: 0.2}}"]
    overrides += ["model.kwargs.num_classes=10"]
    overrides += ["data.input_size=[1, 16, 16]", "training.epochs=1"]
    with pytest.raises(DataError, match=r"1 × 8 × 8.*1 × 16 × 16"):
        train("digits", overrides=overrides, output=tmp_path / "small")
    files: list[bytes] = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        values = Recipe.load("digits", overrides).dump()
        values["model"]["kwargs"]["img_size"] = 8
        values["model"]["kwargs"]["patch_size"] = 4
        values["data"]["input_size"] = None
        values["training"]["seed"] = seed
        torch.manual_seed(len(files))
        files.append(train(values, output=tmp_path / name).file.read_bytes())
    assert files[0] == files[1]
    assert files[0] != files[2]


# evaluate


def test_evaluate_on_another_data_set(digits_run: Result, images: Path, tmp_path: Path) -> None:
    other = Data(name="digits", val_split="train", batch_size=100, mean=[0.306], std=[0.376])
    result = evaluate(digits_run.file, data=other)
    assert result.images == 1438
    assert result.accuracy == pytest.approx(digits_run.history[-1].train_accuracy, abs=0.01)
    with pytest.raises(DataError, match=r"has the classes 'cat', 'dog', 'eel', which the network was not trained on"):
        evaluate(digits_run.file, data=Data(name="folder", workers=0), data_dir=images)


def test_evaluate_a_file_that_names_no_data_set(tmp_path: Path) -> None:
    path = tmp_path / "plain.popup.safetensors"
    save(convert(build("conv2", width=0.25, in_chans=1, img_size=8), 0.5), path)
    with pytest.raises(DataError, match=r"data\.name"):
        evaluate(path)
    mine = Data(name="digits", mean=[0.306], std=[0.376])
    assert 0 < evaluate(path, data=mine).accuracy < 0.5


def test_evaluate_takes_neither_folder_nor_download_from_the_file(tmp_path: Path, images: Path) -> None:
    path = tmp_path / "evil.popup.safetensors"
    model = convert(build("fc", width=0.05, in_chans=3, img_size=16, num_classes=3), 0.5)
    data = tiny_folder_recipe(images)["data"] | {"download": True}
    save(model, path, provenance={"recipe": {"data": data}})
    with pytest.raises(DataError, match=r"--data-dir|data\.root"):
        evaluate(path)
    assert evaluate(path, data_dir=images).images == 6


@pytest.mark.parametrize("recipe", [None, 3, [], {"data": None}, {"data": {"name": 3}}, {"data": {"nonsense": 1}}])
def test_evaluate_a_file_with_an_odd_provenance(tmp_path: Path, recipe: Any) -> None:
    path = tmp_path / "odd.popup.safetensors"
    model = convert(build("conv2", width=0.25, in_chans=1, img_size=8), 0.5)
    save(model, path, provenance={"recipe": recipe})
    with pytest.raises((DataError, RecipeError)):
        evaluate(path)


def test_evaluate_what_is_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"nothing")
    with pytest.raises(ArtifactError):
        evaluate(tmp_path / "file")
    with pytest.raises(PopupError, match="nowhere"):
        evaluate(tmp_path / "nowhere")


def test_a_call_within_a_folder_without_rights_to_write(tmp_path: Path, make_images: Callable[..., None]) -> None:
    with pytest.raises(PopupError, match="cannot be written"):
        short(Path("/proc/self/runs"))


def test_predict_names_the_classes_of_images(digits_run: Result, images: Path, tmp_path: Path) -> None:
    from support import write_digit

    for label in (3, 7):
        write_digit(tmp_path / f"{label}.png", label)
    found = predict(digits_run.file, [tmp_path / "3.png", tmp_path / "7.png"])
    assert [classes[0][0] for classes in found] == ["3", "7"]
    assert all(len(classes) == 5 for classes in found)
    assert all(a[1] >= b[1] > 0 for classes in found for a, b in pairwise(classes))
    (tmp_path / "no.png").write_text("none")
    with pytest.raises(DataError, match=r"no\.png cannot be read as an image"):
        predict(digits_run.file, [tmp_path / "no.png"])
    result = train(
        {
            "model": {"name": "conv2", "kwargs": {"img_size": 16, "num_classes": 3, "width": 0.1}},
            "surgery": {"k": 0.5, "scaled": True},
            "data": {"name": "folder", "root": str(images)},
            "training": {"epochs": 1, "lr": 0.1},
        },
        output=tmp_path / "run",
    )
    classes = predict(result.file, [next((images / "validation" / "dog").iterdir())])[0]
    assert {name for name, _ in classes} == {"cat", "dog", "eel"}
    assert sum(share for _, share in classes) == pytest.approx(1)

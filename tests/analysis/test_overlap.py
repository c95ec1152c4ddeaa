"""`overlap` and `diff`: counted by hand on masks of known places, and the same from networks, files and masks."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import popup_surgery as ps
from popup_surgery import Artifact, ArtifactError, ConversionError, bake, build, convert, load, masks, overlap, save
from support import Outcome

SIZE: Any = {"in_chans": 1, "img_size": 8, "width": 0.25}


def files(folder: Path, **more: float) -> list[Path]:
    found = []
    for seed, k in enumerate((0.5, more.get("k", 0.5))):
        found.append(folder / f"{seed}.popup.safetensors")
        save(convert(build("popup_surgery/conv2", **SIZE), k, seed=seed), found[-1])
    return found


def test_the_shares_counted_by_hand() -> None:
    a = {"x": torch.tensor([1, 1, 1, 0, 0, 0, 0, 0], dtype=torch.bool), "y": torch.tensor([[True, False]])}
    b = {"x": torch.tensor([0, 1, 1, 1, 1, 0, 0, 0], dtype=torch.bool), "y": torch.tensor([[True, True]])}
    found = overlap(a, b)
    x, y = found.layers
    assert (x.both, x.one, x.neither) == (2 / 8, 3 / 8, 3 / 8)
    assert x.chance == pytest.approx((3 / 8 * 4 / 8, 3 / 8 * 4 / 8 + 5 / 8 * 4 / 8, 5 / 8 * 4 / 8))
    assert (y.both, y.one, y.neither) == (0.5, 0.5, 0.0)
    assert y.chance == pytest.approx((0.5, 0.5, 0.0))
    total = found.total
    assert (total.weights, total.kept_a, total.kept_b, total.kept_both) == (10, 4, 6, 3)
    assert total.chance == pytest.approx(tuple((8 * cx + 2 * cy) / 10 for cx, cy in zip(x.chance, y.chance)))
    assert str(found).splitlines()[1].split() == [
        "x", "8", "25.0", "%", "18.8", "%", "37.5", "%", "50.0", "%", "37.5", "%", "31.2", "%",
    ]  # fmt: skip


def test_networks_files_and_masks_give_the_same(tmp_path: Path) -> None:
    one, other = files(tmp_path, k=0.3)
    nets = [convert(build("popup_surgery/conv2", **SIZE), k, seed=seed) for seed, k in enumerate((0.5, 0.3))]
    save_file(masks(other), tmp_path / "run.masks.safetensors")
    expected = overlap(masks(nets[0]), masks(nets[1]))
    pairs: list[Any] = [
        (*nets,),
        (one, other),
        (str(one), Artifact.open(other)),
        (nets[0], tmp_path / "run.masks.safetensors"),
    ]
    for a, b in pairs:
        assert {layer.name: layer for layer in overlap(a, b).layers} == {e.name: e for e in expected.layers}
    assert expected.total.both == pytest.approx(0.15, abs=0.01)  # other seeds: chance
    same = overlap(nets[0], one).total
    assert (same.one, same.both) == (0, pytest.approx(0.5, abs=0.01))


def test_masks_of_a_file_are_those_of_the_network(tmp_path: Path) -> None:
    model = convert(build("popup_surgery/conv2", **SIZE), 0.5)
    save(model, tmp_path / "a.popup.safetensors")
    expected = masks(model)
    save_file(expected, tmp_path / "a.masks.safetensors")
    for source in (tmp_path / "a.popup.safetensors", str(tmp_path / "a.masks.safetensors")):
        found = masks(source)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], mask) for name, mask in expected.items())
    for plain in (load(tmp_path / "a.popup.safetensors"), bake(model)):
        with pytest.raises(ConversionError, match=r"the ConvNet has no masked weight, .* expected the network that"):
            masks(plain)
        with pytest.raises(ConversionError, match="has no masked weight"):
            overlap(plain, model)


def test_a_damaged_file_of_masks_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.masks.safetensors"
    save_file({"x": torch.ones(5, dtype=torch.bool)}, file)
    file.write_bytes(file.read_bytes()[:-1] + b"\x02")
    with pytest.raises(ArtifactError, match=r"a\.masks\.safetensors: a mask has bytes other than 0 and 1"):
        masks(file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="the data has 4 bytes, the tensors need 5"):
        masks(file)


def test_masks_of_other_networks_are_refused_and_other_layers_named() -> None:
    one, two = torch.ones(2, 3, dtype=torch.bool), torch.ones(3, 2, dtype=torch.bool)
    with pytest.raises(ConversionError, match=r"mask no weight of the same name: x and y; expected masks of the same"):
        overlap({"x": one}, {"y": one})
    with pytest.raises(ConversionError, match=r"'x' has the shape \(2, 3\) in the first and \(3, 2\) in the second"):
        overlap({"x": one}, {"x": two})
    found = overlap({"x": one, "head": one}, {"x": one, "stem": two})
    assert (found.only_a, found.only_b) == (("head",), ("stem",))
    assert str(found).endswith("masked in the first alone: head\nmasked in the second alone: stem")


def test_diff_prints_the_table_and_json(cli: Callable[..., Outcome], tmp_path: Path) -> None:
    one, other = files(tmp_path)
    done = cli("diff", one, other)
    assert (done.status, done.err, done.out) == (0, "", f"{overlap(one, other)}\n")
    values = json.loads(cli("diff", one, other, "--json").out)
    assert values["total"]["chance_both"] == pytest.approx(0.25, abs=0.01)
    assert len(values["layers"]) == 5
    refused = cli("diff", one, tmp_path / "nowhere")
    assert (refused.status, refused.out) == (2, "")
    assert re.fullmatch(r"error: \S+/nowhere: the file does not exist\n", refused.err)


def test_it_is_public() -> None:
    assert {"LayerOverlap", "Overlap", "masks", "overlap"} <= set(ps.__all__)

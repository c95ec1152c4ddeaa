"""What networks return in training, and how many images they need at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from popup_surgery import DataError, build, train
from popup_surgery.config.schema import Training
from popup_surgery.data.batches import ProcessShard
from popup_surgery.experiment import results, setup
from popup_surgery.training.distributed import start
from popup_surgery.training.outputs import answers, fewest_images
from popup_surgery.training.step import OptimizerStep
from support import lines, opened, run_digits, slow_except, stopping, write_images

DIGITS: dict[str, Any] = {
    "surgery": {"k": 0.5, "scaled": False},
    "data": {"name": "digits", "max_train": 33, "max_validation": 10, "batch_size": 16, "input_size": [1, 8, 8]},
    "training": {"epochs": 1, "lr": 0.1},
}
RESNET: dict[str, Any] = {"name": "timm/test_resnet", "kwargs": {"in_chans": 1, "num_classes": 10}}  # 1 × 1 maps


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "_draw", lambda run, trainer: None)


# auxiliary heads


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side", "weights"), [("googlenet", 32, [0.3, 0.3]), ("inception_v3", 299, [0.4])])
def test_auxiliary_heads_count_as_in_the_references(name: str, side: int, weights: list[float]) -> None:
    torch.manual_seed(0)
    net = build(f"torchvision/{name}", num_classes=3)
    images, labels = torch.randn(2, 3, side, side), torch.tensor([0, 2])
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    net.train()
    main, *others = net(images)
    criterion = nn.functional.cross_entropy
    expected = criterion(main, labels) + sum(w * criterion(o, labels) for w, o in zip(weights, others, strict=True))
    training = Training(epochs=1, lr=1e-9)
    step = OptimizerStep(net, training, start(training), ProcessShard(), 3)
    loss, logits = step._backward(images, labels, 1.0)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(logits, main.detach())
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "quantized_googlenet"])
def test_a_recipe_with_auxiliary_heads_trains_and_resumes(name: str, ten: Path, tmp_path: Path) -> None:
    side = 299 if name == "inception_v3" else 32
    values = {
        "model": {"name": f"torchvision/{name}", "kwargs": {"num_classes": 10}},
        "surgery": {"k": 0.5, "scaled": False},
        "data": {
            "name": "folder", "root": str(ten), "batch_size": 13, "max_train": 27, "max_validation": 4, "workers": 0,
            "input_size": [3, side, side],
        },
        "training": {"epochs": 1, "lr": 0.1},
    }  # fmt: skip
    through = train(values, output=tmp_path / "through")
    with pytest.raises(Exception, match="stopped after step 1"):
        train(values, output=tmp_path / "run", progress=stopping(3))
    assert train(values, output=tmp_path / "run", resume=True).file.read_bytes() == through.file.read_bytes()


ELSEWHERE = {
    "detection": "fasterrcnn_mobilenet_v3_large_320_fpn fcos_resnet50_fpn keypointrcnn_resnet50_fpn ssd300_vgg16 "
    "maskrcnn_resnet50_fpn retinanet_resnet50_fpn ssdlite320_mobilenet_v3_large",
    "segmentation": "lraspp_mobilenet_v3_large deeplabv3_resnet50 fcn_resnet50",
    "flow": "raft_small raft_large",
    "video": "r3d_18 mc3_18 r2plus1d_18 s3d mvit_v1_b swin3d_t",
}


@pytest.mark.parametrize(
    "name",
    slow_except(
        [name for names in ELSEWHERE.values() for name in names.split()],
        ["lraspp_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large", "raft_small"],
    ),
)
def test_what_is_no_classifier_is_refused_before_the_data_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(*arguments: Any) -> Any:
        raise AssertionError("the data was read")

    monkeypatch.setattr(setup, "open_data", unread)
    with pytest.raises(DataError) as caught:
        train(
            DIGITS | {"model": {"name": f"torchvision/{name}"}},
            overrides=["data.input_size=[3, 64, 64]"],
            output=tmp_path / "run",
        )
    said = str(caught.value)
    assert "\n" not in said
    if name in ELSEWHERE["segmentation"].split():
        assert said.startswith(f"torchvision/{name} returns a OrderedDict of out")
    assert "networks that classify images" in said or "does not take images of 3 × 64 × 64; set data.input_size" in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "levit_128s", "pit_ti_distilled_224", "repvit_m1"])
def test_heads_of_distillation_train_as_their_mean(name: str) -> None:
    net = build(f"timm/{name}", num_classes=10)
    assert answers(net, (3, 224, 224)) == 10
    assert fewest_images(net, (3, 224, 224), 10) == (2 if name in ("levit_128s", "repvit_m1") else 1)


def test_a_network_that_returns_another_tuple_is_refused_in_a_sentence() -> None:
    net = build("timm/deit_tiny_distilled_patch16_224", num_classes=10, img_size=32)
    net.set_distilled_training(True)  # type: ignore[operator]
    with pytest.raises(DataError, match=r"^timm/deit_tiny_distilled_patch16_224 returns a tuple in training; "):
        fewest_images(net, (3, 32, 32), answers(net, (3, 32, 32)))


# batch norms over 1 × 1 maps


def test_it_is_tried_how_many_images_a_network_needs_and_nothing_changes() -> None:
    net = build("timm/test_resnet", in_chans=1, num_classes=10)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    state, modes = torch.get_rng_state(), [module.training for module in net.modules()]
    assert fewest_images(net, (1, 8, 8), 10) == 2
    assert fewest_images(net, (1, 64, 64), 10) == 1
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in net.modules()]
    after = net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("accumulate", slow_except([1, 4, 16], [4]))
def test_a_last_batch_of_one_joins_the_one_before(accumulate: int, tmp_path: Path) -> None:
    values = DIGITS | {"model": RESNET}
    more = [f"training.accumulate={accumulate}", "training.epochs=2"]
    through = train(values, overrides=more, output=tmp_path / "through")
    with pytest.raises(Exception, match="stopped after step 2, in epoch 1"):
        train(values, overrides=more, output=tmp_path / "run", progress=stopping(2))
    assert (
        train(values, overrides=more, output=tmp_path / "run", resume=True).file.read_bytes()
        == through.file.read_bytes()
    )


def test_a_last_batch_of_one_joins_the_one_before_where_images_are_streamed(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("validation", 1)):
        write_images(tmp_path / split, count=count, size=(8, 8))
    values = DIGITS | {
        "model": {"name": "timm/test_resnet", "kwargs": {"num_classes": 3}},
        "data": {
            "name": "folder", "root": str(tmp_path), "batch_size": 4, "workers": 0, "in_memory": False,
            "input_size": [3, 8, 8],
        },
    }  # fmt: skip
    through = train(values, output=tmp_path / "through")
    for after in (1, 2):
        with pytest.raises(Exception, match=f"stopped after step {after}, in epoch 1"):
            train(values, output=tmp_path / f"run{after}", progress=stopping(after))
        again = train(values, output=tmp_path / f"run{after}", resume=True)
        assert again.file.read_bytes() == through.file.read_bytes()
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"")  # a piece of one image, and of none
    more = ["data.on_error=skip", "training.accumulate=2"]
    assert lines(train(values, overrides=more, output=tmp_path / "skip").output)[0]["skipped"] == 1


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(("count", "size", "sizes"), [(9, 4, [4, 5]), (8, 4, [4, 4]), (10, 4, [4, 4, 2]), (5, 4, [5])])
def test_every_image_is_in_one_batch_and_no_piece_has_fewer_than_it_needs(
    count: int, size: int, sizes: list[int], in_memory: bool, tmp_path: Path, make_images: Callable[..., None]
) -> None:
    make_images(tmp_path / "train", ("cat",), count=count)
    make_images(tmp_path / "validation", ("cat",), count=1)
    config: dict[str, Any] = {"name": "folder", "root": str(tmp_path), "batch_size": size, "in_memory": in_memory}
    data = opened(**config)
    data.least = 2
    assert data.steps() == len(sizes)
    assert [len(labels) for _, labels, _ in data.train(0)] == sizes
    for first in range(len(sizes) + 1):
        assert [len(labels) for _, labels, _ in data.train(0, first=first)] == sizes[first:]
    for processes, accumulate in ((1, 3), (2, 1), (2, 2), (5, 1)):
        pieces = [list(data.train(0, ProcessShard(rank, processes, accumulate))) for rank in range(processes)]
        assert {len(one) for one in pieces} == {len(sizes) * accumulate}
        assert all(len(labels) >= 2 for one in pieces for _, labels, _ in one)
        assert sum(len(labels) for one in pieces for _, labels, weight in one if weight) == count
        assert sum(weight for one in pieces for *_, weight in one) == pytest.approx(len(sizes))


def test_the_cut_of_a_network_that_needs_one_image_is_what_it_was() -> None:
    def cut(length: int, part: ProcessShard) -> list[Any]:
        """As of version 0.1.0."""
        batch, found = list(range(length)), []
        size, more = divmod(len(batch), part.pieces)
        for i in range(part.rank * part.accumulate, (part.rank + 1) * part.accumulate):
            start = i * size + min(i, more)
            piece = batch[start : start + size + (i < more)]
            found.append((piece, len(piece) / len(batch)) if len(piece) else (batch[:1], 0.0))
        return found

    for length in range(1, 20):
        for processes, accumulate in ((1, 1), (1, 3), (2, 2), (5, 1), (3, 4)):
            for rank in range(processes):
                part = ProcessShard(rank, processes, accumulate)
                assert list(part.cut(list(range(length)))) == cut(length, part)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "data.batch_size=1",
            r"^data\.batch_size is 1; the network has batch norms over maps of 1 × 1, which",
        ),
        ("data.max_train=1", r"^the data set has 1 training image; the network has batch norms"),
    ],
)
def test_what_cannot_be_avoided_is_said_before_the_epoch(setting: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        train(DIGITS | {"model": RESNET}, overrides=[setting], output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_get_pieces_that_batch_norms_train_on(tmp_path: Path) -> None:
    sets = ["model={name: timm/test_resnet, kwargs: {in_chans: 1, num_classes: 10}}", "data.input_size=[1, 8, 8]"]
    sets += ["data.max_train=35", "data.batch_size=16"]  # the last batch has three images
    done = run_digits(tmp_path / "run", "--num-processes", "2", *(word for s in sets for word in ("--set", s)))
    assert done.returncode == 0, done.stderr

"""Dense weights that this library wrote: the network that they are read into computes what was written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from popup_surgery import ArtifactError, build
from popup_surgery.experiment.dense import write_dense
from popup_surgery.experiment.opened import open_result

NAME = "timm/vit_small_patch16_rope_224"  # its buffers are computed when it is built


def test_a_name_is_written_only_if_it_builds_the_network(tmp_path: Path) -> None:
    model: Any = build("timm/test_resnet")
    model.maxpool = nn.Identity()
    write_dense(model, tmp_path / "net.safetensors", {})
    with pytest.raises(ArtifactError, match=r"net\.safetensors"):
        open_result(tmp_path / "net.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_files_dtypes_count_whatever_the_default(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(NAME).to(dtype)
    write_dense(model, tmp_path / "net.safetensors", {})
    torch.set_default_dtype(torch.float64)
    try:
        loaded = open_result(tmp_path / "net.safetensors").network()
    finally:
        torch.set_default_dtype(torch.float32)
    expected = dict(model.named_buffers()) | dict(model.named_parameters())
    found = dict(loaded.named_buffers()) | dict(loaded.named_parameters())
    assert [key for key, tensor in expected.items() if found[key].dtype != tensor.dtype] == []
    assert [key for key, tensor in expected.items() if not torch.equal(found[key], tensor)] == []


def test_the_same_network_gives_the_same_bytes(tmp_path: Path) -> None:
    model = build("timm/test_resnet")
    about = {"recipe": {"é": [1, "\n"]}}
    found = set()
    for number in range(8):  # safetensors orders two entries of metadata at random
        write_dense(model, tmp_path / str(number), about)
        found.add((tmp_path / str(number)).read_bytes())
    assert len(found) == 1
    assert open_result(tmp_path / "0").manifest.provenance == about
    assert load_file(tmp_path / "0").keys() == model.state_dict().keys()

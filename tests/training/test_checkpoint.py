"""The order of a checkpoint's bits: little-endian, as in artifacts; in format 1 it was the other one."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from popup_surgery import RunError
from popup_surgery.codecs.bitpack import pack, padding_is_zero, unpack_mask
from popup_surgery.training import checkpoint
from support import GOLDEN


def rewrite(path: Path, **state: object) -> None:
    """Change the state of a checkpoint, whose digests stay right."""
    body = {**json.loads(path.read_text()), **state}
    del body["sha256"]
    body["tensors_sha256"] = hashlib.sha256(path.with_suffix(".safetensors").read_bytes()).hexdigest()
    text = json.dumps(body, sort_keys=True)
    path.write_text(json.dumps(body | {"sha256": hashlib.sha256(text.encode()).hexdigest()}, sort_keys=True))


@pytest.mark.parametrize("run", ["tiny", "ticket"])
def test_masks_of_format_1_are_turned_round(run: str) -> None:
    path = max((GOLDEN / "stopped" / run / "checkpoints").glob("*.json"))
    assert json.loads(path.read_text())["format"] == 1
    raw, found = load_file(path.with_suffix(".safetensors")), checkpoint.read(path).tensors
    assert found.keys() == raw.keys()
    packed = [key for key in raw if key.startswith(("before.", "ticket."))]
    assert len(packed) == (5 if run == "tiny" else 10)
    for key, tensor in raw.items():
        if key in packed:
            shape = found["model." + key.partition(".")[2] + ("_score" if run == "tiny" else "")].shape
            mask = np.unpackbits(tensor.numpy(), count=shape.numel(), bitorder="big").astype(bool)
            bits = found[key].numpy()
            assert np.array_equal(unpack_mask(bits, (shape.numel(),)), mask), key
            assert padding_is_zero(bits, shape.numel())
            assert mask.any()
        else:
            assert torch.equal(found[key], tensor), key


def test_masks_are_written_in_the_order_of_artifacts(tmp_path: Path) -> None:
    mask = np.arange(13) % 3 == 0
    taken = {f"{place}.weight": torch.from_numpy(pack(mask)) for place in ("before", "ticket")}
    checkpoint.write(tmp_path, 1, checkpoint.Checkpoint(taken, {}))
    path = next(checkpoint.newest_first(tmp_path))
    assert json.loads(path.read_text())["format"] == 2
    for found in (checkpoint.read(path).tensors, load_file(path.with_suffix(".safetensors"))):
        assert found.keys() == taken.keys()
        assert all(torch.equal(found[key], bits) for key, bits in taken.items())
    save_file({key: torch.from_numpy(np.packbits(mask)) for key in taken}, path.with_suffix(".safetensors"))
    rewrite(path, format=1)
    assert all(torch.equal(bits, taken[key]) for key, bits in checkpoint.read(path).tensors.items())


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "stopped" / "tiny" / "checkpoints", tmp_path / "checkpoints"))
    path = next(checkpoint.newest_first(folder))
    rewrite(path, format=3)
    with pytest.raises(RunError, match=r"has the format 3; this version reads 1 and 2$"):
        checkpoint.read(path)

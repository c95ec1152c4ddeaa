"""What a file is that is no popup artifact, and what takes it: for the message that refuses it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

METADATA = "popup_surgery"
DENSE = "popup_surgery_dense"  # key of the metadata of dense weights that this library wrote (experiment/dense.py)

ARTIFACT = "a popup artifact; popup-surgery inspect, verify, evaluate, predict, sanity, export, bench and diff take it"
WEIGHTS = "popup-surgery convert NAME --scheme pretrained --weights FILE"

# how files of other formats begin
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", f"a ZIP file, as torch.save writes; {WEIGHTS} takes weights in one"),
    (b"\x80", f"a pickle, as old versions of torch.save write; {WEIGHTS} takes weights in one"),
    (b"\x89PNG", "a picture; popup-surgery predict takes pictures after the artifact"),
    (b"\xff\xd8\xff", "a picture; popup-surgery predict takes pictures after the artifact"),
    (b"\x89HDF", "an HDF5 file; nothing here takes it"),
    (b"GGUF", "a GGUF file; nothing here takes it"),
    (b"version https://git-lfs", "a pointer of Git LFS; git lfs pull fetches the file itself"),
)


def safetensors_kind(metadata: Any, tensors: Mapping[str, Any]) -> str:
    """Return what a safetensors file without one popup artifact is, and what takes it.

    Args:
        metadata: the value of its `__metadata__`.
        tensors: its tensors by name, each with a `dtype`.
    """
    known = metadata if isinstance(metadata, dict) else {}
    dtypes = {tensor.dtype for tensor in tensors.values()}
    count = f"{len(tensors):,} tensors"
    if METADATA in known:
        return f"its `__metadata__` has more than {METADATA!r}, so it was written again by something else"
    if DENSE in known:
        return f"dense weights of a run or an export ({count}); popup-surgery evaluate and predict take them"
    if tensors and dtypes == {"BOOL"}:
        return f"masks ({count}), as a run writes beside dense weights; popup-surgery diff takes them"
    if tensors and all(name.endswith("_score") for name in tensors):
        return f"the scores of a run ({count}); the run's artifact has the masks that they make"
    if any(name.startswith("optimizer.") for name in tensors):
        return f"a checkpoint ({count}); popup-surgery train RECIPE -o FOLDER --resume continues its run"
    if any(".lora_" in name for name in tensors):
        return f"an adapter of PEFT ({count}), which is for its own network; nothing here takes it"
    if tensors and not dtypes & {"F64", "F32", "F16", "BF16"}:
        return f"a safetensors file of {count}, none of floats; nothing here takes it"
    return (
        f"dense weights ({count}); popup-surgery evaluate takes them in their run's folder, beside recipe.yaml, and "
        f"{WEIGHTS} those of any network"
    )


def is_onnx(start: bytes) -> bool:
    """Return whether a file begins as an ONNX file does: the version of the format, then a later field of the model."""
    return len(start) > 2 and start[0] == 0x08 and start[1] < 0x20 and start[2] in (0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A)


def other_kind(start: bytes) -> str:
    """Return what a file of another format is by how it begins, and what takes it; empty if nothing is known."""
    if is_onnx(start):
        return "an ONNX file; popup-surgery evaluate and predict take those that popup-surgery export wrote"
    if int.from_bytes(start[:8], "little") < 1 << 32:
        return ""  # the length of a safetensors header
    for beginning, kind in _BEGINNINGS:
        if start.startswith(beginning):
            return kind
    if len(start) >= 8 and all(byte in b"\t\n\r" or byte >= 32 for byte in start) and b"\n" in start:
        return "a text file; popup-surgery train and sweep take recipes"
    return ""


def folder_kind(path: Path) -> str:
    """Return what a folder is, and which file in it was meant."""
    if files := sorted(file.name for file in path.glob("*.safetensors") if (path / "recipe.yaml").is_file()):
        file = next((name for name in files if name.endswith(".popup.safetensors")), files[-1])
        return f"the folder of a run, whose file is {path / file}"
    if runs := sorted(path.glob("*/*.safetensors")):
        return f"a folder of runs' folders, which have files such as {runs[0]}"
    return "a folder"

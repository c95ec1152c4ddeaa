"""A small artifact to take apart, change and put together again, and the readers that try what comes of it."""

import copy
import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from popup_surgery import ArtifactError, inspect, load, verify


class Net(nn.Module):
    """Small, and with an entry of each sort: masked, generated, constant, alias and stored."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.bn = nn.BatchNorm1d(5)
        self.tied = nn.Linear(4, 5)
        self.tied.weight = self.first.weight
        self.last = nn.Linear(5, 3, bias=False)
        self.kept = nn.Linear(3, 3)
        self.table = nn.Embedding(7, 3)
        self.register_buffer("flag", torch.tensor([True, True]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kept(self.last(self.bn(self.first(x) + self.tied(x)))) + self.table.weight[0]


@dataclass
class File:
    """A popup file taken apart. `bytes()` puts it together again, with digests that match unless they are kept."""

    manifest: dict[str, Any]
    tensors: dict[str, tuple[str, list[int], bytes]]
    entries: dict[str, Any] = field(default_factory=dict)  # header entries that replace or join the tensors'

    def copy(self) -> "File":
        return copy.deepcopy(self)

    def text(self) -> str:
        """The manifest's canonical text, with its digest."""
        manifest = {key: value for key, value in self.manifest.items() if key != "manifest_sha256"}
        if "manifest_sha256" in self.manifest:
            manifest["manifest_sha256"] = hashlib.sha256(canonical(manifest).encode()).hexdigest()
        return canonical(manifest)

    def digest(self) -> None:
        """Make the masks' and the stored tensors' digests match."""
        masks, joined = [f"{entry['name']}.mask" for entry in self.manifest["masked"]], hashlib.sha256()
        for mask in masks:
            joined.update(self.tensors[mask][2])
        self.manifest["masks_sha256"] = joined.hexdigest()
        joined = hashlib.sha256()
        for name, (dtype, shape, data) in sorted(self.tensors.items()):
            if name not in masks:
                joined.update(f"{name}\0{dtype}\0{','.join(map(str, shape))}\0".encode() + data)
        self.manifest["tensors_sha256"] = joined.hexdigest()

    def header(self, text: str | None = None) -> dict[str, Any]:
        header: dict[str, Any] = {"__metadata__": {"popup_surgery": self.text() if text is None else text}}
        start = 0
        for name, (dtype, shape, data) in self.tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + len(data)]}
            start += len(data)
        return header | self.entries

    def bytes(self, text: str | None = None, header: str | bytes | None = None) -> bytes:
        raw = json.dumps(self.header(text)) if header is None else header
        raw = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw
        return struct.pack("<Q", len(raw)) + raw + b"".join(data for _, _, data in self.tensors.values())


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=True)


def take_apart(data: bytes) -> File:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    manifest = json.loads(header.pop("__metadata__")["popup_surgery"])
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = entry["dtype"], entry["shape"], data[start:stop]
    return File(manifest, tensors)


@dataclass
class Attempt:
    """What each reader said: its result or its `ArtifactError`."""

    inspected: Any
    loaded: Any
    verified: Any

    @property
    def refused_at_once(self) -> bool:
        return all(isinstance(r, ArtifactError) for r in (self.inspected, self.loaded, self.verified))

    @property
    def refused_with_data(self) -> bool:
        return isinstance(self.loaded, ArtifactError) and isinstance(self.verified, ArtifactError)

    @property
    def refused_by_network(self) -> bool:
        return isinstance(self.loaded, ArtifactError) and (
            isinstance(self.verified, ArtifactError) or not self.verified
        )


def attempt(path: Path, data: bytes, network: Callable[[], nn.Module | None] = Net, label: object = "") -> Attempt:
    """Let all three readers have the file. Anything but a result or an `ArtifactError` that names the file fails."""
    path.write_bytes(data)
    results: list[Any] = []
    for reader in (inspect, lambda p: load(p, network()), lambda p: verify(p, network())):
        try:
            results.append(reader(path))
        except ArtifactError as error:
            results.append(error)
        except Exception as error:
            raise AssertionError(f"{label}: {type(error).__name__}: {error}") from error
    for result in results:
        assert not isinstance(result, ArtifactError) or str(result).startswith(f"{path}: "), label
    return Attempt(*results)


def same(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def constant(name: str, **change: Any) -> Callable[[File], object]:
    return lambda file: file.manifest["constants"][name].update(change)


def masked(index: int = 0, **change: Any) -> Callable[[File], object]:
    return lambda file: file.manifest["masked"][index].update(change)


def generated(**change: Any) -> Callable[[File], object]:
    return lambda file: file.manifest["generated"][0].update(change)


def top(**change: Any) -> Callable[[File], object]:
    return lambda file: file.manifest.update(change)


def alias(name: str, target: Any) -> Callable[[File], object]:
    return lambda file: file.manifest["aliases"].update({name: target})


def tensor(name: str, dtype: str, shape: list[int], data: bytes) -> Callable[[File], object]:
    return lambda file: file.tensors.update({name: (dtype, shape, data)})


def drop(name: str) -> Callable[[File], object]:
    return lambda file: file.tensors.pop(name)


def both(*changes: Callable[[File], Any]) -> Callable[[File], object]:
    return lambda file: [change(file) for change in changes]


def twice(key: str) -> Callable[[File], object]:
    return lambda file: file.manifest[key].append(copy.deepcopy(file.manifest[key][0]))


def edit_mask(change: Callable[[bytearray], Any]) -> Callable[[File], object]:
    def apply(file: File) -> None:
        dtype, shape, data = file.tensors["first.weight.mask"]
        packed = bytearray(data)
        change(packed)
        file.tensors["first.weight.mask"] = dtype, shape, bytes(packed)

    return apply


def entry(name: str, **change: Any) -> Callable[[File], object]:
    def apply(file: File) -> None:
        file.entries[name] = {**file.header()[name], **change}

    return apply


def apply(file: File, change: Callable[[File], Any], digest: bool = True) -> bytes:
    changed = file.copy()
    change(changed)
    if digest and all(f"{entry['name']}.mask" in changed.tensors for entry in changed.manifest["masked"]):
        changed.digest()
    return changed.bytes()

"""`Artifact`: a file is parsed once and digested once, whatever is asked of it."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from popup_surgery import (
    Artifact,
    ArtifactError,
    bake,
    build,
    convert,
    evaluate,
    inspect,
    load,
    masks,
    predict,
    sanity,
    save,
    start_from,
    verify,
)
from popup_surgery.artifact import container, manifest, reader, stored_masks
from support import write_digit

PARSED = {"open_file": 1, "read_header": 1, "read_manifest": 1, "header's parse": 1, "manifest's parse": 1}
DIGESTED = PARSED | {"open_file": 2, "masks_digest": 1, "tensors_digest": 1}  # the second time for its tensors


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a file was opened, its header and manifest were parsed, and its tensors were digested."""
    count: Counter[str] = Counter()

    def watch(module: Any, name: str, what: str) -> None:
        real = getattr(module, name)

        def spy(*arguments: Any) -> Any:
            count[what] += 1
            return real(*arguments)

        monkeypatch.setattr(module, name, spy)

    for name in ("open_file", "read_header", "read_manifest", "masks_digest", "tensors_digest"):
        watch(reader, name, name)
    watch(container, "parse", "header's parse")
    watch(manifest, "parse", "manifest's parse")
    return count


def digits_network() -> nn.Module:
    return convert(build("popup_surgery/conv2", in_chans=1, img_size=8, width=0.25), 0.5, scaled=False)


VERBS: dict[str, Callable[[Any], object]] = {
    "load": load,
    "verify": verify,
    "stored_masks": stored_masks,
    "evaluate": evaluate,
    "predict": lambda file: predict(file, ["digit.png"]),
    "sanity": lambda file: sanity(file, repeats=1, values=[]),
    "start_from": lambda file: start_from(digits_network(), file),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_parses_once_and_digests_once(verb: str, artifact: Path, calls: Counter[str]) -> None:
    write_digit(artifact.with_name("digit.png"), 4)
    VERBS[verb](artifact)
    assert calls == DIGESTED


def test_all_verbs_on_one_open_file_do_so_together(artifact: Path, calls: Counter[str]) -> None:
    write_digit(artifact.with_name("digit.png"), 4)
    opened = Artifact.open(artifact)
    assert Artifact.open(opened) is opened
    assert calls == PARSED
    for verb in (*VERBS.values(), *VERBS.values()):
        verb(opened)
    assert calls == DIGESTED


def test_inspect_reads_no_tensor(artifact: Path, calls: Counter[str]) -> None:
    inspect(artifact)
    assert calls == PARSED


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("inspect", "digits.popup.safetensors"), PARSED),
        (("verify", "digits.popup.safetensors"), DIGESTED),
        (("export", "digits.popup.safetensors", "-o", "dense.safetensors"), DIGESTED),
        (("evaluate", "digits.popup.safetensors"), DIGESTED),
        (("predict", "digits.popup.safetensors", "digit.png"), DIGESTED),
        (("sanity", "digits.popup.safetensors", "--repeats", "1", "--value", "1"), DIGESTED),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_so_does_a_command(
    words: tuple[str, ...], expected: dict[str, int], cli: Callable[..., Any], artifact: Path, calls: Counter[str]
) -> None:
    write_digit(artifact.with_name("digit.png"), 4)
    assert cli(*words).status == 0
    assert calls == expected


def test_what_an_open_file_gives(tmp_path: Path) -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))

    net = convert(network(), k=0.4, seed=3)
    net(torch.randn(4, 7))
    written = save(net, tmp_path / "net", provenance={"of": "a test"}, probe=(2, 7))
    opened = Artifact.open(str(tmp_path / "net"))
    assert opened.manifest == written
    assert (opened.path, opened.manifest.provenance) == (str(tmp_path / "net"), {"of": "a test"})
    found = opened.masks()
    assert found.keys() == masks(net).keys()
    assert all(torch.equal(found[name], mask) for name, mask in masks(net).items())
    given = network()
    assert opened.network(given) is given
    state, whole = opened.network(network()).state_dict(), opened.network(network(), masked=False).state_dict()
    raw = net.state_dict()
    for name, tensor in bake(net).state_dict().items():
        assert torch.equal(state[name], tensor)
        assert torch.equal(whole[name], raw[name]), "what takes no part too"
    with pytest.raises(ArtifactError, match=r"net: the network has .* that the file does not hold"):
        opened.network(nn.Linear(2, 2))


@pytest.mark.parametrize("read", [Artifact.masks, Artifact.network], ids=["masks", "network"])
@pytest.mark.parametrize("change", ["replaced", "written to", "gone", "bit"])
def test_a_file_that_changes_while_it_is_open(change: str, read: Callable[[Artifact], object], tmp_path: Path) -> None:
    path = tmp_path / "net"
    save(convert(build("popup_surgery/fc", width=0.1), seed=1), path)
    data = path.read_bytes()
    opened = Artifact.open(path)
    if change == "gone":
        path.unlink()
    elif change == "replaced":
        path.rename(tmp_path / "old")
        path.write_bytes(data)
    elif change == "written to":
        path.write_bytes(data + b"more")
    else:
        stamp = path.stat()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    says = {"gone": "the file does not exist", "bit": r"keeps \d+ weights; expected \d+"}
    with pytest.raises(
        ArtifactError, match=f"^{path}: .*{says.get(change, 'the file changed while it was being read; try again')}$"
    ):
        read(opened)

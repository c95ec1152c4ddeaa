"""The hostile files of the suite, for the decoder's tests and its fuzzer.

    PYTHONPATH=tests python tests/native/corpus.py FOLDER

writes each of them into FOLDER.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from artifact.hostile import File, Net, apply, take_apart
from artifact.test_hostile import AT_ONCE, BY_NETWORK, HARMLESS, HEADERS, TEXTS, UNMATCHED, WITH_DATA, with_provenance
from popup_surgery import convert, save

CHANGES: dict[str, dict[str, Callable[[File], Any]]] = {
    "at_once": AT_ONCE,
    "with_data": WITH_DATA,
    "unmatched": UNMATCHED,
    "by_network": BY_NETWORK,
    "harmless": HARMLESS,
}


def original(encoding: str = "bitpack") -> File:
    """A file of `Net`, which has an entry of each sort."""
    torch.manual_seed(0)
    model = convert(Net(), exclude="kept", seed=3, k=0.5)
    model(torch.randn(16, 4))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net"
        save(model, path, probe=(2, 4), provenance={"note": "é", "accuracy": 0.5}, encoding=encoding)
        return take_apart(path.read_bytes())


def changed(file: File) -> dict[tuple[str, str], bytes]:
    """Each hostile file by its table and name."""
    files = {}
    for table, changes in CHANGES.items():
        for name, change in changes.items():
            # digest() hashes a mask's bytes, which are its bits in one encoding alone
            digest = table != "unmatched" and not name.startswith("masks_sha256") and not file.manifest["requires"]
            files[table, name] = apply(file, change, digest=digest)
    files |= {("text", name): file.bytes(with_provenance(file, text)) for name, text in TEXTS.items()}
    files |= {("header", name): file.bytes(header=make(file)) for name, make in HEADERS.items()}
    return files


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for encoding in ("bitpack", "range_coded"):
        file = original(encoding)
        files = [data for data in changed(file).values() if len(data) <= 16384]  # the rest is long, and no more
        for index, data in enumerate([file.bytes(), *files]):
            (folder / f"{encoding}-{index}").write_bytes(data)

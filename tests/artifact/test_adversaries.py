"""The largest and deepest files that a reader takes cost it some memory and some seconds."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from artifact.hostile import (
    File,
    apply,
    canonical,
    constant,
    generated,
    take_apart,
)
from support import TESTS, asked

HEADER, MANIFEST = 16 << 20, 8 << 20
SECONDS = 8  # a few, on a machine that has other work too
ALLOWANCE = 256 << 20


def filled(start: str, pieces: Iterator[str] | str, stop: str, size: int) -> bytes:
    """`start`, then pieces up to `size` bytes in all, then `stop`."""
    room = size - len(start.encode()) - len(stop.encode())
    if isinstance(pieces, str):
        return (start + pieces * (room // len(pieces.encode()))).encode() + stop.encode()
    parts = []
    for piece in pieces:
        room -= len(piece.encode())
        if room < 0:
            break
        parts.append(piece)
    return (start + "".join(parts)).encode() + stop.encode()


def count(form: str) -> Iterator[str]:
    return (form.format(i) for i in range(10**8))


# the inside of a list or an object, in ways that cost a parser the most
LISTS: dict[str, Callable[[], Iterator[str] | str]] = {
    "empty lists": lambda: "[],",
    "objects of one": lambda: '{"a":1},',
    "short strings": lambda: count('"{0:x}",'),
    "strings and commas": lambda: '"",,',
    "strings and wide characters": lambda: '""\u0100',
}
OBJECTS: dict[str, Callable[[], Iterator[str] | str]] = {
    "unique keys": lambda: count('"{0:x}":0,'),
    "unique keys of floats": lambda: count('"{0:x}":{0}.5,'),
    "unique wide keys": lambda: (f'"{chr(0x10000 + i % 0xFFFFF)}{i // 0xFFFFF}":{i},' for i in range(10**8)),
    "tensors": lambda: count('"{0:x}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}},'),
    "aliases": lambda: count('"a{0:x}":"b{0:x}",'),
}
STRINGS = {
    "escapes": lambda: '\\"',
    "wide characters": lambda: "\U0001f642",
}


def adversaries() -> dict[str, Callable[[File], bytes]]:
    """Files by name. A header is 16 MiB, a manifest 8 MiB; some are shorter, for what takes more than linear time."""

    def header(start: str, pieces: Callable[[], Any], stop: str, size: int = HEADER) -> Callable[[File], bytes]:
        return lambda file: file.bytes(header=filled(start, pieces(), stop, size))

    def manifest(key: str, start: str, pieces: Callable[[], Any], stop: str, size: int) -> Callable[[File], bytes]:
        def make(file: File) -> bytes:
            value = filled(start, pieces(), stop, size - len(file.text()) - 100).decode()
            holder = {name: item for name, item in file.manifest.items() if name != "manifest_sha256"}
            holder[key] = "@"
            text = canonical(holder).replace('"@"', value)
            digest = hashlib.sha256(text.encode()).hexdigest()
            return file.bytes(canonical(holder | {"manifest_sha256": digest}).replace('"@"', value))

        return make

    made: dict[str, Callable[[File], bytes]] = {}
    for name, pieces in LISTS.items():
        made[f"header of {name}"] = header('{"x":[', pieces, "0]}")
    for name, pieces in OBJECTS.items():
        made[f"header of {name}"] = header("{", pieces, '"last":0}')
    for name, pieces in STRINGS.items():
        made[f"header of {name}"] = header('{"', pieces, '":0}')
    made["header of open escapes"] = header('{"', STRINGS["escapes"], "", 1 << 20)
    made["header of open strings"] = header("{", lambda: '"\\"', "")
    made["header of 100,000 keys and one twice"] = header("{", OBJECTS["unique keys"], '"1000":0}', 1_200_000)
    # canonical text, so that the whole of it is looked at
    wide = lambda: count('"\\ud83d\\ude42{0:x}",')  # noqa: E731
    made["manifest of empty lists"] = manifest("provenance", '{"x":[', LISTS["empty lists"], "[]]}", 700_000)
    made["manifest of short strings"] = manifest("provenance", '{"x":[', LISTS["short strings"], "0]}", MANIFEST)
    made["manifest of surrogate pairs"] = manifest("provenance", '{"x":[', wide, "0]}", MANIFEST)
    keys = lambda: (f'"{i:07d}":{i},' for i in range(10**6))  # noqa: E731
    pairs = lambda: (f'"{i:07d}":"first.weight",' for i in range(10**6))  # noqa: E731
    made["manifest of aliases"] = manifest("aliases", "{", pairs, '"x":"first.weight"}', MANIFEST)
    made["manifest of aliases of nothing"] = manifest("aliases", "{", keys, '"x":"first.weight"}', MANIFEST)
    shapes = lambda: (f'"{i:07d}":{{"dtype":"F32","shape":[9],"value":1.0}},' for i in range(10**6))  # noqa: E731
    made["manifest of constants"] = manifest("constants", "{", shapes, '"x":0}', MANIFEST)
    made["manifest of requires"] = manifest("requires", "[", LISTS["short strings"], '"x"]', MANIFEST)
    made["manifest of escapes"] = manifest("provenance", '{"x":"', lambda: '\\"', '"}', MANIFEST)
    made["constant of 2**40 elements"] = lambda file: apply(file, constant("first.bias", shape=[2**40]))
    made["constant more, of 2**40 elements"] = lambda file: apply(
        file, lambda file: file.manifest["constants"].update({"x": {"shape": [2**40], "dtype": "F32", "value": 1.0}})
    )
    made["generated tensor of 2**40 elements"] = lambda file: apply(file, generated(shape=[2**40]))
    made["coded mask of 2**40 weights"] = lambda file: coded(file, 2**40)
    made["coded mask of 2**34 weights, verified"] = lambda file: coded(file, 2**34)
    made["probe of 2**40 elements"] = lambda file: apply(
        file, lambda file: file.manifest["probe"].update(shape=[2**40])
    )
    return made


def coded(file: File, n: int) -> bytes:
    """A file whose first mask has no bytes, and is for `n` weights, none of which is kept."""
    file = file.copy()
    for entry in file.manifest["masked"]:
        entry.update(encoding="range_coded", kept=0)
        file.tensors[f"{entry['name']}.mask"] = "U8", [0], b""
    file.manifest["masked"][0]["shape"] = [n]
    file.manifest["requires"] = ["range_coded"]
    return file.bytes()


ADVERSARIES = adversaries()
# Each file in a process of its own, forked after the imports and one load: its growth is the file's alone.
MEASURE = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from artifact.hostile import Net
from popup_surgery import ArtifactError, inspect, load, verify

def peak():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM:")).split()[1]) << 10

folder, seconds, names = sys.argv[2], int(sys.argv[3]), sys.argv[4:]
load(f"{folder}/good", Net())
verify(f"{folder}/good", Net())
for index, name in enumerate(names):
    child = os.fork()
    if child == 0:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # of the processor, however busy the machine is
        before = peak()
        reader = {"load": load, "verify": verify, "inspect": lambda path, _: inspect(path)}[name]
        try:
            reader(f"{folder}/{index}", Net())
            outcome = "read"
        except ArtifactError as error:
            outcome = "refused"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"[:200]
        print(json.dumps([outcome, peak() - before]), flush=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        print(json.dumps([f"killed by signal {status & 127}", None]), flush=True)
"""


def reader_of(name: str) -> str:
    return "verify" if name.startswith("probe") or name.endswith("verified") else "load"


@pytest.fixture(scope="module")
def measured(
    original: bytes, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Any]]:
    """What became of each adversary: the outcome, the growth of the peak in bytes, and its size."""
    folder = tmp_path_factory.mktemp("adversaries")
    (folder / "good").write_bytes(original)
    names = asked(request, "measured", "name")
    for index, name in enumerate(names):
        (folder / str(index)).write_bytes(ADVERSARIES[name](take_apart(original)))
    sizes = [(folder / str(index)).stat().st_size for index in range(len(names))]
    arguments = [str(TESTS), str(folder), str(SECONDS), *map(reader_of, names)]
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True)
    for index in range(len(names)):
        (folder / str(index)).unlink()
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: [*line, size] for name, line, size in zip(names, lines, sizes, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ADVERSARIES)
def test_memory_and_time(name: str, measured: dict[str, list[Any]]) -> None:
    outcome, growth, size = measured[name]
    assert outcome in ("refused", "read"), f"{outcome} (within {SECONDS} s)"
    assert growth <= ALLOWANCE + 2 * size, f"grew by {growth >> 20} MiB for a file of {size >> 20} MiB"

"""Files that were changed at random, and manifests with each key missing or of each wrong type, harm nobody."""

import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from artifact.hostile import File, attempt, canonical, same
from popup_surgery import ArtifactError
from support import slow_except

BYTE_MUTATIONS = 1500
CHUNKS = 10


# --- bytes changed at random -----------------------------------------------------------------------------------------


def mutate(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """One of a dozen ways to damage a file."""
    length = int.from_bytes(data[:8], "little")
    changed = bytearray(data)
    # half of the places lie in the data and the JSON around the manifest, which are the shorter parts
    place = rng.choice([rng.randrange(len(data)), rng.randrange(8 + length, len(data)), rng.randrange(8, 40)])
    sort = rng.randrange(12)
    if sort == 0:
        changed[place] ^= 1 << rng.randrange(8)
    elif sort == 1:
        del changed[rng.randrange(len(changed)) :]
    elif sort == 2:
        changed[place:place] = rng.randbytes(rng.randint(1, 9))
    elif sort == 3:
        changed[:8] = struct.pack("<Q", rng.choice([0, 1, length - 1, length + 1, length + 8, rng.getrandbits(20)]))
    elif sort == 4:
        changed[:8] = struct.pack("<Q", rng.choice([2**64 - 1, 2**63, 1 << 40, len(data), len(data) - 8, 16 << 20]))
    elif sort == 5:
        other = rng.randrange(len(data))
        changed[place], changed[other] = changed[other], changed[place]
    elif sort == 6:
        del changed[place : place + rng.randint(1, 40)]
    elif sort == 7:
        changed[place : place + 1] = rng.choice([b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"-", b"e", b"\x00"])
    elif sort == 8:
        changed[place : place + 4] = rng.choice(
            [b"null", b"true", b"1e99", b"-1.0", b'"\\u0', b"9999", b"\xff\xfe\x80\xc0"]
        )
    elif sort == 9:
        digits = [i for i in range(8, 8 + length) if 48 <= data[i] <= 57]
        changed[rng.choice(digits)] = rng.randrange(48, 58)
    elif sort == 10:
        start = rng.randrange(len(data))
        changed[place:place] = data[start : start + rng.randint(1, 300)]
    else:
        changed += rng.randbytes(rng.randint(1, 64))
    return f"sort {sort} at {place}", bytes(changed)


@pytest.mark.parametrize("chunk", slow_except(range(CHUNKS), [0]))
def test_bytes_changed_at_random(chunk: int, original: bytes, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    rng, refused = random.Random(chunk), 0
    count = BYTE_MUTATIONS // CHUNKS
    for index in range(count):
        label, data = mutate(original, rng)
        tried = attempt(tmp_path / "f", data, label=f"{chunk}/{index}: {label}")
        if isinstance(tried.loaded, ArtifactError):
            refused += 1
            continue
        assert same(tried.loaded, state), label  # what is loaded all the same is what was saved
        assert tried.verified, label
    assert refused > 0.8 * count


# --- each key of the manifest, of each wrong type --------------------------------------------------------------------

WRONG: list[Any] = [
    None, True, False, 0, 1, -1, 2, 1.5, -1.5, 0.0, -0.0, 10**31, -(10**30), 1e308, "", "x", "7", "\x00é", "a" * 64,
    [], [1], [-1], [True], [1.5], ["x"], [0], [[]], {}, {"a": 1}, {"a": {}}, {"a": "b"},
]  # fmt: skip


def is_float(value: Any) -> bool:
    return type(value) is float


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_number(value: Any) -> bool:
    return type(value) in (int, float)


def is_list(value: Any) -> bool:
    return value == []


def is_hex(value: Any) -> bool:
    return value == "a" * 64


def sizes(low: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(type(size) is int and size >= low for size in value)


def dictionary(holds: Callable[[Any], bool] = lambda value: False) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(holds, value.values()))


def one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(v) and value == v for v in values)


NEVER = one_of()
# what the format allows at each place, of the values above; places by their path, with * for an index or a name
ALLOWED: dict[str, Callable[[Any], bool]] = {
    "format": NEVER,
    "format_version": one_of(1),
    "requires": one_of([]),
    "architecture": NEVER,
    "architecture.library": is_text,
    "architecture.version": is_text,
    "architecture.name": is_text,
    "architecture.kwargs": dictionary(lambda value: True),
    "seed": one_of("7"),
    "masked": is_list,
    "masked.*": NEVER,
    "masked.*.name": NEVER,  # its mask has another name
    "masked.*.stream": is_text,
    "masked.*.shape": NEVER,  # its mask has another size
    "masked.*.dtype": NEVER,
    "masked.*.distribution": NEVER,
    "masked.*.std": one_of(1.5),
    "masked.*.kept": one_of(0, 1, 2),
    "masked.*.encoding": NEVER,
    "masked.*.scheme": is_text,
    "masked.*.scaled": one_of(True, False),
    "masked.*.k": is_number,
    "masked.*.fan_in": is_number,
    "generated": is_list,
    "generated.*": NEVER,
    "generated.*.name": is_text,
    "generated.*.stream": is_text,
    "generated.*.shape": sizes(1),
    "generated.*.dtype": NEVER,
    "generated.*.distribution": NEVER,
    "generated.*.std": one_of(1.5),
    "constants": dictionary(),
    "constants.*": NEVER,
    "constants.*.shape": sizes(1),
    "constants.*.dtype": NEVER,
    "aliases": dictionary(),
    "aliases.*": NEVER,  # there is no such key
    "masks_sha256": is_hex,
    "weights_sha256": is_hex,
    "tensors_sha256": is_hex,
    "probe": NEVER,
    "probe.shape": sizes(1),
    "probe.output": lambda value: isinstance(value, list) and all(map(is_number, value)),
    "probe.rtol": lambda value: is_number(value) and value > 0,
    "provenance": dictionary(lambda value: True),
    "provenance.*": lambda value: True,
    "manifest_sha256": NEVER,
}
OPTIONAL = {"probe", "provenance.*", "constants.*", "aliases.*"}  # without them, the network finds out
FLOATS = ("F32", "F16", "BF16", "F64")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def pattern(path: tuple[Any, ...]) -> str | None:
    """The path's key in `ALLOWED`, None within shapes and outputs, where the list as a whole is tried."""
    if any(isinstance(key, int) for key in path[1:]) and path[0] not in ("masked", "generated"):
        return None
    if len(path) > 3 or (path[0] in ("masked", "generated") and len(path) > 2 and path[2] == "shape" and len(path) > 3):
        return None
    stars = path[0] in ("masked", "generated", "constants", "aliases", "provenance")
    return ".".join("*" if stars and i == 1 else str(key) for i, key in enumerate(path))


def put(manifest: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        manifest = manifest[key]
    manifest[path[-1]] = value


def allowed(place: str, value: Any, dtype: str | None) -> bool:
    if place != "constants.*.value":
        return ALLOWED[place](value)
    if dtype == "BOOL":
        return isinstance(value, bool)
    if dtype in FLOATS:
        return is_float(value) and str(value) != "-0.0" and abs(value) < 1e30
    return type(value) is int and abs(value) < 1e19


@pytest.mark.slow
def test_each_key_of_the_manifest_with_each_wrong_value(file: File, tmp_path: Path) -> None:
    tried = set()
    for path in list(places(file.manifest)):
        place = pattern(path)
        if place is None or (place.startswith(("masked", "generated")) and path[1:2] > (0,)):
            continue
        if path[0] == "constants" and path[1:2] and path[1] not in ("first.bias", "bn.num_batches_tracked", "flag"):
            continue  # one of each sort is enough
        tried.add(place)
        dtype = file.manifest["constants"][path[1]]["dtype"] if place == "constants.*.value" else None
        for value in WRONG:
            if place.endswith("std") and value == 1e308:
                continue  # has a test of its own
            label = f"{path} = {value!r}"
            changed = file.copy()
            put(changed.manifest, path, value)
            text = canonical(changed.manifest) if place == "manifest_sha256" else None
            result = attempt(tmp_path / "f", changed.bytes(text), label=label)
            assert result.refused_at_once or allowed(place, value, dtype), label
    assert tried == {*ALLOWED, "constants.*.value"}


def test_each_key_of_the_manifest_missing(file: File, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    for path in list(places(file.manifest)):
        place = pattern(path)
        if place is None or isinstance(path[-1], int):
            continue
        changed = file.copy()
        holder = changed.manifest
        for key in path[:-1]:
            holder = holder[key]
        del holder[path[-1]]
        result = attempt(tmp_path / "f", changed.bytes(), label=path)
        if place in ("probe", "provenance.*"):
            assert same(result.loaded, state), path
        elif place in OPTIONAL:
            assert result.refused_by_network, path
        else:
            assert result.refused_at_once, path

"""Read a popup artifact with NumPy and Python's own modules alone, as docs/artifact-format.md describes it.

    python examples/read_without_library.py [FILE]

For files that you trust: popup_surgery.load is the reader for files from strangers.
"""

import hashlib
import json
import math
import statistics
import sys
from pathlib import Path

import numpy as np

BITS = {"signed_constant": 1, "unsigned_constant": 0, "normal": 16, "uniform": 32}  # of the stream, for each weight
DTYPES = {"BOOL": "?", "U8": "u1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8"}


def draw(entry: dict, seed: str, purpose: str) -> np.ndarray:
    """The random values of a tensor, by section 1 of the page."""
    n, std, bits = math.prod(entry["shape"]), entry["std"], BITS[entry["distribution"]]
    text = f"{seed}/{purpose}/{entry['stream']}".encode()
    key = hashlib.blake2b(text, digest_size=16, person=b"popup-surgery/v1").digest()
    words = np.random.Philox(key=np.frombuffer(key, "<u8")).random_raw(-(-n * bits // 64))
    raw = np.asarray(words, "<u8").view("u1")
    if bits < 2:
        return np.float32([-std, std])[np.unpackbits(raw, count=n, bitorder="little") if bits else np.ones(n, int)]
    if bits == 16:
        quantiles = [statistics.NormalDist().inv_cdf((i + 0.5) / 65536) for i in range(65536)]
        return np.float32(quantiles)[raw.view("<u2")[:n]] * np.float32(std)
    numerator = 2 * (raw.view("<u4")[:n] >> 8).astype(np.int64) + 1 - 2**24
    return np.float32(numerator * 2.0**-24) * np.float32(std * math.sqrt(3.0))


path = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "tests/golden/golden.popup.safetensors")
data = path.read_bytes()
start = 8 + int.from_bytes(data[:8], "little")
header = json.loads(data[8:start])
manifest = json.loads(header.pop("__metadata__")["popup_surgery"])
if manifest["format_version"] != 1 or manifest["requires"]:
    sys.exit(f"{path} needs a newer reader: version {manifest['format_version']}, {manifest['requires']}")
if any(entry["distribution"] not in BITS for entry in manifest["masked"]):
    sys.exit(f"{path} has masks for pretrained weights; docs/artifact-format.md has a reader that takes them too")
state, digest = {}, hashlib.sha256()
for name, tensor in header.items():
    first, end = tensor["data_offsets"]
    state[name] = np.frombuffer(data[start + first : start + end], DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
for entry in manifest["masked"]:
    mask = np.unpackbits(state.pop(f"{entry['name']}.mask"), count=math.prod(entry["shape"]), bitorder="little")
    weight = np.where(mask, draw(entry, manifest["seed"], "weight"), np.float32(0)).astype(DTYPES[entry["dtype"]])
    state[entry["name"]] = weight.reshape(entry["shape"])
    digest.update(weight.astype("<f4").tobytes())
for entry in manifest["generated"]:
    state[entry["name"]] = draw(entry, manifest["seed"], "other").astype(DTYPES[entry["dtype"]]).reshape(entry["shape"])
for name, constant in manifest["constants"].items():
    state[name] = np.full(constant["shape"], constant["value"], DTYPES[constant["dtype"]])
state |= {name: state[target] for name, target in manifest["aliases"].items()}  # the whole state_dict
print(f"{len(state)} tensors\nrecorded  {manifest['weights_sha256']}\nrebuilt   {digest.hexdigest()}")

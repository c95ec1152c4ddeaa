"""The manifest: what each tensor of the network is. Every key is checked (docs/artifact-format.md, section 2)."""

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from ..codecs import CODECS, get_codec
from ..errors import ArtifactError
from ..models.architecture import Architecture, Base
from ..selection.pattern import Pattern
from ..weights.fixed import Fixed
from ..weights.source import distributions, source_of
from ..weights.streams import DISTRIBUTIONS, SIGNS
from .container import DTYPES, element_count
from .planes import OF_MANY, ORIGIN_KINDS, PLANES, are_ones, in_order
from .strict_json import canonical, parse

FORMAT = "popup-surgery"
VERSION = 1
# what `requires` may name: what readers of the first files do not know
FEATURES = ("range_coded", "pattern_coded", "fixed", *SIGNS.values(), "coded_planes", *PLANES)
MANIFEST_LIMIT = 8 << 20
FLOAT32_MAX = torch.finfo(torch.float32).max
PROBE_LIMIT = 4 << 20  # elements of the input; enough for one image of 1,024 pixels a side


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that the seed gives: name, stream name, shape, dtype, distribution and standard deviation.

    `kept` is the number of ones in its mask; None if the tensor is not masked. `encoding` is the codec of the mask, and
    `planes` are the kinds of the planes that change the weights that take part. A masked tensor with the distribution
    `base` is not drawn: its values come from the base, and its `std` is 0. `note` is informational: scheme, scaled, k,
    fan_in. `pattern` says that the mask keeps N of each M neighbours, `fixed` how many weights the seed fixes, so that
    the encoding is of the others' bits alone. `plane_ones` are the numbers of ones in the planes of bits, if these are
    range-coded; empty if they are packed.
    """

    name: str
    stream: str
    shape: tuple[int, ...]
    dtype: str
    distribution: str
    std: float
    kept: int | None = None
    note: dict[str, Any] = field(default_factory=dict)
    encoding: str = "bitpack"
    pattern: Pattern | None = None
    planes: tuple[str, ...] = ()
    fixed: Fixed | None = None
    plane_ones: tuple[int, ...] = ()

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def tensors(self) -> list[str]:
        """Names of the file's tensors for this masked one: the mask, and the planes."""
        return [f"{self.name}.{part}" for part in ("mask", *self.planes)]

    def text(self) -> dict[str, Any]:
        """Return the tensor's entry in the manifest."""
        entry: dict[str, Any] = {
            "name": self.name,
            "stream": self.stream,
            "shape": list(self.shape),
            "dtype": self.dtype,
        }
        entry |= {"distribution": self.distribution, **self.note, **source_of(self.distribution).record(self.std)}
        if self.pattern is not None:
            entry["pattern"] = asdict(self.pattern)
        if self.fixed is not None:
            entry["fixed"] = asdict(self.fixed)
        entry |= {} if self.kept is None else {"kept": self.kept, "encoding": self.encoding}
        return entry | {key: list(found) for key in ("planes", "plane_ones") if (found := getattr(self, key))}


@dataclass(frozen=True)
class Constant:
    """A tensor whose elements all equal `value`."""

    shape: tuple[int, ...]
    dtype: str
    value: bool | int | float


@dataclass(frozen=True)
class Probe:
    """The first values of the network's output for a drawn input, and their relative tolerance."""

    shape: tuple[int, ...]
    output: tuple[float, ...]
    rtol: float


@dataclass(frozen=True)
class Manifest:
    """What a popup artifact says about its network. `text()` returns it as a JSON object."""

    architecture: Architecture
    seed: int
    masked: tuple[TensorSpec, ...]
    generated: tuple[TensorSpec, ...]
    constants: dict[str, Constant]
    aliases: dict[str, str]
    masks_sha256: str
    weights_sha256: str
    tensors_sha256: str
    provenance: dict[str, Any]
    probe: Probe | None = None
    base: Base | None = None

    @property
    def weights(self) -> int:
        """Number of masked weights."""
        return sum(entry.numel for entry in self.masked)

    @property
    def kept(self) -> int:
        """Number of masked weights that take part."""
        return sum(entry.kept or 0 for entry in self.masked)

    @property
    def requires(self) -> list[str]:
        """What a reader must know beyond the first version of the format."""
        used = {name for entry in self.masked for name in (entry.encoding, entry.distribution, *entry.planes)}
        used |= {"fixed" for entry in self.masked if entry.fixed is not None}
        used |= {"coded_planes" for entry in self.masked if entry.plane_ones}
        return [feature for feature in FEATURES if feature in used]

    def text(self) -> dict[str, Any]:
        """Return the JSON object, including `manifest_sha256`."""
        architecture = self.architecture
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "format_version": VERSION,
            "requires": self.requires,
            "architecture": {
                "library": architecture.library,
                "version": architecture.version,
                "name": architecture.name,
                "kwargs": architecture.kwargs,
            },
            "seed": str(self.seed),
            "masked": [entry.text() for entry in self.masked],
            "generated": [entry.text() for entry in self.generated],
            "constants": {
                name: {"shape": list(c.shape), "dtype": c.dtype, "value": c.value} for name, c in self.constants.items()
            },
            "aliases": self.aliases,
            "masks_sha256": self.masks_sha256,
            "weights_sha256": self.weights_sha256,
            "tensors_sha256": self.tensors_sha256,
            "provenance": self.provenance,
        }
        if self.probe is not None:
            probe = self.probe
            manifest["probe"] = {"shape": list(probe.shape), "output": list(probe.output), "rtol": probe.rtol}
        if self.base is not None:
            manifest["base"] = asdict(self.base)
        return manifest | {"manifest_sha256": hashlib.sha256(canonical(manifest).encode()).hexdigest()}


def read_manifest(text: str) -> Manifest:
    """Parse a file's manifest and check every key.

    Raises:
        ArtifactError: the message names the key, its value and what was expected.
    """
    manifest = _parse_whole(text)
    seed = _get(manifest, "seed", "a decimal string", lambda v: isinstance(v, str) and _SEED.fullmatch(v))
    if int(seed) >= 2**64:
        raise ArtifactError(f"seed is {seed}; expected at most 2**64 - 1")
    result = Manifest(
        architecture=_architecture(_object(manifest, "architecture")),
        seed=int(seed),
        masked=tuple(_drawn(e, f"masked[{i}]", True) for i, e in enumerate(_list(manifest, "masked"))),
        generated=tuple(_drawn(e, f"generated[{i}]", False) for i, e in enumerate(_list(manifest, "generated"))),
        constants={name: _constant(name, entry) for name, entry in _object(manifest, "constants").items()},
        aliases=_object(manifest, "aliases"),
        masks_sha256=_get(manifest, "masks_sha256", "a SHA-256", _sha256),
        weights_sha256=_get(manifest, "weights_sha256", "a SHA-256", _sha256),
        tensors_sha256=_get(manifest, "tensors_sha256", "a SHA-256", _sha256),
        provenance=_object(manifest, "provenance"),
        probe=_probe(manifest["probe"]) if "probe" in manifest else None,
        base=_base(manifest["base"]) if "base" in manifest else None,
    )
    if manifest["requires"] != result.requires:
        raise ArtifactError(
            f"requires is {_short(manifest['requires'])}; expected {result.requires}, as the encodings and planes say"
        )
    _check_names(result)
    return result


def _parse_whole(text: str) -> dict[str, Any]:
    """Parse a manifest's JSON object. Check its format, version and digest, and no other keys."""
    if len(text) > MANIFEST_LIMIT:
        raise ArtifactError(f"the manifest has {len(text):,} characters; expected at most {MANIFEST_LIMIT:,}")
    manifest = parse(text, "the manifest")
    if not isinstance(manifest, dict):
        raise ArtifactError("the manifest is not a JSON object")
    if manifest.get("format") != FORMAT:
        raise ArtifactError(f"format is {_short(manifest.get('format'))}; expected {FORMAT!r}")
    version = _get(manifest, "format_version", "an integer", lambda v: type(v) is int)
    if version != VERSION:
        raise ArtifactError(f"format_version is {version}; this reader knows {VERSION}")
    requires = _get(manifest, "requires", "a list of strings", _strings)
    if unknown := [name for name in requires if name not in FEATURES]:
        raise ArtifactError(f"the file requires {', '.join(map(_short, unknown[:3]))}, which this reader does not know")
    if canonical(manifest) != text:
        raise ArtifactError("the manifest is not in its canonical form")
    digest = _get(manifest, "manifest_sha256", "a SHA-256", _sha256)
    rest = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    if hashlib.sha256(canonical(rest).encode()).hexdigest() != digest:
        raise ArtifactError("manifest_sha256 does not match: the manifest is damaged")
    return manifest


def exact(value: Any, dtype: str) -> bool:
    """Return whether a JSON value is exactly an element of `dtype`: its type, finite, in range, unrounded, not −0.0."""
    if dtype == "BOOL":
        return type(value) is bool
    torch_dtype = DTYPES[dtype]
    if torch_dtype.is_complex:
        return False
    if not torch_dtype.is_floating_point:
        limits = torch.iinfo(torch_dtype)
        return type(value) is int and limits.min <= value <= limits.max
    if type(value) is not float or (math.copysign(1.0, value) < 0 and value == 0):
        return False
    return float(torch.tensor(value, dtype=torch.float64).to(torch_dtype)) == value


_SEED = re.compile("0|[1-9][0-9]{0,19}")
_SHA256 = re.compile("[0-9a-f]{64}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _sha256(value: Any) -> bool:
    return isinstance(value, str) and bool(_SHA256.fullmatch(value))


def _string(value: Any) -> bool:
    return isinstance(value, str)


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _get(holder: dict[str, Any], key: str, expected: str, holds: Callable[[Any], Any], where: str = "") -> Any:
    if key not in holder:
        raise ArtifactError(f"the manifest has no {where}{key}; expected {expected}")
    if not holds(holder[key]):
        raise ArtifactError(f"{where}{key} is {_short(holder[key])}; expected {expected}")
    return holder[key]


def _list(manifest: dict[str, Any], key: str) -> list[Any]:
    return _get(manifest, key, "a list", lambda v: isinstance(v, list))


def _object(manifest: dict[str, Any], key: str) -> dict[str, Any]:
    return _get(manifest, key, "an object", lambda v: isinstance(v, dict))


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _architecture(entry: dict[str, Any]) -> Architecture:
    words = {key: _get(entry, key, "a string", _string, "architecture.") for key in ("library", "version", "name")}
    kwargs = _get(entry, "kwargs", "an object", lambda v: isinstance(v, dict), "architecture.")
    return Architecture(**words, kwargs=kwargs)


def _drawn(entry: Any, where: str, masked: bool) -> TensorSpec:
    """Check an entry of `masked` or `generated`; `where` names it in messages."""
    if not isinstance(entry, dict):
        raise ArtifactError(f"{where} is {_short(entry)}; expected an object")

    def get(key: str, expected: str, holds: Callable[[Any], Any]) -> Any:
        return _get(entry, key, expected, holds, f"{where}.")

    name = get("name", "a string", _string)
    numel = element_count(entry.get("shape"), f"{where} ({name!r})")
    if numel == 0:
        raise ArtifactError(f"{where} ({name!r}) has the shape {entry['shape']}; expected positive sizes")
    dtype = get("dtype", "a dtype's name", lambda v: isinstance(v, str) and v in DTYPES)
    if not DTYPES[dtype].is_floating_point:
        raise ArtifactError(f"{where}.dtype is {dtype!r}; expected a floating one, for drawn values")
    informing: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "scheme": ("a string", _string),
        "scaled": ("true or false", lambda v: isinstance(v, bool)),
        "k": ("a number", _number),
        "fan_in": ("a number", _number),
    }
    if masked:
        get(
            "encoding", f"one of {', '.join(CODECS)}, the encodings that this reader knows", lambda v: _known(v, CODECS)
        )
    words = distributions() if masked else [word for word in DISTRIBUTIONS if word not in SIGNS.values()]
    distribution = get("distribution", f"one of {', '.join(words)}", lambda v: _known(v, words))
    drawn = source_of(distribution).drawn
    if not drawn and "std" in entry:
        what = f"{where}.std is {_short(entry['std'])}"
        raise ArtifactError(f"{what}; expected none, as the distribution is {distribution!r}")
    std = get("std", "a float above 0 that float32 can hold", _standard_deviation) if drawn else 0.0
    return TensorSpec(
        name=name,
        stream=get("stream", "a string", _string),
        shape=tuple(entry["shape"]),
        dtype=dtype,
        distribution=distribution,
        std=std,
        kept=get("kept", f"an integer from 0 to {numel}", lambda v: type(v) is int and 0 <= v <= numel)
        if masked
        else None,
        note={key: get(key, *how) for key, how in informing.items() if masked or key in entry},
        encoding=entry["encoding"] if masked else TensorSpec.encoding,
        pattern=_pattern(entry, where, numel) if masked else None,
        fixed=_fixed(entry, where, numel) if masked and "fixed" in entry else None,
        **(_planes(entry, where, distribution) if masked else {}),
    )


def _pattern(entry: dict[str, Any], where: str, numel: int) -> Pattern | None:
    """Check the pattern of a masked tensor, against its shape, its number of kept weights and its encoding."""
    if "pattern" not in entry:
        if get_codec(entry["encoding"]).needs_pattern:
            raise ArtifactError(f"{where} has the encoding {entry['encoding']!r}; expected a pattern beside it")
        return None
    given, where = entry["pattern"], f"{where}.pattern"
    if not isinstance(given, dict):
        raise ArtifactError(f"{where} is {_short(given)}; expected an object")
    names = [each.name for each in fields(Pattern)]
    found = Pattern(*(_get(given, name, "an integer", lambda v: type(v) is int, f"{where}.") for name in names))
    if not found.fits(numel):
        raise ArtifactError(f"{where} is {_short(given)}, which is no pattern for {entry['shape']}")
    if entry["kept"] != found.kept(numel):
        raise ArtifactError(
            f"{where} keeps {found.kept(numel)} of {numel} weights; expected {entry['kept']}, as kept is"
        )
    return found


def _fixed(entry: dict[str, Any], where: str, numel: int) -> Fixed:
    """Check how many weights of a masked tensor are fixed, against its shape and its number of kept weights."""
    given, where = entry["fixed"], f"{where}.fixed"
    if not isinstance(given, dict):
        raise ArtifactError(f"{where} is {_short(given)}; expected an object")
    counts = (_get(given, name, "an integer", lambda v: type(v) is int, f"{where}.") for name in ("dropped", "kept"))
    found = Fixed(*counts)
    if not found.allows(numel, entry["kept"]) or not found.dropped + found.kept:
        raise ArtifactError(
            f"{where} is {_short(given)}; expected numbers from 0, not both 0, that leave {entry['kept']} of {numel} "
            "weights to keep"
        )
    if "pattern" in entry:
        raise ArtifactError(f"{where} is beside a pattern; expected one of the two")
    return found


def _standard_deviation(value: Any) -> bool:
    # the largest value derived from it is the bound of a uniform distribution, std · √3
    return (
        type(value) is float and float(torch.tensor(value, dtype=torch.float32)) > 0 and value * 3**0.5 <= FLOAT32_MAX
    )


def _planes(entry: dict[str, Any], where: str, distribution: str) -> dict[str, Any]:
    """Check the kinds of planes of a masked tensor, and how many ones each has if they are coded."""
    kinds = [kind for kind in PLANES if distribution in OF_MANY or kind not in ORIGIN_KINDS]
    of_bits = f"a list of how many ones each plane of bits has, for {entry['kept']} weights"
    checks: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "planes": (f"a list of some of {', '.join(kinds)}, without gaps between coats", lambda v: in_order(v, kinds)),
        "plane_ones": (of_bits, lambda v: are_ones(v, entry.get("planes", []), entry["kept"])),
    }
    return {key: tuple(_get(entry, key, *how, f"{where}.")) for key, how in checks.items() if key in entry}


def _known(value: Any, names: Any) -> bool:
    return isinstance(value, str) and value in names


def _constant(name: str, entry: Any) -> Constant:
    """Check an entry of `constants`."""
    what = f"constants[{name!r}]"
    if not isinstance(entry, dict):
        raise ArtifactError(f"{what} is {_short(entry)}; expected an object")
    if element_count(entry.get("shape"), what) == 0:
        raise ArtifactError(f"{what} has the shape {entry['shape']}; an empty tensor cannot be a constant")
    dtype = _get(entry, "dtype", "a dtype's name", lambda v: _known(v, DTYPES), f"{what}.")
    value = _get(entry, "value", f"a finite value that is exact in {dtype}", lambda v: exact(v, dtype), f"{what}.")
    return Constant(tuple(entry["shape"]), dtype, value)


def _probe(entry: Any) -> Probe:
    """Check `probe`."""
    if not isinstance(entry, dict):
        raise ArtifactError(f"probe is {_short(entry)}; expected an object")
    if not 0 < element_count(entry.get("shape"), "probe") <= PROBE_LIMIT:
        raise ArtifactError(f"probe has the shape {_short(entry['shape'])}; expected 1 to {PROBE_LIMIT:,} elements")

    def numbers(value: Any) -> bool:
        return isinstance(value, list) and 0 < len(value) <= PROBE_LIMIT and all(map(_number, value))

    output = _get(entry, "output", "a list of numbers", numbers, "probe.")
    rtol = _get(entry, "rtol", "a number above 0", lambda v: _number(v) and v > 0, "probe.")
    return Probe(tuple(entry["shape"]), tuple(map(float, output)), float(rtol))


def _base(entry: Any) -> Base:
    if not isinstance(entry, dict):
        raise ArtifactError(f"base is {_short(entry)}; expected an object")
    words = {key: _get(entry, key, "a string", _string, "base.") for key in ("library", "version", "name", "tag")}
    return Base(**words, sha256=_get(entry, "sha256", "a SHA-256", _sha256, "base."))


def _check_names(manifest: Manifest) -> None:
    """Check that each `state_dict` key has one place, that aliases are valid, and that a base is there if needed."""
    based = [entry for entry in manifest.masked if source_of(entry.distribution).in_base]
    if based and manifest.base is None:
        first = based[0]
        raise ArtifactError(f"{first.name!r} has the distribution {first.distribution!r}, and the manifest has no base")
    if manifest.base is not None and not based:
        raise ArtifactError("the manifest has a base, but no masked tensor has its weights in it")
    names = [entry.name for entry in (*manifest.masked, *manifest.generated)]
    names += [*manifest.constants, *manifest.aliases]
    if len(set(names)) < len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ArtifactError(f"{twice!r} is in the manifest twice; expected each state_dict key in one place")
    for name, target in manifest.aliases.items():
        if not isinstance(target, str) or target in manifest.aliases:
            raise ArtifactError(f"aliases[{name!r}] is {_short(target)}; expected a key that is not an alias itself")

"""Write a network for other runtimes: as dense weights, as a program of torch.export, or as an ONNX file."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..artifact import Artifact
from ..artifact.about import About
from ..artifact.description import describe_network
from ..artifact.probe import probe_input
from ..atomic import check_writable, write_atomically
from ..config.schema import Data
from ..data.batches import Batches, quiet
from ..data.pixels import MODES
from ..data.transforms import mean_std
from ..errors import ConversionError, DataError, RecipeError
from ..exporting.check import check_export, check_repeats
from ..exporting.needed import check_packages
from ..exporting.onnx_file import described, written
from ..exporting.packing import PackedLayer
from ..exporting.program import outputs_of, program_bytes, run_program, trace
from ..exporting.to_onnx import check_size, onnx_bytes, to_onnx, to_proto
from ..masking.bake import bake, clone_with
from ..masking.packed import refuse_packed
from ..masking.walk import masked_weights, unwrap
from ..models.architecture import input_size
from ..training.outputs import untouched
from .dense import write_dense
from .evaluate import class_names, data_of, recorded_data
from .packed import pack
from .setup import open_for

SUFFIXES = (".safetensors", ".onnx", ".pt2")
MOST = 1 << 28  # numbers of an example: 1 GiB


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        path: the file.
        network: library and name of its network, or `custom` and the name of its class.
        tensors: number of tensors, for dense weights.
        difference: largest difference of its outputs from the network's, as a share of the largest output: for random
            inputs, or of a packed file for images of the data set if it is there; None for dense weights.
        layers: of a packed file, what was done with each layer that has weights.
        time: of a packed file, its time for one input as a share of that of the same file in float32, measured on this
            machine; None if the network is too large for a file in float32.
        accuracy, packed_accuracy: of the network and of the packed file on the validation images, 0 … 1.
        same: share of these images that both give the same class.
    """

    path: Path
    network: str
    tensors: int | None = None
    difference: float | None = None
    layers: tuple[PackedLayer, ...] = ()
    time: float | None = None
    accuracy: float | None = None
    packed_accuracy: float | None = None
    same: float | None = None


def export(
    source: str | Path | Artifact | nn.Module,
    path: str | Path,
    *,
    example: Tensor | None = None,
    base: str | Path | nn.Module | None = None,
    packed: bool = False,
    fast: bool = False,
    rounded: bool = False,
    data_dir: str | Path | None = None,
) -> Exported:
    """Write a network for a runtime that knows nothing of masks, in the format that the suffix of `path` names.

    `.safetensors` are dense weights, for `timm.create_model(name, checkpoint_path=…)`. `.pt2` is a program for
    `torch.export.load`. `.onnx` is a file for ONNX Runtime and the like. Of the last two, the batch size is free.
    Before they are put in place, they are run, an ONNX file by ONNX Runtime, and compared with the network on random
    inputs: a difference above 1e-4 of the largest output writes nothing. Weights of 16 bits are widened to float32, and
    for ONNX those of 64 are rounded to it.

    The metadata of an ONNX file has `classes`, the names of the outputs (JSON), and `preparation`, how an image becomes
    the input (JSON), if the artifact has them. `evaluate` and `predict` take the file.

    With `packed`, weights of which each output has only −c, 0 and +c, as in a subnetwork of constants, are stored
    exactly, at 2 bits or as int8, and the runtime computes with 8-bit activations. The outputs then differ by some
    percent; a difference above a quarter of the largest output writes nothing.

    Args:
        source: a popup artifact, as a file or open; a converted network, which is baked; or any other network, which
            computes what it does in eval mode. The network is not changed.
        path: the file to write. An existing file is replaced atomically.
        example: the network's input, one tensor whose first axis is the batch. Default: random images of the size that
            the file or the network names.
        base: for a mask on pretrained weights in a file: these weights, as for `load`.
        packed: pack the layers of an ONNX file where that is not slower than float32.
        fast: pack products as int8 in place of 2 bits: faster with several rows, such as a transformer's tokens, but
            four times the bytes. Implies `packed`.
        rounded: also pack weights that are not ternary, as int8, which changes them. Implies `packed`.
        data_dir: the data set's folder. With it (or for the digits, which need none) the ranges of activations are
            those of 32 validation images, and the result has the accuracies. Otherwise they are those of random inputs.
            For `packed` files of an artifact.

    Raises:
        ArtifactError: the source is damaged, or not an artifact.
        ConversionError: the suffix is another, arguments do not go together, the network cannot be exported, or the
            export computes something else.
        DataError: the data set is missing or does not fit the network.
        PopupError: a package of the extra `[onnx]` is missing or too old, or the file cannot be written.
    """
    path, packed = Path(path), packed or fast or rounded
    suffix = path.suffix.lower()
    _check_arguments(path, suffix, packed, None if isinstance(source, nn.Module) else source, base, data_dir)
    check_writable(path)
    if suffix == ".onnx":
        check_packages()
    if isinstance(source, nn.Module):
        artifact, model = None, _plain(source)
        about = About(describe_network(model, model.state_dict(keep_vars=True))[0], {})
    else:
        artifact = Artifact.open(source)
        model = artifact.network(base=base)
        about = About(artifact.manifest.architecture, artifact.manifest.provenance)
    name = f"{about.architecture.library}/{about.architecture.name}"
    if suffix == ".safetensors":
        return Exported(path, name, tensors=write_dense(model, path, about.provenance))
    data = None if artifact is None else known_data(artifact, needed=data_dir is not None)
    with _running(model, suffix == ".onnx") as model:
        inputs = _checked(example) if example is not None else example_for(model, artifact, data)
        inputs = inputs.to(next(model.parameters(), torch.empty(0)).dtype) if inputs.is_floating_point() else inputs
        if suffix == ".onnx" and not packed:
            check_size(model)
        if data is not None and inputs.ndim == 4:  # whoever runs the file prepares images of its size
            data = data.model_copy(update={"input_size": tuple(inputs.shape[1:])})
            about = replace(about, provenance=_with_size(about.provenance, inputs))
        names = [] if artifact is None else class_names(artifact)
        images = _images(model, data, data_dir, names) if packed and data is not None else None
        check_repeats(model, inputs)
        program = trace(model, inputs)
        if suffix == ".pt2":
            contents = program_bytes(program)
            done = Exported(
                path, name, difference=check_export(model, lambda given: run_program(contents, given), inputs)
            )
        else:
            graph = to_onnx(program, *_names(inputs, outputs_of(model, inputs)))
            del program
            preparation = None if data is None else _preparation(data, tuple(inputs.shape[1:]))
            metadata = described(about, names, preparation)
            if packed:
                contents, more = pack(model, graph, metadata, inputs, images, fast, rounded)
                done = Exported(path, name, **more)
            else:
                contents = onnx_bytes(to_proto(graph), metadata)
                done = Exported(path, name, difference=check_export(model, written(contents).outputs, inputs))
    write_atomically(path, contents)
    return done


def _check_arguments(
    path: Path, suffix: str, packed: bool, file: object, base: object, data_dir: str | Path | None
) -> None:
    """Raise `ConversionError` if the arguments of `export` do not go together. `file` is None for a network."""
    if suffix not in SUFFIXES:
        raise ConversionError(f"export writes {', '.join(SUFFIXES)} files, by suffix; the path is {path}")
    if packed and suffix != ".onnx":
        raise ConversionError(f"only .onnx files are packed; the path is {path}")
    if file is None and base is not None:
        raise ConversionError("a base was given, and the network has weights of its own; leave out base")
    if data_dir is not None and (file is None or not packed):
        raise ConversionError(
            f"data_dir is {data_dir}; expected it only for a packed file of an artifact, which says how its images are "
            "prepared"
        )


def random_images(size: tuple[int, ...], seed: int = 0) -> Tensor:
    """Return an example for `export`: random images of channels, height and width."""
    if min(size) < 1:
        raise ConversionError(f"the input size is {' × '.join(map(str, size))}; expected three numbers from 1")
    if math.prod(size) > MOST:
        raise ConversionError(f"the input size is {' × '.join(map(str, size))}; expected at most {MOST:,} numbers")
    return probe_input(seed, (1, *size))


def _plain(model: nn.Module) -> nn.Module:
    """Return a plain network to export; a converted one is baked."""
    core = unwrap(model)
    refuse_packed(core, "be exported", ConversionError)
    if any(tensor.is_meta for tensor in (*core.parameters(), *core.buffers())):
        raise ConversionError(f"the {type(core).__name__} is on the meta device, and has no weights to export")
    return bake(model) if any(True for _ in masked_weights(core)) else core


@contextmanager
def _running(model: nn.Module, single: bool) -> Iterator[nn.Module]:
    """Context manager: the network on the CPU, in float32 or float64, in eval mode. The user's own one is as before.

    With `single` it is in float32: ONNX Runtime lacks many operators for float64, convolutions too.
    """
    others = {torch.float16, torch.bfloat16} | ({torch.float64} if single else set())
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.dtype in others or tensor.device.type != "cpu" for tensor in tensors):
        model = clone_with(model, ()).to("cpu")
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.dtype in others:
                tensor.data = tensor.data.float()
    with untouched(model):
        yield model.eval()


def _checked(example: object) -> Tensor:
    """Return an example of the user's, if it is one tensor with values."""
    if not isinstance(example, Tensor):
        several = f" of {len(example)}" if isinstance(example, list | tuple | dict) else ""
        raise ConversionError(
            f"example is a {type(example).__name__}{several}; expected one tensor: only networks with one input are "
            "exported"
        )
    if not example.ndim or not len(example) or example.layout is not torch.strided or example.is_meta:
        kind = " × ".join(map(str, example.shape)) or "one number"
        raise ConversionError(
            f"example is {kind}, {example.layout}, on {example.device}; expected a dense tensor of at least one input, "
            "whose first axis is the batch"
        )
    return example.detach().cpu()


def _with_size(provenance: Mapping[str, Any], images: Tensor) -> dict[str, Any]:
    """Return a file's provenance, whose recipe has the size of these images."""
    recipe = provenance["recipe"]
    return {**provenance, "recipe": {**recipe, "data": {**recipe["data"], "input_size": list(images.shape[1:])}}}


def example_for(model: nn.Module, artifact: Artifact | None, data: Data | None) -> Tensor:
    """Return random inputs of the size that the file's probe, its recipe or the network names."""
    seed, shape = 0, None
    if artifact is not None:
        seed, probe = artifact.manifest.seed, artifact.manifest.probe
        shape = None if probe is None else probe.shape
    if shape is None and (size := (data and data.input_size) or input_size(model)):
        return random_images(tuple(size), seed)
    if shape is None:
        raise ConversionError(
            f"the {type(model).__name__} does not say which inputs it takes; pass `example`, or --input-size on the "
            "command line"
        )
    return probe_input(seed, shape)


def known_data(artifact: Artifact, needed: bool = False) -> Data | None:
    """Return the data section of the recipe that a file records; None if it has none, or none that is known.

    Raises:
        DataError, RecipeError: it is `needed`.
    """
    try:
        return recorded_data(artifact)
    except (DataError, RecipeError):
        if needed:
            raise
        return None


def _images(model: nn.Module, data: Data, data_dir: str | Path | None, classes: list[str]) -> Batches | None:
    """Open the validation images; None if the data set needs a folder, and none is given."""
    if data_dir is None and data.name != "digits":
        return None
    return open_for(model, data_of("", data, data_dir), quiet, train=False, classes=classes)


def _names(inputs: Tensor, outputs: list[Tensor]) -> tuple[str, list[str]]:
    """Return names for a graph's input and outputs."""
    given = "images" if inputs.ndim == 4 and inputs.is_floating_point() else "input"
    if len(outputs) == 1:
        return given, ["logits" if outputs[0].ndim == 2 else "output"]
    return given, [f"output_{i}" for i in range(len(outputs))]


def _preparation(data: Data, size: tuple[int, ...]) -> dict[str, Any] | None:
    """Return how an image becomes a network's input, as docs/artifact-format.md describes it; None without images."""
    if len(size) != 3 or size[0] not in MODES:
        return None
    mean, std = mean_std(data, size[0])
    keys = {key: getattr(data, key) for key in ("interpolation", "crop_pct", "same_size")}
    return {"mode": MODES[size[0]], "height": size[1], "width": size[2], **keys, "mean": [*mean], "std": [*std]}

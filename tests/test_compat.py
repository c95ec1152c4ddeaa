"""Private names of other libraries: each is there and does what it did, and none is used outside `*_compat.py`."""

import ast
import copy
import inspect
import json
import logging
import multiprocessing.reduction
import os
import re
import signal
import socket
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate
import pytest
import timm.data
import torch
import torch.distributed as dist
import torchvision
import typer
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import popup_surgery
from popup_surgery import timm_compat
from popup_surgery.accelerate_compat import forget_settings
from popup_surgery.torch_compat import (
    BROADCAST_BUFFERS_DEPRECATED,
    CREATE_GRAPH_WARNING,
    DIED_SENDING,
    NOT_DETERMINISTIC,
    WORKER_DIED,
    BatchNorm,
    ModuleMethods,
    NormWithStatistics,
    ParameterToBe,
    RecurrentWeights,
    compiled_module,
    forget_weight_list,
    fsdp_calls,
    has_forward_hooks,
    in_func_transform,
    is_compiled,
    is_func_wrapper,
    is_fx_tracing,
    is_replica,
    of_fsdp,
    remove_forward_hooks,
    renew_reducer,
    renew_weight_list,
    storage_of,
    torch_layer_reads,
    unsaved_buffers,
    version_of,
    without_fsdp,
)
from popup_surgery.typer_compat import UsageError
from support import write_images

# of torch 2.11's own
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

PACKAGE = Path(popup_surgery.__file__).parent
SHIMS = sorted(PACKAGE.glob("*_compat.py"))

# each private name that is used, where it is found
NAMES = (
    "accelerate.state.AcceleratorState._reset_state",
    "torch.UntypedStorage._new_with_weak_ptr",
    "torch._C._are_functorch_transforms_active",
    "torch._C._functorch.is_functorch_wrapped_tensor",
    "torch.compile(torch.nn.Linear(1, 1))._orig_mod",
    "torch.empty(0)._version",
    "torch.fx._symbolic_trace.is_fx_symbolic_tracing",
    "torch.nn.LSTM(1, 1)._flat_weight_refs",
    "torch.nn.LSTM(1, 1)._flat_weights",
    "torch.nn.LSTM._init_flat_weights",
    "torch.nn.LSTM._update_flat_weights",
    "torch.nn.Module()._compiled_call_impl",
    "torch.nn.Module()._forward_hooks",
    "torch.nn.Module()._forward_hooks_always_called",
    "torch.nn.Module()._forward_pre_hooks",
    "torch.nn.Module()._non_persistent_buffers_set",
    "torch.nn.Module._apply",
    "torch.nn.Module._load_from_state_dict",
    "torch.nn.Module._replicate_for_data_parallel",
    "torch.nn.Module._save_to_state_dict",
    "torch.nn.Module()._replicate_for_data_parallel()._is_replica",
    "torch.nn.Parameter(torch.empty(0).as_subclass(type('Other', (torch.Tensor,), {})))._is_param",
    "torch.nn.modules.batchnorm._BatchNorm",
    "torch.nn.modules.batchnorm._NormBase",
    "torch.nn.parallel.DistributedDataParallel._remove_autograd_hooks",
)

EVERYWHERE = {"_parameters", "_buffers", "_modules"}  # of nn.Module, as torch_compat.py says


def private(name: str) -> bool:
    return bool(re.fullmatch(r"_(?!popup_)[A-Za-z]\w*", name))  # what we leave on modules starts with _popup_


FOREIGN = {part for name in NAMES for part in name.split(".") if private(part)} | {
    name
    for owner in (nn.LSTM(1, 1), torch.fx.Tracer(), DistributedDataParallel, DataLoader, typer.Typer())
    for name in dir(owner)
    if private(name)
}


def definitions(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Names that classes give to their methods and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.lineno, node.attr
        for inner in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(inner, ast.FunctionDef):
                yield inner.lineno, inner.name
            targets = inner.targets if isinstance(inner, ast.Assign) else [getattr(inner, "target", None)]
            yield from ((target.lineno, target.id) for target in targets if isinstance(target, ast.Name))


def uses(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Names that are read from something, or imported from another package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in sys.stdlib_module_names:
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.lineno, n) for n in [*(node.module or "").split("."), *(a.name for a in node.names)])
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, name) for alias in node.names for name in alias.name.split("."))


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Whole strings: keys of a module's `__dict__`, or arguments of `getattr`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def foreign_names(text: str, ours: set[str]) -> list[tuple[int, str]]:
    """Line and name of each private name in a file that another library has, or that none of our classes has."""
    tree = ast.parse(text)
    found = {(line, name) for line, name in [*definitions(tree), *strings(tree)] if name in FOREIGN}
    found |= {(line, name) for line, name in uses(tree) if private(name) and (name in FOREIGN or name not in ours)}
    return sorted((line, name) for line, name in found if name not in EVERYWHERE)


def test_private_names_are_used_in_the_compat_modules_alone() -> None:
    rooms: dict[Path, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        rooms.setdefault(path.parent, []).append(path)
    wrong = []
    for paths in rooms.values():
        ours = {name for path in paths for _, name in definitions(ast.parse(path.read_text()))}
        for path in set(paths) - set(SHIMS):
            wrong += [f"{path.relative_to(PACKAGE)}:{n}: {name}" for n, name in foreign_names(path.read_text(), ours)]
    assert not wrong, "give these a public name in torch_compat.py or beside it:\n" + "\n".join(sorted(wrong))


@pytest.mark.parametrize(
    "text",
    [
        "torch._C.anything",
        "tensor._version",
        "super()._apply(function)",
        "wrapper._of_a_library()",
        "from torch._dynamo import config",
        "from torch.nn.modules.batchnorm import _BatchNorm",
        "import torch._inductor",
        "getattr(model, '_orig_mod')",
        "module.__dict__.pop('_flat_weights')",
        "class Layer:\n    def _load_from_state_dict(self): pass",
        "class Layer:\n    _version = 2",
    ],
)
def test_a_private_name_of_another_library_is_seen(text: str) -> None:
    assert foreign_names(text, {"_version", "_apply", "_mine"})
    assert not foreign_names("self._mine; os._exit(0); module._parameters", {"_mine"})


@pytest.mark.parametrize("name", NAMES)
def test_the_private_name_exists(name: str) -> None:
    owner, _, last = name.rpartition(".")
    assert hasattr(eval(owner, {"torch": torch, "accelerate": accelerate}), last)


def test_each_private_name_in_the_compat_modules_is_listed() -> None:
    used = {
        name
        for path in SHIMS
        for find in (definitions, uses, strings)
        for _, name in find(ast.parse(path.read_text()))
        if private(name)
    }
    assert used - EVERYWHERE == {part for name in NAMES for part in name.split(".") if private(part)}


def test_norms() -> None:
    batch_norms = [nn.BatchNorm1d(1), nn.BatchNorm2d(1), nn.BatchNorm3d(1), nn.SyncBatchNorm(1)]
    instance_norms = [nn.InstanceNorm1d(1), nn.InstanceNorm2d(1), nn.InstanceNorm3d(1)]
    assert all(isinstance(norm, BatchNorm) for norm in batch_norms)
    assert all(isinstance(norm, NormWithStatistics) for norm in [*batch_norms, *instance_norms])
    assert not any(isinstance(norm, BatchNorm) for norm in instance_norms)
    assert not any(isinstance(norm, NormWithStatistics) for norm in [nn.LayerNorm(1), nn.GroupNorm(1, 1)])


def test_a_parameter_is_what_a_tensor_makes_itself_into() -> None:
    class Own(ParameterToBe, Tensor):
        def _popup_become_parameter(self) -> None:
            torch.utils.swap_tensors(self, nn.Parameter(torch.ones(3)))

    found = nn.Parameter(torch.zeros(2).as_subclass(Own))
    assert type(found) is nn.Parameter
    assert torch.equal(found, torch.ones(3))
    assert not isinstance(torch.zeros(2).as_subclass(Own), nn.Parameter)


def test_a_replica_of_data_parallels_is_told_from_its_module() -> None:
    module = nn.Linear(2, 3)
    assert is_replica(module._replicate_for_data_parallel())
    assert not is_replica(module)


def test_version_of_counts_writes_through_every_alias() -> None:
    tensor = torch.zeros(2)
    alias, before = tensor.detach(), version_of(tensor)
    alias.add_(1)
    assert version_of(tensor) == version_of(alias) == before + 1
    tensor.data.add_(1)
    assert version_of(tensor) == before + 1


def test_is_func_wrapper() -> None:
    seen = []

    def look(tensor: Tensor) -> Tensor:
        seen.append((is_func_wrapper(tensor), type(tensor)))
        return tensor.sum()

    torch.func.vmap(look)(torch.zeros(2, 3))
    torch.func.grad(look)(torch.zeros(2))
    look(torch.zeros(2))
    assert seen == [(True, Tensor), (True, Tensor), (False, Tensor)]


def test_in_func_transform() -> None:
    seen = []

    def look(tensor: Tensor) -> Tensor:
        seen.append(in_func_transform())
        return tensor.sum()

    torch.func.grad(look)(torch.zeros(2))
    torch.func.vmap(look)(torch.zeros(2, 2))
    assert [*seen, in_func_transform()] == [True, True, False]


def test_is_compiled() -> None:
    model = nn.Linear(1, 1)
    assert not is_compiled(model)
    assert is_compiled(torch.compile(model, backend="eager"))  # type: ignore[arg-type]
    model.compile(backend="eager")
    assert is_compiled(model)


class Telling(nn.Module):
    """Notes in each forward whether torch.fx traces it."""

    def forward(self, x: Tensor) -> Tensor:
        self.told = is_fx_tracing()
        return x + 1


def test_buffers_outside_the_state_dict() -> None:
    module = nn.Module()
    module.register_buffer("kept", torch.zeros(1))
    module.register_buffer("unsaved", torch.ones(2), persistent=False)
    assert unsaved_buffers(module) == {"unsaved": module.unsaved}


def test_is_fx_tracing() -> None:
    model = Telling()
    torch.fx.symbolic_trace(model)
    assert model.told
    model(torch.zeros(1))
    assert not model.told
    torch.export.export(model, (torch.zeros(1),))
    assert not model.told


def test_compiled_module() -> None:
    model = nn.Linear(1, 1)
    assert compiled_module(torch.compile(model)) is model  # type: ignore[arg-type]
    assert compiled_module(model) is None


class Counting:
    """A hook that counts its calls."""

    calls = 0

    def __call__(self, *_: Any) -> None:
        Counting.calls += 1


def test_remove_forward_hooks() -> None:
    model, other = nn.Linear(1, 1), []
    model.register_forward_pre_hook(Counting())
    model.register_forward_hook(Counting(), always_call=True)
    model.register_forward_hook(lambda *_: other.append(1))
    model(torch.zeros(1))
    assert Counting.calls == 2
    assert has_forward_hooks(model, Counting)
    remove_forward_hooks(model, Counting)
    assert not has_forward_hooks(model, Counting)
    model(torch.zeros(1))
    with pytest.raises(RuntimeError, match="shape"):
        model(torch.zeros(7))
    assert Counting.calls == 2
    assert other == [1, 1]


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_renew_reducer(process_group: None) -> None:
    exchanged: set[int] = set()

    def note(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        exchanged.update(map(id, bucket.parameters()))
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    wrapper = DistributedDataParallel(model)
    group = wrapper.process_group
    model[0].requires_grad_(False)
    model[1].requires_grad_(True)
    renew_reducer(wrapper)
    wrapper.register_comm_hook(None, note)
    for _ in range(3):
        wrapper(torch.ones(1, 2)).sum().backward()
    assert exchanged == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert wrapper.process_group is group


def test_what_fully_shard_assigns_and_leaves(process_group: None) -> None:
    seen = []

    class Layer(nn.Linear):
        def __setattr__(self, name: str, value: Any) -> None:
            seen.append((name, fsdp_calls()))
            super().__setattr__(name, value)

    layer = Layer(2, 3)
    assert not of_fsdp(layer)
    assert not any(by_fsdp for _, by_fsdp in seen)
    fully_shard(layer)
    assert ("weight", True) in seen
    assert of_fsdp(layer)
    replaced = {id(parameter): nn.Parameter(torch.zeros(1)) for parameter in layer.parameters()}
    before = layer.__dict__.copy()
    with pytest.raises(AssertionError):
        copy.deepcopy(layer, replaced.copy())
    with without_fsdp(layer):
        twin = copy.deepcopy(layer, replaced)
    assert layer.__dict__ == before
    assert of_fsdp(layer)
    assert type(twin) is Layer
    empty = nn.Linear(2, 3).__dict__
    assert {name: value for name, value in vars(twin).items() if name.endswith("hooks")} == {
        name: value for name, value in empty.items() if name.endswith("hooks")
    }
    assert vars(twin).keys() == empty.keys()


def test_torch_layer_reads() -> None:
    seen: list[bool] = []
    own: dict[str, Any] = {"__name__": "popup_surgery.layer", "torch_layer_reads": torch_layer_reads, "seen": seen}
    exec("def read(layer):\n    seen.append(torch_layer_reads())\n    return layer._parameters['weight']", own)
    for layer, images in ((nn.Linear(2, 3), torch.ones(1, 2)), (nn.Conv2d(2, 3, 1), torch.ones(1, 2, 1, 1))):
        layer.__class__ = type("Reader", (type(layer),), {"weight": property(own["read"])})
        layer(images)
        assert layer.weight.shape[:2] == (3, 2)
    assert seen == [True, False, True, False]


def test_storage_of() -> None:
    tensor = torch.ones(3)
    reference = StorageWeakRef(tensor.untyped_storage())
    storage = storage_of(reference)
    assert storage is not None
    assert storage.data_ptr() == tensor.data_ptr()
    del tensor, storage
    assert storage_of(reference) is None


def test_broadcast_buffers_warning(process_group: None) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        DistributedDataParallel(nn.Linear(1, 1), broadcast_buffers=False)
    has_successor = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    matched = [bool(re.match(BROADCAST_BUFFERS_DEPRECATED, str(warning.message))) for warning in caught]
    assert matched == [True] * has_successor


def test_create_graph_warning() -> None:
    value = torch.ones(1, requires_grad=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (value**2).sum().backward(create_graph=True)
    value.grad = None
    assert [bool(re.match(CREATE_GRAPH_WARNING, str(warning.message))) for warning in caught] == [True]


def test_not_deterministic() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match=NOT_DETERMINISTIC):
            torch.zeros(2).put_(torch.tensor([0]), torch.ones(1), accumulate=False)
    finally:
        torch.use_deterministic_algorithms(before)


class Ending:
    """A data set whose worker ends as it reads."""

    def __init__(self, end: Callable[[], None]) -> None:
        self.end = end

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        self.end()
        return index


@pytest.mark.parametrize("end", [lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: os._exit(1)])
def test_worker_died(end: Callable[[], None]) -> None:
    with pytest.raises(RuntimeError, match=rf"^{re.escape(WORKER_DIED)}"):
        list(DataLoader(Ending(end), num_workers=1))  # type: ignore[arg-type]


def test_died_sending() -> None:
    ours, other = socket.socketpair()
    with ours, other:
        other.send(b"x")
        with pytest.raises(RuntimeError, match=f"^{DIED_SENDING}"):
            multiprocessing.reduction.recvfds(ours, 1)


class Layer(ModuleMethods, nn.Linear):
    """A layer that nothing casts, and that notes what loading lacked."""

    def _popup_cast(self, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda tensor: tensor

    @contextmanager
    def _popup_load(self, state_dict: Mapping[str, Any], prefix: str, missing: list[str]) -> Iterator[None]:
        before = self.bias.clone()
        yield
        self.loaded = prefix, list(missing), not torch.equal(self.bias, before)
        missing.clear()


def test_module_methods() -> None:
    model = nn.Sequential(nn.Linear(1, 1), layer := Layer(1, 1))
    state = model.state_dict() | {"1.bias": torch.full((1,), 7.0)}
    del state["1.weight"]
    model.load_state_dict(state)
    assert layer.loaded == ("1.", ["1.weight"], True)
    model.double()
    assert {key: str(value.dtype) for key, value in model.state_dict().items()} == {
        "0.weight": "torch.float64", "0.bias": "torch.float64",
        "1.weight": "torch.float32", "1.bias": "torch.float32",
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("cls", "proj_size"), [(nn.LSTM, 1), (nn.LSTM, 0), (nn.GRU, 0), (nn.RNN, 0)])
def test_weights_of_recurrent_layers(cls: Any, proj_size: int, bias: bool) -> None:
    options = {"proj_size": proj_size} if proj_size else {}
    layer = cls(2, 3, num_layers=2, bidirectional=True, bias=bias, **options)
    kept, x = list(layer._flat_weights), torch.ones(4, 1, 2)
    forget_weight_list(layer)
    forget_weight_list(nn.Linear(1, 1))
    assert "_flat_weights" not in layer.__dict__
    doubled = property(lambda self: 2 * self._parameters["weight_hh_l0"])
    layer.__class__ = type("Doubled", (RecurrentWeights, cls), {"weight_hh_l0": doubled})
    names = [name for name, _ in layer.named_parameters()]
    assert [w is k for w, k in zip(layer._flat_weights, kept, strict=True)] == [n != "weight_hh_l0" for n in names]
    found = layer(x)[0]
    layer.__class__ = cls
    with torch.no_grad():
        layer.get_parameter("weight_hh_l0").mul_(2)
    renew_weight_list(layer)
    renew_weight_list(nn.Linear(1, 1))
    assert all(w is k for w, k in zip(layer._flat_weights, kept, strict=True))
    torch.testing.assert_close(found, layer(x)[0])


def test_forget_settings() -> None:
    forget_settings()
    accelerate.Accelerator(mixed_precision="no")
    with pytest.raises(ValueError, match="mixed_precision"):
        accelerate.Accelerator(mixed_precision="bf16")
    forget_settings()
    assert accelerate.Accelerator(mixed_precision="bf16").mixed_precision == "bf16"
    forget_settings()


@pytest.mark.parametrize("arguments", [["--nope"], ["one", "--count", "x"], []])
def test_usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer(rich_markup_mode=None)

    @app.command()
    def command(name: str, count: int = 1) -> None:
        pass

    assert app(["one", "--count", "2"], standalone_mode=False) is None
    with pytest.raises(UsageError) as caught:
        app(arguments, standalone_mode=False)
    caught.value.show()
    assert "Usage: " in capsys.readouterr().err


def test_timms_folders_and_tar_files(tmp_path: Path) -> None:
    folder, numbers = tmp_path / "images", {"blue": 0, "green": 1, "red": 2}
    write_images(folder, tuple(numbers), count=1)
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(folder, ".")
    of_folder = timm.data.create_dataset("", str(folder))
    reader = timm_compat.reader_of(of_folder)
    file, label, *_ = reader[1]
    with file:
        assert file.read(4) == b"\x89PNG"
    path = Path(reader.filename(1, absolute=True))
    assert (path.is_absolute(), path.parent.name, label) == (True, "green", 1)
    assert Path(reader.root) == folder
    of_torchvision = torchvision.datasets.ImageFolder(folder)
    assert timm_compat.reader_of(of_torchvision) is None
    for dataset in (of_folder, timm.data.create_dataset("", str(tmp_path / "images.tar")), of_torchvision):
        assert timm_compat.class_numbers(dataset) == numbers
    assert timm_compat.class_numbers(torchvision.datasets.FakeData()) == {}


def test_timms_shards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def opened(split: str) -> timm_compat.ShardFiles:
        return timm_compat.shard_files(timm.data.create_dataset("wds/x", str(tmp_path), split))

    urls = [str(tmp_path / f"s-{i}.tar") for i in range(2)]
    logging.getLogger("timm.data.readers.reader_wds").setLevel(logging.NOTSET)
    assert opened("s-{0..1}.tar|7") == (urls, "", 7)
    assert "info file not found" in caplog.text
    caplog.clear()
    timm_compat.silence_missing_info()
    assert opened("s-{0..1}.tar") == (urls, "", None)
    assert not caplog.text
    split = {"name": "t", "num_samples": 3, "filenames": ["a.tar"], "shard_lengths": [3], "alt_label": "y"}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"t": split}}))
    assert opened("t") == ([str(tmp_path / "a.tar")], "y", 3)

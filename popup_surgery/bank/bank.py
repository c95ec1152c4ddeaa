"""Many masks on one network: `MaskBank`."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..artifact import Artifact
from ..artifact.manifest import Manifest
from ..errors import ConversionError, PopupError, unknown
from .base import open_base
from .heads import Heads, put
from .inference import Inference, Mixing
from .parts import Part, write_all
from .tasks import Task, read_task


@dataclass(frozen=True)
class Memory:
    """What a bank holds in memory, in bytes.

    Attributes:
        network: the network in use, with the heads of all sizes.
        base: the weights that the masks select from, and the rest of the network with no task in use.
        masks: of each task, the masks.
        own: of each task, its own tensors: norms, statistics, head.
    """

    network: int
    base: int
    masks: dict[str, int]
    own: dict[str, int]

    @property
    def total(self) -> int:
        """All of it."""
        return self.network + self.base + sum(self.masks.values()) + sum(self.own.values())


class MaskBank:
    """Many masks on one network, which is switched from one to another in place.

    The bank holds the network, its base once, and of each task one bit a weight and what the task's file stores beside
    masks, such as norms, statistics and a head. For weights of one magnitude (`signed_constant`) the base is one bit a
    weight too. A task computes what `load` of its file computes, to the bit.

    A switch writes into the network's own tensors. So a compiled network or a captured graph computes the new task, and
    nothing is compiled again. The exception is a head of another size, which has tensors of its own: a network compiled
    as a whole is compiled once for each size, and a captured graph must not be used for another size.

    Threads share a bank through `using`, `predict` and `infer`, which wait for one another.

    Args:
        base: the network with the weights that the masks select from, plain. It becomes the network in use, so its
            weights change; pass a `copy.deepcopy` to keep it. Or its name with a tag, as in
            `timm/resnet50.a1_in1k`. Or for masks on random weights any file of the seed and the network, which is not
            added as a task.
        weights: beside a network's name, a tag or a file of weights, as `pretrained` of `build`. Beside an artifact on
            pretrained weights, these weights, as `base` of `load`.
        model: beside an artifact whose architecture is `custom`, the plain network to fill.

    Raises:
        ConversionError: the arguments give no network with weights, or it cannot be switched.
        ArtifactError: the artifact is damaged or its network cannot be built.
        UnknownName: there is no such network or tag.
    """

    def __init__(
        self,
        base: nn.Module | str | Path | Artifact,
        *,
        weights: str | Path | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self._base = open_base(base, weights, model)
        self._tasks: dict[str, Task] = {}
        self._in_use: str | None = None
        self._swapped: set[str] = set()  # layers that have had another size
        self._turn = threading.Lock()
        self._block: tuple[int, str] | None = None  # thread and task of the `using` block that holds the lock
        self._base.network.eval()

    @property
    def network(self) -> nn.Module:
        """The network, which is always the same object."""
        return self._base.network

    @property
    def in_use(self) -> str | None:
        """The task in use; None if the network has its base's weights."""
        return self._in_use

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks in the order in which they were added."""
        return tuple(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._tasks

    def __repr__(self) -> str:
        return f"MaskBank({self._base.what}: {', '.join(self._tasks) or 'no tasks'})"

    def add(self, name: str, file: str | Path | Artifact) -> None:
        """Add a task. The network does not change.

        Args:
            name: what to call it.
            file: a popup artifact, which is treated as hostile.

        Raises:
            ArtifactError: the file is damaged, or its masks are for another base or network; the message names what
                differs. The bank is as it was.
            ConversionError: the name is taken, or none.
        """
        if not isinstance(name, str) or not name:
            raise ConversionError(f"the name of a task is {name!r}; expected a string that is not empty")
        if name in self._tasks:
            raise ConversionError(f"the bank has a task {name!r} already; choose another name, or remove it first")
        self._tasks[name] = read_task(self._base, file, self._tasks.values())

    def remove(self, name: str) -> None:
        """Remove a task.

        Raises:
            UnknownName: there is no such task.
            PopupError: it is in use.
        """
        with self._turns():
            self._task(name)
            if name == self._in_use:
                raise PopupError(f"{name!r} is in use; use another task before, or use(None)")
            del self._tasks[name]

    def manifest(self, name: str) -> Manifest:
        """Return what the file of a task says about its network, provenance included.

        Raises:
            UnknownName: there is no such task.
        """
        return self._task(name).manifest

    def use(self, name: str | None) -> nn.Module:
        """Write a task's weights into the network, in place, and return it, in eval mode.

        Threads that share a bank call `using`, because the next call of `use` changes the network under them.

        Args:
            name: the task; None for the base's own weights.

        Raises:
            UnknownName: there is no such task.
            PopupError: this thread is in a `using` block; or something has replaced or cast a tensor of the network.
                The network is as it was.
        """
        with self._turns():
            self._switch(name)
        return self.network

    @contextmanager
    def using(self, name: str | None) -> Iterator[nn.Module]:
        """Context manager: the network has a task's weights, and afterwards those that it had before.

        Other threads that call `using`, `use`, `predict` or `infer` wait until the block ends.

        Raises:
            UnknownName, PopupError: as for `use`. A thread that is in such a block already cannot enter a second.
        """
        with self._turns(), self._back():
            self._block = threading.get_ident(), str(name)
            try:
                self._switch(name)
                yield self.network
            finally:
                self._block = None

    def predict(self, images: Tensor, tasks: str | Sequence[str]) -> Tensor | list[Tensor]:
        """Return the network's outputs for a mixed batch, each image under its own task.

        Images of one task are one batch. The network afterwards has the weights that it had before.

        Args:
            images: as the network takes them, the batch first.
            tasks: one name for each image, or one for all.

        Returns:
            The outputs in the order of `images`, without gradients: one tensor if all have one shape, otherwise a list
            of one for each image.

        Raises:
            UnknownName: there is no such task.
            ConversionError: there are not as many names as images, or the network returns something else than a tensor.
        """
        if not isinstance(images, Tensor):
            raise ConversionError(f"images is a {type(images).__name__}; expected one tensor, the batch first")
        names = [tasks] * len(images) if isinstance(tasks, str) else list(tasks)
        if len(names) != len(images):
            raise ConversionError(f"there are {len(names)} tasks for {len(images)} images; expected one for each")
        for name in dict.fromkeys(names):
            self._task(name)
        outputs: list[Tensor] = [torch.empty(0)] * len(names)
        with self._turns(), self._back(), torch.no_grad():
            for name in dict.fromkeys(names):
                self._switch(name)
                places = [i for i, other in enumerate(names) if other == name]
                output = self.network(images[torch.tensor(places, device=images.device)])
                if not isinstance(output, Tensor) or len(output) != len(places):
                    raise ConversionError(
                        f"the network returned {_shown(output)} for {len(places)} images; expected a tensor with a row "
                        "for each"
                    )
                for place, row in zip(places, output, strict=True):
                    outputs[place] = row
        return torch.stack(outputs) if len({row.shape for row in outputs}) == 1 else outputs

    def infer(self, images: Tensor, *, how: str | None = None) -> Inference:
        """Find out which task a batch of images belongs to, from the network's certainty alone.

        SupSup (Wortsman et al., NeurIPS 2020, section 3.3): all masks are averaged, heads and norms too, and the
        gradient of the outputs' entropy says which mask's share should grow. Batch norms take their statistics from the
        images meanwhile. The network afterwards has the weights that it had before. Call it for each image alone if a
        batch has images of several tasks.

        Args:
            images: as the network takes them, the batch first, all of one task.
            how: `one_step` takes the task whose share lowers the entropy most. `halving` drops half of the tasks at a
                time. `each` runs every task, and takes the one whose entropy is lowest, relative to the logarithm of
                its number of classes. Default: `halving`, or `each` where heads have several shapes, or for fewer than
                32 images if the network has batch norms.

        Raises:
            ConversionError: there is no task; there is no such `how`; the tasks cannot be averaged; the network returns
                something else than a row of scores for each image.
        """
        with self._turns(), self._back():
            if not self._tasks:
                raise ConversionError("the bank has no task; add one before")
            base = self._base
            tasks = Mixing(base.network, base.core, base.places, self.names, self._switch, self._state)
            return tasks.infer(images, how)

    def memory(self) -> Memory:
        """Return what the bank holds in memory."""
        heads = {id(task.heads): task.heads for task in self._tasks.values()}.values()
        modules = [self._base.core, *(layer for each in heads for layer in each.layers.values())]
        tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
        sources = self._base.sources
        rest = {id(part): part for name, part in self._base.parts.items() if name not in sources}
        sizes = {name: task.nbytes for name, task in self._tasks.items()}
        return Memory(
            network=sum(tensor.nbytes for tensor in tensors.values()),
            base=sum(source.nbytes for source in sources.values()) + sum(part.nbytes for part in rest.values()),
            masks={name: masks for name, (masks, _) in sizes.items()},
            own={name: own for name, (_, own) in sizes.items()},
        )

    def _task(self, name: str | None) -> Task:
        if name not in self._tasks:
            if not self._tasks:
                raise unknown("task", name, ["(the bank has none)"])
            raise unknown("task", name, self._tasks)
        return self._tasks[name]

    @contextmanager
    def _turns(self) -> Iterator[None]:
        """Context manager: no other thread switches the network."""
        if self._block is not None and self._block[0] == threading.get_ident():
            raise PopupError(
                f"this thread is in a block of using({self._block[1]!r}), whose weights another task would replace; "
                "leave that block first"
            )
        with self._turn:
            yield

    @contextmanager
    def _back(self) -> Iterator[None]:
        """Context manager: the network has the same task in use afterwards as before."""
        before = self._in_use
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, name: str | None) -> None:
        """Write a task into the network. Whatever can fail comes first; if writing is interrupted, it is undone."""
        after = self._state(name)
        try:
            self._write(*after)
            self._in_use = name
        except BaseException:
            self._write(*self._state(self._in_use))
            raise
        if any(module.training for module in self._base.core.modules()):
            self.network.eval()

    def _state(self, name: str | None) -> tuple[Heads, dict[str, tuple[Part, Tensor]]]:
        """Return the heads of a task, and what is to be written where, by `state_dict` key.

        Raises:
            ArtifactError: a mask that is decoded only now is damaged.
            PopupError: a tensor of the network is not what it was when the bank was made.
        """
        task = None if name is None else self._task(name)
        heads, parts = (Heads(), self._base.parts) if task is None else (task.heads, task.parts())
        sizes, found = dict(heads.sizes), {}
        for which, layer in heads.layers.items():  # the network may have moved to another device since
            layer.to(next(self._base.layers[which].parameters()).device)
        for key, place in self._base.places.items():
            tensor = place.tensor(heads.layers.get(place.layer))
            shape, dtype = self._base.shapes[key]
            shape = sizes.get(key, shape)
            if tensor is None or tensor.shape != shape or tensor.dtype != dtype or tensor.is_meta:
                now = "gone" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
                raise PopupError(f"{key!r} of the bank's network is {now}; expected {dtype} {shape}, as it was")
            found[key] = parts[key], tensor
        return heads, found

    def _write(self, heads: Heads, found: Mapping[str, tuple[Part, Tensor]]) -> None:
        base, self._swapped = self._base, self._swapped | set(heads.layers)
        for layer in self._swapped:
            put(base.core, layer, heads.layers.get(layer, base.layers[layer]))
        if self._swapped and base.classes is not None:
            setattr(base.core, "num_classes", base.classes if heads.outputs is None else heads.outputs)  # noqa: B010
        with torch.no_grad():
            write_all((part, tensor.detach()) for part, tensor in found.values())


def _shown(output: object) -> str:
    return f"a tensor of {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"

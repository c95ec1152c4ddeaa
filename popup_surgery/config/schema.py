"""Recipes: typed YAML. Every unknown key and bad value is an error, and all errors are reported at once."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    PlainValidator,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ..codecs import get_codec
from ..errors import RecipeError
from ..learners import get_learner
from ..masking.k_schedule import KSchedule
from ..masking.recycle import Recycle
from ..masking.redraw import Redraw
from ..masking.settings import (
    ALONE,
    DEFAULT,
    WITHOUT_K,
    is_rule,
    share_of,
    with_learner,
    with_share,
    without_k,
)
from ..plugins import load_plugins
from ..weights import is_pretrained
from .catalog import find, is_sweep
from .checks import (
    SHARES,
    beside_learner,
    fixed_shares,
    floors,
    known,
    look_up_optimizer,
    neighbours,
    options,
    ramp,
    rewrites,
    schemes,
    shares,
    start_beside,
    without_graph,
)
from .data import Data
from .expected import shown
from .keys import Key
from .mistakes import Missing, validated
from .model import Model
from .overrides import override
from .penalty import Penalty
from .schedule import rates
from .sections import STRICT, Fraction, Hub, LotteryTicket, Positive, hub_section
from .yaml import read_yaml


class _Section(BaseModel):
    model_config = STRICT


class Surgery(_Section):
    """The arguments of `convert`. A recipe must set `scaled`, and `k` if the learner takes one.

    With `scheme: pretrained`, and neither `learner` nor `k`, the learner is `piggyback`.

    Attributes:
        k_schedule: k by epoch, such as `{kind: cubic, start: 1.0, begin: 0, epochs: 10}`. `kind` is `linear`, `cubic`,
            `steps` or `constant`. The share kept is `start` up to epoch `begin`, counted from 0, and `k` from epoch
            `begin + epochs` on, which must be before the last one ends. `steps` also has `every`, the epochs between
            two steps. `scaled` takes `k` from the start. Null for the same k in all epochs. See
            [methods](../methods.md).
        redraw: `{every: 300, share: 0.1}` draws weights that do not take part again: after every 300th step of the
            optimiser, each with the probability 0.1. Null for never. See [methods](../methods.md).
        recycle: `{every: 300, share: 0.1}` copies weights: after every 300th step of the optimiser, those with the
            highest scores of each layer onto those with the lowest, a tenth of it. Null for never. See
            [methods](../methods.md#recycling-weights).
        pattern: as `2:4`, which keeps 2 of each 4 neighbours along the input channels of a layer, by |score|, and sets
            k. Null ranks whole layers.
        fixed: as `{dropped: 0.5, kept: 0.1}`, shares of each layer's weights that the seed fixes before training. One
            of them may be left out. The scores choose among the others, and the file has bits for these alone. `k` is
            still the share of all weights. Null fixes none. See [methods](../methods.md#frozen-parts).
        encoding: how the run's file stores masks: `bitpack`, one bit a weight, or `range_coded`, as few bits as their
            share of ones allows, or `pattern_coded`, as few as the pattern allows. The last two also code planes such
            as coats. The network is the same.
    """

    learner: Annotated[str, known(get_learner)] = DEFAULT.learner.value
    learner_options: Annotated[dict[str, Any], AfterValidator(options)] = DEFAULT.learner_options.value
    k: Annotated[
        float | dict[str, Any] | None,
        PlainValidator(shares),
        Field(validate_default=True),
        Key(affects_speed=False),
    ] = None
    scheme: Annotated[str | dict[str, str], AfterValidator(schemes), Key(affects_speed=False)] = DEFAULT.scheme.value
    scaled: Annotated[bool, Key(affects_speed=False)]
    seed: Annotated[int, Field(ge=0, lt=2**64), Key(affects_speed=False)] = DEFAULT.seed.value
    scope: Literal["layer", "global"] = DEFAULT.scope.value
    pattern: Annotated[str | None, BeforeValidator(neighbours)] = DEFAULT.pattern.value
    floor: Annotated[float | None, PlainValidator(floors)] = DEFAULT.floor.value
    fixed: Annotated[
        dict[str, float] | None,
        PlainValidator(fixed_shares),
        Field(examples=[{"dropped": 0.5, "kept": 0.1}]),
    ] = DEFAULT.fixed.value
    include: str | list[str] | None = DEFAULT.include.value
    exclude: str | list[str] | None = DEFAULT.exclude.value
    others: Literal["frozen", "train"] = DEFAULT.others.value
    norm: Literal["frozen", "train"] = DEFAULT.norm.value
    train: str | list[str] | None = DEFAULT.train.value
    k_schedule: Annotated[
        dict[str, Any] | None,
        PlainValidator(ramp),
        Field(examples=[{"kind": "cubic", "epochs": 10}]),
        Key(affects_speed=False),
    ] = None
    redraw: Annotated[
        dict[str, Any] | None, PlainValidator(rewrites(Redraw)), Field(examples=[{"every": 300, "share": 0.1}])
    ] = None
    recycle: Annotated[
        dict[str, Any] | None, PlainValidator(rewrites(Recycle)), Field(examples=[{"every": 300, "share": 0.1}])
    ] = None
    encoding: Annotated[str, known(get_codec), Key(affects_result=False, affects_speed=False)] = "bitpack"

    @model_validator(mode="wrap")
    @classmethod
    def _of_pretrained(cls, values: Any, validate: ModelWrapValidatorHandler["Surgery"]) -> "Surgery":
        """Set the learner that the scheme brings, and the k that the pattern does.

        They do not count as set, since another k or pattern would change them.
        """
        if not isinstance(values, dict) or (completed := with_share(with_learner(values))) == values:
            return validate(values)
        surgery = validate(completed)
        surgery.model_fields_set.difference_update(name for name in completed if completed[name] != values.get(name))
        return surgery

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `convert`."""
        return self.model_dump(exclude={"encoding", "k_schedule", "redraw", "recycle"})

    @field_validator("pattern")
    @classmethod
    def _beside_the_pattern(cls, value: str | None, info: ValidationInfo) -> str | None:
        """Check that no other key contradicts the pattern."""
        if value is None or info.data.get("learner") is None:
            return value
        k, scope, share = info.data.get("k"), info.data.get("scope"), share_of(value)
        wrong = [] if k in (None, share) else [f"k is {shown(k)}, and the pattern sets {share:g}: leave k out"]
        wrong += [] if scope in (None, "layer") else [f"scope is {scope}, and {ALONE}"]
        if wrong:
            raise ValueError("; ".join(wrong))
        return value

    @field_validator("k", "scaled", "scope", "pattern", "floor", "fixed", "k_schedule")
    @classmethod
    def _for_the_learner(cls, value: Any, info: ValidationInfo) -> Any:
        """Check a key against whether the learner takes a k."""
        learner, name = info.data.get("learner"), str(info.field_name)
        if learner is None:
            return value
        chosen = get_learner(learner, info.data.get("learner_options"))  # an option may decide whether it takes a k
        if not chosen.takes_k and value != WITHOUT_K.get(name):
            raise ValueError(f"expected {json.dumps(WITHOUT_K.get(name))}; {without_k(learner)}")
        beside_learner(name, value, learner, info.data.get("learner_options", {}), chosen)
        if name == "k_schedule" and value is not None and info.data.get("pattern", "a wrong one") is not None:
            raise ValueError("expected null; a pattern keeps as many in all epochs")
        if name == "k_schedule" and value is not None and (shares := info.data.get("fixed")) is not None:
            start_beside(shares, value)
        if name == "k_schedule" and value is not None and chosen.schedules_k:
            raise ValueError(f"expected null; {learner} comes to k by rounds of its own")
        if name == "k" and value is None and chosen.takes_k and "learner_options" in info.data:
            raise Missing(SHARES)
        if value == "global" and isinstance(k := info.data.get("k"), dict) and (is_rule(k) or len({*k.values()}) > 1):
            raise ValueError(f"expected layer, because k is {shown(k)}; all layers ranked together take one number")
        return value

    @field_validator("encoding")
    @classmethod
    def _for_masks(cls, value: str, info: ValidationInfo) -> str:
        """Check that the run's file has masks, if the key says how they are stored."""
        learner = info.data.get("learner")
        if value != "bitpack" and learner is not None and get_learner(learner).learns_weights:
            raise ValueError(f"expected bitpack; {learner} trains the weights, so that the run's file has no masks")
        if get_codec(value).needs_pattern and info.data.get("pattern", value) is None:
            raise ValueError(f"expected bitpack or range_coded, or a pattern such as 2:4, which {value} needs")
        return value


class Training(_Section):
    """Optimiser, schedule and length.

    Attributes:
        epochs: passes over the training images.
        lr: the learning rate after warm-up, before the schedule lowers it.
        momentum, nesterov: for optimisers that have them.
        weight_decay: weight decay of what is trained: the scores, or a dense network's weights.
        warmup_epochs: number of epochs at the start in which the rate rises to `lr`.
        label_smoothing: the share of each label that is spread over all classes.
        optimizer, optimizer_kwargs: the name of one of timm's optimisers, and its further arguments. Optimisers that
            have `momentum` and `nesterov` get these too.
        schedule, schedule_kwargs: `constant`, or the name of one of timm's schedules, with further arguments of
            `create_scheduler_v2`. It covers the epochs after `warmup_epochs`.
        schedule_per: the rate changes once per `epoch`, as in the paper, or at each `step`.
        mixup, cutmix, mixup_prob, mixup_switch_prob, mixup_mode: arguments of timm's `Mixup`. An alpha of 0 turns mixup
            or CutMix off. Images are mixed with others from the same process's piece of the batch.
        accumulate: number of pieces into which each process cuts its part of a batch, to save memory.
            `data.batch_size` is the size of the whole batch, over all processes and pieces.
        clip_norm: largest norm of all gradients together; null for no limit.
        density_penalty: a section with `weight` and `target` (0), for learners without k: the loss of each batch gains
            `weight` · max(0, density − `target`), where the density is the share of masked weights that take part.
        checkpoint_minutes: minutes between checkpoints within an epoch; 0 for none. Another checkpoint is written after
            each epoch.
        preset: `fast` sets `precision: bfloat16`, `channels_last: true` and `graph: auto`, unless they are set.
        precision: dtype of the forward pass; `tf32` is float32 whose products a GPU computes with 10 bits of mantissa.
            Scores and their ranking are always float32.
        compile: use `torch.compile`: true, or the name of one of its modes.
        graph: run each step as one CUDA graph, so that a GPU does not wait for the host: `auto` where that is possible,
            true to insist on it. The images have to be in the GPU's memory.
        channels_last: keep images and the weights of convolutions in channels-last memory format.
        sync_batchnorm: compute batch statistics over all processes, on GPUs.
        deterministic: use only algorithms that give the same result each time. On the CPU, all do.
        keep_scores: leave the scores at the end in `<recipe>.scores.safetensors`: float32, under the names that they
            have in the `state_dict` of the converted network.
        log_every: number of steps after which the loss and the rate are written to metrics.jsonl and to the trackers;
            null for epochs alone.
        threads: number of threads of each process for work on the CPU. Results on CPUs depend on it in the last digits,
            so a run resumes with the number that it began with. `OMP_NUM_THREADS` does not count. One is the fastest
            for small networks; large ones need more.
        trackers: names of Accelerate's trackers: `tensorboard`, `wandb`, `mlflow`, `trackio`.
        seed: seed of the order of images, of augmentation and dropout, and of a dense network's weights.
    """

    epochs: Annotated[int, Field(ge=1), Key(affects_speed=False)]
    optimizer: Annotated[str, known(look_up_optimizer)] = "sgd"
    optimizer_kwargs: dict[str, Any] = {}
    lr: Annotated[Positive, Key(affects_speed=False)]
    momentum: Annotated[float, Field(ge=0, lt=1), Key(affects_speed=False)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False), Key(affects_speed=False)] = 0.0
    schedule: Annotated[
        Literal["cosine", "constant", "step", "multistep", "poly", "tanh"], Key(affects_speed=False)
    ] = "cosine"
    schedule_kwargs: dict[str, Any] = {}
    schedule_per: Literal["epoch", "step"] = "epoch"
    warmup_epochs: Annotated[int, Field(ge=0), Key(affects_speed=False)] = 0
    label_smoothing: Annotated[float, Field(ge=0, lt=1), Key(affects_speed=False)] = 0.0
    mixup: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    cutmix: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    mixup_prob: Fraction = 1.0
    mixup_switch_prob: Fraction = 0.5
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    accumulate: Annotated[int, Field(ge=1, le=1024)] = 1
    clip_norm: Positive | None = None
    density_penalty: Annotated[Penalty, Field(examples=[{"weight": 1.0, "target": 0.3}])] = None
    checkpoint_minutes: Annotated[float, Field(ge=0, allow_inf_nan=False), Key(affects_result=False)] = 10.0
    preset: Annotated[Literal["fast"] | None, Key(affects_result=False, affects_speed=False)] = None
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"
    compile: bool | Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = False
    graph: bool | Literal["auto"] = False
    channels_last: bool = False
    sync_batchnorm: bool = False
    deterministic: bool = False
    keep_scores: Annotated[bool, Key(affects_result=False, affects_speed=False)] = False
    log_every: Annotated[Annotated[int, Field(ge=1)] | None, Key(affects_result=False)] = None
    threads: Annotated[int, Field(ge=1, le=4096), Key(affects_result=False)] = 1
    trackers: Annotated[list[Literal["tensorboard", "wandb", "mlflow", "trackio"]], Key(affects_result=False)] = []
    seed: Annotated[int, Field(ge=0, lt=2**63), Key(affects_speed=False)] = 0

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        """Add the values of the preset for keys that are not set."""
        if isinstance(values, Mapping) and values.get("preset") == "fast":
            return {"precision": "bfloat16", "channels_last": True, "graph": "auto", **values}
        return values

    @model_validator(mode="after")
    def _graph(self) -> "Training":
        if self.graph is True and (why := [*without_graph(self)]):
            raise ValueError(f"training.graph is true; expected auto or false, because {' and '.join(why)}")
        return self

    @model_validator(mode="after")
    def _arguments(self) -> "Training":
        try:
            rates(self)(0.0, 1.0)
        except Exception as error:
            given = shown(self.schedule_kwargs)
            raise ValueError(
                f"training.schedule_kwargs is {given}; timm's {self.schedule} schedule does not take it: {error}"
            ) from None
        return self


class Recipe(_Section):
    """Everything that decides a run: network, surgery (`none` trains the network densely), data and training.

    Attributes:
        plugins: Python files, relative to the recipe file, and modules to import first, in every process of the run,
            because they register learners and the like. Only a recipe file that is named to `load` is followed.
    """

    plugins: Annotated[list[str], Key(affects_result=False, affects_speed=False)] = []
    model: Model
    surgery: Surgery | Literal["none"]
    lottery_ticket: LotteryTicket | None = None
    data: Data = Data()
    training: Training
    hub: Annotated[Hub | None, BeforeValidator(hub_section), Key(affects_result=False, affects_speed=False)] = None

    @model_validator(mode="after")
    def _weights(self) -> "Recipe":
        """Check that pretrained weights and the scheme that keeps them come together."""
        if self.surgery != "none":
            scheme = self.surgery.scheme
            wanted = is_pretrained(scheme)
            if wanted and get_learner(self.surgery.learner, self.surgery.learner_options).binary:
                raise ValueError(
                    "surgery.scheme is pretrained; expected a random one, such as kaiming_normal: no file could hold "
                    f"the signs that {self.surgery.learner} takes of pretrained weights"
                )
            if wanted and not self.model.pretrained:
                raise ValueError(
                    "surgery.scheme pretrained needs pretrained weights; set model.pretrained to true, to a tag, or to "
                    "a file of weights"
                )
            if self.model.pretrained and not wanted:
                raise ValueError(
                    f"surgery.scheme {scheme} would overwrite the weights of model.pretrained; set surgery.scheme to "
                    "pretrained to keep them"
                )
        return self

    @model_validator(mode="after")
    def _ramp(self) -> "Recipe":
        """Check that k reaches its final value before the last epoch, which is the run's result."""
        given = None if self.surgery == "none" else self.surgery.k_schedule
        if given is not None and (end := KSchedule(**given).end) >= self.training.epochs:
            raise ValueError(
                f"surgery.k_schedule reaches k in epoch {end}, counted from 0; expected at most "
                f"{self.training.epochs - 1}, the last of training.epochs {self.training.epochs}, which is the result"
            )
        return self

    @model_validator(mode="after")
    def _scores(self) -> "Recipe":
        if self.training.keep_scores and self.surgery == "none":
            raise ValueError("training.keep_scores is true; with surgery: none there are no scores to keep")
        return self

    @model_validator(mode="after")
    def _artifact(self) -> "Recipe":
        if self.hub is not None and (self.surgery == "none" or get_learner(self.surgery.learner).learns_weights):
            raise ValueError("hub is there, and the run ends with dense weights; only artifacts are pushed: remove hub")
        return self

    @model_validator(mode="after")
    def _ticket(self) -> "Recipe":
        """Check that a lottery ticket's network is dense, and that it rewinds to an epoch of its training."""
        if (ticket := self.lottery_ticket) is not None:
            if self.surgery != "none" or self.model.init_from is not None:
                raise ValueError(
                    "lottery_ticket trains a dense network; set surgery to none, and remove model.init_from"
                )
            if ticket.rewind_epoch >= self.training.epochs:
                raise ValueError(
                    f"lottery_ticket.rewind_epoch is {ticket.rewind_epoch}; expected less than training.epochs, "
                    f"{self.training.epochs}"
                )
        return self

    @property
    def epochs(self) -> int:
        """Number of epochs of the whole run."""
        epochs = self.training.epochs
        return epochs if self.lottery_ticket is None else self.lottery_ticket.epochs(epochs)

    @classmethod
    def parse(cls, values: Any, name: str = "recipe") -> "Recipe":
        """Build a recipe from plain values. A `RecipeError` lists all mistakes."""
        return validated(cls, values, name)

    @classmethod
    def load(cls, name: str | Path, overrides: Iterable[str] = ()) -> "Recipe":
        """Load a recipe.

        Args:
            name: the name of a shipped recipe, or a YAML file.
            overrides: `key=value` settings such as `training.epochs=3`.

        Raises:
            UnknownName: there is no such recipe.
            RecipeError: the file is not YAML, or has mistakes; all of them are listed.
        """
        file = find(name)
        values = read_yaml(file)
        if is_sweep(values):
            raise RecipeError(f"{name} is a sweep; run it with popup-surgery sweep {name}")
        return cls.parse(with_plugins(override(values, overrides), file.parent), str(name))

    def dump(self) -> dict[str, Any]:
        """Return the plain values of all keys."""
        return self.model_dump()


def with_plugins(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Import the `plugins` of a recipe file that the user named, and return its values with absolute paths."""
    plugins = values.get("plugins")
    if not isinstance(plugins, list) or not all(isinstance(plugin, str) for plugin in plugins):
        return values  # what is wrong with it, `Recipe.parse` says
    return {**values, "plugins": load_plugins(plugins, folder)}


def parse_data(section: dict[str, Any], overrides: Iterable[str], name: str) -> Data:
    """Build a data section from plain values, with `data.key=value` overrides. A `RecipeError` lists all mistakes."""
    overrides = list(overrides)
    if other := [setting for setting in overrides if not setting.startswith("data.")]:
        raise RecipeError(f"--set {other[0]!r} is not a key of the data section; expected data.key=value")
    return validated(_DataOnly, override({"data": section}, overrides), name).data


class _DataOnly(_Section):
    data: Data

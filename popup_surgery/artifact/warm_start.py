"""Start a converted network with the mask of an existing file."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from ..codecs.bitpack import unpack_mask
from ..errors import ArtifactError
from ..learners import Learner
from ..masking.bake import bake, rebuilt
from ..masking.ranking import parameter_of, score_of
from ..masking.redraw import generations_of_signs
from ..masking.rewrites import set_origins
from ..masking.state import ORIGINS, MaskedParam
from ..masking.walk import masked_weights, unwrap
from ..weights.fill import fill, pieces_of
from ..weights.source import source_of
from .file import Artifact
from .manifest import TensorSpec
from .planes import ORIGIN_KINDS, Bits
from .reader import naming
from .restore import fill_network


def start_from(model: nn.Module, path: str | Path | Artifact, *, base: nn.Module | str | Path | None = None) -> None:
    """Start a converted network with the subnetwork of a popup artifact: its mask, running statistics and the like.

    Weights that were drawn again or copied have their latest values, as far as the file has them: those that take
    part. The scores keep the values that were drawn but change places, so that kept weights rank above all others.

    Args:
        model: a network converted with the file's seed and scheme and, if scaled, its k.
        path: the file, or an open `Artifact`.
        base: for a mask on pretrained weights, as for `load`. Default: the model's own weights.

    Raises:
        ArtifactError: the file is damaged, or its weights are not those of `model`. `model` is unchanged then.
    """
    core, artifact = unwrap(model), Artifact.open(path)
    with naming(artifact.path):
        weights = {key: (module, name, slot) for key, module, name, slot in masked_weights(core)}
        plain = bake(core)
        entries = plain.state_dict()
        for key, (module, name, _) in weights.items():
            entries[key].copy_(cast(Tensor, module._parameters[name]).detach())
        fill_network(artifact.contents, plain, base)
        masks = artifact.masks()
        _check_masks(masks, {key: slot for key, (_, _, slot) in weights.items()})
        flipped: dict[str, Tensor] = {}
        redrawn: dict[str, tuple[MaskedParam, Tensor]] = {}  # what the slots and the raw weights become
        bits, nested = artifact.contents.decode(), dict[str, list[Tensor]]()
        for entry in artifact.manifest.masked:
            module, name, slot = weights[entry.name]
            mask, raw = masks[entry.name].to(entries[entry.name].device), parameter_of(module, name)
            learner, theirs = slot.ranking.learner, entries[entry.name]
            of_draws = [kind for kind in entry.planes if kind in ORIGIN_KINDS or _is_drawn(kind, entry, learner)]
            if (slot.origins or of_draws) and slot.distribution == entry.distribution:
                slot, raw = redrawn[entry.name] = _redrawn(slot, raw, bits[entry.name], theirs if of_draws else None)
            mine = rebuilt(raw, slot, mask)
            planes = [kind for kind in entry.planes if kind not in of_draws]
            if other := [kind for kind in planes if kind not in learner.planes]:
                raise ArtifactError(
                    f"{entry.name!r} has the plane {other[0]!r}, with which the network's learner cannot start; "
                    "convert the network with the learner of the file, and its options"
                )
            if "sign" in learner.planes:  # which the scores get below
                flipped[entry.name] = mine.signbit() != theirs.signbit()
                mine = mine.copysign(theirs)
            elif planes:
                values = (piece.float().numpy() for piece in pieces_of(mine))
                mine = fill(torch.empty_like(mine), bits[entry.name].effective(values))
                nested[entry.name] = [_mask(bits[entry.name], kind, entry) for kind in planes]
            if not torch.equal(mine, theirs):
                raise ArtifactError(
                    f"the weights of {entry.name!r} differ: the file's are "
                    f"{_origin(entry.distribution, entry.std, artifact.manifest.seed)}, the network's are "
                    f"{_origin(slot.distribution, slot.std, slot.seed)}; convert the network with the file's settings"
                )
    with torch.no_grad():
        for key, tensor in core.state_dict().items():
            if key in entries and key not in weights:
                tensor.copy_(entries[key])
        for key, (slot, raw) in redrawn.items():
            set_origins(core, parameter_of(*weights[key][:2]), raw, slot)
        _move_scores(weights, masks, nested, flipped)


Weights = dict[str, tuple[nn.Module, str, MaskedParam]]


def _move_scores(
    weights: Weights,
    masks: dict[str, Tensor],
    nested: dict[str, list[Tensor]],
    flipped: dict[str, Tensor],
) -> None:
    """Rank the weights in `masks` above all others, those in each of the `nested` masks above those outside.

    Of learnt signs, those that are `flipped` are negative.
    """
    rankings = {id(slot.ranking): slot.ranking for _, _, slot in weights.values()}
    by_score = {id(score_of(module, name)): (key, module, name) for key, (module, name, _) in weights.items()}
    for ranking in rankings.values():
        scores = ranking.scores()
        members = [by_score[id(score)] for score in scores]
        chosen = [masks[key].to(score.device) for score, (key, _, _) in zip(scores, members, strict=True)]
        first = [parameter_of(module, name).float() for _, module, name in members]
        given = first if ranking.learner.ranks_weights else scores
        found = ranking.learner.seed_from_mask(given, chosen)
        for inner in zip(*(nested.get(key, []) for key, _, _ in members), strict=True):  # coats, from the outside in
            found = ranking.learner.seed_from_mask(found, [mask.to(found[0].device) for mask in inner])
        for score, (key, _, _), mask, moved in zip(scores, members, chosen, found, strict=True):
            if key in flipped:
                factor = torch.where(flipped[key].to(score.device), -1.0, 1.0)
                moved = torch.where(mask, moved.copysign(factor), moved)
            score.copy_(moved)


def _is_drawn(kind: str, entry: TensorSpec, learner: Learner) -> bool:
    """Return whether a plane of constants has signs that the network's learner does not learn, but draws can give."""
    return kind == "sign" and kind not in learner.planes and entry.distribution == "signed_constant"


def _redrawn(slot: MaskedParam, raw: Tensor, bits: Bits, values: Tensor | None) -> tuple[MaskedParam, Tensor]:
    """Return a masked weight's slot and raw values, drawn again and copied as a file says.

    Args:
        values: what its weights are in the file, where it has a plane; None if no weight has another value.
    """
    first = replace(slot, generations=None, sources=None)
    if values is None:
        return first, fill(torch.empty_like(raw), first.values(raw))
    slot = replace(first)
    for what, pieces in ("generations", bits.generations(raw.numel())), ("sources", bits.sources(raw.numel())):
        if pieces is not None:
            setattr(slot, what, torch.from_numpy(np.concatenate([*pieces])).to(ORIGINS[what]).view(raw.shape))
    if not slot.origins:
        slot.generations = generations_of_signs(first, values.cpu())
    return slot, fill(torch.empty_like(raw), slot.values(raw))


def _check_masks(masks: Mapping[str, Tensor], weights: Mapping[str, MaskedParam]) -> None:
    """Check that the masks are for the network's masked weights, and keep and drop those that it has fixed."""
    if masks.keys() != weights.keys():
        odd = min(masks.keys() ^ weights.keys())
        here, there = ("file", "network") if odd in masks else ("network", "file")
        raise ArtifactError(f"{odd!r} is masked in the {here} but not in the {there}; convert the same layers")
    for key, slot in weights.items():
        if (fixed := slot.ranking.fixed) is not None and not fixed.obeyed_by(slot.index, masks[key]):
            raise ArtifactError(
                f"the mask of {key!r} keeps weights that the network has fixed as dropped, or drops some that it has "
                "fixed as kept; convert the network with the file's seed and fixed"
            )


def _mask(bits: Bits, kind: str, entry: TensorSpec) -> Tensor:
    return torch.from_numpy(unpack_mask(bits.spread(kind, entry.numel), entry.shape))


def _origin(distribution: str, std: float, seed: int) -> str:
    source = source_of(distribution)
    return f"{distribution} with std {std:g} and seed {seed}" if source.drawn else source.describe(std)

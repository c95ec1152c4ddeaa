"""Ranking among free weights: exact with ties and NaNs, on both backends, with floors, and in graphs."""

import gc
import pickle
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from popup_surgery.selection import gpu, select, select_op
from popup_surgery.selection.fixed import FixedTensor, FreeWeights
from popup_surgery.weights.fixed import DROPPED, FREE, KEPT, Fixed


def fates(member: FixedTensor) -> Tensor:
    found = Fixed(member.dropped, member.kept).fates(member.numel, member.seed, member.stream)
    return torch.cat([torch.from_numpy(piece) for piece in found])


def chosen(scores: Sequence[Tensor], kept: int, free: FreeWeights, floors: Sequence[int] = ()) -> list[Tensor]:
    """The right masks, by stable sorts: the fixed weights, then each floor's, then the largest of all others."""
    flat = torch.cat([score.reshape(-1) for score in scores]).abs()
    fate = torch.cat([fates(member) for member in free.members])
    of = torch.cat([torch.full((member.numel,), i) for i, member in enumerate(free.members)])
    order = flat.nan_to_num(torch.inf).argsort(descending=True, stable=True)  # the tests' NaNs are alone above the rest
    mask, ranked = fate == KEPT, [int(i) for i in order if fate[i] == FREE]
    for i, floor in enumerate(floors):
        mine = [place for place in ranked if of[place] == i]
        mask[mine[: floor - free.members[i].kept]] = True
    rest = [place for place in ranked if not mask[place]]
    mask[rest[: kept - int(mask.sum())]] = True
    parts = mask.split([member.numel for member in free.members])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]


def members(*sizes: int, dropped: float = 0.5, kept: float = 0.125) -> FreeWeights:
    return FreeWeights.of(
        [FixedTensor(int(dropped * n), int(kept * n), n, 3, f"{i}.weight") for i, n in enumerate(sizes)]
    )


SCORES: dict[str, Callable[[int], Tensor]] = {
    "random": lambda n: torch.randn(n, generator=torch.Generator().manual_seed(n)),
    "zeros": lambda n: torch.zeros(n),
    "few values": lambda n: torch.arange(n).float() % 3 - 1,
    "subnormal numbers and zeros": lambda n: (torch.arange(n) % 2).float() * 1e-45,
    "a NaN": lambda n: torch.arange(n).float().index_fill(0, torch.tensor([n - 1]), torch.nan),
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_largest_of_the_free_weights(name: str, on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if on_gpu:
        monkeypatch.setattr("popup_surgery.selection.backend_of", lambda _: gpu)
    scores, free = [SCORES[name](96).view(4, 3, 2, 4), SCORES[name](40)], members(96, 40)
    least, most = free.kept, 136 - free.dropped
    for kept in (least, least + 1, (least + most) // 2, most - 1, most):
        selection = select(scores, kept, None, free)
        for mask, right in zip(selection.masks, chosen(scores, kept, free), strict=True):
            assert torch.equal(mask, right)
        assert selection.holds(scores) == (not on_gpu)
        assert all(free.obeyed_by(i, mask) for i, mask in enumerate(selection.masks))
        assert all(map(torch.equal, select_op(scores, kept, None, free.text), selection.masks))
    for kept in (least - 1, most + 1):
        with pytest.raises(ValueError, match="kept is"):
            select(scores, kept, None, free)


@given(st.data(), st.integers(2, 40))
@settings(max_examples=30)
def test_floors_count_what_is_fixed(data: st.DataObject, n: int) -> None:
    free = members(n, 2 * n)
    scores = [torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.0]), min_size=m, max_size=m)))
              for m in (n, 2 * n)]  # fmt: skip
    floors = [data.draw(st.integers(member.kept, member.numel - member.dropped)) for member in free.members]
    kept = data.draw(st.integers(sum(floors), 3 * n - free.dropped))
    masks = select(scores, kept, floors, free).masks
    assert all(map(torch.equal, masks, chosen(scores, kept, free, floors)))


def test_a_change_of_free_scores_is_seen_and_one_of_fixed_scores_is_none() -> None:
    free, score = members(64), torch.randn(8, 8)
    fate, before = fates(free.members[0]).view(8, 8), select([score], 20, None, free)
    other = torch.where(fate == FREE, score, 100 * torch.randn(8, 8))
    assert before.holds([other])
    assert torch.equal(select([other], 20, None, free).masks[0], before.masks[0])
    turned = torch.where(fate == FREE, 1 / score, score)
    assert not before.holds([turned])
    assert not before.holds([turned], 0)
    assert not before.holds([score, score])
    assert not (before.masks[0] & (fate == DROPPED)).any()


def test_masks_have_the_strides_of_their_scores() -> None:
    free, score = members(96), torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    (mask,) = select([score], 30, None, free).masks
    assert mask.stride() == score.stride()
    assert torch.equal(mask, select([score.contiguous()], 30, None, free).masks[0])


def test_groups_of_the_same_tensors_share_what_they_know() -> None:
    free = members(12345)
    assert members(12345) is free
    assert pickle.loads(pickle.dumps(free)) is free
    assert members(12345, 1) is not free
    text = free.text
    del free
    gc.collect()
    assert FreeWeights.read(text)._places == {}, "nobody needs them any more"


def test_under_vmap_each_network_is_ranked_by_itself() -> None:
    free, stack = members(48), torch.randn(3, 6, 8)
    masks = torch.func.vmap(lambda score: select_op([score], 15, None, free.text)[0])(stack)
    assert all(torch.equal(mask, select([score], 15, None, free).masks[0])
               for mask, score in zip(masks, stack, strict=True))  # fmt: skip

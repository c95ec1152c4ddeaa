"""N of each M neighbours: against a sort of each group, whatever the values, strides and sizes."""

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from popup_surgery.selection import pattern as pattern_module
from popup_surgery.selection import select
from popup_surgery.selection.pattern import Pattern, parse_pattern, select_pattern, select_pattern_op

NAN, INF, TINY = math.nan, math.inf, 1.401298464324817e-45
AWKWARD = [0.0, -0.0, TINY, 1.0, -1.0, 1.0000001192092896, INF, -INF, NAN, -NAN, 3.4028234663852886e38]
VALUES = st.sampled_from(AWKWARD) | st.integers(-3, 3).map(float) | st.floats(width=32, allow_nan=False)


def reference(score: Tensor, pattern: Pattern) -> Tensor:
    """A stable sort of each group on (is no NaN, −|s|, index), in Python floats."""
    values = score.reshape(-1, pattern.channels, pattern.stride)
    mask = torch.zeros(values.shape, dtype=torch.bool)
    for row in range(len(values)):
        for place in range(pattern.stride):
            for start in range(0, pattern.channels, pattern.of):
                group = values[row, start : start + pattern.of, place].tolist()
                order = sorted(
                    range(len(group)), key=lambda i: (0, 0.0) if math.isnan(group[i]) else (1, -abs(group[i]))
                )
                for i in order[: math.ceil(len(group) * pattern.keep / pattern.of)]:
                    mask[row, start + i, place] = True
    return mask.view(score.shape)


@st.composite
def cases(draw: Any) -> tuple[Tensor, Pattern]:
    of = draw(st.integers(2, 16))
    pattern = Pattern(draw(st.integers(1, of - 1)), of, draw(st.integers(1, 20)), draw(st.integers(1, 4)))
    shape = draw(st.integers(1, 4)), pattern.channels, pattern.stride
    count = math.prod(shape)
    values = draw(st.lists(VALUES, min_size=count, max_size=count))
    return torch.tensor(values).view(shape), pattern


@given(case=cases())
@example((torch.zeros(2, 9, 1), Pattern(2, 4, 9, 1)))
@example((torch.tensor([NAN, -INF, INF, -NAN]).view(1, 4, 1), Pattern(2, 4, 4, 1)))
@settings(max_examples=200, deadline=None)
def test_each_group_keeps_what_a_sort_would(case: tuple[Tensor, Pattern]) -> None:
    score, pattern = case
    mask = select_pattern(score, pattern)
    assert torch.equal(mask, reference(score, pattern))
    assert int(mask.sum()) == pattern.kept(score.numel())


@given(case=cases())
@settings(max_examples=100, deadline=None)
def test_the_way_of_other_devices_gives_the_same(case: tuple[Tensor, Pattern]) -> None:
    """On a GPU no one may look at ties; its way, run on the CPU, is this one."""
    score, pattern = case
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    groups = pattern.in_groups(score.reshape(-1).view(torch.int32), pattern.channels)
    for (group, keep), (found, _) in zip(groups, pattern.in_groups(mask, pattern.channels), strict=True):
        pattern_module._ranked(group, keep, found)
    assert torch.equal(mask.view(score.shape), reference(score, pattern))


@pytest.mark.parametrize("piece", [1, 7, 64])
def test_pieces_do_not_change_the_choice(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape, stride in (((6, 11), 1), ((3, 10, 2, 2), 4), ((9, 5), 5)):
        pattern = Pattern(2, 4, shape[1] if stride != 5 else 9, stride)
        score = torch.randn(shape, generator=torch.Generator().manual_seed(piece))
        whole = select_pattern(score, pattern)
        found = torch.zeros(score.numel(), dtype=torch.bool)
        for part, channels in pattern.pieces(score.numel(), piece):
            cut = Pattern(2, 4, channels, stride)
            found[part] = select_pattern(score.reshape(-1)[part], cut)
        assert torch.equal(found.view(shape), whole)
        assert torch.equal(whole, reference(score, pattern))


def test_more_weights_than_one_piece_has() -> None:
    score = torch.randn(70, 2001, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    pattern = Pattern(2, 4, 2001, 1)
    assert score.numel() > pattern_module.PIECE
    order = score[:, :2000].abs().view(70, 500, 4).argsort(dim=-1, descending=True, stable=True)
    expected = torch.zeros(70, 500, 4, dtype=torch.bool).scatter_(2, order[..., :2], True).view(70, 2000)
    mask = select_pattern(score, pattern)
    assert torch.equal(mask[:, :2000], expected)
    assert mask[:, 2000].all(), "a remainder of one keeps it"


def test_strides_do_not_change_the_choice_and_are_those_of_the_mask() -> None:
    score, pattern = torch.randn(5, 8, 3, 3), Pattern(2, 4, 8, 9)
    for other in (score.contiguous(memory_format=torch.channels_last), score.permute(3, 1, 0, 2).permute(2, 1, 3, 0)):
        mask = select_pattern(other, pattern)
        assert torch.equal(mask, select_pattern(score, pattern))
        assert mask.stride() == other.stride()


def test_one_operator_that_maps_over_stacks() -> None:
    score, pattern = torch.randn(3, 4, 8), [2, 4, 8, 1]
    each = torch.stack([select_pattern_op(row, pattern) for row in score])
    assert torch.equal(torch.vmap(lambda row: select_pattern_op(row, pattern))(score), each)
    assert torch.equal(torch.vmap(lambda row: select_pattern_op(row, pattern), in_dims=1)(score.movedim(0, 1)), each)
    torch.library.opcheck(select_pattern_op, (score[0], pattern))


def test_two_of_four_is_what_the_layer_would_keep_where_the_groups_agree() -> None:
    score = torch.tensor([4.0, -3.0, 1.0, 2.0]).repeat(6, 5)
    assert torch.equal(select_pattern(score, Pattern(2, 4, 20, 1)), select([score], 60).masks[0])


def test_how_many_are_kept() -> None:
    assert [Pattern(2, 4, channels, 1).kept(channels) for channels in range(1, 10)] == [1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert [Pattern(1, 4, channels, 1).kept(channels) for channels in range(1, 10)] == [1, 1, 1, 1, 2, 2, 2, 2, 3]
    assert Pattern(2, 4, 3, 49).kept(64 * 3 * 49) == 64 * 2 * 49, "an RGB stem"
    assert Pattern(2, 4, 8, 9).bits(16 * 8 * 9) == pytest.approx(16 * 2 * 9 * math.log2(6))


@pytest.mark.parametrize(
    "text",
    ["3:2", "0:4", "4:4", "2:17", "2:32", "2", "2:", ":4", "2:4:8", "a:b", "2.0:4", " 2:4", "02:4", "²:4", 2, None],
)
def test_what_is_no_pattern(text: Any) -> None:
    with pytest.raises(ValueError, match=r"expected 'N:M', N of each M neighbours, with 1 <= N < M <= 16, such as"):
        parse_pattern(text)


def test_scores_of_another_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scores are ranked in float32, not torch\.float16"):
        select_pattern(torch.zeros(4, dtype=torch.float16), Pattern(2, 4, 4, 1))

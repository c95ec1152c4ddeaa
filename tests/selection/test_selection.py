"""The one exact top-k: against a stable sort, whatever the values, strides, groups and sizes."""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from popup_surgery import convert, selection
from popup_surgery.selection import cpu, gpu, kept_count, select
from popup_surgery.selection.backend import Backend, backend_of
from popup_surgery.selection.bits import Found
from popup_surgery.selection.cpu import FEW, SAMPLE

NAN, INF, TINY = math.nan, math.inf, 1.401298464324817e-45  # TINY is the least float32 above 0
AWKWARD = [0.0, -0.0, TINY, -TINY, 1.17e-38, 1.0, -1.0, 1.0000001192092896, INF, -INF, NAN, -NAN, 3.4028234663852886e38]


def reference(scores: list[Tensor], kept: int) -> list[Tensor]:
    """Masks by a stable sort on (is no NaN, −|s|, index), in Python floats."""
    values = [value for score in scores for value in score.reshape(-1).tolist()]
    order = sorted(range(len(values)), key=lambda i: (0, 0.0) if math.isnan(values[i]) else (1, -abs(values[i])))
    flat = torch.zeros(len(values), dtype=torch.bool)
    flat[order[:kept]] = True
    parts = flat.split([score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]


def fast_reference(score: Tensor, kept: int) -> Tensor:
    """As `reference` for one large tensor without NaN."""
    order = np.argsort(-np.abs(score.reshape(-1).numpy()), kind="stable")
    flat = np.zeros(score.numel(), bool)
    flat[order[:kept]] = True
    return torch.from_numpy(flat).view(score.shape)


def same(masks: Iterable[Tensor], expected: Iterable[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(masks, expected, strict=True))


VALUES = st.one_of(
    st.sampled_from(AWKWARD), st.integers(-3, 3).map(float), st.floats(width=32, allow_nan=False), st.just(NAN)
)


@st.composite
def tensors(draw: st.DrawFn, values: st.SearchStrategy[float] = VALUES, most: int = 40) -> Tensor:
    """A float32 tensor of 0 to 4 dimensions with any layout: contiguous, transposed, sliced, or expanded."""
    shape = draw(st.lists(st.integers(0, 4), max_size=4).filter(lambda s: math.prod(s) <= most))
    layout = draw(st.sampled_from(["contiguous", "permuted", "sliced", "expanded", "channels_last"]))
    if layout == "sliced" and shape:
        count = math.prod(shape[:-1]) * (2 * shape[-1] + 1)
        flat = draw(st.lists(values, min_size=count, max_size=count))
        return torch.tensor(flat, dtype=torch.float32).view(*shape[:-1], 2 * shape[-1] + 1)[..., 1::2]
    if layout == "expanded" and shape:
        count = math.prod(shape[1:])
        flat = draw(st.lists(values, min_size=count, max_size=count))
        return torch.tensor(flat, dtype=torch.float32).view(1, *shape[1:]).expand(*shape)
    count = math.prod(shape)
    tensor = torch.tensor(draw(st.lists(values, min_size=count, max_size=count)), dtype=torch.float32).view(shape)
    if layout == "permuted":
        tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
    if layout == "channels_last" and len(shape) == 4:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor


GROUPS = st.lists(tensors(), min_size=1, max_size=4)


# kept_count ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "k", "kept"),
    [
        (10, 0.3, 3), (10, 1.0, 10), (3, 0.5, 2), (1, 0.3, 1), (1, 1e-9, 1), (7, 0.01, 1), (0, 0.5, 0),
        (10, 0.9, 10), (4_300_992, 0.5, 2_150_496), (2_359_296, 0.3, 707_789), (100, 1e-17, 0),
    ],
)  # fmt: skip
def test_kept_count_values(n: int, k: float, kept: int) -> None:
    assert kept_count(n, k) == kept


@given(st.integers(0, 2**32), st.floats(0, 1, exclude_min=True))
def test_kept_count_is_the_formula_of_the_paper(n: int, k: float) -> None:
    assert kept_count(n, k) == n - int((1 - k) * n)
    assert 0 <= kept_count(n, k) <= n


# exactness -------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(GROUPS, st.data())
@example([torch.tensor([-0.0, 0.0, TINY, NAN, INF, -INF, -NAN])], None)
def test_select_is_the_stable_sort(scores: list[Tensor], data: st.DataObject) -> None:
    total = sum(score.numel() for score in scores)
    before = [score.clone() for score in scores]
    for kept in range(total + 1) if data is None or total <= 12 else [data.draw(st.integers(0, total))]:
        masks = select(scores, kept).masks
        assert same(masks, reference(scores, kept))
        assert sum(int(mask.sum()) for mask in masks) == kept
        for mask, score in zip(masks, scores, strict=True):
            assert mask.dtype == torch.bool
            assert mask.stride() == torch.empty_like(score, dtype=torch.bool).stride()
    assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(scores, before, strict=True))


@settings(max_examples=150, deadline=None)
@given(GROUPS, st.data())
def test_device_path_gives_the_host_path(scores: list[Tensor], data: st.DataObject) -> None:
    total = sum(score.numel() for score in scores)
    kept = data.draw(st.integers(0, total))
    assert same(gpu.select(scores, kept)[0], select(scores, kept).masks)


def test_nan_ranks_above_infinity_and_equal_magnitudes_by_index() -> None:
    score = torch.tensor([INF, 1.0, NAN, -1.0, -INF])
    assert select([score], 1).masks[0].tolist() == [False, False, True, False, False]
    assert select([score], 2).masks[0].tolist() == [True, False, True, False, False]
    assert select([score], 4).masks[0].tolist() == [True, True, True, False, True]


def test_zeros_of_both_signs_are_equal() -> None:
    assert select([torch.tensor([-0.0, 0.0, -0.0])], 2).masks[0].tolist() == [True, True, False]
    assert select([torch.tensor([0.0, TINY, -0.0])], 1).masks[0].tolist() == [False, True, False]


def test_a_group_is_ranked_in_row_major_order_of_each_tensor_in_turn() -> None:
    first = torch.ones(2, 3).t()  # of strides (1, 3): row-major order is not the order in memory
    second = torch.ones(4)
    masks = select([first, second], 4).masks
    assert masks[0].tolist() == [[True, True], [True, True], [False, False]]
    assert not masks[1].any()
    assert masks[0].stride() == first.stride()


def test_float64_and_bad_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="float32"):
        select([torch.ones(3, dtype=torch.float64)], 1)
    with pytest.raises(ValueError, match=r"kept is 4; expected 0 to 3"):
        select([torch.ones(3)], 4)
    with pytest.raises(ValueError, match=r"kept is -1; expected 0 to 3"):
        select([torch.ones(3)], -1)


# large arrays: the sampled bracket -------------------------------------------------------------------------------


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The results of `_sweep`, which the fallback calls a second time."""
    results: list[object] = []
    real = cpu._sweep

    def spy(*args: Any) -> Any:
        results.append(real(*args))
        return results[-1]

    monkeypatch.setattr(cpu, "_sweep", spy)
    monkeypatch.setattr(cpu, "_last", {})  # of other scores in the same memory
    return results


LARGE = 300_000
STEP = LARGE // SAMPLE | 1


@pytest.mark.parametrize("kept", [1, 7, 3_000, 90_000, 150_000, 299_990, LARGE - 1])
@pytest.mark.parametrize("kind", ["random", "quantised", "sorted", "constant"])
def test_large_arrays(kind: str, kept: int, sweeps: list[object]) -> None:
    score = torch.randn(LARGE, generator=torch.Generator().manual_seed(kept))
    if kind == "quantised":
        score = (score * 4).round()
    elif kind == "sorted":
        score = score.abs().sort().values
    elif kind == "constant":
        score = torch.full((LARGE,), -0.25)
    mask = select([score], kept).masks[0]
    assert torch.equal(mask, fast_reference(score, kept))
    assert sweeps[-1] is not None
    if kind == "random" and 3_000 <= kept <= 150_000:
        assert len(sweeps) == 1  # the bracket of the sample held the threshold


def test_large_channels_last_and_group(sweeps: list[object]) -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(300, 64, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last)
    second = torch.randn(130, 1000, generator=generator).t()
    masks = select([first, second], 100_000).masks
    flat = torch.cat([first.reshape(-1), second.reshape(-1)])
    expected = fast_reference(flat, 100_000)
    assert torch.equal(masks[0].reshape(-1), expected[: first.numel()])
    assert torch.equal(masks[1].reshape(-1), expected[first.numel() :])
    assert masks[0].stride() == first.stride()
    assert masks[1].stride() == second.stride()


@pytest.mark.parametrize("kept", [LARGE // 3, LARGE // 2, LARGE - LARGE // 3])
@pytest.mark.parametrize("sampled", ["all large", "all small", "all equal and large", "all equal and small"])
def test_a_sample_that_misleads_falls_back_to_the_exact_threshold(
    sampled: str, kept: int, sweeps: list[object]
) -> None:
    score = torch.rand(LARGE, generator=torch.Generator().manual_seed(kept)) + 1
    drawn = score[::STEP]
    if "equal" in sampled:
        drawn.fill_(1.0)
    drawn.mul_(1000.0 if "large" in sampled else 0.001)
    mask = select([score], kept).masks[0]
    assert torch.equal(mask, fast_reference(score, kept))
    assert len(sweeps) == 2
    assert sweeps[0] is None, "the sample's bracket held the threshold; the test misleads no longer"


@pytest.mark.parametrize("shape", [(100, 120, 5, 5), (20, 30, 3, 3)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_scores_that_move_a_little_are_sampled_once(
    layout: torch.memory_format, shape: tuple[int, ...], sweeps: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples: list[object] = []
    real = cpu._sampled

    def spy(*args: Any) -> Any:
        samples.append(args)
        return real(*args)

    monkeypatch.setattr(cpu, "_sampled", spy)
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(shape, generator=generator).to(memory_format=layout)
    kept = score.numel() * 3 // 10
    for step in range(6):
        mask = select([score], kept).masks[0]
        assert torch.equal(mask.reshape(-1), fast_reference(score.reshape(-1), kept))
        assert (len(samples), len(sweeps)) == (1, step + 1)
        score += 1e-3 * torch.randn(score.shape, generator=generator)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 3.0, -1.0, math.inf]), min_size=1, max_size=6), st.data())
def test_the_last_threshold_decides_nothing(moves: list[float], data: st.DataObject) -> None:
    """Whatever has happened to the scores in the same memory: a jump, a reset, other numbers of them kept."""
    n = 3 * FEW
    score = torch.randn(n, generator=torch.Generator().manual_seed(0))
    for move in moves:
        if move == -1.0:
            score.fill_(0.5)
        elif move == math.inf:
            score[:: data.draw(st.integers(1, 50))] = math.inf
        else:
            score.mul_(1 + move).round_(decimals=data.draw(st.integers(0, 7)))
        kept = data.draw(st.sampled_from([1, n // 10, n // 2, n - 1]))
        assert torch.equal(select([score], kept).masks[0], fast_reference(score, kept))


def test_device_path_on_a_large_array() -> None:
    score = (torch.randn(LARGE, generator=torch.Generator().manual_seed(5)) * 1000).round()
    for kept in (1, 90_000, 150_001, LARGE - 1):
        assert torch.equal(gpu.select([score], kept)[0][0], fast_reference(score, kept))


def interpreted(values: np.ndarray, kept: int) -> np.ndarray:
    from popup_surgery.selection.radix_triton import largest

    return largest(torch.from_numpy(values).view(torch.int32), kept).numpy()


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=40), st.data())
def test_the_gpus_kernels_give_the_host_path(
    kernels: Callable[..., np.ndarray], values: list[float], data: st.DataObject
) -> None:
    score = torch.tensor(values, dtype=torch.float32)
    for kept in {1, len(values), data.draw(st.integers(1, len(values)))}:
        assert (kernels(interpreted, score.numpy(), kept) == select([score], kept).masks[0].numpy()).all()


@pytest.mark.slow
@pytest.mark.parametrize("n", [4096, 4097, 3 * 4096 - 1])
@pytest.mark.parametrize("spread", [0, 3, 1000, 1e30])
def test_the_gpus_kernels_on_several_programs(kernels: Callable[..., np.ndarray], n: int, spread: float) -> None:
    score = (torch.randn(n, generator=torch.Generator().manual_seed(n)) * spread).round()
    for kept in (1, n // 3, 4096, n - 1, n):
        assert (kernels(interpreted, score.numpy(), kept) == fast_reference(score, kept).numpy()).all(), kept


# Selection.holds -------------------------------------------------------------------------------------------------


@st.composite
def perturbed(draw: st.DrawFn) -> tuple[list[Tensor], int, list[Tensor]]:
    """A group of scores, a count, and the same group after some change."""
    small = st.one_of(st.integers(-3, 3).map(float), st.sampled_from(AWKWARD))
    scores = draw(st.lists(tensors(small, 16), min_size=1, max_size=3))
    scores = [score.clone() for score in scores]  # an expanded tensor cannot be written to
    kept = draw(st.integers(0, sum(score.numel() for score in scores)))
    changed = [score.clone() for score in scores]
    how = draw(st.sampled_from(["entries", "signs", "scale", "swap", "nothing"]))
    for score in changed:
        flat = score.reshape(-1).clone()
        for _ in range(draw(st.integers(0, 3)) if flat.numel() else 0):
            i, j = draw(st.integers(0, flat.numel() - 1)), draw(st.integers(0, flat.numel() - 1))
            if how == "entries":
                flat[i] = draw(small)
            elif how == "signs":
                flat[i] = -flat[i]
            elif how == "swap":
                flat[[i, j]] = flat[[j, i]]
        if how == "scale":
            flat *= 0.5
        score.copy_(flat.view(score.shape))
    return scores, kept, changed


@settings(max_examples=400, deadline=None)
@given(perturbed())
def test_holds_never_says_yes_to_other_masks(case: tuple[list[Tensor], int, list[Tensor]]) -> None:
    scores, kept, changed = case
    known = select(scores, kept)
    assert known.holds(scores)
    if known.holds(changed):
        assert same(select(changed, kept).masks, known.masks)


@pytest.mark.parametrize("place", [0, 65_535, 65_536, 131_072, LARGE - 1])
def test_holds_sees_one_change_anywhere_in_a_large_array(place: int) -> None:
    score = torch.rand(LARGE, generator=torch.Generator().manual_seed(0)) + 1
    known = select([score], LARGE // 2)
    changed = score.clone()
    changed[place] = 0.0 if known.masks[0][place] else 3.0
    assert not known.holds([changed])
    changed[place] = -score[place]
    assert known.holds([changed])


def test_holds_compares_shapes_and_group_sizes_but_not_strides() -> None:
    score = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    known = select([score], 2)
    assert known.holds([score.t().contiguous().t()])
    assert not known.holds([score.view(4)])
    assert not known.holds([score, score])
    assert not known.holds([])


# the operator for compilers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 5, 16 + 24])
def test_the_operator_passes_opcheck(kept: int) -> None:
    scores = [torch.randn(4, 4).t(), torch.randn(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)]
    torch.library.opcheck(torch.ops.popup_surgery.select.default, (scores, kept))
    assert same(torch.ops.popup_surgery.select(scores, kept), reference(scores, kept))


# backends --------------------------------------------------------------------------------------------------------


def test_a_backend_is_chosen_by_where_the_scores_are() -> None:
    here, there = torch.ones(3), torch.ones(3, device="meta")
    assert backend_of([here, here]) is cpu
    assert backend_of([]) is cpu
    assert backend_of([there]) is gpu
    assert backend_of([here, there]) is gpu
    assert select([there], 2).masks[0].is_meta
    known = select([here], 2)
    assert known.holds([here])
    assert not known.holds([there])
    assert not gpu.holds((known.masks, known.threshold, known.last), [here], None)


@pytest.mark.parametrize(("scope", "calls"), [("layer", [[12], [20]]), ("global", [[12, 20]])])
def test_a_group_asks_a_backend_once_for_the_masks_of_all_its_layers(
    scope: Any, calls: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any object that has the two methods is a backend."""

    class Counting:
        def __init__(self) -> None:
            self.asked: list[list[int]] = []

        def select(self, scores: Sequence[Tensor], kept: int) -> Found:
            self.asked.append([score.numel() for score in scores])
            return cpu.select(scores, kept)

        def holds(self, found: Found, scores: Sequence[Tensor], only: int | None) -> bool:
            return cpu.holds(found, scores, only)

    backend = Counting()
    chosen: Backend = backend
    monkeypatch.setattr(selection, "backend_of", lambda tensors: chosen)
    net = convert(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)), 0.5, scope=scope)
    for _ in range(2):
        net(torch.ones(1, 3))
    assert backend.asked == calls


# CUDA ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kept", [0, 1, 60_000, 150_000, LARGE - 1, LARGE])
@pytest.mark.parametrize("how", ["radix", "topk"])
def test_cuda_gives_the_cpu_masks_without_waiting_for_the_device(
    kept: int, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "topk":
        monkeypatch.setattr(gpu, "_largest_on", lambda device: gpu._largest_by_topk)
    elif gpu._largest_on(torch.device("cuda", 0)) is gpu._largest_by_topk:
        pytest.skip("Triton builds no kernels here")
    generator = torch.Generator().manual_seed(kept)
    scores = [
        (torch.randn(200, 100, 3, 3, generator=generator) * 100).round().contiguous(memory_format=torch.channels_last),
        torch.randn(1000, 120, generator=generator).t(),
    ]
    alone = torch.randn(LARGE, generator=generator).round(decimals=3)
    assert same([mask.cpu() for mask in select([alone.cuda()], kept).masks], select([alone], kept).masks)
    expected = select(scores, kept).masks
    on_device = [score.cuda() for score in scores]
    select(on_device, kept)  # what is made once may wait
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode says that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        chosen = select(on_device, kept)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same([mask.cpu() for mask in chosen.masks], expected)
    assert [mask.stride() for mask in chosen.masks] == [mask.stride() for mask in expected]
    assert not chosen.holds(on_device)

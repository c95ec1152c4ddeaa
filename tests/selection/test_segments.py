"""All layers in one pass: the masks of `select`, and weights and gradients as by PyTorch's operators, to the bit."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import pytest
import torch
from torch import Tensor

from popup_surgery.selection import segments, select
from popup_surgery.selection.segments import Member, OnePass, buckets_of, suits, takes
from support import by_kernels, slow_except

KINDS = [torch.float32, torch.float16, torch.bfloat16]


def scores() -> list[Tensor]:
    """Small and large, with few and many ties, contiguous and channels-last."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, steps: float = 0.0, last: bool = False) -> Tensor:
        drawn = torch.randn(shape, generator=generator)
        drawn = (drawn * steps).round() if steps else drawn
        return drawn.contiguous(memory_format=torch.channels_last) if last else drawn

    return [
        draw(1), draw(5, 7), draw(70, 60), draw(40, 15, 3, 3, steps=2, last=True), draw(3, 3, 1, 1, last=True),
        draw(64, 65, steps=1), draw(5000).zero_(), torch.tensor([torch.nan, -torch.inf, 1.0, -0.0, torch.nan, 0.0]),
    ]  # fmt: skip


GROUPS = 0, 1, 2, 3, 4, 4, 5, 6  # of the scores, in turn
KEPT = 1, 10, 1300, 2000, 1700, 4097, 3  # of the groups


def members(raw: torch.dtype, made: torch.dtype) -> list[Member]:
    found = []
    for score, group in zip(scores(), GROUPS, strict=True):
        weight = torch.empty_like(score).normal_(generator=torch.Generator().manual_seed(1))
        weight = weight.bfloat16().to(raw)  # Triton's interpreter rounds to bfloat16 in its own way
        found.append(Member(score, weight, group, KEPT[group], made))
    return found


def masks_of(found: Sequence[Member]) -> list[Tensor]:
    """Masks by `select`."""
    groups = [list(group) for _, group in groupby(found, lambda member: member.group)]
    return [mask for group in groups for mask in select([one.score for one in group], group[0].kept).masks]


def same_bits(one: Tensor, other: Tensor) -> bool:
    integer = {4: torch.int32, 2: torch.int16}[one.itemsize]
    return one.dtype == other.dtype and torch.equal(one.contiguous().view(integer), other.contiguous().view(integer))


@pytest.mark.parametrize("made", slow_except(KINDS, KINDS[::2]))
@pytest.mark.parametrize("raw", slow_except(KINDS, KINDS[:1]))
@by_kernels
def test_weights_and_gradients_are_those_of_each_group_by_itself(raw: torch.dtype, made: torch.dtype) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "BUCKET", 5000)
        check(members(raw, made))


def check(found: list[Member]) -> None:
    assert all(suits(member.score, member.weight) for member in found)
    one_pass, masks = OnePass(found), masks_of(found)
    assert len(one_pass.buckets) > 1
    weights = one_pass.masked_weights()
    for weight, mask, member in zip(weights, masks, found, strict=True):
        assert same_bits(weight, torch.where(mask, member.weight, 0.0).to(member.dtype))
        assert weight.stride() == member.score.stride()
    versions = [weight._version for weight in weights]
    weights[0].zero_()
    assert [weight._version for weight in weights] == [versions[0] + 1, *versions[1:]]
    for index, indices in enumerate(one_pass.buckets):
        drawn = [torch.randn(found[i].score.shape).to(found[i].dtype) for i in indices]
        turned = torch.cat([drawn[0].reshape(-1)[:1], drawn[0].reshape(-1)])[1:]  # at an address that is not aligned
        given: list[Tensor | None] = [turned.view(drawn[0].shape), *drawn[1:]]
        if len(given) > 1:
            given[1] = None
        for i, one, gradient in zip(indices, given, one_pass.gradients(index, given), strict=True):
            if one is None:
                assert gradient is None
                continue
            expected = (one.float() * found[i].weight).mul_(found[i].score.sign())
            assert gradient is not None
            assert same_bits(gradient, expected)
            assert gradient.stride() == found[i].score.stride()


@by_kernels
def test_every_count_of_a_small_group_is_exact() -> None:
    score = torch.tensor([[1.0, -1.0, 0.5], [2.0, 1.0, -0.0]])
    for layout in (score, score[..., None, None].contiguous(memory_format=torch.channels_last)):
        for kept in range(1, 7):
            found = [Member(layout, torch.ones_like(layout), 0, kept, torch.float32)]
            assert torch.equal(OnePass(found).masked_weights()[0] != 0, masks_of(found)[0])


@pytest.mark.slow
@by_kernels
def test_ties_are_counted_over_more_blocks_than_one_load_takes() -> None:
    with pytest.MonkeyPatch.context() as patch:
        from popup_surgery.selection import segments_triton

        patch.setattr(segments_triton, "BLOCK", 16)
        score = torch.ones(16 * 1100)
        found = [Member(score, score, 0, len(score) - 40, torch.float32)]
        assert torch.equal(OnePass(found).masked_weights()[0] != 0, masks_of(found)[0])


@by_kernels
def test_a_pass_keeps_no_tensor_alive() -> None:
    import weakref

    found = members(torch.float32, torch.float32)
    one_pass = OnePass(found)
    seen = [weakref.ref(tensor) for member in found for tensor in (member.score, member.weight)]
    del found
    assert not any(reference() is not None for reference in seen)
    assert one_pass.buckets


def test_buckets_are_neighbours_and_few() -> None:
    megabyte = 2**18
    assert buckets_of([1]) == [range(1)]
    assert buckets_of([megabyte] * 60) == [range(25), range(25, 50), range(50, 60)]
    assert buckets_of([100 * megabyte, 1, 1]) == [range(1), range(1, 3)]
    assert all(len(buckets_of([size] * n)) <= 5 for n in (1, 7, 100) for size in (1, megabyte, 300 * megabyte))
    buckets = buckets_of([3 * megabyte] * 100)
    assert [i for bucket in buckets for i in bucket] == list(range(100))
    assert not takes([Member(torch.ones(1), torch.ones(1), i, 1, torch.float32) for i in range(257)])


def test_what_a_pass_does_not_take() -> None:
    score = torch.ones(4, 3, 2, 2)
    assert suits(score, score)
    assert suits(
        score.contiguous(memory_format=torch.channels_last), score.contiguous(memory_format=torch.channels_last)
    )
    others: list[tuple[Any, Any]] = [
        (score.double(), score), (score, score.double()), (score, score.contiguous(memory_format=torch.channels_last)),
        (score.permute(1, 2, 3, 0), score.permute(1, 2, 3, 0)), (score[..., :1], score[..., :1]), (score, score[0]),
        (torch.ones(0), torch.ones(0)), (score.to("meta"), score), (torch.ones(5)[1:], torch.ones(4)),
    ]  # fmt: skip
    assert not any(suits(*pair) for pair in others)


class Target:
    """Triton's driver of a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return -self.capability  # what is built for it is built for no other

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@pytest.mark.parametrize("capability", slow_except([75, 80, 90], [90]))
def test_the_kernels_can_be_built_for_a_gpu(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To machine code, for which none is needed. What the interpreter takes and the compiler refuses is seen here."""
    pytest.importorskip("triton", reason="Triton comes with PyTorch where there may be a GPU")
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    built: list[str] = []
    run = JITFunction.run

    def build(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        assert kernel.asm["cubin"]
        built.append(kernel.name)

    monkeypatch.setattr(JITFunction, "run", build)
    monkeypatch.setattr(segments, "BUCKET", 5000)
    monkeypatch.setattr(driver, "_active", Target(capability))
    one_pass = OnePass(members(torch.float32, torch.bfloat16))
    weights = one_pass.masked_weights()
    for index, indices in enumerate(one_pass.buckets):
        one_pass.gradients(index, [weights[i] for i in indices])
    assert built == ["count"] * 4 + ["count_ties", "write"] + ["differentiate"] * len(one_pass.buckets)


@pytest.mark.gpu
@pytest.mark.parametrize("made", KINDS)
@pytest.mark.parametrize("raw", KINDS)
def test_cuda_gives_the_same_without_waiting_for_the_device(
    raw: torch.dtype, made: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not segments.works_on(torch.device("cuda", 0)):
        pytest.skip("Triton builds no kernels here")
    monkeypatch.setattr(segments, "BUCKET", 5000)
    found = members(raw, made)
    moved = [member._replace(score=member.score.cuda(), weight=member.weight.cuda()) for member in found]
    one_pass = OnePass(moved)
    one_pass.gradients(0, one_pass.masked_weights()[: len(one_pass.buckets[0])])  # what is made once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        weights = one_pass.masked_weights()
        gradients = one_pass.gradients(0, weights[: len(one_pass.buckets[0])])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for weight, mask, member in zip(weights, masks_of(found), found, strict=True):
        assert same_bits(weight.cpu(), torch.where(mask, member.weight, 0.0).to(made))
    for i, gradient in zip(one_pass.buckets[0], gradients, strict=True):
        expected = (weights[i].float() * moved[i].weight).mul_(moved[i].score.sign())
        assert gradient is not None
        assert same_bits(gradient, expected)

"""The stream: every sample once an epoch, whatever the ranks, micro-batches and restarts."""

from __future__ import annotations

import pytest

from permafrost.data.errors import DataError
from permafrost.data.stream.sampler import GlobalStream
from permafrost.data.types import SampleKey


def flat(steps: list[list[list[SampleKey]]]) -> list[SampleKey]:
    return [key for step in steps for micro in step for key in micro]


def test_an_epoch_covers_everything_once() -> None:
    stream = GlobalStream(23, seed=4)
    keys = [stream.key(position) for position in range(23 * 3)]
    for epoch in range(3):
        part = keys[epoch * 23 : (epoch + 1) * 23]
        assert sorted(key.index for key in part) == list(range(23))
        assert {key.epoch for key in part} == {epoch}
        assert {key.seed for key in part} == {4}
    orders = [tuple(stream.order(epoch)) for epoch in range(3)]
    assert len(set(orders)) == 3
    assert orders[0] != tuple(range(23))


def test_steps_run_across_the_end_of_an_epoch() -> None:
    stream = GlobalStream(10, seed=0)
    keys = flat([stream.step_keys(step, 4) for step in range(5)])
    assert keys == [stream.key(position) for position in range(20)]
    assert [key.epoch for key in keys] == [0] * 10 + [1] * 10


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 3), (12, 1)])
def test_the_stream_does_not_depend_on_the_split(world_size, accumulation) -> None:
    stream = GlobalStream(17, seed=2)
    whole = [stream.step_keys(step, 12)[0] for step in range(6)]
    for step in range(6):
        parts = [stream.step_keys(step, 12, rank, world_size, accumulation) for rank in range(world_size)]
        assert all(len(part) == accumulation for part in parts)
        assert {len(micro) for part in parts for micro in part} == {12 // world_size // accumulation}
        assert flat(parts) == whole[step]


def test_a_resumed_stream_goes_on_where_it_was() -> None:
    whole = [GlobalStream(9, seed=1).step_keys(step, 4, 1, 2, 2) for step in range(20)]
    for start in (0, 1, 7, 13):
        fresh = GlobalStream(9, seed=1)
        assert [fresh.step_keys(step, 4, 1, 2, 2) for step in range(start, 20)] == whole[start:]
    backwards = GlobalStream(9, seed=1)
    assert [backwards.step_keys(step, 4, 1, 2, 2) for step in reversed(range(20))] == whole[::-1]


def test_seeds_order_differently() -> None:
    assert GlobalStream(50, seed=0).order(0) != GlobalStream(50, seed=1).order(0)


def test_a_batch_larger_than_the_data_set() -> None:
    keys = GlobalStream(3, seed=0).step_keys(0, 8)[0]
    assert [key.epoch for key in keys] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert GlobalStream(3, seed=0).epoch(3, 8) == 8.0


@pytest.mark.parametrize(("batch", "world_size", "accumulation"), [(10, 4, 1), (8, 2, 3), (0, 1, 1), (2, 4, 1)])
def test_batches_that_do_not_divide_are_refused(batch, world_size, accumulation) -> None:
    with pytest.raises(DataError, match=rf"does not divide into {world_size} ranks x {accumulation} micro-batches"):
        GlobalStream(5, seed=0).step_keys(0, batch, 0, world_size, accumulation)


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        GlobalStream(0, seed=0)


def test_generators_depend_on_key_and_purpose_only() -> None:
    import torch

    def draw(key: SampleKey, purpose: str) -> float:
        return torch.rand(1, generator=key.generator(purpose), dtype=torch.float64).item()

    key = SampleKey(1, 2, 3)
    first = draw(key, "augment")
    torch.rand(10)
    assert draw(SampleKey(1, 2, 3), "augment") == first
    others = [draw(SampleKey(*numbers), "augment") for numbers in ((0, 2, 3), (1, 0, 3), (1, 2, 0), (3, 2, 1))]
    assert len({first, *others, draw(key, "roi")}) == 6

"""Loading in processes: the same batches as without, and errors that name worker and sample."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import subprocess
import time
from collections.abc import Callable

import pytest
import torch

from permafrost.data.build import train_set
from permafrost.data.detection.config import JitterConfig
from permafrost.data.errors import DataError
from permafrost.data.stream.loader import WorkerError, train_loader, val_loader
from permafrost.data.stream.sampler import GlobalStream
from permafrost.data.task import TaskDataset
from permafrost.data.types import Batch, Sample, SampleKey


class Numbers:
    """Samples that are their own index; `act(key)` may do anything first."""

    def __init__(self, length: int = 12, act=lambda key: None) -> None:
        self.length, self.act = length, act

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: SampleKey) -> Sample:
        self.act(key)
        return Sample(torch.full((3, 2, 2), key.index, dtype=torch.uint8), None, key)


def assert_equal(first: Batch, second: Batch) -> None:
    assert first.keys == second.keys
    assert torch.equal(first.images, second.images)
    for one, other in zip(first.targets, second.targets, strict=True):
        assert one.image_id == other.image_id
        for name in ("boxes", "labels", "masks", "ignore_boxes"):
            assert torch.equal(getattr(one, name), getattr(other, name))


@pytest.fixture(scope="module")
def augmented(shapes_config) -> TaskDataset:
    shapes_config.jitter = JitterConfig(scale_range=(0.5, 1.5), color=0.3)
    return train_set(shapes_config)


# torch advises fewer workers on a machine with one core; two are the point here.
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_batches_do_not_depend_on_the_number_of_workers(augmented) -> None:
    def load(num_workers: int) -> list[Batch]:
        stream = GlobalStream(len(augmented), seed=6)
        return list(train_loader(augmented, stream, global_batch=4, num_steps=12, num_workers=num_workers))

    alone, helped = load(0), load(2)
    assert len(alone) == len(helped) == 12
    for first, second in zip(alone, helped):
        assert_equal(first, second)
    assert len({key.epoch for batch in alone for key in batch.keys}) == 2


def test_resuming_and_splitting_give_the_same_samples(augmented) -> None:
    def load(**fields) -> list[Batch]:
        return list(train_loader(augmented, GlobalStream(len(augmented), 6), global_batch=4, num_steps=5, **fields))

    whole = load()
    for first, second in zip(whole[3:], load(start_step=3), strict=True):
        assert_equal(first, second)
    ranks = [load(rank=rank, world_size=2, accumulation=2) for rank in range(2)]
    assert [len(rank) for rank in ranks] == [10, 10]
    for step, batch in enumerate(whole):
        parts = [part for rank in ranks for part in rank[2 * step : 2 * step + 2]]
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert [key for part in parts for key in part.keys] == batch.keys
    assert load(start_step=5) == load(start_step=9) == []


def test_replaced_files_travel_with_the_batch(hand_made) -> None:
    dataset = train_set(hand_made.config())
    dataset.image_path(2).write_bytes(b"")
    batches = list(train_loader(dataset, GlobalStream(6, 0), global_batch=3, num_steps=2, num_workers=1))
    assert [path for batch in batches for path, _ in batch.replaced] == [str(dataset.image_path(2))]


@pytest.mark.parametrize(
    ("length", "batch_size", "world_size"), [(12, 4, 1), (11, 2, 2), (5, 1, 3), (3, 2, 4), (1, 8, 2)]
)
def test_validation_covers_all_once_with_equal_counts(length, batch_size, world_size) -> None:
    ranks = [
        list(val_loader(Numbers(length), batch_size=batch_size, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    real = [key.index for rank in ranks for batch in rank if not batch.is_padding for key in batch.keys]
    assert sorted(real) == list(range(length))
    assert all(len(batch.keys) for rank in ranks for batch in rank)


def test_a_loader_can_be_iterated_again() -> None:
    for num_workers in (0, 1):
        loader = val_loader(Numbers(5), batch_size=2, num_workers=num_workers)
        rounds = [[batch.keys for batch in loader] for _ in range(2)]
        assert rounds[0] == rounds[1]
        assert len(loader) == 3


def test_loading_draws_nothing_from_global_generators(augmented) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    for num_workers in (0, 1):
        stream = GlobalStream(len(augmented), 6)
        list(train_loader(augmented, stream, global_batch=2, num_steps=2, num_workers=num_workers))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_workers_run_one_thread_each() -> None:
    def check(key: SampleKey) -> None:
        assert torch.get_num_threads() == 1

    loader = train_loader(Numbers(act=check), GlobalStream(12, 0), global_batch=2, num_steps=2, num_workers=1)
    assert len(list(loader)) == 2


def fail_at_7(error: Exception) -> Callable[[SampleKey], None]:
    def act(key: SampleKey) -> None:
        if key.index == 7:
            raise error

    return act


@pytest.mark.parametrize(("num_workers", "place"), [(0, "the main process"), (1, "data worker 0")])
def test_errors_name_worker_and_sample(num_workers, place) -> None:
    loader = val_loader(Numbers(act=fail_at_7(KeyError("odd"))), batch_size=2, num_workers=num_workers)
    with pytest.raises(WorkerError, match=rf"sample 7 of epoch 0, in {place}: KeyError: 'odd'") as error:
        list(loader)
    assert "in act\n    raise error" in str(error.value)
    loader = val_loader(Numbers(act=fail_at_7(DataError("a.jpg: bad"))), batch_size=2, num_workers=num_workers)
    with pytest.raises(DataError, match=rf"^a\.jpg: bad \(sample 7 of epoch 0, in {place}\)$"):
        list(loader)


def kill_at_7(key: SampleKey) -> None:
    if key.index == 7:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_named_with_its_samples() -> None:
    start = time.monotonic()
    with pytest.raises(WorkerError, match=r"data worker 0 \(pid \d+\) died; .*samples \[\d+, \d+\]"):
        list(val_loader(Numbers(act=kill_at_7), batch_size=2, num_workers=1))
    assert time.monotonic() - start < 30


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_a_failed_loader_is_over_and_done_with() -> None:
    """While the error is held, as by a traceback: no worker lives on, no other child's end raises it again, a new try works."""
    others = set(mp.active_children())
    with pytest.raises(WorkerError) as held:
        list(val_loader(Numbers(act=kill_at_7), batch_size=2, num_workers=2))
    assert set(mp.active_children()) <= others
    for _ in range(3):
        subprocess.run(["true"], check=True)
        time.sleep(0.02)
    assert held.value is not None

    flag = mp.Value("i", 0)

    def kill_once(key: SampleKey) -> None:
        if not flag.value:
            flag.value = 1
            os.kill(os.getpid(), signal.SIGKILL)

    loader = val_loader(Numbers(act=kill_once), batch_size=2, num_workers=1)
    with pytest.raises(WorkerError):
        list(loader)
    assert [key.index for batch in loader for key in batch.keys] == list(range(12))


def test_a_death_waits_for_the_next_batch() -> None:
    """While the main process does something else (say, writes a checkpoint), nothing is raised there."""
    iterator = iter(val_loader(Numbers(act=kill_at_7), batch_size=2, num_workers=1))
    next(iterator)
    work = 0
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        work += 1
    assert work > 0
    with pytest.raises(WorkerError, match=r"data worker 0 \(pid \d+\) died"):
        list(iterator)


def sleep_at_7(key: SampleKey) -> None:
    if key.index == 7:
        time.sleep(60)


def test_a_stuck_worker_is_an_error_after_the_timeout() -> None:
    start = time.monotonic()
    with pytest.raises(WorkerError, match=r"no data for 5 s \(loop.worker_timeout\); .*samples \[6, 7\]"):
        list(val_loader(Numbers(act=sleep_at_7), batch_size=2, num_workers=1, timeout=5.0))
    assert time.monotonic() - start < 30


def test_a_batch_that_does_not_divide_is_refused_at_once() -> None:
    with pytest.raises(DataError, match="does not divide"):
        train_loader(Numbers(), GlobalStream(12, 0), global_batch=3, world_size=2, num_steps=1)

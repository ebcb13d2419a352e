"""Load batches in worker processes, in the order of the stream; errors name the worker and the sample."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import FrameType, TracebackType
from typing import Any, Protocol, overload

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from permafrost.data.errors import DataError
from permafrost.data.pictures.geometry import PAD_COLOR, pad_to
from permafrost.data.stream.sampler import GlobalStream, check_division
from permafrost.data.types import Batch, Sample, SampleKey

_PADDING_EPOCH = -1


class KeyedDataset(Protocol):
    """A data set as loaders read it: samples by key."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: SampleKey) -> Sample: ...


class WorkerError(RuntimeError):
    """A data worker died, hung, or raised something unforeseen; says which worker and which samples."""


@dataclass
class _Failure:
    """An exception on its way out of a worker: torch would wrap the message into a traceback."""

    worker: int | None
    key: SampleKey
    error: str
    trace: str
    by_user: bool

    def raise_it(self) -> None:
        place = "the main process" if self.worker is None else f"data worker {self.worker}"
        where = f"sample {self.key.index} of epoch {self.key.epoch}, in {place}"
        if self.by_user:
            raise DataError(f"{self.error} ({where})")
        raise WorkerError(f"{where}: {self.error}\n{self.trace}")


class _Guarded(Dataset):
    """The data set as workers see it: an exception becomes a value."""

    def __init__(self, dataset: KeyedDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> Sample | _Failure:
        try:
            return self.dataset[key]
        except Exception as error:
            info = get_worker_info()
            text = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
            return _Failure(
                info.id if info else None, key, text, traceback.format_exc(), by_user=isinstance(error, DataError)
            )


@overload
def collate(samples: Sequence[Sample]) -> Batch: ...
@overload
def collate(samples: Sequence[Sample | _Failure]) -> Batch | _Failure: ...
def collate(samples: Sequence[Sample | _Failure]) -> Batch | _Failure:
    """Stack samples into a batch, padded to the largest of them; the first failure, if any, takes its place."""
    loaded: list[Sample] = []
    for sample in samples:
        if isinstance(sample, _Failure):
            return sample
        loaded.append(sample)
    height, width = (max(sides) for sides in zip(*(sample.image.shape[-2:] for sample in loaded)))
    canvas = (height, width)
    loaded = [sample if tuple(sample.image.shape[-2:]) == canvas else _padded(sample, canvas) for sample in loaded]
    return Batch(
        images=torch.stack([sample.image for sample in loaded]),
        targets=[sample.target for sample in loaded],
        keys=[sample.key for sample in loaded],
        replaced=[entry for sample in loaded for entry in sample.replaced],
        is_padding=all(sample.key.epoch == _PADDING_EPOCH for sample in loaded),
    )


def _padded(sample: Sample, canvas: tuple[int, int]) -> Sample:
    """Return the sample at the upper left of a larger canvas."""
    return replace(sample, image=pad_to(sample.image, canvas, PAD_COLOR), target=sample.target.padded(canvas))


def _init_worker(worker: int) -> None:
    # One thread each: workers are the parallelism. An interrupt is the main process's to handle; it ends the workers.
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _report_unless_deserted


def _report_unless_deserted(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """Say what became of a worker's thread: nothing where the main process hung up while it was given a batch.

    Interrupted there, it closes the connection, and says itself that it was.
    """
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, where)


class BatchLoader:
    """Iterable over batches of given keys, each time from the start.

    Args:
        dataset: samples by key.
        batches: the keys of every batch, in order; read lazily.
        num_workers: processes; 0 loads in this one.
        timeout: seconds without a batch from the workers that are an error; 0 waits for ever.
    """

    def __init__(
        self, dataset: KeyedDataset, batches: Sequence[list[SampleKey]], num_workers: int = 0, timeout: float = 300.0
    ) -> None:
        self.batches = batches
        self.num_workers = num_workers
        self.timeout = timeout
        self._loader = DataLoader(
            _Guarded(dataset),
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=collate,
            timeout=timeout if num_workers else 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_init_worker,
            persistent_workers=num_workers > 0,
            # A generator of its own: the default one draws the workers' base seed from torch's global state.
            generator=torch.Generator().manual_seed(0),
        )

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        iterator = iter(self._loader)
        if self.num_workers:
            _deaths.watch(iterator)
        for position in range(len(self.batches)):
            try:
                with _deaths.awaited():
                    if _dead_workers(iterator):
                        raise RuntimeError("it died while the main process was at work")
                    batch = next(iterator)
            except (RuntimeError, OSError, EOFError) as error:
                # What a data set raises arrives as a _Failure: these are the workers' and the pipes' own.
                explained = self._explained(error, position, iterator)
                self._shut_down(iterator)
                raise explained from error
            if isinstance(batch, _Failure):
                self._shut_down(iterator)
                batch.raise_it()
            yield batch

    def _shut_down(self, iterator: Any) -> None:
        """End the workers of a failed iteration now: a traceback keeps them alive otherwise, and torch watching them."""
        if self.num_workers:
            iterator._shutdown_workers()
            self._loader._iterator = None

    def _explained(self, error: Exception, position: int, iterator: object) -> WorkerError:
        """Put a worker that died or hung into words: torch names neither the worker's number nor what it was loading."""
        text = f"{type(error).__name__}: {error}".split("\n")[0]
        indices = [key.index for key in self.batches[position]]
        due = f"batch {position} was due from worker {position % max(1, self.num_workers)}: samples {indices}"
        timed_out = "timed out" in text
        # A broken pipe is seen before the end of the process behind it.
        dead = _dead_workers(iterator, patience=0.0 if timed_out else 1.0)
        if dead:
            what = f"data worker {', '.join(f'{number} (pid {pid})' for number, pid in dead)} died"
            hint = "killed from outside, or out of memory (shared memory too: /dev/shm)"
            return WorkerError(f"{what}; {due}. A worker that ends like this was {hint}. {text}")
        if timed_out:
            return WorkerError(f"no data for {self.timeout:g} s (loop.worker_timeout); {due}. {text}")
        return WorkerError(f"{due}. {text}")


def _dead_workers(iterator: object, patience: float = 0.0) -> list[tuple[int, int]]:
    """Return (number, pid) of the workers of an iterator that ended; the first may take `patience` seconds to do so."""
    workers = getattr(iterator, "_workers", [])
    deadline = time.monotonic() + patience
    while True:
        dead = [(number, worker.pid) for number, worker in enumerate(workers) if not worker.is_alive()]
        if dead or time.monotonic() >= deadline:
            return dead
        time.sleep(0.02)


class _Deaths:
    """Holds the news of a dead worker back until the next batch is asked for.

    torch raises it from a signal handler: anywhere in the main thread, be it half way through writing a checkpoint.
    """

    def __init__(self) -> None:
        self._iterators: weakref.WeakSet = weakref.WeakSet()
        self._awaiting = False
        self._handler: object = None

    def watch(self, iterator: object) -> None:
        """Take charge of an iterator's workers; torch has set its own handler when it made the iterator."""
        self._iterators.add(iterator)
        previous = signal.getsignal(signal.SIGCHLD)
        if previous is self._handler or not callable(previous):
            return
        if threading.current_thread() is not threading.main_thread():
            return

        def handler(number: int, frame: FrameType | None) -> None:
            try:
                previous(number, frame)
            except RuntimeError:
                # Not ours, or waited for right now: let it through.
                if self._awaiting or not any(_dead_workers(watched) for watched in self._iterators):
                    raise

        self._handler = handler
        signal.signal(signal.SIGCHLD, handler)

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Mark a stretch of code in which a worker's death may be raised."""
        self._awaiting = True
        try:
            yield
        finally:
            self._awaiting = False


_deaths = _Deaths()


class _TrainBatches(Sequence):
    """The keys of one rank's micro-batches from one step on."""

    def __init__(
        self,
        stream: GlobalStream,
        global_batch: int,
        rank: int,
        world_size: int,
        accumulation: int,
        start: int,
        num: int,
    ) -> None:
        self.stream, self.start, self.num_steps = stream, start, num
        self.layout = (global_batch, rank, world_size, accumulation)

    def __len__(self) -> int:
        return self.num_steps * self.layout[-1]

    def __getitem__(self, index: int) -> list[SampleKey]:  # type: ignore[override]  # no slices
        if not 0 <= index < len(self):
            raise IndexError(index)
        step, part = divmod(index, self.layout[-1])
        return self.stream.step_keys(self.start + step, *self.layout)[part]


def train_loader(
    dataset: KeyedDataset,
    stream: GlobalStream,
    *,
    global_batch: int,
    rank: int = 0,
    world_size: int = 1,
    accumulation: int = 1,
    start_step: int = 0,
    num_steps: int,
    num_workers: int = 0,
    timeout: float = 300.0,
) -> BatchLoader:
    """Return this rank's training batches of steps start_step to num_steps - 1, `accumulation` of them per step.

    Args:
        dataset: samples by key.
        stream: the order of samples.
        global_batch: images per step over all ranks and micro-batches.
        rank: this rank.
        world_size: number of ranks.
        accumulation: micro-batches per step on each rank.
        start_step: first step; above 0 when resuming.
        num_steps: steps of the whole run.
        num_workers: worker processes.
        timeout: seconds without a batch that are an error.

    Raises:
        DataError: the global batch does not divide; while iterating, data cannot be read.
        WorkerError: while iterating, a worker died or hung.
    """
    check_division(global_batch, world_size, accumulation)
    remaining = max(0, num_steps - start_step)
    batches = _TrainBatches(stream, global_batch, rank, world_size, accumulation, start_step, remaining)
    return BatchLoader(dataset, batches, num_workers, timeout)


def val_loader(
    dataset: KeyedDataset,
    *,
    batch_size: int = 1,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    timeout: float = 300.0,
    groups: Sequence[int] | None = None,
    max_batch: int | None = None,
) -> BatchLoader:
    """Return this rank's evaluation batches, every sample once over all ranks, equally many batches on each.

    Batches are dealt out in turn; a rank that runs short repeats the first batch with `is_padding` set, so that
    collective operations stay in step; its results are to be dropped. Samples have seed 0 and, unless padding, epoch
    0. It can be iterated again and again.

    Args:
        dataset: samples by key.
        batch_size: samples in a batch, at most.
        rank: this rank.
        world_size: number of ranks.
        num_workers: worker processes.
        timeout: seconds without a batch that are an error.
        groups: how many samples in a row belong together (the views of an image): they stay on one rank and in order. Where a
            group has several, a batch holds samples of one only. None: each by itself.
        max_batch: the data set's own limit of a batch, which may be lower.
    """
    # Views of different sizes would be padded to the largest, and what is found would depend on the batch.
    batch_size = min(batch_size, max_batch or batch_size)
    indices = [SampleKey(0, 0, index) for index in range(len(dataset))]
    if groups is None or max(groups, default=1) == 1:
        pieces = [[indices[start : start + batch_size]] for start in range(0, len(dataset), batch_size)]
    else:
        pieces, start = [], 0
        for size in groups:
            own = indices[start : start + size]
            pieces.append([own[first : first + batch_size] for first in range(0, size, batch_size)])
            start += size
    mine = [batch for piece in pieces[rank::world_size] for batch in piece]
    longest = max((sum(map(len, pieces[other::world_size])) for other in range(world_size)), default=0)
    if pieces:
        padding = [SampleKey(0, _PADDING_EPOCH, key.index) for key in pieces[0][0]]
        mine += [padding] * (longest - len(mine))
    return BatchLoader(dataset, mine, num_workers, timeout)

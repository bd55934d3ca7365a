"""Batches keyed by (epoch, index): independent of the number of workers and devices, and resumable at any batch."""

import functools
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, Protocol

import lightning as L
import torch
from torch.utils.data import DataLoader, Sampler, default_collate


class SizedDataset(Protocol):
    """A map-style data set with a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any) -> Any: ...


class TrainBatches(Sampler[list[tuple[int, int]]]):
    """Every batch of a whole training, as lists of (epoch, index) keys in a shuffled order fixed by (seed, epoch).

    All epochs form one stream; setting `start` continues it at any batch. A global batch is divided into `accumulate` parts for each of
    `world_size` processes. The samples of an optimizer step do not depend on either.

    Args:
        length: number of samples of the data set; an epoch omits samples that do not fill a global batch.
        batch_size: the *global* batch, samples per optimizer step.
        epochs: passes over the data set; the last one is cut off if this is not an integer.
        seed: fixes the order.
        accumulate: batches per optimizer step.
        rank, world_size: this process among those that share a global batch.
        groups: the group of every sample, for instance upright or not, or None. Samples then come in pairs of the same group, and a global
            batch is sorted by group, so that most of its parts have one group and need less padding.

    Raises:
        ValueError: the global batch does not divide by devices x accumulation, or is larger than the data set, or there is no step.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        epochs: float,
        seed: int,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        groups: Sequence[int] | None = None,
    ) -> None:
        if batch_size % (world_size * accumulate):
            raise ValueError(
                f"data.batch_size is the global batch and must be a multiple of devices x accumulation, "
                f"got {batch_size} for {world_size} x {accumulate}"
            )
        self.length, self.batch_size, self.epochs, self.seed, self.groups = length, batch_size, epochs, seed, groups
        if batch_size > length:
            parts = world_size * accumulate
            raise ValueError(
                f"data.batch_size must not exceed the training samples, got {batch_size} for {length} samples: "
                f"give data.batch_size={length // parts * parts} or less"
            )
        self.accumulate, self.rank, self.world_size = accumulate, rank, world_size
        self.start = 0
        if not len(self):
            raise ValueError(f"data.epochs must be one step or more, got {epochs}, of an epoch of {length // batch_size} steps")

    def __len__(self) -> int:
        """Return the number of batches of the whole training, including those before `start`."""
        return round(self.epochs * (self.length // self.batch_size)) * self.accumulate

    def _order(self, epoch: int) -> list[int]:
        """Return the samples of an epoch in their order."""
        generator = torch.Generator().manual_seed(hash((self.seed, epoch)) % 2**63)
        order = torch.randperm(self.length, generator=generator).tolist()
        if self.groups is None:
            return order
        waiting, pairs = {}, []
        for index in order:
            # a pair stands at the position of its second sample
            first = waiting.pop(self.groups[index], None)
            if first is None:
                waiting[self.groups[index]] = index
            else:
                pairs += [first, index]
        pairs += waiting.values()
        batches = (pairs[i : i + self.batch_size] for i in range(0, len(pairs), self.batch_size))
        return [index for batch in batches for index in sorted(batch, key=self.groups.__getitem__)]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = self.length // self.batch_size
        size = self.batch_size // (self.world_size * self.accumulate)
        order, shuffled = [], None
        for batch in range(self.start, len(self)):
            step, part = divmod(batch, self.accumulate)
            epoch, step = divmod(step, per_epoch)
            if shuffled != epoch:
                order, shuffled = self._order(epoch), epoch
            first = step * self.batch_size + (part * self.world_size + self.rank) * size
            yield [(epoch, index) for index in order[first : first + size]]


class EvalIndices(Sampler[int]):
    """The indices of this process; over all processes, every index occurs exactly once, without padding."""

    def __init__(self, data: Sized, rank: int, world_size: int) -> None:
        self.indices = range(rank, len(data), world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


def merge(samples: Sequence[Any], collate: Callable) -> Any:
    """Merge samples into a batch by `collate`.

    Raises:
        ValueError: a sample does not begin with an image [3, H, W]; normalisation would broadcast one channel to three without a word.
    """
    for sample in samples:
        image = sample[0] if isinstance(sample, Sequence) else sample
        if image.ndim != 3 or len(image) != 3:
            raise ValueError(f"a data set must give images [3, height, width], got one of shape {list(image.shape)}: convert it to RGB")
    return collate(samples)


class Data(L.LightningDataModule):
    """Training and validation sets of one task.

    Args:
        train: map-style data set that takes keys (epoch, index); its attribute `groups`, if it has one, is passed to `TrainBatches`. None
            means validation only.
        val: map-style data set that takes an index.
        batch_size: the global training batch.
        epochs: passes over `train`, not necessarily an integer. Together they are one Lightning epoch, so that validation intervals are
            fractions of the training, or steps.
        seed: fixes the order of the training samples.
        workers: processes that load data, for each device.
        val_batch_size: images per validation batch on one device.
        collate: merges samples into a batch; None means torch's default.
        root: folder of the data set; the configuration passes it to `train` and `val`.
    """

    def __init__(
        self,
        train: Any,
        val: SizedDataset,
        *,
        batch_size: int,
        epochs: float,
        seed: int = 0,
        workers: int = 0,
        val_batch_size: int = 1,
        collate: Callable | None = None,
        root: str | None = None,
    ) -> None:
        super().__init__()
        self.train, self.val, self.epochs, self.seed, self.root = train, val, epochs, seed, root
        self.batch_size, self.val_batch_size, self.workers, self.collate = batch_size, val_batch_size, workers, collate
        self.start = 0

    def state_dict(self) -> dict[str, int]:
        """Return the number of batches that the saved weights have seen."""
        return {"batches": self._attached().fit_loop.epoch_loop.batch_progress.total.processed}  # pyright: ignore[reportAttributeAccessIssue]

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next training loader continue after those batches."""
        self.start = state_dict["batches"]

    def _attached(self) -> L.Trainer:
        """Return the trainer, which exists while Lightning calls the methods of the module."""
        assert self.trainer is not None
        return self.trainer

    def _loader(self, data: Any, **options: Any) -> DataLoader:
        # with its own generator, an iterator does not draw from torch's global generator, which the checkpoint restores
        generator = torch.Generator().manual_seed(self.seed)
        pin_memory = torch.cuda.is_available()
        collate = functools.partial(merge, collate=self.collate or default_collate)
        return DataLoader(data, num_workers=self.workers, collate_fn=collate, generator=generator, pin_memory=pin_memory, **options)

    def train_dataloader(self) -> DataLoader:
        """Return a loader whose single pass is the whole training."""
        trainer = self._attached()
        batches = TrainBatches(
            len(self.train),
            self.batch_size,
            epochs=self.epochs,
            seed=self.seed,
            accumulate=trainer.accumulate_grad_batches,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            groups=getattr(self.train, "groups", None),
        )
        batches.start = self.start
        return self._loader(self.train, batch_sampler=batches)

    def val_dataloader(self) -> DataLoader:
        """Return a loader of every validation sample once, over all processes."""
        trainer = self._attached()
        sampler = EvalIndices(self.val, trainer.global_rank, trainer.world_size)
        return self._loader(self.val, batch_size=self.val_batch_size, sampler=sampler)


def get_data(trainer: L.Trainer) -> Data:
    """Return the data module of a trainer."""
    return trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]

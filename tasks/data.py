"""Batches keyed by (epoch, index): the same whatever the number of workers or devices, and resumable at any batch."""

from collections.abc import Callable, Iterator, Sequence, Sized

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, Sampler


class TrainBatches(Sampler[list[tuple[int, int]]]):
    """Every batch of a whole training, as lists of (epoch, index) keys in a shuffled order fixed by (seed, epoch).

    All epochs form one stream, so that a run continues at any batch by setting `start`. A global batch is cut into `accumulate` parts
    for each of `world_size` processes; one process without accumulation sees the same samples at every optimizer step.

    Args:
        length: samples of the data set; an epoch leaves out what does not fill a global batch.
        batch_size: *global* batch, samples per optimizer step.
        epochs: passes over the data set, the last one cut off where they are not a whole number.
        seed: fixes the order.
        accumulate: batches per optimizer step.
        rank, world_size: this process among those that share a global batch.
        groups: a kind of every sample, upright or not for instance, or None. Samples then come in pairs of a kind, and a global batch is
            ordered by kind, so that its parts are of one kind wherever they can: less is padded.

    Raises:
        ValueError: the global batch does not divide by devices x accumulation, or is larger than the data set.
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
                f"batch_size is the global batch and must be a multiple of devices x accumulation, "
                f"got {batch_size} for {world_size} x {accumulate}"
            )
        self.length, self.batch_size, self.epochs, self.seed, self.groups = length, batch_size, epochs, seed, groups
        if batch_size > length:
            raise ValueError(f"batch_size must not exceed the training samples, got {batch_size} for {length} samples")
        self.accumulate, self.rank, self.world_size = accumulate, rank, world_size
        self.start = 0

    def __len__(self) -> int:
        """Batches of the whole training, those before `start` included."""
        return round(self.epochs * (self.length // self.batch_size)) * self.accumulate

    def _order(self, epoch: int) -> list[int]:
        """The samples of an epoch in their order."""
        generator = torch.Generator().manual_seed(hash((self.seed, epoch)) % 2**63)
        order = torch.randperm(self.length, generator=generator).tolist()
        if self.groups is None:
            return order
        waiting, pairs = {}, []
        for index in order:
            # a pair is where its second sample was
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
    """This process's share of the indices, each exactly once over all processes (no padding)."""

    def __init__(self, data: Sized, rank: int, world_size: int) -> None:
        self.indices = range(rank, len(data), world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


class Data(L.LightningDataModule):
    """Training and validation sets of one task.

    Args:
        train: map-style data set that takes keys (epoch, index), with `TrainBatches`' groups as attribute `groups` if it has any; None to
            validate only.
        val: map-style data set that takes an index.
        batch_size: global training batch.
        epochs: passes over `train`, not always a whole number; together one Lightning epoch, so validation intervals are fractions of the
            training or steps.
        seed: fixes the order of the training samples.
        workers: processes that load data, for each device.
        val_batch_size: images per validation batch on one device.
        collate: merges samples into a batch; torch's default if None.
        root: folder of the data set, which the configuration hands on to `train` and `val`.
    """

    def __init__(
        self,
        train: Dataset | None,
        val: Dataset,
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
        """Batches that the saved weights have seen."""
        return {"batches": self.trainer.fit_loop.epoch_loop.batch_progress.total.processed}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next training loader continue behind those batches."""
        self.start = state_dict["batches"]

    def _loader(self, data: Dataset, **options) -> DataLoader:
        # a generator of its own: torch's global one, which the checkpoint restores, is not drawn from by an iterator
        generator = torch.Generator().manual_seed(self.seed)
        pin_memory = torch.cuda.is_available()
        return DataLoader(data, num_workers=self.workers, collate_fn=self.collate, generator=generator, pin_memory=pin_memory, **options)

    def train_dataloader(self) -> DataLoader:
        """One pass of this loader is the whole training."""
        batches = TrainBatches(
            len(self.train),
            self.batch_size,
            epochs=self.epochs,
            seed=self.seed,
            accumulate=self.trainer.accumulate_grad_batches,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            groups=getattr(self.train, "groups", None),
        )
        batches.start = self.start
        return self._loader(self.train, batch_sampler=batches)

    def val_dataloader(self) -> DataLoader:
        """Every validation sample once."""
        sampler = EvalIndices(self.val, self.trainer.global_rank, self.trainer.world_size)
        return self._loader(self.val, batch_size=self.val_batch_size, sampler=sampler)

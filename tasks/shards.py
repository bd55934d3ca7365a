"""WebDataset shards: tar files that are read as streams, for clusters and object stores. They need webdataset."""

import io
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info
from torchvision.transforms.v2 import functional as F

from .data import Data, SizedDataset, TrainBatches
from .images import ReadOptions, is_hidden, lift_size_limit, read_image
from .keyed import keyed_rng

IMAGES = ("jpg", "jpeg", "png", "webp")

# Labels are tensors of 64 bits.
LARGEST_LABEL = 2**63 - 1


def _is_visible(name: str) -> bool:
    return not any(is_hidden(part) for part in name.split("/"))


def _read_shard(name: str) -> Iterator[dict]:
    """Yield the samples of a shard; names in the archive are only keys, and links in it are ignored."""
    from webdataset.tariterators import tarfile_samples

    try:
        yield from tarfile_samples(iter([{"url": name}]), select_files=_is_visible)
    except FileNotFoundError:
        raise FileNotFoundError(f"shard {name} does not exist") from None
    # what is raised for damaged archives depends on their compression; webdataset adds to the arguments
    except Exception as error:
        raise ValueError(f"shard {name} cannot be read: {error.args[0] if error.args else error}") from error


class Shards(IterableDataset):
    """Training stream of `batches` batches (images [size, 3, H, W] float32 in [0, 1], labels [size]).

    A sample of a shard is an image (jpg, jpeg, png, webp) and the number of its class (cls) under one name. Every process and worker reads
    its own shards, in an order fixed by (seed, epoch), through a buffer that shuffles samples.

    A training that continues at batch `start` skips the shards that were already read. It continues at the beginning of a shard, so that
    one epoch repeats some samples and omits others. Data sets that are not streams continue exactly.

    Args:
        shards: names, paths or addresses, as webdataset opens them; "train-{0000..0127}.tar" means 128.
        transforms: maps a PIL image to another; its randomness is a function of (seed, epoch, name of the sample).
        seed: fixes orders and transforms.
        buffer: the number of samples in the shuffling buffer.
        classes: the number of classes; None allows any label.
        ignore_orientation, allow_huge: see `carafepp.tasks.images.ReadOptions`.

    Raises:
        ModuleNotFoundError: webdataset is missing.
        ValueError: there are fewer shards than readers, a shard is damaged, or an image or a label cannot be used; the message then names
            shard and sample.
    """

    def __init__(
        self,
        shards: str,
        transforms: Callable[[Image.Image], Image.Image] | None = None,
        seed: int = 0,
        buffer: int = 2000,
        classes: int | None = None,
        *,
        ignore_orientation: bool = False,
        allow_huge: bool = False,
    ) -> None:
        try:
            from webdataset.shardlists import expand_urls
        except ModuleNotFoundError:
            raise ModuleNotFoundError("shards need webdataset: pip install '.[shards]' in a checkout", name="webdataset") from None
        self.names, self.transforms, self.seed, self.buffer = list(expand_urls(shards)), transforms, seed, buffer
        self.classes = classes
        self.reading: ReadOptions = {"ignore_orientation": ignore_orientation, "allow_huge": allow_huge}
        self.batches = self.start = 0
        self.batch_size = self.samples_a_shard = self.world_size = 1
        self.rank = 0

    def __len__(self) -> int:
        """Return the number of batches of the whole training on this device, including those before `start`."""
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = get_worker_info()
        index, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        if self.world_size * workers > len(self.names):
            raise ValueError(
                f"every reader needs a shard, got {len(self.names)} shards for {self.world_size} processes x {workers} workers"
            )
        samples = self._samples(self.rank * workers + index, self.world_size * workers, self.start // workers)
        # the loader takes one batch of each worker in turn
        for _ in range(self.start + index, self.batches, workers):
            yield default_collate([next(samples) for _ in range(self.batch_size)])

    def _samples(self, reader: int, readers: int, batches_read: int) -> Iterator[tuple[Tensor, int]]:
        from webdataset.filters import shuffle

        shards_read = int(batches_read * self.batch_size / self.samples_a_shard)
        epoch, skipped = divmod(shards_read, len(self.names[reader::readers]))
        while True:
            names = list(self.names)
            random.Random(hash((self.seed, epoch))).shuffle(names)
            stream = (sample for name in names[reader::readers][skipped:] for sample in _read_shard(name))
            empty = True
            for sample in shuffle(self.buffer, rng=random.Random(hash((self.seed, epoch, reader))))(stream):
                empty = False
                yield self._decode(epoch, sample)
            if empty:
                raise ValueError(f"shards {', '.join(names[reader::readers])} hold no sample")
            epoch, skipped = epoch + 1, 0

    def _decode(self, epoch: int, sample: dict) -> tuple[Tensor, int]:
        where = f"sample {sample['__key__']} of shard {sample['__url__']}"
        data = next((sample[kind] for kind in IMAGES if kind in sample), None)
        if data is None or not sample.get("cls", b"").strip().isdigit():
            found = ", ".join(sorted(key for key in sample if not key.startswith("__")))
            raise ValueError(f"{where} must hold an image ({', '.join(IMAGES)}) and the number of its class (cls), got {found}")
        label = int(sample["cls"].strip()[:20])
        if label >= (self.classes or LARGEST_LABEL + 1):
            raise ValueError(
                f"{where} has the class {label}, classes must be in 0..{(self.classes or LARGEST_LABEL + 1) - 1} (num_classes)"
            )
        try:
            image = read_image(io.BytesIO(data), **self.reading)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if self.transforms is not None:
            key = int.from_bytes(sample["__key__"].encode())
            with keyed_rng(self.seed, epoch, key), lift_size_limit(self.reading.get("allow_huge", False)):
                image = self.transforms(image)
        return F.to_dtype(F.pil_to_tensor(image), torch.float32, scale=True), label


class ShardData(Data):
    """Training from shards, validation from a map-style data set; `length` is the number of training samples.

    Raises:
        ValueError: the global batch does not divide by devices x accumulation, or exceeds `length`.
    """

    def __init__(self, train: Shards, val: SizedDataset, *, length: int, **options: Any) -> None:
        super().__init__(train, val, **options)
        self.length = length

    def train_dataloader(self) -> DataLoader:
        """Return a loader whose single pass is the whole training."""
        train, trainer = self.train, self._attached()
        accumulate, train.rank, train.world_size = trainer.accumulate_grad_batches, trainer.global_rank, trainer.world_size
        # a stream only needs the number of batches from TrainBatches
        train.batches = len(
            TrainBatches(
                self.length, self.batch_size, epochs=self.epochs, seed=self.seed, accumulate=accumulate, world_size=train.world_size
            )
        )
        train.start = self.start
        train.batch_size = self.batch_size // (train.world_size * accumulate)
        train.samples_a_shard = self.length / len(train.names)
        return DataLoader(train, batch_size=None, num_workers=self.workers, pin_memory=torch.cuda.is_available())

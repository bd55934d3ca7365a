"""Averaging of weights over the steps of a training."""

import lightning as L
from lightning.pytorch.callbacks import EMAWeightAveraging


class WeightAverage(EMAWeightAveraging):
    """Callback that validates, stores and scores an exponential moving average of the weights instead of the weights of the last step.

    The average includes the statistics of norms. A checkpoint holds the average as the weights of the network, and the weights of its step
    for a training that continues.

    Args:
        decay: share of the average that one step keeps, in 0..1: 0.99 averages over about 100 steps.

    Raises:
        ValueError: `decay` is not between 0 and 1.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"averaging must be a decay of at least 0 and below 1, such as 0.99, or null, got {decay}")
        super().__init__(decay=decay)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Create the average on the device of the training, to which Lightning moves the network later."""
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Use the average, too, if the training continues from its last step and therefore has no `on_train_end`."""
        self.on_train_end(trainer, pl_module)

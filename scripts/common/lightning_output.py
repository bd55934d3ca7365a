"""What Lightning says during a run."""

import logging
import warnings


def silence_lightning() -> None:
    """Leave out what Lightning says of hardware, tips and its own internals; its warnings about the run stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\)")
    warnings.filterwarnings("ignore", message="The '.*_dataloader' does not have many workers")
    # it is: the data module's state is the position in the stream
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
    warnings.filterwarnings("ignore", message="The `srun` command is available")

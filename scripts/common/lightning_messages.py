"""Lightning's messages that a run does not show."""

import logging
import warnings


def silence_lightning() -> None:
    """Hide Lightning's messages about hardware, tips and its own internals; its warnings about the run still appear."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\)")
    warnings.filterwarnings("ignore", message="The '.*_dataloader' does not have many workers")
    # the data module stores its position in the stream, so that such a run continues exactly
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
    warnings.filterwarnings("ignore", message="The `srun` command is available")

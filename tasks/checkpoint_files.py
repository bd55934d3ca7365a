"""Writing of checkpoints: a reader finds the earlier file or the whole new one."""

import io
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from .writing import replace_file


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's way to checkpoint files, with `replace_file`.

    Lightning itself writes to the system's folder of temporary files. If that is on another disk, a kill or a full disk during the copy
    cuts the earlier checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint and flush it to the disk."""
        # PyTorch's writer would turn the error of a full disk into one without a reason
        content = io.BytesIO()
        torch.save(checkpoint, content)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replace_file(Path(path), "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())

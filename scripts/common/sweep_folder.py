"""The folder of a sweep, which the command needs when the sweep has ended."""

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

# of the sweeps that this process has started
started: list[Path] = []


class SweepFolder(Callback):
    """Callback of Hydra that notes the folder of a sweep."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note the folder."""
        started.append(Path(config.hydra.sweep.dir))

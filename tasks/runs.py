"""The files of a run: metrics.csv, result.json, last.ckpt, best.ckpt, and per_class.csv and per_class.png if the task scores its classes.

A checkpoint is written between two optimizer steps. Besides weights and optimizer it holds the position in the data, the states of the
random generators and the rows of metrics.csv, so that a killed run continues exactly where it was.
"""

import contextlib
import hashlib
import json
import logging
import math
import platform
import random
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import save_image

from .class_pictures import draw_scores
from .data import get_data
from .task import Task
from .writing import replace_file, write_atomically, write_csv

log = logging.getLogger(__name__)


def write_classes(folder: Path, rows: list[dict]) -> None:
    """Write the scores of the classes, see `Task.per_class`, as a table to per_class.csv and as a picture to per_class.png."""
    write_csv(folder / "per_class.csv", rows)
    with replace_file(folder / "per_class.png", "wb") as file:
        save_image(draw_scores(rows), file, format="png")


def hash_weights(model: nn.Module) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes of the state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def count_flops(model: nn.Module, image: torch.Tensor) -> int:
    """Count the floating-point operations, two for each multiply-add, of one inference on an image [3, H, W].

    The FLOPs of a task are counted in its context `Task.full_load`.
    """
    training, load = model.training, model.full_load() if isinstance(model, Task) else contextlib.nullcontext()
    # a compiled network hides its operators from the counter
    with torch.no_grad(), load, torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        model.eval()(image[None])
    model.train(training)
    return counter.get_total_flops()


class BestCheckpoint(ModelCheckpoint):
    """Callback that writes `folder`/best.ckpt after each validation whose score is the best of the run.

    Of its state, a resumed run takes the score alone. Lightning also restores the paths in this state and deletes the files that they
    name, which can be any files if the checkpoint is from elsewhere.

    Args:
        folder: the run folder.
        monitor, direction: see `Task`.
    """

    def __init__(self, folder: str | Path, monitor: str, direction: str) -> None:
        # a single validation, at the end of the epoch, is no exception: a run that continues after it does not end the epoch again
        options: Any = {"enable_version_counter": False, "save_on_train_epoch_end": False}
        super().__init__(folder, filename="best", monitor=monitor, mode=direction, **options)

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint: that of Lightning's class, as in checkpoints of version 0.1.0."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the best score."""
        return {"best_model_score": self.best_model_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score of a run whose best.ckpt is in the folder."""
        score, path = state_dict["best_model_score"], self.format_checkpoint_name({})
        if score is not None and Path(path).is_file():
            self.best_model_score = self.kth_value = score
            self.best_k_models = {path: score}
            self.best_model_path = self.kth_best_model_path = path


class LastCheckpoint(Checkpoint):
    """Callback that writes `folder`/last.ckpt every `every_n_steps` optimizer steps and after each validation.

    Lightning calls it after `BestCheckpoint`, so that last.ckpt holds the best score when best.ckpt does.
    If a validation follows a step, the checkpoint is written after it, because Lightning does not repeat an interrupted validation.
    """

    def __init__(self, folder: str | Path, every_n_steps: int) -> None:
        self.path, self.every_n_steps = Path(folder) / "last.ckpt", every_n_steps

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write the checkpoint at every `every_n_steps`-th optimizer step, unless a validation follows."""
        done = batch_idx + 1
        at_step = done % trainer.accumulate_grad_batches == 0
        validates = done % trainer.val_check_batch == 0  # pyright: ignore[reportOperatorIssue]
        if at_step and not validates and trainer.global_step % self.every_n_steps == 0:
            trainer.save_checkpoint(self.path, weights_only=False)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the checkpoint after a validation during training."""
        if trainer.state.fn == "fit":
            trainer.save_checkpoint(self.path, weights_only=False)


class RandomState(L.Callback):
    """Callback that stores the states of the random generators in checkpoints and restores them."""

    def __init__(self) -> None:
        self.restored: dict | None = None

    def state_dict(self) -> dict:
        """Return the states of the random generators as tensors and primitives."""
        numpy_state: Any = np.random.get_state()
        kind, keys, position, has_gauss, gauss = numpy_state
        return {
            "python": random.getstate(),
            "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Keep the states until the training starts."""
        self.restored = state_dict

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the random generators of an interrupted run."""
        if self.restored is None:
            return
        state, self.restored = self.restored, None
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"].cpu())
        if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


class RunRecord(L.Callback):
    """Callback that writes metrics.csv during training and result.json at its end.

    Args:
        folder: the run folder.
        log_every_n_steps: optimizer steps between two rows of training metrics.
        config: the resolved configuration, which is stored in every checkpoint; its entry "run" (choices, overrides) identifies the run.
    """

    def __init__(self, folder: str | Path, log_every_n_steps: int, config: dict) -> None:
        self.folder, self.log_every_n_steps, self.config = Path(folder), log_every_n_steps, config
        self.rows: list[dict] = []
        self.spent = {"seconds": 0.0, "cpu_seconds": 0.0}
        # a run that continues from its last step has no on_train_start
        self.started = self._clocks()

    @staticmethod
    def _clocks() -> dict[str, float]:
        # cpu_seconds sums over all threads and does not advance while other programs use the processor
        return {"seconds": time.monotonic(), "cpu_seconds": time.process_time()}

    def _spent(self) -> dict[str, float]:
        """Return the wall-clock and CPU seconds, including those before an interruption."""
        return {name: round(self.spent[name] + now - self.started[name], 1) for name, now in self._clocks().items()}

    def state_dict(self) -> dict:
        """Return the rows of metrics.csv and the time spent."""
        return {"rows": self.rows, "spent": self._spent()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Continue the rows and the time of an interrupted run."""
        self.rows, self.spent = state_dict["rows"], state_dict["spent"]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict) -> None:
        """Add the configuration of the run to its checkpoint."""
        checkpoint["config"] = self.config

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clocks."""
        self.started = self._clocks()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clocks: the time of the training is without that of the pictures."""
        self.spent, self.started = self._spent(), self._clocks()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add the training's metrics to metrics.csv at every `log_every_n_steps`-th optimizer step."""
        at_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if at_step and trainer.global_step % self.log_every_n_steps == 0:
            self._add(trainer, "train/", {"lr": trainer.optimizers[0].param_groups[0]["lr"]})

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the validation's metrics to metrics.csv, and write the scores of the classes."""
        if trainer.state.fn == "fit":
            assert isinstance(pl_module, Task)
            self._add(trainer, "val/", {})
            if trainer.is_global_zero and pl_module.per_class:
                write_classes(self.folder, pl_module.per_class)

    def _add(self, trainer: L.Trainer, prefix: str, more: dict) -> None:
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}
        self.rows.append({"step": trainer.global_step, **metrics, **more})
        # the scores of a validation may be undefined, and its losses may not
        losses = {name: value for name, value in metrics.items() if prefix == "train/" or name.endswith("loss")}
        if lost := [name for name, value in losses.items() if not math.isfinite(value)]:
            log.warning(
                "step %d: %s is NaN or infinite; if it stays so, the training has diverged: lower optimizer.lr",
                trainer.global_step,
                lost[0],
            )
        log.info("step %d: %s", trainer.global_step, ", ".join(f"{name} {value:.6g}" for name, value in (metrics | more).items()))
        if trainer.is_global_zero:
            write_csv(self.folder / "metrics.csv", self.rows)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write result.json."""
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, Task)
        image = trainer.precision_plugin.convert_input(get_data(trainer).val[0][0]).to(pl_module.device)
        if pl_module.flops_size:
            image = image.new_zeros(3, *pl_module.flops_size)
        result = {
            **self.config["run"],
            "seed": self.config["seed"],
            "metrics": {name: value for row in self.rows for name, value in row.items() if name.startswith("val/")},
            "curve": [row for row in self.rows if any(name.startswith("val/") for name in row)],
            "steps": trainer.global_step,
            **self.spent,
            "parameters": sum(p.numel() for p in pl_module.model.parameters()),
            "flops": count_flops(pl_module, image),
            "flops_input": list(image.shape),
            "weights_sha256": hash_weights(pl_module),
            "versions": {"python": platform.python_version()} | {name: version(name) for name in ("carafepp", "torch", "lightning")},
        }
        write_atomically(self.folder / "result.json", json.dumps(result, indent=2) + "\n")

"""Parameter groups and learning-rate schedules that torch does not have."""

import warnings
from bisect import bisect_right
from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


def group_parameters(model: nn.Module) -> list[dict]:
    """Divide the trainable parameters into matrices, with weight decay, and vectors (norms, biases, DPP's exponents), without.

    Goyal et al. (section 5.1) and UperNet exempt norms and biases from weight decay, and Saeedan et al. exempt DPP's exponents.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed, kept = ([p for p in trainable if (p.ndim > 1) == matrix] for matrix in (True, False))
    return [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]


def fast_forward(schedule: LRScheduler, steps: int) -> None:
    """Bring a new schedule, and the rates of its optimizer, to where they are after `steps` steps of a training."""
    for group, rate in zip(schedule.optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate
    with warnings.catch_warnings():
        # the steps of the optimizer belong to an earlier process
        warnings.filterwarnings("ignore", message=r".*`lr_scheduler\.step\(\)` before `optimizer\.step\(\)`")
        for _ in range(steps):
            schedule.step()


def linear_scaling(
    optimizer: Optimizer,
    total_iters: int,
    *,
    batch_size: int,
    reference_batch: int = 256,
    epochs: float = 90,
    warmup_epochs: float = 5,
    milestones: Sequence[float] = (30, 60, 80),
    gamma: float = 0.1,
) -> LambdaLR:
    """Build Goyal et al.'s schedule (2017): scaling with the batch, warm-up and milestones; step it after every optimizer step.

    The optimizer's rate is that of `reference_batch` images. The schedule raises it linearly by the factor batch_size / reference_batch (a
    smaller batch starts at its final rate) and multiplies it by `gamma` at each milestone. torch's LinearLR does not allow factors above 1.

    Args:
        total_iters: steps of the training.
        batch_size: the global batch.
        epochs: length of the training to which `warmup_epochs` and `milestones` refer; they scale with the actual length.
    """
    scale, per_epoch = batch_size / reference_batch, total_iters / epochs
    return _warmup_and_steps(optimizer, min(scale, 1), scale, warmup_epochs * per_epoch, [m * per_epoch for m in milestones], gamma)


def stepped(
    optimizer: Optimizer,
    total_iters: int,
    *,
    epochs: float = 12,
    milestones: Sequence[float] = (8, 11),
    gamma: float = 0.1,
    warmup_iters: int = 500,
    warmup_factor: float = 1 / 3,
) -> LambdaLR:
    """Build the 1x schedule of Detectron and MMDetection: linear warm-up and milestones; step it after every optimizer step.

    Args:
        total_iters: steps of the training.
        epochs: length of the training to which `milestones` refer; they scale with the actual length, so that 24 epochs give the 2x
            schedule.
        gamma: factor of the rate at each milestone.
        warmup_iters: steps in which the rate rises from `warmup_factor` of its value to its value; they do not scale.
    """
    return _warmup_and_steps(optimizer, warmup_factor, 1, warmup_iters, [m * total_iters / epochs for m in milestones], gamma)


def _warmup_and_steps(optimizer: Optimizer, start: float, end: float, warmup: float, milestones: Sequence[float], gamma: float) -> LambdaLR:
    """Build a schedule whose factor goes from `start` to `end` in `warmup` steps and is multiplied by `gamma` at each milestone."""

    def factor(step: int) -> float:
        done = min(step / warmup, 1) if warmup else 1
        return (start + (end - start) * done) * gamma ** bisect_right(milestones, step)

    return LambdaLR(optimizer, factor)

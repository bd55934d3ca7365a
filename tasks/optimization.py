"""Parameter groups and learning-rate schedules that torch does not bring."""

from torch import nn

# every norm of torch.nn is one of these
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def parameter_groups(model: nn.Module) -> list[dict]:
    """Trainable parameters in two groups: decayed, and not decayed (norms and biases: sections 5.1 of Goyal et al. and of UperNet)."""
    decayed, kept = [], []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                (kept if isinstance(module, NORMS) or name == "bias" else decayed).append(parameter)
    return [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]

"""The device that a command is given."""


def check_device(device: str) -> None:
    """Check that torch can use a device.

    Raises:
        ValueError: there is no such device; the message has torch's reason.
    """
    import torch

    try:
        usable = torch.empty(0, device=device).device.type != "meta"
        reason = "it computes nothing"
    # what torch raises depends on the device and on how it was built
    except Exception as error:
        usable, reason = False, str(error).partition("\n")[0]
    if not usable:
        raise ValueError(f"device must be cpu, or a device that torch finds, such as cuda or cuda:1, got {device}: {reason}")

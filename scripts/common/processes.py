"""The processes of one run, one for each device."""

import os

# set by torchrun, Lightning, Slurm and jsrun, in the order in which Lightning reads them
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def is_first_process() -> bool:
    """Return whether this process is the only one of a run, or the first of several."""
    return next((int(os.environ[name]) for name in RANKS if name in os.environ), 0) == 0

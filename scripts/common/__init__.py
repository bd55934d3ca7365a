"""Modules that several commands share: the Hydra application, checkpoints, run folders, sweeps, and options."""

"""What several commands use: the Hydra application, checkpoints, jobs of a sweep, overrides and choices of options."""

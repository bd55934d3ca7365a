"""carafepp-scenes: write scenes of digits on photographs to disk in the layout of a public data set."""

from omegaconf import DictConfig, OmegaConf

from ..tasks.layouts import write_scenes
from .common.app import app


@app("scenes")
def main(cfg: DictConfig) -> None:
    """Write the scenes that the configuration describes; called again, write those that are missing."""
    write_scenes(**OmegaConf.to_container(cfg, throw_on_missing=True))


if __name__ == "__main__":
    main()

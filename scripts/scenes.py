"""carafepp-scenes: write scenes of digits on photographs in the layout of a public data set."""

from omegaconf import DictConfig, OmegaConf

from ..tasks.layouts import write_scenes
from .common.app import app


@app("scenes")
def main(cfg: DictConfig) -> None:
    """Write the scenes of the configuration that do not exist yet."""
    write_scenes(**OmegaConf.to_container(cfg, throw_on_missing=True))


if __name__ == "__main__":
    main()

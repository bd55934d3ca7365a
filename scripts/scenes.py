"""carafepp-scenes: write scenes of digits on photographs in the layout of a public data set."""

from omegaconf import DictConfig

from .common.app import app
from .common.options import read_options


@app("scenes")
def main(cfg: DictConfig) -> None:
    """Write the scenes of the configuration that do not exist yet."""
    from ..tasks.layouts import write_scenes

    write_scenes(**read_options(cfg))


if __name__ == "__main__":
    main()

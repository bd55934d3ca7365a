"""carafepp-export: the network of a checkpoint as a file for other programs."""

from omegaconf import DictConfig

from .common.app import app


@app("export")
def main(cfg: DictConfig) -> None:
    """Export the network of a checkpoint."""
    from .exporting.export import write_export

    write_export(cfg)


if __name__ == "__main__":
    main()

"""carafepp-predict: predictions of trained networks for given photographs, side by side, or their reassembly regions."""

from omegaconf import DictConfig

from .common.app import app


@app("predict")
def main(cfg: DictConfig) -> None:
    """Draw the prediction or the reassembly regions of every image."""
    from .running.predict import predict

    predict(cfg)


if __name__ == "__main__":
    main()

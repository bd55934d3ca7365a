"""carafepp-eval: the scores of a checkpoint."""

from omegaconf import DictConfig

from .common.app import app


@app("eval")
def main(cfg: DictConfig) -> None:
    """Validate a checkpoint and write its scores."""
    from .running.eval import evaluate

    evaluate(cfg)


if __name__ == "__main__":
    main()

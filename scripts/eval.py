"""carafepp-eval: the scores of a checkpoint."""

import json
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from ..tasks.runs import write_atomically
from .app import app, load_task, quiet


@app("eval")
def main(cfg: DictConfig) -> None:
    """Validate a checkpoint and write its scores to eval.json."""
    quiet()
    task, run = load_task(cfg.checkpoint)
    data = instantiate(cfg.data if cfg.get("data") else run.data)
    trainer = instantiate(cfg.trainer, enable_checkpointing=False)
    scores = trainer.validate(task, data, verbose=False)[0]
    folder = Path(HydraConfig.get().runtime.output_dir)
    write_atomically(folder / "eval.json", json.dumps({"checkpoint": str(cfg.checkpoint), "metrics": scores}, indent=2) + "\n")
    for name, value in scores.items():
        print(f"{name:24s} {value:.4f}")
    print(f"written to {folder / 'eval.json'}")


if __name__ == "__main__":
    main()

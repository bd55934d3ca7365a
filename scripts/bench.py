"""carafepp-bench: the operator beside its rivals, in one process and in turns; `carafepp-bench samplers` measures the samplers,
`carafepp-bench models` the networks of the paper's tables."""

import importlib
import sys

PARTS = ("samplers", "models", "growth")


def main() -> None:
    """Run carafepp-bench, or its samplers, models or growth."""
    part = sys.argv.pop(1) if sys.argv[1:] and sys.argv[1] in PARTS else "operator"
    importlib.import_module(f".benching.{part}", __package__).main()


if __name__ == "__main__":
    main()

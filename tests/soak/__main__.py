"""Run parts of the soak, print what they counted, and end with a non-zero exit status if a case failed."""

import argparse
import importlib
import signal
import sys

from soak import findings

PARTS = ["trainings", "operator", "files"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__)
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--minutes", type=float, default=10, help="minutes for all parts together; 0 runs one case of each part")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case; the following cases count up from it")
    given = parser.parse_args()
    # a shell that starts a job in the background makes it ignore Ctrl-C, and the processes that it starts would ignore it too
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parts = PARTS if given.part == "all" else [given.part]
    interrupted = False
    for part in parts:
        counts = {}
        try:
            counts = importlib.import_module(f"soak.{part}").run(given.minutes / len(parts), given.seed)
        except KeyboardInterrupt:
            interrupted = True
        print(f"{part}:", *(f"  {name}: {count}" for name, count in counts.items()), sep="\n")
        if interrupted or counts.get("interrupted"):
            break
    print(f"failures: {len(findings.failures)}", *findings.failures, sep="\n")
    sys.exit(bool(findings.failures))


if __name__ == "__main__":
    main()

"""Random calls of the operator on its backends, against the definition in float64."""

from collections import Counter

from soak import workers

# "cpu" is the C++ kernel, "torch" replaces it without a compiler, "triton" runs in Triton's interpreter
BACKENDS = ("cpu", "torch", "triton")


def run(minutes: float, seed: int) -> dict[str, int]:
    """Run random calls (see calls.py) on every backend for a third of the time, and return the numbers of cases by backend."""
    counts: Counter[str] = Counter()
    for backend in BACKENDS:
        counts.update(run_backend(backend, minutes / len(BACKENDS), seed))
    return dict(counts)


def run_backend(backend: str, minutes: float, seed: int) -> Counter[str]:
    """Run random calls on one backend."""
    interpreted = backend == "triton"
    found = workers.run_cases(
        "operator",
        "calls",
        backend,
        minutes=minutes,
        seed=seed,
        seconds=900 if interpreted else 300,
        environment={"TRITON_INTERPRET": "1"} if interpreted else {},
    )
    return Counter({f"{backend}: {what}": number for what, number in found.items()})

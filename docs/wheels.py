"""The packages that `make gpu` needs and an image for GPUs may lack: `make wheels` downloads them, `make gpu` installs them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
WHEELS = ROOT / "wheels"
# distributions by the name of their import
PACKAGES = {
    "hydra": "hydra-core>=1.3.8,<1.4",
    "omegaconf": "omegaconf>=2.2,<2.4",
    "antlr4": "antlr4-python3-runtime==4.9.3",
    "yaml": "pyyaml",
    "torchmetrics": "torchmetrics",
    "lightning_utilities": "lightning-utilities",
    "pycocotools": "pycocotools",
    "packaging": "packaging",
    "filelock": "filelock",
    "tqdm": "tqdm",
    "numpy": "numpy",
    "PIL": "pillow",
    "hypothesis": "hypothesis",
    "sortedcontainers": "sortedcontainers",
    "xdist": "pytest-xdist",
    "execnet": "execnet",
}
# these are published as source only
FROM_SOURCE = ("antlr4",)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def download_wheels(version: str, folder: Path = WHEELS) -> None:
    """Download the wheels of all packages for a version of Python, such as "3.12", on Linux; build those that have none."""
    folder.mkdir(exist_ok=True)
    pip = [sys.executable, "-m", "pip"]
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    published = [name for module, name in PACKAGES.items() if module not in FROM_SOURCE]
    options = ["--python-version", version, *platforms, "--only-binary", ":all:", "--no-deps", "--dest", str(folder)]
    subprocess.run([*pip, "download", "--quiet", *options, *published], check=True)
    sources = [PACKAGES[module] for module in FROM_SOURCE]
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), *sources], check=True)


def find_packages(folder: Path) -> dict[str, str]:
    """Return the environment in which commands find all packages; those that the interpreter lacks are installed into a folder.

    They come from wheels/ if it exists, and else from PyPI. A line says which could not be installed.
    """
    missing = {module: name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None}
    source = ["--no-index", "--find-links", str(WHEELS)] if WHEELS.exists() else []
    for name in missing.values():
        line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *source, name]
        if subprocess.run(line).returncode:
            print(f"{name} is missing and could not be installed from {'wheels/' if source else 'PyPI'}; see `make wheels`", flush=True)
    paths = [str(ROOT), str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if "xdist" not in missing or (folder / "xdist").exists():
        # for most of the time of the tests, the processor compiles kernels
        environment.setdefault("PYTEST_ADDOPTS", f"-n {min(12, os.cpu_count() or 1)} --dist worksteal")
    return environment


if __name__ == "__main__":
    download_wheels(sys.argv[1])

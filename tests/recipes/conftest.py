"""The packages of the recipes stay offline and write only to folders of the tests."""

from collections.abc import Iterator

import pytest
from recipe_page import OFFLINE


@pytest.fixture(scope="session", autouse=True)
def offline(tmp_path_factory) -> Iterator[None]:
    """Set what the packages read when they are imported."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**OFFLINE, "YOLO_CONFIG_DIR": str(tmp_path_factory.mktemp("ultralytics"))}.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch) -> None:
    """Run each test in a folder of its own, where a recipe may write."""
    monkeypatch.chdir(tmp_path)

"""The code of docs/recipes.md, run with the real packages, and its table of networks."""

import copy
import tomllib
from pathlib import Path

import pytest
import torch
from carafepp.integrations.signatures import CARAFEPack, YoloCARAFE
from carafepp.models.carafe import CARAFE
from recipe_page import HEAD, PACKAGES, Recipe, check_recipe, format_row, read_recipes, read_rows

ROOT = Path(__file__).parent.parent.parent
RECIPES = {recipe.title: recipe for recipe in read_recipes()}
# packages warn of their own old habits
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


def find(title: str) -> Recipe:
    """Find a recipe; skip the test if its packages are not installed."""
    for name in sorted(RECIPES[title].modules):
        pytest.importorskip(name, reason=f"needs {name}, of the extra `recipes`")
    return RECIPES[title]


@pytest.mark.parametrize("title", RECIPES)
def test_recipe(title):
    recipe = find(title)
    pytest.importorskip("onnxruntime", reason="needs onnxruntime, of the extra `export`")
    row = check_recipe(recipe)
    written = read_rows().get(title)
    if row is None:
        assert written is None
    elif written and recipe.package not in written:
        pytest.skip(f"all works, but the table is that of another version than {recipe.package}")
    else:
        assert written == format_row(row), "python tests/support/recipe_page.py writes the table"


@pytest.mark.parametrize("title", RECIPES)
def test_recipe_is_short(title):
    assert len([line for line in RECIPES[title].code.splitlines() if line]) <= 20


def test_table_has_every_package():
    rows = read_rows().values()
    assert len(rows) >= 10
    assert all(any(f"| {package} " in row for row in rows) for package in PACKAGES.values())
    assert all(row.count(" | ") == len(HEAD) - 1 for row in rows)
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["recipes"]
    known = {"torch", "torchvision", "lightning"}
    # mmengine has the registry of mmcv
    assert {requirement.split(">")[0] for requirement in extra} - {"mmengine"} == set(PACKAGES.values()) - known


def test_unet_takes_images_of_any_size():
    network = find("segmentation_models_pytorch's Unet").run()["network"].eval()
    for size in ((96, 64), (32, 64)):
        assert network(torch.rand(1, 3, *size)).shape == (1, 5, *size)


def test_lightning_trains_and_loads(tmp_path):
    import lightning
    from torch.utils.data import DataLoader, TensorDataset

    names = find("Lightning").run()
    data = TensorDataset(torch.rand(4, 3, 64, 64), torch.randint(5, (4, 64, 64)))
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = lightning.Trainer(max_steps=1, accelerator="cpu", default_root_dir=tmp_path, **options)
    module = names["Segmentation"]()
    before = {name: p.clone() for name, p in module.named_parameters()}
    trainer.fit(module, DataLoader(data, batch_size=2))
    assert all(not torch.equal(p, before[name]) for name, p in module.named_parameters() if "content_encoder" in name)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = names["Segmentation"].load_from_checkpoint(tmp_path / "last.ckpt")
    torch.testing.assert_close(loaded.network.eval()(names["example"]), module.network.eval()(names["example"]))


def test_lightning_replaces_in_configure_model():
    import lightning
    from torch.utils.data import DataLoader, TensorDataset

    names = find("Lightning").run()

    class Late(names["Segmentation"]):
        def __init__(self):
            super().__init__()
            layers = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.MaxPool2d(2), torch.nn.Upsample(scale_factor=2)
            self.network = torch.nn.Sequential(*layers)

        def configure_model(self):
            self.network = names["replace"](self.network, up="carafe", down="carafe", example=torch.rand(1, 3, 16, 16)).model

        def validation_step(self, batch, index):
            self.training_step(batch, index)

    data = DataLoader(TensorDataset(torch.rand(2, 3, 16, 16), torch.randint(5, (2, 16, 16))), batch_size=2)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer, module = lightning.Trainer(max_steps=1, accelerator="cpu", **options), Late()
    trainer.fit(module, data)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    assert any("content_encoder" in name for name in state)
    trainer.validate(module, data, verbose=False)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert state.keys() == module.state_dict().keys()


def test_backbones_of_timm_under_a_pyramid():
    names = find("timm's backbones under UperNet and FPN").run()
    assert [tuple(level.shape) for level in names["levels"].values()] == [(2, 64, 64 // s, 64 // s) for s in (4, 8, 16, 32)]
    assert names["network"](names["example"]).shape == (2, 5, 16, 16)


@pytest.mark.parametrize("name", ["carafepp", "carafe"])
def test_registry_of_mmcv(name):
    names = find("mmcv's and mmengine's registry").run()
    assert isinstance(names["network"], CARAFEPack)
    registry = names["MODELS"]
    registry.register_module(name, module=CARAFEPack, force=True)
    layer = registry.build({**names["upsample_cfg"], "type": name, "channels": 8, "scale_factor": 2})
    # the names of mmcv's compiled module
    assert {key.split(".")[0] for key in layer.state_dict()} == {"channel_compressor", "content_encoder"}


def test_yaml_files_of_ultralytics():
    names = find("ultralytics' YAML files").run()
    samplers = [name for name, module in names["network"].named_modules() if isinstance(module, YoloCARAFE)]
    assert samplers == ["model.11", "model.14"]
    # what a training builds
    rebuilt = names["tasks"].DetectionModel(names["network"].yaml, verbose=False)
    assert list(rebuilt.state_dict()) == list(names["network"].state_dict())


def test_training_of_ultralytics_drops_replacements():
    network = find("ultralytics' networks in memory").run()["network"]
    assert any(isinstance(module, CARAFE) for module in network.modules())
    rebuilt = type(network)(network.yaml, verbose=False)
    assert not any(isinstance(module, CARAFE) for module in rebuilt.modules())


def test_fusing_of_ultralytics():
    names = find("ultralytics' networks in memory").run()
    network, example, replace = names["network"].eval(), names["example"], names["replace"]
    expected = network(example)[0]
    down = replace(copy.deepcopy(network), down="carafe", example=example).model
    torch.testing.assert_close(network.fuse(verbose=False)(example)[0], expected, rtol=1e-3, atol=1e-2)
    with pytest.raises(AttributeError, match="weight"):
        down.fuse(verbose=False)

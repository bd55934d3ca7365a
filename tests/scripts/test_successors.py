"""experiment=successors: the paper's settings with every sampler, each of which trains there."""

import pytest
import torch
import yaml
from configurations import CONF, choices, compose_config
from hydra.utils import instantiate
from torch.utils.data import default_collate

# the classifiers with a downsampler; backbones with another start from none
CLASSIFIERS = {
    "carafe": "table2/resnet50_carafe",
    **{name: f"pretraining/resnet50_{name}" for name in ("avg_pool", "dpp", "max_pool")},
}
UPSAMPLERS = [name for name in choices("upsampler") if name != "shared"]
DETECTION = [{"override /task": "detection"}, {"override /model": "faster_rcnn"}]
# every row: Tables IV, III and IX with one sampler; the backbone without one is that of fpn_published
ROWS = {
    **{f"fpn_{name}": {"defaults": [*DETECTION, {"override /upsampler": name}]} for name in UPSAMPLERS},
    **{
        f"backbone_{name}": {"defaults": [*DETECTION, {"override /downsampler": name}], "pretraining": CLASSIFIERS.get(name)}
        for name in choices("downsampler")
        if name != "published"
    },
    **{f"upernet_{name}": {"defaults": [{"override /upsampler": name}]} for name in UPSAMPLERS},
}


def test_rows_are_every_sampler_in_every_setting():
    """Every file of conf/upsampler and conf/downsampler has its rows: a new sampler needs conf/row/successors/SETTING_SAMPLER.yaml."""
    files = {path.stem: yaml.safe_load(path.read_text()) for path in (CONF / "row" / "successors").glob("*.yaml")}
    assert files == ROWS
    swept = yaml.safe_load((CONF / "experiment" / "successors.yaml").read_text())["hydra"]["sweeper"]["params"]["row"].split(",")
    assert sorted(swept) == sorted(f"successors/{row}" for row in ROWS)
    # the report compares with the first row of each kind
    assert swept.index("successors/fpn_published") == 0
    assert next(row for row in swept if "/upernet_" in row) == "successors/upernet_published"


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("row", ["fpn_lda_aqu", "fpn_freq_fusion", "backbone_a2u_pool", "backbone_hwd", "upernet_dlu", "upernet_jbu"])
def test_a_row_trains(row):
    torch.manual_seed(0)
    config = compose_config("train", "experiment=successors", f"row=successors/{row}", "scale=small", "data.train.length=2")
    task, data = instantiate(config.task), instantiate(config.data)
    optimizer = torch.optim.SGD(task.parameters(), lr=1e-3)
    batch = (data.collate or default_collate)([data.train[0, index] for index in range(2)])
    for _ in range(2):
        optimizer.zero_grad()
        loss = task.training_step(batch, 0)
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
    sampler = row.split("_", 1)[1].replace("_", "")
    samplers = [module for name, module in task.named_modules() if type(module).__name__.lower() == sampler]
    # three in a pyramid, seven in a backbone, and four in PPM, three in FPN and three in FUSE
    assert len(samplers) == {"fpn": 3, "backbone": 7, "upernet": 10}[row.split("_")[0]]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for module in samplers for parameter in module.parameters())

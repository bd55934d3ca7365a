"""mmdetection's detectors with CARAFE, written out for one image and one state dict."""

import math

import torch
import torch.nn.functional as F
from carafepp.models.carafe import CARAFE
from torch import Tensor
from torchvision.ops import nms, roi_align

CLASSES, PROPOSALS = 80, 40

MIN_SIZE, MAX_SIZE = 96, 150

BLOCKS = {1: 3, 2: 4, 3: 6, 4: 3}

STRIDES = (4, 8, 16, 32, 64)


def shapes(masks: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of `*_rcnn_r50_fpn_carafe_1x_coco`."""

    def conv(name: str, outputs: int, inputs: int, size: int) -> dict:
        return {f"{name}.weight": (outputs, inputs, size, size), f"{name}.bias": (outputs,)}

    def linear(name: str, outputs: int, inputs: int) -> dict:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def norm(name: str, channels: int) -> dict:
        values = {f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")}
        return {**values, f"{name}.num_batches_tracked": ()}

    def carafe(name: str) -> dict:
        return {**conv(f"{name}.channel_compressor", 64, 256, 1), **conv(f"{name}.content_encoder", 100, 64, 3)}

    found = {"backbone.conv1.weight": (64, 3, 7, 7), **norm("backbone.bn1", 64)}
    inputs = 64
    for layer, blocks in BLOCKS.items():
        width = 32 * 2**layer
        for block in range(blocks):
            name = f"backbone.layer{layer}.{block}"
            for i, (outs, ins, size) in enumerate(((width, inputs, 1), (width, width, 3), (4 * width, width, 1)), start=1):
                found |= {f"{name}.conv{i}.weight": (outs, ins, size, size), **norm(f"{name}.bn{i}", outs)}
            if block == 0:
                found |= {f"{name}.downsample.0.weight": (4 * width, inputs, 1, 1), **norm(f"{name}.downsample.1", 4 * width)}
            inputs = 4 * width
    for i in range(5):
        found |= conv(f"neck.lateral_convs.{i}.conv", 256, 256 * 2 ** min(i, 3), 1 if i < 4 else 3)
        found |= conv(f"neck.fpn_convs.{i}.conv", 256, 256, 3)
    for i in range(4):
        found |= carafe(f"neck.upsample_modules.{i}")
    found |= conv("rpn_head.rpn_conv", 256, 256, 3) | conv("rpn_head.rpn_cls", 3, 256, 1) | conv("rpn_head.rpn_reg", 12, 256, 1)
    head = "roi_head.bbox_head"
    found |= linear(f"{head}.fc_cls", CLASSES + 1, 1024) | linear(f"{head}.fc_reg", 4 * CLASSES, 1024)
    found |= linear(f"{head}.shared_fcs.0", 1024, 256 * 49) | linear(f"{head}.shared_fcs.1", 1024, 1024)
    if masks:
        head = "roi_head.mask_head"
        for i in range(4):
            found |= conv(f"{head}.convs.{i}.conv", 256, 256, 3)
        found |= carafe(f"{head}.upsample") | conv(f"{head}.conv_logits", CLASSES, 256, 1)
    return found


def random_state(masks: bool) -> dict[str, Tensor]:
    """Tensors that keep the size of features, and detect something."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes(masks).items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            values = torch.tensor(3)
        elif name.endswith("running_var"):
            values = 1 + 0.1 * values.abs()
        elif name.endswith("bn3.weight"):
            values = 0.2 + 0.02 * values
        elif len(shape) == 1:
            values = 0.1 * values + name.endswith(".weight")
        else:
            # gains that give spread scores and shifted boxes
            gain = {"fc_cls": 4.0, "fc_reg": 0.7, "rpn_cls": 1.0, "rpn_reg": 0.2}.get(name.split(".")[-2], 1.4)
            values *= gain / math.sqrt(values[0].numel())
        state[name] = values
    return state


def features(state: dict[str, Tensor], image: Tensor) -> list[Tensor]:
    """Image [1, 3, H, W], normalised -> P2 to P6."""

    def conv(name: str, x: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state.get(f"{name}.bias"), stride, weight.shape[-1] // 2 if padding is None else padding)

    def norm(name: str, x: Tensor) -> Tensor:
        return F.batch_norm(x, *(state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")))

    def carafe(name: str, x: Tensor) -> Tensor:
        module = CARAFE(256, up=2)
        module.load_state_dict({key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")})
        return module(x)

    x = F.max_pool2d(norm("backbone.bn1", conv("backbone.conv1", image, 2)).relu(), 3, 2, 1)
    levels = []
    for layer, blocks in BLOCKS.items():
        for block in range(blocks):
            name, stride = f"backbone.layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            y = norm(f"{name}.bn1", conv(f"{name}.conv1", x)).relu()
            # "pytorch style": the 3x3 has the stride
            y = norm(f"{name}.bn2", conv(f"{name}.conv2", y, stride)).relu()
            y = norm(f"{name}.bn3", conv(f"{name}.conv3", y))
            x = (y + (norm(f"{name}.downsample.1", conv(f"{name}.downsample.0", x, stride)) if block == 0 else x)).relu()
        levels.append(x)
    laterals = [conv(f"neck.lateral_convs.{i}.conv", level) for i, level in enumerate(levels)]
    laterals.append(conv("neck.lateral_convs.4.conv", levels[-1], stride=2))
    for i in (4, 3, 2, 1):
        up = carafe(f"neck.upsample_modules.{i - 1}", laterals[i])
        laterals[i - 1] = laterals[i - 1] + up[..., : laterals[i - 1].shape[2], : laterals[i - 1].shape[3]]
    return [conv(f"neck.fpn_convs.{i}.conv", lateral) for i, lateral in enumerate(laterals)]


def decode(boxes: Tensor, deltas: Tensor, stds: tuple[float, ...], size: tuple[int, int]) -> Tensor:
    """DeltaXYWHBBoxCoder with means 0: boxes [n, 4], deltas [n, 4] -> [n, 4] inside the image."""
    limit = abs(math.log(16 / 1000))
    x, y, w, h = (deltas * torch.tensor(stds)).unbind(1)
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    centre_x, centre_y = boxes[:, 0] + width / 2 + x * width, boxes[:, 1] + height / 2 + y * height
    width, height = width * w.clamp(-limit, limit).exp(), height * h.clamp(-limit, limit).exp()
    corners = [centre_x - width / 2, centre_y - height / 2, centre_x + width / 2, centre_y + height / 2]
    return torch.stack([corner.clamp(0, size[1 - i % 2]) for i, corner in enumerate(corners)], dim=1)


def anchors(stride: int, rows: int, columns: int) -> Tensor:
    """Scale 8, ratios height / width, around (column * stride, row * stride), not rounded; positions first, then ratios."""
    found = []
    for row in range(rows):
        for column in range(columns):
            for ratio in (0.5, 1.0, 2.0):
                height, width = 8 * stride * math.sqrt(ratio), 8 * stride / math.sqrt(ratio)
                x, y = column * stride, row * stride
                found.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    return torch.tensor(found)


def proposals(state: dict[str, Tensor], levels: list[Tensor], size: tuple[int, int]) -> Tensor:
    """RPN: per level the best 1000, suppressed at 0.7 within the level, the best over all levels -> [PROPOSALS, 4]."""
    found = []
    for level, stride in zip(levels, STRIDES, strict=True):
        x = F.conv2d(level, state["rpn_head.rpn_conv.weight"], state["rpn_head.rpn_conv.bias"], padding=1).relu()
        scores = F.conv2d(x, state["rpn_head.rpn_cls.weight"], state["rpn_head.rpn_cls.bias"])[0].permute(1, 2, 0).reshape(-1).sigmoid()
        deltas = F.conv2d(x, state["rpn_head.rpn_reg.weight"], state["rpn_head.rpn_reg.bias"])[0].permute(1, 2, 0).reshape(-1, 4)
        best = scores.argsort(descending=True)[:1000]
        boxes = decode(anchors(stride, *level.shape[2:])[best], deltas[best], (1, 1, 1, 1), size)
        whole = ((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])).nonzero()[:, 0]
        boxes, scores = boxes[whole], scores[best][whole]
        kept = nms(boxes, scores, 0.7)
        found.append(torch.cat([boxes[kept], scores[kept, None]], dim=1))
    found = torch.cat(found)
    return found[found[:, 4].argsort(descending=True)[:PROPOSALS], :4]


def crop(levels: list[Tensor], box: Tensor, side: int) -> Tensor:
    """RoIAlign of one box from the level of its size: aligned, as many samples as a cell has pixels."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    level = min(max(math.floor(math.log2(math.sqrt(area) / 56 + 1e-6)), 0), 3)
    return roi_align(levels[level], [box[None]], side, 1 / STRIDES[level], sampling_ratio=0, aligned=True)


def detect(state: dict[str, Tensor], image: Tensor, masks: bool) -> dict[str, Tensor]:
    """The detector as mmdetection defines it, on an image [3, H, W] of 8-bit values / 255; label 1 is class 0."""
    height, width = image.shape[1:]
    scale = min(MAX_SIZE / max(height, width), MIN_SIZE / min(height, width))
    size = int(height * scale + 0.5), int(width * scale + 0.5)
    resized = F.interpolate((image[None] * 255).round(), size, mode="bilinear", align_corners=False).round()
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    resized = (resized - mean[:, None, None]) / std[:, None, None]
    levels = features(state, F.pad(resized, (0, -size[1] % 64, 0, -size[0] % 64)))

    rois = proposals(state, levels, size)
    x = torch.cat([crop(levels, roi, 7) for roi in rois]).flatten(1)
    for i in (0, 1):
        x = F.linear(x, state[f"roi_head.bbox_head.shared_fcs.{i}.weight"], state[f"roi_head.bbox_head.shared_fcs.{i}.bias"]).relu()
    scores = F.linear(x, state["roi_head.bbox_head.fc_cls.weight"], state["roi_head.bbox_head.fc_cls.bias"]).softmax(1)
    deltas = F.linear(x, state["roi_head.bbox_head.fc_reg.weight"], state["roi_head.bbox_head.fc_reg.bias"])
    found = []
    # the last score is the background's
    for label in range(CLASSES):
        chosen = scores[:, label] > 0.05
        boxes = decode(rois[chosen], deltas[chosen, 4 * label : 4 * label + 4], (0.1, 0.1, 0.2, 0.2), size)
        for i in nms(boxes, scores[chosen, label], 0.5).tolist():
            found.append((scores[chosen, label][i], label, boxes[i]))
    found = sorted(found, key=lambda entry: -entry[0])[:100]
    boxes = torch.stack([box for _, _, box in found])
    back = torch.tensor([width / size[1], height / size[0]] * 2)
    result = {"boxes": boxes * back, "scores": torch.stack([score for score, _, _ in found])}
    result["labels"] = torch.tensor([label + 1 for _, label, _ in found])
    if masks:
        y = torch.cat([crop(levels, box, 14) for box in boxes])
        for i in range(4):
            name = f"roi_head.mask_head.convs.{i}.conv"
            y = F.conv2d(y, state[f"{name}.weight"], state[f"{name}.bias"], padding=1).relu()
        module = CARAFE(256, up=2)
        prefix = "roi_head.mask_head.upsample."
        module.load_state_dict({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})
        logits = F.conv2d(module(y), state["roi_head.mask_head.conv_logits.weight"], state["roi_head.mask_head.conv_logits.bias"])
        cells = torch.stack([each[label] for each, (_, label, _) in zip(logits, found, strict=True)])[:, None].sigmoid()
        result["masks"] = pasted(cells, result["boxes"], (height, width))
    return result


def pasted(cells: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Cells [n, 1, h, w] of boxes [n, 4] sampled at the centres of an image's pixels, 0 outside."""
    rows, columns = torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5
    grids = []
    for x1, y1, x2, y2 in boxes.tolist():
        y, x = torch.meshgrid((rows - y1) / (y2 - y1) * 2 - 1, (columns - x1) / (x2 - x1) * 2 - 1, indexing="ij")
        grids.append(torch.stack([x, y], dim=-1))
    return F.grid_sample(cells, torch.stack(grids), align_corners=False)

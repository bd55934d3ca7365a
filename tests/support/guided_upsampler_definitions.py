"""Every guided upsampler by its definition, as in upsampler_definitions.py."""

import itertools
import math

import torch
import torch.nn.functional as F
from upsampler_definitions import bilinear, conv, each, fit, inside, nearest, read_at, sum_window


def gum(module, x, guide):
    h, w = guide.shape[2:]
    both = torch.cat([fit(bilinear(None, x), (h, w)), guide], 1)
    hidden = torch.einsum("oc,nchw->nohw", module.mix.weight[..., 0, 0], both) + module.mix.bias[:, None, None]
    offsets = torch.einsum("oc,nchw->nohw", module.offset.weight[..., 0, 0], hidden.clamp(min=0)) + module.offset.bias[:, None, None]
    return read_at(x, offsets, (h, w))


def indexnet(module, x, guide):
    """Four index blocks, one for each pixel of a 2x2 block."""
    h, w = guide.shape[2:]
    padded = F.pad(guide, (1, 1 + w % 2, 1, 1 + h % 2))
    y = fit(nearest(None, x), (h, w))
    for i, j in each((h, w)):
        block = module.index.weight[2 * (i % 2) + j % 2 :: 4]
        window = padded[:, :, i // 2 * 2 : i // 2 * 2 + 4, j // 2 * 2 : j // 2 * 2 + 4]
        y[:, :, i, j] /= 1 + (-torch.einsum("ochw,nchw->no", block, window)).exp()
    return y


def affinities(module, image):
    """Dai et al.: second-order features of an image [C, h, w], [ceil(h / 2), ceil(w / 2)], and the vector that spreads them."""
    c, h, w = image.shape
    even = F.pad(image, (0, w % 2, 0, h % 2))
    pooled = F.adaptive_avg_pool2d(image, 6)
    features = []
    for which, norm in enumerate((module.norm_u, module.norm_v)):
        kernel = torch.einsum("c,chw->hw", module.filters.weight[which, :, 0, 0], pooled) + module.filters.bias[which]
        filtered = torch.cat([F.conv2d(channel[None, None], kernel[None, None], stride=2, padding=2)[0] for channel in even])
        grouped = filtered.view(math.gcd(32, c), -1)
        normalised = (grouped - grouped.mean(1, keepdim=True)) / (grouped.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        scaled = normalised.view_as(filtered) * norm[0].weight[:, None, None] + norm[0].bias[:, None, None]
        features.append(torch.where(scaled > 0, scaled, 0.01 * scaled))
    vector = module.spread.weight[..., 0, 0] @ image.mean((1, 2)) + module.spread.bias
    return (features[0] * features[1]).sum(0) / c**0.5, vector


def a2u(module, x, guide):
    """Dai et al.: softmax of the sigmoid of the spread affinities of the encoder, image by image."""
    size, guide = guide.shape[2:], inside(guide, x)
    n, _, h, w = guide.shape
    y = x.new_zeros(n, x.shape[1], h, w)
    for b in range(n):
        affinity, vector = affinities(module, guide[b])
        for i, j in each((h, w)):
            logits = torch.sigmoid(affinity[i // 2, j // 2] * vector[2 * (i % 2) + j % 2 :: 4])
            y[b, :, i, j] = sum_window(x, b, i, j, logits.softmax(0).view(3, 3))
    return fit(y, size)


def sapa(module, x, guide):
    """Lu et al.: kernel = softmax of the similarity of an encoder point and the decoder points around it."""

    def normalise(vector, layer):
        centred = vector - vector.mean()
        return centred / (centred.square().mean() + 1e-5).sqrt() * layer.weight + layer.bias

    size, guide = guide.shape[2:], inside(guide, x)
    n, _, h, w = guide.shape
    y = x.new_zeros(n, x.shape[1], h, w)
    for b, i, j in each((n, h, w)):
        query = module.query(normalise(guide[b, :, i, j], module.norm_guide))
        if module.gate is not None:
            source = x[b, :, i // 2, j // 2]
            gate = torch.sigmoid(module.gate(normalise(source, module.norm)))
            query = gate * query + (1 - gate) * module.query_coarse(source)
        similarity = x.new_zeros(5, 5)
        for dy, dx in each((5, 5)):
            row, column = i // 2 + dy - 2, j // 2 + dx - 2
            if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
                similarity[dy, dx] = query @ module.key(normalise(x[b, :, row, column], module.norm))
        y[b, :, i, j] = sum_window(x, b, i, j, similarity.flatten().softmax(0).view(5, 5))
    return fit(y, size)


def fade(module, x, guide):
    """Lu et al.: semi-shift convolution, the encoder's window slides over fine pixels while the decoder's stays."""
    size = guide.shape[2:]
    aligned = guide if guide.shape[1] == x.shape[1] else conv(module.align, guide)
    guide = inside(guide, x)
    n, _, h, w = guide.shape
    en, de = F.pad(conv(module.compress_guide, guide), (1, 1, 1, 1)), F.pad(conv(module.compress, x), (1, 1, 1, 1))
    gate = fit(nearest(None, torch.sigmoid(conv(module.gate, x))), size)
    y = x.new_zeros(n, x.shape[1], h, w)
    weight = module.encoder.weight
    for b, i, j in each((n, h, w)):
        windows = en[b, :, i : i + 3, j : j + 3] + de[b, :, i // 2 : i // 2 + 3, j // 2 : j // 2 + 3]
        products = weight[:, 0] * windows if weight.shape[1] == 1 else weight * windows
        logits = products.flatten(1).sum(1) + 2 * module.encoder.bias
        y[b, :, i, j] = sum_window(x, b, i, j, logits.softmax(0).view(5, 5))
    return gate * aligned + (1 - gate) * fit(y, size)


def freq_fusion(module, x, guide):
    """Chen et al., section 3: adaptive low-pass filters, offsets from similarities, adaptive high-pass filters."""
    size = guide.shape[2:]

    def reassembled(features, logits, up):
        """The features at the size of the logits; the row and column beyond twice their size repeat the last."""
        side = math.isqrt(logits.shape[1])
        hamming = [0.54 - 0.46 * math.cos(2 * math.pi * i / (side - 1)) for i in range(side)]
        # published weights hold the window in float32
        window = x.new_tensor(hamming).outer(x.new_tensor(hamming)).float().double()
        kernels = logits.softmax(1).unflatten(1, (side, side)).permute(0, 3, 4, 1, 2) * window  # [N, h, w, K, K]
        kernels = kernels / kernels.sum((3, 4), keepdim=True)
        rows, columns = (min(fine, up * coarse) for fine, coarse in zip(size, features.shape[2:], strict=True))
        y = features.new_zeros(*features.shape[:2], rows, columns)
        for n, i, j in each((len(features), rows, columns)):
            y[n, :, i, j] = sum_window(features, n, i, j, kernels[n, i, j], up)
        return fit(y, size)

    def described(features, norm):
        """Normalised features, and their cosine similarity with the pixels 2 rows and columns away."""
        n, c, h, w = features.shape
        grouped = features.view(n, c // 8, -1)
        grouped = (grouped - grouped.mean(2, keepdim=True)) / (grouped.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
        normal = grouped.view_as(features) * norm.weight[:, None, None] + norm.bias[:, None, None]
        similarity = features.new_zeros(n, 8, h, w)
        around = [(down, right) for down in (-2, 0, 2) for right in (-2, 0, 2) if (down, right) != (0, 0)]
        for b, i, j, (d, (down, right)) in itertools.product(range(n), range(h), range(w), enumerate(around)):
            if 0 <= i + down < h and 0 <= j + right < w:
                similarity[b, d, i, j] = F.cosine_similarity(normal[b, :, i, j], normal[b, :, i + down, j + right], dim=0)
        return torch.cat([normal, similarity], 1)

    fine, coarse = conv(module.hr_channel_compressor, guide), conv(module.lr_channel_compressor, x)
    high = conv(module.content_encoder2, fine, padding=1)
    fine = fine + (fine - reassembled(fine, high, 1))
    low = conv(module.content_encoder, fine, padding=1)
    low = low + reassembled(conv(module.content_encoder, coarse, padding=1), low, 2)
    y = reassembled(x, low, 2)
    if module.dysampler is not None:
        layers = module.dysampler
        of_fine, of_coarse = described(fine, layers.norm_hr), described(coarse, layers.norm_lr)

        def predicted(from_coarse, from_fine):
            """A prediction per coarse pixel for each of its four fine pixels, plus one per fine pixel."""
            per_cell, y = conv(from_coarse, of_coarse, padding=1), conv(from_fine, of_fine, padding=1)
            for i, j in each(size):
                row, column = min(i, 2 * x.shape[2] - 1), min(j, 2 * x.shape[3] - 1)
                y[:, :, i, j] += per_cell[:, 2 * (row % 2) + column % 2 :: 4, row // 2, column // 2]
            return y

        offsets = predicted(layers.offset, layers.hr_offset) * predicted(layers.direct_scale, layers.hr_direct_scale).sigmoid()
        groups = layers.groups
        parts = [read_at(part, 2 * offsets[:, [g, groups + g]], size, up=1) for g, part in enumerate(y.chunk(groups, 1))]
        y = torch.cat(parts, 1)
    if not module.rewrites_guide:
        return y
    high = high + reassembled(conv(module.content_encoder2, coarse, padding=1), low, 2)
    return y, guide + (guide - reassembled(guide, high, 1))


def bicubic(x):
    """Cubic convolution (Keys, 1981, with a = -0.75) to twice the size; positions outside the map read its border."""

    def weight(distance):
        t = abs(distance)
        return 1.25 * t**3 - 2.25 * t**2 + 1 if t <= 1 else -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)

    for dim in (2, 3):
        side = x.shape[dim]
        rows = []
        for i in range(2 * side):
            position = (i + 0.5) / 2 - 0.5
            near = [math.floor(position) + offset for offset in (-1, 0, 1, 2)]
            rows.append(sum(weight(position - tap) * x.select(dim, min(max(tap, 0), side - 1)) for tap in near))
        x = torch.stack(rows, dim)
    return x


def jbu(module, x, guide):
    """Fu et al., section 3.2: range kernel times distance kernel, normalised, plus a tenth of a correction, over reflected maps."""

    def reflect(place, side):
        while not 0 <= place < side:
            place = 0 if side == 1 else -place if place < 0 else 2 * (side - 1) - place
        return place

    def project(layers, features):
        hidden = layers[0].weight[..., 0, 0] @ features + layers[0].bias
        gelu = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        return layers[3].weight[..., 0, 0] @ gelu + layers[3].bias

    n, _, h, w = guide.shape
    fine = fit(bicubic(x), (h, w))
    y = torch.zeros_like(fine)
    offsets = list(each((7, 7)))
    distances = x.new_tensor([((i - 3) / 3) ** 2 + ((j - 3) / 3) ** 2 for i, j in offsets])
    spatial = (-distances / (2 * module.sigma_spatial**2)).exp()
    for b in range(n):
        keys = torch.stack([project(module.range_proj, guide[b, :, i, j]) for i, j in each((h, w))]).view(h, w, -1)
        for i, j in each((h, w)):
            rows = [reflect(i + down - 3, h) for down, _ in offsets]
            columns = [reflect(j + right - 3, w) for _, right in offsets]
            similarity = keys[rows, columns] @ keys[i, j]
            kernel = (module.range_temp.exp() * similarity).softmax(0) * spatial
            kernel = kernel / kernel.sum()
            kernel = kernel + 0.1 * project(module.fixup_proj, torch.cat([kernel, guide[b, :, i, j]]))
            y[b, :, i, j] = fine[b][:, rows, columns] @ kernel
    return y


def resfu(module, x, guide):
    """Zhou et al.: aligned queries and keys, learned similarities, and neighbours in the upsampled map."""
    size = guide.shape[2:]

    def group_norm(layer, t):
        grouped = t.view(len(t), layer.num_groups, -1)
        grouped = (grouped - grouped.mean(2, keepdim=True)) / (grouped.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
        return grouped.view_as(t) * layer.weight[:, None, None] + layer.bias[:, None, None]

    def windows(t, i, j, radius):
        return t[:, :, max(0, i - radius) : i + radius + 1, max(0, j - radius) : j + radius + 1].flatten(2)

    def each_pixel(t, function):
        return torch.stack([function(i, j) for i, j in each(t.shape[2:])], 2).view_as(t)

    def at(t, i, j):
        return t[:, :, min(max(i, 0), t.shape[2] - 1), min(max(j, 0), t.shape[3] - 1)]

    def smooth_along(p, image):
        """He and Sun: p as a linear function of the image in the windows of every second pixel."""
        small_p, small_i = p[..., ::2, ::2], image[..., ::2, ::2]

        def fitted(i, j):
            of_p, of_i = windows(small_p, i, j, 4), windows(small_i, i, j, 4)
            slope = ((of_p * of_i).mean(2) - of_p.mean(2) * of_i.mean(2)) / (of_i.var(2, correction=0) + 1e-3)
            return torch.stack([slope, of_p.mean(2) - slope * of_i.mean(2)])

        lines = torch.stack([fitted(i, j) for i, j in each(small_p.shape[2:])], 3).unflatten(3, small_p.shape[2:])
        slope, intercept = (fit(bilinear(None, each_pixel(t, lambda i, j, t=t: windows(t, i, j, 4).mean(2))), size) for t in lines)
        return slope * image + intercept

    def similarity(block, keys, queries):
        keys, queries = group_norm(block.norm, keys), group_norm(block.norm, queries)
        hidden = block.bias.expand(len(x), -1, *size).clone()
        for i, j in each(size):
            for a, b in each((3, 3)):
                difference = at(keys, i + 2 * a - 2, j + 2 * b - 2) - queries[:, :, i, j]
                grouped = torch.einsum("gok,ngk->ngo", block.weight[:, :, a, b].unflatten(0, (4, -1)), difference.unflatten(1, (4, -1)))
                hidden[:, :, i, j] += grouped.flatten(1)
        _, mix, _, norm, score = block.channel_compressor
        return conv(score, group_norm(norm, conv(mix, hidden.clamp(min=0), groups=4).clamp(min=0)))

    queries = conv(module.q, group_norm(module.norm_y, guide))
    keys = fit(bilinear(None, conv(module.k, group_norm(module.norm_x, x))), size)
    gauss = {(a, b): math.exp(-((a - 1) ** 2 + (b - 1) ** 2) / 2) for a, b in each((3, 3))}
    total = sum(gauss.values())
    blurred = each_pixel(queries, lambda i, j: sum(g / total * at(queries, i + a - 1, j + b - 1) for (a, b), g in gauss.items()))
    scores = similarity(module.semantic_scores, keys, smooth_along(keys, queries)) + similarity(module.detail_scores, blurred, queries)
    upsampled = bilinear(None, x)
    rows, columns = (min(fine, whole) for fine, whole in zip(size, upsampled.shape[2:], strict=True))
    y = x.new_zeros(*x.shape[:2], rows, columns)
    for i, j in each((rows, columns)):
        near = [(3 * a + b, i + 2 * a - 2, j + 2 * b - 2) for a, b in each((3, 3))]
        near = [(tap, *place) for tap, *place in near if 0 <= place[0] < upsampled.shape[2] and 0 <= place[1] < upsampled.shape[3]]
        weights = scores[:, [tap for tap, *_ in near], i, j].softmax(1)
        y[:, :, i, j] = sum(weights[:, [d]] * upsampled[:, :, row, column] for d, (_, row, column) in enumerate(near))
    return fit(y, size)


# the neighbours of UPLiFT's local attender, as its authors draw them
NEIGHBOURS = {
    5: [".X.", "XXX", ".X."],
    9: ["XXX", "XXX", "XXX"],
    13: ["..X..", ".XXX.", "XXXXX", ".XXX.", "..X.."],
    17: ["X.X.X", ".XXX.", "XXXXX", ".XXX.", "X.X.X"],
    25: ["XXXXX"] * 5,
}


def local_attender(module, x, guide):
    """Walmer et al.: attention of a fine pixel over fixed neighbours of its source pixel, whose logits are a linear map of the guide."""
    count = module.conv1.out_channels
    rows = NEIGHBOURS[count]
    radius = len(rows) // 2
    taps = [(i - radius, j - radius) for i, j in each((len(rows), len(rows))) if rows[i][j] == "X"]
    size, guide = guide.shape[2:], inside(guide, x)
    y = x.new_zeros(*x.shape[:2], *guide.shape[2:])
    for b, i, j in each((x.shape[0], *guide.shape[2:])):
        features = guide[b, :, i, j]
        logits = module.conv1.weight[..., 0, 0] @ features + module.conv1.bias
        for d in range(min(count, len(features)) if module.residual else 0):
            logits[d] += features[d]
        for weight, (down, right) in zip(logits.softmax(0), taps, strict=True):
            row, column = min(max(i // 2 + down, 0), x.shape[2] - 1), min(max(j // 2 + right, 0), x.shape[3] - 1)
            y[b, :, i, j] += weight * x[b, :, row, column]
    return fit(y, size)

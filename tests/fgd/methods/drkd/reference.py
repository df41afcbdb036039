"""DRKD as slow literal loops in float64; shares no code with the package."""

import math

import torch


def layer(parameters, name, vector):
    """A linear layer or 1x1 convolution of one vector."""
    weight = parameters[f"{name}.weight"].flatten(1)
    out = [sum(w * v for w, v in zip(row, vector, strict=True)) for row in weight]
    bias = parameters.get(f"{name}.bias")
    return torch.stack(out) if bias is None else torch.stack(out) + bias


def sub(parameters, prefix):
    return {k[len(prefix) + 1 :]: v for k, v in parameters.items() if k.startswith(f"{prefix}.")}


def graph_reasoning(maps, p, form, groups=0):
    """(N, C, H, W) → the same. groups 0: batch normalisation; else group normalisation."""
    n, c, height, width = maps.shape
    places = [(h, w) for h in range(height) for w in range(width)]
    added = torch.zeros(n, c, height, width, dtype=torch.float64)
    for i in range(n):
        cells = [maps[i, :, h, w] for h, w in places]
        projected = [layer(p, "projection", x) for x in cells]
        gathered = sum(torch.outer(layer(p, "state", x), b) for x, b in zip(cells, projected))
        if form == "paper":
            gathered = gathered / len(cells)
            rows = [row - layer(p, "nodes", row) for row in gathered]
        else:
            rows = [(row + layer(p, "nodes", row)).clamp(min=0) for row in gathered]
        states = torch.stack([layer(p, "states", column) for column in torch.stack(rows).T])
        for (h, w), b in zip(places, projected):
            added[i, :, h, w] = layer(p, "extend", states.T @ b)
    blocks = [(slice(None), slice(k, k + 1)) for k in range(c)]
    if groups:
        size = c // groups
        blocks = [
            (slice(i, i + 1), slice(g * size, g * size + size))
            for i in range(n)
            for g in range(groups)
        ]
    normal = torch.zeros_like(added)
    for block in blocks:
        values = added[block]
        mean = values.sum() / values.numel()
        spread = ((values - mean) ** 2).sum() / values.numel()
        normal[block] = (values - mean) / (spread + 1e-4) ** 0.5
    scaled = [normal[:, k] * p["norm.weight"][k] + p["norm.bias"][k] for k in range(c)]
    return maps + torch.stack(scaled, dim=1)


def length(values):
    """Of a list of numbers; 0 has a zero gradient."""
    total = sum((v**2 for v in values), torch.zeros((), dtype=torch.float64))
    return total**0.5 if total > 0 else total


def pixel_relation(student, teacher, p, form, groups=(0, 0)):
    own = graph_reasoning(student, sub(p, "student"), form, groups[0])
    taught = graph_reasoning(teacher, sub(p, "teacher"), form, groups[1])
    errors = []
    for n in range(len(own)):
        for h in range(own.shape[2]):
            for w in range(own.shape[3]):
                errors += list(layer(p, "adapt", own[n, :, h, w]) - taught[n, :, h, w])
    if form == "paper":
        return sum(x**2 for x in errors) / len(own)
    return length(errors)


def sample(image, y, x):
    """(C,) of a map (C, H, W) at a point, bilinear; 0 beyond one cell outside."""
    _, height, width = image.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return torch.zeros(len(image), dtype=torch.float64)
    y, x = (min(max(v, 0.0), size - 1) for v, size in ((y, height), (x, width)))
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = image[:, top, left] * (1 - (x - left)) + image[:, top, right] * (x - left)
    lower = image[:, bottom, left] * (1 - (x - left)) + image[:, bottom, right] * (x - left)
    return upper * (1 - (y - top)) + lower * (y - top)


def region(image, box, scale):
    """(C, 3, 3) of one box."""
    x1, y1, x2, y2 = (v * scale for v in box)
    wide, high = max(x2 - x1, 1.0), max(y2 - y1, 1.0)
    across, down = math.ceil(wide / 3), math.ceil(high / 3)
    out = torch.zeros(len(image), 3, 3, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            points = [
                sample(
                    image,
                    y1 + (i + (a + 0.5) / down) * high / 3,
                    x1 + (j + (b + 0.5) / across) * wide / 3,
                )
                for a in range(down)
                for b in range(across)
            ]
            out[:, i, j] = sum(points) / len(points)
    return out


def softmax(numbers):
    numbers = [x - max(numbers) for x in numbers]
    total = sum(x.exp() for x in numbers)
    return [x.exp() / total for x in numbers]


def relation(regions, p, filtered, own_filter=None):
    """List of rows of ψ."""
    theta, phi = ([layer(p, name, r) for r in regions] for name in ("theta", "phi"))
    if filtered == "trained":
        rows, columns = ([layer(p, name, r) for r in regions] for name in ("rows", "columns"))
    matrix = []
    for i, r in enumerate(regions):
        products = [(theta[i] * other).sum() for other in phi]
        if filtered == "trained":
            mask = softmax([(rows[i] * other).sum() for other in columns])
        elif filtered == "random":
            weight, bias = own_filter
            mask = softmax(list(layer({"f.weight": weight, "f.bias": bias}, "f", r)))
        else:
            mask = [1.0] * len(products)
        matrix.append(softmax([w * x for w, x in zip(mask, products, strict=True)]))
    return matrix


def enhanced(regions, p, matrix):
    """z of each region."""
    g = [layer(p, "g", r) for r in regions]
    return [
        r + layer(p, "W", sum(w * v for w, v in zip(row, g, strict=True)))
        for r, row in zip(regions, matrix, strict=True)
    ]


def adapted(p, name, flat):
    """A 1x1 convolution of (9C,) numbers of a region."""
    cells = flat.view(-1, 9)
    return torch.stack([layer(p, name, cell) for cell in cells.T]).T.flatten()


def instance_terms(student, teacher, p, form, filtered, filters=None):
    """Lists, image by image, of lists of regions (C, 3, 3) → (relation, feature)."""
    relations = features = 0.0
    for n, (own, taught) in enumerate(zip(student, teacher, strict=True)):
        if not own:
            continue
        own, taught = ([r.flatten() for r in side] for side in (own, taught))
        given = filters[n] if filters else (None, None)
        matrices = [
            relation(side, sub(p, who), filtered, one)
            for side, who, one in ((own, "student", given[0]), (taught, "teacher", given[1]))
        ]
        errors = [adapted(p, "adapt_feature", a) - b for a, b in zip(own, taught, strict=True)]
        if form == "paper":
            features = features + sum((e**2).sum() for e in errors) / len(own) / len(student)
            a, b = (p[f"adapt_relation.{k}"].flatten()[0] for k in ("weight", "bias"))
            for mine, theirs in zip(*matrices, strict=True):
                for x, y in zip(mine, theirs, strict=True):
                    relations = relations + (a * x + b - y) ** 2 / len(student)
        else:
            features = features + length(torch.cat(errors))
            mine = enhanced(own, sub(p, "student"), matrices[0])
            theirs = enhanced(taught, sub(p, "teacher"), matrices[1])
            errors = [adapted(p, "adapt_relation", a) - b for a, b in zip(mine, theirs)]
            relations = relations + length(torch.cat(errors))
    return relations, features

"""FBKD of one level as slow literal loops; shares no code with the package."""

import torch

TERMS = ("feature", "channel", "spatial", "non_local")


def norm(values):
    return sum(v**2 for v in values) ** 0.5


def layer(p, name, vector):
    """A linear layer or 1x1 convolution of one vector."""
    rows = [sum(w * v for w, v in zip(row, vector)) for row in p[f"{name}.weight"].flatten(1)]
    bias = p.get(f"{name}.bias")
    return torch.stack(rows) if bias is None else torch.stack(rows) + bias


def reference_block(maps, p, mode, size):
    n, channels, height, width = maps.shape
    tall, wide = min(size, height), min(size, width)
    out = torch.zeros_like(maps)
    for i in range(n):
        at = lambda h, w: maps[i, :, h, w]  # noqa: B023, E731
        pooled = {}
        for name in ("phi", "g"):
            pooled[name] = [
                torch.stack(
                    [
                        layer(p, name, at(h * tall + a, w * wide + b))
                        for a in range(tall)
                        for b in range(wide)
                    ]
                ).amax(0)
                for h in range(height // tall)
                for w in range(width // wide)
            ]
        for h in range(height):
            for w in range(width):
                theta = layer(p, "theta", at(h, w))
                products = [(theta * phi).sum() for phi in pooled["phi"]]
                if mode == "dot_product":
                    weights = [x / len(products) for x in products]
                else:
                    powers = [(x / len(theta) ** 0.5).exp() for x in products]
                    weights = [x / sum(powers) for x in powers]
                gathered = sum(x * g for x, g in zip(weights, pooled["g"]))
                out[i, :, h, w] = layer(p, "out", gathered)
    normal = []
    for c in range(channels):
        values = out[:, c]
        mean = values.sum() / values.numel()
        spread = ((values - mean) ** 2).sum() / values.numel()
        scaled = (values - mean) / (spread + 1e-5) ** 0.5
        normal.append(scaled * p["norm.weight"][c] + p["norm.bias"][c])
    return maps + torch.stack(normal, dim=1)


def reference_terms(student, teacher, p, mode, size, temperature):
    n, _, height, width = student.shape
    places = [(i, h, w) for i in range(n) for h in range(height) for w in range(width)]
    sub = lambda who: {k.removeprefix(f"{who}."): v for k, v in p.items() if k.startswith(who)}  # noqa: E731
    mask = torch.zeros(n, height, width, dtype=torch.float64)
    for maps in (student.detach(), teacher):
        for i in range(n):
            powers = (maps[i].abs().sum(0) / len(maps[i]) / temperature).exp()
            mask[i] += height * width * powers / powers.sum() / 2
    errors = {term: [] for term in TERMS}
    for i, h, w in places:
        difference = layer(p, "adapt", student[i, :, h, w]) - teacher[i, :, h, w]
        errors["feature"] += list(mask[i, h, w] ** 0.5 * difference)
    own, taught = (
        reference_block(maps, sub(who), mode, size)
        for maps, who in ((student, "student"), (teacher, "teacher"))
    )
    for i, h, w in places:
        difference = layer(p, "adapt_non_local", own[i, :, h, w]) - taught[i, :, h, w]
        errors["non_local"] += list(difference)
    for i in range(n):
        means = [x[i].sum((1, 2)) / (height * width) for x in (student, teacher)]
        errors["channel"] += list(layer(p, "channel", means[0]) - means[1])
    for i, h, w in places:
        around = p["spatial.bias"][0]
        for a in range(3):
            for b in range(3):
                y, x = h + a - 1, w + b - 1
                if 0 <= y < height and 0 <= x < width:
                    value = student[i, :, y, x].mean()
                    around = around + p["spatial.weight"][0, 0, a, b] * value
        errors["spatial"].append(around - teacher[i, :, h, w].mean())
    return {term: norm(values) for term, values in errors.items()}

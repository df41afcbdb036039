"""FGD of one level as slow literal loops in float64: what the fast code must equal.

Written from the definition, box by box, cell by cell; shares no code with the package.
"""

import math

import torch
from torch.nn import functional as F


def masks(boxes, map_size, image_sizes):
    """Foreground and background weights (N, H, W) as nested Python loops."""
    height, width = map_size
    foreground = torch.zeros(len(boxes), height, width, dtype=torch.float64)
    background = torch.zeros_like(foreground)
    for n, (image_boxes, (image_h, image_w)) in enumerate(zip(boxes, image_sizes, strict=True)):
        for x1, y1, x2, y2 in image_boxes.double().tolist():
            if not all(map(math.isfinite, (x1, y1, x2, y2))):
                continue
            left = math.floor(x1 * (width / image_w))
            right = math.ceil(x2 * (width / image_w))
            top = math.floor(y1 * (height / image_h))
            bottom = math.ceil(y2 * (height / image_h))
            if right < left or bottom < top:
                continue
            value = 1 / ((bottom + 1 - top) * (right + 1 - left))
            for h in range(max(top, 0), min(bottom, height - 1) + 1):
                for w in range(max(left, 0), min(right, width - 1) + 1):
                    foreground[n, h, w] = max(foreground[n, h, w].item(), value)
        empty = [(h, w) for h in range(height) for w in range(width) if foreground[n, h, w] == 0]
        for h, w in empty:
            background[n, h, w] = 1 / len(empty)
    return foreground, background


def attention(features, temperature):
    """Spatial (N, H, W) and channel (N, C) attention, image by image."""
    spatial, channel = [], []
    for image in features:
        _, height, width = image.shape
        cells = torch.stack(
            [image[:, h, w].abs().mean() for h in range(height) for w in range(width)]
        )
        weights = torch.exp(cells / temperature - (cells / temperature).max())
        spatial.append((height * width * weights / weights.sum()).view(height, width))
        responses = torch.stack([one.abs().mean() for one in image]) / temperature
        weights = torch.exp(responses - responses.max())
        channel.append(len(image) * weights / weights.sum())
    return torch.stack(spatial), torch.stack(channel)


def context(features, parameters, prefix):
    """GlobalContext from its parameters by name; (N, C, H, W) → the same."""
    get = lambda name: parameters[f"{prefix}.{name}"]  # noqa: E731
    out = []
    for image in features:
        cells = image.flatten(1)  # (C, HW)
        logits = (get("mask_conv.weight").flatten() @ cells) + get("mask_conv.bias")
        summary = cells @ logits.softmax(0)
        hidden = get("transform.0.weight").flatten(1) @ summary + get("transform.0.bias")
        centred = hidden - hidden.mean()
        hidden = centred / (centred.square().mean() + 1e-5).sqrt()
        hidden = hidden * get("transform.1.weight").flatten() + get("transform.1.bias").flatten()
        added = get("transform.3.weight").flatten(1) @ F.relu(hidden) + get("transform.3.bias")
        out.append(image + added[:, None, None])
    return torch.stack(out)


def terms(student, teacher, boxes, image_sizes, parameters, temperature):
    """The four unweighted terms of one level, as the sums that the paper writes."""
    if "align.weight" in parameters:
        student = F.conv2d(student, parameters["align.weight"], parameters["align.bias"])
    foreground, background = masks(boxes, student.shape[-2:], image_sizes)
    s_maps, t_maps = attention(student, temperature), attention(teacher, temperature)
    total = dict.fromkeys(("foreground", "background", "attention", "relation"), 0.0)
    for n in range(len(student)):
        for c in range(student.shape[1]):
            error = t_maps[0][n] * t_maps[1][n, c] * (student[n, c] - teacher[n, c]) ** 2
            total["foreground"] += (foreground[n] * error).sum()
            total["background"] += (background[n] * error).sum()
        for s, t in zip(s_maps, t_maps, strict=True):
            total["attention"] += (s[n] - t[n]).abs().sum()
    difference = context(student, parameters, "context_student") - context(
        teacher, parameters, "context_teacher"
    )
    total["relation"] = (difference**2).sum()
    return {name: value / len(student) for name, value in total.items()}

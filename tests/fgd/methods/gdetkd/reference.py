"""G-DetKD by its equations, as loops; slow, for tests."""

import math

import numpy as np


def roi_align(image, box, scale, cells):
    """(C, H, W), XYXY in pixels → (C, S, S), with as many samples as a bin has cells."""
    channels, height, width = image.shape
    left, top = (box[i] * scale - 0.5 for i in (0, 1))
    wide, high = ((box[i + 2] - box[i]) * scale for i in (0, 1))
    across, down = (math.ceil(side / cells) for side in (wide, high))
    found = np.zeros((channels, cells, cells))
    for i in range(cells):
        for j in range(cells):
            for a in range(down):
                for b in range(across):
                    y = top + (i + (a + 0.5) / down) * high / cells
                    x = left + (j + (b + 0.5) / across) * wide / cells
                    found[:, i, j] += bilinear(image, y, x)
            found[:, i, j] /= max(1, down * across)
    return found


def bilinear(image, y, x):
    _, height, width = image.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    y0, x0 = math.floor(y), math.floor(x)
    value = 0.0
    for row, part in ((y0, 1 - (y - y0)), (min(y0 + 1, height - 1), y - y0)):
        for column, share in ((x0, 1 - (x - x0)), (min(x0 + 1, width - 1), x - x0)):
            value = value + part * share * image[:, row, column]
    return value


def convolve(image, weight, bias, stride):
    """(C, H, W), without padding."""
    size = weight.shape[-1]
    rows, columns = ((n - size) // stride + 1 for n in image.shape[1:])
    found = np.zeros((len(weight), rows, columns))
    for k in range(len(weight)):
        for i in range(rows):
            for j in range(columns):
                y, x = i * stride, j * stride
                patch = image[:, y : y + size, x : x + size]
                found[k, i, j] = (weight[k] * patch).sum() + bias[k]
    return found


def sgfi(maps, strides, boxes, teacher, parameters):
    """L_sgfi; ``parameters``: name → array, as the module's state dict has them."""
    get = {k: np.asarray(v) for k, v in parameters.items()}

    def embed(x):
        x = convolve(x, get["embed.0.weight"], get["embed.0.bias"], 2)
        return convolve(np.maximum(x, 0), get["embed.2.weight"], get["embed.2.bias"], 2).ravel()

    total, count, row = 0.0, 0, 0
    for n, own in enumerate(boxes):
        for box in own:
            offered, scores = [], []
            taught = teacher[row]
            for level, stride in zip(maps, strides, strict=True):
                cells = roi_align(level[n], box, 1 / stride, taught.shape[-1])
                offered.append(convolve(cells, get["adapt.weight"], get["adapt.bias"], 1))
                product = float(embed(offered[-1]) @ embed(taught))
                scores.append(product / math.exp(get["log_tau"]))
            shares = [math.exp(x - max(scores)) for x in scores]
            mixed = sum(a / sum(shares) * x for a, x in zip(shares, offered, strict=True))
            total += float(((mixed - taught) ** 2).sum())
            count += taught.size
            row += 1
    return total / count if count else 0.0


def iou(a, b):
    sides = [max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1)]
    inner = sides[0] * sides[1]
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return inner / (areas[0] + areas[1] - inner) if inner > 0 else 0.0


def unit(row):
    length = math.sqrt(math.fsum(x * x for x in row))
    return [x / length if length > 1e-6 else 0.0 for x in row]


def ckd(student, teacher, boxes, others, gamma):
    """L_ckd of one process.

    Args:
        student, teacher: R rows. boxes: of each image. others: further rows of the teacher, of any
            other process and of any step before.
    """
    student, teacher, others = ([unit(x) for x in rows] for rows in (student, teacher, others))
    place = [(n, box) for n, own in enumerate(boxes) for box in own]
    values = []
    for i, s in enumerate(student):
        kept = []
        for j, t in enumerate(teacher):
            same_image = place[i][0] == place[j][0]
            if i == j or not (same_image and iou(place[i][1], place[j][1]) > 0.5):
                kept.append(t)
        dots = [sum(a * b for a, b in zip(s, t, strict=True)) / gamma for t in kept + others]
        own = sum(a * b for a, b in zip(s, teacher[i], strict=True)) / gamma
        values.append(math.log(math.fsum(math.exp(x) for x in dots)) - own)
    return math.fsum(values) / len(values) if values else 0.0


def localisation(student, teacher, logits):
    """L_reg: rows of 4K deltas, and of K + 1 logits."""
    values = []
    for own, taught, row in zip(student, teacher, logits, strict=True):
        weights = [math.exp(x - max(row)) for x in row]
        for side in range(4):
            value = 0.0
            for k in range(len(row) - 1):
                error = taught[4 * k + side] - own[4 * k + side]
                value += weights[k] / sum(weights) * error
            values.append(abs(value))
    return 4 * math.fsum(values) / len(values) if values else 0.0

"""Draw images of filled shapes on textured backgrounds, each from its settings and index alone."""

import dataclasses
import hashlib
import json

import numpy as np
from PIL import Image, ImageDraw

from ..errors import UserError

__all__ = ["CLASSES", "ShapesSettings", "draw_image"]

CLASSES = ("circle", "triangle", "square", "star", "cross")
VERSION = 1  # raise it when the same settings would no longer give the same pixels
_SUPERSAMPLING = 4  # outlines are rasterised at 4x and averaged, so that edges are antialiased


@dataclasses.dataclass(frozen=True)
class ShapesSettings:
    """Everything the pixels depend on. Ranges are inclusive (low, high).

    Attributes:
        images: number of images, >= 1.
        seed: >= 0.   split: 0 (train) or 1 (test); independent images for the same seed.
        size: of each image side, pixels; height and width are drawn independently.
        classes: K, the first K of `CLASSES`.
        objects: shapes per image.
        box: of each box side, pixels.
        rotation: most that a shape is turned either way, degrees in [0, 180]. At 0 a square is a
            rectangle along the image's axes; at 180 any direction comes up.
        overlap: most that two boxes share, as a fraction of the smaller one, in [0, 1].
        contrast: of a shape against its surroundings, 1..127 grey levels in its strongest channel;
            each shape draws between 1 and 2 times this.
        texture: how far the smooth background varies either way, grey levels.
        noise: standard deviation of the pixel noise, grey levels.
        clutter: distractors per image, lines and blobs smaller than any shape.
    """

    images: int = 1000
    seed: int = 0
    split: int = 0
    size: tuple[int, int] = (96, 96)
    classes: int = 3
    objects: tuple[int, int] = (1, 3)
    box: tuple[int, int] = (18, 60)
    rotation: float = 30.0
    overlap: float = 0.3
    contrast: float = 40.0
    texture: float = 20.0
    noise: float = 12.0
    clutter: int = 6

    def __post_init__(self):
        ranges = {"size": 16, "objects": 0, "box": 4}  # name: least value
        wrong = {
            "images": self.images < 1,
            "seed": self.seed < 0,
            "split": self.split not in (0, 1),
            "classes": not 1 <= self.classes <= len(CLASSES),
            "rotation": not 0 <= self.rotation <= 180,
            "overlap": not 0 <= self.overlap <= 1,
            "contrast": not 1 <= self.contrast <= 127,
            "texture": not 0 <= self.texture <= 127,
            "noise": not 0 <= self.noise <= 127,
            "clutter": self.clutter < 0,
        }
        for name, least in ranges.items():
            pair = getattr(self, name)
            wrong[name] = len(pair) != 2 or not least <= pair[0] <= pair[1]
        wrong["box"] = wrong["box"] or self.box[1] > self.size[0]
        found = ", ".join(f"{name}={getattr(self, name)}" for name in wrong if wrong[name])
        if found:
            raise UserError(
                f"drawn shapes: {found} is not possible. Ranges are ascending pairs, classes 1.."
                f"{len(CLASSES)}, overlap 0..1, contrast 1..127, rotation 0..180, and the largest "
                f"box ({self.box[-1]} px) fits into the smallest image ({self.size[0]} px)"
            )

    @property
    def digest(self) -> str:
        """Eight hex digits that differ between different settings."""
        text = json.dumps([VERSION, dataclasses.asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def _outline(label: int, angle: float) -> np.ndarray:
    """(P, 2) vertices of one shape turned by `angle` (radians), in the unit square, touching its
    four sides."""
    name = CLASSES[label]
    corners = {"circle": 48, "triangle": 3, "square": 4, "star": 10, "cross": 12}[name]
    upright = -np.pi / 2 if name != "square" else np.pi / 4  # y points down
    angles = upright + angle + 2 * np.pi * np.arange(corners) / corners
    radius = np.ones(corners)
    if name == "star":
        radius[1::2] = 0.42
    points = np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)
    if name == "cross":  # twelve corners of a plus sign, turned by the same angle
        arm = 0.36
        quarter = np.array([[1, -arm], [1, arm], [arm, arm]])
        turn = np.array([[0, 1], [-1, 0]])
        plus = np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])
        cos, sin = np.cos(angle), np.sin(angle)
        points = plus @ np.array([[cos, sin], [-sin, cos]])
    points -= points.min(axis=0)
    return points / points.max(axis=0)


def _place(label, image_hw, taken, settings, rng):
    """(P, 2) vertices in pixels, or None when no free place was found in 50 draws."""
    height, width = image_hw
    low, high = settings.box
    for _ in range(50):
        side = rng.uniform(low, high)
        other = np.clip(side * rng.uniform(0.75, 1.33), low, high)
        x, y = rng.uniform(0, width - side), rng.uniform(0, height - other)
        box = np.array([x, y, x + side, y + other])
        if all(_overlap(box, b) <= settings.overlap for b in taken):
            taken.append(box)
            angle = np.radians(rng.uniform(-settings.rotation, settings.rotation))
            return _outline(label, angle) * [side, other] + [x, y]
    return None


def _overlap(a, b) -> float:
    """Intersection of two xyxy boxes over the area of the smaller one."""
    shared = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
    return float(shared / min((a[2:] - a[:2]).prod(), (b[2:] - b[:2]).prod()))


def _distractor(image_hw, settings, rng) -> np.ndarray:
    """(4, 2) vertices of a thin line or a small blob; it may leave the image."""
    height, width = image_hw
    centre = rng.uniform([0, 0], [width, height])
    if rng.random() < 0.5:
        length, thickness = rng.uniform(0.2, 0.8) * min(image_hw), rng.uniform(1, 2.5)
    else:
        length = thickness = rng.uniform(0.2, 0.5) * settings.box[0]
    angle = rng.uniform(0, np.pi)
    along = np.array([np.cos(angle), np.sin(angle)]) * length / 2
    across = np.array([-np.sin(angle), np.cos(angle)]) * thickness / 2
    return centre + np.array([along + across, along - across, -along - across, -along + across])


def _paint(canvas: np.ndarray, points: np.ndarray, settings, rng) -> None:
    """Fill an outline in place, in a colour that differs from what it covers by the contrast."""
    height, width = canvas.shape[:2]
    x0, y0 = np.clip(np.floor(points.min(axis=0)), 0, [width - 1, height - 1]).astype(int)
    x1, y1 = np.clip(np.ceil(points.max(axis=0)), [x0 + 1, y0 + 1], [width, height]).astype(int)
    scale = _SUPERSAMPLING
    # Pillow fills pixel centres at integers: half a sample less puts outlines where COCO has them.
    corners = (points - [x0, y0]) * scale - 0.5
    stencil = Image.new("L", ((x1 - x0) * scale, (y1 - y0) * scale))
    ImageDraw.Draw(stencil).polygon([tuple(p) for p in corners], fill=255)
    alpha = np.asarray(stencil.reduce(scale), dtype=np.float32)[..., None] / 255
    region = canvas[y0:y1, x0:x1]
    mean = region.mean(axis=(0, 1))
    offset = rng.uniform(-1, 1, 3)
    offset *= rng.uniform(1, 2) * settings.contrast / np.abs(offset).max()
    outside = (mean + offset < 0) | (mean + offset > 255)
    colour = np.clip(mean + np.where(outside, -offset, offset), 0, 255)
    region += alpha * (colour - region)


def _background(image_hw, texture, rng) -> np.ndarray:
    """(H, W, 3) float32 smooth random colours, 0..255: a coarse grid enlarged bicubically."""
    height, width = image_hw
    coarse = rng.uniform(40, 215, (1, 1, 3)) + texture * rng.uniform(-1, 1, (5, 5, 3))
    grid = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8))
    return np.asarray(grid.resize((width, height), Image.BICUBIC), dtype=np.float32).copy()


def draw_image(index: int, settings: ShapesSettings):
    """One image and its shapes, a function of the settings and the index alone.

    Returns:
        pixels: (H, W, 3) uint8 RGB.
        objects: list of (label in 0..K-1, (P, 2) vertices in pixels, rounded to 0.01). A shape
            partly hidden by a later one keeps its whole outline. May be shorter than drawn for
            when the image has no free place left.
    """
    rng = np.random.default_rng([settings.seed, settings.split, index])
    image_hw = tuple(int(side) for side in rng.integers(*settings.size, size=2, endpoint=True))
    canvas, taken, objects = _background(image_hw, settings.texture, rng), [], []
    for _ in range(rng.integers(*settings.objects, endpoint=True)):
        label = int(rng.integers(settings.classes))
        points = _place(label, image_hw, taken, settings, rng)
        if points is not None:
            objects.append((label, points.round(2)))
    # A distractor is painted before shape number `depth`, or after all of them.
    depths = sorted(rng.integers(0, len(objects) + 1, size=settings.clutter))
    for depth in range(len(objects) + 1):
        for _ in range(depths.count(depth)):
            _paint(canvas, _distractor(image_hw, settings, rng), settings, rng)
        if depth < len(objects):
            _paint(canvas, objects[depth][1], settings, rng)
    canvas += rng.normal(0, 1, canvas.shape) * settings.noise
    return np.clip(canvas.round(), 0, 255).astype(np.uint8), objects

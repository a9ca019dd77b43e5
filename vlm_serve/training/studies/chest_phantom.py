"""Frontal films of chests that never were: thickness of tissue along each ray, drawn from a seed.

Not anatomy to learn medicine from, but every film is another person, which no other source here can give.
"""

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter
from scipy.special import expit

from vlm_serve.training.studies.film import SIZE, Anatomy

FIELD_MM = 400.0
SCALE = FIELD_MM / SIZE  # mm a pixel


def chest_phantom(rng: np.random.Generator) -> Anatomy:
    """Another chest for each state of `rng`."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) * np.float32(SCALE)
    x -= FIELD_MM / 2
    build = rng.uniform(0.86, 1.12)
    depth = rng.uniform(17, 24)
    body = _body(x, y, build, depth, rng)
    apex, base = rng.uniform(38, 62), rng.uniform(255, 305)
    heart = _heart(x, y, build, base, rng)
    lungs = []
    for side in (-1, 1):  # the patient's right is on the left of the film
        lung = _lung(x * side, y, build, apex, base + (0 if side < 0 else rng.uniform(4, 16)), rng)
        lungs.append(np.clip(lung - heart * (1.0 if side > 0 else 0.75), 0, 1))
    air: np.ndarray = (lungs[0] + lungs[1]) * depth * rng.uniform(0.62, 0.74)
    lung_tissue: np.ndarray = air * 0.22
    for side, lung in zip((-1, 1), lungs, strict=True):
        lung_tissue += _vessels(side, build, apex, base, rng) * (lung > 0.25)
    soft = np.maximum(body - air, 0)
    bone = _skeleton(build, apex, base, rng) * (body > 0)
    return Anatomy(soft, bone, lung_tissue, (lungs[0], lungs[1]), np.zeros_like(soft), (SCALE, SCALE))


def _body(x: np.ndarray, y: np.ndarray, build: float, depth: float, rng: np.random.Generator) -> np.ndarray:
    """Centimetres of soft tissue: neck, shoulders and trunk, elliptical in section."""
    neck, trunk = rng.uniform(48, 62) * build, rng.uniform(158, 180) * build
    shoulder = rng.uniform(25, 50)
    slope = expit((y - shoulder) / 9)
    half = neck + (trunk * 1.14 - neck) * slope - 0.14 * trunk * np.clip((y - 120) / 150, 0, 1)
    section = np.sqrt(np.clip(1 - (x / half) ** 2, 0, 1))
    below = 1 + rng.uniform(0.1, 0.3) * expit((y - 300) / 12)
    return np.asarray(depth * section * below, dtype=np.float32)


def _lung(x: np.ndarray, y: np.ndarray, build: float, apex: float, base: float, rng: np.random.Generator) -> np.ndarray:
    """Share 0 to 1 of the lung's depth, for the side where `x` grows outwards."""
    s = np.clip((y - apex) / (base - apex), 0, 1.3)
    outer = build * rng.uniform(118, 136) * np.sqrt(np.clip(1 - (1 - np.minimum(s, 1)) ** rng.uniform(2.2, 3.2), 0, 1))
    outer += build * 8 * s
    inner = build * (14 + 14 * s)
    middle, half = (outer + inner) / 2, np.maximum((outer - inner) / 2, 1)
    across = np.clip(1 - np.abs((x - middle) / half) ** 3, 0, 1) ** 0.6
    dome = base - 34 + rng.uniform(0.75, 1.15) * 46 * np.clip((x / build - 62) / 60, -1.2, 1.2) ** 2
    floor = expit((dome - y) / rng.uniform(2.0, 3.5))
    top = expit((y - apex - 5) / 3.5)
    return np.asarray(gaussian_filter(across * floor * top * (x > 0), 1.2), dtype=np.float32)


def _heart(x: np.ndarray, y: np.ndarray, build: float, base: float, rng: np.random.Generator) -> np.ndarray:
    """Heart and great vessels, 0 to 1: what hides the lung beside the spine."""
    tilt = np.deg2rad(rng.uniform(28, 48))
    centre_x, centre_y = rng.uniform(16, 28) * build, base - rng.uniform(52, 66)
    dx, dy = x - centre_x, y - centre_y
    along, across = dx * np.cos(tilt) + dy * np.sin(tilt), -dx * np.sin(tilt) + dy * np.cos(tilt)
    ventricles = (along / (rng.uniform(62, 78) * build)) ** 2 + (across / (rng.uniform(44, 54) * build)) ** 2
    arch = ((x - rng.uniform(8, 13) * build) / (20 * build)) ** 2 + ((y - rng.uniform(112, 130)) / 40) ** 2
    shape = np.minimum(ventricles, arch)
    return np.asarray(expit((1 - shape) * 9), dtype=np.float32)


def _canvas() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("F", (SIZE * 2, SIZE * 2))
    return image, ImageDraw.Draw(image)


def _points(xs: np.ndarray, ys: np.ndarray) -> list[tuple[float, float]]:
    """Millimetres, x from the midline, to pixels of the canvas."""
    return [((float(x) + FIELD_MM / 2) / SCALE * 2, float(y) / SCALE * 2) for x, y in zip(xs, ys, strict=True)]


def _shrink(image: Image.Image, blur: float) -> np.ndarray:
    return np.asarray(gaussian_filter(np.asarray(image.reduce(2), dtype=np.float32), blur), dtype=np.float32)


def _vessels(side: int, build: float, apex: float, base: float, rng: np.random.Generator) -> np.ndarray:
    """Branches from the hilum outwards, thinner and thinner: centimetres of blood."""
    image, draw = _canvas()
    hilum = np.array([side * 30 * build, (apex + base) / 2 - 12])

    def grow(start: np.ndarray, angle: float, width: float, length: float) -> None:
        if width < 0.7:
            return
        bend = angle + rng.normal(0, 0.18)
        end = start + length * np.array([side * np.cos(bend), np.sin(bend)])
        steps = _points(np.array([start[0], end[0]]), np.array([start[1], end[1]]))
        draw.line(steps, fill=0.22 * width, width=max(1, round(width / SCALE * 2)))
        for spread in (rng.uniform(0.15, 0.5), -rng.uniform(0.15, 0.5)):
            grow(end, bend + spread, width * rng.uniform(0.62, 0.8), length * rng.uniform(0.68, 0.88))

    for angle in (-1.35, -0.8, -0.25, 0.3, 0.75, 1.15):
        grow(hilum, angle + rng.normal(0, 0.1), rng.uniform(5, 7.5), rng.uniform(26, 36) * build)
    mottle = gaussian_filter(rng.normal(0, 0.25, (SIZE, SIZE)), 1.6)
    return np.asarray(_shrink(image, 0.7) + mottle, dtype=np.float32)


def _skeleton(build: float, apex: float, base: float, rng: np.random.Generator) -> np.ndarray:
    """Centimetres of bone: spine, ribs, collar bones, the heads of the arms."""
    image, draw = _canvas()
    spine = rng.uniform(15, 19) * build
    pitch = rng.uniform(21, 26)
    for top in np.arange(rng.uniform(-10, 5), FIELD_MM, pitch):
        box = _points(np.array([-spine, spine]), np.array([top, top + pitch * 0.8]))
        draw.rectangle([*box[0], *box[1]], fill=1.5)
    spinal = _shrink(image, 2.0)
    total = spinal
    behind, in_front = _canvas(), _canvas()
    ribs = rng.uniform(8, 10.5)
    t = np.linspace(0, 1, 24)
    for number in range(10):
        start = apex - 14 + number * (base - apex + 20) / ribs
        reach = build * 138 * np.sqrt(np.clip(1 - (1 - (number + 1.2) / 8.5) ** 2, 0.12, 1))
        posterior = start - 12 * np.sin(np.pi * t * 0.9) + 52 * t**2.2
        anterior = posterior[-1] + 62 * t**0.85
        for side in (-1, 1):
            outwards = side * (spine + (reach - spine) * t**0.9)
            _stroke(behind[1], outwards, posterior, 0.62, 9)
            _stroke(in_front[1], side * (reach - reach * 0.62 * t), anterior, 0.33, 10)
    for canvas in (behind, in_front):
        band = _shrink(canvas[0], 0.9)
        total = total + band + 0.5 * np.abs(band - gaussian_filter(band, 2.2))
    image, draw = _canvas()
    for side in (-1, 1):
        collar = apex + rng.uniform(2, 12) - 22 * t + 8 * np.sin(2 * np.pi * t)
        _stroke(draw, side * build * (14 + 128 * t), collar, 1.0, 11)
        x, y = side * build * 168, apex + rng.uniform(0, 20)
        corners = _points(np.array([x - 24, x + 24]), np.array([y - 24, y + 24]))
        draw.ellipse([*corners[0], *corners[1]], fill=1.6)
        _stroke(draw, np.array([x, x * 1.1]), np.array([y, y + 170]), 1.8, 26)
    total = total + _shrink(image, 1.2)
    return np.asarray(total * rng.uniform(0.8, 1.2), dtype=np.float32)


def _stroke(draw: ImageDraw.ImageDraw, xs: np.ndarray, ys: np.ndarray, fill: float, width: float) -> None:
    """A line of so many millimetres' width."""
    draw.line(_points(xs, ys), fill=fill, width=round(width / SCALE * 2), joint="curve")

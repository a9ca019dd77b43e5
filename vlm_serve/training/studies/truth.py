"""What is known of a simulated study, because it was made so: the nouns that the generators share.

Sides are the patient's. In a picture the patient's right is on the left, as in every film and section shown.
"""

from dataclasses import dataclass

import numpy as np

MASK_SIZE = 32
"""Rows and columns of a mask that says where in the model's square picture a finding lies."""

SPLITS = ("train", "validation", "test")

SIDES = ("right", "left")
EXTENTS = ("small", "moderate", "large")
CHEST_ZONES = ("upper", "middle", "lower")
CHEST_FINDINGS = ("nodule", "effusion", "pneumothorax", "consolidation")


@dataclass(frozen=True, slots=True)
class Truth:
    """One study's parameters.

    `finding` is `none` or one of `CHEST_FINDINGS`, `fracture` and `haemorrhage`; with `none`, all after it but
    `source` are None. `zone` is upper, middle or lower in the chest, frontal, parietal, temporal or occipital in
    the head, proximal, middle or distal in a long bone. `size_mm` is the greatest extent of a nodule or a
    haemorrhage, `extent` the share of the lung that the other findings of the chest take. `source` names the
    image that the study was made from; the splits go by it.
    """

    modality: str
    region: str
    plane: str
    finding: str
    side: str | None
    zone: str | None
    size_mm: int | None
    extent: str | None
    source: str


@dataclass(frozen=True, slots=True)
class Picture:
    """Pixels `[rows, columns]` and what they show.

    Int16 Hounsfield units for CT, uint16 from 0 to 4095 otherwise; `mask` (bool, same shape) is where the finding
    is; `spacing` of rows and columns in mm; `window` is level and width for CT, None otherwise.
    """

    pixels: np.ndarray
    mask: np.ndarray
    spacing: tuple[float, float]
    window: tuple[float, float] | None
    truth: Truth

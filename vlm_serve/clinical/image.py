"""`ClinicalImage`: pixels ready for a model's processor, with the receipt of how they came about.

Made only in `clinical/`; everything after it trusts it and never sees the file again.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class WindowReceipt:
    """The grey-level window that was applied. `source` says where it came from: `file window 1 of 2`,
    `file VOI LUT`, `percentile`. `center` and `width` are in modality units (Hounsfield for CT); None for a LUT.
    """

    source: str
    center: float | None = None
    width: float | None = None
    function: str = "LINEAR"


@dataclass(frozen=True, slots=True)
class ImageReceipt:
    """What was decoded and how it became pixels: enough to make the same picture again from the same file.

    It goes back to the caller in `x_vlm_serve`, never into a log. `file_sha256` is over the bytes as sent,
    `pixel_sha256` over dtype, shape and bytes of the pixels made of them.
    """

    media_type: str
    file_sha256: str
    pixel_sha256: str
    rows: int
    columns: int
    decoder: str
    transfer_syntax: str | None = None
    photometric_interpretation: str | None = None
    bits_stored: int | None = None
    frame: int = 0
    frames: int = 1
    modality_transform: str | None = None
    window: WindowReceipt | None = None
    inverted: bool = False
    attributes: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ClinicalImage:
    """`pixels` is uint8 RGB `[rows, columns, 3]`. `attributes` are the allow-listed ones (Modality,
    BodyPartExamined, ViewPosition, Laterality, …) that a prompt may see; also found in the receipt.
    """

    pixels: np.ndarray
    receipt: ImageReceipt

    @property
    def attributes(self) -> Mapping[str, str]:
        return self.receipt.attributes

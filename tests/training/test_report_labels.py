"""The labeller against the generator: what a generated report says is read back as the truth it was written from."""

from collections.abc import Iterator
from itertools import product

import numpy as np

from vlm_serve.clinical.report import label_report
from vlm_serve.training.studies.reports import write_report
from vlm_serve.training.studies.truth import CHEST_FINDINGS, CHEST_ZONES, EXTENTS, SIDES, Truth

REGIONS = ("head", "neck", "chest", "abdomen", "pelvis", "leg", "knee", "foot", "arm", "shoulder")
PLANES = ("frontal", "lateral", "axial", "coronal", "sagittal")


def truths() -> Iterator[Truth]:
    for modality, region, plane in product(("radiograph", "CT", "MR"), REGIONS, PLANES):
        yield Truth(modality, region, plane, "none", None, None, None, None, "source")
    for side, finding, zone, extent in product(SIDES, CHEST_FINDINGS, CHEST_ZONES, EXTENTS):
        yield Truth("radiograph", "chest", "frontal", finding, side, zone, 12, extent, "source")
    for side, zone in product(SIDES, ("frontal", "parietal", "temporal", "occipital")):
        yield Truth("CT", "head", "axial", "haemorrhage", side, zone, 22, None, "source")
    for side, zone in product(SIDES, ("proximal", "middle", "distal")):
        yield Truth("radiograph", "leg", "frontal", "fracture", side, zone, None, None, "source")


def test_every_wording_of_a_generated_report_is_labelled_as_its_truth() -> None:
    for truth in truths():
        for seed in range(4):
            labels = label_report(write_report(truth, np.random.default_rng(seed)))
            assert (labels.modality, labels.region, labels.plane) == (truth.modality, truth.region, truth.plane)
            assert labels.positive == ({} if truth.finding == "none" else {truth.finding: truth.side})

"""The report of a simulated study: what a radiologist would dictate who saw what its truth says, and no more."""

import numpy as np

from vlm_serve.training.studies.truth import Truth

PROMPTS = (
    "Write a draft report of this study.",
    "Write a radiology report for this image.",
    "Draft the report.",
    "Please write the findings and the impression.",
    "Report this study.",
    "What does this image show? Write a report.",
    "Describe the findings, then give an impression.",
    "Draft report, please.",
)


_ASKED = ("pneumothorax", "nodule", "consolidation", "fracture", "haemorrhage", "pleural effusion")
_REGIONS = {"leg": "legs"}


def write_report(truth: Truth, rng: np.random.Generator) -> str:
    """Technique, Findings and Impression, in one of several wordings drawn by `rng`."""
    findings, impression = _normal(truth, rng) if truth.finding == "none" else _abnormal(truth, rng)
    return f"TECHNIQUE: {_study(truth)}\nFINDINGS: {findings}\nIMPRESSION: {impression}"


def _study(truth: Truth) -> str:
    return f"{truth.plane.capitalize()} {truth.modality} of the {_REGIONS.get(truth.region, truth.region)}."


def _normal(truth: Truth, rng: np.random.Generator) -> tuple[str, str]:
    findings = {
        "chest": ("The lungs are clear.", "Both lungs are clear. No effusion or pneumothorax."),
        "head": ("No haemorrhage.", "No intracranial haemorrhage is seen."),
        "leg": ("No fracture.", "The bones are intact. No fracture is seen."),
    }.get(truth.region, ("No focal abnormality.", "No abnormality is seen."))
    return str(rng.choice(findings)), "No acute finding."


def _abnormal(truth: Truth, rng: np.random.Generator) -> tuple[str, str]:
    side, zone = truth.side, truth.zone
    if truth.finding in ("effusion", "pneumothorax"):
        name = "pleural effusion" if truth.finding == "effusion" else "pneumothorax"
        first = f"There is a {truth.extent} {side} {name}."
        second = f"{str(truth.extent).capitalize()} {side} {name}."
        return str(rng.choice((first, second))), second
    if truth.finding == "consolidation":
        text = f"There is a {truth.extent} consolidation in the {side} lung, {zone} zone."
        return text, f"{str(side).capitalize()} {zone} zone consolidation."
    if truth.finding == "nodule":
        text = f"There is a {truth.size_mm} mm nodule in the {side} lung, {zone} zone."
        return text, f"{str(side).capitalize()} {zone} zone nodule."
    if truth.finding == "haemorrhage":
        text = f"There is a {truth.size_mm} mm hyperdense haemorrhage in the {side} {zone} region."
        return text, f"{str(side).capitalize()} intracranial haemorrhage."
    text = f"There is a fracture of the {side} lower leg in its {zone} third."
    return text, f"Fracture of the {side} lower leg."


def ask_and_answer(truth: Truth, rng: np.random.Generator) -> tuple[str, str]:
    """A question about the study and its short answer: a follow-up is no report."""
    kind = rng.integers(4)
    if kind == 0:
        return "What kind of image is this?", _study(truth)
    if kind == 1:
        asked = str(rng.choice(_ASKED))
        if asked.endswith(truth.finding):
            return f"Is there a {asked}?", f"Yes, on the {truth.side}."
        return f"Is there a {asked}?", f"No {asked} is seen."
    if kind == 2:
        if truth.finding == "none":
            return "Is anything abnormal?", "No abnormality is seen."
        return "Is anything abnormal?", f"Yes: {truth.finding} on the {truth.side}."
    if truth.finding == "none":
        return "Which side is abnormal?", "Neither side is abnormal."
    return "Which side is abnormal?", f"The {truth.side} side."

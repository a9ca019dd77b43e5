"""A report's sections, and its labels: findings, their sides and their negation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_serve.clinical.report import FindingLabel, ReportSections, label_report, parse_sections

REPORT = """\
TECHNIQUE: Frontal radiograph of the chest.
FINDINGS: There is a large pneumothorax on the right, in the upper zone. No pleural effusion.
IMPRESSION: Large right pneumothorax."""


@pytest.mark.parametrize(
    "heading",
    [
        "FINDINGS:",
        "Findings:",
        "findings :",
        "Findings\n",
        "**Findings:** ",
        "**FINDINGS**\n",
        "**Findings**: ",
        "## Findings\n",
        "### FINDINGS:\n",
        "__Findings:__ ",
        "  Findings: ",
        "Finding: ",
    ],
)
def test_a_heading_is_known_in_every_dress(heading: str) -> None:
    sections = parse_sections(f"Written today.\n{heading}Clear lungs.\nNo effusion.\nIMPRESSION: Normal.")
    assert sections == ReportSections(
        preamble="Written today.", findings="Clear lungs.\nNo effusion.", impression="Normal."
    )


@pytest.mark.parametrize(
    ("heading", "name"),
    [
        ("Clinical history", "indication"),
        ("Reason for exam", "indication"),
        ("Examination", "technique"),
        ("Comparison", "comparison"),
        ("Conclusion", "impression"),
        ("Indications", "indication"),
    ],
)
def test_a_section_has_several_names(heading: str, name: str) -> None:
    assert getattr(parse_sections(f"{heading}: Something."), name) == "Something."


def test_headings_may_follow_on_one_line() -> None:
    sections = parse_sections("Technique: CT of the head. Findings: A haematoma. Impression: Haematoma.")
    assert sections == ReportSections(technique="CT of the head.", findings="A haematoma.", impression="Haematoma.")


@pytest.mark.parametrize(
    "text",
    ["Findings are normal.", "No further findings: none to report.", "The impression of a mass.", "Impression is good"],
)
def test_a_word_inside_a_sentence_is_no_heading(text: str) -> None:
    assert parse_sections(text) == ReportSections(preamble=text)


def test_sections_of_one_name_are_joined() -> None:
    assert parse_sections("FINDINGS: One.\nIMPRESSION: Two.\nFINDINGS: Three.").findings == "One.\nThree."


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        (REPORT, ()),
        ("FINDINGS: Clear.\nIMPRESSION:\n  \n", ("Impression",)),
        ("IMPRESSION: Clear.", ("Findings",)),
        ("The lungs are clear.", ("Findings", "Impression")),
        ("", ("Findings", "Impression")),
    ],
)
def test_required_sections_that_are_absent_or_empty_are_named(text: str, missing: tuple[str, ...]) -> None:
    assert parse_sections(text).missing == missing


_BODY = st.text("abXY .,;()#*_-–é12\n\t\r", max_size=60).map(lambda text: "\n".join(text.splitlines()).strip())


@given(st.builds(ReportSections, _BODY, _BODY, _BODY, _BODY, _BODY, _BODY))
def test_sections_written_out_are_read_back(sections: ReportSections) -> None:
    assert parse_sections(sections.to_text()) == sections


@given(st.text(max_size=200))
def test_any_text_has_sections_and_labels(text: str) -> None:
    assert parse_sections(parse_sections(text).to_text()).missing == parse_sections(text).missing
    label_report(text)


def test_a_whole_report_is_labelled() -> None:
    labels = label_report(REPORT)
    assert (labels.modality, labels.region, labels.plane) == ("radiograph", "chest", "frontal")
    assert labels.findings == (
        FindingLabel("effusion", None, negated=True),
        FindingLabel("pneumothorax", "right", negated=False),
    )
    assert labels.positive == {"pneumothorax": "right"}


@pytest.mark.parametrize(
    ("technique", "expected"),
    [
        ("Sagittal MR of the shoulder.", ("MR", "shoulder", "sagittal")),
        ("Axial CT of the head.", ("CT", "head", "axial")),
        ("AP film of the left knee.", ("radiograph", "knee", "frontal")),
        ("MRI of the pelvis, coronal.", ("MR", "pelvis", "coronal")),
        ("Lateral x-ray of the foot.", ("radiograph", "foot", "lateral")),
        ("Computed tomography of the abdomen.", ("CT", "abdomen", None)),
        ("Ultrasound of the neck.", ("ultrasound", "neck", None)),
        ("Bilateral mammograms.", ("mammogram", None, None)),
        ("Radiograph of the humeral head and arm.", ("radiograph", "arm", None)),
        ("Frontal radiograph of the tibia.", ("radiograph", "leg", "frontal")),
        ("", (None, None, None)),
    ],
)
def test_modality_region_and_plane_are_read_from_the_technique(
    technique: str, expected: tuple[str | None, ...]
) -> None:
    labels = label_report(f"TECHNIQUE: {technique}\nFINDINGS: No focal abnormality.")
    assert (labels.modality, labels.region, labels.plane) == expected


def test_without_technique_the_sentence_that_names_a_modality_tells() -> None:
    labels = label_report("The heart is normal, also its lateral wall. This is a frontal chest radiograph.")
    assert (labels.modality, labels.region, labels.plane) == ("radiograph", "chest", "frontal")


def test_a_region_that_the_technique_does_not_say_is_read_from_the_findings() -> None:
    labels = label_report("TECHNIQUE: An axial CT.\nFINDINGS: The brain is normal, also on a lateral view.")
    assert (labels.modality, labels.region, labels.plane) == ("CT", "head", "axial")


def test_an_earlier_study_says_nothing_of_this_one() -> None:
    labels = label_report(
        "INDICATION: Pneumothorax?\nTECHNIQUE: Frontal film, effusion seen before.\n"
        "COMPARISON: CT of the chest with a left nodule.\nFINDINGS: Clear.\nIMPRESSION: Normal."
    )
    assert labels.findings == ()
    assert (labels.modality, labels.region) == ("radiograph", None)


@pytest.mark.parametrize(
    ("word", "finding"),
    [
        ("mass", "nodule"),
        ("nodular opacity", "nodule"),
        ("rounded opacity", "nodule"),
        ("pleural fluid", "effusion"),
        ("pneumothoraces", "pneumothorax"),
        ("pneumonia", "consolidation"),
        ("airspace disease", "consolidation"),
        ("opacity", "consolidation"),
        ("cortical break", "fracture"),
        ("hemorrhage", "haemorrhage"),
        ("haematoma", "haemorrhage"),
        ("hematoma", "haemorrhage"),
        ("bleed", "haemorrhage"),
        ("infiltrate", "consolidation"),
    ],
)
def test_synonyms_name_one_finding(word: str, finding: str) -> None:
    assert label_report(f"There is {word} on the left.").positive == {finding: "left"}


@pytest.mark.parametrize(
    "text",
    ["The heart shadow is normal.", "There is mass effect.", "A pericardial effusion.", "The bones are intact.", ""],
)
def test_what_only_sounds_like_a_finding_is_none(text: str) -> None:
    assert label_report(text).findings == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Opacity at the right base in keeping with a pleural effusion.", {"effusion": "right"}),
        ("Right lower lobe opacity consistent with pneumonia.", {"consolidation": "right"}),
        ("Opacity on the left, no effusion.", {"consolidation": "left"}),
    ],
)
def test_an_opacity_is_what_its_clause_calls_it(text: str, expected: dict[str, str]) -> None:
    assert label_report(text).positive == expected


@pytest.mark.parametrize(
    "text",
    [
        "No fracture.",
        "There is no evidence of a fracture.",
        "Without fracture.",
        "Negative for fracture.",
        "The bone is free of fracture.",
        "Absence of fracture.",
        "The fracture has resolved.",
        "The previously described fracture has completely resolved.",
        "A fracture is excluded.",
        "A fracture has been ruled out.",
        "No effusion, pneumothorax or fracture.",
        "Neither effusion nor fracture.",
        "Effusion, nodule and fracture are not seen.",
        "Fracture, nodule and effusion are not seen.",
        "A fracture is no longer visible.",
        "A fracture was not identified.",
        "The study does not show a fracture.",
        "A fracture is unlikely.",
        "Fracture: none.",
        "Not a fracture.",
        "No definite acute displaced fracture is seen.",
        "The effusion is gone: no fracture.",
    ],
)
def test_a_fracture_that_is_denied(text: str) -> None:
    labels = label_report(text)
    assert "fracture" not in labels.positive
    assert FindingLabel("fracture", None, negated=True) in labels.findings


@pytest.mark.parametrize(
    "text",
    [
        "A fracture.",
        "No effusion but a fracture.",
        "No effusion; a fracture.",
        "No effusion, however there is a fracture.",
        "No effusion is seen. A fracture is present.",
        "No abnormality except for a fracture.",
        "No effusion, and the fracture is displaced.",
        "No effusion and a fracture.",
        "No effusion, there is a fracture.",
        "There is no effusion, although a fracture is seen.",
        "No effusion, with a fracture.",
        "No change in the fracture.",
        "No significant interval change in the fracture.",
        "Without change of the fracture.",
        "A fracture cannot be excluded.",
        "The fracture has not resolved.",
        "The fracture is partially resolved.",
        "Not only a fracture.",
        "A fracture is seen, effusion is not seen.",
        "A fracture without effusion.",
        "There is a fracture in the tibia and the effusion has resolved.",
        "There is a fracture of the tibia, approx. 3 cm long.",
        "Possible fracture.",
    ],
)
def test_a_fracture_that_is_there(text: str) -> None:
    assert "fracture" in label_report(text).positive


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A right pneumothorax.", {"pneumothorax": "right"}),
        ("Left-sided pneumothorax.", {"pneumothorax": "left"}),
        ("Consolidation in the right upper lobe.", {"consolidation": "right"}),
        ("Consolidation in the RUL.", {"consolidation": "right"}),
        ("On the left, there is a nodule.", {"nodule": "left"}),
        ("Hyperdense focus of about 22 mm in the left parietal region, consistent with haemorrhage.",
         {"haemorrhage": "left"}),
        ("Bilateral effusions.", {"effusion": "bilateral"}),
        ("Effusions on both sides.", {"effusion": "bilateral"}),
        ("Right and left pleural effusions.", {"effusion": "bilateral"}),
        ("Right effusion. Left effusion.", {"effusion": "bilateral"}),
        ("Left effusion larger than the right.", {"effusion": "bilateral"}),
        ("The left effusion is larger than the right.", {"effusion": "bilateral"}),
        ("The right angle is clear and there is a left effusion.", {"effusion": "left"}),
        ("The left lung is clear, right effusion.", {"effusion": "right"}),
        ("Right upper lobe and left lower lobe consolidation.", {"consolidation": "bilateral"}),
        ("A nodule in the right lung and an effusion on the left.", {"nodule": "right", "effusion": "left"}),
        ("Right nodule and left effusion.", {"nodule": "right", "effusion": "left"}),
        ("In the left lung there is a nodule and on the right an effusion.", {"nodule": "left", "effusion": "right"}),
        ("Nodule and effusion on the right.", {"nodule": "right", "effusion": "right"}),
        ("Right pneumothorax and effusion.", {"pneumothorax": "right", "effusion": "right"}),
        ("Right pneumothorax, the left lung is clear.", {"pneumothorax": "right"}),
        ("Pneumothorax on the right and the left lung is clear.", {"pneumothorax": "right"}),
        ("Right pneumothorax with mediastinal shift to the left.", {"pneumothorax": "right"}),
        ("The mediastinum is displaced to the right by a left effusion.", {"effusion": "left"}),
        ("Shift to the left by a pneumothorax on the right.", {"pneumothorax": "right"}),
        ("No left effusion. Small right effusion.", {"effusion": "right"}),
        ("A nodule.", {"nodule": None}),
        ("A nodule of approx. 3 mm on the left.", {"nodule": "left"}),
        ("There is a large\npneumothorax on the\nright.", {"pneumothorax": "right"}),
    ],
)  # fmt: skip
def test_a_side_belongs_to_its_finding(text: str, expected: dict[str, str | None]) -> None:
    assert label_report(text).positive == expected


def test_a_side_that_is_denied_is_kept_beside_the_one_that_is_not() -> None:
    labels = label_report("No left effusion. Small right effusion.")
    assert labels.findings == (
        FindingLabel("effusion", "right", negated=False),
        FindingLabel("effusion", "left", negated=True),
    )


@pytest.mark.parametrize(
    ("findings", "impression", "expected"),
    [
        ("Right effusion.", "Left effusion.", {"effusion": "left"}),
        ("Right effusion.", "No effusion.", {}),
        ("Right effusion.", "No left effusion.", {"effusion": "right"}),
        ("No effusion.", "Right effusion.", {"effusion": "right"}),
        ("Right effusion.", "Pleural effusion.", {"effusion": "right"}),
        ("Right effusion.", "No acute finding.", {"effusion": "right"}),
        ("Right effusion.", "Left nodule.", {"effusion": "right", "nodule": "left"}),
    ],
)
def test_the_impression_has_the_last_word_on_what_it_names(
    findings: str, impression: str, expected: dict[str, str]
) -> None:
    assert label_report(f"FINDINGS: {findings}\nIMPRESSION: {impression}").positive == expected

"""Scores of drafts, against figures worked out by hand."""

from pathlib import Path

import pytest
from PIL import Image

from vlm_serve.training.scores import CLASSES, Accuracy, draw_confusion, rouge_l, score

CHEST = "TECHNIQUE: Frontal radiograph of the chest.\n"
KNEE = "TECHNIQUE: Sagittal MR of the knee.\n"


def report(technique: str, finding: str | None) -> str:
    return f"{technique}FINDINGS: {f'There is a {finding}.' if finding else 'Normal.'}\nIMPRESSION: As above."


REFERENCES = [
    report(CHEST, "right nodule"),
    report(CHEST, "right nodule"),
    report(CHEST, "left effusion"),
    report(CHEST, None),
    report(KNEE, None),
]
DRAFTS = [
    report(CHEST, "right nodule"),
    report(CHEST, "left nodule"),
    report(CHEST, "right nodule"),
    report(CHEST, None),
    report(CHEST, "fracture"),
]


def test_precision_recall_and_f1_of_a_finding() -> None:
    scores = score(DRAFTS, REFERENCES)
    nodule, effusion, fracture, normal = (
        scores.findings[name] for name in ("nodule", "effusion", "fracture", "no finding")
    )
    assert (nodule.precision, nodule.recall, nodule.f1, nodule.support) == (2 / 3, 1.0, 0.8, 2)
    assert (effusion.precision, effusion.recall, effusion.f1, effusion.support) == (None, 0.0, 0.0, 1)
    assert (fracture.precision, fracture.recall, fracture.f1, fracture.support) == (0.0, None, 0.0, 0)
    assert (normal.precision, normal.recall, normal.f1, normal.support) == (1.0, 0.5, 2 / 3, 2)
    assert scores.findings["haemorrhage"].f1 is None


@pytest.mark.parametrize(
    ("name", "right", "total", "majority"),
    [
        ("modality", 4, 5, 4 / 5),
        ("region", 4, 5, 4 / 5),
        ("plane", 4, 5, 4 / 5),
        ("finding", 3, 5, 2 / 5),  # the first, the second (but for its side) and the fourth
        ("side", 2, 5, 2 / 5),  # the first and the fourth
        ("finding with side", 1, 3, 2 / 3),
        ("sections", 5, 5, None),
    ],
)
def test_accuracies_count_studies_beside_the_commonest_answer(
    name: str, right: int, total: int, majority: float | None
) -> None:
    assert score(DRAFTS, REFERENCES).accuracies[name] == Accuracy(right, total, majority)


def test_the_side_is_right_whatever_the_finding_is_called() -> None:
    scores = score([report(CHEST, "left nodule")], [report(CHEST, "left effusion")])
    assert [scores.accuracies[name].right for name in ("side", "finding", "finding with side")] == [1, 0, 0]


def test_what_a_reference_does_not_say_is_not_counted() -> None:
    accuracies = score(["A frontal CT of the chest."], ["FINDINGS: A nodule."]).accuracies
    assert accuracies["modality"] == Accuracy(0, 0, None)
    assert (accuracies["modality"].rate, accuracies["modality"].interval) == (None, None)
    assert accuracies["finding with side"].total == 0


@pytest.mark.parametrize("draft", [None, "", " \n"])
def test_a_study_without_a_draft_is_wrong_in_everything_and_stays_in_every_total(draft: str | None) -> None:
    scores = score([*DRAFTS, draft], [*REFERENCES, report(CHEST, None)])
    assert (scores.studies, scores.without_draft) == (6, 1)
    before = score(DRAFTS, REFERENCES)
    for name in ("modality", "region", "plane", "finding", "side", "sections"):
        assert scores.accuracies[name].right == before.accuracies[name].right
        assert scores.accuracies[name].total == 6
    assert scores.findings["no finding"].recall == 1 / 3
    assert scores.confusion["no finding"]["no draft"] == 1
    assert scores.rouge_l == pytest.approx((before.rouge_l or 0) * 5 / 6)


def test_a_draft_needs_findings_and_impression_to_be_complete() -> None:
    drafts = ["FINDINGS: Normal.", "IMPRESSION: Normal.", "FINDINGS: Normal.\nIMPRESSION: Normal."]
    assert score(drafts, REFERENCES[:3]).accuracies["sections"] == Accuracy(1, 3)


def test_the_confusion_table_says_what_was_drafted_for_what() -> None:
    confusion = score(DRAFTS, REFERENCES).confusion
    counts = {(row, column): n for row, cells in confusion.items() for column, n in cells.items() if n}
    assert counts == {
        ("nodule", "nodule"): 2,
        ("effusion", "nodule"): 1,
        ("no finding", "no finding"): 1,
        ("no finding", "fracture"): 1,
    }
    assert tuple(confusion) == CLASSES == tuple(confusion["nodule"])


def test_of_several_findings_those_that_agree_are_not_confused() -> None:
    reference = "There is a nodule. There is an effusion."
    more, less = "There is a nodule. There is an effusion. There is a fracture.", "There is a nodule."
    confusion = score([more, less], [reference, reference]).confusion
    counts = {(row, column): n for row, cells in confusion.items() for column, n in cells.items() if n}
    assert counts == {
        ("nodule", "nodule"): 2,
        ("effusion", "effusion"): 1,
        ("no finding", "fracture"): 1,
        ("effusion", "no finding"): 1,
    }


@pytest.mark.parametrize(
    ("draft", "reference", "expected"),
    [
        # Lin (2004), 3.1: the longest common subsequence of both is "police the gunman", 3 words of 4 and 4
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("No Effusion!", "no effusion", 1.0),
        ("one", "one two three", 2 * 1 / (1 + 3)),
        ("", "no effusion", 0.0),
        ("other words", "no effusion", 0.0),
    ],
)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(draft: str, reference: str, expected: float) -> None:
    assert rouge_l(draft, reference) == pytest.approx(expected)


def test_the_interval_is_wilsons() -> None:
    # Newcombe, Stat Med 17 (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29, method 3
    table = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611), (1, 29): (0.0061, 0.1718)}
    for counts, interval in table.items():
        assert Accuracy(*counts).interval == pytest.approx(interval, abs=5e-5)


def test_the_json_has_every_figure_and_the_card_every_table() -> None:
    scores = score(DRAFTS, REFERENCES)
    data = scores.to_json()
    assert data["findings"]["nodule"]["recall"] == 1.0
    assert data["accuracies"]["finding"] == {
        "rate": 0.6, "interval": Accuracy(3, 5).interval, "right": 3, "total": 5, "majority": 0.4,
    }  # fmt: skip
    assert data["confusion"]["effusion"]["nodule"] == 1
    lines = scores.lines()
    assert "| finding | 60.0 % | 23.1 to 88.2 % | 3 of 5 | 40.0 % |" in lines
    assert "| nodule | 0.667 | 1.000 | 0.800 | 2 |" in lines
    assert "| effusion | 1 | 0 | 0 | 0 | 0 | 0 | 0 |" in lines


def test_no_studies_have_no_figures() -> None:
    scores = score([], [])
    assert scores.rouge_l is None
    assert all(row.rate is None for row in scores.accuracies.values())
    assert scores.lines()


def test_a_draft_too_few_is_an_error() -> None:
    with pytest.raises(ValueError, match="argument"):
        score(DRAFTS[1:], REFERENCES)


def test_the_confusion_table_is_drawn(tmp_path: Path) -> None:
    """The cell with every study of its row is dark, an empty one is not."""
    path = tmp_path / "confusion.png"
    draw_confusion(score(DRAFTS, REFERENCES), path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) >= 600
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20) or []}
    assert {(8, 48, 107), (247, 251, 255)} <= colours  # both ends of matplotlib's "Blues"

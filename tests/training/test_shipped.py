"""What is shipped, asked through a running server: the drafts come from the picture."""

import json
from pathlib import Path

import numpy as np
import pytest

from api.cli import main
from api.cli.settings import SHIPPED_ADAPTER
from vlm_serve import LLM, SamplingParams
from vlm_serve.clinical.report import label_report
from vlm_serve.clinical.simulated import write_simulated
from vlm_serve.config import cache_dir
from vlm_serve.families.demo import VISION_WEIGHTS
from vlm_serve.training.dataset import read_studies
from vlm_serve.training.progress import Silent
from vlm_serve.training.scores import Scores, score
from vlm_serve.training.studies.reports import PROMPTS, write_report
from vlm_serve.training.studies.simulate import Counts, as_image, leg_film, phantom_chest_film, simulate
from vlm_serve.training.studies.truth import CHEST_FINDINGS

pytestmark = pytest.mark.demo

ASKED = ("modality", "side", "finding")


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty films of phantoms, whose seeds no training has: they need nothing fetched."""
    folder = tmp_path_factory.mktemp("phantoms")
    makers = [
        *((phantom_chest_film, finding) for finding in ("none", *CHEST_FINDINGS) for _ in range(3)),
        *((leg_film, finding) for finding in ("none", "fracture", "fracture", "fracture", "none")),
    ]
    rows = []
    for number, (maker, finding) in enumerate(makers):
        rng = np.random.default_rng([2026, number])
        picture = maker(rng, "test", finding=finding)
        (folder / f"{number}.dcm").write_bytes(write_simulated(as_image(picture), str(number)))
        report = write_report(picture.truth, rng)
        prompt = PROMPTS[number % len(PROMPTS)]
        rows.append({"id": str(number), "images": [f"{number}.dcm"], "prompt": prompt, "report": report})
    (folder / "test.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def evaluated(data: Path, out: Path, *flags: str) -> Scores:
    """Of the shipped adapter on the embedded default, each with its digest in the result."""
    assert (
        main(["evaluate", "--data", str(data), "--model", "radiology", "--out", str(out), "--keep-drafts", *flags]) == 0
    )
    result = json.loads((out / "scores.json").read_text())
    assert result["weights"]["adapter"]["id"] == "radiology"
    references = [json.loads(line)["report"] for line in (data / "test.jsonl").read_text().splitlines()]
    return score([row["text"] for row in result["studies"]], references)


def test_drafts_of_phantoms_tell_modality_side_and_finding(phantoms: Path, tmp_path: Path) -> None:
    scores = evaluated(phantoms, tmp_path)
    rates = {name: scores.accuracies[name].rate for name in ASKED}
    assert all(rate is not None and rate >= 0.85 for rate in rates.values()), rates
    sections = scores.accuracies["sections"].rate
    assert sections == 1


def test_a_follow_up_after_the_draft_names_the_side(phantoms: Path) -> None:
    studies = read_studies(phantoms / "test.jsonl")
    report = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": study.images[0]}, {"type": "text", "text": PROMPTS[0]}],
            }
        ]
        for study in studies
    ]
    greedy = SamplingParams(temperature=0, max_tokens=96)
    with LLM("demo", adapters=SHIPPED_ADAPTER) as llm:
        drafts = llm.chat(report, greedy, adapter="radiology", use_tqdm=False)
        question = {"role": "user", "content": "Which side is abnormal?"}
        follow_up = [
            [*messages, {"role": "assistant", "content": draft.outputs[0].text}, question]
            for messages, draft in zip(report, drafts, strict=True)
        ]
        answers = llm.chat(follow_up, greedy, adapter="radiology", use_tqdm=False)
    sides = [set(label_report(study.report).positive.values()) for study in studies]
    named = [{side for side in ("right", "left") if side in answer.outputs[0].text.lower()} for answer in answers]
    right = sum(side == there for side, there in zip(named, sides, strict=True))
    assert right >= 17, [answer.outputs[0].text for answer in answers]


def test_the_card_tells_what_the_shipped_scores_are() -> None:
    card = (SHIPPED_ADAPTER / "README.md").read_text(encoding="utf-8")
    shipped = json.loads((SHIPPED_ADAPTER / "scores.json").read_text(encoding="utf-8"))
    for name in ASKED:
        row = shipped["test"]["accuracies"][name]
        assert row["rate"] >= 0.85
        assert row["total"] >= 200
        assert f"{row['right']} of {row['total']}" in card
        blank = shipped["blank"]["accuracies"][name]
        assert blank["rate"] <= blank["majority"] + 0.10
    assert "not for diagnostic use" in card
    assert (SHIPPED_ADAPTER / "confusion.png").stat().st_size > 1000


def test_what_ships_is_forty_megabytes_at_most() -> None:
    files = [VISION_WEIGHTS, *(SHIPPED_ADAPTER).glob("*.safetensors")]
    assert len(files) == 2
    assert sum(file.stat().st_size for file in files) <= 40e6


@pytest.mark.slow
def test_two_hundred_and_forty_held_out_studies_served(tmp_path: Path) -> None:
    """As the card says; blanked, no better than the commonest answer and ten points."""
    studies = cache_dir() / "studies-test"
    simulate(studies, Counts(train=0, validation=0), 7, 2, Silent())
    seen = evaluated(studies, tmp_path / "seen")
    blank = evaluated(studies, tmp_path / "blank", "--blank")
    assert seen.studies == 240
    for name in ASKED:
        rate, without = seen.accuracies[name].rate, blank.accuracies[name]
        assert rate is not None
        assert rate >= 0.85
        assert without.rate is not None
        assert without.rate <= (without.majority or 0) + 0.10

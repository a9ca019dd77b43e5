"""How well drafts agree with their references: labels compared finding by finding and study by study.

Serves `vlm-serve evaluate` and the cards of trained adapters. `docs/evaluation.md` says what each figure means.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from rapidfuzz.distance import LCSseq

from vlm_serve.clinical.report import FINDINGS, ReportLabels, label_report, parse_sections
from vlm_serve.types import JsonObject

NO_FINDING = "no finding"
NO_DRAFT = "no draft"
CLASSES = (*FINDINGS, NO_FINDING)

_Z95 = 1.959964


@dataclass(frozen=True, slots=True)
class FindingScore:
    """Counts of studies: the finding is in reference and draft (`hits`), reference (`support`), draft (`drafted`)."""

    hits: int
    support: int
    drafted: int

    @property
    def precision(self) -> float | None:
        """None where no draft names it."""
        return self.hits / self.drafted if self.drafted else None

    @property
    def recall(self) -> float | None:
        """None where no reference names it."""
        return self.hits / self.support if self.support else None

    @property
    def f1(self) -> float | None:
        return 2 * self.hits / (self.support + self.drafted) if self.support + self.drafted else None


@dataclass(frozen=True, slots=True)
class Accuracy:
    """`right` of `total` studies; `majority` is the share that always giving the commonest answer would get right."""

    right: int
    total: int
    majority: float | None = None

    @property
    def rate(self) -> float | None:
        return self.right / self.total if self.total else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the rate (Wilson, J Am Stat Assoc 22, 1927)."""
        if self.total == 0:
            return None
        n, p = self.total, self.right / self.total
        centre = p + _Z95**2 / (2 * n)
        spread = _Z95 * math.sqrt(p * (1 - p) / n + _Z95**2 / (4 * n**2))
        scale = 1 + _Z95**2 / n
        return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


@dataclass(frozen=True, slots=True)
class Scores:
    """The figures of one set of drafts.

    `findings` and `confusion` have a row for every one of `CLASSES`; `confusion[reference][drafted]` counts, with a
    column `no draft` where there are such studies.
    `accuracies` has modality, region, plane, finding, side, finding with side, and sections.
    """

    studies: int
    without_draft: int
    findings: dict[str, FindingScore]
    accuracies: dict[str, Accuracy]
    rouge_l: float | None
    confusion: dict[str, dict[str, int]]

    def to_json(self) -> JsonObject:
        """Everything, with the derived figures; what has no studies to stand on is null."""
        return {
            "studies": self.studies,
            "without_draft": self.without_draft,
            "findings": {
                name: {"precision": row.precision, "recall": row.recall, "f1": row.f1, **asdict(row)}
                for name, row in self.findings.items()
            },
            "accuracies": {
                name: {"rate": row.rate, "interval": row.interval, **asdict(row)}
                for name, row in self.accuracies.items()
            },
            "rouge_l": self.rouge_l,
            "confusion": self.confusion,
        }

    def lines(self) -> list[str]:
        """Markdown for a card: `figure_lines`, then the confusion table."""
        return self.figure_lines() + _table(
            ("reference \\ draft", *self.confusion[NO_FINDING]),
            [(name, *map(str, row.values())) for name, row in self.confusion.items()],
        )

    def figure_lines(self) -> list[str]:
        """Two tables in Markdown, narrow enough for a terminal: accuracies and findings."""
        lines = [f"{self.studies} studies, {self.without_draft} without a draft. ROUGE-L {_shown(self.rouge_l)}.", ""]
        lines += _table(
            ("right in the draft", "share", "95 % interval", "studies", "always the commonest answer"),
            [
                (name, _percent(row.rate), _span(row.interval), f"{row.right} of {row.total}", _percent(row.majority))
                for name, row in self.accuracies.items()
            ],
        )
        return lines + _table(
            ("finding", "precision", "recall", "F1", "studies"),
            [
                (name, _shown(row.precision), _shown(row.recall), _shown(row.f1), str(row.support))
                for name, row in self.findings.items()
            ],
        )


def score(drafts: Sequence[str | None], references: Sequence[str]) -> Scores:
    """Compares each draft with the reference of the same study.

    A draft that is None or blank (its request failed, nothing was said) is wrong in everything.

    Raises:
        ValueError: not as many drafts as references.
    """
    pairs = [
        (label_report(draft) if draft and draft.strip() else None, label_report(reference))
        for draft, reference in zip(drafts, references, strict=True)
    ]
    complete = [bool(draft) and not parse_sections(str(draft)).missing for draft in drafts]
    similarities = [rouge_l(draft or "", reference) for draft, reference in zip(drafts, references, strict=True)]
    return Scores(
        studies=len(pairs),
        without_draft=sum(draft is None for draft, _ in pairs),
        findings={name: _finding_score(name, pairs) for name in CLASSES},
        accuracies={
            **{name: _accuracy(pairs, answer) for name, answer in _ANSWERS.items()},
            "finding with side": _lateralised(pairs),
            "sections": Accuracy(sum(complete), len(pairs)),
        },
        rouge_l=sum(similarities) / len(similarities) if similarities else None,
        confusion=_confusion(pairs),
    )


def rouge_l(draft: str, reference: str) -> float:
    """The F1 of the longest common subsequence of words, in lower case without punctuation (Lin, ACL 2004)."""
    one, other = (re.findall(r"\w+", text.lower()) for text in (draft, reference))
    common = LCSseq.similarity(one, other)
    return 2 * common / (len(one) + len(other)) if common else 0.0


_Pairs = list[tuple[ReportLabels | None, ReportLabels]]

_ANSWERS: dict[str, Callable[[ReportLabels], Hashable]] = {
    "modality": lambda labels: labels.modality,
    "region": lambda labels: labels.region,
    "plane": lambda labels: labels.plane,
    "finding": lambda labels: frozenset(labels.positive),
    "side": lambda labels: frozenset(labels.positive.values()),
}
"""What a study-level accuracy compares; None is what a reference does not say, and its study is not counted."""


def _classes(labels: ReportLabels) -> set[str]:
    return set(labels.positive) or {NO_FINDING}


def _finding_score(name: str, pairs: _Pairs) -> FindingScore:
    drafted = [draft is not None and name in _classes(draft) for draft, _ in pairs]
    there = [name in _classes(reference) for _, reference in pairs]
    hits = sum(one and other for one, other in zip(drafted, there, strict=True))
    return FindingScore(hits, sum(there), sum(drafted))


def _accuracy(pairs: _Pairs, answer: Callable[[ReportLabels], Hashable]) -> Accuracy:
    counted = [(draft, wanted) for draft, reference in pairs if (wanted := answer(reference)) is not None]
    right = sum(draft is not None and answer(draft) == wanted for draft, wanted in counted)
    commonest = Counter(wanted for _, wanted in counted).most_common(1)
    return Accuracy(right, len(counted), commonest[0][1] / len(counted) if commonest else None)


def _lateralised(pairs: _Pairs) -> Accuracy:
    """Over studies with a finding on a side: each of these is in the draft, on that side."""
    sides = [
        (draft, {item for item in reference.positive.items() if item[1] is not None}) for draft, reference in pairs
    ]
    counted = [(draft, wanted) for draft, wanted in sides if wanted]
    right = sum(draft is not None and wanted <= set(draft.positive.items()) for draft, wanted in counted)
    commonest = Counter(frozenset(wanted) for _, wanted in counted).most_common(1)
    return Accuracy(right, len(counted), commonest[0][1] / len(counted) if commonest else None)


def _confusion(pairs: _Pairs) -> dict[str, dict[str, int]]:
    """A finding of both is on the diagonal; the others of a study cross, or meet `no finding` where none is left."""
    columns = (*CLASSES, NO_DRAFT) if any(draft is None for draft, _ in pairs) else CLASSES
    table = {name: dict.fromkeys(columns, 0) for name in CLASSES}
    for draft, reference in pairs:
        there, drafted = _classes(reference), {NO_DRAFT} if draft is None else _classes(draft)
        for name in there & drafted:
            table[name][name] += 1
        if there != drafted:
            for missed in sorted(there - drafted) or [NO_FINDING]:
                for claimed in sorted(drafted - there) or [NO_FINDING]:
                    table[missed][claimed] += 1
    return table


def draw_confusion(scores: Scores, path: Path) -> None:
    """The confusion table as a PNG file; a cell's shade is its share of its row."""
    from matplotlib.figure import Figure

    columns = list(scores.confusion[NO_FINDING])
    counts = [list(row.values()) for row in scores.confusion.values()]
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.add_subplot(xlabel="drafted", ylabel="reference", title=f"Findings of {scores.studies} studies")
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
    axes.set_yticks(range(len(CLASSES)), CLASSES)
    for row, column in product(range(len(CLASSES)), range(len(columns))):
        colour = "white" if shares[row][column] > 0.5 else "black"
        axes.text(column, row, str(counts[row][column]), ha="center", va="center", color=colour)
    figure.savefig(path, format="png", dpi=120)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    rule = "|---" + "|--:" * (len(head) - 1) + "|"
    return [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows), ""]


def _percent(rate: float | None) -> str:
    return "–" if rate is None else f"{100 * rate:.1f} %"


def _span(interval: tuple[float, float] | None) -> str:
    return "–" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


def _shown(figure: float | None) -> str:
    return "–" if figure is None else f"{figure:.3f}"

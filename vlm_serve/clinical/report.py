"""A report's text taken apart: its sections, and what it says of the study as labels.

Serves the scores of drafts (`training/scores.py`), which compare a draft's labels with its reference's.
"""

import re
from dataclasses import dataclass, fields
from itertools import pairwise

FINDINGS = ("nodule", "effusion", "pneumothorax", "consolidation", "fracture", "haemorrhage")
REQUIRED_SECTIONS = ("findings", "impression")

RIGHT, LEFT, BILATERAL = "right", "left", "bilateral"

_HEADINGS = {
    "indication": r"(?:clinical )?(?:indications?|history|information)|reason for (?:the )?exam(?:ination)?",
    "technique": r"technique|exam(?:ination)?|procedure",
    "comparison": r"comparisons?",
    "findings": r"findings?",
    "impression": r"impressions?|conclusions?|opinion",
}
_NAMES = "|".join(f"(?P<{{mark}}_{name}>{words})" for name, words in _HEADINGS.items())
_HEADING = re.compile(
    r"(?:^[ \t]*|(?<=[.!?])[ \t]+)(?:#{1,6}[ \t]*)?"
    rf"(?:(?P<bold>\*\*|__)(?:{_NAMES.format(mark='bold')})[ \t]*:?[ \t]*(?P=bold)[ \t]*:?"
    rf"|(?:{_NAMES.format(mark='plain')})[ \t]*(?::|$))[ \t]*",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class ReportSections:
    """A report by its sections, in the order in which it is written; an empty text is a section that is not there.

    `preamble` is what stands before the first heading.
    """

    preamble: str = ""
    indication: str = ""
    technique: str = ""
    comparison: str = ""
    findings: str = ""
    impression: str = ""

    @property
    def missing(self) -> tuple[str, ...]:
        """Those of Findings and Impression that are absent or empty, by their headings."""
        return tuple(name.capitalize() for name in REQUIRED_SECTIONS if not getattr(self, name))

    def to_text(self) -> str:
        """The report with its headings in capitals, each followed by its text."""
        sections = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return "\n".join(text if name == "preamble" else f"{name.upper()}: {text}" for name, text in sections if text)


def parse_sections(text: str) -> ReportSections:
    """The sections of a report, stripped of white space at both ends.

    A heading stands at the start of a line or after the end of a sentence, in any case: `FINDINGS:`, `Findings`
    alone on its line, `**Findings:**`, `## Findings`. Sections of one name are joined.
    """
    text = "\n".join(text.splitlines())
    headings = list(_HEADING.finditer(text))
    starts = [match.start() for match in headings] + [len(text)]
    found = {"preamble": [text[: starts[0]]]}
    for match, end in zip(headings, starts[1:], strict=True):
        name = next(key.partition("_")[2] for key, value in match.groupdict().items() if value and key != "bold")
        found.setdefault(name, []).append(text[match.end() : end])
    return ReportSections(**{name: "\n".join(filter(None, map(str.strip, texts))) for name, texts in found.items()})


@dataclass(frozen=True, slots=True)
class FindingLabel:
    """One finding that a report names; `side` is right, left, bilateral or None."""

    finding: str
    side: str | None
    negated: bool


@dataclass(frozen=True, slots=True)
class ReportLabels:
    """What a report says of its study; None is what it does not say.

    A finding has at most one label that is not negated, beside those that deny it on another side.
    """

    modality: str | None
    region: str | None
    plane: str | None
    findings: tuple[FindingLabel, ...]

    @property
    def positive(self) -> dict[str, str | None]:
        """The findings that the report says are there, each with its side."""
        return {label.finding: label.side for label in self.findings if not label.negated}


_MODALITIES = {
    "radiograph": r"radiogra(?:ph|phs|phy|phic)|x-?rays?|plain films?|films?",
    "CT": r"ct|cat scan|computed tomogra(?:m|phy)",
    "MR": r"mri?|magnetic resonance",
    "ultrasound": r"ultraso(?:und|nography)|sonogra(?:m|phy|phic)",
    "mammogram": r"mammogra(?:m|ms|phy|phic)",
}
_REGIONS = {
    "head": r"(?<!humeral )(?<!femoral )(?<!radial )head(?! of)|skull|brain|crani(?:al|um)|intracranial",
    "neck": r"(?<!femoral )(?<!humeral )(?<!surgical )neck(?! of)|cervical",
    "chest": r"chest|thora(?:x|cic)|lungs?|pulmonary",
    "abdomen": r"abdom(?:en|inal)",
    "pelvis": r"pelvi[sc]",
    "knee": r"knees?",
    "foot": r"foot|feet",
    "leg": r"legs?|thighs?|calf|tibia|femur|lower (?:limb|extremity)",
    "shoulder": r"shoulders?",
    "arm": r"(?:fore)?arms?|humerus|upper (?:limb|extremity)",
}
_PLANES = {
    "frontal": r"frontal|ap|pa|antero-?posterior|postero-?anterior",
    "lateral": r"lateral",
    "axial": r"axial|transverse",
    "coronal": r"coronal",
    "sagittal": r"sagittal",
}
_FINDINGS = {
    "nodule": r"nodul(?:es?|ar opacit(?:y|ies))|round(?:ed)? opacit(?:y|ies)|mass(?:es)?(?! effect)|coin lesions?",
    "effusion": r"(?<!pericardial )effusions?|pleural fluid|hydrothorax|fluid in the pleural (?:space|cavity)",
    "pneumothorax": r"(?:hydro)?pneumothora(?:x|xes|ces)|(?:pleural air|air in the pleural (?:space|cavity))",
    "consolidation": r"consolidat(?:ions?|ed|ive)|infiltrates?|(?:broncho)?pneumonia|air-?space disease",
    "fracture": r"fractur(?:es?|ed)|cortical (?:break|disruption)",
    "haemorrhage": r"ha?emorrhag(?:es?|ic)|ha?ematomas?|bleed(?:s|ing)?|blood",
    "opacity": r"opacit(?:y|ies)|opacification|shadowing",
}
"""`opacity` is vague: a consolidation where its clause names nothing else, else the description of what it names."""
_SIDES = {RIGHT: r"right|r[uml]l", LEFT: r"left|l[ul]l", BILATERAL: r"bilateral(?:ly)?|both"}


def _any_of(table: dict[str, str]) -> re.Pattern[str]:
    alternatives = "|".join(f"(?P<{name}>{words})" for name, words in table.items())
    return re.compile(rf"\b(?:{alternatives})\b", re.IGNORECASE)


_MODALITY, _REGION, _PLANE = _any_of(_MODALITIES), _any_of(_REGIONS), _any_of(_PLANES)
_FINDING, _SIDE = _any_of(_FINDINGS), _any_of(_SIDES)

_SENTENCE_END = re.compile(r"(?<!approx\.)(?<!e\.g\.)(?<!i\.e\.)(?<!vs\.)(?<=[.!?])\s+|\n\s*(?=\n|[A-Z*•-]|\d+[.)])")
_CLAUSE_END = re.compile(
    r";|\b(?:but|however|(?:al)?though|yet|while|whereas|except(?:ing)?(?: for)?|apart from|aside from|other than)\b"
    r"|(?:,|\band\b)(?=\s+(?:the|an?)\s(?:[\w-]+\s){1,4}(?:is|are|has|have|appears?|remains?|shows?)\b)"
)
_NO_NEGATION = re.compile(
    r"\b(?:no|without)\s(?:(?:significant|interval|appreciable|substantial|definite|relevant|evidence of|further)\s)*"
    r"(?:changes?|increase|decrease|progression|improvement|resolution)\b"
    r"|\b(?:not|partial(?:ly)?|nearly|almost|in?completely)\s(?:yet\s|been\s|be\s|completely\s|fully\s)*"
    r"(?:resolved|cleared|disappeared|excluded|ruled out)\b"
    r"|\b(?:cannot|can not|could not)\s(?:be\s|entirely\s)*(?:excluded?|ruled? out)\b|\bnot only\b"
)
_NEGATES_WHAT_FOLLOWS = re.compile(
    r"\b(?:no(?! longer)|nor|neither|without|negative for|(?:free|clear) of|(?:absence|lack|resolution) of|rules out"
    r"|excludes|fails to (?:show|demonstrate|reveal)"
    r"|not (?:an?|show|demonstrate|reveal|contain|have|see|identify|suggest(?:ive of)?))\b"
)
_NEGATION_ENDS = re.compile(r",\s*with\b|\b(?:and|with)\san?\b|(?:,|\band)\sthere\s(?:is|are)\b")
_SEEN = r"(?:seen|identified|visible|visuali[sz]ed|present|evident|demonstrated|detected|found|shown|noted)"
_NEGATES_WHAT_PRECEDES = re.compile(
    rf"\b(?:(?:not(?:\s\w+)?|no longer)\s{_SEEN}|resolved|cleared|disappeared|absent|excluded|ruled out|unlikely)\b"
    r"|:\s*(?:none|no|absent|negative)\b"
)
_SHIFT = re.compile(r"\b(?:shift|displace|deviat|push)\w*\b[^,;]*?\bto(?:wards?)?\s(?:the\s)?(?:right|left)\b")
_NOT_A_LIST = re.compile(r"\b(?:of|in|on|at|to|from|within|with|without|is|are|was|were|has|have|seen|shows?)\b")
_COORDINATES = re.compile(r",|/|\b(?:and|or|nor)\b")
_JOINS_SIDES = re.compile(r"\b(?:and|or|than)\b")
_PARTS_SIDES = re.compile(r",|\b(?:is|are|was|were|has|have)\b(?!.*\bthan\b)")


def label_report(text: str) -> ReportLabels:
    """The labels of a report, drafted or written.

    Modality, region and plane are read from Technique; without it, from the first sentence that names a modality
    (the region from any). Findings are read from Findings, Impression and what stands before the headings, never
    from Indication, Technique or Comparison; hedged ones ("possible", "cannot be excluded") count as there.
    Impression has the last word on each finding that it names: it can deny it or move it to the other side, and
    where it names no side, that of Findings stands. A sentence of normality ("No acute finding") names no
    finding and changes nothing.

    Negation follows NegEx (Chapman et al., J Biomed Inform 34, 2001: triggers before and after a finding, and
    phrases that only look like one), with a clause instead of a count of words for the scope.
    """
    sections = parse_sections(text)
    body = "\n".join(filter(None, (sections.preamble, sections.findings, sections.impression)))
    sentences = _sentences(body)
    described = sections.technique or next((line for line in sentences if _MODALITY.search(line)), "")
    earlier = [label for line in _sentences(f"{sections.preamble}\n\n{sections.findings}") for label in _label(line)]
    last = [label for line in _sentences(sections.impression) for label in _label(line)]
    return ReportLabels(
        modality=_first(_MODALITY, described),
        region=_first(_REGION, described) or _first(_REGION, body),
        plane=_first(_PLANE, described),
        findings=tuple(label for finding in FINDINGS for label in _resolve(finding, earlier, last)),
    )


def _first(pattern: re.Pattern[str], text: str) -> str | None:
    match = pattern.search(text)
    return match.lastgroup if match else None


def _sentences(text: str) -> list[str]:
    return [sentence for sentence in _SENTENCE_END.split(text) if sentence.strip()]


def _resolve(finding: str, earlier: list[FindingLabel], last: list[FindingLabel]) -> list[FindingLabel]:
    """One label for the finding where the report says it is there, and those that deny it (elsewhere)."""
    before, after = ([label for label in labels if label.finding == finding] for labels in (earlier, last))
    denied = dict.fromkeys(label for label in (*before, *after) if label.negated)
    sides = [{label.side for label in labels if not label.negated} for labels in (before, after)]
    there = sides[1] or {
        side for side in sides[0] if not any(label.negated and label.side in (None, side) for label in after)
    }
    if not there:
        return list(denied)
    if there == {None}:
        there = there | sides[0]
    denied = dict.fromkeys(label for label in denied if label.side is not None and label.side not in there)
    return [FindingLabel(finding, _one_side(there), False), *denied]


def _one_side(sides: set[str | None]) -> str | None:
    named = sides - {None}
    return named.pop() if len(named) == 1 else BILATERAL if named else None


def _label(sentence: str) -> list[FindingLabel]:
    text = _NO_NEGATION.sub("", " ".join(sentence.lower().split()))
    return [label for clause in _CLAUSE_END.split(text) for label in _label_clause(clause)]


def _label_clause(clause: str) -> list[FindingLabel]:
    clause = _SHIFT.sub(lambda match: " " * len(match.group()), clause)
    mentions = list(_FINDING.finditer(clause))
    negated = _negated(clause, mentions)
    if any(mention.lastgroup != "opacity" and not no for mention, no in zip(mentions, negated, strict=True)):
        kept = [mention.lastgroup != "opacity" for mention in mentions]
        mentions = [mention for mention, keep in zip(mentions, kept, strict=True) if keep]
        negated = [no for no, keep in zip(negated, kept, strict=True) if keep]
    return [
        FindingLabel("consolidation" if mention.lastgroup == "opacity" else str(mention.lastgroup), side, no)
        for mention, side, no in zip(mentions, _sides(clause, mentions), negated, strict=True)
    ]


def _listed(clause: str, one: re.Match[str], other: re.Match[str]) -> bool:
    """Whether two mentions are members of one list: `nodule, mass or effusion`."""
    between = clause[one.end() : other.start()]
    return bool(_COORDINATES.search(between)) and not _NOT_A_LIST.search(between)


def _negated(clause: str, mentions: list[re.Match[str]]) -> list[bool]:
    negated = [False] * len(mentions)
    for trigger in _NEGATES_WHAT_FOLLOWS.finditer(clause):
        stop = _NEGATION_ENDS.search(clause, trigger.end())
        end = stop.start() if stop else len(clause)
        negated = [no or trigger.end() <= m.start() < end for no, m in zip(negated, mentions, strict=True)]
    for trigger in _NEGATES_WHAT_PRECEDES.finditer(clause):
        index = sum(mention.end() <= trigger.start() for mention in mentions) - 1
        while index >= 0:
            negated[index] = True
            if index == 0 or not _listed(clause, mentions[index - 1], mentions[index]):
                break
            index -= 1
    return negated


def _sides(clause: str, mentions: list[re.Match[str]]) -> list[str | None]:
    """Each finding's side: the words of side nearest to it; members of a list share one."""
    if not mentions:
        return []
    owned: list[list[re.Match[str]]] = [[] for _ in mentions]
    for word in _SIDE.finditer(clause):
        owned[_owner(clause, word, mentions)].append(word)
    sides = [_side_of(clause, mention, words) for mention, words in zip(mentions, owned, strict=True)]
    for order in (range(1, len(mentions)), range(len(mentions) - 2, -1, -1)):
        for index in order:
            other = index - 1 if order.step > 0 else index + 1
            first, second = sorted((index, other))
            if sides[index] is None and _listed(clause, mentions[first], mentions[second]):
                sides[index] = sides[other]
    return sides


def _owner(clause: str, word: re.Match[str], mentions: list[re.Match[str]]) -> int:
    """The finding that a word of side belongs to: the next one if nothing but its adjectives stands between."""
    following = next((i for i, mention in enumerate(mentions) if mention.start() >= word.end()), None)
    if following is None:
        return len(mentions) - 1
    between = clause[word.end() : mentions[following].start()]
    adjective = not (_COORDINATES.search(between) or re.search(r"\b(?:of|in|on|at|to|with|without)\b", between))
    return following if following == 0 or adjective else following - 1


def _side_of(clause: str, mention: re.Match[str], words: list[re.Match[str]]) -> str | None:
    if not words:
        return None
    before = [index for index, word in enumerate(words) if word.end() <= mention.start()]
    nearest = before[-1] if before else 0
    gaps = [clause[one.end() : other.start()] for one, other in pairwise(words)]
    joined = [bool(_JOINS_SIDES.search(gap)) and not _PARTS_SIDES.search(gap) for gap in gaps]
    start = next((index + 1 for index in range(nearest - 1, -1, -1) if not joined[index]), 0)
    stop = next((index for index in range(nearest, len(joined)) if not joined[index]), len(joined))
    return _one_side({word.lastgroup for word in words[start : stop + 1]})

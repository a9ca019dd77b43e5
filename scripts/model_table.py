"""The table of docs/models.md, from what passing tests recorded: nothing in it is written by hand.

pytest tests/families -o junit_family=xunit1 --junitxml tests.xml
python scripts/model_table.py tests.xml [MORE.xml …]
"""

import argparse
import sys
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
BEGIN = "<!-- the table begins: make model-table -->\n"
END = "<!-- the table ends -->\n"

Recorded = Mapping[str, Sequence[str]]
"""What a row's tests recorded: the values of each property."""


def _each(values: Sequence[str]) -> str:
    return ", ".join(sorted(set(values)))


def _largest(values: Sequence[str]) -> str:
    return max(values, key=lambda value: float(value.split("%")[0]))


def _devices(values: Sequence[str]) -> str:
    return _each([{"cpu": "CPU", "cuda": "GPU"}[value] for value in values])


COLUMNS: Mapping[str, tuple[str, Callable[[Sequence[str]], str]]] = {
    "model_type": ("model_type", _each),
    "largest_logit_error": ("largest logit error", _largest),
    "splits": ("splits", _largest),
    "lora": ("LoRA", _each),
    "quantization": ("quantized", _each),
    "bfloat16_disagreement": ("bfloat16", _largest),
    "device": ("tested on", _devices),
}
"""By the property: the header, and how the values of several tests make one cell."""


def read(files: Sequence[Path]) -> dict[tuple[str, str], Recorded]:
    """The properties of the tests that passed, by family and row."""
    found: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for case in (case for file in files for case in ET.parse(file).iter("testcase")):
        said = [(one.get("name", ""), one.get("value", "")) for one in case.iter("property")]
        names = dict(said)
        if "row" not in names or any(case.find(outcome) is not None for outcome in ("failure", "error", "skipped")):
            continue
        for name, value in said:
            found[names["family"], names["row"]][name].append(value)
    return dict(found)


def table(found: Mapping[tuple[str, str], Recorded]) -> str:
    """One line a row, those of text alone last. A cell for which nothing was recorded has a dash."""
    headers = ["covers", "family", *(header for header, _ in COLUMNS.values())]
    lines = [headers, ["---"] * len(headers)]
    for family, row in sorted(found, key=lambda key: (key[0] == "Text", key[0].lower(), key[1].lower())):
        recorded = found[family, row]
        cells = (join(recorded[name]) if name in recorded else "–" for name, (_, join) in COLUMNS.items())
        lines.append([row, family, *cells])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+", metavar="XML", help="pytest's, of the form xunit1")
    parser.add_argument("--page", type=Path, default=PAGE, help="what to rewrite (default: docs/models.md)")
    arguments = parser.parse_args()
    found = read(arguments.reports)
    if not found:
        print(
            "These reports name no row of the table: run tests/families with -o junit_family=xunit1.", file=sys.stderr
        )
        return 1
    page = arguments.page.read_text(encoding="utf-8")
    before, old = page.split(BEGIN)
    _, after = old.split(END)
    arguments.page.write_text(before + BEGIN + table(found) + END + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

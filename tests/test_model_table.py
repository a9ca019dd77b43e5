"""The pages on model families say what is so: the table is what tests recorded, and has every family that is served."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.model_table import BEGIN, COLUMNS, END, PAGE
from vlm_serve.families import FAMILIES

SCRIPT = PAGE.parent.parent / "scripts" / "model_table.py"

REPORT = """<testsuites><testsuite>
<testcase name="parity"><properties>
<property name="row" value="Llama 2"/><property name="family" value="Text"/><property name="model_type" value="llama"/>
<property name="device" value="cpu"/><property name="largest_logit_error" value="9.0e-06"/>
<property name="splits" value="31"/><property name="lora" value="decoder"/>
</properties></testcase>
<testcase name="quantized"><properties>
<property name="row" value="Llama 2"/><property name="family" value="Text"/><property name="device" value="cuda"/>
<property name="quantization" value="awq"/><property name="quantization" value="GGUF Q8_0"/>
<property name="largest_logit_error" value="1.0e-05"/>
</properties></testcase>
<testcase name="image"><properties>
<property name="row" value="Zoo"/><property name="family" value="Zebra"/><property name="model_type" value="zebra"/>
<property name="bfloat16_disagreement" value="3.1% (3.2%)"/>
</properties></testcase>
<testcase name="failed"><properties>
<property name="row" value="Zoo"/><property name="family" value="Zebra"/><property name="lora" value="decoder"/>
</properties><failure message="logits differ"/></testcase>
<testcase name="expected to fail"><properties>
<property name="row" value="Zoo"/><property name="family" value="Zebra"/><property name="splits" value="3"/>
</properties><skipped type="pytest.xfail"/></testcase>
<testcase name="broken"><properties>
<property name="row" value="None"/><property name="family" value="None"/>
</properties><error message="setup"/></testcase>
<testcase name="of no row"><properties><property name="lora" value="decoder"/></properties></testcase>
</testsuite></testsuites>"""


def rewrite(folder: Path, report: str) -> subprocess.CompletedProcess[str]:
    """Runs the script on a report and a page of two lines beside a table."""
    (folder / "tests.xml").write_text(report)
    (folder / "page.md").write_text(f"Before.\n{BEGIN}| old |\n{END}After.\n")
    command = [sys.executable, str(SCRIPT), str(folder / "tests.xml"), "--page", str(folder / "page.md")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_table_has_what_passing_tests_recorded_and_a_dash_for_the_rest(tmp_path: Path) -> None:
    assert rewrite(tmp_path, REPORT).returncode == 0
    page = (tmp_path / "page.md").read_text()
    assert page == (
        f"Before.\n{BEGIN}"
        "| covers | family | model_type | largest logit error | splits | LoRA | quantized | bfloat16 | tested on |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| Zoo | Zebra | zebra | – | – | – | – | 3.1% (3.2%) | – |\n"
        "| Llama 2 | Text | llama | 1.0e-05 | 31 | decoder | GGUF Q8_0, awq | – | CPU, GPU |\n"
        f"{END}After.\n"
    )


def test_a_report_without_properties_leaves_the_page_as_it_is(tmp_path: Path) -> None:
    run = rewrite(tmp_path, "<testsuites/>")
    assert run.returncode == 1
    assert "junit_family=xunit1" in run.stderr
    assert "| old |" in (tmp_path / "page.md").read_text()


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    """The table of docs/models.md."""
    text = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    header, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())
    assert header == ["covers", "family", *(name for name, _ in COLUMNS.values())]
    return [dict(zip(header, line, strict=True)) for line in lines]


def test_every_family_and_model_type_that_is_served_has_a_row(rows: list[dict[str, str]]) -> None:
    assert {row["family"] for row in rows} == {family.__name__.removesuffix("Family") for family in FAMILIES}
    assert {row["model_type"] for row in rows} == {name for family in FAMILIES for name in family.model_types}


def test_every_row_has_parity_splits_and_lora(rows: list[dict[str, str]]) -> None:
    for row in rows:
        assert float(row["largest logit error"]) <= 1e-4, row
        assert int(row["splits"]) > 0 or "paligemma" in row["model_type"], row
        assert "CPU" in row["tested on"], row
        assert "–" not in row["LoRA"], row


def test_the_files_are_as_small_as_the_page_says() -> None:
    """To ten lines, so that a comment more does not count."""
    page = PAGE.with_name("families.md").read_text(encoding="utf-8")
    told = {name: int(count) for name, count in re.findall(r"`families/(\w+)\.py`, has fewer than (\d+)\s+lines", page)}
    assert len(told) == 2
    files = {Path(file) for file in map(inspect.getfile, FAMILIES)}
    lines = {file.stem: len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    for name, count in told.items():
        assert count - 10 <= lines[name] < count
    assert min(lines, key=lines.__getitem__) in told

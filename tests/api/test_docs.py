"""`docs/api.md` keeps its word: its examples run, and it names every field, endpoint, error code and metric."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pydicom.data import get_testdata_file

from api.app import create_app
from api.cli.arguments import build_parser
from api.errors import TABLE
from api.schemas import ChatCompletionRequest
from tests.api.conftest import Served
from tests.api.scripted import ScriptedLLM
from vlm_serve.config import ServerConfig

DOCUMENT = (Path(__file__).parent.parent.parent / "docs" / "api.md").read_text(encoding="utf-8")

CT = str(get_testdata_file("CT_small.dcm"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)


def for_the_test(served: Served, example: str) -> str:
    """Asks the test's server for the test's model, about a file that is there."""
    return example.replace("http://127.0.0.1:8000", served.url).replace('"demo"', '"tiny"').replace("chest.dcm", CT)


def test_the_examples_in_python_run(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {"__name__": "docs"}
    try:
        for example in blocks("python"):
            exec(compile(for_the_test(served, example), "docs/api.md", "exec"), namespace)
    finally:  # left open by an example that fails, it would fail another test
        namespace["client"].close()
    out = capsys.readouterr().out
    assert "Not for diagnostic use." in out
    assert "find_prior" in out


def test_the_examples_of_the_shell_run(served: Served) -> None:
    commands = [command for block in blocks("bash") for command in re.split(r"\n(?=\S)(?!\})", block.strip())]
    requests = [command for command in commands if command.startswith("curl")]
    assert len(requests) == 4
    for command in requests:
        out = subprocess.run(
            for_the_test(served, command), shell=True, capture_output=True, text=True, check=True, timeout=60
        ).stdout  # fmt: skip
        assert "error" not in json.loads(out)
    for command in commands:
        if command.startswith("vlm-serve"):
            build_parser("0").parse_args(command.split()[1:])


@pytest.mark.parametrize("field", sorted(ChatCompletionRequest.model_fields))
def test_every_field_of_a_chat_is_told(field: str) -> None:
    assert f"`{field}" in DOCUMENT


def test_every_endpoint_is_told() -> None:
    app = create_app(ScriptedLLM(), ServerConfig())  # type: ignore[arg-type]
    for path in app.openapi()["paths"]:
        assert path.replace("{model_id}", "{id}") in DOCUMENT


def test_every_status_and_code_of_an_error_is_told() -> None:
    for row in TABLE.values():
        assert f"| {row.status} |" in DOCUMENT
        assert row.code in (None, "invalid_image") or f"`{row.code}`" in DOCUMENT


def test_every_metric_is_told() -> None:
    app = create_app(ScriptedLLM(), ServerConfig())  # type: ignore[arg-type]
    for family in app.state.shared.metrics.registry.collect():
        assert f"`{family.name.removeprefix('vlm_serve:')}`" in DOCUMENT

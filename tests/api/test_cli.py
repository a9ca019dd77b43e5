"""The command line: help that teaches, errors of one line, and each subcommand against a real server or file."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from api.cli import main
from api.cli.arguments import EXAMPLES
from tests.api.conftest import Scripted
from tests.api.scripted import Script, delta
from vlm_serve.errors import RequestFailedError
from vlm_serve.types import FinishReason, ImagePart, TextPart


@pytest.fixture
def png(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(path)
    return path


@pytest.mark.parametrize("command", ["", *filter(None, EXAMPLES)])
def test_help_shows_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*([command] if command else []), "--help"])
    assert end.value.code == 0
    assert "examples:\n  vlm-serve" in capsys.readouterr().out


def test_help_imports_neither_torch_nor_the_server() -> None:
    code = (
        "import sys, api.cli\n"
        "try: api.cli.main(['serve', '--help'])\n"
        "except SystemExit: print([name for name in ('torch', 'fastapi', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == "vlm-serve 0.1.0\n"


def test_a_port_in_use_is_told_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", "--port", port, "--model", "/no/such/model"]) == 1
    captured = capsys.readouterr()
    assert f"Cannot listen on 127.0.0.1 port {port}: Address already in use." in captured.err
    assert "choose another --host or --port" in captured.err
    assert captured.out == "Starting vlm-serve 0.1.0 …\n"


def test_a_setting_without_meaning_is_one_line_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--kv-cache-memory", "lots"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_chat_prints_a_servers_answer(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["chat", "--url", scripted.url, "--system", "Be brief.", "--max-tokens", "5", "--seed", "3", "Hello?"]
    assert main(words) == 0
    assert capsys.readouterr().out == "Hello\n"
    (asked,) = scripted.llm.asked
    chat, sampling = asked.prompt, asked.params
    assert [message.role for message in chat.messages] == ["system", "user"]
    assert (sampling.max_tokens, sampling.temperature, sampling.seed) == (5, 0.0, 3)


def test_chat_sends_files_and_prints_receipts_and_notices(
    scripted: Scripted, png: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dicom = tmp_path / "file-without-a-suffix"
    dicom.write_bytes(bytes(128) + b"DICM")
    files = ["--image", str(png), "--image", str(dicom)]
    assert main(["chat", "--url", scripted.url + "/v1", "--model", "thorax", *files, "Compare."]) == 0
    (asked,) = scripted.llm.asked
    chat = asked.prompt
    assert chat.messages[-1].content == (
        ImagePart(png.read_bytes(), "image/png"),
        ImagePart(dicom.read_bytes(), "application/dicom"),
        TextPart("Compare."),
    )
    out = capsys.readouterr().out
    assert out.startswith("Hello\n")
    for text in ("Image 2", "file window 1 of 2, center 40 width 400 LINEAR", "Modality", "adapter thorax"):
        assert text in out
    assert "The projector is untrained.\nDraft for review by a qualified clinician." in out


def test_chat_says_when_an_answer_was_cut(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    scripted.llm.script = Script([delta("Hel", 1, FinishReason.LENGTH)])
    main(["chat", "--url", scripted.url, "Hello?"])
    assert "cut at 256 tokens" in capsys.readouterr().out


def test_a_conversation_remembers_and_survives_a_failure(
    scripted: Scripted, png: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["first", "/image /no/such/file", f"/image {png}", "second", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert main(["chat", "--url", scripted.url]) == 0
    first, second = (asked.prompt for asked in scripted.llm.asked)
    assert [message.role for message in first.messages] == ["user"]
    assert [message.role for message in second.messages] == ["user", "assistant", "user"]
    assert second.messages[1].content == (TextPart("Hello"),)
    assert len(second.images) == 1
    assert "/no/such/file cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["other", "base"])
def test_a_servers_refusal_is_one_line(scripted: Scripted, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    scripted.llm.script = Script([delta("Hel", 1), RequestFailedError("It failed.")])
    assert main(["chat", "--url", scripted.url, "--model", model, "Hello?"]) == 1
    error = capsys.readouterr().err
    assert error in ("vlm-serve: There is no model of this name.\n", "vlm-serve: It failed.\n")


def test_a_server_that_is_not_there_is_told_with_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert main(["chat", "--url", f"http://127.0.0.1:{free.getsockname()[1]}", "Hello?"]) == 1
    assert "`vlm-serve serve` starts one" in capsys.readouterr().err


def test_a_file_that_is_no_image_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("text")
    assert main(["chat", "--image", str(path), "Look."]) == 1
    assert "is neither DICOM, PNG nor JPEG" in capsys.readouterr().err


def test_bench_measures_text_and_images_and_writes_every_request(
    scripted: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    words = ["bench", "--url", scripted.url, "--concurrency", "1,3", "--requests", "4", "--out", str(out)]
    assert main(words) == 0
    result = json.loads(out.read_text())
    assert [(run["workload"], run["concurrency"]) for run in result["runs"]] == [
        ("text", 1), ("text", 3), ("image", 1), ("image", 3),
    ]  # fmt: skip
    assert all(len(run["timings"]) == 4 for run in result["runs"])
    timing = result["runs"][0]["timings"][0]
    assert 0 < timing["ttft"] <= timing["total"]
    assert (len(timing["inter_token"]), timing["completion_tokens"]) == (1, 2)
    assert result["summary"][0]["output_tokens_per_second"] > 0
    texts = [asked.prompt.messages[0].content[-1] for asked in scripted.llm.asked]
    images = [image for asked in scripted.llm.asked for image in asked.prompt.images]
    assert len(set(texts)) == len(texts)
    assert len(set(images)) == len(images) > 0
    assert "TTFT p50" in capsys.readouterr().out


def test_bench_refuses_a_concurrency_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--concurrency", "1,x"]) == 1
    assert "1,8,32" in capsys.readouterr().err

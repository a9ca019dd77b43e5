"""`vlm-serve evaluate`: what it asks a server, what it counts, and what it writes."""

import asyncio
import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom.data import get_testdata_file

from api.cli import main
from tests.api.conftest import Scripted, Served
from tests.api.scripted import ADAPTER, BASE, Script, delta
from vlm_serve.errors import RequestFailedError
from vlm_serve.types import FinishReason, TextPart

CT = Path(str(get_testdata_file("CT_small.dcm")))

NODULE = "TECHNIQUE: Frontal radiograph of the chest.\nFINDINGS: A nodule on the right.\nIMPRESSION: Right nodule."
NORMAL = "TECHNIQUE: Frontal radiograph of the chest.\nFINDINGS: Clear lungs.\nIMPRESSION: Normal."
REPORTS = (NODULE, NORMAL, NODULE)
PROMPT = "Describe this film."


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    """A folder with test.jsonl: two PNG files and a DICOM file, each of a size of its own."""
    folder = tmp_path / "studies"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (30, 20)), ("b.png", (24, 24))):
        Image.fromarray(rng.integers(0, 256, size[::-1], dtype=np.uint8)).save(folder / name)
    (folder / "c.dcm").write_bytes(CT.read_bytes())
    rows = [
        {"id": f"study-{name[0]}", "images": [name], "prompt": PROMPT, "report": report}
        for name, report in zip(("a.png", "b.png", "c.dcm"), REPORTS, strict=True)
    ]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def answering(text: str) -> Script:
    return Script([delta(text, 1, FinishReason.STOP)])


def run(data: Path, out: Path, *words: str, url: str, status: int = 0) -> Any:
    """Runs the command; what it wrote to scores.json."""
    assert main(["evaluate", "--data", str(data), "--url", url, "--out", str(out), *words]) == status
    return json.loads((out / "scores.json").read_text())


def grey_png(columns: int, rows: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (columns, rows), 128).save(buffer, format="PNG")
    return buffer.getvalue()


def test_drafts_are_scored_against_the_reports(
    scripted: Scripted, studies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted.llm.script = answering(NODULE)
    result = run(studies, tmp_path / "out", "--model", "thorax", url=scripted.url)
    accuracies = result["scores"]["accuracies"]
    assert {name: (row["right"], row["total"]) for name, row in accuracies.items()} == {
        "modality": (3, 3),
        "region": (3, 3),
        "plane": (3, 3),
        "finding": (2, 3),
        "side": (2, 3),
        "finding with side": (2, 2),
        "sections": (3, 3),
    }
    assert result["scores"]["findings"]["nodule"]["precision"] == 2 / 3
    with Image.open(tmp_path / "out" / "confusion.png") as image:
        assert image.format == "PNG"
    out = capsys.readouterr().out
    for word in ("precision", "recall", "F1", "ROUGE-L", "finding with side", "66.7 %"):
        assert word in out


def test_each_study_is_asked_once_greedily_with_its_own_image_and_prompt(
    scripted: Scripted, studies: Path, tmp_path: Path
) -> None:
    run(studies, tmp_path / "out", "--max-tokens", "7", "--concurrency", "1", url=scripted.url)
    chats = [asked.prompt for asked in scripted.llm.asked]
    sent = [(chat.images[0][1].data, chat.messages[0].content[-1]) for chat in chats]
    assert sent == [((studies / name).read_bytes(), TextPart(PROMPT)) for name in ("a.png", "b.png", "c.dcm")]
    assert {(asked.params.temperature, asked.params.max_tokens) for asked in scripted.llm.asked} == {(0.0, 7)}


def test_a_limit_takes_the_first_studies(scripted: Scripted, studies: Path, tmp_path: Path) -> None:
    result = run(studies, tmp_path / "out", "--limit", "2", url=scripted.url)
    assert [row["id"] for row in result["studies"]] == ["study-a", "study-b"]


def test_as_many_requests_run_at_once_as_are_asked_for(
    scripted: Scripted, studies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is answered before three are there."""
    chat, three = scripted.llm.chat, asyncio.Barrier(3)

    async def chat_in_threes(*args: Any, **fields: Any) -> Any:
        async with asyncio.timeout(30), three:
            return await chat(*args, **fields)

    monkeypatch.setattr(scripted.llm, "chat", chat_in_threes)
    run(studies, tmp_path / "out", "--concurrency", "3", url=scripted.url)


def test_blanked_pictures_keep_their_size_and_nothing_else(scripted: Scripted, studies: Path, tmp_path: Path) -> None:
    result = run(studies, tmp_path / "out", "--blank", "--concurrency", "1", url=scripted.url)
    sent = [part.data for asked in scripted.llm.asked for _, part in asked.prompt.images]
    assert sent == [grey_png(30, 20), grey_png(24, 24), grey_png(128, 128)]
    assert result["settings"]["blank"] is True


@pytest.mark.parametrize("keep", [False, True])
def test_texts_are_written_only_when_asked_for(scripted: Scripted, studies: Path, tmp_path: Path, keep: bool) -> None:
    scripted.llm.script = answering(NODULE)
    result = run(studies, tmp_path / "out", *(["--keep-drafts"] if keep else []), url=scripted.url)
    text = (tmp_path / "out" / "scores.json").read_text()
    assert ("A nodule on the right." in text) == keep
    for private in ("Clear lungs", PROMPT, "a.png", str(studies)):
        assert private not in text
    assert result["studies"][0]["draft"]["findings"] == [{"finding": "nodule", "side": "right", "negated": False}]
    assert result["studies"][0].get("text") == (NODULE if keep else None)


def test_the_weights_that_were_scored_are_named_by_their_digests(
    scripted: Scripted, studies: Path, tmp_path: Path
) -> None:
    base = run(studies, tmp_path / "base", url=scripted.url)
    adapter = run(studies, tmp_path / "adapter", "--model", "thorax", url=scripted.url)
    assert base["weights"] == {"model": {"id": "base", "digest": BASE.digest}, "adapter": None}
    assert adapter["weights"]["adapter"] == {"id": "thorax", "digest": ADAPTER.digest}


def test_weights_that_change_on_the_way_are_refused(
    scripted: Scripted, studies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    chat = scripted.llm.chat

    async def chat_with_new_weights(*args: Any, **fields: Any) -> Any:
        scripted.llm.models = (replace(BASE, digest=f"{len(scripted.llm.asked):064}"), ADAPTER)
        return await chat(*args, **fields)

    monkeypatch.setattr(scripted.llm, "models", scripted.llm.models)
    monkeypatch.setattr(scripted.llm, "chat", chat_with_new_weights)
    # One after the other: asked at once, all might be answered after the last change.
    words = ["--data", str(studies), "--url", scripted.url, "--out", str(tmp_path / "out"), "--concurrency", "1"]
    assert main(["evaluate", *words]) == 1
    assert "changed its weights" in capsys.readouterr().err
    assert not (tmp_path / "out" / "scores.json").exists()


def test_a_request_that_fails_is_named_and_counts_as_wrong(
    scripted: Scripted,
    studies: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scripted.llm.script = answering(NORMAL)
    chat = scripted.llm.chat

    async def chat_but_for_the_second(*args: Any, **fields: Any) -> Any:
        run = await chat(*args, **fields)
        if len(scripted.llm.asked) == 2:
            raise RequestFailedError("It failed.")
        return run

    monkeypatch.setattr(scripted.llm, "chat", chat_but_for_the_second)
    result = run(studies, tmp_path / "out", "--concurrency", "1", url=scripted.url, status=1)
    assert result["studies"][1]["draft"] is None
    assert result["studies"][1]["error"] == "It failed."
    assert (result["scores"]["studies"], result["scores"]["without_draft"]) == (3, 1)
    modality = result["scores"]["accuracies"]["modality"]
    assert (modality["right"], modality["total"]) == (2, 3)
    assert result["scores"]["findings"]["no finding"]["recall"] == 0
    out = capsys.readouterr().out
    assert "1 of 3 studies have no draft and count as wrong:\n  study-b: It failed.\n" in out


@pytest.mark.parametrize("words", [[], ["--blank"]], ids=["sent", "blanked"])
def test_a_file_that_is_no_image_costs_its_own_study_and_its_name_stays_here(
    scripted: Scripted, studies: Path, tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (studies / "b.png").write_text("no image")
    result = run(studies, tmp_path / "out", *words, url=scripted.url, status=1)
    assert [row["draft"] is None for row in result["studies"]] == [False, True, False]
    assert "study-b: An image cannot be read, or is neither" in capsys.readouterr().out
    assert "b.png" not in json.dumps(result)


def test_a_model_that_is_not_served_is_refused_with_those_that_are(
    scripted: Scripted, studies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", str(studies), "--out", str(tmp_path / "out"), "--url", scripted.url, "--model", "neuro"]
    assert main(["evaluate", *words]) == 1
    assert "No model neuro is served; these are: base, thorax." in capsys.readouterr().err
    assert scripted.llm.asked == []


def test_a_folder_means_its_test_split_or_its_only_file(scripted: Scripted, studies: Path, tmp_path: Path) -> None:
    test = studies / "test.jsonl"
    rows = test.read_text().splitlines()
    (studies / "train.jsonl").write_text(rows[0])
    assert len(run(studies, tmp_path / "test", url=scripted.url)["studies"]) == 3
    assert len(run(studies / "train.jsonl", tmp_path / "file", url=scripted.url)["studies"]) == 1
    test.unlink()
    assert len(run(studies, tmp_path / "only", url=scripted.url)["studies"]) == 1


def test_a_folder_of_several_files_does_not_say_which(
    studies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (studies / "test.jsonl").rename(studies / "one.jsonl")
    (studies / "two.jsonl").touch()
    assert main(["evaluate", "--data", str(studies), "--out", str(tmp_path)]) == 1
    assert "2 JSONL files and no test.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--limit", "--concurrency"])
def test_a_number_below_one_is_refused(studies: Path, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--data", str(studies), flag, "0"]) == 1
    assert capsys.readouterr().err == f"vlm-serve: {flag} must be at least 1.\n"


def test_a_place_that_cannot_be_written_to_is_told_before_the_work(
    scripted: Scripted, studies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    assert main(["evaluate", "--data", str(studies), "--url", scripted.url, "--out", str(out)]) == 1
    assert "Choose another --out" in capsys.readouterr().err
    assert scripted.llm.asked == []


def asked_for(served: Served, image: bytes, media_type: str, model: str) -> str:
    url = f"data:{media_type};base64,{base64.b64encode(image).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": PROMPT}]
    answer = served.ask([{"role": "user", "content": content}], model=model, max_tokens=6)
    return str(answer.choices[0].message.content)


def test_a_real_model_is_scored_on_what_it_answers_to_the_files(served: Served, studies: Path, tmp_path: Path) -> None:
    words = ("--model", "thorax", "--max-tokens", "6", "--keep-drafts")
    seen = run(studies, tmp_path / "seen", *words, url=f"{served.url}/v1")
    blanked = run(studies, tmp_path / "blanked", *words, "--blank", url=served.url)
    dicom = asked_for(served, CT.read_bytes(), "application/dicom", "thorax")
    assert seen["studies"][2]["text"] == dicom
    assert blanked["studies"][2]["text"] == asked_for(served, grey_png(128, 128), "image/png", "thorax")
    base, adapter = served.client.models.list().data
    assert seen["weights"] == blanked["weights"] == {
        "model": {"id": "tiny", "digest": base.model_extra["digest"]},
        "adapter": {"id": "thorax", "digest": adapter.model_extra["digest"]},
    }  # fmt: skip


def test_a_file_that_the_server_cannot_decode_costs_its_own_study(
    served: Served, studies: Path, tmp_path: Path
) -> None:
    (studies / "c.dcm").write_bytes(CT.read_bytes()[:-2000])
    result = run(studies, tmp_path / "out", "--max-tokens", "2", url=served.url, status=1)
    assert ["error" in row for row in result["studies"]] == [False, False, True]
    assert result["scores"]["without_draft"] == 1


def test_without_a_server_one_is_started_with_the_base_and_the_adapters_named(
    checkpoint: tuple[Path, Path], studies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, adapters = checkpoint
    settings = ["--base", str(folder), "--adapters", str(adapters), "--dtype", "float32", "--kv-cache-memory", "4MiB"]
    words = ["--data", str(studies), "--out", str(tmp_path / "out"), "--model", "thorax", "--max-tokens", "2"]
    assert main(["evaluate", *words, *settings]) == 0
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["weights"]["adapter"]["id"] == "thorax"
    assert "Starting vlm-serve" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["--adapters", "--base", "--config"])
def test_settings_for_a_server_that_runs_already_are_refused(
    scripted: Scripted, studies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    words = ["--data", str(studies), "--out", str(tmp_path / "out"), "--url", scripted.url, word, str(tmp_path)]
    assert main(["evaluate", *words]) == 1
    assert "--url names a server that runs already" in capsys.readouterr().err
    assert scripted.llm.asked == []

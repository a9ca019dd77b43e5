"""The whole way over HTTP: a real tiny model in its engine process, real files, the official client."""

import base64
import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image
from pydicom.data import get_testdata_file

from api.cli import main
from tests.api.conftest import Served
from tests.api.running import connect, read_until

CT = str(get_testdata_file("CT_small.dcm"))
"""pydicom's own CT slice: 128 × 128, signed 16 bits."""

QUESTION = "What does the image show?"


def data_url(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def png() -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def image_part(data: bytes, media_type: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data, media_type)}}


def dicom_part(data: bytes) -> dict[str, Any]:
    return {"type": "dicom", "dicom": {"data": base64.b64encode(data).decode()}}


def asking(*parts: dict[str, Any], text: str = QUESTION) -> Any:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def test_the_official_client_lists_the_base_and_its_adapter(served: Served) -> None:
    base, adapter = served.client.models.list().data
    assert (base.id, adapter.id) == ("tiny", "thorax")
    extra = adapter.model_extra
    assert extra is not None
    assert (extra["parent"], extra["max_model_len"], extra["max_tokens_per_image"]) == ("tiny", 1024, 16)
    assert served.client.models.retrieve("thorax").id == "thorax"


def test_a_text_answer_streamed_is_the_whole_answer(served: Served) -> None:
    messages = asking(text="Is there a fracture?")
    whole = served.ask(messages)
    chunks = list(served.ask(messages, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
    )


def test_max_tokens_ends_an_answer_with_length(served: Served) -> None:
    answer = served.ask(asking(text="No effusion"), max_tokens=3, extra_body={"ignore_eos": True})
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 3)


def test_a_seed_repeats_an_answer(served: Served) -> None:
    def sampled(seed: int) -> str:
        answer = served.client.chat.completions.create(
            model="tiny", messages=asking(text="Compare"), max_tokens=12, temperature=1.5, seed=seed
        )
        return str(answer.choices[0].message.content)

    assert sampled(1) == sampled(1) != sampled(2)


def test_a_dicom_file_is_answered_with_its_receipt_however_it_is_sent(served: Served) -> None:
    data = Path(CT).read_bytes()
    as_url = served.ask(asking(image_part(data, "application/dicom")))
    as_part = served.ask(asking(dicom_part(data)))
    assert as_url.choices[0].message.content == as_part.choices[0].message.content
    about = as_url.model_extra["x_vlm_serve"]
    assert about == as_part.model_extra["x_vlm_serve"]
    (image,) = about["images"]
    assert (image["media_type"], image["rows"], image["columns"]) == ("application/dicom", 128, 128)
    assert image["attributes"]["Modality"] == "CT"
    assert len(image["digest"]) == len(about["model"]["digest"]) == 64
    assert about["adapter"] is None
    assert about["notice"] == "Draft for review by a qualified clinician. Not for diagnostic use."


def test_a_receipt_names_no_patient(served: Served) -> None:
    answer = served.ask(asking(dicom_part(Path(CT).read_bytes())))
    shown = json.dumps(answer.model_dump())
    for text in ("CompressedSamples", "1CT1", "JFK IMAGING"):  # name, id and institution in the file
        assert text not in shown


def test_the_first_event_of_a_stream_has_the_receipts_of_all_images(served: Served) -> None:
    parts = (dicom_part(Path(CT).read_bytes()), image_part(png(), "image/png"))
    chunks = list(served.ask(asking(*parts), stream=True))
    images = chunks[0].model_extra["x_vlm_serve"]["images"]
    assert [image["media_type"] for image in images] == ["application/dicom", "image/png"]
    assert images[0]["digest"] != images[1]["digest"]


def test_an_adapter_answers_under_its_own_name_and_differently(served: Served) -> None:
    messages = asking(dicom_part(Path(CT).read_bytes()))
    base = served.ask(messages, max_tokens=16, extra_body={"ignore_eos": True})
    adapted = served.ask(messages, model="thorax", max_tokens=16, extra_body={"ignore_eos": True})
    assert adapted.model == "thorax"
    assert adapted.model_extra["x_vlm_serve"]["adapter"]["id"] == "thorax"
    assert adapted.model_extra["x_vlm_serve"]["model"] == base.model_extra["x_vlm_serve"]["model"]
    assert adapted.choices[0].message.content != base.choices[0].message.content


def test_a_follow_up_finds_its_prompt_in_the_cache_and_its_image_encoded(served: Served) -> None:
    messages = asking(image_part(png(), "image/png"), text="Is there a mass in the left upper lobe?")
    first = served.ask(messages)
    again = served.ask(messages)
    assert again.usage.prompt_tokens_details.cached_tokens > 16
    assert again.choices[0].message.content == first.choices[0].message.content
    assert _metrics(served)["vlm_serve:prefix_cache_hits_total"] > 16


def _metrics(served: Served) -> dict[str, float]:
    with connect(served.url) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        text = b"".join(iter(lambda: client.recv(65536), b"")).decode()
    return {name: float(value) for name, value in re.findall(r"^(vlm_serve:\w+)\{[^}]*\} (\S+)$", text, re.MULTILINE)}


@pytest.mark.parametrize(
    ("part", "kind", "code"),
    [
        (image_part(b"no picture at all", "image/png"), openai.BadRequestError, "media_mismatch"),
        (image_part(png(), "application/dicom"), openai.BadRequestError, "media_mismatch"),
        (image_part(png()[:300], "image/png"), openai.UnprocessableEntityError, "corrupt_image"),
        (dicom_part(Path(CT).read_bytes()[:-2000]), openai.UnprocessableEntityError, "corrupt_image"),
    ],
    ids=["text as PNG", "PNG as DICOM", "a cut PNG", "a cut DICOM file"],
)
def test_a_bad_file_is_refused_with_its_reason_and_the_next_request_is_served(
    served: Served, part: dict[str, Any], kind: type[openai.APIStatusError], code: str
) -> None:
    with pytest.raises(kind) as refusal:
        served.ask(asking(part))
    assert refusal.value.code == code
    assert served.ask(asking(text="Compare")).usage.completion_tokens > 0


def test_a_prompt_longer_than_the_context_says_the_limit(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="1024") as refusal:
        served.ask(asking(text="lungs " * 600))
    assert refusal.value.code == "context_length_exceeded"


def test_an_unknown_model_is_not_found(served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as refusal:
        served.ask(asking(), model="other")
    assert refusal.value.code == "model_not_found"


def test_the_placeholder_typed_as_text_is_not_an_image(served: Served) -> None:
    """Row 22 of engines.md: image tokens typed as text."""
    answer = served.ask(asking(text="<image> <image>"))
    assert answer.usage.completion_tokens > 0
    assert "x_vlm_serve" not in (answer.model_extra or {})


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_frees_the_engine(served: Served, stream: bool) -> None:
    body = {"model": "tiny", "messages": asking(text="The chest"), "ignore_eos": True, "stream": stream}
    content = json.dumps(body).encode()
    client = connect(served.url)
    client.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(content), content)
    )
    if stream:
        read_until(client, b'"content":"')
    else:
        assert any(_metrics(served)["vlm_serve:num_requests_running"] for _ in range(200)), "the engine never ran it"
    client.close()
    # The engine's steps are in order: once a later request has ended, the abort has been seen.
    served.ask(asking(text="Compare"), max_tokens=40, extra_body={"ignore_eos": True})
    metrics = _metrics(served)
    assert (metrics["vlm_serve:num_requests_running"], metrics["vlm_serve:num_requests_waiting"]) == (0, 0)
    assert metrics["vlm_serve:kv_cache_usage_perc"] == 0


def test_inspect_dicom_shows_what_the_server_decodes(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ct.png"
    assert main(["inspect-dicom", CT, "--json", "--png", str(out)]) == 0
    receipt = json.loads(capsys.readouterr().out)
    answer = served.ask(asking(dicom_part(Path(CT).read_bytes())))
    (shown,) = answer.model_extra["x_vlm_serve"]["images"]
    assert receipt == {name: value for name, value in shown.items() if name != "digest"}
    with Image.open(out) as image:
        assert image.size == (128, 128)


def test_inspect_dicom_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect-dicom", CT]) == 0
    out = capsys.readouterr().out
    for text in ("Modality", "CT", "transfer syntax", "window", "rows", "128"):
        assert text in out


def test_inspect_dicom_refuses_what_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "no.dcm"
    path.write_bytes(b"nothing")
    assert main(["inspect-dicom", str(path)]) == 1
    assert capsys.readouterr().err.startswith("vlm-serve: ")


def test_chat_without_a_server_loads_the_model_itself(
    checkpoint: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["chat", "--model", str(checkpoint[0]), "--dtype", "float32", "--kv-cache-memory", "4MiB"]
    assert main([*words, "--image", CT, "--max-tokens", "4", QUESTION]) == 0
    out = capsys.readouterr().out
    assert "Not for diagnostic use." in out
    assert "Image 1" in out


def test_serve_prints_its_phases_and_a_curl_line_and_ends_on_sigterm(checkpoint: tuple[Path, Path]) -> None:
    """Row 19 of engines.md: what a start takes is measured and told."""
    folder, adapters = checkpoint
    command = [sys.executable, "-m", "api.cli", "serve", "--port", "0", "--model", str(folder), "--dtype", "float32"]
    options = ["--adapters", str(adapters), "--kv-cache-memory", "4MiB", "--max-model-len", "256"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        lines = []
        for line in server.stdout:
            lines.append(line)
            if line.startswith("curl "):
                break
        assert any(re.search(r"✓ .* \d+\.\d\d s$", line) for line in lines), lines
        url = next(line.split()[2].rstrip(".") for line in lines if line.startswith("Ready at "))
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            answer = client.chat.completions.create(model="thorax", messages=asking(text="Compare"), max_tokens=2)
        assert answer.choices
        server.send_signal(signal.SIGTERM)
        log = server.stderr.read()
        assert server.wait(30) == 0
    assert "model=thorax" in log
    assert "Traceback" not in log
    assert "Compare" not in log


def test_a_share_of_a_cpus_memory_is_refused_with_the_remedy(
    checkpoint: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(checkpoint[0]), "--dtype", "float32", "--device", "cpu", "--kv-cache-memory", "80%"]
    assert main(["serve", "--port", "0", *words]) == 1
    captured = capsys.readouterr()
    assert "on a CPU give bytes, such as 2GiB" in captured.err
    assert captured.err.count("\n") == 1


def test_a_model_that_is_none_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "0", "--model", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("vlm-serve: ")
    assert captured.err.count("\n") == 1

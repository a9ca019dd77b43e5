"""`vlm-serve run-batch`: each line answered once, as the API answers it, also over a run that was killed."""

import base64
import codecs
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydicom.data import get_testdata_file
from transformers import PreTrainedTokenizerFast

from api.cli import batch_file, main
from api.cli.batch_file import AnswerFile, read_ids, read_lines
from api.cli.batch_request import URLS
from tests.api.conftest import Served
from tests.checkpoints import CHAT_TEMPLATE, IMAGE_TOKEN, VOCAB_SIZE, make_timm_vlm
from vlm_serve.errors import InvalidRequestError

CHAT, RESPONSES, COMPLETIONS, EMBEDDINGS = URLS
FLAGS = ("--dtype", "float32", "--device", "cpu", "--kv-cache-memory", "4MiB")
CT = Path(str(get_testdata_file("CT_small.dcm")))


def line(custom_id: str, url: str, **body: Any) -> dict[str, Any]:
    limit = "max_output_tokens" if url == RESPONSES else "max_tokens"
    greedy = {} if url == EMBEDDINGS else {"temperature": 0, limit: 6}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "tiny"} | greedy | body}


def asking(*parts: dict[str, Any], text: str = "What does the image show?") -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def write(path: Path, lines: Sequence[dict[str, Any] | str]) -> Path:
    texts = [one if isinstance(one, str) else json.dumps(one) for one in lines]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def answers(path: Path) -> dict[str, dict[str, Any]]:
    """By custom_id; every id once."""
    found = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    assert len({one["custom_id"] for one in found}) == len(found)
    return {one["custom_id"]: one for one in found}


def bodies(path: Path) -> dict[str, dict[str, Any]]:
    """What an answer says, without what every run gives it anew."""
    return {name: comparable(one["response"]["body"]) for name, one in answers(path).items()}


def comparable(body: dict[str, Any]) -> dict[str, Any]:
    body = {key: value for key, value in body.items() if key not in ("id", "created", "created_at")}
    if "usage" in body:
        cached = ("prompt_tokens_details", "input_tokens_details")
        body["usage"] = {key: value for key, value in body["usage"].items() if key not in cached}
    for item in body.get("output", ()):
        del item["id"]
    return body


def run(served: Served, source: Path, out: Path, *flags: str) -> int:
    return main(["run-batch", *like(served), *flags, str(source), str(out)])


def like(served: Served) -> tuple[str, ...]:
    """The model and limits of the server."""
    (base, _) = served.client.models.list().data
    length = str((base.model_extra or {})["max_model_len"])
    return (*FLAGS, "--model", str(served.folder), "--adapters", str(served.adapters), "--max-model-len", length)


IMAGE = {"type": "dicom", "dicom": {"data": base64.b64encode(CT.read_bytes()).decode()}}
BROKEN = {"type": "dicom", "dicom": {"data": base64.b64encode(CT.read_bytes()[:-2000]).decode()}}
GOOD = [
    line("chat", CHAT, messages=asking(text="Is there a fracture?"), logprobs=True, top_logprobs=2),
    line("image", CHAT, messages=asking(IMAGE), model="thorax"),
    line("several", CHAT, messages=asking(text="No"), n=2, seed=3, temperature=1.0, stop=["e"]),
    line("text", COMPLETIONS, prompt="The chest", echo=True, logprobs=1, prompt_logprobs=1),
    line("texts", COMPLETIONS, prompt=["The heart", "No effusion"], n=2, temperature=1.0, seed=5),
    line("tokens", COMPLETIONS, prompt=[1, 50, 51]),
    line("response", RESPONSES, input="Is there a fracture?", instructions="Be brief."),
    line("response about an image", RESPONSES, input=[{"role": "user", "content": [IMAGE]}]),
    line("vectors", EMBEDDINGS, input=["The heart", "clear lungs"]),
    line("vector", EMBEDDINGS, input="The heart", encoding_format="base64"),
]
BAD = [
    line("no such model", CHAT, messages=asking(text="No"), model="nobody"),
    line("unknown field", CHAT, messages=asking(text="No"), temprature=0),
    line("out of range", COMPLETIONS, prompt="No", temperature=3.0),
    line("no image", CHAT, messages=asking({"type": "dicom", "dicom": {"data": "AAAA"}})),
    line("no image of a response", RESPONSES, input=[{"role": "user", "content": [BROKEN]}], instructions="Be brief."),
    line("too long", CHAT, messages=asking(text="word " * 600)),
    line("bad schema", COMPLETIONS, prompt="No", guided_json={"type": "nothing"}),
    line("dimensions", EMBEDDINGS, input="No", dimensions=3),
    line("no body", CHAT) | {"body": None},
]


@pytest.fixture(scope="module")
def answered(served: Served, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """One run over all of them, and its exit status."""
    folder = tmp_path_factory.mktemp("batch")
    others = [
        line("a stream", CHAT, messages=asking(text="No"), stream=True),
        line("a stream of events", RESPONSES, input="No", stream=True),
        line("no such url", "/v1/files"),
        line("a GET", CHAT, messages=asking(text="No")) | {"method": "GET"},
        {"custom_id": "nothing else"},
    ]
    out = folder / "out.jsonl"
    status = run(served, write(folder / "in.jsonl", [*GOOD, *BAD, "", *others]), out)
    return out, status


def post(served: Served, request: dict[str, Any]) -> httpx.Response:
    headers = {"Content-Type": "application/json"}
    return httpx.post(served.url + request["url"], content=json.dumps(request["body"]), headers=headers, timeout=60)


@pytest.mark.parametrize("request_line", GOOD, ids=lambda one: one["custom_id"])
def test_a_line_is_answered_as_the_server_answers_it(
    served: Served, answered: tuple[Path, int], request_line: dict[str, Any]
) -> None:
    one = answers(answered[0])[request_line["custom_id"]]
    response = post(served, request_line)
    assert response.status_code == 200
    assert one["response"]["status_code"] == 200
    found, expected = comparable(one["response"]["body"]), comparable(response.json())
    for body in (found, expected):
        if request_line["url"] == EMBEDDINGS and request_line["body"].get("encoding_format") != "base64":
            vectors = [data.pop("embedding") for data in body["data"]]
            assert [sum(x * x for x in vector) for vector in vectors] == pytest.approx([1] * len(vectors), abs=1e-5)
    assert json.dumps(rounded(found), sort_keys=True) == json.dumps(rounded(expected), sort_keys=True)


def rounded(value: Any) -> Any:
    """Numbers to four places: a step's sums hang on what else is in it."""
    match value:
        case float():
            return round(value, 3) + 0.0
        case dict():
            return {key: rounded(item) for key, item in value.items() if key not in ("decoded_in", "embedding")}
        case list():
            return [rounded(item) for item in value]
    return value


@pytest.mark.parametrize("request_line", BAD, ids=lambda one: one["custom_id"])
def test_an_error_is_the_servers_own_and_stays_on_its_line(
    served: Served, answered: tuple[Path, int], request_line: dict[str, Any]
) -> None:
    one = answers(answered[0])[request_line["custom_id"]]
    response = post(served, request_line)
    assert response.status_code >= 400
    assert one["response"]["status_code"] == response.status_code
    error, expected = one["response"]["body"]["error"], response.json()["error"]
    if request_line["custom_id"] == "no such model":
        expected["message"] = error["message"]  # the server tells of /v1/models, which is not there
    assert error == expected


def test_what_a_batch_cannot_do_is_an_error_that_names_the_field(answered: tuple[Path, int]) -> None:
    found = answers(answered[0])
    for name, param in (
        ("a stream", "stream"),
        ("a stream of events", "stream"),
        ("no such url", "url"),
        ("a GET", "method"),
        ("nothing else", "method"),
    ):
        assert found[name]["response"]["status_code"] == 400
        assert found[name]["response"]["body"]["error"]["param"] == param


def test_the_lines_of_the_output_are_in_openais_form(answered: tuple[Path, int]) -> None:
    out, status = answered
    found = answers(out)
    assert status == 1  # some have an error
    assert len(found) == len(GOOD) + len(BAD) + 5
    ids = set()
    for one in found.values():
        assert set(one) == {"id", "custom_id", "response", "error"}
        assert set(one["response"]) == {"status_code", "request_id", "body"}
        assert one["error"] is None
        assert one["id"].startswith("batch_req_")
        ids |= {one["id"], one["response"]["request_id"]}
    assert len(ids) == 2 * len(found)


def test_placeholders_that_are_no_words_of_the_model_have_the_least_logprob(tmp_path: Path) -> None:
    """As the embedded default has them, one past its vocabulary."""
    folder = tmp_path / "tiny"
    make_timm_vlm(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(["<picture>"], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE.replace(IMAGE_TOKEN, "<picture>")
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"image_token_id": VOCAB_SIZE}
    (folder / "config.json").write_text(json.dumps(config))
    source = write(tmp_path / "in.jsonl", [line("image", CHAT, messages=asking(IMAGE), prompt_logprobs=1)])
    out = tmp_path / "out.jsonl"
    assert main(["run-batch", *FLAGS, "--model", str(folder), str(source), str(out)]) == 0
    found = answers(out)["image"]["response"]["body"]["prompt_logprobs"]
    placeholders = [position[str(VOCAB_SIZE)] for position in found[1:] if str(VOCAB_SIZE) in position]
    assert placeholders == [{"logprob": -9999.0, "rank": VOCAB_SIZE + 1, "decoded_token": "<picture>"}] * 16


LONG = [
    line(f"request-{number}", CHAT, messages=asking(text=f"Study {number}"), max_tokens=8 + number % 9, ignore_eos=True)
    for number in range(40)
]


def start(served: Served, source: Path, out: Path) -> "subprocess.Popen[bytes]":
    flags = (*like(served), "--max-num-seqs", "4")
    # A shell that runs the tests in the background has them ignore SIGINT, and what they start.
    begin = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    main = "import sys; from api.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", f"{begin}; {main}", "run-batch", *flags, str(source), str(out)]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def read_until_lines(process: "subprocess.Popen[bytes]", out: Path, count: int) -> None:
    """Returns as soon as there are that many answers; they are flushed as they come."""
    while process.poll() is None:
        if out.exists() and out.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.01)  # a file of another process has no event
    raise AssertionError(f"it ended before: {process.stderr.read() if process.stderr else ''!r}")


def test_a_killed_run_goes_on_and_answers_each_line_exactly_once(served: Served, tmp_path: Path) -> None:
    source, out, whole = write(tmp_path / "in.jsonl", LONG), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    with start(served, source, out) as process:
        read_until_lines(process, out, 5)
        process.send_signal(signal.SIGKILL)
    cut = out.read_bytes()
    before = cut[: cut.rindex(b"\n") + 1]
    assert 5 <= before.count(b"\n") < len(LONG)
    with out.open("ab") as file:  # as a kill in the middle of a write leaves it
        file.write(b'{"id":"batch_req_12')
    assert run(served, source, out, "--max-num-seqs", "4") == 0
    assert out.read_bytes().startswith(before)
    assert run(served, source, whole, "--max-num-seqs", "4") == 0
    assert set(answers(out)) == {one["custom_id"] for one in LONG}
    assert bodies(out) == bodies(whole)


def test_a_run_that_is_done_loads_no_model_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write(tmp_path / "in.jsonl", LONG[:2]), tmp_path / "out.jsonl"
    with AnswerFile.open(out) as file:
        for one in LONG[:2]:
            file.add(one["custom_id"], "0", 200, {})
    before = out.read_bytes()
    assert main(["run-batch", "--model", str(tmp_path / "no such model"), str(source), str(out)]) == 0
    assert out.read_bytes() == before
    assert "2 of 2 requests are answered already" in capsys.readouterr().err


def test_what_the_engine_failed_at_is_tried_again_and_what_was_refused_is_not(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write(tmp_path / "in.jsonl", LONG[:3]), tmp_path / "out.jsonl"
    refused, failed, unanswered = (one["custom_id"] for one in LONG[:3])
    with AnswerFile.open(out) as file:
        file.add(refused, "0", 400, {})
        file.add(failed, "0", 500, {})
    assert run(served, source, out) == 1
    assert "1 of its lines" in capsys.readouterr().err
    assert {name: one["response"]["status_code"] for name, one in answers(out).items()} == {
        refused: 400,
        failed: 200,
        unanswered: 200,
    }
    before = out.read_bytes()
    assert main(["run-batch", "--model", str(tmp_path / "no such model"), str(source), str(out)]) == 1
    assert out.read_bytes() == before


def test_a_byte_order_mark_is_no_part_of_the_first_request(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", LONG[:2])
    source.write_bytes(codecs.BOM_UTF8 + source.read_bytes())
    assert read_ids(source) == [line.custom_id for line in read_lines(source)] == ["request-0", "request-1"]


def test_ctrl_c_keeps_what_is_answered(served: Served, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", LONG), tmp_path / "out.jsonl"
    with start(served, source, out) as process:
        read_until_lines(process, out, 3)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"Traceback" not in told
    assert len(answers(out)) >= 3


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


ANSWERED = b'{"id":"batch_req_1","custom_id":"a","response":{"status_code":200},"error":null}\n'


@pytest.mark.parametrize(
    "there",
    [
        b"my notes\n",
        b"my notes, without an end",
        b'{"custom_id": "a", "method": "POST"}\n',
        ANSWERED + b"nothing\n",
        b'{"id":"batch_req_2","custom_id":"b","resp\n',
        ANSWERED + b'{"id":"batch_req_2\0\0\0\n' + ANSWERED,
        ANSWERED + b"\0\0\0\nnothing\n",
    ],
)
def test_a_file_that_is_no_file_of_answers_is_left_as_it_is(out: Path, there: bytes) -> None:
    out.write_bytes(there)
    with pytest.raises(InvalidRequestError, match=r"Line \d .*not an answer"), AnswerFile.open(out):
        pass
    assert out.read_bytes() == there


@pytest.mark.parametrize(
    "half",
    [
        b"{",
        b'{"id":"batch_req_77","custom_id":"b","resp',
        b"",
        b"\0" * 4096,
        b'{"id":"batch_req_77","cus\0\0\0\0',
        b'{"id":"batch_req_77","cus\0\0\0\0,"error":null}\n{"id":"batch_re',
    ],
)
def test_half_a_line_at_the_end_is_dropped(out: Path, half: bytes) -> None:
    with AnswerFile.open(out) as file:
        file.add("a", "0", 200, {"text": "Größe"})
    whole = out.read_bytes()
    out.write_bytes(whole + half)
    with AnswerFile.open(out) as file:
        assert file.answered == {"a"}
        file.add("b", "1", 200, {})
        assert out.read_bytes().startswith(whole)
        assert out.read_bytes().count(b"\n") == 2  # handed over as it came
    assert list(answers(out)) == ["a", "b"]


def test_a_new_file_of_answers_is_its_owners(out: Path) -> None:
    with AnswerFile.open(out):
        assert stat.S_IMODE(out.stat().st_mode) == 0o600


def test_answers_are_forced_onto_the_disk_from_time_to_time_and_at_the_end(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced, force = [], os.fsync

    def watched(descriptor: int) -> None:
        force(descriptor)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            forced.append(out.read_bytes().count(b"\n"))

    monkeypatch.setattr(os, "fsync", watched)
    with AnswerFile.open(out) as file:
        monkeypatch.setattr(batch_file, "SYNC_SECONDS", 3600.0)
        for name in "abc":
            file.add(name, "0", 200, {})
        assert forced == [0]
        monkeypatch.setattr(batch_file, "SYNC_SECONDS", 0.0)
        file.add("d", "0", 200, {})
        assert forced == [0, 4]
        monkeypatch.setattr(batch_file, "SYNC_SECONDS", 3600.0)
        file.add("e", "0", 200, {})
    assert forced == [0, 4, 5]


def test_a_line_that_failed_for_our_fault_makes_way_for_another_answer(out: Path) -> None:
    with AnswerFile.open(out) as file:
        for name, status in (("a", 200), ("b", 500), ("c", 400), ("d", 503)):
            file.add(name, "0", status, {"name": name})
        assert file.num_errors == 3
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines) + lines[0][:40])
    out.chmod(0o640)
    with AnswerFile.open(out) as file:
        assert (file.answered, file.num_errors) == ({"a", "c"}, 1)
        assert out.read_bytes() == lines[0] + lines[2]
        with pytest.raises(InvalidRequestError, match="Another run"), AnswerFile.open(out):
            pass
        file.add("b", "1", 200, {})
        file.add("d", "1", 200, {})
    assert list(answers(out)) == ["a", "c", "b", "d"]
    assert stat.S_IMODE(out.stat().st_mode) == 0o640  # as somebody has set it
    assert list(out.parent.iterdir()) == [out]


def test_a_run_that_waited_for_a_file_which_was_replaced_does_not_write_to_the_old_one(out: Path) -> None:
    with AnswerFile.open(out) as file:
        file.add("a", "0", 500, {})
    with out.open("r+b") as old:
        with AnswerFile.open(out):
            pass
        with pytest.raises(InvalidRequestError, match="Another run"):
            batch_file._lock(old, out)


def test_two_runs_do_not_write_to_one_file(out: Path) -> None:
    with AnswerFile.open(out), pytest.raises(InvalidRequestError, match="Another run"), AnswerFile.open(out):
        pass


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "Line 1 .* is no request"),
        (['{"custom_id": "a"}', "[]"], "Line 2 .* is no request"),
        (['{"custom_id": 7}'], "Line 1 .* is no request"),
        (['{"custom_id": "a"}', "", '{"custom_id": "a"}'], "Lines 1 and 3 .* the same custom_id"),
    ],
)
def test_a_file_that_cannot_be_answered_line_by_line_is_refused_before_anything_runs(
    tmp_path: Path, lines: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.jsonl", lines)
    with pytest.raises(InvalidRequestError, match=message):
        read_ids(source)
    assert main(["run-batch", "--model", str(tmp_path / "none"), str(source), str(tmp_path / "out.jsonl")]) == 1
    assert not (tmp_path / "out.jsonl").exists()
    assert "Traceback" not in capsys.readouterr().err

"""A server that is stopped while it answers: each client is told, and the log has no traceback."""

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from api.app import create_app
from api.cli import serve
from tests.api.conftest import text_body
from tests.api.scripted import Asked, Script, ScriptedLLM, ScriptedRun, delta
from vlm_serve.config import ServerConfig

MESSAGE = "The server is shutting down. Send the request again."

IN_INGEST = Script(hold_admission=True)
BEFORE_ITS_FIRST_TOKEN = Script([], hold=True)
MIDWAY = Script([delta("Hel", 1)], hold=True)


class SlowToLeave(ScriptedLLM):
    """Cleans up after a request that is cut off for longer than uvicorn takes to end."""

    async def _admit(self, asked: Asked, model: str, images: int) -> ScriptedRun:
        try:
            return await super()._admit(asked, model, images)
        except asyncio.CancelledError:
            self.run_closed.clear()
            await asyncio.sleep(0.5)
            self.run_closed.set()
            raise


async def answer_of_a_stopped_server(
    llm: ScriptedLLM, script: Script, *, stream: bool, signals: bool
) -> httpx.Response:
    """What a client gets that waits while the server is stopped, by further signals or by the end of the grace."""
    llm.script = script
    app = create_app(llm, ServerConfig())  # type: ignore[arg-type]
    with socket.socket() as listener, serve.stop_signals() as stop:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        serving = asyncio.ensure_future(serve._serve_until(stop, app, listener))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/chat/completions"
        async with httpx.AsyncClient(timeout=20, trust_env=False) as client:
            asking = asyncio.ensure_future(client.post(url, json=text_body(stream=stream)))
            assert await asyncio.to_thread(llm.waiting.wait, 10)
            stop.set()
            while signals and not serving.done():  # an impatient operator's: more than one
                os.kill(os.getpid(), signal.SIGTERM)
                await asyncio.wait([serving], timeout=0.02)
            await serving
            assert llm.run_closed.is_set()  # before the engine is closed
            return await asking


@pytest.mark.parametrize("signals", [True, False], ids=["a second signal", "the grace is over"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("script", [IN_INGEST, BEFORE_ITS_FIRST_TOKEN, MIDWAY], ids=["ingest", "queued", "midway"])
def test_a_request_that_a_stop_cuts_off_is_told_to_be_sent_again(
    script: Script, stream: bool, signals: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(serve, "GRACE", 20 if signals else 0.1)
    with caplog.at_level(logging.INFO):
        response = asyncio.run(answer_of_a_stopped_server(ScriptedLLM(), script, stream=stream, signals=signals))
    if stream and script is not IN_INGEST:
        assert response.status_code == 200
        body = json.loads(response.text.split("\n\n")[-2].removeprefix("data: "))
    else:
        assert response.status_code == 503
        body = response.json()
    assert body["error"] == {"message": MESSAGE, "type": "server_error", "param": None, "code": "unavailable"}
    assert not [record.getMessage() for record in caplog.records if record.exc_info or "Exception" in record.msg]
    assert "error=shutdown" in caplog.text


@pytest.mark.parametrize("signals", [True, False], ids=["a second signal", "the grace is over"])
def test_a_request_cut_off_cleans_up_and_answers_before_the_engine_is_closed(
    signals: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "GRACE", 20 if signals else 0.1)
    llm = SlowToLeave()
    response = asyncio.run(answer_of_a_stopped_server(llm, IN_INGEST, stream=False, signals=signals))
    assert response.status_code == 503


def test_a_stop_leaves_an_answer_its_time_and_docker_its_own() -> None:
    assert serve.GRACE + serve.FAREWELL < 10


def test_serve_says_that_it_starts_before_the_slow_imports() -> None:
    code = (
        "import builtins, sys, api.cli\n"
        "real = print\n"
        "builtins.print = lambda *words, **options: real(*words, 'torch' in sys.modules)\n"
        "api.cli.main(['serve', '--port', 'none'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[0] == "Starting vlm-serve 0.1.0 … False"

"""Connections that say nothing, or too slowly, or are too many: none keeps others out for long."""

import asyncio
import json
import re
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress

import httpx
import pytest

from api import connection
from tests.api.conftest import Scripted, text_body
from tests.api.running import connect, read_until
from tests.api.scripted import Script
from tests.serving.orders import eventually
from vlm_serve.config import ServerConfig

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"

DESCRIPTORS = 200

SERVER = f"""
import asyncio, resource, socket
resource.setrlimit(resource.RLIMIT_NOFILE, ({DESCRIPTORS // 2}, {DESCRIPTORS}))
from api import connection
from api.app import create_app
from api.cli.serve import Server
from tests.api.scripted import ScriptedLLM
from vlm_serve.config import ServerConfig
connection.raise_descriptor_limit()
connection.PATIENCE = 3.0
with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    print(listener.getsockname()[1], resource.getrlimit(resource.RLIMIT_NOFILE)[0], flush=True)
    asyncio.run(Server(create_app(ScriptedLLM(), ServerConfig())).serve(sockets=[listener]))
"""


def rest(client: socket.socket) -> bytes:
    """What the server sends until it closes."""
    received = b""
    client.settimeout(60)
    while piece := client.recv(65536):
        received += piece
    return received


def error_of(answer: bytes) -> tuple[str, str]:
    """Its status line and the error's code."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.split(b"\r\n")[0].decode(), json.loads(body)["error"]["code"]


def wait_for(condition: Callable[[], bool]) -> None:
    asyncio.run(eventually(condition, 60))


def is_let_in(url: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(f"{url}/version", trust_env=False).status_code == 200
    return False


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Released whenever the server has looked whether a client is too slow."""
    looked, really_check = threading.Semaphore(0), connection.Connection._check

    def check(self: connection.Connection) -> None:
        really_check(self)
        looked.release()

    monkeypatch.setattr(connection.Connection, "_check", check)
    return looked


def test_more_silent_clients_than_descriptors_neither_stop_the_server_nor_fill_its_log() -> None:
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        try:
            port, limit = map(int, server.stdout.readline().split())
            assert limit == DESCRIPTORS  # raised to what is allowed
            with ExitStack() as stack:
                address = ("127.0.0.1", port)
                clients = [stack.enter_context(socket.create_connection(address, 60)) for _ in range(2 * DESCRIPTORS)]
                answers = [rest(client) for client in clients]
                # Refused, or let in and closed in the end.
                assert {answer[:13] for answer in answers} == {b"HTTP/1.1 503 ", b""}
                assert httpx.get(f"http://127.0.0.1:{port}/ready", timeout=60, trust_env=False).status_code == 200
        finally:
            server.kill()
        assert server.stderr.read() == b""


@pytest.mark.parametrize(
    "sent", [HEAD, HEAD + b"Content-Length: 1000\r\n\r\n{", HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"]
)
def test_a_request_that_does_not_arrive_in_time_is_told_so(
    scripted: Scripted, sent: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection, "PATIENCE", 0.2)
    with caplog.at_level("INFO"), connect(scripted.url) as client:
        client.sendall(sent)
        assert error_of(rest(client)) == ("HTTP/1.1 408 Request Timeout", "request_timeout")
        if sent != HEAD:
            wait_for(lambda: "status=499" in caplog.text)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_further_request_of_a_connection_has_its_deadline_too(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "PATIENCE", 600.0)
    with connect(scripted.url) as client:
        for seconds in (600.0, 0.5):  # that of the third request
            monkeypatch.setattr(connection, "PATIENCE", seconds)
            client.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
            read_until(client, b"}")
        client.sendall(b"GET")
        assert rest(client)[:12] in (b"HTTP/1.1 408", b"")


def test_a_large_body_may_take_longer_as_long_as_it_moves(
    scripted: Scripted, looks: threading.Semaphore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "PATIENCE", 0.2)
    monkeypatch.setattr(connection, "SLOWEST", 1)
    body = json.dumps(text_body()).encode()
    with connect(scripted.url) as client:
        client.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body[:20])
        assert looks.acquire(timeout=60)
        client.sendall(body[20:])
        assert read_until(client, b"\r\n").startswith(b"HTTP/1.1 200 ")


def test_an_answer_may_take_as_long_as_it_takes(
    scripted: Scripted, looks: threading.Semaphore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "PATIENCE", 0.2)
    monkeypatch.setattr(connection, "SLOWEST", 2**40)  # that it has arrived is no excuse
    scripted.llm.script = Script([], hold=True)
    body = json.dumps(text_body()).encode()
    with connect(scripted.url) as client:
        client.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert scripted.llm.waiting.wait(60)
        assert looks.acquire(timeout=60)
        client.setblocking(False)
        with pytest.raises(BlockingIOError):  # neither an error nor an end has come
            client.recv(1)
    wait_for(lambda: bool(scripted.llm.closed))  # the client has left


def test_past_the_bound_a_client_is_told_to_come_again_and_let_in_once_there_is_room(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connect(scripted.url) as first, connect(scripted.url) as second:
        for client in (first, second):  # let in
            client.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
            read_until(client, b"}")
        monkeypatch.setattr(connection, "MAX_CONNECTIONS", 2)
        with connect(scripted.url) as third:
            assert error_of(rest(third)) == ("HTTP/1.1 503 Service Unavailable", "unavailable")
        first.close()
        wait_for(lambda: is_let_in(scripted.url))


def test_a_client_that_leaves_during_its_upload_is_no_fault(
    scripted: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        with connect(scripted.url) as client:
            client.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
        wait_for(lambda: "status=" in caplog.text)
    (line,) = [record.getMessage() for record in caplog.records if "status=" in record.getMessage()]
    assert re.search(r"POST /v1/chat/completions status=499 ", line)
    assert not [record for record in caplog.records if record.levelname != "INFO"]


@pytest.mark.parametrize("limit", [100, 1024, 20_000, 2**20, resource.RLIM_INFINITY])
def test_connections_leave_descriptors_for_the_engine(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    at_once, in_a_turn = connection.max_connections(), connection.max_accepted()
    assert in_a_turn >= 1
    assert limit == resource.RLIM_INFINITY or at_once + 4 * in_a_turn <= limit * 3 // 4
    assert at_once <= connection.MAX_CONNECTIONS
    assert ServerConfig().max_waiting_requests < connection.MAX_CONNECTIONS

"""Who asks: keys, tenants and permissions. A tenant is the server's word, never a client's."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.cli import main
from api.gateway.keys import Identity, KeyFile, key_digest, make_key
from tests.api.conftest import Scripted, fresh, scripted_server_of, text_body
from tests.api.scripted import ScriptedLLM
from vlm_serve.errors import ConfigurationError

RADIOLOGY, EMERGENCY, MONITORING = "vs-radiology-key", "vs-emergency-key", "vs-monitoring-key"
ENTRIES: list[dict[str, Any]] = [
    {"sha256": key_digest(RADIOLOGY), "tenant": "radiology"},
    {"sha256": key_digest(EMERGENCY), "tenant": "emergency", "stat": True},
    {"sha256": key_digest(MONITORING), "tenant": "monitoring", "metrics": True},
]


@pytest.fixture(scope="module")
def keyed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ScriptedLLM, str]]:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    path.write_text(json.dumps(ENTRIES))
    with scripted_server_of(api_keys=path) as server:
        yield server


@pytest.fixture
def keyed(keyed_server: tuple[ScriptedLLM, str]) -> Iterator[Scripted]:
    with fresh(keyed_server) as keyed:
        yield keyed


def chat(keyed: Scripted, key: str | None, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    sent = (headers or {}) | ({"Authorization": f"Bearer {key}"} if key is not None else {})
    return keyed.http.post("/v1/chat/completions", json=text_body(**fields), headers=sent)


@pytest.mark.parametrize("key", [None, "vs-radiology-kez", key_digest(RADIOLOGY), RADIOLOGY[:-1], "é"])
def test_without_a_known_key_nothing_is_served(keyed: Scripted, key: str | None) -> None:
    header = [] if key is None else [(b"Authorization", b"Bearer " + key.encode())]
    response = keyed.http.post("/v1/chat/completions", json=text_body(), headers=httpx.Headers(header))
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == "Bearer"
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert keyed.llm.asked == []


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("GET", "/version"),
        ("GET", "/openapi.json"),
        ("POST", "/tokenize"),
        ("POST", "/v1/embeddings"),
        ("GET", "/health/"),
        ("GET", "/nowhere"),
    ],
)
def test_every_other_path_wants_a_key_too(keyed: Scripted, method: str, path: str) -> None:
    assert keyed.http.request(method, path).status_code == 401


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_a_load_balancer_needs_no_key(keyed: Scripted, path: str) -> None:
    assert keyed.http.get(path).status_code == 200


def test_a_key_of_another_scheme_is_none(keyed: Scripted) -> None:
    headers = {"Authorization": f"Basic {RADIOLOGY}"}
    assert keyed.http.get("/v1/models", headers=headers).status_code == 401


def test_row_16_the_tenant_is_that_of_the_key_whatever_the_client_writes(keyed: Scripted) -> None:
    """Row 16 of engines.md."""
    headers = {"X-Tenant": "emergency", "OpenAI-Organization": "emergency", "X-Request-Id": "emergency"}
    assert chat(keyed, RADIOLOGY, headers, user="emergency", metadata={"tenant": "emergency"}).status_code == 200
    assert chat(keyed, EMERGENCY).status_code == 200
    assert [asked.tenant for asked in keyed.llm.asked] == ["radiology", "emergency"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "base", "prompt": "Hello"}),
        ("/v1/embeddings", {"model": "base", "input": "Hello"}),
        ("/v1/responses", {"model": "base", "input": "Hello"}),
    ],
)
def test_every_endpoint_tells_the_engine_the_tenant(keyed: Scripted, path: str, body: Any) -> None:
    headers = {"Authorization": f"Bearer {RADIOLOGY}"}
    assert keyed.http.post(path, json=body, headers=headers).status_code == 200
    assert [asked.tenant for asked in keyed.llm.asked] == ["radiology"]
    assert keyed.http.post(path, json=body | {"priority": "stat"}, headers=headers).status_code == 403


@pytest.mark.parametrize("priority", ["stat", -1, -100])
def test_only_a_key_that_may_goes_before_routine_requests(keyed: Scripted, priority: Any) -> None:
    refused = chat(keyed, RADIOLOGY, priority=priority)
    assert refused.status_code == 403
    assert (refused.json()["error"]["code"], refused.json()["error"]["param"]) == ("permission_denied", "priority")
    assert keyed.llm.asked == []
    assert chat(keyed, EMERGENCY, priority=priority).status_code == 200
    assert keyed.llm.asked[0].priority < 0


def test_a_tenant_may_go_after_routine_requests(keyed: Scripted) -> None:
    assert chat(keyed, RADIOLOGY, priority=2).status_code == 200


def test_the_figures_of_all_tenants_are_for_a_key_that_may_read_them(keyed: Scripted) -> None:
    def get(key: str) -> httpx.Response:
        return keyed.http.get("/metrics", headers={"Authorization": f"Bearer {key}"})

    assert chat(keyed, RADIOLOGY).status_code == 200
    assert get(EMERGENCY).status_code == 403
    assert 'tenant="radiology"' in get(MONITORING).text


def test_the_log_says_the_tenant_and_no_key(keyed: Scripted, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        chat(keyed, RADIOLOGY)
        chat(keyed, "vs-unknown-key")
    assert "tenant=radiology" in caplog.text
    assert "error=invalid_api_key" in caplog.text
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("vlm_serve")]
    assert not any(RADIOLOGY in line or "vs-unknown-key" in line for line in ours)


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []

    def compare(known: str, given: str) -> bool:
        compared.append(known)
        return known == given

    monkeypatch.setattr("api.gateway.keys.hmac.compare_digest", compare)
    entries = {key_digest(key): Identity(key) for key in ("a", "b", "c")}
    assert KeyFile(entries).identify("a") == Identity("a")
    assert compared == list(entries)


def test_without_a_file_there_is_one_tenant_which_may_everything(scripted: Scripted) -> None:
    assert scripted.http.post(
        "/v1/chat/completions", json=text_body(priority="stat"), headers={"Authorization": "Bearer anything"}
    ).is_success
    assert scripted.llm.asked[0].tenant == ""
    assert scripted.http.get("/metrics").is_success


def test_make_key_prints_a_key_and_the_line_that_lets_it_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.yaml"
    keys = []
    with path.open("w") as file:
        for tenant, *flags in (("radiology",), ("emergency", "--stat", "--metrics")):
            assert main(["make-key", tenant, *flags]) == 0
            lines = capsys.readouterr().out.splitlines()
            keys.append(next(line.strip() for line in lines if line.strip().startswith("vs-")))
            file.write(lines[-1] + "\n")
    known = KeyFile.read(path)
    assert known.identify(keys[0]) == Identity("radiology", stat=False, metrics=False)
    assert known.identify(keys[1]) == Identity("emergency", stat=True, metrics=True)
    assert known.identify("vs-other") is None
    assert keys[0] not in path.read_text()


@pytest.mark.parametrize("tenant", ["010", "8", "no", "1e3", "2026-11-21"])
def test_the_line_of_a_tenant_that_yaml_takes_for_something_else_is_read_as_written(
    tmp_path: Path, tenant: str
) -> None:
    key, line = make_key(tenant)
    path = tmp_path / "keys.yaml"
    path.write_text(line)
    assert KeyFile.read(path).identify(key) == Identity(tenant, stat=False, metrics=False)


def test_a_digest_of_digits_alone_is_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(f"- {{sha256: '{'1' * 64}', tenant: a}}")
    assert KeyFile.read(path).tenants == ("a",)


def test_two_keys_are_never_alike() -> None:
    assert len({make_key("radiology")[0] for _ in range(100)}) == 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a list with an entry for each key"),
        ("{}", "a list with an entry for each key"),
        ("- [", "neither YAML nor JSON"),
        ("- {tenant: a}", "Entry 1 of .* must have sha256 and tenant"),
        ("- {sha256: abc, tenant: a}", "64 hexadecimal digits"),
        ("- {sha256: '" + "a" * 64 + "', tenant: 'a b'}", "tenant must be a word"),
        ("- {sha256: '" + "a" * 64 + "', tenant: 010}", "tenant is not text to YAML"),
        ("- {sha256: '" + "a" * 64 + "', tenant: no}", "tenant is not text to YAML"),
        ("- {sha256: '" + "a" * 64 + "', tenant: 2026-11-21}", "tenant is not text to YAML"),
        ("- {sha256: " + "1" * 64 + ", tenant: a}", "sha256 is not text to YAML"),
        ("- {sha256: '" + "a" * 64 + "', tenant: a, stat: 1}", "must be true or false"),
        ("- {sha256: '" + "a" * 64 + "', tenant: a, admin: true}", "may have stat and metrics"),
        (("- {sha256: '" + "a" * 64 + "', tenant: a}\n") * 2, "Entry 2 .* the key of an entry before it"),
    ],
)
def test_a_file_of_keys_with_a_mistake_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match=message):
        KeyFile.read(path)


def test_a_server_with_a_file_of_keys_that_is_not_there_does_not_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--port", "0", "--api-keys", str(tmp_path / "none.yaml")]) == 1
    assert "Check --api-keys" in capsys.readouterr().err

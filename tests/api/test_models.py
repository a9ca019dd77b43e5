"""What `/v1/models` tells of a model beside OpenAI's fields: its dtype, what it takes for an image, and the limits."""

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.conftest import MAX_BODY, Scripted, Served, fresh, scripted_server_of
from tests.api.scripted import BASE
from tests.api.test_served import asking, image_part, png
from vlm_serve.config import MIB

IMAGE_TOKEN_ID = 4
"""Of the checkpoint's tokenizer."""

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "api.md"


def entries(scripted: Scripted) -> list[Any]:
    data: list[Any] = scripted.http.get("/v1/models").json()["data"]
    return data


def test_the_base_and_its_adapter_tell_image_tokens_limits_and_dtype(scripted: Scripted) -> None:
    for entry in entries(scripted):
        assert entry["dtype"] == "float32"
        assert entry["images"] == {
            "min_tokens": 16,
            "max_tokens": 16,
            "max_images": 2,
            "max_file_bytes": MAX_BODY // 4 * 3,
            "max_dimension": 16_384,
            "media_types": ["application/dicom", "image/png", "image/jpeg"],
        }


def test_the_largest_file_is_what_a_body_holds_or_what_is_decoded() -> None:
    for body, largest in ((40 * MIB, 30 * MIB), (4096 * MIB, 512 * MIB)):
        with scripted_server_of(max_body_bytes=body) as server, fresh(server) as scripted:
            assert entries(scripted)[0]["images"]["max_file_bytes"] == largest


def test_a_model_of_text_alone_takes_no_images(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    text_alone = type(BASE)("text", "text", None, "c" * 64, 512, 0, 0, "bfloat16", None, 1)
    monkeypatch.setattr(scripted.llm, "models", (text_alone,))
    (entry,) = entries(scripted)
    assert (entry["images"], entry["max_tokens_per_image"], entry["dtype"]) == (None, 0, "bfloat16")


def test_the_engines_own_dtype_and_the_models_tokens_are_told(served: Served) -> None:
    base, adapter = (entry.model_extra or {} for entry in served.client.models.list().data)
    assert base["dtype"] == adapter["dtype"] == "float32"
    assert (base["images"]["min_tokens"], base["images"]["max_tokens"]) == (16, 16)
    messages = asking(image_part(png(), "image/png"))
    tokens = httpx.post(f"{served.url}/tokenize", json={"messages": messages}, timeout=60).json()["tokens"]
    assert tokens.count(IMAGE_TOKEN_ID) == 16


def test_every_field_is_told_in_the_documents(scripted: Scripted) -> None:
    (section,) = re.findall(r"^## `GET /v1/models`\n(.*?)^## ", DOCUMENT.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    entry = entries(scripted)[0]
    for field in entry.keys() - {"id", "object", "created", "owned_by", "root", "parent"}:
        assert f"`{field}`" in section
    for field in entry["images"]:
        assert f".{field}`" in section

"""Adapters are found by name and known by the digest of their files; slots are never taken from a user."""

import json

import pytest

from vlm_serve.errors import AdapterError
from vlm_serve.lora.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from vlm_serve.lora.store import AdapterSlots, AdapterStore


def write(folder, weights: bytes):
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA"}))
    (folder / WEIGHTS_FILE).write_bytes(weights)


def test_each_folder_with_a_config_is_an_adapter_named_after_it(tmp_path):
    write(tmp_path / "neuro", b"1")
    write(tmp_path / "chest", b"2")
    (tmp_path / "notes").mkdir()
    assert [adapter.name for adapter in AdapterStore(tmp_path).adapters] == ["chest", "neuro"]


def test_a_folder_that_is_an_adapter_itself_is_the_only_one(tmp_path):
    write(tmp_path / "chest", b"1")
    write(tmp_path / "chest" / "older", b"2")
    assert [adapter.name for adapter in AdapterStore(tmp_path / "chest").adapters] == ["chest"]


def test_the_digest_is_of_the_files_not_of_the_name(tmp_path):
    """Row 7 of engines.md: what is reloaded under the same name is another adapter."""
    for name, weights in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        write(tmp_path / name, weights)
    store = AdapterStore(tmp_path)
    assert store.get("a").digest == store.get("b").digest != store.get("c").digest
    (tmp_path / "a" / WEIGHTS_FILE).write_bytes(b"3")
    assert AdapterStore(tmp_path).get("a").digest != store.get("a").digest


def test_a_directory_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(AdapterError, match="does not exist"):
        AdapterStore(tmp_path / "absent")


def test_the_least_recently_used_adapter_gives_way_and_a_pinned_one_never():
    slots = AdapterSlots(2)
    assert slots.pin("a") == (0, True)
    assert slots.pin("b") == (1, True)
    assert not slots.can_pin("c")
    assert slots.can_pin("a")
    slots.unpin("a")
    slots.unpin("b")
    assert slots.pin("a") == (0, False)
    slots.unpin("a")
    assert slots.pin("c") == (1, True)
    slots.pin("c")
    slots.unpin("c")
    assert slots.pin("a") == (0, False)
    assert not slots.can_pin("b")

"""What is not served is refused by its kind, with the kinds that are."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import make_llava, make_timm_vlm
from vlm_serve.decoders.config import KNOWN
from vlm_serve.errors import CheckpointError
from vlm_serve.families import FAMILIES, load_family


@pytest.mark.parametrize("kind", ["instructblip", "gpt2", "no-such-model", None, ["llama"]])
def test_a_kind_that_is_not_served_is_named_and_every_kind_that_is(tmp_path: Path, kind: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "architectures": ["Secret"]}))
    with pytest.raises(CheckpointError) as raised:
        load_family(tmp_path)
    message = str(raised.value)
    assert message.startswith(f"Models of type {kind!r} are not served")
    assert str(tmp_path) in message
    with_images, _, alone = message.partition("of text alone: ")
    for family in FAMILIES:
        place = alone if family.__name__ == "TextFamily" else with_images
        assert set(family.model_types) <= set(place.replace(";", ",").replace(":", ",").split(", "))


@pytest.mark.parametrize("kind", ["gpt2", "no-such-model"])
@pytest.mark.parametrize("make", [make_llava, make_timm_vlm])
def test_an_unknown_decoder_of_a_model_with_images_is_named(tmp_path: Path, make: Any, kind: str) -> None:
    make(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["model_type"] = kind
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=kind):
        load_family(tmp_path)


def test_every_kind_of_text_that_can_be_read_is_served_alone_or_in_a_model_with_images() -> None:
    served = {kind for family in FAMILIES for kind in family.model_types}
    assert {kind for kind in KNOWN if not kind.endswith("_vl_text")} <= served

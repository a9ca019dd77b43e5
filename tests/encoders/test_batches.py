"""Images of mixed sizes and of several requests go through each family's tower together, one forward for each shape,
under inference mode, with torch's scaled dot-product attention.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families.image_checkpoints import FAMILIES
from tests.families.pictures import picture
from vlm_serve.encoders.graphs import BUCKETS, Capture, Forward, Replay
from vlm_serve.families import load_family
from vlm_serve.families.base import ModelFamily, VisionLanguageModel
from vlm_serve.types import ImageInputs

PICTURES = [picture(28, 28, 1), picture(40, 60, 2), picture(90, 30, 3), picture(28, 28, 4), picture(16, 50, 5)]


@dataclass
class Built:
    """A family's model, and the shapes of what its tower was given, call by call."""

    family: ModelFamily
    model: VisionLanguageModel
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.model.vision is not None
        self.model.vision.register_forward_pre_hook(self._look)

    def _look(self, module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        assert torch.is_inference_mode_enabled()
        self.shapes.append(tuple(arguments[0].shape))

    def inputs(self) -> list[ImageInputs]:
        pieces = [piece for image in PICTURES for piece in self.family.process_image(image)]
        return [piece for piece in pieces if isinstance(piece, ImageInputs)]


@pytest.fixture(params=FAMILIES)
def built(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Built:
    family = load_family(FAMILIES[request.param](tmp_path, monkeypatch))
    return Built(family, family.build(torch.float32, torch.device("cpu")))


def test_images_of_all_sizes_are_encoded_in_one_forward_of_the_tower_as_each_alone(built: Built) -> None:
    inputs = built.inputs()
    together = built.model.encode_images(inputs)
    assert len(built.shapes) == 1, "the towers take squares of one size, or patches of any image, end to end"
    for one, embeddings in zip(inputs, together, strict=True):
        assert len(embeddings) == one.num_tokens
        torch.testing.assert_close(built.model.encode_images([one])[0], embeddings, atol=1e-5, rtol=1e-5)


def test_images_of_each_shape_are_a_batch_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tower that takes any shape: timm's convolutions."""
    family = load_family(FAMILIES["timm, convolutions"](tmp_path, monkeypatch))
    built = Built(family, family.build(torch.float32, torch.device("cpu")))
    inputs = [
        ImageInputs.create({"pixel_values": torch.randn(3, *size).numpy()}, (4, 4), 16)
        for size in ((128, 128), (160, 128), (128, 128), (160, 128), (128, 160))
    ]
    together = built.model.encode_images(inputs)
    assert sorted(built.shapes) == [(1, 3, 128, 160), (2, 3, 128, 128), (2, 3, 160, 128)]
    for one, embeddings in zip(inputs, together, strict=True):
        torch.testing.assert_close(built.model.encode_images([one])[0], embeddings, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("timm")])
def test_towers_attend_by_torchs_own_kernel_whatever_a_config_asks_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = FAMILIES[name](tmp_path, monkeypatch)
    config = json.loads((folder / "config.json").read_text())
    for settings in (config, config.get("vision_config", {})):
        settings["attn_implementation"] = "eager"
    (folder / "config.json").write_text(json.dumps(config))
    family = load_family(folder)
    with torch.device("meta"):
        tower: Any = family.build_vision()
    assert tower.model.config._attn_implementation == "sdpa"


def plain_capture(replays: list[int]) -> Capture:
    """Runs the forward again in the place of a recording."""

    def capture(forward: Forward, buffer: torch.Tensor) -> Replay:
        def replay() -> torch.Tensor:
            replays.append(len(buffer))
            return forward(buffer)

        return replay

    return capture


def test_a_few_images_are_encoded_by_what_was_recorded_but_with_an_adapter_of_the_tower(built: Built) -> None:
    """Not by the packed towers, whose work follows the sizes of the images."""
    replays: list[int] = []
    inputs = built.inputs()[:5]
    expected = built.model.encode_images(inputs)
    built.model.record_graphs(plain_capture(replays))
    for slot in (None, 0):
        built.model.tower_adapter.slot = slot
        for embeddings, one in zip(built.model.encode_images(inputs), expected, strict=True):
            torch.testing.assert_close(embeddings, one, atol=1e-5, rtol=1e-5)
    tiles = built.shapes[0][0]
    fits = built.model.projector is not None and tiles <= BUCKETS[-1]
    assert replays == ([next(size for size in BUCKETS if size >= tiles)] if fits else [])

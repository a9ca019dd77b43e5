"""Towers give transformers' and timm's own features, cut and pooled as the config says."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vlm_serve.encoders.timm_tower import TimmTower
from vlm_serve.encoders.transformers_tower import TransformersTower
from vlm_serve.errors import CheckpointError

# isort: split
from transformers import AutoModel, Dinov2Config

from tests.checkpoints import tiny_vision_config


def whole_model(vision: str) -> Any:
    torch.manual_seed(0)
    return AutoModel.from_config(tiny_vision_config(vision)).eval()


@pytest.mark.parametrize("select", ["default", "full"])
@pytest.mark.parametrize("layer", [-1, -2, 0, 1, 3, [-2], [-3, -1], [2, 0]], ids=str)
@pytest.mark.parametrize("vision", ["clip", "siglip"])
@torch.inference_mode()
def test_features_equal_the_hidden_states_of_the_whole_tower(vision: str, layer: int | list[int], select: str) -> None:
    whole = whole_model(vision)
    tower = TransformersTower(whole.config, layer, select).eval()
    used = {name: tensor for name, tensor in whole.state_dict().items() if tower.uses(name)}
    tower.model.load_state_dict(used)  # strict: the cut tower has these tensors and no other
    pixels = torch.randn(2, 3, 28, 28)
    states = whole(pixels, output_hidden_states=True).hidden_states
    layers = [layer] if isinstance(layer, int) else layer
    expected = torch.cat([states[i][:, 1:] if select == "default" else states[i] for i in layers], dim=-1)
    features = tower(pixels)
    torch.testing.assert_close(features, expected, atol=1e-6, rtol=0)
    assert features.shape[1:] == (tower.num_tokens, tower.out_features)


def test_layers_past_the_one_that_is_used_are_not_there() -> None:
    tower = TransformersTower(tiny_vision_config("clip", layers=6), -5, "default")
    assert len(tower.model.encoder.layers) == 2


@pytest.mark.parametrize(
    ("config", "layer", "select", "message"),
    [
        (tiny_vision_config("clip"), 4, "default", "has 3 layers"),
        (tiny_vision_config("clip"), [], "default", "has 3 layers"),
        (tiny_vision_config("clip"), -2, "cls", "must be 'default' or 'full'"),
        (Dinov2Config(), -2, "default", "type 'dinov2' are not known"),
    ],
    ids=["layer", "no-layer", "strategy", "tower"],
)
def test_what_is_not_known_is_refused_by_name(config: Any, layer: int | list[int], select: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        TransformersTower(config, layer, select)


TINY_SWIN = {"img_size": 64, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 1), "window_size": 4}


@pytest.mark.parametrize(
    ("name", "arguments", "size", "as_map"),
    [
        ("test_efficientnet", {}, 128, lambda features: features),
        ("test_vit", {}, 160, lambda features: features[:, 1:].transpose(1, 2).unflatten(2, (10, 10))),
        ("swin_tiny_patch4_window7_224", TINY_SWIN, 64, lambda features: features.permute(0, 3, 1, 2)),
    ],
    ids=["convolutions", "class-token", "channels-last"],
)
@torch.inference_mode()
def test_any_layout_of_timm_becomes_rows_of_tokens(
    name: str, arguments: dict[str, Any], size: int, as_map: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    torch.manual_seed(0)
    tower = TimmTower(name, (2, 2), arguments).eval()
    pixels = torch.randn(2, 3, size, size)
    whole = as_map(tower.model.forward_features(pixels))
    rows, columns = whole.shape[2] // 2, whole.shape[3] // 2
    quarters = [whole[:, :, top : top + rows, left : left + columns] for top in (0, rows) for left in (0, columns)]
    expected = torch.stack([quarter.mean((2, 3)) for quarter in quarters], dim=1)
    torch.testing.assert_close(tower(pixels), expected, atol=1e-5, rtol=1e-5)
    assert expected.shape[1:] == (tower.num_tokens, tower.out_features)


@torch.inference_mode()
def test_a_map_of_the_right_size_is_not_pooled() -> None:
    torch.manual_seed(0)
    tower = TimmTower("test_efficientnet", (2, 2)).eval()
    pixels = torch.randn(1, 3, 64, 64)
    expected = tower.model.forward_features(pixels).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tower(pixels), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["no_such_model", "hf-hub:timm/test_vit.r160_in1k", "local-dir:/etc"])
def test_a_model_that_timm_does_not_have_is_neither_fetched_nor_looked_for(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"no model {name!r}"):
        TimmTower(name, (2, 2))


@pytest.mark.parametrize("argument", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"])
def test_an_argument_that_opens_a_file_is_refused(argument: str) -> None:
    with pytest.raises(CheckpointError, match=f"made with {argument}"):
        TimmTower("test_vit", (2, 2), {argument: "weights.bin"})

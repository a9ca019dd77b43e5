"""Tiny LLaVA-Rad checkpoints of random weights, and what its authors' model makes of them: timm's tower, their
projector, and transformers' decoder, spliced by hand.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn

from tests.checkpoints import IMAGE_TOKEN, make_tokenizer, tiny_text_config

# isort: split
import timm
from PIL import Image
from torchvision import transforms
from transformers import LlamaForCausalLM

SIDE = 48
TOKENS = 9
OPEN_CLIP: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": SIDE},
    "text_cfg": {"hf_model_name": "none"},
}
CONFIG: dict[str, Any] = {
    "model_type": "llava",
    "mm_vision_tower": "biomedclip_cxr_518",
    "mm_vision_tower_config": "llava/model/multimodal_encoder/open_clip_encoder/model_configs/biomedclip_cxr_518.json",
    "mm_vision_tower_checkpoint": "biomedclipcxr_518_checkpoint.pt",
    "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": 64,
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "image_aspect_ratio": "square",
}


class RadReference(LlamaForCausalLM):
    """The decoder under the names that its authors' adapters have, the tower and the projector beside it."""

    def __init__(self, config: Any, tower: str, layer: int) -> None:
        super().__init__(config)
        vit: Any = timm.create_model(tower, num_classes=0, global_pool="", img_size=SIDE)
        self.vit = vit
        width = vit.num_features
        self.mm_projector: Any = nn.Sequential(
            nn.Linear(width, config.hidden_size), nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)
        )
        self.block = len(vit.blocks) + layer
        """Whose output is taken: of the hidden states the first are the embeddings."""

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None, **inputs: Any) -> Any:
        embeddings = self.model.embed_tokens(input_ids)
        if pixel_values is not None:
            (states,) = self.vit.forward_intermediates(
                pixel_values, indices=[self.block], norm=False, intermediates_only=True, output_fmt="NLC"
            )
            embeddings[input_ids == 4] = self.mm_projector(states).flatten(0, 1)
        return super().forward(inputs_embeds=embeddings, **inputs)


class RadProcessor:
    """The prompt with so many placeholders, and the pixels as open_clip prepares them for such a tower."""

    def __init__(self, side: int = SIDE) -> None:
        self.tokenizer = make_tokenizer()
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        self.transform = transforms.Compose(
            [
                transforms.Resize(side, transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(side),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> dict[str, torch.Tensor]:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert isinstance(text, str)
        made = dict(self.tokenizer(text.replace(IMAGE_TOKEN, IMAGE_TOKEN * TOKENS), return_tensors="pt"))
        pixels = [
            self.transform(Image.fromarray(part["image"])) for part in messages[0]["content"] if part["type"] == "image"
        ]
        return made | ({"pixel_values": torch.stack(pixels)} if pixels else {})


def make_llava_rad(
    folder: Path, form: Literal["merged", "beside", "one file"] = "merged", *, tower: str = "test_vit", **changes: Any
) -> RadReference:
    """Writes a checkpoint and returns the reference, fp32, in eval.

    Args:
        form: of the tower: "merged" by the authors' own script with the rest, "beside" it as open_clip saves it, in a
            folder of its own, or so in "one file" with the rest.
        tower: one of timm's own tiny models for tests.
        changes: fields of config.json that differ.
    """
    torch.manual_seed(0)
    model: Any = RadReference(tiny_text_config(), tower, CONFIG["mm_vision_select_layer"])
    for parameter in model.parameters():  # norms of ones and biases of zero would hide a wrong name
        parameter.data += 0.02 * torch.randn_like(parameter)
    tensors, trunk = {}, {}
    for name, tensor in model.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "vit":
            trunk[rest] = tensor
        else:
            tensors[f"model.{name}" if part == "mm_projector" else name] = tensor
    published = {
        "visual.head.proj.weight": torch.ones(2, 2),
        "text.proj.0.weight": torch.ones(2),
        "logit_scale": torch.ones(1),
    }
    published |= {f"visual.trunk.{name}": tensor for name, tensor in trunk.items()}
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / "vision_tower" if form == "beside" else folder
    beside.mkdir(exist_ok=True)
    if form == "merged":
        tensors |= {f"model.vision_tower.vision_tower.vit.{name}": tensor for name, tensor in trunk.items()}
    elif form == "one file":
        tensors |= {f"module.{name}": tensor for name, tensor in published.items()}
    else:
        save_file(published, beside / "biomedclipcxr_518_checkpoint.safetensors")
    save_file(tensors, folder / "model.safetensors")
    vision = OPEN_CLIP["vision_cfg"] | {"timm_model_name": tower}
    (beside / "biomedclipcxr_518.json").write_text(json.dumps(OPEN_CLIP | {"vision_cfg": vision}))
    (folder / "config.json").write_text(json.dumps(model.config.to_dict() | CONFIG | changes))
    make_tokenizer().save_pretrained(folder)
    return model.eval()  # type: ignore[no-any-return]

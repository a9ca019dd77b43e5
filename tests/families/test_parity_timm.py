"""A timm tower before a text model: what the engine computes is what timm and transformers compute."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from tests.checkpoints import make_timm_vlm
from tests.engine.harness import Run
from tests.families.parity import Content, Parity, Record
from vlm_serve.families.timm_vlm import letterbox

# isort: split
from transformers import AutoTokenizer

HEADS = [(4, 4), (3, 1), (8, 2), (7, 1)]
TOWERS = {"test_vit": "ViT", "test_efficientnet": "EfficientNet"}
SIZE, GRID = 160, 4


class TimmParity(Parity):
    """The reference is timm's tower and transformers' text model, the projector between them written out."""

    def __init__(self, folder: Path, model: Any, vision: str, **settings: Any) -> None:
        super().__init__(folder, model, processor=AutoTokenizer.from_pretrained(folder), **settings)
        tensors = load_file(folder / "model.safetensors")
        self.tower = timm.create_model(vision, num_classes=0).eval()
        prefix = "vision."
        self.tower.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        self.projector = {n.removeprefix("projector."): t for n, t in tensors.items() if n.startswith("projector.")}

    def inputs(self, content: Content) -> dict[str, torch.Tensor]:
        parts = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in content]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
        )
        return dict(self.processor(text.replace("<image>", "<image>" * GRID**2), return_tensors="pt"))

    def features(self, content: Content) -> list[torch.Tensor]:
        """Of each image, `[tokens, hidden]`."""
        images = [part for part in content if not isinstance(part, str)]
        pixels = [torch.from_numpy(letterbox(image.pixels, SIZE)).movedim(2, 0)[None] / 127.5 - 1 for image in images]
        return [self._project(self.tower.forward_features(one)) for one in pixels]

    def _project(self, made: torch.Tensor) -> torch.Tensor:
        if made.dim() == 3:  # a token of the class, then patches
            made = made[:, 1:].transpose(1, 2).unflatten(2, (SIZE // 16, SIZE // 16))
        pooled = torch.nn.functional.adaptive_avg_pool2d(made, (GRID, GRID))[0].flatten(1).T
        first, second = ((self.projector[f"linear_{i}.weight"], self.projector[f"linear_{i}.bias"]) for i in (1, 2))
        middle = torch.nn.functional.gelu(torch.nn.functional.linear(pooled, *first))
        return torch.nn.functional.linear(middle, *second)

    @torch.inference_mode()
    def expected(self, content: Content, run: Run) -> torch.Tensor:
        ids = torch.cat((self.inputs(content)["input_ids"], torch.tensor([run.token_ids[:-1]])), dim=1)
        embeddings = self.model.get_input_embeddings()(ids)
        if features := self.features(content):
            embeddings[ids == self.harness.family.image_token_id] = torch.cat(features)
        return self.model(inputs_embeds=embeddings).logits[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("vision", TOWERS)
def test_parity(tmp_path: Path, record_property: Record, vision: str) -> None:
    parity = TimmParity(tmp_path, make_timm_vlm(tmp_path, vision), vision)
    parity.check_everything(f"timm, {TOWERS[vision]}", record_property)


@pytest.mark.parametrize("heads", HEADS, ids=[f"GQA{queries // keys}-H{queries}" for queries, keys in HEADS])
def test_parity_whatever_the_count_of_heads(tmp_path: Path, heads: tuple[int, int]) -> None:
    queries, keys = heads
    shape = {"num_attention_heads": queries, "num_key_value_heads": keys, "hidden_size": 16 * queries}
    parity = TimmParity(tmp_path, make_timm_vlm(tmp_path, tie_word_embeddings=True, **shape), "test_vit")
    parity.check_batch(*parity.conversations)


def test_a_missing_activation_of_the_projector_is_seen(tmp_path: Path) -> None:
    parity = TimmParity(tmp_path, make_timm_vlm(tmp_path), "test_vit")
    projector: Any = parity.harness.engine.runner.model.projector
    projector.activation = torch.nn.Identity()
    parity.check(parity.conversations["text"])
    with pytest.raises(AssertionError, match="logits differ"):
        parity.check(parity.conversations["one image"])

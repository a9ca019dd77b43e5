"""The vision tower learns what a picture shows: the kind of study, the finding, its side and where it lies.

Heads that are thrown away afterwards ask each token of the tower's grid for the study's labels and for what lies
under it. A projector that sees such tokens has little left to find out.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vlm_serve.encoders.timm_tower import TimmTower
from vlm_serve.training.checkpoint import read_checkpoint, write_checkpoint
from vlm_serve.training.finetune import learning_rate_share
from vlm_serve.training.progress import Progress
from vlm_serve.training.studies.truth import Truth

FIELDS = ("modality", "region", "plane", "finding", "side", "zone", "extent")
"""The labels that the heads are asked for."""

NOTHING = "none"

WARMUP = 0.05

COVERED = 0.12
"""From this share of a token's cell on, a finding lies under it."""


@dataclass(frozen=True, slots=True)
class TowerConfig:
    """How the tower is trained. `learning_rate` is that of the new heads; the tower's own is `tower_share` of it.
    `frozen` are its layers that stay as they are: edges and textures are the same everywhere, and the first layers
    cost more than half of a step.
    """

    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 2e-3
    tower_share: float = 0.4
    weight_decay: float = 0.02
    frozen: tuple[str, ...] = ("conv_stem", "bn1", "blocks.0", "blocks.1")
    seed: int = 0


@dataclass(frozen=True, slots=True)
class LabelledPictures:
    """`pixels` uint8 `[N, size, size]`, grey, as the family's processor lays them out; `masks` uint8
    `[N, MASK_SIZE, MASK_SIZE]`, the share of each cell that the finding covers, 255 for all of it.
    """

    pixels: np.ndarray
    masks: np.ndarray
    truths: tuple[Truth, ...]

    def __len__(self) -> int:
        return len(self.truths)


class Vocabulary:
    """The values that each label takes, in the order of the heads' outputs."""

    def __init__(self, truths: Sequence[Truth]) -> None:
        self.values = {
            field: sorted({getattr(truth, field) or NOTHING for truth in truths} | {NOTHING}) for field in FIELDS
        }

    def encode(self, truths: Sequence[Truth]) -> dict[str, torch.Tensor]:
        """int64 `[N]` for each field; −100, which no loss counts, for a value that is not in the vocabulary."""
        indices = {field: {value: i for i, value in enumerate(values)} for field, values in self.values.items()}
        return {
            field: torch.tensor([indices[field].get(getattr(truth, field) or NOTHING, -100) for truth in truths])
            for field in FIELDS
        }


class AuxiliaryHeads(nn.Module):
    """One linear layer a label, applied to the mean of the tokens and to each of them, and one for what lies there."""

    def __init__(self, features: int, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.labels = nn.ModuleDict(
            {field: nn.Linear(features, len(values)) for field, values in vocabulary.values.items()}
        )
        self.here = nn.Linear(features, len(vocabulary.values["finding"]))

    def forward(self, tokens: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
        """tokens `[B, T, features]` -> logits of each label for the image `[B, C]` and for each token `[B, T, C]`,
        and of the finding under each token `[B, T, C]`.
        """
        mean = tokens.mean(1)
        dropped = F.dropout(mean, 0.2, self.training)
        image = {field: head(dropped) for field, head in self.labels.items()}
        each = {field: head(tokens) for field, head in self.labels.items()}
        return image, each, self.here(tokens)


def train_tower(
    tower: TimmTower,
    train: LabelledPictures,
    validation: LabelledPictures,
    config: TowerConfig,
    work: Path,
    progress: Progress,
) -> list[dict[str, float]]:
    """Trains the tower in place; the share of right answers on `validation` for each label, after each epoch.

    It goes on where an interrupted run with the same `work` folder ended its last epoch. Pixels are scaled to
    −1 … 1, as the embedded default's processor does.
    """
    torch.manual_seed(config.seed)
    vocabulary = Vocabulary(train.truths)
    heads = AuxiliaryHeads(tower.out_features, vocabulary)
    modules = nn.ModuleDict({"tower": tower, "heads": heads})
    frozen = [tower.model.get_submodule(name).requires_grad_(False) for name in config.frozen]
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p for p in tower.parameters() if p.requires_grad],
                "lr": config.learning_rate * config.tower_share,
            },
            {"params": heads.parameters(), "lr": config.learning_rate},
        ],
        weight_decay=config.weight_decay,
    )
    steps = math.ceil(len(train) / config.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, partial(learning_rate_share, steps=steps * config.epochs, warmup_share=WARMUP)
    )
    targets, held_out = vocabulary.encode(train.truths), vocabulary.encode(validation.truths)
    history: list[dict[str, float]] = []
    identity = _identity(train, config)
    state = read_checkpoint(work, identity)
    if state is not None:
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        history = state["history"]
    with progress.task("training the tower", steps * config.epochs, done=steps * len(history)) as task:
        for epoch in range(len(history), config.epochs):
            modules.train()
            for module in frozen:
                module.eval()
            rng = torch.Generator().manual_seed(config.seed * 1000 + epoch)
            torch.manual_seed(config.seed * 1000 + epoch)  # dropout's
            for rows in torch.randperm(len(train), generator=rng).split(config.batch_size):
                batch = augment(train, rows, targets, vocabulary, rng)
                loss = _loss(tower, heads, batch, vocabulary)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(modules.parameters(), 2.0)
                optimizer.step()
                schedule.step()
                task.advance()
            history.append(_accuracy(tower, heads, validation, held_out))
            task.tell(" ".join(f"{field} {share:.2f}" for field, share in history[-1].items()))
            state = {
                "modules": modules.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "history": history,
            }
            write_checkpoint(work, identity, state)
    modules.eval()
    return history


def _identity(pictures: LabelledPictures, config: TowerConfig) -> str:
    digest = hashlib.sha256(repr((config, pictures.truths)).encode())
    digest.update(pictures.pixels.data)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Batch:
    """`pixels` float32 `[B, 3, size, size]` from −1 to 1, `masks` float32 `[B, MASK_SIZE, MASK_SIZE]` from 0 to 1, and
    the labels' indices, int64 `[B]` each.
    """

    pixels: torch.Tensor
    masks: torch.Tensor
    labels: dict[str, torch.Tensor]


def augment(
    pictures: LabelledPictures,
    rows: torch.Tensor,
    targets: dict[str, torch.Tensor],
    vocabulary: Vocabulary,
    rng: torch.Generator,
    *,
    mirror: bool = True,
) -> Batch:
    """Turned, scaled, shifted, brighter or darker, with noise; half of them mirrored, their sides exchanged."""
    pixels = torch.from_numpy(pictures.pixels[rows.numpy()]).float()[:, None] / 127.5 - 1
    masks = torch.from_numpy(pictures.masks[rows.numpy()]).float()[:, None] / 255
    labels = {field: values[rows] for field, values in targets.items()}
    mirrored = (torch.rand(len(rows), generator=rng) < 0.5) & mirror
    sides = vocabulary.values["side"]
    if {"right", "left"} <= set(sides):
        right, left = sides.index("right"), sides.index("left")
        side = labels["side"]
        other = torch.where(side == right, left, torch.where(side == left, right, side))
        labels["side"] = torch.where(mirrored, other, side)
    pixels, masks = _move(pixels, masks, mirrored, rng)
    pixels = _change_greys(pixels, rng)
    return Batch(pixels.expand(-1, 3, -1, -1), masks[:, 0], labels)


def _move(
    pixels: torch.Tensor, masks: torch.Tensor, mirrored: torch.Tensor, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    count = len(pixels)

    def between(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, generator=rng)

    angle, zoom = between(-0.12, 0.12), between(0.9, 1.12)
    sign = torch.where(mirrored, -1.0, 1.0)
    cosine, sine = angle.cos() * zoom, angle.sin() * zoom
    shift = between(-0.08, 0.08), between(-0.08, 0.08)
    matrix = torch.stack(
        [torch.stack([cosine * sign, -sine, shift[0]], -1), torch.stack([sine * sign, cosine, shift[1]], -1)], 1
    )
    moved = []
    for part, empty in ((pixels, -1.0), (masks, 0.0)):
        grid = F.affine_grid(matrix, list(part.shape), align_corners=False)
        moved.append(F.grid_sample(part - empty, grid, align_corners=False) + empty)
    return moved[0], moved[1]


def _change_greys(pixels: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    shape = (len(pixels), 1, 1, 1)

    def between(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=rng)

    unit = ((pixels + 1) / 2).clamp(0, 1) ** between(0.75, 1.3)
    unit = (unit - 0.5) * between(0.8, 1.2) + 0.5 + between(-0.1, 0.1)
    unit = unit + torch.randn(pixels.shape, generator=rng) * between(0, 0.025)
    return unit.clamp(0, 1) * 2 - 1


def _loss(tower: TimmTower, heads: AuxiliaryHeads, batch: Batch, vocabulary: Vocabulary) -> torch.Tensor:
    tokens = tower(batch.pixels)
    image, each, here = heads(tokens)
    count = tokens.shape[1]
    total = torch.zeros(())
    for field, labels in batch.labels.items():
        total = total + F.cross_entropy(image[field], labels)
        total = total + 0.3 * F.cross_entropy(each[field].flatten(0, 1), labels.repeat_interleave(count))
    cover = F.adaptive_avg_pool2d(batch.masks[:, None], tower.grid).flatten(1)  # [B, T]
    nothing = vocabulary.values["finding"].index(NOTHING)
    finding = torch.where(cover > COVERED, batch.labels["finding"][:, None], nothing)
    weight = torch.ones(len(vocabulary.values["finding"]))
    weight[nothing] = 0.3
    return total + F.cross_entropy(here.flatten(0, 1), finding.flatten(), weight=weight)


@torch.inference_mode()
def _accuracy(
    tower: TimmTower, heads: AuxiliaryHeads, pictures: LabelledPictures, targets: dict[str, torch.Tensor]
) -> dict[str, float]:
    tower.eval()
    heads.eval()
    right = dict.fromkeys(FIELDS, 0)
    for rows in torch.arange(len(pictures)).split(64):
        pixels = torch.from_numpy(pictures.pixels[rows.numpy()]).float()[:, None] / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            tokens = tower(pixels.expand(-1, 3, -1, -1))
        image, _, _ = heads(tokens.float())
        for field in FIELDS:
            right[field] += int((image[field].argmax(-1) == targets[field][rows]).sum())
    return {field: count / len(pictures) for field, count in right.items()}

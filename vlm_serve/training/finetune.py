"""Fine-tuning of one LoRA on a frozen decoder, and of the projector if asked, on cached features of a tower.

Repeatable: a run is a function of its data, settings and seed, and one that was cut off goes on to the same
weights, bit by bit on a CPU with as many threads.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import LlamaForCausalLM

from vlm_serve.errors import ConfigurationError
from vlm_serve.training.batches import Batch, FeatureArray, collate, epoch_batches, plain_batches
from vlm_serve.training.checkpoint import read_checkpoint, write_checkpoint
from vlm_serve.training.decoder import add_lora
from vlm_serve.training.examples import Example
from vlm_serve.training.fused import token_loss
from vlm_serve.training.progress import Task


@dataclass(frozen=True, slots=True)
class FinetuneConfig:
    """How to train. Learning rates are the highest, after the warm-up; `batch_size` counts studies.

    `max_steps` None is all epochs. The projector stays as it is unless `train_projector`.

    Raises:
        ConfigurationError: a value is out of its range.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    lora_learning_rate: float = 5e-4
    projector_learning_rate: float = 1e-3
    train_projector: bool = False
    epochs: int = 3
    max_steps: int | None = None
    batch_size: int = 8
    warmup_share: float = 0.05
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[float, float]] = {
            "rank": (1, 1024),
            "alpha": (1, 65_536),
            "dropout": (0, 0.9),
            "lora_learning_rate": (1e-8, 1),
            "projector_learning_rate": (1e-8, 1),
            "epochs": (1, 10_000),
            "batch_size": (1, 4096),
            "warmup_share": (0, 0.5),
            "weight_decay": (0, 1),
            "max_grad_norm": (1e-6, 1e6),
            "seed": (0, 2**32 - 1),
        }
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ConfigurationError(f"{name} must be between {low:g} and {high:g}.")
        if self.max_steps is not None and self.max_steps < 1:
            raise ConfigurationError("max_steps must be at least 1.")

    def steps(self, studies: int) -> int:
        """Steps of a run with so many studies to train on."""
        steps = self.epochs * math.ceil(studies / self.batch_size)
        return steps if self.max_steps is None else min(steps, self.max_steps)


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What a progress bar shows after a step. `loss` is the step's own, in nats a token; `held_out` the losses
    so far (see `FinetuneResult`); `resumed` the steps that an earlier run has done.
    """

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    studies_per_second: float
    held_out: tuple[float, ...]
    resumed: int


OnStep = Callable[[TrainingState], None]


def show_steps(task: Task) -> OnStep:
    """Tells a task of `FinetuneConfig.steps` steps how the run goes; those of an earlier run count as done."""
    shown = 0

    def show(state: TrainingState) -> None:
        nonlocal shown
        task.advance(state.step - shown)
        shown = state.step
        held_out = f", held out {state.held_out[-1]:.3f}" if state.held_out else ""
        task.tell(f"loss {state.loss:.3f}{held_out}, {state.studies_per_second:.1f} studies/s")

    return show


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """`held_out` are mean losses in nats a token: before training, then after each epoch, and empty where nothing
    is held out; `seconds` are of
    training, those of earlier runs that were taken up included.
    """

    model: PeftModel
    projector: nn.Module
    held_out: tuple[float, ...]
    losses: tuple[float, ...]
    seconds: float

    @property
    def steps(self) -> int:
        return len(self.losses)


@dataclass(slots=True)
class _Run:
    """What a checkpoint holds beside weights and optimizer."""

    losses: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    seconds: float = 0.0


def finetune(
    decoder: LlamaForCausalLM,
    projector: nn.Module,
    examples: Sequence[Example],
    features: FeatureArray,
    config: FinetuneConfig,
    *,
    held_out: Sequence[Example] = (),
    work: Path | None = None,
    checkpoint_seconds: float = 60.0,
    on_step: OnStep = lambda state: None,
) -> FinetuneResult:
    """Trains a fresh LoRA on `decoder`; the loss is that of the answers' tokens alone.

    Args:
        decoder: of `load_decoder`, on the device to train on. Its weights stay as they are; PEFT's layers are
            put into it.
        projector: `[B, tokens, in_features]` -> `[B, tokens, hidden_size]`; changed in place if it is trained.
        examples: the studies to learn from.
        features: `[views, images, tokens_per_image, in_features]`, float: what the tower gives for each image, in
            one or several views (augmentations), of which each epoch draws one a study.
        held_out: scored before training and after each epoch, in the first view.
        work: a folder for the checkpoint, which a later call with the same data and settings takes up; None
            keeps none.
        checkpoint_seconds: between two checkpoints; 0 writes one after each step.

    Raises:
        ConfigurationError: there are no examples.
    """
    if not examples:
        raise ConfigurationError("There is nothing to train on: no studies.")
    return _Finetuning(decoder, projector, examples, features, config, held_out).run(work, checkpoint_seconds, on_step)


class _Finetuning:
    """One run: the model, its optimizer, and where it is."""

    def __init__(
        self,
        decoder: LlamaForCausalLM,
        projector: nn.Module,
        examples: Sequence[Example],
        features: FeatureArray,
        config: FinetuneConfig,
        held_out: Sequence[Example],
    ) -> None:
        self.identity = _identity(decoder, projector, examples, features, config, held_out)
        self.config = config
        self.examples = examples
        self.held_out = held_out
        self.features = features
        self.decoder = decoder
        self.device = decoder.device
        self.model = add_lora(
            decoder, rank=config.rank, alpha=config.alpha, dropout=config.dropout, seed=config.seed
        ).train()
        self.projector = projector.to(self.device, torch.float32).requires_grad_(config.train_projector)
        lora = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [{"params": lora, "peak": config.lora_learning_rate}]
        if config.train_projector:
            groups.append({"params": list(projector.parameters()), "peak": config.projector_learning_rate})
        self.trained: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=config.weight_decay)
        self.steps_per_epoch = math.ceil(len(examples) / config.batch_size)
        self.steps = config.steps(len(examples))
        self.progress = _Run()

    def run(self, work: Path | None, checkpoint_seconds: float, on_step: OnStep) -> FinetuneResult:
        self._resume(work)
        resumed = len(self.progress.losses)
        if self.held_out and not self.progress.held_out:
            self.progress.held_out.append(self.held_out_loss())
        began = last = time.monotonic()
        before, studies = self.progress.seconds, 0
        for step, batch in self._batches(resumed):
            self.progress.losses.append(self._step(step, batch))
            done = step + 1
            epoch, rest = divmod(done, self.steps_per_epoch)
            if self.held_out and (rest == 0 or done == self.steps):
                self.progress.held_out.append(self.held_out_loss())
            now = time.monotonic()
            studies += len(batch.lengths)
            self.progress.seconds = before + now - began
            if work is not None and (done == self.steps or now - last >= checkpoint_seconds):
                self._save(work)
                last = now
            state = TrainingState(
                step=done,
                steps=self.steps,
                epoch=epoch + (rest > 0),
                epochs=math.ceil(self.steps / self.steps_per_epoch),
                loss=self.progress.losses[-1],
                studies_per_second=studies / (now - began),
                held_out=tuple(self.progress.held_out),
                resumed=resumed,
            )
            on_step(state)
        return FinetuneResult(
            self.model.eval(),
            self.projector.requires_grad_(False),
            tuple(self.progress.held_out),
            tuple(self.progress.losses),
            self.progress.seconds,
        )

    def _batches(self, start: int) -> Iterator[tuple[int, Batch]]:
        """From step `start` on. What an epoch shows, and when, follows from the seed and its number alone."""
        for epoch in range(start // self.steps_per_epoch, math.ceil(self.steps / self.steps_per_epoch)):
            first = epoch * self.steps_per_epoch
            planned = epoch_batches(
                self.examples, self.features.shape[0], self.config.batch_size, self.config.seed, epoch
            )
            for step, (indices, views) in enumerate(planned, start=first):
                if start <= step < self.steps:
                    chosen = [self.examples[index] for index in indices]
                    yield step, collate(chosen, views, self.features)

    def _step(self, step: int, batch: Batch) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate_share(step, self.steps, self.config.warmup_share)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.config.seed * 1_000_003 + step)  # dropout is a function of the step, too
            loss = self._summed_loss(batch) / batch.answer_tokens
            loss.backward()
        nn.utils.clip_grad_norm_(self.trained, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def _summed_loss(self, batch: Batch) -> torch.Tensor:
        """The cross entropy of the answers' tokens, summed; float32."""
        batch = batch.to(self.device)
        words = self.decoder.get_input_embeddings()
        weight = words.weight
        assert isinstance(weight, torch.Tensor)
        embeddings = words(batch.token_ids)
        images = self.projector(batch.features).to(weight.dtype)
        embeddings = embeddings.masked_scatter(batch.image_mask[..., None], images)
        hidden = self.decoder.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        return token_loss(hidden[batch.answer_mask], self.decoder.lm_head.weight, batch.labels)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Nats a token over the held-out answers."""
        self.model.eval()
        total, tokens = 0.0, 0
        for indices in plain_batches(self.held_out, self.config.batch_size):
            batch = collate([self.held_out[index] for index in indices], [0] * len(indices), self.features)
            total += self._summed_loss(batch).item()
            tokens += batch.answer_tokens
        self.model.train()
        return total / tokens

    def _resume(self, work: Path | None) -> None:
        state = read_checkpoint(work, self.identity) if work is not None else None
        if state is None:
            return
        with torch.no_grad():
            for parameter, saved in zip(self.trained, state["parameters"], strict=True):
                parameter.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = _Run(**state["progress"])

    def _save(self, work: Path) -> None:
        state = {
            "parameters": [parameter.detach() for parameter in self.trained],
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
        }
        write_checkpoint(work, self.identity, state)


def learning_rate_share(step: int, steps: int, warmup_share: float) -> float:
    """The share of the highest learning rate in a step: up in a line, then down along a cosine to zero."""
    warmup = round(steps * warmup_share)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _identity(
    decoder: LlamaForCausalLM,
    projector: nn.Module,
    examples: Sequence[Example],
    features: FeatureArray,
    config: FinetuneConfig,
    held_out: Sequence[Example],
) -> str:
    """What a checkpoint belongs to. Of large tensors some rows stand for the whole."""
    sha = hashlib.sha256(repr((config, tuple(examples), tuple(held_out), tuple(features.shape))).encode())
    for parameter in (*decoder.parameters(), *projector.parameters()):
        sha.update(parameter.detach().reshape(-1)[:1024].float().cpu().numpy().tobytes())
    for view in range(features.shape[0]):
        for row in np.linspace(0, features.shape[1] - 1, num=min(16, features.shape[1]), dtype=int):
            sha.update(torch.as_tensor(np.array(features[view, row])).float().numpy().tobytes())
    return sha.hexdigest()

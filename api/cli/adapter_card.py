"""The card of a trained adapter: what it was made of and how it did, without a name or a word of any study."""

import math
from dataclasses import asdict, dataclass
from importlib.metadata import version

from vlm_serve import __version__
from vlm_serve.training.adapter import Split, TrainedAdapter
from vlm_serve.training.decoder import TARGET_MODULES
from vlm_serve.training.finetune import FinetuneConfig
from vlm_serve.training.scores import Scores
from vlm_serve.types import JsonObject

_CARD = """\
# {name}

**Draft only, a demonstration until it is validated. Not a medical device; not for diagnostic use unless validated for
it by those who use it.** A LoRA adapter for vlm-serve, trained by `vlm-serve train-adapter` on the studies and reports
that its owner gave. It can repeat what it was trained on: handle it as you handle those reports.

| base model | `{base}` |
|---|---|
| its digest (sha256) | `{digest}` |
| format | PEFT LoRA, rank {rank}, alpha {alpha}, on {modules} of every block |
| studies trained on | {train} with {train_images} images |
| studies held out | {held_out} with {held_out_images} images |
| made with | vlm-serve {vlm_serve}, torch {torch}, peft {peft} |

The base model's weights, its tower and its projector are unchanged.

## Held-out studies

| over {tokens} tokens of their reports | loss (nats a token) | perplexity |
|---|--:|--:|
| base model without the adapter | {base_loss:.3f} | {base_perplexity:.2f} |
| with the adapter | {loss:.3f} | {perplexity:.2f} |

After each epoch: {epochs}.

{scores}

## How it was trained

{seconds:.0f} seconds, {steps} steps, AdamW with warm-up and cosine; the loss is that of the reports' tokens.

| setting | value |
|---|--:|
{settings}
"""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What is known of an adapter from studies that it was not trained on. Losses are in nats a token."""

    studies: int
    tokens: int
    base_loss: float
    loss: float
    drafts: Scores | None

    @classmethod
    def of(cls, trained: TrainedAdapter, studies: int, drafts: Scores | None) -> "HeldOut":
        return cls(studies, trained.held_out_tokens, trained.losses[0], trained.losses[-1], drafts)

    @property
    def base_perplexity(self) -> float:
        return math.exp(self.base_loss)

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    def to_json(self) -> JsonObject:
        return {
            "studies": self.studies,
            "tokens": self.tokens,
            "base": {"loss": self.base_loss, "perplexity": self.base_perplexity},
            "adapter": {"loss": self.loss, "perplexity": self.perplexity},
            "drafts": None if self.drafts is None else self.drafts.to_json(),
        }


def adapter_card(
    name: str,
    base_model: str,
    digest: str,
    split: Split,
    config: FinetuneConfig,
    trained: TrainedAdapter,
    held_out: HeldOut,
) -> str:
    """Markdown for the adapter's folder."""
    shown = {key: value for key, value in asdict(config).items() if "projector" not in key and value is not None}
    return _CARD.format(
        name=name,
        base=base_model,
        digest=digest,
        rank=config.rank,
        alpha=config.alpha,
        modules=", ".join(TARGET_MODULES),
        train=len(split.train),
        train_images=sum(len(study.images) for study in split.train),
        held_out=held_out.studies,
        held_out_images=sum(len(study.images) for study in split.held_out),
        vlm_serve=__version__,
        torch=version("torch"),
        peft=version("peft"),
        tokens=held_out.tokens,
        base_loss=held_out.base_loss,
        base_perplexity=held_out.base_perplexity,
        loss=held_out.loss,
        perplexity=held_out.perplexity,
        epochs=", ".join(f"{loss:.3f}" for loss in trained.losses[1:]),
        scores=_scores(held_out.drafts),
        seconds=trained.seconds,
        steps=trained.steps,
        settings="\n".join(f"| {key} | {value} |" for key, value in shown.items()),
    )


def _scores(drafts: Scores | None) -> str:
    if drafts is None:
        return "No drafts were written of them (`--score 0`)."
    title = (
        f"### Drafts of {drafts.studies} of them\n\nGreedy, through the served model; labels found in draft and report."
    )
    return "\n".join([title, "", *drafts.lines()]).rstrip()

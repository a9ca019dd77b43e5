"""`vlm-serve train-adapter`: a department's own studies and reports become an adapter, with a held-out score and card.

The adapter's folder appears when it is whole. Until then all of it lies in a work folder, where the same command goes
on after it was cut off.
"""

import argparse
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console

from api.cli.adapter_card import HeldOut, adapter_card
from api.cli.arguments import given_settings
from api.cli.progress import TerminalProgress
from api.cli.settings import load_settings
from vlm_serve.config import Settings
from vlm_serve.engine.engine import choose_device, choose_dtype
from vlm_serve.errors import ConfigurationError, InvalidRequestError
from vlm_serve.families import load_family, resolve_model
from vlm_serve.serving.llm import LLM
from vlm_serve.training.adapter import Split, TrainedAdapter, checked_split, split_by_share, train_adapter
from vlm_serve.training.dataset import Study, read_studies
from vlm_serve.training.finetune import FinetuneConfig
from vlm_serve.training.progress import Progress
from vlm_serve.training.scores import Scores, score
from vlm_serve.types import SamplingParams

HELD_OUT_FILE = "held_out.json"
CARD_FILE = "README.md"
_AT_ONCE = 32
"""Studies whose drafts are written together; their pixels are in memory at once."""


def train(arguments: argparse.Namespace) -> int:
    settings = load_settings(given_settings(arguments), os.environ, arguments.config)
    out: Path = arguments.out.expanduser().resolve()
    work: Path = (arguments.work or out.with_name(f".{out.name}.work")).expanduser().resolve()
    config = FinetuneConfig(
        rank=arguments.rank,
        alpha=2 * arguments.rank,
        dropout=arguments.dropout,
        lora_learning_rate=arguments.learning_rate,
        epochs=arguments.epochs,
        max_steps=arguments.max_steps,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )
    if config.rank > settings.engine.max_adapter_rank:
        raise InvalidRequestError(
            f"--rank {config.rank} is above {settings.engine.max_adapter_rank}, the highest that is served "
            "(engine.max_adapter_rank). Choose a lower one."
        )
    if arguments.score < 0:
        raise InvalidRequestError("--score must be 0 or more.")
    _check_free(out)
    split = _split(arguments.data.expanduser(), arguments.held_out, config.seed)
    console = Console(highlight=False)
    try:
        with TerminalProgress(console) as progress:
            draft = _train(settings, config, split, arguments.score, out.name, work, progress)
    except OSError as error:
        raise ConfigurationError(
            f"{work} cannot be written or read ({error.strerror}). Make room, or name another folder with --work."
        ) from None
    except KeyboardInterrupt:
        console.print(f"Stopped. The same command goes on with what is in {work}.", soft_wrap=True, markup=False)
        raise
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(draft, out)
    if arguments.work is None:
        shutil.rmtree(work)
    console.print(f"{out} holds the adapter and its card, {CARD_FILE}.", soft_wrap=True, markup=False)
    model = "" if settings.model.model == "demo" else f"--model {settings.model.model} "
    console.print(
        f"vlm-serve serve {model}--adapters {out.parent} serves it as {out.name}.", soft_wrap=True, markup=False
    )
    return 0


def _check_free(out: Path) -> None:
    """Before the minutes or hours of work, not after them."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidRequestError(f"{out} is there already. Choose another --out, or remove it.")
    above = next(folder for folder in out.parents if folder.exists())
    if not os.access(above, os.W_OK):
        raise InvalidRequestError(f"Nothing can be written to {above}. Choose another --out.")
    if out.exists():
        out.rmdir()


def _split(data: Path, held_out: str, seed: int) -> Split:
    studies = read_studies(data)
    try:
        share = float(held_out)
    except ValueError:
        return checked_split(Split(studies, read_studies(Path(held_out).expanduser())))
    if not 0 < share <= 0.5:
        raise InvalidRequestError("--held-out must be a share above 0 and at most 0.5, or a JSONL file.")
    return split_by_share(studies, share, seed)


def _train(
    settings: Settings,
    config: FinetuneConfig,
    split: Split,
    score_limit: int,
    name: str,
    work: Path,
    progress: Progress,
) -> Path:
    """The adapter's folder, whole, inside the work folder."""
    with progress.task("preparing the model", 1) as task:
        folder = resolve_model(settings.model.model, task.tell)
        family = load_family(folder)
        task.advance()
    device = choose_device(settings.model.device)
    dtype = choose_dtype(settings.model.dtype, device, family.decoder_config)
    draft = work / "trained" / name
    shutil.rmtree(draft, ignore_errors=True)
    trained = train_adapter(
        family,
        split,
        config,
        base_model=settings.model.served_name,
        folder=draft,
        work=work,
        dtype=torch.float32 if dtype == torch.float16 else dtype,  # gradients vanish in float16
        device=device,
        limits=settings.ingest.limits,
        progress=progress,
    )
    drafts = _write_drafts(settings, folder, draft, trained, split.held_out[:score_limit], progress)
    held_out = HeldOut.of(trained, len(split.held_out), drafts)
    (draft / HELD_OUT_FILE).write_text(json.dumps(held_out.to_json(), indent=1) + "\n", encoding="utf-8")
    card = adapter_card(name, settings.model.served_name, family.model_digest, split, config, trained, held_out)
    (draft / CARD_FILE).write_text(card, encoding="utf-8")
    return draft


def _write_drafts(
    settings: Settings,
    model: Path,
    adapter: Path,
    trained: TrainedAdapter,
    studies: Sequence[Study],
    progress: Progress,
) -> Scores | None:
    """Scores of what the served model, greedy and with the new adapter, writes of the studies; None without any."""
    if not studies:
        return None
    # Twice the longest answer of the data: who goes on beyond it has not learnt to end.
    sampling = SamplingParams(max_tokens=min(2 * trained.longest_answer, trained.room_for_answers), temperature=0)
    chosen = settings.model
    drafts: list[str | None] = []
    with (
        progress.task("writing held-out drafts", len(studies)) as task,
        LLM(
            model,
            adapters=adapter,
            dtype=chosen.dtype,
            device=chosen.device,
            max_adapter_rank=settings.engine.max_adapter_rank,
        ) as llm,
    ):
        for start in range(0, len(studies), _AT_ONCE):
            some = studies[start : start + _AT_ONCE]
            conversations = [[{"role": "user", "content": list(_parts(study))}] for study in some]
            outputs = llm.chat(conversations, sampling, adapter=adapter.name, use_tqdm=False)
            answers = [output.outputs[0] for output in outputs]
            drafts += [None if answer.finish_reason == "error" else answer.text for answer in answers]
            task.advance(len(some))
    return score(drafts, [study.report for study in studies])


def _parts(study: Study) -> Iterator[dict[str, object]]:
    """A study's message as `LLM.chat` takes it; the order is that of `study_chat`."""
    for path in study.images:
        yield {"type": "image", "image": path}
    yield {"type": "text", "text": study.prompt}

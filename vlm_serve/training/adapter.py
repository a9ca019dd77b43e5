"""From a user's own studies to an adapter of the served model: split, encode, fine-tune, save.

The base model stays as it is, for every department shares it: one LoRA on its decoder is all that is trained.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vlm_serve.config import DecodeLimits
from vlm_serve.digests import file_digest
from vlm_serve.errors import InvalidRequestError
from vlm_serve.families.base import ModelFamily
from vlm_serve.training.dataset import Study
from vlm_serve.training.decoder import load_decoder, save_adapter
from vlm_serve.training.examples import make_examples
from vlm_serve.training.features import encode_studies, load_vision
from vlm_serve.training.finetune import FinetuneConfig, finetune, show_steps
from vlm_serve.training.progress import Progress

MIN_STUDIES = 8
"""Fewer are a mistake in the data, not a department's reports."""


@dataclass(frozen=True, slots=True)
class Split:
    """`train` to learn from, `held_out` to be scored on; no study, no patient and no image is in both."""

    train: list[Study]
    held_out: list[Study]


def split_by_share(studies: Sequence[Study], share: float, seed: int) -> Split:
    """Holds out about `share` of the studies, by a hash of the seed and their ids. Studies of the same patient, or
    with the same image in whatever file, go together; without such bonds a study that is added later moves no other.

    Raises:
        InvalidRequestError: too few studies, or all on one side.
    """

    def is_held_out(name: str) -> bool:
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < share * 2**64

    groups = _groups(studies)
    held_out = [is_held_out(groups[study.id]) for study in studies]
    return checked_split(
        Split(
            [study for study, out in zip(studies, held_out, strict=True) if not out],
            [study for study, out in zip(studies, held_out, strict=True) if out],
        )
    )


def _groups(studies: Sequence[Study]) -> dict[str, str]:
    """For each study the id of the first one that it is bound to, directly or through others."""
    first: dict[str, str] = {study.id: study.id for study in studies}

    def root(name: str) -> str:
        while first[name] != name:
            name = first[name]
        return name

    owner: dict[str, str] = {}
    for study in studies:
        for bond in _bonds(study):
            one, other = root(owner.setdefault(bond, study.id)), root(study.id)
            first[other] = one
    return {study.id: root(study.id) for study in studies}


def _bonds(study: Study) -> set[str]:
    """What keeps a study on the side of others: its patient, and each image by its content."""
    try:
        images = {file_digest(path) for path in study.images}
    except OSError as error:
        raise InvalidRequestError(f"An image of study {study.id!r} cannot be read: {error.strerror}.") from None
    return images if study.patient is None else {*images, f"patient {study.patient}"}


def checked_split(split: Split) -> Split:
    """The split, if it can be trained and scored on.

    Raises:
        InvalidRequestError: too few studies, or one that is on both sides; names it by its id.
    """
    if len(split.train) < MIN_STUDIES or not split.held_out:
        raise InvalidRequestError(
            f"There are {len(split.train)} studies to train on and {len(split.held_out)} held out; at least "
            f"{MIN_STUDIES} and 1 are needed. Add studies, or change the share that is held out."
        )
    names = {study.id for study in split.train}
    bonds = set().union(*(_bonds(study) for study in split.train))
    for study in split.held_out:
        if study.id in names or not bonds.isdisjoint(_bonds(study)):
            raise InvalidRequestError(
                f"The held-out study {study.id!r}, its patient or one of its images is among the studies to train on: "
                "its score would mean nothing. Leave it out of one of the two files."
            )
    return split


@dataclass(frozen=True, slots=True)
class TrainedAdapter:
    """How training went. `losses` are means in nats a token over the held-out answers, of `held_out_tokens` tokens:
    without the adapter, then after each epoch. `longest_answer` counts the tokens of the longest report,
    `room_for_answers` those that the context leaves after the longest prompt.
    """

    losses: tuple[float, ...]
    held_out_tokens: int
    longest_answer: int
    room_for_answers: int
    steps: int
    seconds: float


def train_adapter(
    family: ModelFamily,
    split: Split,
    config: FinetuneConfig,
    *,
    base_model: str,
    folder: Path,
    work: Path,
    dtype: torch.dtype,
    device: torch.device,
    limits: DecodeLimits,
    progress: Progress,
) -> TrainedAdapter:
    """Trains an adapter and saves it in `folder`.

    Args:
        base_model: what the adapter's config calls the base model.
        work: for features and checkpoint; the same call takes them up where an earlier one was cut off.
        dtype: of tower and decoder.
        limits: of decoding a file.

    Raises:
        ImageError: a file cannot be used.
        InvalidRequestError: a study is longer than the model's context.
    """
    studies = [*split.train, *split.held_out]
    examples = make_examples(family, studies, family.max_tokens_per_image)
    train, held_out = examples[: len(split.train)], examples[len(split.train) :]
    vision, projector = load_vision(family, dtype, device)
    features = encode_studies(family, vision, studies, limits, work, progress)
    del vision
    decoder = load_decoder(family, dtype, device)
    with progress.task("training the adapter", config.steps(len(train))) as task:
        result = finetune(
            decoder, projector, train, features, config, held_out=held_out, work=work, on_step=show_steps(task)
        )
    save_adapter(result.model, family, folder, base_model)
    return TrainedAdapter(
        losses=result.held_out,
        held_out_tokens=sum(example.answer_tokens for example in held_out),
        longest_answer=max(example.answer_tokens for example in examples),
        room_for_answers=family.decoder_config.max_positions - max(example.answer_start for example in examples),
        steps=result.steps,
        seconds=result.seconds,
    )

"""The embedded default learns to see: simulated studies, the tower, the projector, and the radiology adapter.

Every stage leaves its result in the work folder and is passed over when it is there, so that a run that was cut
off goes on where it was. The decoder's own weights stay as they are.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from vlm_serve.clinical.decode import decode
from vlm_serve.config import DecodeLimits
from vlm_serve.encoders.projector import MlpProjector
from vlm_serve.encoders.timm_tower import TimmTower
from vlm_serve.families.demo import pretrained_tower
from vlm_serve.families.timm_vlm import TimmVlmFamily, letterbox
from vlm_serve.training.dataset import Study, read_studies
from vlm_serve.training.decoder import load_decoder, save_adapter
from vlm_serve.training.examples import make_examples
from vlm_serve.training.finetune import FinetuneConfig, finetune, show_steps
from vlm_serve.training.progress import Progress
from vlm_serve.training.studies.reports import ask_and_answer
from vlm_serve.training.studies.simulate import Counts, simulate
from vlm_serve.training.studies.truth import Truth
from vlm_serve.training.tower import COVERED, LabelledPictures, TowerConfig, Vocabulary, augment, train_tower

VISION_FILE = "vision.safetensors"
ADAPTER = "adapter"


QUESTION_EVERY = 4

STEPS = 220
"""Of the adapter's training. The loss is flat long before; the sides are not right yet."""


@dataclass(frozen=True, slots=True)
class DemoConfig:
    """All of a run's settings; `seed` is that of the studies."""

    counts: Counts = field(default_factory=Counts)
    seed: int = 7
    processes: int = 2
    tower: TowerConfig = field(default_factory=TowerConfig)
    projector_steps: int = 600
    finetune: FinetuneConfig = field(
        default_factory=lambda: FinetuneConfig(train_projector=True, epochs=1, max_steps=STEPS)
    )


def train_demo(family: TimmVlmFamily, work: Path, config: DemoConfig, progress: Progress) -> None:
    """Trains tower, projector and adapter; they are in `work` afterwards, as `VISION_FILE` and the folder `ADAPTER`.

    Args:
        family: of the embedded default; its decoder, tokenizer and processor are used, its tower and projector
            are not.
    """
    studies = work / "studies"
    simulate(studies, config.counts, config.seed, config.processes, progress)
    train, validation = (read_pictures(studies, split, family.image_size) for split in ("train", "validation"))
    tower = pretrained_tower().train()
    train_tower(tower, train, validation, config.tower, work / "tower", progress)
    tower.eval().requires_grad_(False)
    features = encode_pictures(tower, train, work, progress)
    decoder = load_decoder(family, torch.bfloat16)
    words: torch.Tensor = decoder.get_input_embeddings().weight.float()  # type: ignore[assignment]
    torch.manual_seed(config.seed)
    projector = MlpProjector(tower.out_features, family.decoder_config.hidden_size)
    aligned = work / f"aligned-{digest(tower)[:16]}.safetensors"
    if aligned.is_file():
        projector.load_state_dict(load_file(aligned))
    else:
        align_projector(projector, features, train, family, words, config, progress)
        save_file(projector.state_dict(), aligned)
    rows = with_questions(read_studies(studies / "train.jsonl"), train.truths, config.seed)
    examples = make_examples(family, rows, family.max_tokens_per_image)
    with progress.task("training projector and adapter", config.finetune.steps(len(examples))) as task:
        result = finetune(
            decoder,
            projector,
            examples,
            features,
            config.finetune,
            work=work / "finetune",
            on_step=show_steps(task),
        )
    save_adapter(result.model, family, work / ADAPTER, "vlm-serve demo")
    save_vision(tower, projector, work / VISION_FILE)


def with_questions(studies: Sequence[Study], truths: Sequence[Truth], seed: int) -> list[Study]:
    """One study in `QUESTION_EVERY` with a short question instead: in turns of the picture alone, and after its
    report, where the answer must agree with it.
    """
    rng = np.random.default_rng(seed)
    asked = []
    for number, (study, truth) in enumerate(zip(studies, truths, strict=True)):
        if number % QUESTION_EVERY == 0:
            prompt, answer = ask_and_answer(truth, rng)
            follows = number % (2 * QUESTION_EVERY) == 0
            history = ((study.prompt, study.report),) if follows else ()
            study = replace(study, prompt=prompt, report=answer, history=history)
        asked.append(study)
    return asked


def save_vision(tower: TimmTower, projector: MlpProjector, path: Path) -> None:
    """bfloat16, by the names that the embedded default's folder has."""
    tensors = {f"vision.{name}": tensor for name, tensor in tower.model.state_dict().items()}
    tensors |= {f"projector.{name}": tensor for name, tensor in projector.state_dict().items()}
    halves = {
        name: tensor.detach().to(torch.bfloat16) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    save_file({name: tensor.contiguous().clone() for name, tensor in halves.items()}, path)
    path.chmod(0o644)  # it is served by another user than the one who trains


def read_pictures(folder: Path, split: str, size: int) -> LabelledPictures:
    """The studies of a split as the model's processor lays them out."""
    studies = read_studies(folder / f"{split}.jsonl")
    pixels = np.empty((len(studies), size, size), dtype=np.uint8)
    for number, study in enumerate(studies):
        image = decode(study.images[0].read_bytes(), "application/dicom", DecodeLimits())
        pixels[number] = letterbox(image.pixels, size)[:, :, 0]
    truths = tuple(Truth(**(study.truth or {})) for study in studies)
    return LabelledPictures(pixels, np.load(folder / split / "masks.npy"), truths)


@torch.inference_mode()
def encode_pictures(tower: TimmTower, pictures: LabelledPictures, work: Path, progress: Progress) -> np.ndarray:
    """The tower's features, float16 `[1, N, tokens, out_features]`, kept in `work` under the tower's digest.

    Every other picture is turned, shifted and exposed a little differently first: the tower has seen them as they
    are, and is surer of them than of new ones. None is mirrored, since the reports stay.
    """
    path = work / f"features-{digest(tower)[:16]}.npy"
    if path.is_file():
        return _open(path)
    draft = path.with_suffix(".draft.npy")
    shape = (1, len(pictures), tower.num_tokens, tower.out_features)
    features = np.lib.format.open_memmap(draft, "w+", np.float16, shape)
    rng = torch.Generator().manual_seed(0)
    vocabulary = Vocabulary(pictures.truths)
    labels = vocabulary.encode(pictures.truths)
    with progress.task("encoding the pictures", len(pictures)) as task:
        for rows in torch.arange(len(pictures)).split(32):
            pixels = torch.from_numpy(pictures.pixels[rows.numpy()]).float()[:, None] / 127.5 - 1
            altered = augment(pictures, rows, labels, vocabulary, rng, mirror=False).pixels
            pixels = torch.where((rows % 2 == 0)[:, None, None, None], pixels, altered)
            features[0, rows.numpy()] = tower(pixels).to(torch.float16).numpy()
            task.advance(len(rows))
    features.flush()
    draft.rename(path)
    return _open(path)


def _open(path: Path) -> np.ndarray:
    features: np.ndarray = np.load(path, mmap_mode="r")
    return features


def digest(module: torch.nn.Module) -> str:
    """sha256 over a module's weights."""
    sha = hashlib.sha256()
    for tensor in module.state_dict().values():
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()


def align_projector(
    projector: MlpProjector,
    features: np.ndarray,
    pictures: LabelledPictures,
    family: TimmVlmFamily,
    words: torch.Tensor,
    config: DemoConfig,
    progress: Progress,
) -> None:
    """Turns each token's features into the words for what is there, before the decoder sees any of them.

    The target is the sum of the decoder's own embeddings of these words: of the kind of study everywhere, of the
    finding, its side and zone above all where it lies. `words` is float32 `[vocabulary, hidden]`.
    """
    everywhere = torch.stack([_meaning(family, words, _study_words(truth)) for truth in pictures.truths])
    here = torch.stack([_meaning(family, words, _finding_words(truth)) for truth in pictures.truths])
    grid = torch.from_numpy(pictures.masks).float()[:, None] / 255
    under = F.adaptive_avg_pool2d(grid, family.grid).flatten(1) > COVERED  # [N, tokens]
    optimizer = torch.optim.AdamW(projector.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.projector_steps)
    rng = torch.Generator().manual_seed(config.seed)
    scale = everywhere.square().mean()
    with progress.task("aligning the projector", config.projector_steps) as task:
        for _ in range(config.projector_steps):
            rows = torch.randint(len(pictures), (32,), generator=rng)
            tokens = torch.from_numpy(np.asarray(features[0, rows.numpy()])).float()
            target = torch.where(under[rows][..., None], here[rows][:, None], everywhere[rows][:, None])
            loss = F.mse_loss(projector(tokens), target) / scale
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            task.advance()
        task.tell(f"error {loss.item():.2f}")


def _meaning(family: TimmVlmFamily, embeddings: torch.Tensor, words: Sequence[str]) -> torch.Tensor:
    """The sum of the words' embeddings, as large as one of them."""
    total = torch.zeros(embeddings.shape[1])
    for word in words:
        ids = family.backend_tokenizer.encode(f" {word}", add_special_tokens=False).ids
        total += embeddings[torch.tensor(ids)].mean(0)
    meaning: torch.Tensor = total / len(words) ** 0.5
    return meaning


def _finding_words(truth: Truth) -> list[str]:
    if truth.finding == "none":
        return ["normal", "clear"]
    return [word for word in (truth.extent, truth.side, truth.zone, truth.finding) if word]


def _study_words(truth: Truth) -> list[str]:
    return [truth.modality, truth.region, truth.plane, *_finding_words(truth)]

"""A real engine on a tiny checkpoint, beside transformers' model of the same weights.

`Harness` prepares conversations as the server does, runs them, and records the logits of every position
that the decoder computes, so that parity can be asserted on the whole prompt.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlm_serve.clinical.image import ClinicalImage, ImageReceipt
from vlm_serve.config import EngineConfig, ModelConfig
from vlm_serve.engine.batch import ScheduledBatch, StepResult
from vlm_serve.engine.engine import Engine
from vlm_serve.families import load_family
from vlm_serve.families.base import Prompt
from vlm_serve.lora.store import AdapterStore
from vlm_serve.types import ChatInput, ChatMessage, ImagePart, Request, SamplingParams, TextPart, TokenLogprobs

DEVICE = os.environ.get("VLM_SERVE_TEST_DEVICE", "cpu")
LOGIT_TOLERANCE = 1e-4


def picture(seed: int, height: int = 28, width: int = 28) -> ClinicalImage:
    """A picture that is not flat, so that a wrong patch order or a wrong image shows."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return ClinicalImage(pixels, ImageReceipt("image/png", "", "", height, width, "test"))


def break_the_encoder_for(engine: Engine, digest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a batch of images with this one in it cannot be encoded."""
    model = engine.runner.model
    encode = model.encode_images

    def broken(images):
        if any(inputs.digest == digest for inputs in images):
            raise RuntimeError("a fault in the encoder")
        return encode(images)

    monkeypatch.setattr(model, "encode_images", broken)


@dataclass
class Run:
    """One request: what the engine computed for it, in `chunks` `[begin, end)`, and the `logits`, by position, of what
    its last layer gave: where a token is drawn, and every position of a prompt whose log-probabilities were asked for.
    """

    prompt: Prompt
    token_ids: list[int] = field(default_factory=list)
    logits: dict[int, torch.Tensor] = field(default_factory=dict)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    chunks: list[tuple[int, int]] = field(default_factory=list)
    cached_tokens: int = 0


class Harness:
    """An engine as it serves, of which every step is looked at."""

    def __init__(
        self,
        folder: Path,
        *,
        adapters: Path | None = None,
        kv_blocks: int = 512,
        dtype: str = "float32",
        **config: Any,
    ) -> None:
        self.family = load_family(folder)
        self.store = AdapterStore(adapters)
        decoder = self.family.decoder_config
        block_size = config.setdefault("block_size", 4)
        per_token = 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * 4
        self.engine = Engine.build(
            self.family,
            ModelConfig(str(folder), adapters, dtype, DEVICE),
            EngineConfig(kv_cache_memory=kv_blocks * block_size * per_token, **config),
            self.store.adapters,
        )
        self.steps: list[ScheduledBatch] = []
        self._runs: dict[str, Run] = {}
        self._run_batch = self.engine.runner.run
        self.engine.runner.run = self._record  # type: ignore[method-assign]
        self.engine.runner.model.decoder.register_forward_hook(self._keep_hidden)

    def _keep_hidden(self, module: Any, arguments: Any, hidden: torch.Tensor) -> None:
        self._hidden = hidden

    def _record(self, batch: ScheduledBatch) -> StepResult:
        """Runs a batch and keeps the logits of what the last layer gave of it."""
        result = self._run_batch(batch)
        self.steps.append(batch)
        runner = self.engine.runner
        with torch.inference_mode():
            logits = iter(runner.model.decoder.logits(self._hidden).cpu() if len(self._hidden) else [])
        ends = (batch.starts + batch.counts).tolist()
        outputs = runner._head.outputs(batch).tolist()
        for row, start, end, given in zip(batch.rows.tolist(), batch.starts.tolist(), ends, outputs, strict=True):
            run = self._runs[self.engine.scheduler._by_row[row].request.request_id]
            run.chunks.append((start, end))
            run.logits.update((position, next(logits)) for position in range(end - given, end))
        assert next(logits, None) is None
        return result

    def set(self, **config: Any) -> None:
        """Changes settings of the scheduler that is there."""
        self.engine.scheduler.config = replace(self.engine.scheduler.config, **config)

    def chat(self, *content: str | ClinicalImage) -> Prompt:
        """The prompt of one user message of text and pictures."""
        parts = tuple(TextPart(c) if isinstance(c, str) else ImagePart(b"-", "image/png") for c in content)
        images = [self.family.process_image(c) for c in content if isinstance(c, ClinicalImage)]
        return self.family.render_chat(ChatInput((ChatMessage("user", parts),)), images)

    def run(
        self,
        *prompts: Prompt,
        max_tokens: int | Sequence[int] = 8,
        adapters: Sequence[str | None] | None = None,
        salt: str = "",
        prompt_logprobs: bool | Sequence[bool] = False,
        logit_bias: Mapping[int, float] | None = None,
    ) -> list[Run]:
        """Runs the prompts together, greedily, to the end."""
        sampling = SamplingParams(temperature=0, ignore_eos=True, logit_bias=logit_bias)
        self._runs = {str(index): Run(prompt) for index, prompt in enumerate(prompts)}
        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
        asked = [prompt_logprobs] * len(prompts) if isinstance(prompt_logprobs, bool) else prompt_logprobs
        for (name, run), limit, adapter, is_asked in zip(
            self._runs.items(), limits, adapters or [None] * len(prompts), asked, strict=True
        ):
            folder = None if adapter is None else self.store.get(adapter)
            self.engine.add(
                Request(
                    request_id=name,
                    token_ids=run.prompt.token_ids,
                    images=run.prompt.images,
                    both_ways_prefix=run.prompt.both_ways_prefix,
                    sampling=replace(sampling, max_tokens=limit, prompt_logprobs=0 if is_asked else None),
                    adapter=None if folder is None else folder.digest,
                    cache_salt=salt,
                )
            )
        self.steps.clear()
        while self.engine.has_work:
            for output in self.engine.step().outputs:
                assert output.error is None, output.error
                self._runs[output.request_id].token_ids += output.token_ids
                self._runs[output.request_id].prompt_logprobs += output.prompt_logprobs
                self._runs[output.request_id].cached_tokens = output.cached_tokens
        runs = list(self._runs.values())
        for run, is_asked in zip(runs, asked, strict=True):
            assert len(run.prompt_logprobs) == is_asked * (len(run.prompt.token_ids) - 1)
            assert not is_asked or run.logits.keys() >= set(range(len(run.prompt.token_ids)))
        return runs

    @property
    def images_encoded(self) -> int:
        """How many images the last `run` sent through the encoder."""
        return sum(len(batch.encode) for batch in self.steps)


@torch.inference_mode()
def reference_logits(model: Any, run: Run) -> torch.Tensor:
    """transformers' logits `[tokens, vocab]` for a run's prompt and answer, in one forward pass."""
    ids = torch.tensor([run.prompt.token_ids + tuple(run.token_ids[:-1])])
    mask = attention_mask(run, ids.shape[1])
    if not run.prompt.images:
        return model(input_ids=ids, attention_mask=mask).logits[0]
    pixels = torch.stack([torch.from_numpy(span.inputs.tensors["pixel_values"]) for span in run.prompt.images])
    answer = ids[:, len(run.prompt.token_ids) :]
    if not (answer == model.config.image_token_id).any():
        return model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits[0]
    # A random model may answer with the placeholder itself, which transformers would take for an image.
    embeddings = model.get_input_embeddings()(ids)
    features = model.get_image_features(pixel_values=pixels).pooler_output
    for span, feature in zip(run.prompt.images, features, strict=True):
        embeddings[0, span.offset : span.end] = feature
    return model(inputs_embeds=embeddings, attention_mask=mask).logits[0]


def attention_mask(run: Run, length: int) -> torch.Tensor:
    """What transformers takes: every token is one, or, where spans attend both ways, what is added to the scores,
    `[1, 1, length, length]`, for a decoder without windows.
    """
    if not any(span.inputs.attends_both_ways for span in run.prompt.images):
        return torch.ones(1, length, dtype=torch.int64)
    sees = torch.ones(length, length, dtype=torch.bool).tril()
    for span in run.prompt.images:
        if span.inputs.attends_both_ways:
            sees[span.offset : span.end, span.offset : span.end] = True
    return torch.zeros(length, length).masked_fill(~sees, torch.finfo(torch.float32).min)[None, None]


def assert_parity(model: Any, run: Run) -> float:
    """Every logit that the engine gave equals transformers', but for those of guesses past the end; so does every
    log-probability of the prompt, if they were asked for, and each token is transformers' choice.

    Returns the largest difference of logits.
    """
    expected = reference_logits(model, run)
    own = {position: logits for position, logits in run.logits.items() if position < len(expected)}
    error = max(float((logits - expected[position]).abs().max()) for position, logits in own.items())
    assert error <= LOGIT_TOLERANCE, f"logits differ by {error:.2e}"
    tokens = run.prompt.token_ids[1:]
    logprobs = expected.float().log_softmax(-1)[range(len(tokens)), tokens]
    for entry, token, logprob in zip(run.prompt_logprobs, tokens, logprobs.tolist(), strict=False):
        assert entry.token_ids == (token,)
        assert abs(entry.logprobs[0] - logprob) <= LOGIT_TOLERANCE
    first = len(run.prompt.token_ids) - 1
    assert run.token_ids == expected[first:].argmax(-1).tolist()
    assert run.logits.keys() >= set(range(first, len(expected)))
    return error

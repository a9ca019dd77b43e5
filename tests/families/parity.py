"""Parity of a family: its prompts are those of transformers' processor, its logits those of transformers' whole model.

A family's test writes a tiny checkpoint of random weights, and hands over its folder and transformers' model of it:

    Parity(folder, model).check_everything("Gemma 3", record_property)
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import torch
from torch import nn

from tests.engine.adapters import make_adapter
from tests.engine.harness import DEVICE, LOGIT_TOLERANCE, Harness, Run, picture
from vlm_serve.clinical.image import ClinicalImage
from vlm_serve.engine.batch import ScheduledBatch
from vlm_serve.families.base import ModelFamily, Prompt

# isort: split
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase

Content = tuple[str | ClinicalImage, ...]
"""One user's message."""

Record = Callable[[str, object], None]
"""pytest's `record_property`."""

QUESTION = "What does the image show?"
PICTURES = (picture(1), picture(2, 40, 56), picture(3, 60, 30))
WHOLE = 1 << 20
"""A budget that no prompt exceeds."""
IN_THE_DECODER = re.compile(r"(model\.((language_model|text_model|decoder)\.)?layers|transformer\.h)\.\d+\..+")
"""The names that transformers' models give to the modules of the decoder's layers."""


def record_row(record: Record, row: str, family: ModelFamily) -> None:
    """A test's properties are evidence for this row of the table in docs/models.md, see scripts/model_table.py."""
    record("row", row)
    record("family", type(family).__name__.removesuffix("Family"))
    record("model_type", family.config["model_type"])
    record("device", DEVICE)


class Parity:
    """The engine on a checkpoint beside transformers.

    Args:
        folder: the checkpoint.
        model: transformers' of the same weights, float32, in eval.
        processor: transformers'; None: that of the folder. A tokenizer for a model of text alone.
        pictures: three of different sizes; none for a model of text alone.
        processor_options: for each call of the processor.
        answer_marks: what a generated token has in the inputs that mark each token, where that is not 0
            (`token_type_ids`).
        settings: of the engine, see `Harness`.
    """

    def __init__(
        self,
        folder: Path,
        model: Any,
        *,
        processor: Any = None,
        pictures: Sequence[ClinicalImage] = PICTURES,
        processor_options: Mapping[str, object] | None = None,
        answer_marks: Mapping[str, int] | None = None,
        **settings: Any,
    ) -> None:
        self.folder = folder
        self.model = model
        self.processor = processor or (AutoProcessor if pictures else AutoTokenizer).from_pretrained(folder)
        self.pictures = pictures
        self.harness = _serve(folder, **settings)
        self.largest_error = 0.0
        self._processor_options = dict(processor_options or {})
        self._answer_marks = {"attention_mask": 1} | dict(answer_marks or {})

    @cached_property
    def conversations(self) -> dict[str, Content]:
        """By kind; text alone for a model that takes nothing else."""
        if not self.pictures:
            return {"text": (QUESTION,), "more text": ("Is there a mass in the left upper lobe? Compare.",)}
        one, two, three = self.pictures
        return {
            "text": (QUESTION,),
            "one image": (one, QUESTION),
            "three images": (one, two, three, "Compare them."),
            "images and text": ("Is it ", two, "or ", one, "?"),
        }

    def check_everything(self, row: str, record: Record) -> None:
        """All of the promise; the test's report gets what was found for this row of the table."""
        record_row(record, row, self.harness.family)
        for content in self.conversations.values():
            self.check(content)
        kinds = list(self.conversations)
        self.check_batch("one image" if self.pictures else kinds[0], kinds[-1])
        record("splits", self.check_chunked(kinds[-1]))
        self.check_cached(kinds[-1])
        self.check_needed(kinds[-1])
        self.check_adapter(kinds[-1])
        record("lora", "attention" if self._has_experts else "decoder")
        record("largest_logit_error", f"{self.largest_error:.1e}")

    def check(self, content: Content) -> Run:
        """One conversation by itself, nothing of it cached: the prompt, the logits of all of it and of the answer."""
        self._cache_prefixes(False)
        prompt = self.prompt(content)
        assert list(prompt.token_ids) == self.inputs(content)["input_ids"][0].tolist(), "the prompts differ"
        (run,) = self.run(prompt)
        assert run.logits.keys() >= set(range(len(prompt.token_ids)))
        self.compare(run, self.expected(content, run))
        return run

    def check_batch(self, *kinds: str) -> None:
        """Several conversations at once, and the images of these in other places."""
        self._cache_prefixes(False)
        contents = [self.conversations[kind] for kind in kinds]
        contents += [tuple(reversed(content)) for content in contents]
        runs = self.run(*(self.prompt(content) for content in contents))
        assert max(len(batch.rows) for batch in self.harness.steps) == len(contents)
        for content, run in zip(contents, runs, strict=True):
            self.compare(run, self.expected(content, run))

    def check_chunked(self, kind: str) -> int:
        """A prompt cut in two at every place where one may, and in chunks of some sizes. Returns how many places."""
        self._cache_prefixes(False)
        content = self.conversations[kind]
        prompt = self.prompt(content)
        (whole,) = self.run(prompt, max_tokens=3)
        expected = self.expected(content, whole)
        ends = set()
        for first in range(1, len(prompt.token_ids)):
            self.harness.set(max_num_seqs=1, max_num_batched_tokens=first)
            self.harness.engine.on_batch = lambda ids: self.harness.set(max_num_batched_tokens=WHOLE)
            (run,) = self.run(prompt, max_tokens=3)
            ends.add(run.chunks[0][1])
            assert run.token_ids == whole.token_ids
            self.compare(run, expected)
        allowed = {end for end in range(1, len(prompt.token_ids)) if not parts_a_span(prompt, end)}
        assert ends - {len(prompt.token_ids)} == allowed
        self.harness.engine.on_batch = lambda ids: None
        for budget in (1, 5, 16):
            self.harness.set(max_num_batched_tokens=budget)
            (run,) = self.run(prompt, max_tokens=3)
            self.compare(run, expected)
        self.harness.set(max_num_batched_tokens=WHOLE)
        return len(allowed)

    def check_cached(self, kind: str) -> None:
        """A prompt that is cached as far as it may be, and one that goes on otherwise."""
        self._cache_prefixes(True)
        content = self.conversations[kind]
        prompt = self.prompt(content)
        cold, warm = self.run(prompt)[0], self.run(prompt, every=False)[0]
        size = self.harness.engine.scheduler.blocks.block_size
        ends = range((len(prompt.token_ids) - 1) // size * size, -1, -size)
        assert (cold.cached_tokens, warm.cached_tokens) == (
            0,
            next(end for end in ends if not parts_a_span(prompt, end)),
        )
        expected = self.expected(content, cold)
        assert warm.token_ids == cold.token_ids
        self.compare(cold, expected)
        self.compare(warm, expected)
        other = (*content, "Say no more.")
        (run,) = self.run(self.prompt(other), every=False)
        self.compare(run, self.expected(other, run))

    def check_needed(self, kind: str) -> None:
        """What an engine left to itself computes: of a prompt's tokens the last layer gives the last one alone."""
        self._cache_prefixes(False)
        content = self.conversations[kind]
        (run,) = self.run(self.prompt(content), every=False)
        assert min(run.logits) == len(run.prompt.token_ids) - 1
        self.compare(run, self.expected(content, run))

    def check_adapter(self, kind: str) -> None:
        """An adapter of PEFT's on every linear layer of the decoder's layers, and beside it a request without."""
        content = self.conversations[kind]
        prompt = self.prompt(content)
        with TemporaryDirectory() as directory:
            adapted = copy.copy(self)
            adapted.model = self.make_adapter(Path(directory) / "one")
            adapted.harness = _serve(self.folder, adapters=Path(directory))
            plain, changed = adapted.run(prompt, prompt, adapters=(None, "one"))
            assert max(len(batch.rows) for batch in adapted.harness.steps) == 2
        self.compare(plain, self.expected(content, plain))
        expected = adapted.expected(content, changed)
        self.compare(changed, expected)
        assert (expected - self.expected(content, changed)).abs().max() > 0.1, "the adapter changes nothing"

    def make_adapter(self, folder: Path) -> Any:
        """Has PEFT save one there, and returns its model."""
        # PEFT takes an MLP's names for those of experts where a model has such, which it merges.
        targets = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and IN_THE_DECODER.fullmatch(name)
            if "_attn." in name or not self._has_experts
        ]
        return make_adapter(self.model, folder, rank=3, seed=0, targets=targets)

    @property
    def _has_experts(self) -> bool:
        return self.harness.family.decoder_config.num_experts > 0

    def prompt(self, content: Content) -> Prompt:
        """The family's own."""
        return self.harness.chat(*content)

    def run(
        self, *prompts: Prompt, max_tokens: int = 6, adapters: Sequence[str | None] | None = None, every: bool = True
    ) -> list[Run]:
        """Runs prompts together, greedily. No answer has a token like `<image>` in it, for which transformers' models
        would want an image. With `every`, the prompts' log-probabilities are asked for: the last layer then gives every
        token, and a prompt is not taken from the cache.
        """
        return self.harness.run(
            *prompts,
            max_tokens=max_tokens,
            logit_bias=dict.fromkeys(self._forbidden, -100.0),
            adapters=adapters,
            prompt_logprobs=every,
        )

    def inputs(self, content: Content) -> dict[str, torch.Tensor]:
        """What transformers' processor makes of the conversation."""
        parts = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part.pixels.copy()}
            for part in content
        ]
        if isinstance(self.processor, PreTrainedTokenizerBase):
            messages = [{"role": "user", "content": "".join(str(part["text"]) for part in parts)}]
            text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert isinstance(text, str)
            bos = self.processor.bos_token
            # As processors do: the tokenizer adds its `<s>` unless the template wrote it.
            adds = not (isinstance(bos, str) and text.startswith(bos))
            return dict(self.processor(text, add_special_tokens=adds, return_tensors="pt"))
        return dict(
            self.processor.apply_chat_template(
                [{"role": "user", "content": parts}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                **({"processor_kwargs": self._processor_options} if self._processor_options else {}),
            )
        )

    @torch.inference_mode()
    def expected(self, content: Content, run: Run) -> torch.Tensor:
        """transformers' logits `[tokens, vocab]` for the conversation and a run's answer, in one forward pass."""
        inputs = self.inputs(content)
        answer = torch.tensor([run.token_ids[:-1]], dtype=torch.int64)
        shape = inputs["input_ids"].shape
        for name, marks in inputs.items():
            if name == "input_ids":
                inputs[name] = torch.cat((marks, answer), dim=1)
            elif marks.shape == shape:
                more = torch.full_like(answer, self._answer_marks.get(name, 0)).to(marks.dtype)
                inputs[name] = torch.cat((marks, more), dim=1)
        return self.model(**inputs).logits[0].float()  # type: ignore[no-any-return]

    @cached_property
    def _forbidden(self) -> list[int]:
        return sorted(
            token_id
            for token_id, token in self.harness.family.backend_tokenizer.get_added_tokens_decoder().items()
            if token.special and token_id < self.harness.family.decoder_config.vocab_size
        )

    def _cache_prefixes(self, enable: bool) -> None:
        self.harness.engine.scheduler.blocks.enable_prefix_caching = enable

    def compare(self, run: Run, expected: torch.Tensor) -> None:
        """Whether a run's logits and tokens are those expected."""
        error = max(float((logits - expected[position]).abs().max()) for position, logits in run.logits.items())
        assert error <= LOGIT_TOLERANCE, f"logits differ by {error:.2e}"
        self.largest_error = max(self.largest_error, error)
        first = len(run.prompt.token_ids) - 1
        allowed = expected[first:].clone()
        allowed[:, self._forbidden] -= 100.0
        assert run.token_ids == allowed.argmax(-1)[: len(run.token_ids)].tolist()


def _serve(folder: Path, **settings: Any) -> Harness:
    harness = Harness(folder, **settings)
    harness.engine._recover = _raise  # type: ignore[method-assign]
    return harness


def _raise(batch: ScheduledBatch, error: BaseException) -> NoReturn:
    """A step that fails fails the test: run again one by one, its requests might do well."""
    raise error


def parts_a_span(prompt: Prompt, position: int) -> bool:
    """Whether a cut before the position would part tokens that attend both ways."""
    images = [(span.offset, span.end) for span in prompt.images if span.inputs.attends_both_ways]
    return any(begin < position < end for begin, end in [(0, prompt.both_ways_prefix), *images])

"""A scheduled batch through the model: images encoded, embeddings spliced, decoder run, tokens drawn.

Every sequence has a permanent row in arrays on the host; a step is gathered from them without a Python
loop over sequences' tensors.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from vlm_serve.encoders.graphs import CudaCapture
from vlm_serve.engine.batch import ImageKey, NewRow, PlacedImage, ScheduledBatch, StepResult
from vlm_serve.engine.kv_cache import KVCache
from vlm_serve.engine.sampling_head import SamplingHead
from vlm_serve.engine.structured import Structures
from vlm_serve.errors import InvalidRequestError
from vlm_serve.families.base import VisionLanguageModel
from vlm_serve.layers.context import AdapterSegment, ForwardContext, Outputs
from vlm_serve.layers.linear import Linear, LoraPair
from vlm_serve.layers.tower_linear import TowerLinear
from vlm_serve.lora.checkpoint import AdapterWeights
from vlm_serve.types import ImageInputs

NO_ADAPTER = -1

RopePositions = Callable[[int, Sequence[tuple[int, tuple[int, ...]]]], np.ndarray | None]
"""See `ModelFamily.rope_positions`."""


class ModelRunner:
    """The model, its caches' tensors, and the rows of the sequences that run.

    Args:
        model: weights loaded and packed.
        kv_cache: the blocks.
        max_rows, max_model_len: sizes of the row arrays.
        adapters: in host memory, by digest.
        load_structures: for requests with a grammar; called for the first of them.
        rope_positions: the family's.
        enforce_eager: whether nothing is recorded on a GPU.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        kv_cache: KVCache,
        *,
        max_rows: int,
        max_model_len: int,
        adapters: Mapping[str, AdapterWeights],
        load_structures: Callable[[], Structures],
        rope_positions: RopePositions,
        enforce_eager: bool,
    ) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.block_size = kv_cache.keys.shape[3]
        self.device = kv_cache.keys.device
        self.dtype = kv_cache.keys.dtype
        if self.device.type == "cuda" and not enforce_eager:
            model.record_graphs(CudaCapture(self.device))
        self._adapters = adapters
        self._linears = adaptable_linears(model)
        self._tower_linears = [(path, one) for path, one in model.named_modules() if isinstance(one, TowerLinear)]
        self._slot_of: dict[str, int] = {}
        self._embeddings: dict[ImageKey, torch.Tensor] = {}
        max_blocks = -(-max_model_len // self.block_size)
        self._tokens = np.zeros((max_rows, max_model_len), dtype=np.int64)
        num_groups = len(model.decoder.config.layer_groups)
        self._tables = np.zeros((num_groups, max_rows, max_blocks), dtype=np.int32)
        self._table_lengths = np.zeros(max_rows, dtype=np.int64)
        self._images: list[tuple[PlacedImage, ...]] = [()] * max_rows
        self._images_end = np.zeros(max_rows, dtype=np.int64)
        self._spans: list[tuple[tuple[int, int], ...]] = [()] * max_rows
        self._spans_end = np.zeros(max_rows, dtype=np.int64)
        self._rope_positions = rope_positions
        self._rope: list[np.ndarray | None] = [None] * max_rows
        self._rope_end = np.zeros(max_rows, dtype=np.int64)
        self._rope_shift = np.zeros(max_rows, dtype=np.int64)
        self._stretches_from = model.decoder.config.stretches_from
        self._is_long = np.zeros(max_rows, dtype=np.bool_)
        self._adapter_slots = np.full(max_rows, NO_ADAPTER, dtype=np.int64)
        self._head = SamplingHead(model.decoder, self._tokens, load_structures)

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch) -> StepResult:
        """Computes one step. One that fails keeps none of the images that it encoded: the scheduler forgets them."""
        try:
            return self._run(batch)
        except BaseException:
            for key, _ in batch.encode:
                self._embeddings.pop(key, None)
            raise

    def _run(self, batch: ScheduledBatch) -> StepResult:
        encoder_seconds = self._take_in(batch)
        query_start = prefix_sums(batch.counts)
        flat_rows = np.repeat(batch.rows, batch.counts)
        positions = np.arange(batch.num_tokens) + np.repeat(batch.starts - query_start[:-1], batch.counts)
        embeddings, deepstack = self._embed(batch, query_start, self._tokens[flat_rows, positions])
        spans = self._spans_of(batch, query_start)
        context = replace(
            self._context(batch, query_start, flat_rows, positions),
            rope_positions=self._rope_of(batch, query_start, flat_rows, positions),
            spans=None if spans is None else self._put(spans),
            deepstack=deepstack,
            is_long=self._put(self._is_long[flat_rows]) if self._is_long[batch.rows].any() else None,
        )
        output_start = query_start
        if (outputs := self._head.outputs(batch)).sum() < batch.num_tokens:
            output_start = prefix_sums(outputs)
            context = replace(context, outputs=self._outputs(query_start, output_start, flat_rows, spans))
        hidden = self.model.decoder(embeddings, context)
        result = self._head.finish(batch, output_start, hidden)
        return replace(result, encoder_seconds=encoder_seconds) if batch.encode else result

    def _take_in(self, batch: ScheduledBatch) -> float:
        """Brings rows, blocks, adapters and image embeddings to the state that the batch counts on; returns the
        seconds that the images took.
        """
        for key in batch.evict_images:  # the first: it holds even if something after it fails
            self._embeddings.pop(key, None)
        for new_row in batch.new_rows:
            self._start_row(new_row)
        for row, blocks in zip(batch.rows.tolist(), batch.new_blocks, strict=True):
            if blocks:
                length = self._table_lengths[row]
                self._tables[:, row, length : length + len(blocks)] = np.array(blocks, dtype=np.int32).T
                self._table_lengths[row] += len(blocks)
        for slot, digest in batch.load_adapters:
            self._load_adapter(slot, self._adapters[digest])
        self._head.write_drafts(batch)
        return self._encode(batch) if batch.encode else 0.0

    def _encode(self, batch: ScheduledBatch) -> float:
        began = time.perf_counter()
        for adapter in {key.adapter: None for key, _ in batch.encode}:
            keys, inputs = zip(*(one for one in batch.encode if one[0].adapter == adapter), strict=True)
            with self._tower_adapter(adapter):
                embeddings = self.model.encode_images(inputs)
            check_counts(inputs, embeddings)
            self._embeddings.update(zip(keys, embeddings, strict=True))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # to tell the images' time from the decoder's
        return time.perf_counter() - began

    @contextmanager
    def _tower_adapter(self, digest: str | None) -> Iterator[None]:
        """Within it images are encoded with this adapter."""
        active = self.model.tower_adapter
        active.slot = None if digest is None else self._slot_of[digest]
        try:
            yield
        finally:
            active.slot = None

    def _start_row(self, new: NewRow) -> None:
        row = new.row
        self._tokens[row, : len(new.token_ids)] = new.token_ids
        self._table_lengths[row] = 0
        self._images[row] = new.images
        self._images_end[row] = max((image.end for image in new.images), default=0)
        self._spans[row] = new.atomic_spans
        self._spans_end[row] = max((end for _, end in new.atomic_spans), default=0)
        rope = self._rope_positions(new.prompt_len, [(image.offset, image.grid) for image in new.images])
        self._rope[row] = rope
        self._rope_end[row] = 0 if rope is None else new.prompt_len
        # What is generated goes on from the largest of the prompt's.
        self._rope_shift[row] = 0 if rope is None else rope.max() + 1 - new.prompt_len
        self._is_long[row] = self._stretches_from is not None and len(new.token_ids) > self._stretches_from
        self._adapter_slots[row] = NO_ADAPTER if new.adapter_slot is None else new.adapter_slot
        self._head.start(new)

    def _load_adapter(self, slot: int, weights: AdapterWeights) -> None:
        def pair(name: str) -> LoraPair:
            a, b = weights.modules[name]
            return a.to(self.device, self.dtype), b.to(self.device, self.dtype)

        for parent, linear in self._linears:
            names = {part: f"{parent}.{part}" for part in linear.parts}
            linear.set_adapter(slot, {part: pair(name) for part, name in names.items() if name in weights.modules})
        for name, layer in self._tower_linears:
            layer.set_adapter(slot, pair(name) if name in weights.modules else None)
        self._slot_of[weights.digest] = slot

    def _context(
        self, batch: ScheduledBatch, query_start: np.ndarray, flat_rows: np.ndarray, positions: np.ndarray
    ) -> ForwardContext:
        kv_lengths = batch.starts + batch.counts
        max_blocks = -(-int(kv_lengths.max()) // self.block_size)
        blocks = self._tables[:, flat_rows, positions // self.block_size].astype(np.int64)
        slots = blocks * self.block_size + positions % self.block_size
        return ForwardContext(
            positions=self._put(positions),
            slot_mapping=self._put(np.ascontiguousarray(slots)).unbind(),
            block_tables=self._put(np.ascontiguousarray(self._tables[:, batch.rows, :max_blocks])).unbind(),
            kv_lengths=self._put(kv_lengths.astype(np.int32)),
            query_start=self._put(query_start),
            max_query_len=int(batch.counts.max()),
            key_cache=self.kv_cache.keys,
            value_cache=self.kv_cache.values,
            adapters=self._segments(self._adapter_slots[flat_rows]),
        )

    def _spans_of(self, batch: ScheduledBatch, query_start: np.ndarray) -> np.ndarray | None:
        """For each token the span `[begin, end)` of those that attend both ways, int32 `[T, 2]`; None if no token is
        in one.
        """
        spans = None
        for index, row, shift in self._with_tokens_before(batch, query_start, self._spans_end):
            for begin, end in self._spans[row]:
                first, last = (
                    max(begin, int(batch.starts[index])),
                    min(end, int(batch.starts[index] + batch.counts[index])),
                )
                if first < last:
                    spans = np.zeros((batch.num_tokens, 2), dtype=np.int32) if spans is None else spans
                    spans[first + shift : last + shift] = begin, end
        return spans

    def _rope_of(
        self, batch: ScheduledBatch, query_start: np.ndarray, flat_rows: np.ndarray, positions: np.ndarray
    ) -> torch.Tensor | None:
        """The positions by which tokens are rotated, int64 `[3, T]`; None where they are `positions`."""
        if not (self._rope_shift[batch.rows].any() or self._rope_end[batch.rows].any()):
            return None
        rope = np.tile(positions + self._rope_shift[flat_rows], (3, 1))
        for index, row, shift in self._with_tokens_before(batch, query_start, self._rope_end):
            own = self._rope[row]
            assert own is not None
            begin = int(batch.starts[index])
            end = min(int(self._rope_end[row]), begin + int(batch.counts[index]))
            rope[:, begin + shift : end + shift] = own[:, begin:end]
        return self._put(rope)

    def _with_tokens_before(
        self, batch: ScheduledBatch, query_start: np.ndarray, ends: np.ndarray
    ) -> Iterator[tuple[int, int, int]]:
        """The sequences whose chunk begins before the end that their row has, so that those that decode are passed
        over: the index in the batch, the row, and what leads from a position to its place in the step.
        """
        for index in (batch.starts < ends[batch.rows]).nonzero()[0].tolist():
            yield index, int(batch.rows[index]), int(query_start[index] - batch.starts[index])

    def _outputs(
        self, query_start: np.ndarray, output_start: np.ndarray, flat_rows: np.ndarray, spans: np.ndarray | None
    ) -> Outputs:
        """The last tokens of each sequence, as many as `output_start` says."""
        counts = np.diff(output_start)
        index = np.arange(output_start[-1]) + np.repeat(query_start[1:] - output_start[1:], counts)
        return Outputs(
            index=self._put(index),
            query_start=self._put(output_start),
            max_query_len=int(counts.max()),
            adapters=self._segments(self._adapter_slots[flat_rows[index]]),
            spans=None if spans is None else self._put(spans[index]),
        )

    def _segments(self, slots: np.ndarray) -> tuple[AdapterSegment, ...]:
        return tuple(
            AdapterSegment(int(slot), self._put((slots == slot).nonzero()[0]))
            for slot in np.unique(slots)
            if slot != NO_ADAPTER
        )

    def _embed(
        self, batch: ScheduledBatch, query_start: np.ndarray, token_ids: np.ndarray
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """Word embeddings `[T, hidden]`, with the images' own in the place of their placeholders, and the context's
        `deepstack`.
        """
        is_image = np.zeros(len(token_ids), dtype=bool)
        pieces = []
        for index, row, shift in self._with_tokens_before(batch, query_start, self._images_end):
            for image in self._images[row]:
                begin = max(image.offset, int(batch.starts[index]))
                end = min(image.end, int(batch.starts[index] + batch.counts[index]))
                if begin < end:
                    is_image[begin + shift : end + shift] = True
                    pieces.append(self._embeddings[image.key][begin - image.offset : end - image.offset])
        # A placeholder may be a token past the vocabulary; it is never looked up.
        embeddings = self.model.decoder.embed(self._put(np.where(is_image, 0, token_ids)))
        if not pieces:
            return embeddings, None
        # By index and not by the mask itself, whose count a GPU would have to tell the host first.
        places = self._put(is_image.nonzero()[0])
        own, *features = torch.cat(pieces).split(embeddings.shape[1], dim=1)
        embeddings.index_copy_(0, places, own)
        return embeddings, (places, torch.stack(features)) if features else None

    def _put(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)


def check_counts(images: Sequence[ImageInputs], embeddings: Sequence[torch.Tensor]) -> None:
    """Whether each image has an embedding for each of its placeholders.

    Raises:
        InvalidRequestError: one has more or fewer.
    """
    for inputs, rows in zip(images, embeddings, strict=True):
        if len(rows) != inputs.num_tokens:
            raise InvalidRequestError(
                f"The model's encoder gives {len(rows)} tokens for an image, of which its processor counts "
                f"{inputs.num_tokens}. Leave the image out, and tell your operator: the files of the checkpoint may be "
                "of different models.",
                param="messages",
            )


def prefix_sums(counts: np.ndarray) -> np.ndarray:
    """int64 `[S]` -> int32 `[S + 1]`, from 0."""
    sums = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=sums[1:])
    return sums


def adaptable_linears(model: VisionLanguageModel) -> list[tuple[str, Linear]]:
    """The layers that can take an adapter, each with the canonical path of the module that holds it: those
    of the decoder's blocks. The output head is none: it may share its weight with the word embeddings.
    """
    return [
        (path.rpartition(".")[0], module)
        for path, module in model.named_modules()
        if isinstance(module, Linear) and path.startswith("decoder.layers.")
    ]


def tower_linears(model: VisionLanguageModel) -> list[tuple[str, nn.Linear]]:
    """The layers of tower and projector that can take an adapter, by canonical name. Torch's own alone: what derives
    from it may be the weights of another module, which are never called.
    """
    return [
        (path, module)
        for path, module in model.named_modules()
        if type(module) is nn.Linear and path.startswith(("vision.", "projector."))
    ]

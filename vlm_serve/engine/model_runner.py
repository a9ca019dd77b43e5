"""A scheduled batch through the model: images encoded, embeddings spliced, decoder run, tokens drawn.

Every sequence has a permanent row in arrays on the host; a step is gathered from them without a Python
loop over sequences' tensors.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch

from vlm_serve.engine.batch import ImageKey, NewRow, PlacedImage, ScheduledBatch, StepResult
from vlm_serve.engine.kv_cache import KVCache
from vlm_serve.engine.sampling_head import SamplingHead
from vlm_serve.engine.structured import Structures
from vlm_serve.families.base import VisionLanguageModel
from vlm_serve.layers.context import AdapterSegment, ForwardContext, Outputs
from vlm_serve.layers.linear import Linear
from vlm_serve.lora.checkpoint import AdapterWeights

NO_ADAPTER = -1


class ModelRunner:
    """The model, its caches' tensors, and the rows of the sequences that run.

    Args:
        model: weights loaded and packed.
        kv_cache: the blocks.
        max_rows, max_model_len: sizes of the row arrays.
        adapters: in host memory, by digest.
        load_structures: for requests with a grammar; called for the first of them.
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
    ) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.block_size = kv_cache.keys.shape[3]
        self.device = kv_cache.keys.device
        self.dtype = kv_cache.keys.dtype
        self._adapters = adapters
        self._linears = adaptable_linears(model)
        self._embeddings: dict[ImageKey, torch.Tensor] = {}
        max_blocks = -(-max_model_len // self.block_size)
        self._tokens = np.zeros((max_rows, max_model_len), dtype=np.int64)
        num_groups = len(model.decoder.config.layer_groups)
        self._tables = np.zeros((num_groups, max_rows, max_blocks), dtype=np.int32)
        self._table_lengths = np.zeros(max_rows, dtype=np.int64)
        self._images: list[tuple[PlacedImage, ...]] = [()] * max_rows
        self._images_end = np.zeros(max_rows, dtype=np.int64)
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
        context = self._context(batch, query_start, flat_rows, positions)
        embeddings = self._embed(batch, query_start, self._tokens[flat_rows, positions])
        output_start = query_start
        if (outputs := self._head.outputs(batch)).sum() < batch.num_tokens:
            output_start = prefix_sums(outputs)
            context = replace(context, outputs=self._outputs(query_start, output_start, flat_rows))
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
        keys, inputs = zip(*batch.encode, strict=True)
        self._embeddings.update(zip(keys, self.model.encode_images(inputs), strict=True))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # to tell the images' time from the decoder's
        return time.perf_counter() - began

    def _start_row(self, new: NewRow) -> None:
        row = new.row
        self._tokens[row, : len(new.token_ids)] = new.token_ids
        self._table_lengths[row] = 0
        self._images[row] = new.images
        self._images_end[row] = max((image.offset + image.length for image in new.images), default=0)
        self._adapter_slots[row] = NO_ADAPTER if new.adapter_slot is None else new.adapter_slot
        self._head.start(new)

    def _load_adapter(self, slot: int, weights: AdapterWeights) -> None:
        for parent, linear in self._linears:
            parts = {part: weights.modules.get(f"{parent}.{part}") for part in linear.parts}
            linear.set_adapter(
                slot,
                {
                    part: (pair[0].to(self.device, self.dtype), pair[1].to(self.device, self.dtype))
                    for part, pair in parts.items()
                    if pair is not None
                },
            )

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

    def _outputs(self, query_start: np.ndarray, output_start: np.ndarray, flat_rows: np.ndarray) -> Outputs:
        """The last tokens of each sequence, as many as `output_start` says."""
        counts = np.diff(output_start)
        index = np.arange(output_start[-1]) + np.repeat(query_start[1:] - output_start[1:], counts)
        return Outputs(
            index=self._put(index),
            query_start=self._put(output_start),
            max_query_len=int(counts.max()),
            adapters=self._segments(self._adapter_slots[flat_rows[index]]),
        )

    def _segments(self, slots: np.ndarray) -> tuple[AdapterSegment, ...]:
        return tuple(
            AdapterSegment(int(slot), self._put((slots == slot).nonzero()[0]))
            for slot in np.unique(slots)
            if slot != NO_ADAPTER
        )

    def _embed(self, batch: ScheduledBatch, query_start: np.ndarray, token_ids: np.ndarray) -> torch.Tensor:
        """Word embeddings `[T, hidden]`, with the images' own in the place of their placeholders."""
        is_image = np.zeros(len(token_ids), dtype=bool)
        pieces = []
        ends = batch.starts + batch.counts
        # Sequences whose images all lie behind them, as in every step of decoding, are passed over.
        for index in (batch.starts < self._images_end[batch.rows]).nonzero()[0].tolist():
            for image in self._images[batch.rows[index]]:
                begin = max(image.offset, int(batch.starts[index]))
                end = min(image.offset + image.length, int(ends[index]))
                if begin < end:
                    shift = int(query_start[index] - batch.starts[index])
                    is_image[begin + shift : end + shift] = True
                    pieces.append(self._embeddings[image.key][begin - image.offset : end - image.offset])
        # A placeholder may be a token past the vocabulary; it is never looked up.
        embeddings = self.model.decoder.embed(self._put(np.where(is_image, 0, token_ids)))
        if pieces:
            # By index and not by the mask itself, whose count a GPU would have to tell the host first.
            embeddings.index_copy_(0, self._put(is_image.nonzero()[0]), torch.cat(pieces))
        return embeddings

    def _put(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)


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

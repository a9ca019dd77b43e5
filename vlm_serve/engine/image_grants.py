"""Which images a step encodes, and which a sequence holds on to."""

from collections.abc import Iterable, Set

from vlm_serve.engine.batch import ImageKey
from vlm_serve.engine.encoder_cache import EncoderCache
from vlm_serve.engine.sequence import Sequence
from vlm_serve.engine.step import Step


def first_image_fits(
    cache: EncoderCache, step: Step, sequence: Sequence, start: int, without: Iterable[Sequence] = ()
) -> bool:
    """Whether `grant_images` from `start` on would grant any tokens, were it without these other sequences: the image
    that begins there or is cut there, if one is, is on the device or finds room. Changes nothing.
    """
    span = next((span for span in sequence.request.images if span.end > start), None)
    if span is None or span.offset > start or sequence.image_key(span) in cache:
        return True
    unpinned = [key for other in without for key in other.pinned_images]
    return step.can_encode(span.inputs.num_tokens) and cache.can_add(span.inputs.num_tokens, unpinned)


def grant_images(cache: EncoderCache, step: Step, sequence: Sequence, start: int, count: int) -> int:
    """Sees to it that every image under `[start, start + count)` is on the device or encoded in this step; returns how
    many tokens can be granted, cut just before an image that finds no room.

    What it has pinned or entered for a sequence is right only if that is granted the tokens; with 0 there is nothing.
    """
    spans = sequence.request.images
    if not spans or start >= spans[-1].end:
        return count
    for span in spans:
        if span.end <= start:
            continue
        if span.offset >= start + count:
            break
        key, size = sequence.image_key(span), span.inputs.num_tokens
        if key in sequence.pinned_images:
            continue
        is_hit = key in cache
        if not is_hit:
            has_room = cache.can_add(size)
            step.images_are_full |= not has_room
            if not has_room or not step.can_encode(size):
                return max(0, span.offset - start)
            step.evict_images.extend(cache.add(key, size))
            step.encode[key] = span.inputs
            step.encoder_budget -= size
        cache.queries += 1
        cache.hits += is_hit
        cache.pin(key)
        sequence.pinned_images.add(key)
    return count


def unpin_passed_images(cache: EncoderCache, sequence: Sequence) -> None:
    """Lets go of every image but one that `computed` lies inside of. To hold more would let two sequences wait for each
    other's room for ever.
    """
    if not sequence.pinned_images:
        return
    under_way = {
        sequence.image_key(span) for span in sequence.request.images if span.offset < sequence.computed < span.end
    }
    unpin_images(cache, sequence, sequence.pinned_images - under_way)


def unpin_images(cache: EncoderCache, sequence: Sequence, keys: Set[ImageKey]) -> None:
    """Lets go of these images of a sequence."""
    for key in keys:
        cache.unpin(key)
    sequence.pinned_images = sequence.pinned_images - keys

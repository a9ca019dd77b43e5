"""Which images a step encodes, and which a sequence holds on to."""

from collections.abc import Iterable, Iterator, Set

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
    if start < sequence.request.both_ways_prefix:
        return _prefix_fits(cache, step, sequence, without)
    span = next((span for span in sequence.request.images if span.end > start), None)
    if span is None or span.offset > start or sequence.image_key(span) in cache:
        return True
    return step.can_encode(span.inputs.num_tokens) and cache.can_add(span.inputs.num_tokens, _pinned_by(without))


def grant_images(cache: EncoderCache, step: Step, sequence: Sequence, start: int, count: int) -> int:
    """Sees to it that every image under `[start, start + count)` is on the device or encoded in this step; returns how
    many tokens can be granted, cut just before an image that finds no room.

    What it has pinned or entered for a sequence is right only if that is granted the tokens; with 0 there is nothing.
    The images of a prefix that attends both ways come together or not at all.
    """
    spans, prefix = sequence.request.images, sequence.request.both_ways_prefix
    if not spans or start >= spans[-1].end:
        return count
    if start < prefix and not _prefix_fits(cache, step, sequence):
        step.images_are_full = True
        return 0
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
            if span.offset >= prefix and (not has_room or not step.can_encode(size)):
                return max(0, span.offset - start)
            step.evict_images.extend(cache.add(key, size))
            step.encode[key] = span.inputs
            step.encoder_budget -= size
        cache.queries += 1
        cache.hits += is_hit
        cache.pin(key)
        sequence.pinned_images.add(key)
    return count


def _prefix_fits(cache: EncoderCache, step: Step, sequence: Sequence, without: Iterable[Sequence] = ()) -> bool:
    """Whether all images of the prefix that attends both ways can be on the device at once, from this step on."""
    request = sequence.request
    sizes = {
        sequence.image_key(span): span.inputs.num_tokens
        for span in request.images
        if span.offset < request.both_ways_prefix
    }
    missing = sum(size for key, size in sizes.items() if key not in cache)
    return step.can_encode(missing) and cache.can_pin(sizes, _pinned_by(without))


def _pinned_by(sequences: Iterable[Sequence]) -> Iterator[ImageKey]:
    return (key for sequence in sequences for key in sequence.pinned_images)


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

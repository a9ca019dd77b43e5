"""Sampling parameters that mean nothing are refused where they are made; no image shares another's digest."""

import numpy as np
import pytest

from vlm_serve import SamplingParams
from vlm_serve.errors import InvalidRequestError
from vlm_serve.types import ImageInputs, ImageSpan, Request


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 2**31),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 2**63 - 1),  # more than the batch's arrays hold
        ("seed", 2**64),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("stop", "x" * 257),
    ],
)
def test_a_value_out_of_range_is_named(field, value):
    with pytest.raises(InvalidRequestError) as raised:
        SamplingParams(**{field: value})
    assert raised.value.param == field


def test_one_stop_string_is_as_good_as_a_list():
    assert SamplingParams(stop="END") == SamplingParams(stop=["END"])
    assert SamplingParams(stop=None).stop_strings == ()


def digest(pixels, grid=(2, 2), tokens=4, name="pixel_values") -> str:
    return ImageInputs.create({name: pixels}, grid, tokens).digest


def test_an_images_digest_covers_bytes_dtype_shape_name_and_grid():
    """Row 15 of engines.md: image hashes that collide."""
    pixels = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    digests = [
        digest(pixels),
        digest(pixels + 1),
        digest(pixels.reshape(3, 4, 1)),
        digest(pixels.view(np.int32)),
        digest(pixels, grid=(4, 1)),
        digest(pixels, tokens=5),
        digest(pixels, name="pixels"),
    ]
    assert len(set(digests)) == len(digests)
    assert digest(np.asfortranarray(pixels)) == digests[0]


def test_a_prefix_that_attends_both_ways_is_one_span_with_the_images_in_it():
    pixels = {"pixel_values": np.zeros((3, 2, 2), np.float32)}
    both, causal = (ImageInputs.create(pixels, (2, 2), 4, attends_both_ways=ways) for ways in (True, False))
    images = (ImageSpan(1, both), ImageSpan(6, causal), ImageSpan(12, both))

    def spans(prefix):
        return Request("r", (0,) * 20, SamplingParams(), images, both_ways_prefix=prefix).atomic_spans

    assert spans(0) == ((1, 5), (12, 16))
    assert spans(10) == ((0, 10), (12, 16))
    assert spans(20) == ((0, 20),)
    assert Request("r", (0,) * 20, SamplingParams(), images, both_ways_prefix=10).longest_atomic_span == 10

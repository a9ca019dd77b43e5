"""The buckets of recorded forwards: batches are padded up, what is recorded is bounded, and there is always a way on.

A recording is the plain call here, over the same buffer; that of a GPU is tested in `test_gpu.py`.
"""

from collections.abc import Callable

import pytest
import torch

from vlm_serve.encoders.graphs import BUCKETS, BucketGraphs, Forward, Replay


def doubled(images: torch.Tensor) -> torch.Tensor:
    return 2 * images.flatten(1)


class PlainCapture:
    """Records as a GPU does: the buffer and the result are always the same memory."""

    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []
        self.replays: list[int] = []

    def __call__(self, forward: Forward, buffer: torch.Tensor) -> Replay:
        self.buffers.append(buffer)
        out = forward(buffer)

        def replay() -> torch.Tensor:
            self.replays.append(len(buffer))
            return out.copy_(forward(buffer))

        return replay


def images(count: int, side: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, side, side)


@pytest.mark.parametrize(("count", "bucket"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (6, 6), (7, 8), (8, 8)])
def test_a_batch_is_padded_up_to_the_next_bucket_with_blank_images(count: int, bucket: int) -> None:
    capture = PlainCapture()
    graphs = BucketGraphs(doubled, capture)
    graphs(images(bucket))
    batch = images(count)
    torch.testing.assert_close(graphs(batch), doubled(batch), rtol=0, atol=0)
    assert capture.replays == [bucket] * 2
    (buffer,) = capture.buffers
    assert torch.equal(buffer[:count], batch)
    assert not buffer[count:].any(), "an earlier batch's images are still there"


def test_each_bucket_is_recorded_once_and_nothing_else() -> None:
    capture = PlainCapture()
    graphs = BucketGraphs(doubled, capture)
    for count in [*range(1, 12), *range(11, 0, -1)]:
        batch = images(count)
        torch.testing.assert_close(graphs(batch), doubled(batch), rtol=0, atol=0)
    assert sorted(len(buffer) for buffer in capture.buffers) == list(BUCKETS)


def test_a_result_is_not_overwritten_by_the_next() -> None:
    graphs = BucketGraphs(doubled, PlainCapture())
    first, second = images(2), images(2)
    result = graphs(first)
    graphs(second)
    assert torch.equal(result, doubled(first))


def test_a_batch_past_the_largest_bucket_and_another_shape_are_computed_as_they_are() -> None:
    capture = PlainCapture()
    graphs = BucketGraphs(doubled, capture, buckets=(1, 2))
    graphs(images(1))
    for batch in (images(3), images(1, side=5), images(2, side=1)):
        torch.testing.assert_close(graphs(batch), doubled(batch), rtol=0, atol=0)
    assert [tuple(buffer.shape) for buffer in capture.buffers] == [(1, 3, 2, 2)]
    assert capture.replays == [1]


@pytest.mark.parametrize("fault", [RuntimeError, torch.OutOfMemoryError])
def test_after_a_recording_that_fails_none_is_tried_again_and_those_that_are_there_serve(
    fault: type[RuntimeError], caplog: pytest.LogCaptureFixture
) -> None:
    plain, tried = PlainCapture(), []

    def capture(forward: Forward, buffer: torch.Tensor) -> Callable[[], torch.Tensor]:
        tried.append(len(buffer))
        if len(buffer) > 1:
            raise fault("what was computed of the patient")
        return plain(forward, buffer)

    graphs = BucketGraphs(doubled, capture)
    for count in (1, 2, 4, 2, 1):
        batch = images(count)
        assert torch.equal(graphs(batch), doubled(batch))
    assert tried == [1, 2]
    assert plain.replays == [1, 1]
    assert fault.__name__ in caplog.text
    assert "patient" not in caplog.text

"""CUDA graphs for vision towers that take squares of one size: a batch is padded up to a bucket, and the kernels that
were recorded for it are launched as one. What it saves is the host's time for hundreds of small kernels.
"""

import logging
from collections.abc import Callable, Sequence

import torch

logger = logging.getLogger(__name__)

BUCKETS = (1, 2, 3, 4, 6, 8)
"""Images. At most one in six is padding; a batch past the largest keeps the GPU busy by itself."""

WARM_UPS = 2
"""Runs before the recording: libraries choose their algorithms and take their workspaces in the first."""

Forward = Callable[[torch.Tensor], torch.Tensor]
"""`[B, ...]` -> `[B, ...]`, each image by itself."""

Replay = Callable[[], torch.Tensor]
"""Computes anew from what is in the buffer; the result is overwritten by the next replay."""

Capture = Callable[[Forward, torch.Tensor], Replay]
"""Records a forward over a buffer."""


class BucketGraphs:
    """`forward`, recorded once for each bucket, when a batch of its size first comes.

    Memory is bounded: there is one shape, that of the first batch, and a recording for each bucket. Batches of another
    shape, those larger than the largest bucket, and all once a recording has failed, are computed as they are.

    Args:
        forward: nothing in it may depend on the values of the images or wait for the device.
        capture: see `CudaCapture`.
        buckets: in ascending order.
    """

    def __init__(self, forward: Forward, capture: Capture, buckets: Sequence[int] = BUCKETS) -> None:
        self._forward = forward
        self._capture: Capture | None = capture
        self._buckets = buckets
        self._shape: tuple[int, ...] | None = None
        self._recorded: dict[int, tuple[torch.Tensor, Replay]] = {}

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """As `forward`; the result is the caller's own."""
        count = len(images)
        bucket = next((size for size in self._buckets if size >= count), None)
        self._shape = self._shape or tuple(images.shape[1:])
        if bucket is None or tuple(images.shape[1:]) != self._shape:
            return self._forward(images)
        if bucket not in self._recorded and not self._record(images, bucket):
            return self._forward(images)
        buffer, replay = self._recorded[bucket]
        buffer[:count].copy_(images)
        buffer[count:].zero_()  # and nothing of an earlier patient is computed again
        return replay()[:count].clone()

    def _record(self, images: torch.Tensor, bucket: int) -> bool:
        """Whether there is a recording now. After one that failed none is tried again."""
        if self._capture is None:
            return False
        buffer = images.new_zeros(bucket, *images.shape[1:])
        try:
            self._recorded[bucket] = buffer, self._capture(self._forward, buffer)
        except RuntimeError as error:  # out of memory, or an operation that cannot be recorded
            logger.warning("No CUDA graph of the vision tower for %d images: %s.", bucket, type(error).__name__)
            self._capture = None
        return bucket in self._recorded


class CudaCapture:
    """Records on a stream of its own; the recordings, which never run at the same time, share their memory."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, forward: Forward, buffer: torch.Tensor) -> Replay:
        """See `Capture`.

        Raises:
            RuntimeError: an operation in it cannot be recorded, or the memory does not suffice.
        """
        self._stream.wait_stream(torch.cuda.current_stream(buffer.device))
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                forward(buffer)
        torch.cuda.current_stream(buffer.device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(buffer.device)
        try:
            # Other threads of the process may allocate meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                out = forward(buffer)
        finally:
            torch.cuda.set_stream(current)  # a recording that fails leaves its own in place

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay

"""Vision towers on a GPU: their recorded forwards, and pixels that are processed there."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.families.image_checkpoints import FAMILIES
from tests.families.pictures import picture
from vlm_serve.encoders.graphs import BUCKETS, BucketGraphs, CudaCapture
from vlm_serve.families import load_family
from vlm_serve.types import ImageInputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")
RECORDED = [name for name in FAMILIES if not name.startswith("Qwen")]
"""The families whose towers take squares of one size."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_towers_give_what_they_give_unrecorded(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Batches of all sizes, up and down: no recording shows what an earlier one saw."""
    family = load_family(FAMILIES[name](tmp_path, monkeypatch))
    model = family.build(dtype, CUDA)
    pieces = [piece for seed in range(10) for piece in family.process_image(picture(28, 28, seed))]
    images = [piece for piece in pieces if isinstance(piece, ImageInputs)]
    counts = [*range(1, 10), *range(9, 0, -1)]
    expected = [model.encode_images(images[:count]) for count in counts]
    model.record_graphs(CudaCapture(CUDA))
    rtol, atol = (2**-6, 1e-2) if dtype is torch.bfloat16 else (1e-4, 1e-4)
    for count, embeddings in zip(counts, expected, strict=True):
        for recorded, eager in zip(model.encode_images(images[:count]), embeddings, strict=True):
            torch.testing.assert_close(recorded, eager, rtol=rtol, atol=atol)
    assert not caplog.text, "a recording has failed"


def test_recordings_share_their_memory_and_take_no_more_of_it_later() -> None:
    layers = [torch.nn.Linear(256, 256, device=CUDA) for _ in range(8)]

    @torch.inference_mode()
    def forward(images: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            images = torch.relu(layer(images))
        return images

    graphs = BucketGraphs(forward, CudaCapture(CUDA))
    batches = [torch.randn(count, 512, 256, device=CUDA) for count in BUCKETS]
    with torch.inference_mode():
        for batch in reversed(batches):
            graphs(batch)
        before = torch.cuda.memory_allocated()
        for batch in batches * 3:
            torch.testing.assert_close(graphs(batch), forward(batch), rtol=1e-4, atol=1e-4)
        assert torch.cuda.memory_allocated() == before


def test_a_forward_that_waits_for_the_device_is_computed_as_it_is_and_the_device_lives_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def forward(images: torch.Tensor) -> torch.Tensor:
        return images * float(images.sum().item())

    graphs = BucketGraphs(forward, CudaCapture(CUDA))
    for count in (1, 2, 1):
        batch = torch.randn(count, 16, device=CUDA)
        torch.testing.assert_close(graphs(batch), forward(batch))
    assert caplog.text.count("No CUDA graph") == 1
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("timm")])
def test_pixels_processed_on_the_gpu_are_nearly_those_of_the_cpu(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resampling rounds elsewhere there: few pixels differ, by a level or two of 255."""
    folder = FAMILIES[name](tmp_path, monkeypatch)
    on_cpu, on_gpu = load_family(folder), load_family(folder)
    on_gpu.process_pixels_on(CUDA)
    for size in ((28, 28), (300, 517), (90, 30)):
        for one, other in zip(on_cpu.process_image(picture(*size)), on_gpu.process_image(picture(*size)), strict=True):
            if isinstance(one, str) or isinstance(other, str):
                assert one == other
                continue
            assert (one.grid, one.num_tokens) == (other.grid, other.num_tokens)
            difference = np.abs(one.tensors["pixel_values"] - other.tensors["pixel_values"])
            assert difference.mean() < 0.02

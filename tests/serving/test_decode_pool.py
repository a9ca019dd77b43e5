"""The decode pool: what one file does to its worker is nobody else's concern."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from pydicom import uid

from tests.clinical.dicom_files import decoded, deflate_bomb, grey_file, nested_sequences, sample, siz, sof
from vlm_serve.config import MIB, DecodeLimits, IngestConfig
from vlm_serve.errors import CorruptImageError, ImageError, ImageLimitError, MediaMismatchError, ServiceError
from vlm_serve.serving.decode_pool import DecodePool
from vlm_serve.types import ImagePart

CT = ImagePart(sample("CT_small.dcm"), "application/dicom")


def slow_part(seconds_of_work: int) -> ImagePart:
    """A sound small file that takes pydicom long: millions of elements nobody asked for."""
    plain = grey_file(np.zeros((4, 4), np.uint16))
    start = plain.index(b"\x08\x00\x16\x00UI")
    return ImagePart(
        plain[:start] + b"\x08\x00\x06\x00CS\0\0" * (600_000 * seconds_of_work) + plain[start:], "application/dicom"
    )


def children() -> set[int]:
    """The processes that any thread of this one has started."""
    lists = Path("/proc/self/task").glob("*/children")
    return {int(pid) for path in lists for pid in path.read_text().split()}


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodePool]:
    with DecodePool(IngestConfig(workers=2)) as pool:
        yield pool


@pytest.fixture
def make_pool() -> Iterator[Callable[..., DecodePool]]:
    pools: list[DecodePool] = []

    def make(workers: int = 1, **limits: float) -> DecodePool:
        pools.append(DecodePool(IngestConfig(workers, DecodeLimits(**limits))))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def test_the_pool_decodes_what_the_function_decodes(pool: DecodePool) -> None:
    for name in ("CT_small.dcm", "RG1_J2KR.dcm", "examples_ybr_color.dcm"):
        here, there = decoded(sample(name)), pool.decode(ImagePart(sample(name), "application/dicom"))
        np.testing.assert_array_equal(there.pixels, here.pixels)
        assert there.receipt == here.receipt
        assert not there.pixels.flags.writeable


HOSTILE: dict[str, tuple[Callable[[], bytes], type[ImageError]]] = {
    "deflate bomb": (lambda: deflate_bomb(100), ImageLimitError),
    "J2K SIZ bomb": (lambda: grey_file(np.zeros((16, 16), np.uint16), uid.JPEG2000, siz(12_000, 12_000)),
                     CorruptImageError),
    "JPEG SOF bomb": (lambda: grey_file(np.zeros((16, 16), np.uint8), uid.JPEGBaseline8Bit, sof(12_000, 12_000)),
                      CorruptImageError),
    "RLE of 65535²": (lambda: grey_file(np.zeros((4, 4), np.uint16), uid.RLELossless, bytes(64), Rows=65_535,
                                        Columns=65_535, NumberOfFrames=2), ImageLimitError),
    "300 nested sequences": (lambda: nested_sequences(300), ImageLimitError),
    "cut short": (lambda: CT.data[:20_000], CorruptImageError),
    "no DICOM": (lambda: np.random.default_rng(1).bytes(5000), MediaMismatchError),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_soon_while_its_neighbour_is_served(pool: DecodePool, name: str) -> None:
    """Row 1 of engines.md: files are decoded by several processes, not by threads of the server."""
    make, expected = HOSTILE[name]
    part = ImagePart(make(), "application/dicom")
    before = children()
    start = time.monotonic()
    with ThreadPoolExecutor(2) as threads:
        hostile, neighbour = threads.submit(pool.decode, part), threads.submit(pool.decode, CT)
        assert isinstance(hostile.exception(), expected)
        assert neighbour.result().receipt == decoded(CT.data).receipt
    assert time.monotonic() - start < 5
    assert children() == before  # the worker has survived it


def test_a_worker_killed_in_the_middle_costs_one_job(make_pool: Callable[..., DecodePool]) -> None:
    before = children()
    pool = make_pool(workers=2)
    with ThreadPoolExecutor(2) as threads:  # one file for each: both have started when these are done
        list(threads.map(pool.decode, [slow_part(1), slow_part(1)]))
    workers = children() - before
    assert len(workers) == 2
    with ThreadPoolExecutor(1) as threads:
        doomed = threads.submit(pool.decode, slow_part(6))
        victim = wait_for_work(workers)
        os.kill(victim, signal.SIGKILL)
        neighbour = pool.decode(CT)
        assert isinstance(doomed.exception(), ImageLimitError)
    assert neighbour.receipt == decoded(CT.data).receipt
    after = children() - before
    assert victim not in after
    assert len(after) == 2
    for _ in range(3):
        pool.decode(CT)


def wait_for_work(workers: set[int]) -> int:
    """The one of the idle workers that begins to compute."""

    def ticks(pid: int) -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    start = {pid: ticks(pid) for pid in workers}
    enough = os.sysconf("SC_CLK_TCK") // 5
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for pid in workers:
            if ticks(pid) - start[pid] > enough:
                return pid
        threading.Event().wait(0.02)
    raise AssertionError("no worker took up the file")


def test_a_worker_that_died_idle_is_replaced_and_blames_no_file(make_pool: Callable[..., DecodePool]) -> None:
    before = children()
    pool = make_pool()
    pool.decode(CT)
    (worker,) = children() - before
    os.kill(worker, signal.SIGKILL)
    os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)
    assert pool.decode(CT).receipt == decoded(CT.data).receipt


def test_cpu_time_is_limited_by_the_file(make_pool: Callable[..., DecodePool]) -> None:
    pool = make_pool(cpu_seconds=1)
    for _ in range(2):  # the limit is over what the worker has used before
        assert pool.decode(CT).receipt.rows == 128
    with pytest.raises(ImageLimitError, match="more than 1 s of CPU time"):
        pool.decode(slow_part(6))
    assert pool.decode(CT).receipt.rows == 128


def test_wall_time_is_limited(make_pool: Callable[..., DecodePool]) -> None:
    pool = make_pool(wall_seconds=0.5)
    assert pool.decode(CT).receipt.rows == 128
    start = time.monotonic()
    with pytest.raises(ImageLimitError, match=r"longer than 0\.5 s"):
        pool.decode(slow_part(6))
    assert time.monotonic() - start < 5
    assert pool.decode(CT).receipt.rows == 128


def test_memory_is_limited_and_the_worker_survives_it(make_pool: Callable[..., DecodePool]) -> None:
    before = children()
    pool = make_pool(memory_bytes=64 * MIB)
    pool.decode(CT)
    worker = children() - before
    large = grey_file(np.zeros((4000, 4000), np.uint16))
    with pytest.raises(ImageLimitError, match="memory"):
        pool.decode(ImagePart(large, "application/dicom"))
    assert pool.decode(CT).receipt.rows == 128
    assert children() - before == worker
    assert decoded(large).receipt.rows == 4000


def test_nothing_leaks_however_jobs_end(make_pool: Callable[..., DecodePool]) -> None:
    before = children()
    pool = make_pool(cpu_seconds=1)
    with pytest.raises(ImageError):  # after a refusal the worker holds nothing; after a picture, for a moment still
        pool.decode(ImagePart(CT.data[:3000], "application/dicom"))
    fds = open_fds()
    (worker,) = children() - before
    theirs = len(os.listdir(f"/proc/{worker}/fd"))
    for _ in range(20):
        pool.decode(CT)
        with pytest.raises(ImageError):
            pool.decode(ImagePart(CT.data[:3000], "application/dicom"))
    assert len(os.listdir(f"/proc/{worker}/fd")) == theirs
    with pytest.raises(ImageLimitError):
        pool.decode(slow_part(6))
    pool.decode(CT)
    assert open_fds() == fds
    pool.close()
    assert children() == before


def test_callers_are_served_in_the_order_they_came(make_pool: Callable[..., DecodePool]) -> None:
    pool = make_pool()
    pool.decode(CT)
    order: list[int] = []

    def call(number: int, part: ImagePart) -> None:
        pool.decode(part)
        order.append(number)

    threads = [threading.Thread(target=call, args=(0, slow_part(1)))]
    threads[0].start()
    for number in range(1, 6):
        while len(pool._pool._queue) != number - 1 or pool._pool._idle:
            threading.Event().wait(0.001)
        threads.append(threading.Thread(target=call, args=(number, CT)))
        threads[-1].start()
    for thread in threads:
        thread.join(30)
    assert order == [0, 1, 2, 3, 4, 5]


def test_closing_ends_jobs_and_refuses_new_ones(make_pool: Callable[..., DecodePool]) -> None:
    before = children()
    pool = make_pool()
    pool.decode(CT)
    with ThreadPoolExecutor(2) as threads:
        running = threads.submit(pool.decode, slow_part(6))
        while pool._pool._idle:
            threading.Event().wait(0.001)
        waiting = threads.submit(pool.decode, CT)
        while not pool._pool._queue:
            threading.Event().wait(0.001)
        pool.close()
        assert isinstance(running.exception(10), ServiceError)
        assert isinstance(waiting.exception(10), ServiceError)
    with pytest.raises(ServiceError, match="stopping"):
        pool.decode(CT)
    pool.close()
    assert children() == before


def test_no_worker_has_torch_in_it(pool: DecodePool) -> None:
    pool.decode(CT)
    for pid in children():
        maps = Path(f"/proc/{pid}/maps").read_text()
        if b"decode_worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
            assert "gdcm" in maps
            assert "libtorch" not in maps


def test_limits_of_the_pool_reach_the_file(make_pool: Callable[..., DecodePool]) -> None:
    pool = make_pool(max_dimension=100)
    with pytest.raises(ImageLimitError, match="at most 100 rows"):
        pool.decode(CT)
    with pytest.raises(ImageLimitError, match="larger than"):
        make_pool(max_file_bytes=1000).decode(CT)

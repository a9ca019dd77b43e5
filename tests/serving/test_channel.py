"""Messages, descriptors and processes that go through a channel."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from vlm_serve.clinical.image import ClinicalImage, ImageReceipt, WindowReceipt
from vlm_serve.config import Settings
from vlm_serve.serving.channel import Channel, ChannelClosedError, decode, encode, read_shared, spawn, write_shared
from vlm_serve.serving.messages import Add, ToEngine
from vlm_serve.serving.tensors import restore_tensors, share_tensors
from vlm_serve.types import EngineStats, ImageInputs, ImagePart, ImageSpan, Request, SamplingParams


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    one, other = (Channel(sock) for sock in socket.socketpair())
    yield one, other
    one.close()
    other.close()


def test_messages_arrive_whole_and_in_order(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    messages = [b"", b"a", os.urandom(5_000_000), b"last"]
    sender = threading.Thread(target=lambda: [ours.send(message) for message in messages])
    sender.start()
    assert [theirs.recv() for _ in messages] == [(message, []) for message in messages]
    sender.join()


def test_messages_of_many_threads_do_not_mix(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    senders = [threading.Thread(target=ours.send, args=(bytes([i]) * 300_000,)) for i in range(8)]
    for sender in senders:
        sender.start()
    received = {theirs.recv()[0] for _ in senders}
    assert received == {bytes([i]) * 300_000 for i in range(8)}
    for sender in senders:
        sender.join()


def test_a_descriptor_crosses_with_its_memory(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    mine = write_shared(b"shared memory")
    ours.send(b"first", [mine, mine])
    ours.send(b"second")
    os.close(mine)
    payload, fds = theirs.recv()
    assert payload == b"first"
    assert len(fds) == 2
    for fd in fds:
        out = bytearray(13)
        read_shared(fd, out)
        assert out == b"shared memory"
        with pytest.raises(EOFError):
            read_shared(fd, bytearray(14))
        os.close(fd)
    assert theirs.recv() == (b"second", [])


def test_a_closed_end_is_an_error_of_its_own_on_the_other(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    theirs.close()
    with pytest.raises(ChannelClosedError):
        ours.recv()
    with pytest.raises(ChannelClosedError):
        ours.send(b"x")


def test_closing_wakes_the_thread_that_waits(ends: tuple[Channel, Channel]) -> None:
    ours, _ = ends
    outcome: list[type[BaseException]] = []

    def wait() -> None:
        try:
            ours.recv()
        except ChannelClosedError as error:
            outcome.append(type(error))

    reader = threading.Thread(target=wait)
    reader.start()
    ours.close()
    reader.join(10)
    assert outcome == [ChannelClosedError]


def test_half_a_message_runs_into_the_time_limit_and_an_oversized_one_into_its_own() -> None:
    raw, sock = socket.socketpair()
    channel = Channel(sock, max_message=100)
    raw.send((50).to_bytes(8, "little") + b"half")
    with pytest.raises(TimeoutError):
        channel.recv(0.05)
    channel.close()
    raw.close()
    raw, sock = socket.socketpair()
    channel = Channel(sock, max_message=100)
    raw.send((101).to_bytes(8, "little"))
    with pytest.raises(ChannelClosedError):
        channel.recv(5)
    channel.close()
    raw.close()


# --- codec -------------------------------------------------------------------


def inputs(seed: int = 0) -> ImageInputs:
    random = np.random.default_rng(seed)
    tensors = {
        "pixel_values": random.normal(size=(3, 8, 10)).astype(np.float32),
        "mask": np.array([[True, False]]),
        "sizes": np.array([8, 10], np.int64),
        "nothing": np.empty((0, 4), np.float16),
    }
    return ImageInputs.create(tensors, (2, 3), 6)


def same_inputs(one: ImageInputs, other: ImageInputs) -> bool:
    return (one.grid, one.num_tokens, one.digest) == (other.grid, other.num_tokens, other.digest) and all(
        one.tensors[name].dtype == other.tensors[name].dtype
        and one.tensors[name].shape == other.tensors[name].shape
        and (one.tensors[name] == other.tensors[name]).all()
        for name in one.tensors
    )


def test_a_request_crosses_with_its_tensors() -> None:
    request = Request(
        request_id="r1",
        token_ids=(1, 2, 3),
        sampling=SamplingParams(max_tokens=None, temperature=0.5, seed=7, stop=["a", "b"]),
        images=(ImageSpan(1, inputs(0)), ImageSpan(9, inputs(1))),
        adapter="digest",
        cache_salt="salt",
        eos_token_ids=(2, 5),
    )
    back = decode(encode(request), Request)
    assert type(back) is Request
    assert back.sampling == request.sampling
    assert isinstance(back.token_ids, tuple)
    assert [span.offset for span in back.images] == [1, 9]
    assert all(same_inputs(a.inputs, b.inputs) for a, b in zip(back.images, request.images, strict=True))
    rebuilt = ImageInputs.create(back.images[0].inputs.tensors, (2, 3), 6)
    assert rebuilt.digest == request.images[0].inputs.digest
    assert back.images[0].inputs.tensors["pixel_values"].flags.writeable


@pytest.mark.parametrize(
    "value",
    [
        SamplingParams(),
        SamplingParams(stop="x"),
        EngineStats(num_requests_running=3),
        Settings(),
        ImagePart(b"\x00\xff", "image/png"),
        ImageReceipt(
            media_type="application/dicom",
            file_sha256="a",
            pixel_sha256="b",
            rows=1,
            columns=2,
            decoder="d",
            window=WindowReceipt("percentile", 1.5, 2.0),
            attributes={"Modality": "CT"},
            notes=("one", "two"),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_plain_values_cross_unchanged(value: object) -> None:
    assert decode(encode(value), type(value)) == value


def test_an_array_that_does_not_lie_in_one_piece_crosses() -> None:
    array = np.arange(24, dtype=">i2").reshape(2, 3, 4).transpose(2, 0, 1)[::2]
    back = decode(encode(ClinicalImage(array, ImageReceipt("m", "f", "p", 1, 1, "d"))), ClinicalImage).pixels
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


def test_a_scalar_array_crosses() -> None:
    assert decode(encode(np.array(3.5)), np.ndarray) == 3.5


def test_objects_do_not_cross_in_either_direction() -> None:
    """Row 24 of engines.md: pickles on the wire."""
    with pytest.raises(TypeError, match="cannot cross"):
        encode(np.array([{}], dtype=object))
    with pytest.raises(TypeError, match="cannot cross"):
        encode({"a": object()})
    with pytest.raises(msgspec.ValidationError):
        decode(msgspec.msgpack.encode(["|O", [1], bytes(8)]), np.ndarray)


def test_a_value_out_of_range_is_refused_on_arrival() -> None:
    message = encode(SamplingParams()).replace(encode("top_p") + encode(1.0), encode("top_p") + encode(7.0))
    with pytest.raises(Exception, match="top_p"):
        decode(message, SamplingParams)


# --- processes ---------------------------------------------------------------


def test_a_child_answers_and_ends_with_its_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, socket\n"
        "from vlm_serve.serving.channel import Channel, spawn\n"
        "ours, theirs = socket.socketpair()\n"
        "child = spawn('vlm_serve.serving.decode_worker', theirs)\n"
        "theirs.close()\n"
        "Channel(ours).recv(60)\n"
        "print(child.pid, flush=True)\n"
        "os._exit(9)\n"  # no clean-up, no guard for __main__
    )
    root = Path(__file__).parents[2]
    (tmp_path / "msgspec.py").write_text("raise SystemExit('a file of the current folder was imported')")
    parent = subprocess.run(
        [sys.executable, "-P", str(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        check=False,
        timeout=60,
    )
    assert parent.returncode == 9
    pid = int(parent.stdout)
    with_pidfd = os.pidfd_open(pid) if Path(f"/proc/{pid}").exists() else None
    if with_pidfd is not None:  # still on its way out
        import select

        poll = select.poll()
        poll.register(with_pidfd, select.POLLIN)
        assert poll.poll(10_000)
        os.close(with_pidfd)


def test_a_module_that_does_not_exist_closes_the_channel() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        child = spawn("vlm_serve.serving.no_such_module", theirs)
    channel = Channel(ours)
    with pytest.raises(ChannelClosedError):
        channel.recv(30)
    assert child.wait() != 0
    channel.close()


def test_the_tensors_of_images_cross_in_memory_beside_the_message(ends: tuple[Channel, Channel]) -> None:
    ours, theirs = ends
    images = (ImageSpan(2, inputs(1)), ImageSpan(9, inputs(2)))
    request = Request("r", tuple(range(20)), SamplingParams(), images=images)
    open_before = len(os.listdir("/proc/self/fd"))
    bare, places, fd = share_tensors(request)
    message = encode(Add(bare, places))
    assert not any(span.inputs.tensors for span in bare.images)
    ours.send(message, [fd])
    os.close(fd)
    data, (received,) = theirs.recv(5)
    arrived = decode(data, ToEngine)
    restored = restore_tensors(arrived.request, arrived.tensors, received)
    assert len(os.listdir("/proc/self/fd")) == open_before
    assert [span.offset for span in restored.images] == [2, 9]
    assert all(same_inputs(one.inputs, other.inputs) for one, other in zip(restored.images, images, strict=True))
    assert all(array.flags.writeable for span in restored.images for array in span.inputs.tensors.values())

"""The process that compiles what an answer has to match: torch-free, killable, limited in memory and CPU time.

Some grammars of a few hundred bytes, such as intersections of regular expressions, keep a compiler busy without end.
Started by `grammar_pool.py` as `python -m vlm_serve.serving.grammar_worker FD`.
"""

import contextlib

import msgspec
from tokenizers import Tokenizer

from vlm_serve.engine.structured import Structures
from vlm_serve.errors import InvalidRequestError
from vlm_serve.serving.channel import Channel, ChannelClosedError, decode, encode
from vlm_serve.serving.worker_process import close_output, limited, open_channel
from vlm_serve.types import StructuredOutputs


class Vocabulary(msgspec.Struct, frozen=True):
    """The first message to a worker: `tokenizer` as its own JSON, the rest as `Structures` takes it."""

    tokenizer: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class Job(msgspec.Struct, frozen=True):
    """Compile this; `allowed_token_ids` as `Structures.compile_grammar` takes them."""

    spec: StructuredOutputs
    allowed_token_ids: tuple[int, ...] | None
    memory_bytes: int
    cpu_seconds: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The vocabulary is taken in; the first message."""


class Compiled(msgspec.Struct, frozen=True, tag=True):
    """The grammar as llguidance takes it. Its first step has been computed, and did not take long."""

    grammar: str


class Refused(msgspec.Struct, frozen=True, tag=True):
    """`message` says why; it echoes nothing of the job."""

    message: str


FromWorker = Ready | Compiled | Refused


def main() -> None:
    channel = open_channel()
    with contextlib.suppress(ChannelClosedError):
        vocabulary = decode(channel.recv()[0], Vocabulary)
        structures = Structures(
            Tokenizer.from_str(vocabulary.tokenizer), vocabulary.vocab_size, vocabulary.eos_token_ids
        )
        assert structures.tokens.vocab_size  # made now, so that no job waits for it
        close_output()
        channel.send(encode(Ready()))
        while True:
            _serve(channel, structures, decode(channel.recv()[0], Job))


def _serve(channel: Channel, structures: Structures, job: Job) -> None:
    answer: Compiled | Refused
    try:
        with limited(job.memory_bytes, job.cpu_seconds):
            answer = Compiled(structures.compile_grammar(job.spec, job.allowed_token_ids))
    except InvalidRequestError as error:
        answer = Refused(str(error))
    channel.send(encode(answer))


if __name__ == "__main__":
    main()

"""Grammars are compiled where they can harm nobody: one that never ends costs its own request an error."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.checkpoints import make_tokenizer
from vlm_serve.engine.structured import Structures
from vlm_serve.errors import InvalidRequestError, ServiceError
from vlm_serve.serving.grammar_pool import GrammarPool
from vlm_serve.serving.grammar_worker import Vocabulary
from vlm_serve.types import StructuredOutputs

SOUND = StructuredOutputs(json={"type": "object", "properties": {"side": {"enum": ["left", "right"]}}})
# Intersections of these keep llguidance busy without end, at some hundred bytes.
MEETING_PATTERNS = StructuredOutputs(
    json={"allOf": [{"type": "string", "pattern": f"a.{{{count}}}b"} for count in range(1, 60)]}
)
MEETING_TERMS = StructuredOutputs(
    grammar="start: T\nT: " + " & ".join(f"/(.*a.{{{count}}}b.*)/" for count in range(1, 60))
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer().backend_tokenizer


@pytest.fixture(scope="module")
def pool(tokenizer) -> Iterator[GrammarPool]:
    pool = GrammarPool(lambda: Vocabulary(tokenizer.to_str(), 320, (2,)))
    yield pool
    pool.close()


def workers() -> set[int]:
    lists = Path("/proc/self/task").glob("*/children")
    found = {int(pid) for path in lists for pid in path.read_text().split()}
    return {pid for pid in found if b"grammar_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()}


def test_it_compiles_what_the_function_compiles(pool, tokenizer):
    here = Structures(tokenizer, 320, (2,))
    for spec in (SOUND, StructuredOutputs(regex="[a-c]+"), StructuredOutputs(choice=("a", "b"))):
        assert pool.compile(spec) == here.compile_grammar(spec)


@pytest.mark.parametrize("spec", [MEETING_PATTERNS, MEETING_TERMS], ids=["patterns of a schema", "terms of a grammar"])
def test_a_grammar_that_never_ends_is_refused_and_the_next_one_is_compiled(pool, spec):
    """Row 23 of engines.md."""
    assert len(json.dumps(spec.json or spec.grammar)) < 4000
    with pytest.raises(InvalidRequestError, match="too complex") as refused:
        pool.compile(spec)
    assert refused.value.param == "structured_outputs"
    assert pool.compile(unknown())


def test_what_is_known_waits_for_nobodys_compiler(pool):
    known = pool.compile(SOUND)
    with ThreadPoolExecutor(1) as other:
        busy = other.submit(pool.compile, MEETING_TERMS)
        assert pool.compile(SOUND) == known
        assert not busy.done()
        with pytest.raises(InvalidRequestError):
            busy.result()


def unknown() -> StructuredOutputs:
    """One that no cache has, so that a worker compiles it."""
    return StructuredOutputs(regex=os.urandom(4).hex())


def test_a_refusal_is_told_in_the_words_of_the_compiler(pool):
    pool.compile(unknown())
    before = workers()
    with pytest.raises(InvalidRequestError, match="regular expression cannot be used"):
        pool.compile(StructuredOutputs(regex="(("))
    assert workers() == before, "a refusal costs no worker"


def test_the_worker_has_no_torch_in_it(pool):
    pool.compile(unknown())
    assert workers()
    for pid in workers():
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()


def test_a_closed_pool_says_so_and_leaves_no_process(tokenizer):
    before = workers()
    pool = GrammarPool(lambda: Vocabulary(tokenizer.to_str(), 320, (2,)))
    pool.compile(SOUND)
    pool.close()
    assert workers() == before
    with pytest.raises(ServiceError):
        pool.compile(MEETING_PATTERNS)

"""An answer with a schema, a regex, a choice or a grammar matches it; a bad one is refused without an echo."""

import enum
import json
import re
import time
from datetime import date
from threading import Event
from typing import Literal

import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field

from tests.checkpoints import make_llava, make_tokenizer
from tests.engine.harness import Harness
from vlm_serve.engine import grammar_rows
from vlm_serve.engine.structured import MAX_GRAMMAR_BYTES, AnswerMatcher, GrammarError, Structures
from vlm_serve.errors import InvalidRequestError
from vlm_serve.types import FinishReason, Request, SamplingParams, StructuredOutputs, TokenOutput

EOS = 2
PROMPT = (1, 30, 31, 32, 33, 34, 35)


class Side(enum.StrEnum):
    LEFT = "left"
    RIGHT = "rechts – ä"


class Finding(BaseModel):
    model_config = ConfigDict(extra="forbid")
    label: Literal["effusion", "mass"]
    side: Side
    size_mm: int | None = Field(default=None, ge=0, le=500)


class Report(BaseModel):
    model_config = ConfigDict(extra="forbid")
    findings: list[Finding] = Field(max_length=3)
    normal: bool
    seen: date
    note: str = Field(max_length=6)
    previous: "Report | None" = None


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    folder = tmp_path_factory.mktemp("structured")
    make_llava(folder)
    return Harness(folder, max_num_seqs=32, max_num_batched_tokens=512)


@pytest.fixture(scope="module")
def structures(harness):
    return Structures(harness.family.backend_tokenizer, 320, (EOS,))


def request(name: str, grammar: str | None, **sampling) -> Request:
    settings = {"max_tokens": 150, "temperature": 1.0} | sampling
    return Request(name, PROMPT, SamplingParams(**settings), eos_token_ids=(EOS,), grammar=grammar)


def run(harness, *requests: Request, each_step=lambda: None) -> dict[str, list[TokenOutput]]:
    outputs: dict[str, list[TokenOutput]] = {one.request_id: [] for one in requests}
    # `_record` of the harness looks rows up; here the engine's own method will do.
    harness.engine.runner.run = harness._run_batch
    for one in requests:
        harness.engine.add(one)
    while harness.engine.has_work:
        for output in harness.engine.step().outputs:
            outputs[output.request_id].append(output)
        each_step()
    return outputs


def text(harness, outputs: list[TokenOutput]) -> str | None:
    """The text of an answer that has ended by itself; None for one that was cut off."""
    assert outputs[-1].error is None
    tokens = [token for output in outputs for token in output.token_ids]
    if outputs[-1].finish_reason is not FinishReason.STOP:
        return None
    assert tokens[-1] == EOS
    return harness.family.backend_tokenizer.decode(tokens[:-1])


def answers(harness, spec: StructuredOutputs, count: int = 24, **sampling) -> list[str]:
    grammar = Structures(harness.family.backend_tokenizer, 320, (EOS,)).compile_grammar(spec)
    outputs = run(harness, *(request(str(seed), grammar, seed=seed, **sampling) for seed in range(count)))
    texts = [text(harness, one) for one in outputs.values()]
    ended = [one for one in texts if one is not None]
    assert ended, "no answer came to its end"
    return ended


def test_every_token_is_known_by_its_bytes(structures):
    """Byte-level tokens of half a character too, special ones by none of their text. 0xFF, `ÿ` in this alphabet, is
    in no text at all, and llguidance marks special tokens by it.
    """
    tokenizer = make_tokenizer()
    for token, token_id in tokenizer.get_vocab().items():
        if token == "ÿ":
            continue
        if token not in tokenizer.all_special_tokens:
            pieces = structures.tokens.decode_bytes([token_id])
            assert len(pieces) == len(token)
            assert tokenizer.backend_tokenizer.decode([token_id]) == pieces.decode(errors="replace")
        else:
            assert structures.tokens.is_special_token(token_id)


def test_a_report_is_a_valid_instance_of_its_pydantic_model(harness):
    texts = answers(harness, StructuredOutputs(json=Report.model_json_schema()), max_tokens=400)
    reports = [Report.model_validate_json(one) for one in texts]
    assert len({report.normal for report in reports}) == 2
    assert any(report.findings for report in reports)


def test_a_schema_may_come_as_text(harness):
    schema = {"type": "object", "properties": {"a": {"enum": [1, None, 'é"\\']}}, "required": ["a"]}
    texts = answers(harness, StructuredOutputs(json=json.dumps(schema)))
    assert all(json.loads(one)["a"] in (1, None, 'é"\\') for one in texts)


def test_a_json_object_is_one(harness):
    for one in answers(harness, StructuredOutputs(json_object=True), max_tokens=60):
        assert isinstance(json.loads(one), dict)


def test_one_of_with_a_discriminator_is_exactly_one(harness):
    class Cat(BaseModel):
        kind: Literal["cat"]
        lives: Literal[7, 9]

    class Dog(BaseModel):
        kind: Literal["dog"]
        good: Literal[True]

    class Pet(BaseModel):
        pet: Cat | Dog = Field(discriminator="kind")

    texts = answers(harness, StructuredOutputs(json=Pet.model_json_schema()))
    assert {Pet.model_validate_json(one).pet.kind for one in texts} == {"cat", "dog"}


@pytest.mark.parametrize("pattern", [r"[0-9]{4}/[\d]\d", r"^(left|right) (lung|lobe)$", r"[^\x00-\x7f]{2}x?", r"a|ab"])
def test_an_answer_matches_its_regex_as_a_whole(harness, pattern):
    for one in answers(harness, StructuredOutputs(regex=pattern)):
        assert re.fullmatch(pattern, one, re.ASCII)


def test_a_choice_is_one_of_the_texts_whatever_is_in_them(harness):
    choices = ("yes", "yes, but", 'ä\n"\\', "/not a regex/", "# no comment", "start: no rule")
    texts = answers(harness, StructuredOutputs(choice=choices), count=32, temperature=2.0)
    assert set(texts) <= set(choices)
    assert len(set(texts)) >= 3


def test_an_answer_is_of_its_grammar(harness):
    grammar = 'start: sum\nsum: NUMBER | sum "+" NUMBER\nNUMBER: /[1-9][0-9]{0,2}/'
    for one in answers(harness, StructuredOutputs(grammar=grammar)):
        assert re.fullmatch(r"[1-9]\d{0,2}(\+[1-9]\d{0,2})*", one)


def test_greedy_answers_match_too(harness):
    (one,) = answers(harness, StructuredOutputs(choice=("left", "right")), count=1, temperature=0.0)
    assert one in ("left", "right")


def test_when_the_grammar_is_complete_only_an_end_comes_min_tokens_or_not(harness):
    assert answers(harness, StructuredOutputs(choice=("yes",)), count=2, min_tokens=40) == ["yes"] * 2


def test_no_end_comes_before_min_tokens_where_the_grammar_can_go_on(harness, structures):
    grammar = structures.compile_grammar(StructuredOutputs(regex="[ab]*"))
    outputs = run(harness, *(request(str(seed), grammar, seed=seed, min_tokens=20) for seed in range(8)))
    assert all(sum(len(output.token_ids) for output in one) > 20 for one in outputs.values())


def test_rows_without_a_grammar_are_as_without_neighbours_that_have_one(harness, structures):
    grammar = structures.compile_grammar(StructuredOutputs(json=Report.model_json_schema()))
    plain = request("plain", None, seed=5, max_tokens=20)
    alone = run(harness, plain)["plain"]
    among = run(harness, plain, *(request(str(seed), grammar, seed=seed) for seed in range(4)))["plain"]
    assert [one.token_ids for one in among] == [one.token_ids for one in alone]


def test_an_answer_that_is_preempted_and_resumed_is_as_undisturbed(harness, structures):
    grammar = structures.compile_grammar(StructuredOutputs(json=Report.model_json_schema()))
    requests = [request(str(seed), grammar, seed=seed, max_tokens=80) for seed in range(3)]
    scheduler, steps = harness.engine.scheduler, 0

    def tokens(outputs):
        return {name: [token for output in one for token in output.token_ids] for name, one in outputs.items()}

    def preempt_now_and_then():
        nonlocal steps
        steps += 1
        # What the engine does with those of a step that failed: their rows are taken, their answers kept.
        if steps % 7 == 0 and scheduler.running:
            batch = type("Rows", (), {"rows": torch.tensor([s.row for s in scheduler.running[:1]])})
            batch.load_adapters = batch.encode = batch.evict_images = ()
            scheduler.suspect(batch)

    undisturbed = tokens(run(harness, *requests))
    assert tokens(run(harness, *requests, each_step=preempt_now_and_then)) == undisturbed


def test_a_grammar_that_gets_too_complex_ends_its_own_request(harness, structures):
    # Every letter doubles what is still possible.
    rules = "\n".join(f"t{i}: t{i - 1} t{i - 1}" for i in range(1, 41))
    grammar = structures.compile_grammar(StructuredOutputs(grammar=f'start: t40\n{rules}\nt0: "a"'))
    outputs = run(harness, request("bad", grammar), request("good", None, max_tokens=5, seed=1))
    assert outputs["bad"][-1].finish_reason is FinishReason.ERROR
    last = outputs["bad"][-1]
    assert (last.error, last.error_param) == (grammar_rows.TOO_COMPLEX.message, "structured_outputs")
    assert sum(len(one.token_ids) for one in outputs["good"]) == 5


def test_a_mask_that_takes_too_long_ends_its_own_request(harness, structures, monkeypatch):
    monkeypatch.setattr(grammar_rows, "MAX_MASK_SECONDS", 0.05)
    release, make = Event(), AnswerMatcher.mask

    def held_up(self):
        if self._min_tokens == 7:
            release.wait(30)
        return make(self)

    monkeypatch.setattr(AnswerMatcher, "mask", held_up)
    grammar = structures.compile_grammar(StructuredOutputs(regex="[ab]{30}"))
    try:
        outputs = run(harness, request("slow", grammar, min_tokens=7), request("good", None, max_tokens=5, seed=1))
    finally:
        release.set()
    assert (outputs["slow"][-1].error, outputs["slow"][-1].error_param) == (grammar_rows.TOO_LATE.message, None)
    assert sum(len(one.token_ids) for one in outputs["good"]) == 5


def test_a_fault_of_a_mask_ends_its_own_request_and_is_logged_without_its_text(
    harness, structures, monkeypatch, caplog
):
    def broken(self):
        raise RuntimeError("name of a patient")

    grammar = structures.compile_grammar(StructuredOutputs(regex="[ab]{30}"))
    monkeypatch.setattr(AnswerMatcher, "mask", broken)
    outputs = run(harness, request("bad", grammar), request("good", None, max_tokens=5, seed=1))
    assert (outputs["bad"][-1].error, outputs["bad"][-1].error_param) == (grammar_rows.FAULT.message, None)
    assert sum(len(one.token_ids) for one in outputs["good"]) == 5
    assert "RuntimeError" in caplog.text
    assert "patient" not in caplog.text


def test_a_token_that_does_not_match_is_an_error(structures):
    grammar = structures.compile_grammar(StructuredOutputs(choice=("yes",)))
    with pytest.raises(GrammarError):
        AnswerMatcher(structures, grammar, min_tokens=0, end_ids=(EOS,), answer=structures.tokens.tokenize_str("no"))


def nested(levels: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def chain(links: int, make=lambda reference: {"type": "object", "properties": {"a": reference}}) -> dict:
    """Definitions each of which refers to the next."""
    definitions = {"l0": {"type": "string"}}
    definitions |= {f"l{i}": make({"$ref": f"#/$defs/l{i - 1}"}) for i in range(1, links)}
    return {"$defs": definitions, "$ref": f"#/$defs/l{links - 1}"}


def twice(word: str):
    return lambda reference: {word: [reference, reference]}


BAD = {
    "no JSON": StructuredOutputs(json='{"type": "Secret'),
    "no object": StructuredOutputs(json='["Secret"]'),
    "not JSON at all": StructuredOutputs(json={"type": {1, 2}}),
    "no number": StructuredOutputs(json={"const": float("nan")}),
    "lone surrogate": StructuredOutputs(json={"const": "\ud800Secret"}),
    "lone surrogate, escaped": StructuredOutputs(json=r'{"enum": ["\ud800Secret"]}'),
    "lone surrogate, escaped, as a name": StructuredOutputs(json=r'{"\udfffSecret": 1}'),
    "no number, as text": StructuredOutputs(json='{"const": NaN, "title": "Secret"}'),
    "an infinite number, as text": StructuredOutputs(json='{"const": 1e400, "title": "Secret"}'),
    "a whole number of 80 bits": StructuredOutputs(json={"const": 2**80, "title": "Secret"}),
    "unknown type": StructuredOutputs(json={"type": "Secret"}),
    "unknown keyword": StructuredOutputs(json={"type": "array", "uniqueItems": True, "description": "Secret"}),
    "unknown format": StructuredOutputs(json={"type": "string", "format": "Secret"}),
    "no such reference": StructuredOutputs(json={"$ref": "#/$defs/Secret"}),
    "reference to a file": StructuredOutputs(json={"$ref": "file:///etc/Secret"}),
    "reference to a host": StructuredOutputs(json={"$ref": "http://127.0.0.1:9/Secret"}),
    "unsatisfiable": StructuredOutputs(json={"type": "string", "pattern": "^Secret$", "format": "uuid"}),
    "keyword behind lenient": StructuredOutputs(json={"x-guidance": {"lenient": True}, "not": {"const": "Secret"}}),
    "pattern": StructuredOutputs(json={"type": "string", "pattern": "(Secret"}),
    "regex": StructuredOutputs(regex="(Secret"),
    "regex with look-around": StructuredOutputs(regex="(?=Secret)a"),
    "regex that nothing matches": StructuredOutputs(regex=r"[^\s\S]Secret"),
    "schema that no text ends": StructuredOutputs(json={"$ref": "#", "title": "Secret"}),
    "grammar that no text ends": StructuredOutputs(grammar="start: secret\nsecret: secret"),
    "grammar": StructuredOutputs(grammar="start: Secret\n"),
    "grammar without a start": StructuredOutputs(grammar='secret: "Secret"'),
    "unknown special token": StructuredOutputs(grammar="start: <|Secret|>"),
    "no choices": StructuredOutputs(choice=()),
    "an empty choice": StructuredOutputs(choice=("Secret", "")),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_schema_is_refused_and_not_echoed(structures, name):
    with pytest.raises(InvalidRequestError) as raised:
        structures.compile_grammar(BAD[name])
    assert raised.value.param == "structured_outputs"
    assert "secret" not in str(raised.value).lower()
    assert raised.value.__cause__ is None


def test_the_error_names_the_keyword_that_is_not_supported(structures):
    with pytest.raises(InvalidRequestError, match="not supported: uniqueItems"):
        structures.compile_grammar(BAD["unknown keyword"])


def test_a_choice_that_no_allowed_token_begins_is_refused(harness, structures):
    spec = StructuredOutputs(choice=("yes", "no"))
    letter = harness.family.backend_tokenizer.token_to_id
    for allowed, is_good in (([letter("y"), letter("x")], True), ([letter("e"), letter("x")], False)):
        if is_good:
            assert structures.compile_grammar(spec, allowed)
        else:
            with pytest.raises(InvalidRequestError, match="allowed_token_ids"):
                structures.compile_grammar(spec, allowed)


def test_the_error_says_where_a_grammar_is_wrong(structures):
    with pytest.raises(InvalidRequestError, match="line 2, column"):
        structures.compile_grammar(StructuredOutputs(grammar='start: "a"\n)\n'))


HUGE = {
    "deep": StructuredOutputs(json=nested(70)),
    "so deep that Python gives up": StructuredOutputs(json='{"items":' * 7000 + "{}" + "}" * 7000),
    "deep as an object": StructuredOutputs(json=nested(5000)),
    "a chain of references": StructuredOutputs(json=chain(1000)),
    "a chain of arrays": StructuredOutputs(json=chain(600, lambda r: {"type": "array", "items": r})),
    "many properties": StructuredOutputs(json={"properties": {f"p{i}": {} for i in range(5000)}}),
    "many booleans": StructuredOutputs(json={"properties": {f"p{i}": True for i in range(4000)}}),
    "many bytes": StructuredOutputs(json={"enum": ["x" * MAX_GRAMMAR_BYTES]}),
    "a product": StructuredOutputs(
        json={"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {"const": j}}} for j in range(9)]} for i in range(9)]}
    ),
    "long regex": StructuredOutputs(regex="a" * (MAX_GRAMMAR_BYTES + 1)),
    "deep regex": StructuredOutputs(regex="(" * 30_000 + "a" + ")" * 30_000),
    "many choices": StructuredOutputs(choice=[str(number) for number in range(20_000)]),
    "a chain of rules": StructuredOutputs(
        grammar="start: t2500\n" + "\n".join(f't{i}: t{i - 1} "a"' for i in range(1, 2501)) + '\nt0: "a"'
    ),
    "many brackets": StructuredOutputs(grammar="start: " + '("a") ' * 900),
    "terminals that double": StructuredOutputs(
        grammar="start: T40\n" + "\n".join(f"T{i}: T{i - 1} T{i - 1}" for i in range(1, 41)) + '\nT0: "a"'
    ),
    "deep grammar": StructuredOutputs(grammar="start: " + "(" * 30_000 + '"a"' + ")" * 30_000),
    "a chain of references in a grammar": StructuredOutputs(grammar="start: %json " + json.dumps(chain(1000))),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_schema_is_refused_soon(structures, name):
    """In two seconds of this thread's own time, however busy the machine is."""
    began = time.thread_time()
    with pytest.raises(InvalidRequestError, match="cannot be used") as raised:
        structures.compile_grammar(HUGE[name])
    assert raised.value.param == "structured_outputs"
    assert time.thread_time() - began < 2


LARGE = {
    "the widest object": StructuredOutputs(json={"properties": {f"p{i}": {} for i in range(2040)}}),
    "the longest chain": StructuredOutputs(json=chain(115)),
    "laughs by allOf": StructuredOutputs(json=chain(60, twice("allOf"))),
    "laughs by anyOf": StructuredOutputs(json=chain(60, twice("anyOf"))),
    "a reference to itself": StructuredOutputs(
        json={"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {}]}}, "$ref": "#/$defs/a"}
    ),
    "an automaton of 2**1000 states": StructuredOutputs(regex="(a|b)*a(a|b){1000}"),
    "counters in counters": StructuredOutputs(regex="(((a{1,1000}){1,1000}){1,1000}){1,1000}"),
    "an ambiguous grammar": StructuredOutputs(grammar='start: s\ns: s s | s s s | "a" | "ab"'),
    "the longest chain of rules": StructuredOutputs(
        grammar="start: t990\n" + "\n".join(f't{i}: t{i - 1} "a"' for i in range(1, 991)) + '\nt0: "a"'
    ),
}


@pytest.mark.parametrize("value", [{"type": "string"}, {"type": "string", "pattern": "^[a-z]{1,9}$"}], ids=str)
def test_the_widest_object_goes_on_behind_its_brace(harness, structures, value):
    """There each property may come, for none of them must."""
    schema = {"type": "object", "properties": {f"p{number}": value for number in range(1000)}}
    grammar = structures.compile_grammar(StructuredOutputs(json=schema))
    matcher = AnswerMatcher(structures, grammar, min_tokens=0, end_ids=(EOS,), answer=())
    for letter in '{"p999':
        token = harness.family.backend_tokenizer.token_to_id(letter)
        assert matcher.mask()[token]
        matcher.advance(token)


@pytest.mark.parametrize("name", LARGE)
def test_the_largest_that_is_taken_is_compiled_soon_and_its_masks_are_quick(structures, name):
    began = time.thread_time()
    grammar = structures.compile_grammar(LARGE[name])
    matcher = AnswerMatcher(structures, grammar, min_tokens=0, end_ids=(EOS,), answer=())
    generator = torch.Generator().manual_seed(0)
    try:
        for _ in range(20):
            allowed = torch.from_numpy(matcher.mask()).float()
            matcher.advance(int(torch.multinomial(allowed, 1, generator=generator)))
    except GrammarError:
        pass
    assert time.thread_time() - began < 2

"""Structured outputs: a schema, a regex, a choice or a grammar becomes the set of tokens that may come next.

llguidance does the parsing. What a caller sends is bounded here before it sees it, because its compiler recurses
through references; what a mask may cost is bounded by its own limits. It releases the GIL, so masks are made on
threads while the model runs.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from tokenizers import Tokenizer

from vlm_serve.errors import InvalidRequestError
from vlm_serve.types import StructuredOutputs

MAX_GRAMMAR_BYTES = 65_536
MAX_SCHEMA_DEPTH = 64
MAX_SCHEMA_PARTS = 2048
"""Schemas within a schema: llguidance takes time with the square of an object's properties, 0.3 s for these."""
MAX_REFERENCE_DEPTH = 600
"""References times depth: llguidance recurses through references, and at 890 schemas the stack of 8 MiB overflows."""
MAX_LARK_COLONS = 1000
MAX_LARK_BRACKETS = 800
"""Rules that lead to rules recurse too: 2,700 of them overflow the stack, of embedded schemas as above. Every rule has
a colon and every level of a schema a bracket, so that these bounds need no parser."""

WHITESPACE = r"[ \t\n\r]{1,64}"
"""Between the tokens of JSON: enough to indent, and no model can go on with it for ever."""

LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_items_in_row=10_000,  # an object takes four for each property that may be left out
    max_lexer_states=20_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
"""A mask takes some tens of milliseconds at the most, a matcher some tens of megabytes."""

MAX_CACHED_GRAMMARS = 64

_KEYWORDS = frozenset(
    "not if then else uniqueItems contains minContains maxContains dependentRequired dependentSchemas dependencies "
    "propertyNames minProperties maxProperties unevaluatedItems unevaluatedProperties contentEncoding "
    "contentMediaType contentSchema $dynamicRef $dynamicAnchor $recursiveRef $recursiveAnchor".split()
)


class GrammarError(Exception):
    """An answer cannot go on in its grammar. The text carries nothing of the grammar and nothing of the answer."""


class Structures:
    """Grammars for one vocabulary.

    Args:
        tokenizer: the checkpoint's own.
        vocab_size: of the logits; a tokenizer may have tokens past it, which are never drawn.
        eos_token_ids: what a complete answer ends with.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._backend = tokenizer
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(eos_token_ids)
        self._lock = Lock()
        self._matchers: OrderedDict[str, LLMatcher] = OrderedDict()

    @cached_property
    def tokens(self) -> LLTokenizer:
        """The vocabulary as bytes; made when it is first needed, 0.2 s for 49,152 tokens."""
        plain = Tokenizer.from_str(self._backend.to_str())
        plain.no_padding()
        plain.no_truncation()
        n_vocab = max(self.vocab_size, plain.get_vocab_size(with_added_tokens=True))
        return LLTokenizer(plain.to_str(), n_vocab=n_vocab, eos_token=list(self.eos_token_ids))

    def compile_grammar(self, spec: StructuredOutputs, allowed_token_ids: Sequence[int] | None = None) -> str:
        """What an answer must match, as llguidance takes it. Bounded in size and in time.

        Args:
            allowed_token_ids: the only tokens that the answer may have besides, where there is such a bound.

        Raises:
            InvalidRequestError: it is not well formed, not supported, too large, or no answer can begin in it. The
                text echoes nothing of it.
        """
        name, grammar = _grammar(spec)
        if not self._is_compiled(grammar):
            # Only Lark's syntax can name tokens of the vocabulary.
            tokens = self.tokens if name == "grammar" else None
            is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar, tokens, limits=LIMITS)
            if is_error:
                raise _refused(name, _hint(name, messages[0]))
        try:
            start = AnswerMatcher(self, grammar, min_tokens=0, end_ids=(), answer=()).mask()
        except GrammarError:
            raise _refused(name, "No answer can match it, or it is too complex. Loosen or simplify it.") from None
        if not start.any() or (allowed_token_ids is not None and not start[list(allowed_token_ids)].any()):
            raise _refused(name, "No answer can begin with a token that the model has and 'allowed_token_ids' allows.")
        return grammar

    def _is_compiled(self, grammar: str) -> bool:
        with self._lock:
            return grammar in self._matchers

    def matcher(self, grammar: str) -> LLMatcher:
        """One at the grammar's start; the last grammars are kept compiled."""
        with self._lock:
            matcher = self._matchers.get(grammar)
        # Not under the lock: no other answer waits for this grammar.
        matcher = matcher or LLMatcher(self.tokens, grammar, log_level=0, limits=LIMITS)
        with self._lock:
            self._matchers[grammar] = matcher
            self._matchers.move_to_end(grammar)
            if len(self._matchers) > MAX_CACHED_GRAMMARS:
                self._matchers.popitem(last=False)
            return matcher.deep_copy()


class AnswerMatcher:
    """One answer's place in its grammar.

    Args:
        end_ids: tokens that end an answer: none of them is allowed before `min_tokens`, unless the grammar is complete.
        answer: the tokens there are already, of an answer that was preempted.

    Raises:
        GrammarError: the grammar cannot be used with this vocabulary, or the answer does not match it.
    """

    def __init__(
        self, structures: Structures, grammar: str, *, min_tokens: int, end_ids: Sequence[int], answer: Sequence[int]
    ) -> None:
        self._matcher = structures.matcher(grammar)
        self._vocab_size = structures.vocab_size
        self._min_tokens = min_tokens
        self._end_ids = np.array([token for token in end_ids if token < self._vocab_size], dtype=np.int64)
        self._length = 0
        for token in answer:
            self.advance(token)

    def advance(self, token: int) -> None:
        """Takes in a token that was drawn.

        Raises:
            GrammarError: it is not allowed here.
        """
        self._length += 1
        # A complete answer takes no more than its end.
        if not self._matcher.is_stopped() and not self._matcher.consume_token(token):
            raise GrammarError("a token that the grammar does not allow")
        self._check()

    def mask(self) -> np.ndarray:
        """The tokens that may come next, bool `[vocab_size]`.

        Raises:
            GrammarError: llguidance's limits are passed, or there are none.
        """
        self._check()
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed: np.ndarray = np.unpackbits(packed, bitorder="little")[: self._vocab_size].view(bool)
        if self._length < self._min_tokens:
            longer = allowed.copy()
            longer[self._end_ids] = False
            allowed = longer if longer.any() else allowed
        return allowed

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError("llguidance cannot go on")


def _grammar(spec: StructuredOutputs) -> tuple[str, str]:
    """The name of the field that is given, and its grammar, of a bounded size."""
    if spec.json_object:
        return "json_object", _of_schema({"type": "object"})
    if spec.json is not None:
        return "json", _of_schema(_schema(spec.json))
    if spec.regex is not None:
        _check_size("regex", spec.regex)
        # A digit is one of ten, as in a JSON schema's patterns; Unicode has hundreds.
        return "regex", LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(spec.regex, 'd')}/")
    if spec.choice is not None:
        texts = tuple(spec.choice)
        if not texts or not all(texts):
            raise _refused("choice", "Give at least one text, and none that is empty.")
        choices = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        _check_size("choice", choices)
        return "choice", LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}")
    assert spec.grammar is not None
    _check_size("grammar", spec.grammar)
    brackets = sum(map(spec.grammar.count, "([{"))
    if spec.grammar.count(":") > MAX_LARK_COLONS or brackets > MAX_LARK_BRACKETS:
        raise _refused("grammar", f"It may have {MAX_LARK_COLONS} colons and {MAX_LARK_BRACKETS} opening brackets.")
    return "grammar", LLMatcher.grammar_from_lark(spec.grammar)


def _of_schema(schema: Mapping[str, Any]) -> str:
    try:
        # `overrides` has the last word: a schema may not switch checks off by its `x-guidance`.
        return LLMatcher.grammar_from_json_schema(
            dict(schema),
            overrides={"lenient": False, "whitespace_flexible": True, "whitespace_pattern": WHITESPACE},
        )
    except ValueError:
        raise _refused("json", "It has a number that is out of range: whole numbers have 64 bits.") from None


def _schema(given: str | Mapping[str, Any]) -> dict[str, Any]:
    """A schema, checked for what llguidance does not check in time."""
    try:
        if isinstance(given, str):
            _check_size("json", given)
            given = json.loads(given)
        # Text may spell out what is no JSON for llguidance: NaN, half of a surrogate pair.
        text = json.dumps(given, ensure_ascii=False, allow_nan=False)
        _check_size("json", text)
        schema = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        raise _refused("json", "It is not a JSON document of a moderate depth.") from None
    if not isinstance(schema, dict):
        raise _refused("json", "It is not an object.")
    parts, depth, references = 0, 0, set[str]()
    for value, level in _walk(schema):
        depth = max(depth, level)
        parts += isinstance(value, dict | bool)
        if isinstance(value, dict):
            references.update(target for key in ("$ref", "$dynamicRef") if isinstance(target := value.get(key), str))
    if depth > MAX_SCHEMA_DEPTH or parts > MAX_SCHEMA_PARTS or (len(references) + 1) * depth > MAX_REFERENCE_DEPTH:
        raise _refused(
            "json",
            f"It may be {MAX_SCHEMA_DEPTH} levels deep and have {MAX_SCHEMA_PARTS} parts, and its references times "
            f"its depth may be {MAX_REFERENCE_DEPTH}.",
        )
    return schema


def _walk(document: Any) -> Iterator[tuple[Any, int]]:
    """Every value of a JSON document, with how many arrays and objects it is in, itself included."""
    todo = [(document, 1)]
    while todo:
        value, level = todo.pop()
        yield value, level
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        todo += [(one, level + isinstance(one, dict | list)) for one in inner]


def _check_size(name: str, text: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise _refused(name, "It is not valid Unicode.") from None
    if size > MAX_GRAMMAR_BYTES:
        raise _refused(name, f"It has {size} bytes; {MAX_GRAMMAR_BYTES} are allowed.")


def _hint(name: str, message: str) -> str:
    """What is wrong, from llguidance's own words, which echo the grammar: only what is known to be none of it."""
    if message.startswith("Unimplemented keys:") and (keys := _KEYWORDS.intersection(re.findall(r"[$\w]+", message))):
        return f"These keywords are not supported: {', '.join(sorted(keys))}."
    if re.search(r"too (big|large|deep|many|complex)|fuel exhausted|limit exceeded|level exceeded", message):
        return "It is too large or too complex."
    if name == "grammar" and (place := re.match(r"(\d{1,6})\((\d{1,6})\)", message)):
        return f"See line {place[1]}, column {place[2]}."
    return {
        "json": "It is not a valid JSON schema, no value satisfies it, or it uses what is not supported.",
        "regex": "Check its syntax; look-around, back-references and word boundaries are not supported.",
    }.get(name, "Check its syntax.")


def _refused(name: str, reason: str) -> InvalidRequestError:
    what = {"json": "JSON schema", "json_object": "JSON object", "regex": "regular expression"}.get(name, name)
    return InvalidRequestError(f"The {what} cannot be used. {reason}", param="structured_outputs")

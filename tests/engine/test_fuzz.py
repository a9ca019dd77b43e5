"""The scheduler under whatever comes: requests of every kind, aborts, full caches, faults. After every step its books
agree with themselves and with a runner that believes them, and in the end everybody has a whole answer.

Rows 2, 4, 6 and 10 of the weaknesses in engines.md are invariants here.
"""

from collections import defaultdict

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.engine.books import Machine, assert_books_agree, assert_empty, fake_logprobs
from tests.engine.requests import image, request
from vlm_serve.config import EngineConfig
from vlm_serve.engine.batch import Failure, StepResult
from vlm_serve.engine.scheduler import Scheduler
from vlm_serve.errors import InvalidRequestError
from vlm_serve.types import FinishReason, Request, TokenOutput

MAX_MODEL_LEN = 48
EOS, STOP = 2, 1


def arrival(head, length, images, both_ways, prefix, max_tokens, n, adapter, tenant, priority, kind, ends, min_tokens):
    """A request that has yet to get its name. Images that attend both ways are longer than the smaller budgets."""
    size = 8 if both_ways else 6
    return lambda name: request(
        name,
        [(head + at) % 3 for at in range(length)],
        images=[
            (2 + 9 * at, image(seed, size, attends_both_ways=both_ways))
            for at, seed in enumerate(images)
            if 2 + 9 * at + size <= length
        ],
        max_tokens=max_tokens,
        n=n,
        adapter=adapter,
        salt=tenant,
        tenant=tenant,
        priority=priority,
        pooling=kind == "pooling",
        both_ways_prefix=min(prefix, length),
        **({kind: 0} if kind.endswith("logprobs") else {}),
        min_tokens=min(min_tokens, max_tokens),
        **ends,
    )


ARRIVALS = st.builds(
    arrival,
    head=st.integers(0, 1),
    length=st.one_of(st.integers(1, 12), st.integers(1, 40)),
    images=st.lists(st.integers(0, 4), max_size=3),
    both_ways=st.booleans(),
    prefix=st.sampled_from([0, 0, 0, 11, MAX_MODEL_LEN]),  # none, up to the second image, all of the prompt
    max_tokens=st.integers(1, 24),
    n=st.sampled_from([1, 1, 1, 2, 4]),
    adapter=st.sampled_from([None, None, "x", "y", "z"]),
    tenant=st.sampled_from(["", "", "a"]),
    priority=st.sampled_from([0, 0, 0, -1, 1]),
    kind=st.sampled_from(["plain", "plain", "plain", "pooling", "prompt_logprobs", "logprobs"]),
    ends=st.sampled_from([{}, {}, {}, {"eos": (EOS,)}, {"stop_token_ids": (STOP,)}]),
    min_tokens=st.sampled_from([0, 0, 3]),
)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        seed=st.integers(0, 2**32),
        spare_blocks=st.sampled_from([0, 0, 2, 12]),
        windows=st.sampled_from([(None,), (None,), (None, 6), (5,)]),
        rows=st.sampled_from([1, 3, 6, 6]),
        budget=st.sampled_from([6, 6, 8, 20]),
        encoder_cache=st.sampled_from([6, 15, 15, 30]),
        encoder_budget=st.sampled_from([3, 12]),
        adapters=st.sampled_from([1, 2, 2]),
        caching=st.booleans(),
        drafts=st.sampled_from([0, 3, 3]),
        stretches_from=st.sampled_from([None, None, 20]),
        image_adapters=st.sets(st.sampled_from(["x", "y"])),
    )
    def build(
        self,
        seed,
        spare_blocks,
        windows,
        rows,
        budget,
        encoder_cache,
        encoder_budget,
        adapters,
        caching,
        drafts,
        stretches_from,
        image_adapters,
    ):
        config = EngineConfig(
            block_size=4,
            max_num_seqs=rows,
            max_num_batched_tokens=budget,
            max_encoder_tokens=encoder_budget,
            encoder_cache_tokens=encoder_cache,
            enable_prefix_caching=caching,
            speculative_tokens=drafts,
            max_adapters=adapters,
        )
        num_blocks = len(windows) * MAX_MODEL_LEN // 4 + spare_blocks
        self.one = Scheduler(
            config,
            num_blocks=num_blocks,
            max_model_len=MAX_MODEL_LEN,
            windows=windows,
            stretches_from=stretches_from,
            image_adapters=image_adapters,
        )
        self.machine = Machine(self.one, seed)
        self.requests: dict[str, Request] = {}
        self.outputs: dict[tuple[str, int], list[TokenOutput]] = defaultdict(list)
        self.dropped: set[tuple[str, int]] = set()

    @rule(several=st.lists(ARRIVALS, min_size=1, max_size=5))
    def add(self, several):
        for arrival in several:
            made = arrival(str(len(self.requests)))
            try:
                self.one.add(made)
            except InvalidRequestError:
                largest = max((span.inputs.num_tokens for span in made.images), default=0)
                together = {s.inputs.digest: s.inputs for s in made.images if s.offset < made.both_ways_prefix}
                least = max(largest, sum(inputs.num_tokens for inputs in together.values()))
                is_too_long = len(made.token_ids) + made.sampling.max_tokens > MAX_MODEL_LEN
                assert is_too_long or least > self.one.images.capacity
            else:
                self.requests[made.request_id] = made

    def _alive(self) -> list[str]:
        return sorted(self.one._runs)

    @rule(choice=st.integers(0, 99), index=st.sampled_from([None, None, 0, 1]))
    @precondition(lambda self: self.one._runs)
    def abort(self, choice, index):
        name = self._alive()[choice % len(self._alive())]
        for sequence in self.one._runs[name].answers:
            if index in (None, sequence.index):
                self.dropped.add((name, sequence.index))
        self.one.abort(name, index)

    @rule(times=st.integers(1, 12))
    def step(self, times):
        for _ in range(times):
            if self.one.has_work:
                self._step()
                assert_books_agree(self.one)

    @rule()
    def a_step_fails_and_all_are_suspects(self):
        if batch := self.one.schedule():
            self.machine.lose(batch)
            self.one.suspect(batch)

    @rule()
    def a_step_fails_and_ends_its_requests(self):
        if batch := self.one.schedule():
            self.machine.lose(batch)
            self._take(self.one.fail(batch, "a fault"))

    @rule(choice=st.integers(0, 99))
    def one_answer_of_a_step_fails(self, choice):
        if batch := self.one.schedule():
            result = self.machine.run(batch)
            rows = batch.rows[batch.samples].tolist()
            if not rows:
                self._take(self.one.update(batch, result))
                return
            at = choice % len(rows)
            tokens, logprobs = list(result.tokens), list(result.logprobs)
            tokens[at], logprobs[at] = (), ()
            embeddings = {row: one for row, one in result.embeddings.items() if row != rows[at]}
            failed = StepResult(
                tuple(tokens),
                tuple(logprobs),
                result.prompt_logprobs,
                embeddings,
                failed={rows[at]: Failure("a fault")},
            )
            self._take(self.one.update(batch, failed))

    def _step(self) -> None:
        decoding = {sequence for sequence in self.one.running if sequence.remaining == 1}
        suspects = any(sequence.is_suspect for sequence in [*self.one.running, *self.one.waiting])
        batch = self.one.schedule()
        assert batch is not None, "work, and nothing granted"
        granted = {self.one._by_row[row] for row in batch.rows.tolist()}
        if not suspects:
            assert {sequence for sequence in decoding if sequence.row is not None} <= granted
        self._take(self.one.update(batch, self.machine.run(batch)))
        self.machine.assert_agrees()

    def _take(self, outputs: tuple[TokenOutput, ...]) -> None:
        for output in outputs:
            said = self.outputs[output.request_id, output.index]
            assert not (said and said[-1].finish_reason), "it speaks after its end"
            said.append(output)

    @invariant()
    def the_books_agree(self):
        if hasattr(self, "one"):
            assert_books_agree(self.one)

    def teardown(self):
        if not hasattr(self, "one"):
            return
        for _ in range(6_000):
            if not self.one.has_work:
                break
            self._step()
        assert_empty(self.one)
        for name, made in self.requests.items():
            self._assert_whole(name, made)

    def _assert_whole(self, name: str, made: Request) -> None:
        indices = range(1 if made.pooling else made.sampling.n)
        answers = [self.outputs[name, index] for index in indices if (name, index) not in self.dropped]
        if any(said and said[-1].finish_reason is FinishReason.ERROR for said in answers):
            return
        for said in answers:
            assert said
            assert said[-1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
            if made.pooling:
                assert said[-1].embedding is not None
                continue
            tokens = [token for output in said for token in output.token_ids]
            ends = set(made.eos_token_ids) | set(made.sampling.stop_token_ids)
            assert not ends.intersection(tokens[max(0, made.sampling.min_tokens - 1) : -1])
            assert 0 < len(tokens) <= made.sampling.max_tokens
            assert (len(tokens) == made.sampling.max_tokens) or tokens[-1] in ends
            may_stop = len(tokens) >= made.sampling.min_tokens and tokens[-1] in ends
            assert (said[-1].finish_reason is FinishReason.STOP) == may_stop
            if made.sampling.logprobs is not None:
                assert [entry.token_ids[0] for output in said for entry in output.logprobs] == tokens
        spoken = [output for index in indices for output in self.outputs[name, index]]
        if spoken:
            assert sum(output.queue_seconds is not None for output in spoken) == 1
        if spoken and made.sampling.prompt_logprobs is not None:
            (once,) = [output for output in spoken if output.queue_seconds is not None]
            expected = [fake_logprobs(token, at) for at, token in enumerate(made.token_ids) if at]
            assert list(once.prompt_logprobs) == expected


def fuzz(max_examples: int, *, derandomize: bool = True, shrink: bool = True) -> None:
    run_state_machine_as_test(
        SchedulerMachine,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=30,
            derandomize=derandomize,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        ),
    )


def test_no_load_leaks_a_block_shares_one_wrongly_or_leaves_a_request_without_its_answer():
    fuzz(150)


@pytest.mark.slow
def test_no_load_does_so_on_a_longer_look():
    fuzz(2_000, derandomize=False)

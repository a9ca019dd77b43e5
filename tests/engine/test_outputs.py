"""The last layer gives the hidden states that are needed, and those are what it gives when it gives them all."""

from dataclasses import replace

import pytest
import torch

from tests.checkpoints import make_llava
from tests.engine.adapters import make_adapter
from tests.engine.harness import Harness, picture
from vlm_serve.types import Request, SamplingParams, TokenOutput

REPEATING = (1, 30, 31, 32, 33, 30, 31, 32, 33, 30, 31, 32)


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    directory = tmp_path_factory.mktemp("adapters")
    model = make_llava(folder)
    make_adapter(model, directory / "chest", rank=4, seed=1, targets=r".*language_model.*_proj")
    return Harness(
        folder,
        adapters=directory,
        max_num_seqs=8,
        max_num_batched_tokens=24,
        enable_prefix_caching=False,
        speculative_tokens=3,
    )


@pytest.fixture
def sizes(harness):
    """How many tokens each step's last MLP took, by step."""
    found: list[int] = []
    mlp = harness.engine.runner.model.decoder.layers[-1].mlp
    handle = mlp.register_forward_hook(lambda module, arguments, out: found.append(len(arguments[0])))
    harness.engine.runner.run = harness._run_batch  # every position's logits are not looked at here
    yield found
    handle.remove()


def answers(harness: Harness, requests: list[Request], *, every_output: bool) -> dict[str, list[TokenOutput]]:
    head = harness.engine.runner._head
    if every_output:
        head.outputs = lambda batch: batch.counts
    outputs: dict[str, list[TokenOutput]] = {one.request_id: [] for one in requests}
    for one in requests:
        harness.engine.add(one)
    while harness.engine.has_work:
        for output in harness.engine.step().outputs:
            assert output.error is None, output.error
            outputs[output.request_id].append(output)
    vars(head).pop("outputs", None)
    return outputs


def test_what_is_needed_of_the_last_layer_is_what_it_gives_when_it_gives_everything(harness, sizes):
    chat = harness.chat(picture(1), "What is on the left side, and what is on the right one?")
    greedy = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True)
    digest = harness.store.get("chest").digest
    requests = [
        Request("image", chat.token_ids, greedy, chat.images),
        Request("adapter", chat.token_ids, replace(greedy, logprobs=1), chat.images, adapter=digest),
        Request("repeating", REPEATING, SamplingParams(max_tokens=40, allowed_token_ids=(30, 31), seed=1)),
        Request("logprobs", REPEATING, SamplingParams(max_tokens=3, temperature=0, logprobs=2, prompt_logprobs=1)),
        Request("long", tuple(range(3, 80)), greedy, adapter=digest),
        Request("sampled", REPEATING[:5], SamplingParams(max_tokens=6, temperature=1.3, seed=4, ignore_eos=True)),
        Request("pooled", REPEATING[:7], SamplingParams(), pooling=True),
    ]
    needed = answers(harness, requests, every_output=False)
    few, total = sum(sizes), harness.engine.stats.spec_accepted_tokens
    sizes.clear()
    whole = answers(harness, requests, every_output=True)
    assert total > 0, "no draft was accepted"
    assert few < sum(sizes)
    for name, outputs in whole.items():
        ours = needed[name]
        tokens, expected = ([token for one in each for token in one.token_ids] for each in (ours, outputs))
        assert tokens == expected, name
        for field in ("logprobs", "prompt_logprobs"):
            entries, wanted = ([entry for one in each for entry in getattr(one, field)] for each in (ours, outputs))
            assert [entry.token_ids for entry in entries] == [entry.token_ids for entry in wanted]
            for entry, other in zip(entries, wanted, strict=True):
                torch.testing.assert_close(torch.tensor(entry.logprobs), torch.tensor(other.logprobs))
    vector, expected_vector = (torch.from_numpy(each["pooled"][-1].embedding) for each in (needed, whole))
    torch.testing.assert_close(vector, expected_vector)


def test_a_prompts_tokens_leave_keys_and_values_alone_in_the_last_layer(harness, sizes):
    """Of a prompt in three chunks only the last token goes through the last MLP, and nothing of the first two."""
    request = Request("long", tuple(range(3, 73)), SamplingParams(max_tokens=1, temperature=0, ignore_eos=True))
    answers(harness, [request], every_output=False)
    assert sizes == [0, 0, 1]

"""An image whose encoder gives another number of tokens than its processor counted ends its own request alone."""

from pathlib import Path

import pytest

from tests.checkpoints import make_llava
from tests.engine.harness import Harness, picture
from vlm_serve.families.prompt import Prompt
from vlm_serve.types import FinishReason, ImageInputs, ImageSpan, Request, SamplingParams

QUESTION = "What does the image show?"
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)


def miscounted(prompt: Prompt, count: int) -> Prompt:
    """The same prompt with another count of placeholders for its only image."""
    (span,) = prompt.images
    inputs = ImageInputs.create(span.inputs.tensors, span.inputs.grid, count)
    placeholders = prompt.token_ids[span.offset : span.offset + 1] * count
    token_ids = (*prompt.token_ids[: span.offset], *placeholders, *prompt.token_ids[span.end :])
    return Prompt(token_ids, (ImageSpan(span.offset, inputs),))


@pytest.mark.parametrize("count", [15, 17], ids=["too few", "too many"])
def test_a_miscounted_image_is_the_fault_of_its_request_and_its_neighbours_finish(tmp_path: Path, count: int) -> None:
    make_llava(tmp_path)
    harness = Harness(tmp_path)
    prompts = [harness.chat(picture(seed), QUESTION) for seed in range(3)]
    expected = [run.token_ids for run in harness.run(*prompts, max_tokens=6, salt="undisturbed")]
    prompts[1] = miscounted(prompts[1], count)
    engine, answers = harness.engine, dict[str, list[int]]()
    for index, prompt in enumerate(prompts):
        harness._runs[str(index)] = type(harness._runs["0"])(prompt)
        engine.add(Request(str(index), prompt.token_ids, GREEDY, prompt.images))
    errors = []
    while engine.has_work:
        for output in engine.step().outputs:
            answers.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason is FinishReason.ERROR:
                errors.append(output)
    (error,) = errors
    assert (error.request_id, error.error_param) == ("1", "messages")
    assert f"gives 16 tokens for an image, of which its processor counts {count}" in str(error.error)
    assert [answers["0"], answers["2"]] == [expected[0], expected[2]]
    assert not answers["1"]
    assert engine.stats.kv_blocks_used == 0

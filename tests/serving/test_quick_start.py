"""What vLLM's quick start teaches runs here with only the import changed: its calls, and its results' shapes."""

import pytest

from tests.checkpoints import make_llava
from vlm_serve import LLM, SamplingParams

PROMPTS = ["The chest radiograph", "No effusion, no", "Is there a mass in the", "Compare with the study"]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_llava(folder)
    with LLM(model=str(folder), dtype="float32", max_model_len=256, enable_prefix_caching=True) as llm:
        yield llm


def test_generating_for_a_list_of_prompts(llm, capsys):
    params = SamplingParams(temperature=0.8, top_p=0.95)
    outputs = llm.generate(PROMPTS, params)
    for output in outputs:
        print(f"{output.prompt!r} goes on as {output.outputs[0].text!r}")
    told = capsys.readouterr().out.splitlines()
    assert [line.split(" goes on as ")[0] for line in told] == [repr(prompt) for prompt in PROMPTS]
    assert all(len(output.outputs) == 1 and output.finished for output in outputs)
    assert all(len(output.outputs[0].token_ids) <= 16 for output in outputs)


def test_the_defaults_need_no_parameters(llm):
    (output,) = llm.generate("The chest")
    assert 0 < len(output.outputs[0].token_ids) <= 16
    assert output.outputs[0].finish_reason in ("stop", "length")


def test_chatting_about_each_of_a_list_of_prompts(llm):
    conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=8))
    asked = {prompt: output.outputs[0].text for prompt, output in zip(PROMPTS, outputs, strict=True)}
    assert len(asked) == len(outputs) == 4


def test_a_conversation_with_a_system_message_and_turns(llm):
    conversation = [
        {"role": "system", "content": "You are a careful reader of radiographs."},
        {"role": "user", "content": "Is there a fracture?"},
        {"role": "assistant", "content": "No fracture."},
        {"role": "user", "content": "Compare with the study of 2019."},
    ]
    outputs = llm.chat(conversation, SamplingParams(max_tokens=5), use_tqdm=False)
    assert [output.outputs[0].index for output in outputs] == [0]


def test_the_tokenizers_own_template_gives_what_chat_asks(llm):
    """vLLM shows both ways; they must be the same request."""
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    texts = llm.get_tokenizer().apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
    by_text, by_chat = llm.generate(texts, greedy), llm.chat(conversations, greedy)
    for one, other in zip(by_text, by_chat, strict=True):
        assert one.prompt_token_ids == other.prompt_token_ids
        assert one.outputs[0].token_ids == other.outputs[0].token_ids


def test_prompts_as_dictionaries_and_as_token_ids(llm):
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    ids = llm.get_tokenizer()(PROMPTS[0]).input_ids
    prompts = [PROMPTS[0], {"prompt": PROMPTS[0]}, {"prompt_token_ids": ids}]
    outputs = llm.generate(prompts, greedy)
    assert [output.prompt_token_ids for output in outputs] == [ids] * 3
    assert [output.prompt for output in outputs] == [PROMPTS[0], PROMPTS[0], None]
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    assert llm.generate({"prompt_token_ids": ids}, greedy)[0].outputs[0].text == outputs[0].outputs[0].text


def test_embedding_a_list_of_prompts(llm):
    outputs = llm.embed(PROMPTS)
    assert [len(output.outputs.embedding) for output in outputs] == [64] * 4
    assert [output.outputs.hidden_size for output in outputs] == [64] * 4
    assert all(sum(x * x for x in output.outputs.embedding) == pytest.approx(1, abs=1e-5) for output in outputs)
    (alone,) = llm.embed(PROMPTS[2])
    assert alone.outputs.embedding == pytest.approx(outputs[2].outputs.embedding, abs=1e-5)
    assert outputs[0].outputs.embedding != pytest.approx(outputs[1].outputs.embedding, abs=1e-2)
    assert alone.prompt_token_ids == llm.get_tokenizer()(PROMPTS[2]).input_ids


def test_a_tool_that_the_model_is_told_of_and_its_result(tmp_path):
    """The calls of vLLM's example with tools, on a template that knows them."""
    make_llava(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for tool in tools or [] %}{{ tool.function.name }}: {{ tool.function.description }}\n{% endfor %}"
        "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content if m.content is string else m.content[0].text }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments.study }}){% endfor %}"
        "\n{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
    )
    tool = {
        "type": "function",
        "function": {
            "name": "prior_study",
            "description": "finds a study",
            "parameters": {"type": "object", "properties": {"study": {"type": "string"}}},
        },
    }
    call = {"id": "call12345", "type": "function", "function": {"name": "prior_study", "arguments": '{"study": "A7"}'}}
    messages = [
        {"role": "user", "content": "Compare with the study of 2019."},
        {"role": "assistant", "content": "One moment.", "tool_calls": [call]},
        {"role": "tool", "content": "clear lungs", "tool_call_id": "call12345"},
    ]
    params = SamplingParams(temperature=0, max_tokens=4)
    with LLM(tmp_path, dtype="float32", max_model_len=256) as llm:
        (first,) = llm.chat(messages[:1], params, tools=[tool])
        (then,) = llm.chat(messages, params, tools=[tool])
        (untold,) = llm.chat(messages[:1], params)
        decode = llm.get_tokenizer().decode
        assert "prior_study: finds a study" in decode(first.prompt_token_ids)
        assert "prior_study" not in decode(untold.prompt_token_ids)
        assert "prior_study(A7)<|turn|>tool\nclear lungs<|turn|>assistant" in decode(then.prompt_token_ids)


def test_an_answer_may_go_on_with_the_last_message(llm):
    conversation = [{"role": "user", "content": "Is there a mass?"}, {"role": "assistant", "content": "No mass in the"}]
    (output,) = llm.chat(
        conversation, SamplingParams(max_tokens=2), add_generation_prompt=False, continue_final_message=True
    )
    assert llm.get_tokenizer().decode(output.prompt_token_ids).endswith("No mass in the")

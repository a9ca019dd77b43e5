"""What vLLM's quick start teaches runs here with only the import changed: its calls, and its results' shapes."""

import json

import numpy as np
import pytest
import torch

from tests.checkpoints import make_llava
from vlm_serve import LLM, SamplingParams
from vlm_serve.config import EngineConfig
from vlm_serve.errors import CheckpointError, ConfigurationError
from vlm_serve.serving.vllm_arguments import engine_config

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


def test_the_progress_bar_is_left_out_by_position(llm, capsys):
    params = SamplingParams(max_tokens=2)
    assert llm.generate(PROMPTS[0], params, False)[0].finished
    assert llm.chat([{"role": "user", "content": PROMPTS[0]}], params, False)[0].finished
    assert capsys.readouterr().err == ""


def test_a_call_without_parameters_takes_what_the_model_recommends(tmp_path, llm):
    assert llm.get_default_sampling_params() == SamplingParams()  # it recommends nothing
    make_llava(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0, "repetition_penalty": 1.2, "top_k": None, "max_new_tokens": 5}))
    recommended = SamplingParams(temperature=0, repetition_penalty=1.2, max_tokens=5)
    with LLM(tmp_path, dtype="float32", max_model_len=256) as other:
        assert other.get_default_sampling_params() == recommended
        by_default, by_name = other.generate(PROMPTS), other.generate(PROMPTS, recommended)
        assert [out.outputs[0].token_ids for out in by_default] == [out.outputs[0].token_ids for out in by_name]


def test_a_recommendation_that_is_none_is_told_of_the_file(tmp_path):
    make_llava(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"temperature": "hot"}')
    with LLM(tmp_path, dtype="float32", max_model_len=256) as llm:
        assert llm.generate(PROMPTS[0], SamplingParams(max_tokens=1))[0].finished
        with pytest.raises(CheckpointError, match=r"generation_config\.json"):
            llm.generate(PROMPTS[0])


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


@pytest.mark.parametrize("made", [np.array, torch.tensor, tuple, lambda ids: [np.int64(token) for token in ids]])
def test_token_ids_may_come_from_an_array(llm, made):
    ids = llm.get_tokenizer()(PROMPTS[0]).input_ids
    (output,) = llm.generate({"prompt_token_ids": made(ids)}, SamplingParams(max_tokens=1))
    assert output.prompt_token_ids == ids
    assert all(type(token) is int for token in output.prompt_token_ids)


def test_settings_of_vllms_that_change_nothing_here_are_taken(tmp_path):
    make_llava(tmp_path)
    without_effect = {
        "gpu_memory_utilization": 0.9,
        "tensor_parallel_size": 1,
        "trust_remote_code": False,
        "enforce_eager": True,
        "swap_space": 4,
        "quantization": None,
        "max_num_seqs": None,
        "enable_prefix_caching": None,
    }
    with LLM(str(tmp_path), dtype="float32", device="cpu", max_model_len=256, **without_effect) as llm:
        assert llm.engine.scheduler.config == EngineConfig(max_model_len=256, enforce_eager=True)
        assert llm.generate(PROMPTS[0], SamplingParams(max_tokens=1))[0].finished


def test_a_seed_makes_the_draws_of_a_script_repeat(tmp_path):
    make_llava(tmp_path)

    def script(seed: int) -> list[list[int]]:
        params = SamplingParams(temperature=1.5, max_tokens=12, ignore_eos=True)
        with LLM(tmp_path, dtype="float32", max_model_len=256, seed=seed) as llm:
            outputs = llm.generate([PROMPTS[0]] * 2, params) + llm.generate(PROMPTS[0], params)
        return [output.outputs[0].token_ids for output in outputs]

    drawn = script(7)
    assert drawn == script(7) != script(8)
    assert len({tuple(ids) for ids in drawn}) == 3  # not the same draw for each


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size .* one device"),
        ({"trust_remote_code": True}, "trust_remote_code .* never run"),
        ({"quantization": "awq"}, "quantization .* dtype"),
        ({"enable_lora": True}, "enable_lora .* adapters=FOLDER"),
        ({"tokenizer": "other/model"}, "tokenizer .* folder"),
        ({"speculative_config": {"method": "ngram"}}, "speculative_tokens=N"),
        ({"kv_cache_memory": 2**30, "kv_cache_memory_bytes": 2**30}, "Give one of them"),
        ({"max_num_seq": 4}, "no setting 'max_num_seq'.* max_num_seqs"),
        ({"max_num_seqs": "many"}, "max_num_seqs must be a whole number"),
        ({"max_model_len": "2k"}, "max_model_len must be a whole number"),
        ({"kv_cache_memory": "2GiB"}, "kv_cache_memory in bytes must be a whole number"),
        ({"enable_prefix_caching": "yes"}, "enable_prefix_caching must be True or False"),
        ({"seed": "7"}, "seed must be a whole number"),
    ],
)
def test_a_setting_that_cannot_be_had_is_refused_with_what_to_use(given, told, tmp_path):
    with pytest.raises(ConfigurationError, match=told):
        LLM(tmp_path, device="cpu", **given)  # before it looks for the model, of which there is none


def test_a_share_of_the_gpus_memory_is_the_caches_share():
    assert engine_config({"gpu_memory_utilization": 0.6}, is_on_gpu=True).kv_cache_memory == 0.6
    whole = engine_config({"gpu_memory_utilization": 1}, is_on_gpu=True).kv_cache_memory
    assert isinstance(whole, float)  # 1 as a whole number would be a byte
    with pytest.raises(ConfigurationError, match="kv_cache_memory and gpu_memory_utilization are one setting"):
        engine_config({"kv_cache_memory": 0.5, "gpu_memory_utilization": 0.6}, is_on_gpu=True)
    assert engine_config({"gpu_memory_utilization": 0.6}, is_on_gpu=False).kv_cache_memory is None


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

"""`/metrics`: every name that dashboards read, and who may be told apart by it."""

import httpx

from api.metrics import MAX_TENANTS, Metrics
from tests.api.conftest import Scripted, text_body
from tests.api.scripted import Script, delta
from vlm_serve.types import EngineStats, FinishReason, StepOutput

STOP = FinishReason.STOP
CHAT = "/v1/chat/completions"


def test_an_embedding_is_a_request_in_the_metrics(scripted: Scripted) -> None:
    def figures() -> dict[str, float]:
        lines = scripted.http.get("/metrics").text.splitlines()
        told = [line.rpartition(" ") for line in lines if 'adapter="thorax"' in line]
        return {name.partition("{")[0]: float(value) for name, _, value in told if "_bucket" not in name}

    before = figures()
    scripted.http.post("/v1/embeddings", json={"model": "thorax", "input": ["a", "abc"]})
    grown = {name.removeprefix("vlm_serve:"): value - before.get(name, 0) for name, value in figures().items()}
    assert grown["prompt_tokens_total"] == grown["request_prompt_tokens_sum"] == 14
    assert grown["request_success_total"] == grown["e2e_request_latency_seconds_count"] == 2
    assert grown["e2e_request_latency_seconds_sum"] > 0
    assert 'waiting_lora_adapters=""' in _lora(scripted)


NAMES = """num_requests_running num_requests_waiting kv_cache_usage_perc lora_requests_info prefix_cache_queries_total
prefix_cache_hits_total mm_cache_queries_total mm_cache_hits_total num_preemptions_total prompt_tokens_total
generation_tokens_total request_success_total time_to_first_token_seconds_count inter_token_latency_seconds_count
request_time_per_output_token_seconds_count e2e_request_latency_seconds_count request_queue_time_seconds_count
request_prefill_time_seconds_count request_decode_time_seconds_count request_prompt_tokens_count
request_generation_tokens_count iteration_tokens_total_count encoder_batch_images_count encoder_seconds_count
kv_waste_ratio spec_decode_num_draft_tokens_total spec_decode_num_accepted_tokens_total engine_restarts_total
image_decode_seconds_count image_preprocess_seconds_count adapter_load_seconds_count""".split()


def test_every_name_that_dashboards_read_is_there(scripted: Scripted) -> None:
    seconds = {"queue_seconds": 0.25, "prefill_seconds": 0.5}
    scripted.llm.script = Script([delta("a", 1, **seconds), delta("b", 2, STOP)])
    for told in scripted.llm.steps:
        told(StepOutput((), num_tokens=96, images_encoded=2, encoder_seconds=0.02))
    scripted.chat()
    text = scripted.http.get("/metrics").text
    found = {line.partition("{")[0].removeprefix("vlm_serve:") for line in text.splitlines() if line[0] != "#"}
    assert set(NAMES) <= found
    assert 'vlm_serve:kv_waste_ratio{model_name="base"} 0.1' in text
    assert 'vlm_serve:spec_decode_num_accepted_tokens_total{model_name="base"} 20.0' in text


def test_an_adapter_with_a_request_under_way_is_told_and_then_no_more(scripted: Scripted) -> None:
    scripted.llm.script = Script([delta("a", 1)], hold=True)
    with scripted.http.stream("POST", "/v1/chat/completions", json=text_body(model="thorax", stream=True)) as response:
        pieces = response.iter_text()  # the name keeps it open
        assert any('"content":"a"' in piece for piece in pieces)
        assert 'running_lora_adapters="thorax",waiting_lora_adapters=""' in _lora(scripted)
    assert scripted.llm.run_closed.wait(10)
    assert 'running_lora_adapters=""' in _lora(scripted)


def _lora(scripted: Scripted) -> str:
    lines = httpx.get(f"{scripted.url}/metrics").text.splitlines()
    return next(line for line in lines if line.startswith("vlm_serve:lora_requests_info{"))


def test_tenants_past_the_bound_share_a_label() -> None:
    tenants = [f"t{number}" for number in range(MAX_TENANTS + 2)]
    metrics = Metrics(EngineStats, lambda: 0, "base", adapter_slots=8, tenants=tenants)
    for tenant in ("t0", f"t{MAX_TENANTS}", f"t{MAX_TENANTS + 1}", "forged"):
        metrics.request("", tenant).admitted(7)
    text = metrics.exposition().decode()
    assert 'vlm_serve:prompt_tokens_total{adapter="",model_name="base",tenant="t0"} 7.0' in text
    assert 'vlm_serve:prompt_tokens_total{adapter="",model_name="base",tenant="other"} 21.0' in text
    assert "forged" not in text

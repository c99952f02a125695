"""The mmproj of `mmpeft export --to gguf`: the encoder and the projector of a finetune, as llama.cpp reads them."""

import base64
import io
import shutil
from dataclasses import asdict

import httpx
import pytest
import timm
import torch
from gguf import MODEL_ARCH, GGUFReader, GGUFWriter, get_tensor_name_map
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, SiglipVisionConfig, SiglipVisionModel

import mmpeft
from mmpeft.adapters import LoraConfig
from mmpeft.cli import main
from mmpeft.data.images import ImageConfig
from mmpeft.data.spans import IMAGE_TOKEN
from mmpeft.errors import RefusedError
from mmpeft.models.build import build_model
from mmpeft.models.vision import VisionConfig, VisionEncoder, check_size
from mmpeft.runs.export import export_run
from mmpeft.runs.files import language_of, load_run, save_run
from mmpeft.runs.gguf_file import finish_gguf
from mmpeft.runs.manifest import read_manifest, write_manifest
from mmpeft.runs.mmproj_gguf import _add_sizes, _as_mlp, require_mmproj, write_mmproj
from mmpeft.runs.siglip_graph import SiglipGraph, _named
from tests.runs.llama_cpp import LlamaCpp, greedy_here, write_base
from tests.runs.llama_mtmd import AUTO_FLASH, NO_FLASH, Mtmd
from tests.runs.tiny_vits import SIZES, save_weights
from tests.tiny import BOS, make_record

QUESTION = "what color is it?"


def noise(width, height, seed=0):
    """An RGB image with edges and colours."""
    small = torch.randint(256, (3, 5, 7), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    large = F.interpolate(small[None].float(), (height, width), mode="bilinear")[0].round().byte()
    return Image.fromarray(large.permute(1, 2, 0).numpy())


@pytest.fixture(scope="module")
def make_encoder(tmp_path_factory):
    """A tiny encoder with random weights."""

    def make(name="tiny_siglip", **changes):
        path = tmp_path_factory.mktemp(name) / "vision.safetensors"
        save_weights(timm.create_model(name, num_classes=0), path)
        return VisionEncoder(VisionConfig(name, str(path), **{"fit": "pad"} | changes))

    return make


@pytest.fixture(scope="module")
def projector():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, SIZES["embed_dim"], generator=generator) / 20
    return {"weight": weight, "bias": torch.randn(64, generator=generator) / 10}


@pytest.fixture(scope="module")
def run(tiny_run, make_encoder, projector, randomise, tmp_path_factory):
    """A run whose encoder is a tiny SigLIP, with one LoRA far from its base."""
    manifest = read_manifest(tiny_run)
    manifest.vision = asdict(make_encoder().config)
    model = build_model(language_of(tiny_run, manifest), manifest.vision_config)
    model.bank.add("own", LoraConfig(rank=4, alpha=8))
    randomise(model.bank, "own")
    model.projector.fill(projector)
    manifest.identity |= {"vision": model.vision_encoder.fingerprint}
    directory = tmp_path_factory.mktemp("mmproj") / "run"
    save_run(directory, manifest, model)
    return directory


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    return export_run(run, "gguf", "own", tmp_path_factory.mktemp("exported") / "out", square_images=True)


def tensors_of(path):
    return {tensor.name: torch.tensor(tensor.data) for tensor in GGUFReader(path).tensors}


def test_the_file_says_what_llama_cpp_asks_for(exported):
    reader = GGUFReader(exported.directory / "mmproj-own.gguf")
    facts = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF")}
    assert facts == {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "general.name": "own",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "janus_pro",
        "clip.use_gelu": True,
        "clip.vision.image_size": 64,
        "clip.vision.patch_size": 16,
        "clip.vision.embedding_length": 48,
        "clip.vision.feed_forward_length": 144,
        "clip.vision.block_count": 3,
        "clip.vision.projection_dim": 64,
        "clip.vision.attention.head_count": 4,
        "clip.vision.attention.layer_norm_epsilon": pytest.approx(1e-6),
        "clip.vision.image_mean": [0.5, 0.5, 0.5],
        "clip.vision.image_std": [0.5, 0.5, 0.5],
    }
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32"}


def as_siglip(tensors, blocks):
    """transformers' SigLIP with the file's tensors, by the names that llama.cpp's converter gives transformers'."""
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 144,
        "num_attention_heads": 4,
        "num_hidden_layers": blocks,
    }
    pixels = {"image_size": 64, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "vision_use_head": False}
    siglip = SiglipVisionModel(SiglipVisionConfig(**sizes, **pixels)).eval()
    names = get_tensor_name_map(MODEL_ARCH.MMPROJ, blocks)
    state = {}
    for key in siglip.state_dict():
        whole = f"vision_tower.vision_model.{key.removeprefix('vision_model.')}"
        state[key] = tensors[names.get_name(whole, try_suffixes=(".weight", ".bias"))]
    siglip.load_state_dict(state)
    return siglip


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny_tanh", "tiny_siglip"])
def test_transformers_siglip_makes_the_same_of_it(make_encoder, projector, tmp_path, name):
    encoder = make_encoder(name)
    write_mmproj(tmp_path / "a.gguf", "own", encoder, projector)
    tensors = tensors_of(tmp_path / "a.gguf")
    pixels = encoder.transform(noise(64, 64))[None]
    want = encoder(pixels)
    features = as_siglip(tensors, 3)(pixels).last_hidden_state
    limit = 1e-5 if name == "tiny_tanh" else 5e-3  # two forms of GELU
    assert (features - want).norm() < limit * want.norm()
    up = F.linear(want, tensors["mm.0.weight"], tensors["mm.0.bias"])
    got = F.linear(F.gelu(up, approximate="tanh"), tensors["mm.1.weight"], tensors["mm.1.bias"])
    torch.testing.assert_close(
        got, F.linear(want, projector["weight"], projector["bias"]), rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_an_earlier_layer_has_fewer_blocks_and_no_last_norm(make_encoder, projector, tmp_path):
    encoder = make_encoder("tiny_tanh", layer=1)
    write_mmproj(tmp_path / "a.gguf", "own", encoder, projector)
    tensors = tensors_of(tmp_path / "a.gguf")
    assert {name.split(".")[2] for name in tensors if name.startswith("v.blk.")} == {"0", "1"}
    assert not [name for name in tensors if name.startswith("v.post_ln")]
    siglip = as_siglip(tensors | {"v.post_ln.weight": torch.ones(48), "v.post_ln.bias": torch.zeros(48)}, 2)
    layers = next(module for name, module in siglip.named_modules() if name.endswith("encoder.layers"))
    seen = []
    layers[-1].register_forward_hook(lambda _, __, output: seen.append(output))
    pixels = encoder.transform(noise(64, 64))[None]
    siglip(pixels)
    last = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    torch.testing.assert_close(last, encoder(pixels), rtol=1e-4, atol=1e-4)


def test_the_command_says_how_both_files_are_given(run, tmp_path, capsys):
    main(["export", "--run", str(run), "--to", "gguf", "--square_images", "--output", str(tmp_path / "out")])
    told = capsys.readouterr().out
    files = (
        f"--lora {tmp_path / 'out' / 'adapter.gguf'} --mmproj {tmp_path / 'out' / 'mmproj-own.gguf'}, with"
    )
    assert f"llama-server --model BASE.gguf {files}" in told
    assert "images in llama.cpp: give it squares alone" in told


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("tiny_clip", {}, r"it has a class token, which llama.cpp puts behind the patches .*llama.cpp#25814"),
        ("tiny_registers", {}, "llama.cpp's SigLIP has no place for its reg_token"),
        ("tiny_scaled", {}, "has no place for its blocks.0.ls1.gamma"),
        ("tiny_quick", {}, "its activation is QuickGELU, and llama.cpp's SigLIP has GELU"),
        ("tiny_rms", {}, "its norms are RmsNorm, and llama.cpp's are LayerNorm"),
        ("tiny_placeless", {}, "it has no learned position embedding"),
        ("tiny_oblong", {}, r"its patches of \(16, 8\) in steps of \(16, 8\) are no squares side by side"),
        ("test_convnext", {}, "it is a ConvNeXt, and of encoders behind one linear projection llama.cpp"),
        ("tiny_siglip", {"pooling": "average"}, "vision.pooling is average, and llama.cpp pools no patches"),
        ("tiny_siglip", {"fit": "tile"}, "vision.fit is tile, and llama.cpp makes one square"),
        ("tiny_cut", {"fit": "crop"}, "resizes to 71 pixels and cuts out 64, and llama.cpp cuts nothing"),
        ("tiny_bilinear", {}, "its transform resizes by bilinear, and llama.cpp is bicubic there"),
        (
            "tiny_siglip",
            {"image": ImageConfig(scale="percentile")},
            "image.scale is percentile, and llama.cpp reads pixels of 8 bits",
        ),
    ],
)
def test_what_llama_cpp_does_otherwise_is_refused_by_name(name, changes, reason):
    encoder = VisionEncoder(VisionConfig(name, **{"fit": "pad"} | changes), load_weights=False)
    told = f"'own' reads images through a projector behind timm's {name}, .* --text_only .* The reason: .*{reason}"
    with pytest.raises(RefusedError, match=told):
        require_mmproj(encoder, "own", square_images=True)


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_squares_are_to_be_promised(fit):
    encoder = VisionEncoder(VisionConfig("tiny_siglip", fit=fit), load_weights=False)
    require_mmproj(encoder, "own", square_images=True)
    with pytest.raises(RefusedError, match=f"vision.fit is {fit}; --square_images writes it for images that"):
        require_mmproj(encoder, "own", square_images=False)


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_256.webli", "vit_so400m_patch14_siglip_224.webli"])
def test_siglips_of_timm_fit(name):
    require_mmproj(check_size(VisionConfig(name, fit="pad")), "own", square_images=True)


def test_layers_that_compute_something_else_are_refused(make_encoder, projector, tmp_path, monkeypatch):
    encoder = make_encoder()
    encoder.model.blocks[1].attn.scale = 0.1
    encoder.model.blocks[1].attn.fused_attn = False
    with pytest.raises(
        RefusedError, match=r"computes something else: features of a noise image differ by 0\.\d"
    ):
        write_mmproj(tmp_path / "a.gguf", "own", encoder, projector)
    assert not (tmp_path / "a.gguf").exists()


def test_another_encoder_is_refused_and_nothing_written(run, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    manifest = read_manifest(run)
    own = load_file(manifest.vision["weights"])
    save_file(own | {"pos_embed": own["pos_embed"] + 1}, tmp_path / "other.safetensors")
    manifest.vision["weights"] = str(tmp_path / "other.safetensors")
    write_manifest(run, manifest)
    with pytest.raises(RefusedError, match=r"does not belong to this base:\n  vision.weights: "):
        export_run(run, "gguf", "own", tmp_path / "out", square_images=True)
    assert not (tmp_path / "out").exists()


def test_squares_are_promised_of_images_alone(run, tmp_path):
    for to, text_only in (("vllm", False), ("gguf", True)):
        with pytest.raises(
            RefusedError, match="--square_images is for --to gguf with images, and this is --to "
        ):
            export_run(run, to, "own", tmp_path / "out", text_only, square_images=True)


@pytest.fixture(scope="module")
def base(run, tmp_path_factory):
    """The run's language model as GGUF."""
    pytest.importorskip("xllamacpp", reason="llama.cpp's server: pip install xllamacpp")
    name, path = language_of(run, read_manifest(run)).name, tmp_path_factory.mktemp("base") / "base.gguf"
    write_base(path, AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name), "llama")
    return path


def share(got, want):
    """The difference of two tensors as a share of the second's size."""
    return float((got - want).norm() / want.norm())


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("flash", "limit"), [(NO_FLASH, 1e-3), (AUTO_FLASH, 2e-3)])
@pytest.mark.parametrize("name", ["tiny_tanh", "tiny_siglip", "tiny_pre_norm"])
def test_llama_cpp_makes_the_same_embeddings(base, make_encoder, projector, tmp_path, name, flash, limit):
    encoder = make_encoder(name)
    write_mmproj(tmp_path / "a.gguf", "own", encoder, projector)
    mtmd = Mtmd(base, tmp_path / "a.gguf", 64, flash)
    for number, side in enumerate((64, 150, 23)):
        image = noise(side, side, seed=number)
        features = encoder(encoder.transform(image)[None])[0]
        want = F.linear(features, projector["weight"], projector["bias"])
        assert share(mtmd.embeddings(image), want) < limit, side


@pytest.mark.slow
@torch.no_grad()
def test_llama_cpp_answers_as_the_finetune_does(run, exported, base):
    folder = exported.directory
    server = LlamaCpp(base, folder / "adapter.gguf", folder / "mmproj-own.gguf")
    marker = httpx.get(f"{server.server.listening_address}/props").json()["media_marker"]
    model, template, _ = load_run(run)
    vlm = mmpeft.load(str(run), device="cpu")
    answers = []
    for seed in range(3):
        image = noise(64, 64, seed)
        features = model.vision_encoder(model.vision_encoder.transform(image)[None])
        seen = model.projector(features, torch.zeros(1, dtype=torch.long), torch.float32)[0]

        def logits(ids, seen=seen):
            embeds = model.language_model.get_input_embeddings()(ids.clamp(min=0))
            embeds[ids == IMAGE_TOKEN] = seen
            model.bank.route(["own"])
            return model.language_model(inputs_embeds=embeds).logits

        prompt = template.encode_prompt(make_record(QUESTION, None, [image], task="vqa")).ids
        here, first = greedy_here(logits, prompt, 12, template.tokenizer.eos_token_id)
        file = io.BytesIO()
        image.save(file, "PNG")
        text = f"{BOS}[INST] <Img>{marker}</Img> [vqa] {QUESTION} [/INST]"
        given = {"prompt_string": text, "multimodal_data": [base64.b64encode(file.getvalue()).decode()]}
        tokens, likely = server.greedy(given, 12)
        assert tokens == here
        for token, logprob in likely.items():
            assert logprob == pytest.approx(first[token].item(), abs=5e-3)
        answers.append(vlm.ask(image, QUESTION, "own", max_new_tokens=12))
        assert answers[-1] == template.decode(tokens)
    assert len(set(answers)) > 1, "the image changes the answer"


def write_clip(path, encoder, projector):
    """An encoder with a class token for llama.cpp's LLaVA graph, as its own converter writes CLIP's."""
    state = encoder.model.state_dict()
    tensors, unknown = _named(encoder)
    assert unknown == ["cls_token"]
    mlp = _as_mlp(projector)
    mlp |= {f"mm.2.{part}": mlp.pop(f"mm.1.{part}") for part in ("weight", "bias")}
    writer = GGUFWriter(path, "clip")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    _add_sizes(writer, encoder, SiglipGraph(tensors, 3, 4, 1e-6), 64)
    writer.add_array("clip.vision.feature_layer", [3])
    finish_gguf(writer, tensors | mlp | {"v.class_embd": state["cls_token"][0, 0]})


@pytest.mark.slow
@torch.no_grad()
def test_llama_cpp_still_misplaces_class_tokens(base, make_encoder, projector, tmp_path):
    """Once this fails, `CLASS_TOKEN` may have become untrue."""
    encoder = make_encoder("tiny_clip")
    write_clip(tmp_path / "a.gguf", encoder, projector)
    image, model = noise(64, 64), encoder.model
    pixels = encoder.transform(image)[None]
    behind = torch.cat([model.patch_embed(pixels), model.cls_token], dim=1) + model.pos_embed
    misplaced = model.norm(model.blocks(model.norm_pre(behind)))[0, 1:]
    got = Mtmd(base, tmp_path / "a.gguf", 64).embeddings(image)
    assert share(got, F.linear(misplaced, projector["weight"], projector["bias"])) < 5e-3
    assert share(got, F.linear(encoder(pixels)[0], projector["weight"], projector["bias"])) > 0.1

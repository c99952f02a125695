"""What the GPU cases measure on: random weights in the shapes of known models, and batches of random questions."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.models import METHODS, fill, names, one_after_the_other, peft_of
from benchmarks.race import Race, Run
from mmpeft.data.batch import Batch, collate, concatenate
from mmpeft.data.packing import pack
from mmpeft.data.template import IGNORE_INDEX, IMAGE_TOKEN, Encoded
from mmpeft.models.language import pick_attention
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.projector import Projector
from mmpeft.models.vision import VisionEncoder
from mmpeft.models.vision_config import VisionConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DENSE_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "4090": 165}
"""Of bf16 without sparsity, by a part of the device's name; NVIDIA's data sheets."""
LLAMA: dict[str, dict[str, int]] = {
    "1.2B": {
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256},
    },
    "7B": {
        **{"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32_000},
    },
    "tiny": {
        **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512},
    },
}
VIT = {
    256: VisionConfig("vit_large_patch14_clip_224", layer=-2, image_size=224),
    576: VisionConfig("vit_large_patch14_clip_336", layer=-2, image_size=336),
    4: VisionConfig("test_vit", image_size=32),
}
"""Image tokens -> an encoder that gives so many."""
QUESTION, ANSWER = 24, 12
"""Tokens of a question and of its answer, of which the answer carries loss."""


@dataclass
class Shape:
    """What a case is measured on."""

    size: str
    """Of `LLAMA`."""
    image_tokens: int
    questions: int
    """Of an image, each with its answer."""
    images: int
    """Of a step."""
    quantised: bool = False

    @property
    def asked(self) -> int:
        """Questions of a step."""
        return self.questions * self.images

    def __str__(self) -> str:
        held = "NF4" if self.quantised else "bf16"
        each = "1 question" if self.questions == 1 else f"{self.questions} questions"
        return f"{self.size} in {held}, {self.image_tokens} image tokens, {each} an image"


def shapes(size: str, images: dict[int, int], tiny: bool, quantised: bool = False) -> Iterator[Shape]:
    """256 and 576 image tokens, 1 and 10 questions an image; or tiny ones.

    Args:
        size: of the language model.
        images: questions of an image -> images of a step.
        tiny: to see on any machine that a case runs.
        quantised: to NF4.
    """
    size = size_here(size, tiny)
    for tokens in [4] if tiny else [256, 576]:
        for questions, number in images.items():
            yield Shape(size, tokens, questions, 2 if tiny else number, quantised)


def size_here(size: str, tiny: bool) -> str:
    """The language model's, which only a GPU can have; or the tiny one's."""
    if DEVICE == "cpu" and not tiny:
        sys.exit(
            f"{size} is measured on a GPU, which torch does not see here; `--tiny true` runs on any machine"
        )
    return "tiny" if tiny else size


# The models


def llama(size: str, quantised: bool = False) -> Any:
    """A frozen base of random weights, made where they are to be."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            config = LlamaConfig(**LLAMA[size], attn_implementation=pick_attention("auto", DEVICE))  # pyright: ignore
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(dtype)
    if quantised:
        quantise(model.model)
    return model.requires_grad_(False).eval()


def quantise(module: nn.Module) -> None:
    """Every linear inside, to NF4 with double quantisation, one after the other."""
    import bitsandbytes as bnb

    for name, child in module.named_children():
        if not isinstance(child, nn.Linear):
            quantise(child)
            continue
        made = bnb.nn.Linear4bit(
            *(child.in_features, child.out_features, child.bias is not None, child.weight.dtype),
            compress_statistics=True,
            quant_type="nf4",
        )
        made.support_avx512bf16_for_cpu = False  # keeps gradients, see models/language.py
        made.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
        setattr(module, name, made.to(DEVICE))


def sharing(model: Any) -> Any:
    """Modules of their own over the same weights, for adapters that others do not see."""
    return deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


def vlm(shape: Shape, base: Any, finetunes: int = 1) -> MultimodalModel:
    """Ours with LoRA on q and v over a base, behind an encoder of random weights."""
    with torch.device(DEVICE):
        encoder = VisionEncoder(VIT[shape.image_tokens], load_weights=False, check=False)
    encoder, language = encoder.to(torch.bfloat16), sharing(base)
    projector = Projector(encoder.dim, language.config.hidden_size).to(DEVICE)
    model = MultimodalModel(encoder, projector, language)
    for number, name in enumerate(names(finetunes)):
        model.bank.add(name, METHODS["LoRA q,v"][0], seed=number)
    fill(model.bank, names(finetunes))
    return model.train()


def weights_gb(model: nn.Module) -> float:
    """Of its tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) / 1e9


# The batches


def examples(shape: Shape, seed: int = 0) -> list[list[Encoded]]:
    """Of every image its questions, random but for the image tokens before them."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(length: int) -> list[int]:
        return torch.randint(1, LLAMA[shape.size]["vocab_size"], (length,), generator=generator).tolist()

    def asked(number: int) -> Encoded:
        text = drawn(QUESTION + ANSWER)
        ids = [1, *[IMAGE_TOKEN] * shape.image_tokens, *text]
        labels = [IGNORE_INDEX] * (len(ids) - ANSWER - 1) + text[QUESTION:] + [IGNORE_INDEX]
        return Encoded(ids, labels, [number])

    return [[asked(number) for _ in range(shape.questions)] for number in range(shape.images)]


def batch_of(
    shape: Shape, groups: Sequence[Sequence[Encoded]], features: Tensor, name: str = "finetune0"
) -> Batch:
    """A row for every group, all of a finetune, on the device."""
    rows = [pack(group) for group in groups]
    images = [image for row in rows for image in row.images]
    return collate(rows, features[images].cpu(), [name] * len(rows)).to(DEVICE)


# The races


def races(race: Callable[[Shape, Any], Race], shapes: Iterable[Shape]) -> Iterator[Race]:
    """A race of every shape, all over one base."""
    base = None
    for shape in shapes:
        base = llama(shape.size, shape.quantised) if base is None else base
        yield race(shape, base)


def step_race(shape: Shape, base: Any) -> Race:
    """Forward and backward of a step: ours, peft's, and the frozen base's on our rows."""
    model, frozen = vlm(shape, base), sharing(base)
    peer = peft_of(METHODS["LoRA q,v"][1], model=sharing(base))
    groups = examples(shape)
    size = model.vision_encoder.data_config["input_size"]  # pyright: ignore
    pixels = torch.randn(shape.images, *size, device=DEVICE, dtype=torch.bfloat16)
    features = encoded(model, pixels)
    packed = batch_of(shape, groups, features)
    single = batch_of(shape, [[one] for group in groups for one in group], features)
    embeds = model._embed(packed, slice(None)).detach()
    online = pixels.repeat_interleave(shape.questions, 0)
    theirs = "peft, features for free"
    runs: dict[str, Run] = {
        "mmpeft, features kept": lambda: our_step(model, packed),
        theirs: lambda: their_step(peer, model, single),
        "mmpeft, encoder in the step": lambda: our_step(model, packed, lambda: encoded(model, pixels)),
        "peft, encoder in the step": lambda: their_step(peer, model, single, lambda: encoded(model, online)),
        "frozen base on our rows": lambda: frozen_step(frozen, embeds),
    }
    tokens = {
        name: single.input_ids.numel() if name.startswith("peft") else packed.input_ids.numel()
        for name in runs
    }

    def told(name: str, rate: float) -> dict[str, Any]:
        return {"tokens": tokens[name], **of_the_peak(shape, tokens[name] * rate / shape.asked)}

    against = (theirs, "frozen base on our rows")
    facts = {"weights_gb": round(weights_gb(model.language_model), 2)}
    return Race(str(shape), runs, against, "questions/s", shape.asked, repeats=5, facts=facts, told=told)


def joint_race(shape: Shape, base: Any, finetunes: int = 8) -> Race:
    """A step of several finetunes in one pass, beside as many steps of one."""
    model, alone = vlm(shape, base, finetunes), vlm(shape, base)
    batches = []
    for number, name in enumerate(names(finetunes)):
        groups = examples(shape, number)
        features = torch.randn(shape.images, shape.image_tokens, model.vision_encoder.dim)
        batches.append((batch_of(shape, groups, features, name), batch_of(shape, groups, features)))
    together = concatenate([own for own, _ in batches])
    separate = [lambda batch=batch: our_step(alone, batch) for _, batch in batches]
    runs = {
        "one pass": lambda: our_step(model, together),
        "one after the other": one_after_the_other(separate),
    }
    title = f"{finetunes} LoRA finetunes, {shape}"
    return Race(title, runs, ("one after the other",), "questions/s", finetunes * shape.asked, repeats=5)


@torch.no_grad()
def encoded(model: MultimodalModel, pixels: Tensor) -> Tensor:
    """(images, image tokens, vision dim)"""
    return model.vision_encoder(pixels).to(torch.float16)


def our_step(model: MultimodalModel, batch: Batch, features: Callable[[], Tensor] | None = None) -> None:
    """Forward and backward."""
    if features is not None:
        batch.features = features()
    model.token_losses(batch).nll.mean().backward()
    model.zero_grad()


def their_step(
    peer: Any, model: MultimodalModel, batch: Batch, features: Callable[[], Tensor] | None = None
) -> None:
    """peft's with a row per question and Hugging Face's own loss, behind our projector."""
    if features is not None:
        batch.features = features()
    labels = F.pad(batch.targets[:, :-1], (1, 0), value=IGNORE_INDEX)  # Hugging Face shifts them itself
    mask = (batch.segments >= 0).long()
    peer(inputs_embeds=model._embed(batch, slice(None)), attention_mask=mask, labels=labels).loss.backward()
    peer.zero_grad()
    model.zero_grad()


def frozen_step(model: Any, embeds: Tensor) -> None:
    """Forward and backward to the inputs."""
    inputs = embeds.clone().requires_grad_()
    model(inputs_embeds=inputs, logits_to_keep=1, use_cache=False).logits.float().mean().backward()


def of_the_peak(shape: Shape, tokens_per_second: float) -> dict[str, Any]:
    """Dense operations of the decoder's linears, forward and towards the inputs: 4 for a weight and token."""
    size = LLAMA[shape.size]
    dim, wide = size["hidden_size"], size["intermediate_size"]
    keys = dim * size["num_key_value_heads"] // size["num_attention_heads"]
    weights = size["num_hidden_layers"] * (2 * dim * dim + 2 * dim * keys + 3 * dim * wide)
    tflops = 4 * weights * tokens_per_second / 1e12
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((value for part, value in DENSE_TFLOPS.items() if part in device), None)
    return {"tflops": float(f"{tflops:.3g}"), "of_peak": None if peak is None else round(tflops / peak, 3)}

"""Right or refused, on any base: what is found out on the very model holds for training, ranking and answering."""

import pytest
import torch
from torch.nn import functional as F

from mmpeft.adapters import LoraConfig, PromptConfig
from mmpeft.data.batch import collate
from mmpeft.data.packing import pack
from mmpeft.data.template import IGNORE_INDEX, Encoded
from mmpeft.errors import RefusedError
from mmpeft.inference.adapter_check import check_adapters
from mmpeft.inference.decoding import generate
from mmpeft.inference.self_check import check_language_model, ensure_checked
from mmpeft.models.language import LanguageConfig
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.projector import Projector
from mmpeft.models.reader import Reading
from mmpeft.models.vision import NoVision, VisionConfig, make_encoder
from mmpeft.tools.tiny_models import tiny_model

ONE, BY_TYPE, UNPACKED = Reading(), Reading(masks="by layer type"), Reading(packed=False)
WAYS = {
    "llama": ONE,
    "gpt2": ONE,
    "opt": ONE,
    "mistral": ONE,
    "qwen3": ONE,
    "granite": ONE,
    "cohere": ONE,
    "gemma2": BY_TYPE,
    "gemma3_text": BY_TYPE,
    "gemma3": BY_TYPE,
    "gemma3n_text": BY_TYPE,
    "gemma4_text": BY_TYPE,
    "gpt_oss": BY_TYPE,
    "llama4_text": BY_TYPE,
    "bloom": UNPACKED,
    "mpt": UNPACKED,
    "bart": UNPACKED,
    "qwen3_5": UNPACKED,
    "qwen3_next": UNPACKED,
    "granitemoehybrid": UNPACKED,
    "lfm2": UNPACKED,
    "lfm3": UNPACKED,
    "nemotron_h": UNPACKED,
    "falcon_h1": UNPACKED,
    "jamba": UNPACKED,
    "bamba": UNPACKED,
    "zamba2": UNPACKED,
    "kimi_linear": UNPACKED,
    "olmo_hybrid": UNPACKED,
    "mamba2": UNPACKED,
    "recurrent_gemma": Reading(packed=False, cached=False),
}
"""Model type -> how it must be read."""
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
PROMPTS = [[20, 31, 42, 53, 64, 75, 86, 97, 108, 119], [20, 31, 42, 53, 130, 141, 152]]
"""With a shared prefix of four tokens; longer than the windows of tiny models."""
ANSWER = 5
"""Tokens of each that are learnt."""
NO_END = -5


def wrapped(model_type: str, **changes) -> MultimodalModel:
    language_model = tiny_model(model_type, **changes)
    width = language_model.get_input_embeddings().weight.shape[1]
    return MultimodalModel(NoVision(), Projector(NoVision().dim, width), language_model).eval()


@pytest.fixture(scope="module")
def checked():
    made: dict[str, MultimodalModel] = {}

    def get(model_type: str) -> MultimodalModel:
        if model_type not in made:
            made[model_type] = wrapped(model_type)
            assert check_language_model(made[model_type]).reading == WAYS[model_type]
        return made[model_type]

    return get


def taught(ids: list[int]) -> Encoded:
    targets = [*ids[1:], 7]
    return Encoded(ids, [IGNORE_INDEX] * (len(ids) - 3) + targets[-3:])


def packed_batch(names=(None,)):
    return collate([pack([taught(ids) for ids in PROMPTS])] * len(names), None, list(names))


def own_losses(model: MultimodalModel) -> torch.Tensor:
    """By the model's own forward of every conversation alone."""
    losses = []
    for conversation in map(taught, PROMPTS):
        logits = model.language_model(input_ids=torch.tensor([conversation.ids]), use_cache=False).logits[0]
        targets = torch.tensor(conversation.targets)
        losses.append(F.cross_entropy(logits, targets, reduction="none")[targets != IGNORE_INDEX])
    return torch.cat(losses)


@pytest.mark.parametrize("model_type", WAYS)
@torch.no_grad()
def test_packed_losses_are_those_of_the_models_own_forward(checked, model_type):
    model = checked(model_type)
    torch.testing.assert_close(model.token_losses(packed_batch()).nll, own_losses(model), **CLOSE)


@pytest.mark.parametrize("model_type", WAYS)
@torch.no_grad()
def test_greedy_answers_are_those_that_the_models_own_forward_writes(checked, model_type):
    model = checked(model_type)
    answers = generate(model, packed_batch((None, None)), NO_END, max_new_tokens=ANSWER)
    assert answers[0] == answers[1]
    for prompt, answer in zip(PROMPTS, answers[0], strict=True):
        logits = model.language_model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
        best, written = logits[len(prompt) - 1 : -1].max(-1).values, torch.tensor(answer)
        chosen = logits[len(prompt) - 1 : -1].gather(1, written[:, None])[:, 0]
        torch.testing.assert_close(chosen, best, **CLOSE)


def test_a_state_that_crosses_conversations_would_be_seen(checked):
    model = checked("qwen3_5")
    model.reader.reading = Reading()
    try:
        with torch.no_grad():
            off = (model.token_losses(packed_batch()).nll - own_losses(model)).abs().max()
    finally:
        model.reader.reading = UNPACKED
    assert off > 1e-3


def test_a_window_that_is_not_followed_would_be_seen(checked):
    model = checked("mistral")
    model.reader.reading = Reading(windows=False)
    model.reader.config.sliding_window, kept = 8, model.reader.config.sliding_window
    try:
        with torch.no_grad(), pytest.raises(RefusedError, match="exceed sliding_window = 8"):
            model.token_losses(packed_batch())
    finally:
        model.reader.reading, model.reader.config.sliding_window = ONE, kept


@pytest.mark.parametrize("model_type", ["jamba", "falcon_h1", "lfm2"])
def test_what_bfloat16_would_round_away_is_found_all_the_same(model_type):
    language_model = tiny_model(model_type).to(torch.bfloat16)
    width = language_model.get_input_embeddings().weight.shape[1]
    model = MultimodalModel(NoVision(), Projector(NoVision().dim, width), language_model)
    assert not check_language_model(model).reading.packed


@pytest.mark.parametrize("model_type", ["bert", "roberta", "xlm-roberta", "electra"])
def test_what_is_no_decoder_is_refused_by_name(model_type):
    with pytest.raises(RefusedError, match=r"(Bert|Roberta|RoBERTa|Electra)\w* is no causal model"):
        check_language_model(wrapped(model_type))


def test_what_reads_no_embeddings_is_refused_by_name():
    with pytest.raises(RefusedError, match="CpmAntForCausalLM has no decoder that reads inputs_embeds"):
        wrapped("cpmant")


@pytest.mark.parametrize("model_type", ["llama", "qwen3_5", "bloom"])
def test_finetunes_of_mixed_rows_and_their_gradients_are_those_of_rows_of_their_own(model_type):
    model = wrapped(model_type)
    check_language_model(model)
    linears = ["q_proj", "down_proj"] if model_type != "bloom" else ["query_key_value"]
    for seed, name in enumerate(("one", "two")):
        model.bank.add(name, LoraConfig(rank=4, target_modules=linears), seed)
        model.bank.fill(
            name, {key: torch.randn_like(tensor) / 8 for key, tensor in model.bank.tensors(name).items()}
        )
    check_adapters(model, {})

    def gradients(*batches):
        model.bank.zero_grad()
        losses = [model.token_losses(batch).nll for batch in batches]
        torch.cat(losses).sum().backward()
        return torch.cat(losses), [parameter.grad.clone() for parameter in model.bank.parameters()]

    together, joint = gradients(packed_batch(("one", None, "two")))
    apart, alone = gradients(*(packed_batch((name,)) for name in ("one", None, "two")))
    torch.testing.assert_close(together, apart, **CLOSE)
    torch.testing.assert_close(joint, alone, **CLOSE)
    base = own_losses(wrapped(model_type)).detach()
    torch.testing.assert_close(together.detach()[len(base) : 2 * len(base)], base, **CLOSE)
    assert not torch.allclose(together[: len(base)], base, **CLOSE)


def test_a_finetune_that_reaches_other_rows_is_refused(monkeypatch):
    model = wrapped("llama")
    model.bank.add("one", LoraConfig(rank=4))
    route = model.bank.route
    monkeypatch.setattr(
        model.bank, "route", lambda names: route(["one" if any(names) else None for _ in names])
    )
    with pytest.raises(RefusedError, match="lora on LlamaForCausalLM changes rows of the base beside it"):
        check_adapters(model, {})


def test_a_finetune_that_changes_nothing_is_refused(monkeypatch):
    model = wrapped("llama")
    model.bank.add("one", LoraConfig(rank=4))
    route = model.bank.route
    monkeypatch.setattr(model.bank, "route", lambda names: route([None for _ in names]))
    with pytest.raises(RefusedError, match="lora on LlamaForCausalLM changes nothing"):
        check_adapters(model, {})


def test_one_that_fails_is_left_out_where_that_is_asked_for(monkeypatch):
    """With all of its kind, and another time it is not taken for checked."""
    model = wrapped("llama")
    for name in ("one", "same"):
        model.bank.add(name, LoraConfig(rank=4))
    model.bank.add("other", LoraConfig(rank=4, target_modules=["o_proj"]))
    route = model.bank.route
    monkeypatch.setattr(
        model.bank, "route", lambda names: route([None if name == "one" else name for name in names])
    )
    left_out = {}
    checked = check_adapters(model, {}, left_out)
    assert (model.bank.names, sorted(left_out)) == (["other"], ["one", "same"])
    assert all("changes nothing" in str(error) for error in left_out.values())
    assert len(checked["adapters"]) == 1


def test_a_model_that_keeps_nothing_is_told_to_be_slow(capsys):
    model = wrapped("recurrent_gemma")
    found = ensure_checked(model, LanguageConfig(), {})
    told = capsys.readouterr().err
    assert "RecurrentGemmaForCausalLM keeps nothing of what it has read" in told
    assert "(logits while decoding are" in told
    ensure_checked(wrapped("recurrent_gemma"), LanguageConfig(), found)
    ensure_checked(wrapped("mamba2"), LanguageConfig(), {})
    assert "keeps nothing" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model_type", "idle"),
    [("jamba", "dt_proj"), ("longcat_flash", "router"), ("gemma3", "vision_tower")],
)
def test_layers_that_the_model_never_calls_are_refused_and_all_others_serve(model_type, idle):
    """Some models read a linear's weight and multiply themselves; the towers of others are for other inputs."""
    model = wrapped(model_type)
    check_language_model(model)
    model.bank.add("one", LoraConfig(rank=4, target_modules="all-linear"))
    with pytest.raises(RefusedError, match=rf"layers are never called, such as \S*{idle}"):
        check_adapters(model, {})
    kept = [path for path in model.bank.entry("one").sites if idle not in path]
    model.bank.remove("one")
    model.bank.add("one", LoraConfig(rank=4, target_modules=kept))
    check_adapters(model, {})


def test_layers_called_as_parts_of_packed_experts_serve():
    model = wrapped("qwen3_moe")
    model.bank.add("one", LoraConfig(rank=4, target_modules=["experts.gate_up_proj", "experts.down_proj"]))
    check_adapters(model, {})


def test_checking_leaves_a_finetune_as_it_was():
    model = wrapped("llama")
    model.bank.add("one", LoraConfig(rank=4))
    before = [tensor.clone() for tensor in model.bank.state()]
    check_adapters(model, {})
    assert all(map(torch.equal, before, model.bank.state()))


def test_what_is_known_is_not_checked_again(monkeypatch, capsys):
    model = wrapped("qwen3_5")
    found = ensure_checked(model, LanguageConfig(), {})
    assert "Qwen3_5ForCausalLM reads every conversation in a row of its own" in capsys.readouterr().err
    again = wrapped("qwen3_5")
    monkeypatch.setattr(again.language_model, "forward", None)
    assert ensure_checked(again, LanguageConfig(), found) == found
    assert again.reader.reading == model.reader.reading == UNPACKED
    with pytest.raises(RefusedError):  # of another version nothing is known, so the forward is called
        ensure_checked(again, LanguageConfig(), found | {"under": {"torch": "0"}})


def test_an_earlier_check_is_of_the_same_precision():
    model = wrapped("llama")
    found = ensure_checked(model, LanguageConfig(), {})
    assert ensure_checked(model.to(torch.bfloat16), LanguageConfig(), found)["under"] != found["under"]


def test_a_model_that_looks_for_the_token_of_every_embedding_reads_no_images(tiny_base):
    language_model = tiny_model("qwen4_exp_text")
    width = language_model.get_input_embeddings().weight.shape[1]
    check_language_model(wrapped("qwen4_exp_text"))  # text it does read
    weights = str(tiny_base / "vision.safetensors")
    encoder = make_encoder(VisionConfig("test_vit", weights, image_size=32, crop=False))
    with pytest.raises(
        RefusedError, match=r"Qwen4ExpForCausalLM cannot be adapted exactly.*exact `inputs_embeds`"
    ):
        check_language_model(MultimodalModel(encoder, Projector(encoder.dim, width), language_model))


def test_a_method_that_the_model_cannot_read_is_refused():
    model = wrapped("qwen4_exp_text")
    check_language_model(model)
    model.bank.add("one", PromptConfig())
    with pytest.raises(RefusedError, match="prompt on Qwen4ExpForCausalLM cannot be read by that model"):
        check_adapters(model, {})

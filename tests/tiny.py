"""A whole small world on disk for tests: a random base, data, a config, and a run made from them.

Everything is built in code within seconds, without network. The plain functions make a copy a test may change;
the fixtures of the same name are built once per session and shared, so tests only read them.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "yellow": (240, 220, 40)}
IMAGES_PER_COLOUR = 3
IMAGE_SIZE = 32
BOS, EOS = "<|im_start|>", "<|im_end|>"
SENTENCES = [
    *(f"[INST] <Img></Img> [vqa] what color is it? [/INST] {colour}" for colour in COLOURS),
    *(f"is it {colour}? yes no, it is a {colour} square on nothing else" for colour in COLOURS),
    "[caption] Describe this image. how many squares are there? one, two or three",
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (any text comes back from its ids) with `BOS` and `EOS` as control tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=[BOS, EOS], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def make_base(folder: Path, seed: int = 0) -> Path:
    """Writes ``language/`` (random Llama, width 64, 2 layers, fp32, and its tokenizer) and
    ``vision.safetensors`` (random weights of timm's `test_vit`: 160 px, patches of 16, 6 layers, width 64)."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "language")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder / "language")
        save_file(timm.create_model("test_vit").state_dict(), folder / "vision.safetensors")
    return folder


def make_data(folder: Path) -> Path:
    """Writes ``images/*.png`` (12 squares of `COLOURS`, 32x32, no two alike) and data files about them:
    ``train.jsonl``, ``val.jsonl`` and ``test.jsonl`` in LLaVA's format with three questions per image (8, 2 and 2
    images), ``captions.jsonl`` ({file_name, text, task: caption}) and ``text.jsonl`` (questions without image)."""
    (folder / "images").mkdir(parents=True)
    names = [(f"images/{colour}{n}.png", colour) for n in range(IMAGES_PER_COLOUR) for colour in COLOURS]
    for number, (name, colour) in enumerate(names):
        shade = tuple(max(0, value - 2 * number) for value in COLOURS[colour])
        Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), shade).save(folder / name)
    splits = {"train": names[:8], "val": names[8:10], "test": names[10:]}
    for split, members in splits.items():
        rows = [row for name, colour in members for row in _questions(name, colour)]
        write_jsonl(folder / f"{split}.jsonl", rows)
    captions = [
        {"file_name": name, "text": f"a {colour} square", "task": "caption"} for name, colour in names[:8]
    ]
    write_jsonl(folder / "captions.jsonl", captions)
    facts = [("is red a color?", "yes"), ("is two a color?", "no"), ("name a color", "blue")]
    write_jsonl(
        folder / "text.jsonl", [{"question": question, "answer": answer} for question, answer in facts]
    )
    return folder


def make_config(path: Path, base: Path, data: Path, /, **changes: dict) -> Path:
    """Writes the YAML of a LoRA run of 10 steps on these, beside which its run directory ``run/`` appears;
    ``changes`` go into the sections of the same name (``model={"seed": 1}``)."""
    settings = {
        "model": {
            "language": {"name": str(base / "language"), "dtype": "float32"},
            "vision": {
                "name": "test_vit",
                "weights": str(base / "vision.safetensors"),
                "image_size": IMAGE_SIZE,
                "fit": "squash",
            },
            "adapter": {
                "class_path": "mmpeft.adapters.LoraConfig",
                "init_args": {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]},
            },
            "learning_rate": 1e-2,
            "projector_learning_rate": 1e-2,
        },
        "data": {
            "train": str(data / "train.jsonl"),
            "val": str(data / "val.jsonl"),
            "test": str(data / "test.jsonl"),
            "task": "vqa",
            "packing": {"batch_size": 6},
            "cache": str(path.parent / "features"),
        },
        "trainer": {
            "default_root_dir": str(path.parent / "run"),
            "accelerator": "cpu",
            "max_steps": 10,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }
    for section, values in changes.items():
        settings[section] |= values
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings))
    return path


def run_directory(config: Path) -> Path:
    """The directory that a run of `make_config` writes."""
    return Path(yaml.safe_load(config.read_text())["trainer"]["default_root_dir"])


def make_model_config(family: str, **changes: Any) -> Any:
    """Sizes of a model of two layers of width 32 and 64 tokens, by transformers' name of its family."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoConfig.for_model(family, **sizes | changes)


def make_record(question: str = "what?", answer: str | None = "red", images: Sequence = (), **changes) -> Any:
    """A sample as the readers make it; ``changes`` are other fields. A question without markers gets them in front."""
    marked = question if "<image>" in question else "<image>" * len(images) + question
    own = {
        "id": "1",
        "images": list(images),
        "turns": [(marked, answer)],
        "task": None,
        "where": "train.jsonl:1",
    }
    return own | changes


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """Writes one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _questions(name: str, colour: str) -> list[dict]:
    other = "blue" if colour == "red" else "red"
    pairs = [("what color is it?", colour), (f"is it {colour}?", "yes"), (f"is it {other}?", "no")]
    return [
        {
            "id": f"{Path(name).stem}-{number}",
            "image": name,
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": answer},
            ],
        }
        for number, (question, answer) in enumerate(pairs)
    ]


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of `tiny_base`."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """Folder of a random base, as `make_base` writes it."""
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """Folder of images and data files, as `make_data` writes it."""
    return make_data(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture(scope="session")
def choice_data(tiny_data, tmp_path_factory) -> Path:
    """Folder of the tiny data's files with the four colours as choices of the colour questions; those alone are in
    ``*_choices.jsonl``. Images are `tiny_data`'s: runs need it as image_root."""
    folder = tmp_path_factory.mktemp("choices")
    for split in ("train", "val", "test"):
        rows = [json.loads(line) for line in (tiny_data / f"{split}.jsonl").read_text().splitlines()]
        for row in rows:
            if row["conversations"][1]["value"] in COLOURS:
                row["choices"] = sorted(COLOURS)
        write_jsonl(folder / f"{split}.jsonl", rows)
        write_jsonl(folder / f"{split}_choices.jsonl", [row for row in rows if "choices" in row])
    return folder


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory, tiny_base, tiny_data) -> Path:
    """YAML for `mmpeft fit` on `tiny_base` and `tiny_data`, as `make_config` writes it. The run directory that
    it names is `tiny_run`'s: a test that trains itself makes its own config or sets trainer.default_root_dir."""
    return make_config(tmp_path_factory.mktemp("fit") / "config.yaml", tiny_base, tiny_data)


@pytest.fixture(scope="session")
def tiny_run(tiny_config) -> Path:
    """Run directory of a real `mmpeft fit` on `tiny_config`, made through the command line's entry point."""
    from mmpeft.cli import main

    main(["fit", "--config", str(tiny_config)])
    return run_directory(tiny_config)


@pytest.fixture
def dies_after_4_answers(monkeypatch) -> Callable[[list[str]], None]:
    """Runs a command whose evaluation is interrupted once four answers or more are in its log."""
    from mmpeft.cli import main
    from mmpeft.evaluation.answer_log import AnswerLog

    told = AnswerLog.append

    def killed(self: Any, answers: Any) -> None:
        told(self, answers)
        if len(self.answers) >= 4:
            raise KeyboardInterrupt

    def run(words: list[str]) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(AnswerLog, "append", killed)
            with pytest.raises((KeyboardInterrupt, SystemExit)):
                main(words)

    return run

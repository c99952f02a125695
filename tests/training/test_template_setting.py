"""The setting data.template: kept with the run, the same when it is asked, and its old key ``style``."""

import json
import shutil

import pytest
import yaml
from transformers import AutoTokenizer

import mmpeft
from mmpeft.cli import main
from mmpeft.data.template import IGNORE_INDEX
from mmpeft.errors import RefusedError
from mmpeft.training.checkpoint import verify
from mmpeft.training.cli import VisionLanguageCLI
from tests.tiny import BOS, EOS, make_config, make_record, run_directory

CHATML = (
    f"{{% for m in messages %}}{BOS}{{{{ m.role }}}}\n{{{{ m.content }}}}<|turn|>{{% endfor %}}"
    f"{{{{ '{EOS}' if not add_generation_prompt }}}}"
)
"""Ends a turn with another token than the tokenizer's end of sequence."""


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory, tiny_base, tiny_data):
    """A run of an instruct model, and its base."""
    folder = tmp_path_factory.mktemp("chat")
    base = shutil.copytree(tiny_base, folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(base / "language")
    # "two" is the last word of the vocabulary that nothing here needs: its row becomes that of the end of turn
    state = json.loads((base / "language" / "tokenizer.json").read_text())
    last = len(tokenizer) - 1
    word = next(word for word, number in state["model"]["vocab"].items() if number == last)
    del state["model"]["vocab"][word]
    state["model"]["merges"] = [pair for pair in state["model"]["merges"] if "".join(pair) != word]
    state["added_tokens"].append(state["added_tokens"][0] | {"id": last, "content": "<|turn|>"})
    (base / "language" / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = AutoTokenizer.from_pretrained(base / "language")
    assert tokenizer.convert_tokens_to_ids("<|turn|>") == last
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(base / "language")
    config = make_config(
        folder / "config.yaml", base, tiny_data, data={"template": "chat"}, trainer={"max_steps": 60}
    )
    main(["fit", "--config", str(config)])
    return run_directory(config), base


def test_a_chat_run_is_asked_as_it_was_trained_and_ends_at_the_templates_end(chat_run, tiny_data):
    run, _ = chat_run
    vlm = mmpeft.load(str(run), device="cpu")
    turn = vlm.template.tokenizer.convert_tokens_to_ids("<|turn|>")
    assert vlm.manifest.template["layout"] == "chat"
    row = make_record("<image>what color is it?", "red", ["a.png"], task="vqa")
    example = vlm.template.encode(row)
    assert (
        [t for t in example.targets if t != IGNORE_INDEX][-1] == turn != vlm.template.tokenizer.eos_token_id
    )
    image = str(next((tiny_data / "images").glob("red*")))
    (request,), _ = vlm.requests(image, "what color is it?")
    (completion,) = vlm.answer([request])
    assert completion.finish_reason == "stop"
    assert completion.text == vlm.ask(image, "what color is it?") != ""
    assert "<|turn|>" not in completion.text


def test_a_chat_run_is_tested_and_keeps_its_template(chat_run):
    run, _ = chat_run
    main(["test", "--run", str(run), "--data.limit=1"])
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["template"] == "chat"
    with pytest.raises(SystemExit, match=r"trained with the template chat, but data.template is minigpt"):
        main(["test", "--run", str(run), "--data.limit=1", "--data.template=minigpt"])


def test_a_run_whose_chat_template_has_changed_is_refused(chat_run, tmp_path):
    run, base = chat_run
    file = base / "language" / "chat_template.jinja"
    before = file.read_text()
    file.write_text(before.replace("\n", " "))
    try:
        with pytest.raises(RefusedError, match="another chat template"):
            mmpeft.load(str(run), device="cpu")
    finally:
        file.write_text(before)


def test_a_model_without_chat_template_is_refused_before_it_is_loaded(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr("mmpeft.training.start.build_model", lambda *_: pytest.fail("it was loaded"))
    command = ["fit", "--config", str(tiny_config), f"--trainer.default_root_dir={tmp_path / 'run'}"]
    with pytest.raises(SystemExit, match=r"data\.template is chat, but the tokenizer has no chat template"):
        main([*command, "--data.template=chat"])


@pytest.mark.parametrize(("style", "layout"), [("instruct", "minigpt"), ("plain", "plain")])
def test_the_old_key_still_works_and_says_where_it_moved(tiny_config, style, layout, capsys):
    command = ["--config", str(tiny_config), f"--data.style={style}"]
    cli = VisionLanguageCLI.parse(command)
    assert cli.datamodule.template == layout
    assert cli._wanted()["data"] | {"template": layout, "style": None} == cli._wanted()["data"]
    assert f"data.style has moved: write data.template: {layout}" in capsys.readouterr().err
    with pytest.raises(RefusedError, match=r"both are given"):
        VisionLanguageCLI.parse([*command, "--data.template=chat"])


def test_a_run_of_before_is_asked_as_it_was(tiny_run, tmp_path):
    old = shutil.copytree(tiny_run, tmp_path / "old")
    manifest = json.loads((old / "mmpeft.json").read_text())
    assert manifest["template"] == {"layout": "minigpt", "max_length": 1024, "control_markers": False}
    manifest["template"] = {"style": "instruct", "max_length": 1024}
    (old / "mmpeft.json").write_text(json.dumps(manifest))
    row = make_record("<image>what color is it?", "red", ["a.png"], task="vqa")
    before, now = (mmpeft.load(str(run), device="cpu") for run in (old, tiny_run))
    assert before.template.encode(row) == now.template.encode(row)
    assert before.template.settings == now.template.settings


def test_a_checkpoint_of_before_fits_the_layout_that_its_style_meant():
    def told(**template):
        return {"finetunes": {}, "data": {"packing": {"max_length": 9}, **template}}

    old = {"mmpeft": {"belongs_to": told(style="plain")}}
    plain = {"layout": "plain", "max_length": 9, "control_markers": False}
    verify(old, told(template=plain))
    other = told(template=plain | {"layout": "minigpt"})
    with pytest.raises(RefusedError, match="layout"):
        verify({"mmpeft": {"belongs_to": told(style="plain")}}, other)

"""The command line: what a user gets wrong is told in one message, and before any model is loaded."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mmpeft.cli import COMMANDS, HELP, main, spelt_out
from mmpeft.errors import RefusedError, told
from mmpeft.runs.files import PROJECTOR
from mmpeft.runs.manifest import MANIFEST
from tests.tiny import make_config, make_data, run_directory, write_jsonl


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model fails the test."""

    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("mmpeft.training.start.build_model", refuse)


@pytest.fixture
def fit(tiny_base, tiny_data, tmp_path):
    """Runs `mmpeft fit` with changed settings; the message with which it ends."""

    def run(**changes) -> str:
        config = make_config(tmp_path / "config.yaml", tiny_base, tiny_data, **changes)
        with pytest.raises(SystemExit) as ended:
            main(["fit", "--config", str(config)])
        assert ended.value.code not in (0, None)
        assert not run_directory(config).exists() or not (run_directory(config) / MANIFEST).exists()
        return str(ended.value)

    return run


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(capsys, arguments):
    main(arguments)
    assert capsys.readouterr().out.strip() == HELP.strip()
    for command in COMMANDS:
        assert f"\n  {command} " in HELP


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    usage = capsys.readouterr().out
    assert usage.startswith("usage: mmpeft ")
    assert f" {command} " in usage


def test_an_unknown_command_is_named():
    with pytest.raises(
        SystemExit, match=r"no command 'fti'; `mmpeft --help` lists them; the closest is 'fit'"
    ):
        main(["fti"])
    with pytest.raises(SystemExit, match=r"no command 'zzz'; `mmpeft --help` lists them$"):
        main(["zzz"])


def test_help_is_instant():
    code = "import sys; from mmpeft.cli import main; main([]); print({'torch', 'numpy', 'PIL'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert told.splitlines()[-1] == "set()"


REFUSED = [
    (["ask", "what?", "--image", "gone.png"], "'gone.png' does not exist"),
    (["ask", "what?", "--adapter", "nobody"], "no finetune 'nobody'; there are: default, base"),
    (["ask", "what?", "--choices", "red"], "--choices: choices must be at least two different"),
    (["ask", " "], "the question is empty; write one"),
    (["ask", "what?", "--max_new_tokens", "0"], "--max_new_tokens is 0; it must be at least 1"),
    (["caption", "gone"], "gone is no folder and no file; name the folder that holds the images"),
    (["caption", ".", "--adapter", "nobody"], "no finetune 'nobody'; there are: default, base"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_what_needs_no_model_to_be_refused_is_refused_before_the_libraries_come_in(
    tiny_run, tmp_path, words, message
):
    code = f"""
import sys
from mmpeft.cli import main
try:
    main({[*words, "--run", str(tiny_run)]!r})
finally:
    print({{"torch", "transformers", "timm"}} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
    )
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
    assert done.stdout == "set()\n"
    assert not list(tmp_path.iterdir())


def test_a_fit_and_a_question_say_nothing_but_their_own(tiny_config, tiny_run, tmp_path):
    for words in (
        ["fit", "--config", str(tiny_config), f"--trainer.default_root_dir={tmp_path}"],
        ["ask", "is red a color?", "--run", str(tiny_run), "--max_new_tokens=2"],
    ):
        code = f"from mmpeft.cli import main; main({words!r})"
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        lines = [line for line in done.stderr.splitlines() if line and "encoding images" not in line]
        own = [line for line in lines if line.startswith(("memory: about ", "  base "))]
        assert len(own) == (2 if words[0] == "fit" else 0)
        told = [line for line in lines if line not in own]
        assert told in ([], ["no --image: asked about text alone"])


def test_a_command_does_not_look_for_garbage_among_the_libraries():
    late = "atexit.register(lambda: print(gc.get_freeze_count() > 10_000))"  # handlers run last in, first out
    code = f"import atexit, gc; {late}; from mmpeft.cli import main; main([]); print(gc.get_threshold()[0])"
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert told.splitlines()[-2:] == ["20000", "True"]


@pytest.mark.parametrize(
    ("command", "words", "wanted"),
    [
        ("caption", "photos --strict --run r", '["photos"] --strict=true --run r'),
        ("caption", "--overwrite photos", '["photos"] --overwrite=true'),
        ("caption", "--overwrite false photos", '["photos"] --overwrite false'),
        ("caption", "photos --adapter a,b --run r", '["photos"] --adapter=["a,b"] --run r'),
        ("compare-prompting", "--shots 1 4 16 --run r", "--shots=[1,4,16] --run r"),
        ("compare-prompting", "--shots [1,4]", "--shots [1,4]"),
        ("compare-methods", "--limit-test 5 --start-from=a-b", "--limit_test 5 --start_from=a-b"),
        ("combine", "r --weights 0.5 -0.5", "r --weights=[0.5,-0.5]"),
        ("caption", "--no-such-option 1", "[] --no-such-option 1"),
        ("check", "a b --decode false", '["a", "b"] --decode false'),
        ("caption", "[a,b]", "[a,b]"),
        ("caption", "a --question [vqa]_what?", '["a"] --question=["[vqa]_what?"]'),
        ("caption", "a --question [vqa]_what? [b]", '["a"] --question=["[vqa]_what?", "[b]"]'),
        ("caption", "[2024] b", '["[2024]", "b"]'),
        ("caption", "[0-9]*.png", '["[0-9]*.png"]'),
        ("check", "--config fit.yaml", "[] --config fit.yaml"),
        ("check", "--config=fit.yaml a", '["a"] --config=fit.yaml'),
        (
            "caption",
            "photos --adapter a --run r --adapter=b c",
            '["photos", "c"] --run r --adapter=["a", "b"]',
        ),
        ("ask", "--image a.png what? --image [b].png", 'what? --image=["a.png", "[b].png"]'),
        ("compare-prompting", "--shots 1 --run r --shots 4", "--run r --shots=[1,4]"),
    ],
)
def test_options_may_be_written_as_people_write_them(command, words, wanted):
    assert " ".join(spelt_out(COMMANDS[command], words.split())) == wanted


def test_a_list_given_twice_and_in_brackets_is_refused():
    for words in (["--adapter", "a", "--adapter", "[b]"], ["--adapter=[a]", "--adapter", "b"]):
        with pytest.raises(RefusedError, match="--adapter is given twice, once in brackets"):
            spelt_out(COMMANDS["caption"], ["photos", *words])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("ask what? --runn r", "there is no option --runn; the closest is --run"),
        ("ask what? --max-new-token=3", "there is no option --max-new-token; the closest is --max_new_tokens"),
        ("ask what? --zzz", "there is no option --zzz"),
        ("ask what is it?", "'is it?' is one argument too many; text of several words stands in quotes"),
        ("inspect --run=r --data.trian=3", "there is no option --data.trian; the closest is --data.train"),
        ("inspect --run=r --rowz=3", "there is no option --rowz; the closest is --rows"),
        ("inspect --run=r --output=o", "there is no option --output"),
        ("fit --trainer.max_stepz=3", "there is no option --trainer.max_stepz; the closest is --trainer.max_steps"),
        ("ask", "the following arguments are required: question"),
    ],
)  # fmt: skip
def test_a_command_that_cannot_be_parsed_is_told_in_two_lines(tiny_run, capsys, words, told):
    with pytest.raises(SystemExit) as ended:
        main([word.replace("--run=r", f"--run={tiny_run}") for word in words.split()])
    assert ended.value.code == 2
    command = "fit" if "--data.trian" in words else words.split()[0]  # whose settings inspect takes
    assert capsys.readouterr().err == f"error: {told}\n`mmpeft {command} --help` lists the options\n"


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("--model.adapter.ranks=4", "LoraConfig has no setting 'ranks'; the closest is 'rank'; it has rank, alpha, "),
        ("--model.adapter={class_path: LoraConfig, init_arg: {rank: 4}}", "LoraConfig has no setting 'init_arg.rank'"),
        ("--model.preferences.bta=1", "there is no option --model.preferences.bta; the closest is --model.pref"),
    ],
)  # fmt: skip
def test_a_setting_that_a_method_does_not_have_is_told_with_those_that_it_has(
    tiny_config, capsys, word, told
):
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(tiny_config), "--model.adapter=mmpeft.adapters.LoraConfig", word])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {told}")


@pytest.mark.parametrize(
    ("section", "key"), [("model", "learning_rat"), ("data", "trian"), ("trainer", "max_step")]
)
def test_a_wrong_key_of_the_config_is_named(no_model, fit, capsys, section, key):
    message = fit(**{section: {key: 1}})
    assert key in message + capsys.readouterr().err


def test_a_value_of_the_wrong_type_is_named(no_model, fit, capsys):
    message = fit(model={"learning_rate": "fast"})
    assert "learning_rate" in message + capsys.readouterr().err


def test_a_data_file_that_is_not_there_is_named_with_the_closest(no_model, fit, tiny_data):
    message = fit(data={"train": str(tiny_data / "trian.jsonl")})
    assert "trian.jsonl" in message
    assert "'train.jsonl'" in message


def test_missing_images_are_all_listed(no_model, fit, tmp_path):
    data = make_data(tmp_path / "squares")
    gone = ["red0.png", "blue0.png", "green1.png"]
    for name in gone:
        (data / "images" / name).unlink()
    message = fit(data={"train": str(data / "train.jsonl")})
    assert all(name in message for name in gone)
    assert "red1.png" not in message
    assert "train.jsonl:1" in message


def test_no_data_is_told(no_model, fit, tmp_path):
    assert "set --data.train" in fit(data={"train": None})
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    assert "empty.jsonl holds no rows" in fit(data={"train": str(empty)})


def test_all_problems_of_a_file_are_listed_with_their_lines(no_model, fit, tmp_path):
    rows = [
        {"id": "a", "question": "what?"},
        {"id": "b", "question": "what?", "answer": "fine"},
        {"id": "c", "question": "what?", "answer": "  "},
        {"id": "d", "image": "../../secret.png", "question": "what?", "answer": "no"},
    ]
    message = fit(data={"train": str(write_jsonl(tmp_path / "rows.jsonl", rows))})
    for line, cause in ((1, "no answer"), (3, "empty or only whitespace"), (4, "outside the image root")):
        assert f"rows.jsonl:{line} (id '{rows[line - 1]['id']}')" in message
        assert cause in message
    assert "rows.jsonl:2" not in message


def test_impossible_settings_are_told(no_model, fit, capsys):
    assert (
        "nothing would train"
        in fit(model={"adapter": None, "train_projector": False}) + capsys.readouterr().err
    )
    message = fit(data={"packing": {"batch_size": 0}})
    assert "batch_size" in message + capsys.readouterr().err


def test_an_unknown_target_module_is_told_with_the_closest(fit):
    lora = {"class_path": "mmpeft.adapters.LoraConfig", "init_args": {"target_modules": ["q_prj"]}}
    message = fit(model={"adapter": lora})
    assert "q_prj" in message
    assert "q_proj" in message


def test_a_rank_beyond_every_side_of_the_linears_is_told(fit):
    def adapter(rank):
        return {
            "class_path": "mmpeft.adapters.DoraConfig",
            "init_args": {"rank": rank, "target_modules": ["k_proj"]},
        }

    assert "DoraConfig.rank is 65, but the largest side" in (message := fit(model={"adapter": adapter(65)}))
    assert "is 64: set it to 32 at most" in message


def test_a_base_that_is_not_there_is_told_with_the_closest(fit, tiny_base):
    message = fit(model={"language": {"name": str(tiny_base / "langauge"), "dtype": "float32"}})
    assert "no such folder; did you mean" in message


def test_a_hub_that_cannot_be_reached_is_told(fit, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr("mmpeft.training.start.load_tokenizer", unreachable)
    assert fit(model={"language": {"name": "someone/model"}}) == "error: We couldn't connect to the hub"


def test_weights_that_are_not_there_are_told(fit, tiny_base):
    vision = {"name": "test_vit", "weights": str(tiny_base / "none.safetensors"), "image_size": 32}
    assert "none.safetensors: no such file" in fit(model={"vision": vision})


def test_a_conversation_without_any_loss_is_told(fit):
    assert "max_length = 8" in fit(data={"packing": {"max_length": 8}})


def test_ask_prints_the_answer(tiny_run, tiny_data, capsys):
    image = str(tiny_data / "images" / "red0.png")
    main(["ask", "what color is it?", "--run", str(tiny_run), "--image", image, "--max_new_tokens", "2"])
    assert capsys.readouterr().out.endswith("\n")


def test_asking_a_folder_that_is_no_run_is_told(tmp_path):
    with pytest.raises(SystemExit, match=r"error: .* is no run of mmpeft"):
        main(["ask", "what?", "--run", str(tmp_path)])


def test_asking_an_unknown_adapter_is_told(tiny_run):
    with pytest.raises(SystemExit, match="no finetune 'nobody'; there are: default"):
        main(["ask", "what?", "--run", str(tiny_run), "--adapter", "nobody"])


def test_check_counts_or_lists(tiny_data, tmp_path, capsys):
    main(["check", str(tiny_data / "train.jsonl")])
    assert "24 conversations about 8 images" in capsys.readouterr().out
    data = make_data(tmp_path / "squares")
    (data / "images" / "red0.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match=r"red0.png"):
        main(["check", str(data / "train.jsonl")])


def test_check_tells_what_an_encoder_gives(tiny_data, capsys):
    data = str(tiny_data / "train.jsonl")
    main(["check", data, "--encoder", "test_efficientnet", "--image_size", "96"])
    out = capsys.readouterr().out
    assert (
        "test_efficientnet: 9 tokens of 64 from images of 96x96 px: layer 4 of 0 to 4; not the output of"
        in out
    )
    main(["check", data, "--encoder", "test_vit"])
    assert "layer 5 of 0 to 5, the output of timm's forward_features" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"cannot take images of 149 px .*Sizes that fit: 144, 160"):
        main(["check", data, "--encoder", "test_vit", "--image_size", "149"])
    with pytest.raises(SystemExit, match=r"none is named; add --encoder NAME"):
        main(["check", data, "--layer", "0"])


def test_fit_writes_the_run_directory(tiny_run):
    names = {path.name for path in tiny_run.iterdir()}
    assert names >= {
        *(MANIFEST, "adapters", "checkpoints", "config.yaml", "metrics.csv"),
        *("examples", "report.png", "README.md"),
    }
    assert (tiny_run / "checkpoints" / "last.ckpt").is_file()
    for name in ("adapter_model.safetensors", PROJECTOR):
        assert (tiny_run / "adapters" / "default" / name).is_file()


def test_test_scores_and_predict_answers_in_the_order_of_the_data(tiny_run, tiny_config, tiny_data, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    where = ["--trainer.default_root_dir", str(run)]
    main(["test", "--config", str(tiny_config), *where])
    metrics = json.loads((run / "metrics.json").read_text())
    predictions = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    right = [row["answer"].strip() == row["truth"].strip() for row in predictions]
    cut = sum(row.get("cut", False) for row in predictions)
    intervals = {key for key in metrics if key.startswith("ci95_")}
    assert intervals == {"ci95_low/exact_match", "ci95_high/exact_match"}
    metrics = {key: value for key, value in metrics.items() if key not in intervals}
    assert metrics == {"exact_match": sum(right) / len(right), "questions": 6, "cut_answers": cut}
    wanted = [json.loads(line)["id"] for line in (tiny_data / "test.jsonl").read_text().splitlines()]
    assert [row["id"] for row in predictions] == wanted

    questions = [{"id": f"q{n}", "question": "is it?"} for n in range(5)]
    unanswered = write_jsonl(tmp_path / "questions.jsonl", questions)
    main(["predict", "--config", str(tiny_config), *where, "--data.predict", str(unanswered)])
    answers = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    assert [row["id"] for row in answers] == [row["id"] for row in questions]


def test_a_fault_of_the_program_keeps_its_traceback(tiny_config, monkeypatch):
    """A RuntimeError is nobody's setting: one line would hide where it comes from."""

    def broken(*_, **__):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr("mmpeft.training.start.build_model", broken)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        main(["fit", "--config", str(tiny_config)])


def test_impossible_settings_of_the_trainer_are_told(tiny_config):
    with pytest.raises(SystemExit, match="error: trainer: "):
        main(["fit", "--config", str(tiny_config), "--trainer.devices=0"])


def test_keys_of_data_that_moved_still_work_and_say_where(tiny_run, tiny_config, tmp_path, capsys):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    where = ["test", "--config", str(tiny_config), "--trainer.default_root_dir", str(run)]
    main([*where, "--data.metrics=[exact_match]"])
    assert "data.metrics has moved: write test.metrics" in capsys.readouterr().err
    folder = run / "tests" / "metrics=exact_match"
    old = json.loads((folder / "metrics.json").read_text())
    main([*where, "--test.metrics=[exact_match]"])
    assert "has moved" not in capsys.readouterr().err
    assert json.loads((folder / "metrics.json").read_text()) == old
    with pytest.raises(SystemExit, match=r"data\.metrics has moved to test\.metrics, and both are given"):
        main([*where, "--data.metrics=[exact_match]", "--test.metrics=[accuracy]"])


def test_answers_that_were_cut_are_counted_and_a_setting_lets_them_end(
    tiny_run, tiny_config, tmp_path, capsys
):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    where = ["test", "--config", str(tiny_config), "--trainer.default_root_dir", str(run)]
    main([*where, "--test.max_new_tokens=1"])
    folder = run / "tests" / "max_new_tokens=1"
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    cut = sum(row.get("cut", False) for row in predictions)
    assert json.loads((folder / "metrics.json").read_text())["cut_answers"] == cut > 0
    assert f"{cut} answers were cut before their end; raise test.max_new_tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"test\.max_new_tokens is 0; it must be at least 1"):
        main([*where, "--test.max_new_tokens=0"])


def test_the_share_that_trains_is_of_the_base_alone(tiny_run, tiny_base):
    base = AutoModelForCausalLM.from_pretrained(tiny_base / "language").num_parameters()
    saved = load_file(tiny_run / "adapters" / "default" / "adapter_model.safetensors").values()
    trained = sum(tensor.numel() for tensor in saved)
    told = json.loads((tiny_run / MANIFEST).read_text())["facts"]["adapter"]
    assert told.startswith(f"{trained:,} = {100 * trained / base:.3f} % of the language model's")


def test_a_fit_without_steps_writes_its_start(tiny_config, tmp_path):
    main(
        [
            "fit",
            "--config",
            str(tiny_config),
            "--trainer.max_epochs=0",
            f"--trainer.default_root_dir={tmp_path}",
        ]
    )
    assert (tmp_path / MANIFEST).is_file()


def test_what_is_no_checkpoint_is_refused(tiny_run, tiny_config, tmp_path):
    where = ["fit", "--config", str(tiny_config), f"--trainer.default_root_dir={tmp_path / 'again'}"]
    with pytest.raises(SystemExit, match="is no whole checkpoint"):
        main([*where, "--ckpt_path", str(tiny_run / MANIFEST)])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--data.train=", "data.train is an empty path"),
        ("--test.metrics=[zz]", "no metric is called 'zz'"),
        ("--test.max_new_tokens=0", "test.max_new_tokens is 0; it must be at least 1"),
        ("--model.warmup=1.5", "model.warmup is 1.5; it is a share of the steps, from 0 to 1"),
        ("--model.warmup=-0.1", "model.warmup is -0.1"),
        ("--model.warmup=.nan", "model.warmup is nan"),
        ("--model.learning_rate=-1", "model.learning_rate is -1.0; it must be a number of at least 0"),
        ("--model.learning_rate=.nan", "model.learning_rate is nan"),
        ("--model.learning_rate=.inf", "model.learning_rate is inf"),
        ("--model.projector_learning_rate=.nan", "model.projector_learning_rate is nan"),
        ("--model.weight_decay=-1", "model.weight_decay is -1.0"),
        ("--model.choice_losses.unlikelihood=.nan", "choice_losses.unlikelihood is nan"),
        ("--data.packing.batch_size=0", "packing.batch_size is 0; it must be at least 1"),
        ("--data.packing.max_conversations=-1", "packing.max_conversations is -1"),
        ("--data.packing.max_length=0", "packing.max_length is 0"),
        ("--data.weights=[.inf]", r"data.weights is \[inf\]; each must be a number above 0"),
        ("--data.shots=0", "data.shots is 0; it must be at least 1"),
        ("--model.vision.image_size=0", "vision.image_size is 0; it must be at least 1"),
        ("--model.vision.pool=0", "vision.pool is 0; it must be at least 1"),
        (
            "--model.adapter.init_args.rank=0",
            "^error: LoraConfig.rank is 0; it must be an integer of at least 1$",
        ),
        (
            "--model.adapter.init_args.dropout=1.5",
            r"^error: LoraConfig.dropout is 1.5; it must be in \[0, 1\)$",
        ),
        ("--trainer.gradient_clip_val=-1", "trainer.gradient_clip_val is -1; it is a norm of at least 0"),
        ("--trainer.gradient_clip_val=.nan", "trainer.gradient_clip_val is nan"),
        (
            "--trainer.gradient_clip_algorithm=value",
            "clip_algorithm is 'value'; each finetune is clipped by its own",
        ),
        ("--trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches is 0; it must be above 0"),
        ("--trainer.val_check_interval=0", "trainer.val_check_interval is 0; .*limit_val_batches to 0"),
        ("--trainer.check_val_every_n_epoch=0", "trainer.check_val_every_n_epoch is 0"),
        ("--trainer.max_steps=0", "trainer.max_steps is 0: nothing would train"),
        ("--trainer.limit_train_batches=0", "trainer.limit_train_batches is 0: nothing would train"),
    ],
)
def test_settings_that_cannot_be_meant_are_told_before_anything_trains(
    no_model, tiny_config, setting, message
):
    with pytest.raises(SystemExit, match=message):
        main(["fit", "--config", str(tiny_config), setting])


def test_a_fit_of_no_epochs_is_refused(no_model, tiny_config):
    with pytest.raises(SystemExit, match=r"trainer\.max_epochs is 0: nothing would train"):
        main(["fit", "--config", str(tiny_config), "--trainer.max_epochs=0", "--trainer.max_steps=-1"])


def test_the_configs_that_come_along_are_listed_and_copied_without_taking_anothers_place(tmp_path, capsys):
    main(["configs", "list"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == sorted(path.as_posix() for path in Path("configs").rglob("*.yaml"))
    (own := tmp_path / "configs" / "tfew.yaml").parent.mkdir()
    own.write_text("mine")
    main(["configs", "copy", "--folder", str(tmp_path / "configs")])
    assert own.read_text() == "mine"
    copied = {path.relative_to(tmp_path).as_posix() for path in (tmp_path / "configs").rglob("*.yaml")}
    assert copied == set(listed)


def test_the_only_argument_without_a_name_may_be_named(tiny_run, tmp_path):
    main(["merge", "--run", str(tiny_run), "--output", str(tmp_path / "merged")])
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_inspect_takes_a_run(tiny_run, capsys):
    main(["inspect", "--run", str(tiny_run)])
    assert capsys.readouterr().out.strip()
    with pytest.raises(SystemExit, match="error: --run wants a run directory"):
        main(["inspect", "--run", ""])


@pytest.mark.parametrize(
    ("setting", "value"),
    [("learning_rate", "-1"), ("projector_learning_rate", ".nan"), ("warmup", "2"), ("max_steps", "0")],
)
def test_settings_of_one_of_several_finetunes_are_told_with_its_name(no_model, setting, value):
    with pytest.raises(SystemExit, match=rf"error: model\.adapters\.tfew\.{setting} is "):
        main(["fit", "--config", "configs/easy_vqa/joint.yaml", f"--model.adapters.tfew.{setting}={value}"])


def test_a_learning_rate_of_zero_is_meant(tiny_base, tiny_data, tmp_path):
    config = make_config(tmp_path / "config.yaml", tiny_base, tiny_data, model={"learning_rate": 0.0})
    main(["fit", "--config", str(config), "--trainer.max_steps=1"])
    assert (run_directory(config) / MANIFEST).is_file()


def test_errors_of_the_system_name_the_file_and_what_to_do(fit, tmp_path):
    (file := tmp_path / "a file").touch()
    message = fit(trainer={"default_root_dir": str(file)})
    assert message == f"error: {file}: File exists: a file lies where a folder is wanted; name another place"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "runs"),
            "runs: Permission denied: that is not allowed",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "runs"),
            "runs: Read-only file system: that is not allowed",
        ),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (OSError("no network"), "no network"),
    ],
)
def test_errors_of_the_system_are_words(error, message):
    assert told(error).startswith(message)


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_that_wait_spin_briefly_unless_the_user_says_otherwise(given, spins):
    """A spinning thread keeps the core from the one that it waits for; set before torch is loaded."""
    ask = "import mmpeft, os, sys; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", ask], env=kept | given, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(spins), "False"]

"""The README's commands and code run as they stand there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mmpeft.cli import main

README = Path("README.md").read_text()
SHELL = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
]
TRAINING = ("fit", "validate", "test", "predict", "few-shot")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
MMPEFT = [shlex.split(line)[1:] for line in SHELL if line.split()[:1] and line.split()[0].endswith("mmpeft")]


@pytest.fixture
def as_in_the_readme(tiny_run, tiny_data, tmp_path, monkeypatch):
    """A folder in which runs/quickstart, a.png and b.png exist and the repository's own folders are at hand."""
    repository = Path.cwd()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(tiny_run)
    for name in ("configs", "scripts"):
        (tmp_path / name).symlink_to(repository / name)
    images = sorted((Path(tiny_data) / "images").glob("*.png"))
    for name, image in zip(("a.png", "b.png"), images, strict=False):
        (tmp_path / name).write_bytes(image.read_bytes())
    (tmp_path / "FOLDER").symlink_to(Path(tiny_data) / "images")
    (tmp_path / "data").symlink_to(tiny_data)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_make_targets_exist():
    targets = {line.split()[1] for line in SHELL if line.startswith("make ")} | set(
        re.findall(r"`make (\w+)`", README)
    )
    defined = set(re.findall(r"^([a-z-]+):.*## ", Path("Makefile").read_text(), re.M))
    assert targets <= defined


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_code_runs(code: str, as_in_the_readme):
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("arguments", [a for a in MMPEFT if a[0] in TRAINING], ids=" ".join)
def test_training_commands_parse(arguments: list[str], capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--print_config"])
    assert stopped.value.code in (None, 0)
    assert ("shots" if arguments[0] == "few-shot" else "default_root_dir") in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [a for a in MMPEFT if a[0] not in TRAINING], ids=" ".join)
def test_other_commands_run(arguments: list[str], as_in_the_readme, capsys):
    main(arguments)
    assert capsys.readouterr().out.strip()


def test_captioning_command_runs(as_in_the_readme):
    (command,) = [shlex.split(line) for line in SHELL if "caption_images" in line]
    subprocess.run([sys.executable, *command[1:]], check=True, timeout=120)
    assert (as_in_the_readme / "captions.jsonl").read_text().count("\n") > 0


@pytest.mark.parametrize(
    "command", [line for line in SHELL if "python scripts/" in line and "caption" not in line]
)
def test_scripts_know_the_options_that_they_are_given(command: str):
    _, script, *arguments = shlex.split(command)
    shown = subprocess.run(
        [sys.executable, script, "--help"], check=True, capture_output=True, text=True
    ).stdout
    assert all(option in shown for option in arguments if option.startswith("--"))
    assert all(Path(path).exists() for path in arguments if path.endswith(".yaml"))


@pytest.mark.slow
def test_quickstart_in_a_fresh_clone(tmp_path):
    subprocess.run(["git", "clone", "-q", ".", str(tmp_path / "clone")], check=True)
    done = subprocess.run(
        ["make", "quickstart"], cwd=tmp_path / "clone", check=True, capture_output=True, text=True
    )
    last = done.stdout.strip().splitlines()[-1]
    match = re.fullmatch(r"quickstart: accuracy=(\S+) questions=(\d+) minutes=\S+", last)
    assert match, last
    assert float(match[1]) >= 0.90
    assert int(match[2]) >= 500

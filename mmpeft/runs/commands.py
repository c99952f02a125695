"""The commands that make something else of a run's finetunes: merge, export, combine.

The libraries come in only where a command needs them.
"""

from typing import Literal

from mmpeft.options import command_line
from mmpeft.runs.layout import RUN


def merge(
    run: str,
    adapter: str | None = None,
    output: str | None = None,
    quantization: Literal["nf4", "int8"] | None = None,
) -> None:
    """Folds a finetune into its base and writes a plain transformers model, with the projector beside it.

    Args:
        run: directory that `mmpeft fit` wrote.
        adapter: a finetune of the run; the run's first by default.
        output: new or empty folder; RUN/merged/ADAPTER by default.
        quantization: keep the base in 4 or 8 bits; exact for IA3, refused for LoRA. Dense by default.
    """
    from mmpeft.runs.merge import merge_run

    merged = merge_run(run, adapter, output, quantization)
    print(
        f"merged {merged.adapter!r} into {merged.directory}: on a fixed prompt its logits, of up to "
        f"{merged.largest:.2g}, differ from the adapted model's by at most {merged.difference:.2g}: {merged.verdict}"
    )


def export(
    *,
    run: str = RUN,
    to: Literal["gguf", "vllm", "transformers"],
    adapter: str | None = None,
    output: str | None = None,
    text_only: bool = False,
    square_images: bool = False,
) -> None:
    """Writes a finetune for llama.cpp, vLLM, or transformers with peft; what they do not take is refused by name.

    A LoRA becomes llama.cpp's adapter GGUF, with an mmproj of encoder and projector where it reads images, or an
    adapter folder in PEFT's format. For transformers, finetunes by other methods are merged into a plain model, as
    `mmpeft merge` does.

    Args:
        run: directory that `mmpeft fit` wrote.
        to: gguf is llama.cpp's.
        adapter: a finetune of the run; the run's first by default.
        output: new or empty folder; RUN/exported/TO/ADAPTER by default.
        text_only: leave out what reads images.
        square_images: of gguf, write what reads images, for squares: llama.cpp pads others in its own way.
    """
    from mmpeft.runs.export import export_run

    exported = export_run(run, to, adapter, output, text_only, square_images)
    print(f"exported {exported.adapter!r} to {exported.directory}")
    for remark in exported.remarks:
        print(remark)


def combine(
    run: str,
    adapters: list[str] | None = None,
    name: str = "combined",
    method: str = "linear",
    weights: list[float] | None = None,
    density: float = 0.5,
    rank: int | None = None,
    projector_of: str | None = None,
    output: str | None = None,
) -> None:
    """Makes one finetune of several of a run, and a run directory of it that `mmpeft ask --run` takes.

    Methods: linear, magnitude_prune, ties, dare_linear, dare_ties; of LoRA also cat, svd, magnitude_prune_svd,
    ties_svd, dare_linear_svd, dare_ties_svd; of IA3 also log; of any one config federated, the mean of clients that
    trained apart.

    Args:
        run: directory that `mmpeft fit` wrote.
        adapters: finetunes of the run, such as [a,b]; all by default.
        name: of the new finetune.
        method: one of the above.
        weights: one for each, of any sign and sum, equal by default; of federated the clients' numbers of examples.
        density: share that pruning keeps.
        rank: of the methods ending in svd; the largest of the finetunes' by default.
        projector_of: finetune whose projector the new one reads images with, where they own different ones.
        output: new or empty folder; RUN/combined/NAME by default.
    """
    from mmpeft.runs.combine import combine_run

    made = combine_run(run, adapters, name, method, weights, density, rank, projector_of, output)
    print(f"combined into {name!r} in {made}; ask it with `{command_line('ask', '--run', made)}`")

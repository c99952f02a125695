"""Our own commands. A function's signature is its command line, its docstring the help."""

from mmpeft.embedded import prepare

__all__ = ["ask", "prepare"]


def ask(
    question: str,
    run: str = "runs/quickstart",
    image: str | None = None,
    adapter: str | None = None,
    max_new_tokens: int = 32,
) -> None:
    """Asks a finetuned model about an image and prints the answer.

    Args:
        question: the question.
        run: directory that `mmpeft fit` wrote.
        image: the image's file; without one the question is about text alone.
        adapter: a finetune of the run, or "base" for the frozen model; the run's first by default.
        max_new_tokens: longest answer.
    """
    from mmpeft.inference.pipeline import load

    print(load(run).ask(image, question, adapter, max_new_tokens))

"""From nothing to a model that answers questions about images: prepare, two stages, test on held-out images.

Every step is the command that a user would type, with the settings of configs/easy_vqa and fewer steps.
"""

import json
import time
from pathlib import Path

from jsonargparse import auto_cli

from mmpeft.cli import main

CAPTION = "configs/easy_vqa/caption.yaml"
INSTRUCT = "configs/easy_vqa/instruct_lora.yaml"
RUN = "runs/quickstart"


def quickstart(started: float | None = None, steps: int = 440, questions: int = 1000) -> None:
    """Makes runs/quickstart.

    Args:
        started: when the user typed the command, in seconds since 1970; now by default.
        steps: optimiser steps of the second stage.
        questions: held-out questions to answer at the end.
    """
    started = started or time.time()
    main(["prepare"])
    main(["fit", "--config", CAPTION])
    run = ["--config", INSTRUCT, f"--trainer.default_root_dir={RUN}"]
    main(
        [
            "fit",
            *run,
            f"--trainer.max_steps={steps}",
            # fewer tokens a step, and smaller steps but more of them, reach most in so few minutes
            "--data.packing.max_conversations=16",
            "--data.packing.batch_size=24",
            "--trainer.val_check_interval=110",
            "--trainer.limit_val_batches=5",
        ]
    )
    main(["test", *run, f"--data.limit={questions}", f"--output={RUN}"])
    metrics = json.loads((Path(RUN) / "metrics.json").read_text())
    minutes = (time.time() - started) / 60
    print(f"the report is {RUN}/report.png; now ask:")
    print(f"  .venv/bin/mmpeft ask --run {RUN} --image {RUN}/examples/00.png 'what color is the shape?'")
    print(
        f"quickstart: accuracy={metrics['exact_match']:.3f} questions={metrics['questions']} minutes={minutes:.1f}"
    )


if __name__ == "__main__":
    auto_cli(quickstart)

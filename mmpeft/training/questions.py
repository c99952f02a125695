"""The questions of a split of a run's data, as `mmpeft test` and `mmpeft predict` want them answered."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mmpeft.data.shares import Share
from mmpeft.evaluation.evaluate import Evaluation
from mmpeft.runs.manifest import LEAST_NEW_TOKENS
from mmpeft.training.finetune import Split


def evaluation_of(module: Any, split: Split) -> Evaluation:
    """Answered by the weights that are loaded now: those of a checkpoint come after the module's `setup`.

    Args:
        module: the `VisionLanguageModule` of the run, set up.
        split: "test" or "predict".
    """
    config, manifest, trainer = module.evaluation_config, module.started.manifest, module.trainer
    longest = config.max_new_tokens or (manifest.max_new_tokens if manifest else LEAST_NEW_TOKENS)
    config = replace(config, max_new_tokens=longest)
    records = {name: own.records[split] for name, own in module.finetunes.items()}
    log = (module.results or Path(trainer.default_root_dir)) / f"{split}.partial.jsonl"
    return Evaluation(
        *(module.engine, records, module.adapters(), config, module.started.identity),
        *(None if trainer.fast_dev_run else log, split == "test", module.left_out),
        Share(trainer.global_rank, trainer.world_size),
        trainer.strategy.barrier,
    )

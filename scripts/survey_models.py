"""Which language models mmpeft reads exactly, and which methods adapt them: every causal LM class of the installed
transformers as a tiny random model.

    python scripts/survey_models.py docs/models.md
"""

import sys
import time
import warnings
from pathlib import Path

import transformers
from jsonargparse import auto_cli

from mmpeft.tools.survey import count, survey, table, versions
from mmpeft.tools.tiny_models import causal_lm_types

HEAD = """# Language models

Written by `python scripts/survey_models.py docs/models.md` ({versions}; {minutes:.0f} minutes on 2 cores): every causal
LM class of transformers as a tiny random model in fp32, judged by the checks that a run makes of its own base.

- **packed**: conversations share rows, told apart by masks. **unpacked**: every conversation is read in a row of its
  own, because a state would run on from one into the next or because the model takes no such mask; the numbers are the
  same, the work is more. **no cache**: an answer's tokens are read again for each new one.
- **refused**: by name and with the reason, before the first step. **not built**: transformers does not build a tiny
  one from its config alone, which says nothing about the real one.
- The methods are asked with `target_modules: auto`; **yes** means that the finetune's rows change and no others do.

{counts}

"""


def main(output: Path, model_types: list[str] | None = None) -> None:
    """Surveys and writes a table.

    Args:
        output: the Markdown file.
        model_types: those alone.
    """
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    started, found = time.monotonic(), []
    wanted = model_types or causal_lm_types()
    for each in survey(wanted):
        found.append(each)
        print(f"{len(found)} of {len(wanted)}: {each.model_type} {each.reading}", file=sys.stderr)
    counts = "\n".join(f"- {name}: {number} of {len(found)}" for name, number in count(found).items())
    head = HEAD.format(versions=versions(), minutes=(time.monotonic() - started) / 60, counts=counts)
    output.write_text(head + table(found))
    print(counts)


if __name__ == "__main__":
    auto_cli(main)

"""`mmpeft compare-prompting`: a finetune beside k-shot prompting of its frozen base."""

import sys

from mmpeft.cli import main

if __name__ == "__main__":
    main(["compare-prompting", *sys.argv[1:]])

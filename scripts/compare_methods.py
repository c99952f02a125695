"""`mmpeft compare-methods`: eight ways to finetune one base, under one budget."""

import sys

from mmpeft.cli import main

if __name__ == "__main__":
    main(["compare-methods", *sys.argv[1:]])

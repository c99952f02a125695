"""`mmpeft continual`: finetunes in phases, and what each left of the ones before."""

import sys

from mmpeft.cli import main

if __name__ == "__main__":
    main(["continual", *sys.argv[1:]])

"""`mmpeft demo` by the file that it used to be: ``python demo/app.py --run runs/quickstart``."""

import sys

from mmpeft.cli import main

if __name__ == "__main__":
    main(["demo", *sys.argv[1:]])

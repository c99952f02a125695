"""`mmpeft caption`: captions a folder of images."""

import sys

from mmpeft.cli import main

if __name__ == "__main__":
    main(["caption", *sys.argv[1:]])

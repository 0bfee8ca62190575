"""`python scripts/train.py ...` is `strop train ...`."""

import sys

from strop.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["train", *sys.argv[1:]], prog="python scripts/train.py"))

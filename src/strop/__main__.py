"""`python -m strop`: the command line. Floor 11."""

from strop.cli import main

if __name__ == "__main__":
    raise SystemExit(main(prog="python -m strop"))

"""`python -m sparing.testing`: the conformance suite for all methods, or for some; exit code 1 if a case fails."""

from __future__ import annotations

import argparse
import sys

import torch
from transformers.utils import logging

from sparing.grid.method import Error
from sparing.testing.models import ARCHITECTURES
from sparing.testing.suite import cases, run


def main() -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(prog="python -m sparing.testing", description=__doc__)
    parser.add_argument("--method", action="append", help="a registered method; repeatable, default all")
    parser.add_argument("--architecture", action="append", help=f"one of {', '.join(ARCHITECTURES)}; default all")
    parser.add_argument("--check", action="append", help="name of a check; default all that a method calls for")
    given = parser.parse_args()
    torch.set_num_threads(1)  # tiny models
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        some = cases(given.method, given.architecture or ARCHITECTURES, given.check)
    except Error as problem:
        print(problem, file=sys.stderr)
        return 2
    result = run(some, progress=sys.stderr.isatty())
    print(result)
    return 1 if result.failed else 0


if __name__ == "__main__":
    sys.exit(main())

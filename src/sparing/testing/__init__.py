"""The conformance suite that every method passes: named checks on tiny models of real architectures.

    from sparing.testing import check_method

    print(check_method("fastv"))

`python -m sparing.testing` runs it for all registered methods.
"""

from sparing.testing.models import ARCHITECTURES, build, prompt, single
from sparing.testing.suite import CHECKS, Case, CheckFailed, Result, cases, check_method

__all__ = [
    "ARCHITECTURES",
    "CHECKS",
    "Case",
    "CheckFailed",
    "Result",
    "build",
    "cases",
    "check_method",
    "prompt",
    "single",
]

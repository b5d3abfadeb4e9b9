"""The conformance kit: every contract of a plugin as a check that fails with a usable sentence.

In the tests of a plugin package:

    from autoft.testing import conformance

    test_conforms = conformance("autoft-mine")
"""

from __future__ import annotations

from autoft.testing.kit import CHECKS, CheckResult, conformance, run_checks

__all__ = ["CHECKS", "CheckResult", "conformance", "run_checks"]

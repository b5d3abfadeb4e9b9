"""Which licences of weights a user allows, and which permit commercial use.

Licences are named as timm and the Hugging Face Hub name them (SPDX in lower case, or a name of the
publisher's own). Whoever uses weights answers for keeping their terms: what is said here is how
these licences are commonly read.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

ANY, COMMERCIAL, UNKNOWN = "any", "commercial", "unknown"

_PERMISSIVE: Final = re.compile(
    r"apache-2\.0|mit|bsd(-[234]-clause)?|isc|unlicense|zlib|bsl-1\.0|cc0-1\.0|"
    r"cc-by(-sa)?-[234]\.0|cdla-permissive-[12]\.0|openrail|creativeml-openrail-m"
)
_NON_COMMERCIAL: Final = re.compile(r"(^|-)nc(-|$)|non-?commercial|research|amlr|seer-license")


def is_commercial(license: str) -> bool | None:
    """Tell whether `license` permits commercial use; None if its terms are not known here."""
    name = license.strip().lower()
    if _NON_COMMERCIAL.search(name):
        return False
    return True if _PERMISSIVE.fullmatch(name) else None


def allows(allowed: Collection[str], license: str) -> bool:
    """Tell whether weights under `license` may be used where `allowed` is; nothing means any."""
    name = license.strip().lower() or UNKNOWN
    names = {each.strip().lower() for each in allowed}
    if not names or ANY in names or name in names:
        return True
    return COMMERCIAL in names and is_commercial(name) is True


def refusal(label: str, allowed: Collection[str], license: str) -> str:
    """Return why a backbone is not used, and the flag that would allow it."""
    name = license.strip().lower() or UNKNOWN
    listed = ",".join(allowed)
    return (
        f"The weights of '{label}' have the licence '{name}', which --allow-license {listed} does "
        f"not allow. Choose another backbone, or write --allow-license {listed},{name} if you may "
        f"use them."
    )


def warning(label: str, license: str) -> str:
    """Return what to know of a licence that is allowed; empty where it permits commercial use."""
    if is_commercial(license) is False:
        return (
            f"The weights of '{label}' have the licence '{license}', which forbids commercial "
            f"use; a model made of them is bound by it. `--allow-license commercial` leaves such "
            f"weights out."
        )
    return ""

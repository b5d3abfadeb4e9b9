"""What is known of a dataset, for people and for `catalog.json`: counts, doubts and warnings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from autoft.data import duplicates, rules
from autoft.data.catalog import EMPTY_CLASS, Catalog

LISTED: Final = 1000  # entries of each kind in a report
IMBALANCED: Final = 3.0  # largest class to smallest from which accuracy hides the small ones
MISSING: Final = "missing"
LEFT_OUT: Final = (
    rules.TOO_SMALL,
    rules.FEW_IMAGES,
    rules.IN_CONFLICT,
    "not in a class folder",
    "not a regular file",
)


def report(catalog: Catalog) -> dict[str, Any]:
    """Return what is known as plain data; lists are cut at `LISTED`, but for the excluded."""
    first = duplicates.first_of_row(catalog.rows)
    copies = np.flatnonzero(first != np.arange(len(first))).tolist()
    doubtful = np.flatnonzero(catalog.pinned).tolist()
    paths = catalog.paths
    return {
        "name": catalog.name,
        "root": catalog.root,
        "fingerprint": catalog.fingerprint,
        **_counts(catalog),
        "duplicates": len(copies),
        "label_conflicts": len(doubtful),
        "near_duplicates": catalog.near_count,
        "imbalance": round(catalog.imbalance, 3),
        "classes": dict(zip(catalog.classes, catalog.counts.tolist(), strict=True)),
        "noticed": dict(catalog.noticed),
        "excluded": [[entry.path, entry.reason] for entry in catalog.excluded],
        "duplicate_files": [[paths[i], paths[first[i]]] for i in copies[:LISTED]],
        "conflicting_files": [[paths[i], catalog.label_of(i)] for i in doubtful[:LISTED]],
        "near_duplicate_files": [[n.path, n.like, n.distance] for n in catalog.near[:LISTED]],
    }


def _counts(catalog: Catalog) -> dict[str, int]:
    reasons = [entry.reason for entry in catalog.excluded if entry.reason != EMPTY_CLASS]
    missing = sum(reason.startswith(MISSING) for reason in reasons)
    left_out = sum(reason.startswith(LEFT_OUT) for reason in reasons)
    return {
        "found": len(catalog) + len(reasons),
        "usable": len(catalog),
        "missing": missing,
        "corrupt": len(reasons) - missing - left_out,
        "left_out": left_out,
    }


def headline(known: Mapping[str, Any]) -> str:
    """Return the counts of a report that everybody asks for, in one line."""
    return (
        f"{known['found']:,} found, {known['missing']:,} missing, {known['corrupt']:,} corrupt, "
        f"{known['duplicates']:,} duplicates, {len(known['classes']):,} classes, "
        f"imbalance {known['imbalance']:.1f}"
    )


def warnings(known: Mapping[str, Any]) -> list[str]:
    """Return what a user should know before trusting a number measured on this dataset."""
    said = []
    if known["imbalance"] > IMBALANCED:
        small = min(known["classes"], key=lambda name: known["classes"][name] or np.inf)
        said.append(
            f"The classes are imbalanced {known['imbalance']:.0f} to 1 (the smallest is "
            f"{small!r}): balanced accuracy is maximised unless --metric says otherwise, and "
            f"training evens them out (train.balance)."
        )
    if known["label_conflicts"]:
        said.append(
            f"{known['label_conflicts']:,} images have the same bytes as one with another label: "
            "they are never used to select or to test."
        )
    said += [
        f"{known['noticed'][words]:,} images are {words}: scores are too good."
        for words in (rules.LEAKED, rules.ALIKE)
        if words in known["noticed"]
    ]
    return said

"""Write what a benchmark found into a page, and leave what stands around it."""

from __future__ import annotations

from pathlib import Path


def write_between(page: Path, name: str, text: str) -> None:
    """Put `text` between `<!-- NAME: begin -->` and `<!-- NAME: end -->` in a Markdown file.

    A page without these marks gets them at its end; a missing page is made.

    Raises:
        ValueError: the page has one mark of the two, one twice, or the end first.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    present = page.read_text(encoding="utf-8") if page.exists() else ""
    counts = present.count(begin), present.count(end)
    if counts == (0, 0):
        space = "\n" if present else ""
        present = f"{present}{space}{begin}\n{end}\n"
    elif counts != (1, 1) or present.index(begin) > present.index(end):
        raise ValueError(
            f"{page} has {counts[0]} times '{begin}' and {counts[1]} times '{end}'; expected one "
            f"of each, in this order, or none. Mend the marks."
        )
    before, _, rest = present.partition(begin)
    after = rest.partition(end)[2]
    page.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}", encoding="utf-8")

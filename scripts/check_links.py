"""Checks that what README.md, CHANGELOG.md and docs/*.md point at exists.

Looked at: relative links, their anchors, and paths of this repository between backticks.
Links to other sites are not.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)[^)]*\)")
CODE_SPAN = re.compile(r"`([^`\n]+)`")
# Only what lies under one of these is surely meant as a path of the repository.
PATH = re.compile(r"(?:model|cluster|rlhf_ray|tests|benchmarks|docs|configs|scripts|requirements)/[\w./-]*")
HEADING = re.compile(r"#{1,6}\s+(.+)")


def prose_lines(document: Path) -> Iterator[tuple[int, str]]:
    """Line numbers, from 1, and lines of a Markdown file outside its fenced code blocks."""
    fenced = False
    for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), start=1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, line


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub makes of a file's headings: lower case, no punctuation, hyphens for spaces."""
    found: set[str] = set()
    for _, line in prose_lines(document):
        if heading := HEADING.match(line):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1].strip())
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            repeats = sum(1 for known in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", known))
            found.add(f"{slug}-{repeats}" if repeats else slug)
    return found


def problems(document: Path) -> Iterator[str]:
    """One line for every link or path in the file that leads nowhere."""
    for number, line in prose_lines(document):
        where = f"{document.relative_to(ROOT)}:{number}"
        for target in LINK.findall(CODE_SPAN.sub("", line)):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            file = document.parent / path if path else document
            if not file.exists():
                yield f"{where}: {target}: no such file"
            elif anchor and file.suffix == ".md" and anchor not in anchors(file):
                yield f"{where}: {target}: no such heading in {file.name}"
        for span in CODE_SPAN.findall(line):
            if PATH.fullmatch(span) and not (ROOT / span).exists():
                yield f"{where}: `{span}`: no such path"


def main() -> int:
    """Print every problem; the exit status says whether there was one."""
    top = [path for path in (ROOT / "README.md", ROOT / "CHANGELOG.md") if path.exists()]
    documents = [*top, *sorted((ROOT / "docs").glob("*.md"))]
    found = [problem for document in documents for problem in problems(document)]
    print("\n".join(found) or f"links of {len(documents)} documents: all good")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

"""Writes the table of methods, from the registry, into README.md and docs/methods.md. `--check` only compares."""

from __future__ import annotations

import sys
from pathlib import Path

import sparing

ROOT = Path(__file__).parent.parent
START, END = "<!-- methods -->\n", "<!-- /methods -->"


def table(controls: bool) -> str:
    """Markdown rows of all methods."""
    lines = ["| method | axis | what it does | needs | paper |", "|---|---|---|---|---|"]
    for name, cls in sparing.methods(controls=controls).items():
        card = cls.card
        needs = card.needs if card.needs != "nothing" else ("nothing (training helps)" if card.trains else "nothing")
        paper = f"{card.title}, {card.year}" + (f", arXiv {card.arxiv}" if card.arxiv else "")
        lines.append(f"| `{name}` | {card.axis} | {card.summary} | {needs} | {'–' if card.is_control else paper} |")
    return "\n".join(lines) + "\n"


def fields() -> str:
    """Every method's hyper-parameters with defaults, allowed values and sources."""
    import dataclasses

    parts = ["# Methods\n\nGenerated from the registry by `make docs`.\n\n" + table(controls=True)]
    for name, cls in sparing.methods().items():
        parts.append(
            f"\n## {name}\n\n{cls.card.summary}.\n\n"
            "| field | default | allowed | meaning | source |\n|---|---|---|---|---|\n"
        )
        for f in dataclasses.fields(cls):
            rule = f.metadata["rule"]
            allowed = rule.allowed.replace("|", "\\|")
            parts.append(f"| `{f.name}` | {f.default} | {allowed} | {f.metadata['doc']} | {f.metadata['source']} |\n")
    return "".join(parts)


def pages() -> dict[Path, str]:
    """What the files should hold."""
    readme = (ROOT / "README.md").read_text()
    head, rest = readme.split(START)
    return {
        ROOT / "README.md": head + START + table(controls=False) + END + rest.split(END, 1)[1],
        ROOT / "docs" / "methods.md": fields(),
    }


if __name__ == "__main__":
    stale = [p for p, text in pages().items() if not p.exists() or p.read_text() != text]
    if "--check" in sys.argv:
        sys.exit(f"out of date, run `make docs`: {', '.join(p.name for p in stale)}" if stale else 0)
    for path, text in pages().items():
        path.write_text(text)

"""Writes docs/first-study.md from the results of the first study."""

from pathlib import Path

from benchmarks.first_study.page import write_page

if __name__ == "__main__":
    docs = Path(__file__).resolve().parents[2] / "docs"
    write_page(docs / "evidence", docs / "first-study.md")

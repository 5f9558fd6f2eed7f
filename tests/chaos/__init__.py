"""Servers under faults, judged by what their clients have seen: `python -m tests.chaos chaos|lost|soak`."""

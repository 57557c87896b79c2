"""What a check found, in words."""

from collections import Counter

SHOWN = 3  # findings of one kind that are spelled out; the rest are counted


class Findings:
    """Lines, a few of each kind."""

    def __init__(self) -> None:
        self.lines: dict[str, list[str]] = {}
        self.counts: Counter[str] = Counter()

    def add(self, kind: str, line: str) -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= SHOWN:
            self.lines.setdefault(kind, []).append(line)

    def all(self) -> list[str]:
        """What was found, in the order of the checks."""
        out = []
        for kind, lines in self.lines.items():
            more = self.counts[kind] - len(lines)
            out += lines + ([f"... and {more} more: {kind}"] if more else [])
        return out


def rounded(values) -> str:
    return " ".join(f"{value:.2f}" for value in values)

"""What a section of the benchmark says: tables, figures that must hold, notes; as Markdown."""

import dataclasses


@dataclasses.dataclass
class Check:
    """A required figure."""

    what: str
    value: float
    limit: float
    at_least: bool = True

    @property
    def ok(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        bound = "at least" if self.at_least else "at most"
        return (f"{'ok' if self.ok else '**MISSED**'}: {self.what} {self.value:.4g} "
                f"({bound} {self.limit:.4g})")


@dataclasses.dataclass
class Section:
    title: str
    columns: list[str] = dataclasses.field(default_factory=list)
    rows: list[list] = dataclasses.field(default_factory=list)
    checks: list[Check] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def markdown(self) -> str:
        parts = [f"## {self.title}"]
        if self.rows:
            parts.append(table(self.columns, self.rows))
        if lines := [*map(str, self.checks), *self.notes]:
            parts.append("\n".join(f"* {line}" for line in lines))
        return "\n\n".join(parts) + "\n"

    def data(self) -> dict:
        return {
            "title": self.title,
            "rows": [dict(zip(self.columns, row, strict=True)) for row in self.rows],
            "checks": [{**dataclasses.asdict(check), "ok": check.ok} for check in self.checks],
            "notes": self.notes,
        }


def table(columns: list[str], rows: list[list]) -> str:
    """Markdown whose columns are also aligned for a terminal: the first left, the others right."""
    cells = [columns] + [[show(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]

    def line(row: list[str]) -> str:
        padded = [row[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = "-" * widths[0] + " | " + " | ".join("-" * (width - 1) + ":" for width in widths[1:])
    return "\n".join([line(cells[0]), f"| {rule} |", *map(line, cells[1:])])


def show(value) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2e}" if 0 < abs(value) < 1e-4 else f"{value:.4g}"

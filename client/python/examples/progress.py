"""A progress bar on a terminal; plain lines elsewhere."""

import shutil
import sys


class Progress:
    """One bar at a time, on stderr. `with Progress("decode") as bar: bar.update(0.4, "26/64")`."""

    WIDTH = 16  # a line fits 80 columns

    def __init__(self, label: str):
        self._label = label
        self._terminal = sys.stderr.isatty()
        self._shown = -1
        self.update(0.0)

    def update(self, fraction: float, note: str = "") -> None:
        """fraction: 0 to 1. Elsewhere than on a terminal each started quarter is one line."""
        if self._terminal:
            filled = round(self.WIDTH * fraction)
            line = f"{self._label:<20} [{'#' * filled}{'.' * (self.WIDTH - filled)}] {note}"
            sys.stderr.write("\r\x1b[K" + line[:shutil.get_terminal_size().columns - 1])
        elif int(4 * fraction) > self._shown:
            self._shown = int(4 * fraction)
            sys.stderr.write(f"{self._label}: {fraction:.0%} {note}".rstrip() + "\n")
        sys.stderr.flush()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._terminal:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

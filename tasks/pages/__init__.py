"""The pages that steps write for people: self-contained HTML, and the plots in it. What comes from data is escaped."""

from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader, StrictUndefined, Undefined


class Missing(ChainableUndefined):
    """What a run or a version of older code did not leave. It reads as a dash, and so does whatever is in it."""

    __slots__ = ()

    def __str__(self) -> str:
        return "–"

    def __call__(self, *arguments: Any, **named: Any) -> Any:  # its methods are missing, too
        return self


def number(value: Any, form: str = ".4g") -> str:
    """A number in one of Python's formats; a dash where there is none."""
    return "–" if value is None or isinstance(value, Undefined) else format(value, form)


def duration(seconds: float | None) -> str:
    """A time that people can read; a dash where there is none."""
    if seconds is None or isinstance(seconds, Undefined):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)
TEMPLATES.filters |= {"number": number, "duration": duration}
TOLERANT = TEMPLATES.overlay(undefined=Missing)  # for pages about what older code may have written

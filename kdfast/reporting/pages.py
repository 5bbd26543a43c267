"""The templates of the pages: one that all extend, and each beside the code that fills it."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from kdfast.reporting.words import counted

_BASE = Path(__file__).parent / "templates"


def template(path: Path) -> Template:
    """A page's template, which may extend ``base.html.j2``; a figure that is missing is an error."""
    environment = Environment(
        loader=FileSystemLoader([path.parent, _BASE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["counted"] = counted
    return environment.get_template(path.name)

"""mkdocs hook: writes the settings and the metrics into the pages, from the classes and the list that define them."""

from __future__ import annotations

import ast
import inspect
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, get_type_hints

from medalign import config
from medalign.observability.metrics import METRICS


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace `{{ settings }}` and `{{ metrics }}`."""
    for name, build in {"{{ settings }}": settings, "{{ metrics }}": metrics}.items():
        if name in markdown:
            markdown = markdown.replace(name, build())
    return markdown


def metrics() -> str:
    """Return the table of the metrics that a run logs."""
    rows = [f"| `{m.name}` | {m.meaning} | {m.unit} | {m.when or 'every row of a training step'} |" for m in METRICS]
    return "\n".join(["| Metric | Meaning | Unit | Logged |", "| --- | --- | --- | --- |", *rows])


def settings() -> str:
    """Return one table per section."""
    parts = []
    for section in fields(config.Config):
        kind = get_type_hints(config.Config)[section.name]
        rows = "\n".join(_rows(kind, section.name))
        parts.append(
            f"## {section.name}\n\n{kind.__doc__}\n\n| Setting | Default | Meaning |\n| --- | --- | --- |\n{rows}"
        )
    return "\n\n".join(parts)


def _rows(kind: type, prefix: str) -> list[str]:
    hints, docs, rows = get_type_hints(kind), _field_docs(kind), []
    for item in fields(kind):
        name = f"{prefix}.{item.name}"
        if is_dataclass(hints[item.name]):
            rows += _rows(hints[item.name], name)
        else:
            rows.append(f"| `{name}` | `{_default(item)!r}` | {docs[item.name]} |".replace("\n", " "))
    return rows


def _default(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _field_docs(kind: type) -> dict[str, str]:
    """Return the text below each field, also of the classes that a section inherits from."""
    docs = {}
    for owner in filter(is_dataclass, kind.__mro__):
        docs |= _own_field_docs(owner)
    return docs


def _own_field_docs(kind: type) -> dict[str, str]:
    body = ast.parse(inspect.getsource(kind)).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for field, text in zip(body, body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            docs[field.target.id] = " ".join(str(text.value.value).split()).replace("|", "\\|")  # type: ignore[union-attr]
    return docs

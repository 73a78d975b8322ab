"""mkdocs hook: writes the settings into configuration.md from the fields of the configuration classes."""

from __future__ import annotations

import ast
import inspect
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, get_type_hints

from medalign import config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace `{{ settings }}`."""
    return markdown.replace("{{ settings }}", settings()) if "{{ settings }}" in markdown else markdown


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

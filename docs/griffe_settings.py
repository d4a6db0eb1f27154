"""What mkdocstrings is told of dataclass fields: their defaults and, as their text, the help in their metadata."""

import ast
from typing import Any

import griffe


class SettingsOfDataclasses(griffe.Extension):
    """Reads ``_setting(default, help)`` and ``field(default=..., metadata={"help": help})``."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Put the default and the help where a reader of the page sees them.

        Args:
            attr: The attribute.
            **kwargs: Unused.
        """
        call = attr.value
        if not isinstance(call, griffe.ExprCall) or str(call.function) not in {"_setting", "field"}:
            return
        named = {a.name: a.value for a in call.arguments if isinstance(a, griffe.ExprKeyword)}
        plain = [a for a in call.arguments if not isinstance(a, griffe.ExprKeyword)]
        metadata = named.get("metadata")
        if plain:
            attr.value, text = plain[0], plain[1]
        elif isinstance(metadata, griffe.ExprDict):
            attr.value, text = named["default"], metadata.values[0]
        else:
            return
        if attr.docstring is None:
            attr.docstring = griffe.Docstring(ast.literal_eval(str(text)), parent=attr)

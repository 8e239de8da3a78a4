"""JSON documents of a known format and version: strict to read, exact to write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def write_document(name: str, version: int, fields: dict[str, Any], *, indent: int | None) -> str:
    """Returns the JSON of fields with their format and version; floats keep every bit.

    Args:
        name: The "format" of the document.
        version: The "version" of the format.
        fields: Values that `json` can write; NaN and infinity are refused.
        indent: Spaces to indent by, or None for the canonical form: one line, sorted keys.

    Returns:
        JSON.

    Raises:
        ValueError: A number is not finite.
    """
    document = {"format": name, "version": version, **fields}
    if indent is None:
        return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return json.dumps(document, indent=indent, allow_nan=False)


def read_document(text: str, name: str, versions: Mapping[int, set[str]]) -> dict[str, Any]:
    """Reads a JSON object of a known format, version and exactly the known fields.

    Args:
        text: JSON.
        name: The expected "format".
        versions: The versions that can be read, each with the names of its other entries; all
            must be there.

    Returns:
        The fields.

    Raises:
        TypeError: `text` is not a string.
        ValueError: It is not JSON, a number is not finite, or something is missing or unknown.
    """
    if not isinstance(text, str):
        raise TypeError(f"Expected `text` to be a string of JSON. Received: text={text!r}.")

    def refuse_constant(constant: str) -> float:
        raise ValueError(f"Expected finite numbers in a {name}. Received: {constant}.")

    expected = f"Expected the JSON of a {name}. Received: {text[:80]!r}"
    try:
        document = json.loads(text, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"{expected} ({error}).") from None
    if not isinstance(document, dict) or document.get("format") != name:
        raise ValueError(f"{expected}.")
    found = document.get("version")
    if isinstance(found, bool) or not isinstance(found, int) or found not in versions:
        known = " or ".join(map(str, versions))
        raise ValueError(
            f"Expected version {known} of {name}. Received: version={found!r}. "
            "Read it with the release of keras_bandmf that wrote it."
        )
    del document["format"], document["version"]
    fields = versions[found]
    if set(document) != fields:
        raise ValueError(
            f"Expected exactly the fields of a {name}. Received: missing "
            f"{sorted(fields - set(document))}, unknown {sorted(set(document) - fields)}."
        )
    return document

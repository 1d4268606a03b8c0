"""The study file as a JSON schema, for editors: made from the models and what their docstrings say of each key.

Looser than what a study is checked by: editors help with names and types, `load_study` decides.
"""

from __future__ import annotations

from typing import Any

from raytune_autotuner.study.spaces import KEY, shipped
from raytune_autotuner.study.study import Study

_DRAFT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """The schema of a study file as it is written, so with `space:` too."""
    schema = Study.model_json_schema()
    space = {
        "description": f"Parameters and constraints to take over: one of {', '.join(shipped())}, or a file.",
        "type": "string",
    }
    properties = {**schema.pop("properties"), KEY: space}
    return {"$schema": _DRAFT, **schema, "properties": properties}

"""The base of all configuration sections."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

MAX_SECONDS = 2_000_000.0
"""Bound on a time, 23 days: poll(2) takes milliseconds in 32 bits."""


class Section(BaseModel):
    """A part of the configuration: immutable; unknown keys and numbers that are not finite are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        ser_json_inf_nan="constants",  # in mappings of any values, such as options of a chat template
    )

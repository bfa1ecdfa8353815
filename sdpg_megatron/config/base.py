"""Base class of all configuration sections."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

MAX_SECONDS = 2_000_000.0
"""Maximum of a time limit, 23 days: poll(2) takes milliseconds in 32 bits."""


class Section(BaseModel):
    """Immutable part of the configuration. Unknown keys, NaN and infinity are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        ser_json_inf_nan="constants",  # for mappings with values of any type, such as chat template options
    )

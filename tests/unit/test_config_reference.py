"""The configuration reference and the JSON schema are generated, complete and up to date."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sdpg_megatron.config import RunConfig
from tests.unit.test_tools import ROOT, tool

reference = tool("config_reference")


def test_the_committed_files_are_up_to_date() -> None:
    assert reference.main(["--check"]) == 0


@pytest.mark.parametrize("name", [reference.PAGE, reference.SCHEMA])
def test_a_stale_file_is_found_and_written_again(tmp_path: Path, name: str) -> None:
    for file in (reference.PAGE, reference.SCHEMA):
        shutil.copy(ROOT / "docs" / file, tmp_path)
    fresh = (tmp_path / name).read_text(encoding="utf-8")
    (tmp_path / name).write_text(fresh.replace("Number of rollout steps.", "Steps."), encoding="utf-8")
    assert reference.main(["--check", "--docs", str(tmp_path)]) == 1
    assert reference.main(["--docs", str(tmp_path)]) == 0
    assert (tmp_path / name).read_text(encoding="utf-8") == fresh


def test_every_field_and_section_has_a_description() -> None:
    schema = reference.clean(RunConfig.model_json_schema())
    for name, section in reference.sections(schema, schema):
        assert section.get("description"), name
        assert not [key for key, field in section["properties"].items() if not {"$ref", "description"} & field.keys()]


def test_every_row_has_type_default_and_description() -> None:
    page = (ROOT / "docs" / reference.PAGE).read_text(encoding="utf-8")
    tables = page.partition(reference.BEGIN)[2].partition("### Defaults of")[0]
    rows = [line.replace("\\|", "").split("|")[1:-1] for line in tables.splitlines() if line.startswith("|")]
    assert len(rows) > 150 and all(len(row) == 4 and all(cell.strip() for cell in row) for row in rows)


def test_fields_may_be_left_to_the_command_line_in_an_editor() -> None:
    schema = json.loads((ROOT / "docs" / reference.SCHEMA).read_text(encoding="utf-8"))
    assert "required" not in schema and not any("required" in part for part in schema["$defs"].values())

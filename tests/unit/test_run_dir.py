"""Names that a run's folder is checked for are all that a run makes there."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdpg_megatron.errors import ConfigError
from sdpg_megatron.train.run_dir import FILES, FOLDERS, check_run_dir, check_writable


def test_each_name_is_checked(tmp_path: Path) -> None:
    for name in FOLDERS:
        check_run_dir(tmp_path)
        (tmp_path / name).write_text("")
        with pytest.raises(ConfigError, match=f"with a file named {name}.*Fix: remove or rename the file"):
            check_run_dir(tmp_path)
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
    for name in FILES:
        (tmp_path / name).mkdir()
        with pytest.raises(ConfigError, match=f"with a folder named {name}.*Fix: remove or rename the folder"):
            check_run_dir(tmp_path)
        (tmp_path / name).rmdir()
        (tmp_path / name).write_text("")
    check_run_dir(tmp_path)


def test_a_folder_below_a_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir: found '.*file/run \(Not a directory\)'"):
        check_writable(tmp_path / "file" / "run")
    check_writable(tmp_path / "none" / "run")
    assert not (tmp_path / "none").exists()

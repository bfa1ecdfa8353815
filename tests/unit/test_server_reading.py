"""What the servers' transformers makes of config.json, by a run of their interpreter."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from sdpg_megatron.architecture import read_architecture
from sdpg_megatron.errors import ConfigError, RolloutError
from sdpg_megatron.rollout.sglang.interpreter import check_server_reading
from tests.tiny import write_tiny_model

OLD = """
__version__ = "4.57.6"
class AutoConfig:  # keeps keys that it does not know beside the defaults of those that it does
    def __init__(self, **keys):
        self.rope_theta, self.rope_scaling = 1e4, None
        self.__dict__.update(keys)
    @classmethod
    def from_pretrained(cls, folder, local_files_only):
        import json
        return cls(**json.load(open(folder + "/config.json")))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_tiny_model(tmp_path / "model", "qwen3", tied=False, seed=1, layers=1)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def interpreter(folder: Path, package: str) -> str:
    """This interpreter, with another transformers."""
    (folder / "transformers.py").write_text(package)
    code = f"import sys; sys.path.insert(0, '{folder}'); sys.argv = sys.argv[1:]; exec(open(sys.argv[0]).read())"
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nshift\nexec "{sys.executable}" -c "{code}" "$@"\n')
    python.chmod(0o755)
    return str(python)


def test_the_installed_transformers_reads_the_file(folder: Path) -> None:
    check_server_reading(sys.executable, folder, read_architecture(folder))


def test_a_transformers_that_takes_another_rotary_base_is_refused(folder: Path, tmp_path: Path) -> None:
    python = interpreter(tmp_path, OLD)
    message = rf"config\.json: rotary base: found 10000\.0, expected 1000000\.0; transformers 4\.57\.6 of {python} does"
    with pytest.raises(ConfigError, match=message):
        check_server_reading(python, folder, read_architecture(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 1e6}))
    check_server_reading(python, folder, read_architecture(folder))


def test_an_interpreter_that_reads_nothing_is_one_error(folder: Path, tmp_path: Path) -> None:
    broken = interpreter(tmp_path, "raise ImportError('no torch')")
    with pytest.raises(RolloutError, match=r"transformers cannot read .*config\.json \(ImportError: no torch\)\. Fix"):
        check_server_reading(broken, folder, read_architecture(folder))
    with pytest.raises(RolloutError, match=r"\(No such file or directory\)\. Fix"):
        check_server_reading("/no/such/python", folder, read_architecture(folder))

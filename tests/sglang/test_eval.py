"""An evaluation whose responses come from a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.e2e.runs import evaluate
from tests.sglang.conftest import Running


def test_a_server_and_transformers_give_the_same_greedy_responses(server: Running, model: Path, tmp_path: Path) -> None:
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps({"question": f"{n} + {n}?", "answer": str(2 * n)}) + "\n" for n in range(5)))
    settings = [
        f"data.eval=[{data}]",
        "data.max_prompt_tokens=128",
        "eval.max_response_tokens=8",
        "eval.responses=true",
    ]
    served = ["rollout.engine=sglang", f"rollout.sglang.urls=[{server.url}]"]
    found: dict[str, list[dict[str, Any]]] = {}
    for engine, more in {"hf": [], "sglang": served}.items():
        done = evaluate(model, *settings, *more, "--out", tmp_path / engine)
        assert done.returncode == 0, done.stderr[-3000:]
        found[engine] = [json.loads(line) for line in (tmp_path / engine / "sums.jsonl").read_text().splitlines()]
    for here, there in zip(found["hf"], found["sglang"], strict=True):
        assert here["greedy"] == there["greedy"]
        assert len(there["sampled"]["rewards"]) == 4

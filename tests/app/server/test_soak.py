"""The soak in short: nothing wrong, nothing left."""

import json

import pytest

from tests.bench.soak import main


@pytest.mark.slow
def test_a_short_soak(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--seconds", "20"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    # Twenty seconds are too few to call memory flat, and a test asserts no time; the benchmark does both.
    assert [p for p in result["problems"] if not p.startswith(("memory", "/healthz took"))] == []
    assert sum(result["done"].values()) > 10
    assert {"bench", "machine", "healthz_ms", "memory_mib", "growth"} <= set(result)

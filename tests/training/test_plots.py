"""Figures from training logs: what is read, and that it is drawn."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from encoder.errors import DataError
from training.plots import (
    budget_curves,
    convergence_curves,
    draw_norms,
    gradnorm_curves,
    main,
    norm_comparison,
    norms_table,
    read_run,
    smooth,
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A log with two parts, held-out figures, a repeated step, a step that was not finite, and a cut line."""
    folder = tmp_path / "f8"
    folder.mkdir()
    rows = [
        {
            "step": s,
            "loss": 5 - s,
            "grad_norm": 10.0 / s,
            "grad_norm/align": 6.0 / s,
            "grad_norm/encoder": 8.0 / s,
        }
        for s in (1, 2, 3, 3, 4)
    ]
    rows[3]["grad_norm"] = 7.0  # step 3 again, after a resume
    rows[4]["grad_norm/align"] = float("nan")
    rows.insert(2, {"step": 2, "eval/noun": 0.5})
    rows.append({"step": 4, "eval/noun": 0.75, "eval/motion": 0.25})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 5, "lo')
    return folder


def test_curves(run: Path) -> None:
    found = read_run(run)
    assert found["loss"].x == [1, 2, 3, 4]
    assert found["grad_norm"].y == [10.0, 5.0, 7.0, 2.5]
    assert found["grad_norm/align"].x == [1, 2, 3]
    assert found["eval/noun"].y == [0.5, 0.75]


def test_gradient_norms_by_part(run: Path) -> None:
    assert [c.name for c in gradnorm_curves(run)] == ["all parts", "align", "encoder"]
    assert [c.name for c in gradnorm_curves(run, "^al")] == ["all parts", "align"]
    with pytest.raises(DataError, match="logged are align, encoder"):
        gradnorm_curves(run, "projector")


def test_convergence_over_epochs(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "f16"
    other.mkdir()
    (other / "metrics.jsonl").write_text('{"step": 8, "eval/noun": 0.9}\n')
    curves = convergence_curves([run, other], "noun", [2, 8])
    assert [(c.name, c.x, c.y) for c in curves] == [("f8", [1, 2], [0.5, 0.75]), ("f16", [1], [0.9])]
    with pytest.raises(DataError, match="it has noun, motion"):
        convergence_curves([run], "verb")


def test_smoothing() -> None:
    assert smooth([1, 2, 3, 6], 2) == [1, 1.5, 2.5, 4.5]
    assert smooth([1, 2], 1) == [1, 2]


def test_commands_draw(run: Path, tmp_path: Path, capsys) -> None:
    assert main(["gradnorm", str(run), "--out", str(tmp_path / "g.png"), "--smooth", "2"]) == 0
    assert main(["convergence", str(run), "--metric", "noun", "--out", str(tmp_path / "c.png")]) == 0
    shown = capsys.readouterr().out
    assert "3 curves, 4 steps" in shown
    assert "f8: 0.7500 after 4 steps" in shown
    for name in ("g", "c"):
        assert Image.open(tmp_path / f"{name}.png").size[0] > 600
    rows = list(csv.DictReader((tmp_path / "g.csv").read_text().splitlines()))
    assert [r["value"] for r in rows if r["curve"] == "all parts"] == ["10.0", "5.0", "7.0", "2.5"]


def test_norms_of_two_runs_side_by_side(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "plain"
    shutil.copytree(run, other)
    text = (
        (other / "metrics.jsonl").read_text().replace('"grad_norm/encoder": 8.0', '"grad_norm/encoder": 80.0')
    )
    (other / "metrics.jsonl").write_text(text)
    runs = norm_comparison([other, run], "encoder")
    assert runs["f8"]["norms"]["encoder"]["value"] == pytest.approx([8, 4, 8 / 3, 2])
    assert runs["f8"]["last"] == {"loss": 1, "noun": 0.75, "motion": 0.25}
    lines = [line.split() for line in norms_table(runs).splitlines()]
    assert ["encoder", "plain", "4", "80", "80", "2", "2", "0"] in lines
    assert ["encoder", "f8", "4", "8", "8", "2", "2", "0"] in lines
    draw_norms(runs, tmp_path / "drawn")
    assert {p.name for p in (tmp_path / "drawn").iterdir()} == {"norms_all_parts.png", "norms_encoder.png"}
    with pytest.raises(DataError, match="Two runs are named f8"):
        norm_comparison([run, run])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gradnorm", "none"], "Cannot read the log"),
        (["convergence", "RUN", "--metric", "noun", "--steps-per-epoch", "1", "2"], "2 steps per epoch"),
        (["norms", "RUN"], "no readable checkpoint|Cannot read"),
        (["convergence", "RUN", "--metric", "verb"], "no figure 'verb'"),
    ],
)
def test_wrong_use(arguments, words, run, tmp_path, capsys) -> None:
    filled = [str(run) if a == "RUN" else a for a in arguments]
    assert main([*filled, "--out", str(tmp_path / "x.png")]) == 2
    assert re.search(words, capsys.readouterr().err)


def test_empty_log(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no figures yet"):
        read_run(tmp_path)


def encoder_result(tmp_path: Path) -> Path:
    """Settings as `training.evaluate world --encoder` writes them."""
    rows = [
        {"frames": frames, "resolution": 112, "K": keep, "selector": selector, "ms_per_clip": ms}
        | {"noun": {"top1": {"value": value}}}
        for frames, keep, selector, ms, value in (
            (8, None, "flux", 40.0, 0.9),
            (8, 64, "flux", 6.0, 0.85),
            (8, 128, "flux", 11.0, 0.88),
            (8, 64, "random", 5.0, 0.4),
            (1, None, "flux", 5.5, 0.3),
        )
    ]
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"settings": rows}))
    return path


def test_the_best_input_at_each_count_has_a_line_of_its_own(tmp_path: Path) -> None:
    result = encoder_result(tmp_path)
    rows = json.loads(result.read_text())["settings"]
    for frames, keep, value in ((16, 64, 0.8), (16, 128, 0.91), (4, 128, 0.89)):
        other = {"frames": frames, "K": keep, "noun": {"top1": {"value": value}}}
        rows.append({**rows[1], **other, "ms_per_clip": 2.0 * frames})
    result.write_text(json.dumps({"settings": rows}))
    curves = budget_curves(result, "noun")
    tokens, ms = curves["best frames x resolution"]
    assert (tokens.x, tokens.y) == ([64, 128, 512], [85.0, 91.0, 90.0])
    assert ms.x == [6.0, 32.0, 40.0]
    assert curves["flux"][0].y == [85.0, 88.0, 90.0]
    result.write_text(json.dumps({"settings": rows[1:3]}))
    with pytest.raises(DataError, match="keeps every token"):
        budget_curves(result, "noun")


def test_budget_lines_meet_where_every_token_is_kept(tmp_path: Path, capsys) -> None:
    result = encoder_result(tmp_path)
    curves = budget_curves(result, "noun")
    assert set(curves) == {"flux", "random", "fewer frames"}
    tokens, ms = curves["flux"]
    assert (tokens.x, tokens.y) == ([64, 128, 512], [85.0, 88.0, 90.0])
    assert ms.x == [6.0, 11.0, 40.0]
    assert curves["random"][0].x == [64, 512]
    assert curves["fewer frames"][0].x == [64, 512]
    assert {pair[0].y[-1] for pair in curves.values()} == {90.0}
    out = tmp_path / "budget.png"
    assert main(["budget", str(result), "--out", str(out)]) == 0
    assert Image.open(out).width > 500
    rows = list(csv.reader(out.with_suffix(".csv").open()))
    assert rows[0] == ["curve", "tokens", "value"]
    assert len(rows) == 1 + 3 + 2 + 2
    with pytest.raises(DataError, match="ms_per_clip and motion"):
        budget_curves(result, "motion")
    assert main(["budget", str(tmp_path / "none.json"), "--out", str(out)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1

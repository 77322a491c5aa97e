"""Budgets, plans and their cost."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from encoder.budget import Budget, InputSpace, Plan, PlanRow, PlanTable
from encoder.config import BASE, MICRO, SIZES, SMALL
from encoder.cost import Speed, encoder_features, encoder_macs, encoder_mib
from encoder.errors import BudgetError
from encoder.video.reader import VideoInfo


@dataclass
class Video:
    duration_s: float = 10.0
    frames: int | None = 300
    kind: str = "video"


@pytest.mark.parametrize(
    ("config", "keep", "giga"),
    [
        (SMALL, 3072, 153.88),
        (SMALL, 2048, 83.27),
        (SMALL, 1024, 31.98),
        (SMALL, 512, 13.59),
        (BASE, 3072, 440.08),
        (BASE, 2048, 254.76),
        (BASE, 1024, 108.10),
        (BASE, 512, 49.26),
    ],
)
def test_macs_equal_the_papers_gflops(config, keep: int, giga: float) -> None:
    assert encoder_macs(config, keep, keep, pool=True, classes=400) / 1e9 == pytest.approx(giga, abs=0.006)


def test_token_optimization_counts_the_extra_patches() -> None:
    assert encoder_macs(SMALL, 7776, 3072, pool=True, classes=400) / 1e9 == pytest.approx(154.95, abs=0.006)


@pytest.mark.parametrize(
    ("keep", "frames", "side"), [(512, 8, 168), (1024, 16, 168), (2048, 24, 168), (3072, 24, 224)]
)
def test_default_policy_follows_the_papers_token_optimization_table(
    keep: int, frames: int, side: int
) -> None:
    plan = Budget(keep).plan(Video(), SMALL)
    assert plan == Plan(frames, side, side, keep)


@given(st.sampled_from(sorted(SIZES)), st.integers(1, 10_000), st.one_of(st.none(), st.integers(1, 50)))
def test_plans_are_always_possible(name: str, tokens: int, frames: int | None) -> None:
    config = SIZES[name]
    plan = Budget(tokens).plan(Video(frames=frames), config)
    assert plan.keep <= plan.grid.size
    assert plan.keep == tokens or plan.keep == plan.grid.size
    assert plan.frames <= (frames or 10**9)
    assert plan.height in range(*config.resolution_range)


def test_a_larger_budget_never_embeds_fewer_patches() -> None:
    seen = [Budget(tokens).plan(Video(), SMALL).grid.size for tokens in range(64, 4096, 64)]
    assert seen == sorted(seen)


def test_image_full_and_short_clips() -> None:
    assert Budget(64).plan(Video(kind="image", frames=1), MICRO).frames == 1
    full = Budget.full().plan(Video(), SMALL)
    assert full.keep == full.grid.size == 24 * 18 * 18
    assert Budget.full().plan(Video(frames=3), SMALL).frames == 3


def test_auto_takes_the_most_tokens_within_the_latency_target() -> None:
    predicted = {}

    def seconds(plan: Plan) -> float:
        predicted[plan.keep] = plan.keep / 500
        return predicted[plan.keep]

    plan = Budget.auto(1.0).plan(Video(), SMALL, predict_s=seconds)
    assert plan.keep == 496
    assert Budget.auto(1e-9).plan(Video(), SMALL, predict_s=seconds).keep == 16
    with pytest.raises(BudgetError, match="VideoChat"):
        Budget.auto().plan(Video(), SMALL)


def test_measured_table_replaces_the_policy(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(
        '[{"tokens": 256, "frames": 12, "resolution": 98}, {"tokens": 64, "frames": 8, "resolution": 84}]'
    )
    table = PlanTable.read(path)
    assert Budget(100).plan(Video(), MICRO, table=table) == Plan(12, 98, 98, 100)
    assert Budget(64).plan(Video(), MICRO, table=table).frames == 8
    # Between rows the next larger one decides, below all of them the first.
    assert (
        Budget(65).plan(Video(), MICRO, table=table).grid
        == Budget(256).plan(Video(), MICRO, table=table).grid
    )
    assert Budget(3).plan(Video(), MICRO, table=table) == Plan(8, 84, 84, 3)
    path.write_text('[{"tokens": 256}]')
    with pytest.raises(BudgetError, match="Cannot read the plan table"):
        PlanTable.read(path)


@given(st.integers(1, 4000), st.integers(1, 40))
def test_a_measured_table_never_takes_tokens_away(tokens: int, frames: int) -> None:
    """Beyond its last row, and for short clips, a budget buys what it bought without the table."""
    table = PlanTable.of([PlanRow(64, 4, 56), PlanRow(128, 24, 56)])
    video = Video(frames=frames)
    measured, plain = (Budget(tokens).plan(video, SMALL, table=t) for t in (table, None))
    row = table.lookup(tokens)
    if tokens <= row.tokens and frames >= row.frames:
        assert (measured.frames, measured.height) == (row.frames, row.resolution)
    else:
        assert measured.keep >= plain.keep
    assert measured.frames <= frames


def test_a_table_beyond_the_trained_range_goes_on_beyond_its_last_row() -> None:
    config = MICRO.replace(frames_range=(8, 10, 2), resolution_range=(112, 126, 14))
    table = PlanTable.of([PlanRow(64, 16, 112)])
    plans = [Budget(tokens).plan(Video(), config, table=table) for tokens in (64, 600, 2000)]
    assert [plan.keep for plan in plans] == [64, 600, 1024]
    assert {plan.frames for plan in plans} == {16}


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        (512, Budget(512)),
        ("64", Budget(64)),
        ("full", Budget.full()),
        ("auto", Budget.auto(2.0)),
        ("auto:0.5s", Budget.auto(0.5)),
        (None, Budget(1024)),
    ],
)
def test_budgets_are_parsed_from_text(text, budget: Budget) -> None:
    assert Budget.of(text) == budget


@pytest.mark.parametrize("text", ["many", "0", "-3", "auto:x", "auto:-1", "1.5", "auto:nan"])
def test_wrong_budgets(text: str) -> None:
    with pytest.raises(BudgetError):
        Budget.of(text)


def test_speed_fit_recovers_known_rates() -> None:
    rows = [encoder_features(SMALL, seen, keep) for seen in (576, 2304, 7776) for keep in (64, 300, 576)]
    true = Speed((3.0, 20.0, 10.0, 15.0))
    fitted = Speed.fit(rows, [true.milliseconds(row) for row in rows])
    for row in [encoder_features(SMALL, 4000, 2000), encoder_features(SMALL, 1000, 100)]:
        assert fitted.milliseconds(row) == pytest.approx(true.milliseconds(row), rel=0.05)
    assert all(weight >= 0 for weight in fitted.weights)


def test_memory_grows_with_the_budget() -> None:
    small, large = (encoder_mib(SMALL, 16, 224, 224, keep) for keep in (256, 4096))
    assert 0 < small < large


WIDE = VideoInfo("video", 1920, 1080, 10.0, 300, "h264", "mp4", 0, "d")


@given(tokens=st.integers(1, 5000), width=st.integers(16, 4000), height=st.integers(16, 4000))
def test_an_input_in_the_aspect_of_its_video(tokens: int, width: int, height: int) -> None:
    space = InputSpace((2, 4, 8, 16), (128, 256, 512), 32, frames_per_cell=2, keeps_aspect=True)
    plan = Budget(tokens).plan(replace(WIDE, width=width, height=height), space)
    assert plan.height % 32 == plan.width % 32 == 0
    assert plan.grid.frames == plan.frames // 2
    assert 1 <= plan.keep <= min(tokens, plan.grid.size)
    assert plan.grid.height * plan.grid.width <= 16**2
    if 0.5 < width / height < 2 and plan.grid.height >= 8:
        assert plan.width / plan.height == pytest.approx(width / height, rel=0.3)


def test_frames_are_sampled_that_are_worth_it() -> None:
    space = InputSpace((1, 4, 8, 16, 64), (256, 512), 64, least_per_frame=16, most_fps=2.0)
    assert Budget(64).plan(WIDE, space).frames == 4  # more would leave fewer than 16 tokens each
    assert Budget(4096).plan(WIDE, space).frames == 16  # 64 would be more than two a second
    assert Budget.full().plan(WIDE, space).frames == 20
    assert Budget(64).plan(replace(WIDE, kind="image"), space).frames == 1
    assert Budget(10, frames=3).plan(WIDE, space).frames == 3

"""Annotations, mixtures, sampling strategies, the world as records, the feature cache."""

import json
from pathlib import Path

import pytest
import torch

from encoder.errors import ConfigError, DataError
from encoder.tokens import Grid
from tests.training.synthetic.tiny_world import make_cache
from training.data.annotations import read_json
from training.data.datasets import DatasetConfig, choose_numbers
from training.data.feature_cache import FeatureCache, Features, stack
from training.data.synthetic_examples import Asking, WorldExamples
from training.data.synthetic_source import WorldSource
from training.synthetic.dataset import World
from training.synthetic.phrases import sentence
from training.synthetic.question_templates import QUESTIONS
from training.synthetic.sprites import procedural_bank
from training.trainer.recipe import build


def test_llava_records(llava_json: Path) -> None:
    records = read_json(llava_json, llava_json.parent)
    assert len(records) == 15
    first, image, text = records[0], records[12], records[13]
    assert first.turns == (("What is it?", "Bars that count to 0."),)
    clip = first.media.load(4, 56)
    assert clip.frames.shape[0] == 4
    assert image.media.load(4, 56).frames.shape[0] == 1
    assert not text.has_media


def test_time_spans_and_jsonl(tmp_path: Path, llava_json: Path) -> None:
    row = {"id": 1, "video": "11.mp4", "start": 0.2, "end": 0.6, "caption": "Bars."}
    (tmp_path / "c.jsonl").write_text(json.dumps(row) + "\n\n")
    record = read_json(tmp_path / "c.jsonl", llava_json.parent)[0]
    assert record.turns == (("", "Bars."),)
    times = record.media.load(4, 56).times_s
    assert 0.15 <= times[0] <= times[-1] <= 0.6


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[1]",
        '[{"video": "x"}]',
        '[{"video": "x", "caption": "y", "start": [1]}]',
        '[{"conversations": [{"from": "human", "value": "x"}]}]',
        '[{"conversations": [{"from": "gpt", "value": "x"}, {"from": "human", "value": "y"}]}]',
    ],
)
def test_malformed_annotations_name_the_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"bad\.json"):
        read_json(path, tmp_path, need="answer")


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("all", list(range(10))),
        ("first:3", [0, 1, 2]),
        ("first:20%", [0, 1]),
        ("end:2", [8, 9]),
        ("end:0", []),
        ("end:30%", [7, 8, 9]),
    ],
)
def test_sampling_strategies(strategy: str, expected: list[int]) -> None:
    assert list(choose_numbers(10, strategy, "x")) == expected


def test_random_sampling_repeats() -> None:
    first, second = (choose_numbers(100, "random:10%", "x") for _ in range(2))
    assert first == second
    assert len(set(first)) == 10
    for wrong in ("some", "first:x", "last:3", "first:-1"):
        with pytest.raises(ConfigError, match="sampling_strategy"):
            choose_numbers(0, wrong, "x")


def test_mixture(tmp_path: Path, llava_json: Path) -> None:
    (tmp_path / "mix.yaml").write_text(
        f"datasets:\n- {{json_path: {llava_json}, sampling_strategy: 'first:4'}}\n"
        f"- {{json_path: {llava_json}, sampling_strategy: 'random:20%'}}\n"
    )
    source = DatasetConfig(yaml_path=str(tmp_path / "mix.yaml")).open()
    assert [len(part) for part in source.sources] == [4, 3]
    assert source[5].id == source.sources[1][1].id
    (tmp_path / "bad.yaml").write_text("datasets: [{json: x}]")
    with pytest.raises(ConfigError, match=r"bad\.yaml, dataset 0"):
        DatasetConfig(yaml_path=str(tmp_path / "bad.yaml")).open()
    (tmp_path / "own.yaml").write_text(f"datasets: [{{yaml_path: {tmp_path / 'own.yaml'}}}]")
    with pytest.raises(DataError, match="names itself"):
        DatasetConfig(yaml_path=str(tmp_path / "own.yaml")).open()


def test_the_world_as_conversations() -> None:
    source = build(WorldSource, {"count": 50, "preset": "simple"}, "world")
    world = World("train", 0, bank=procedural_bank())
    records = WorldExamples(source, asking=Asking(turns=3), _world=[world])
    assert len(records) == 50
    captions = choices = 0
    for index in range(50):
        record = records[index]
        assert record == records[index]
        assert 1 <= len(record.turns) <= 3
        assert len(set(record.turns)) == len(record.turns)
        captions += any(question in QUESTIONS["caption"]["train"] for question, _ in record.turns)
        choices += any("Option:" in question for question, _ in record.turns)
    assert 10 < captions < 40
    assert choices > 5


def asked(**settings: object) -> WorldExamples:
    """Examples of a rich world."""
    source = build(WorldSource, {"count": 40}, "world")
    asking = DatasetConfig(world=source, captions=0.0, **settings)  # type: ignore[arg-type]
    return WorldExamples(source, asking=asking, _world=[World("train", 0, bank=procedural_bank())])


def test_the_world_is_asked_more_than_once() -> None:
    once, thrice = asked(turns=99), asked(turns=99, rounds=3)
    for number in range(20):
        few, many = set(once[number].turns), set(thrice[number].turns)
        assert few < many
        assert len(many) == len(thrice[number].turns)
    with pytest.raises(ConfigError, match="rounds must be at least 1"):
        DatasetConfig(json_path="x", rounds=0)


def test_a_favoured_task_is_asked_more_often() -> None:
    def share(records: WorldExamples) -> float:
        turns = [question for number in range(40) for question, _ in records[number].turns]
        return sum("second" in question or "When" in question for question in turns) / len(turns)

    few, many = asked(turns=4, choices=0.0), asked(turns=4, choices=0.0, task_weights={"localisation": 5})
    assert 0 < 1.5 * share(few) < share(many)
    with pytest.raises(ConfigError, match="unknown task 'time': known are existence"):
        DatasetConfig(json_path="x", task_weights={"time": 2})


def test_a_dataset_may_keep_to_some_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUXCHAT_CACHE", str(make_cache(tmp_path)))
    source = WorldSource(split="train", count=60, plots=("several", "several", "cut"))
    world = source.open()
    found = [world.sample(number).plot for number in range(60)]
    assert set(found) == {"several", "cut"}
    assert found.count("several") > found.count("cut")  # named twice
    with pytest.raises(ConfigError, match=r"\['crowd'\].*plots are solo"):
        WorldSource(plots=("crowd",)).open()


def test_a_choice_may_be_answered_in_words() -> None:
    by_letter, by_words = (
        asked(turns=8, choices=1.0, independent=True, choose_by=way) for way in ("letter", "words")
    )
    for (asked_first, letter), (asked_again, words) in zip(
        by_letter[5].turns, by_words[5].turns, strict=True
    ):
        assert asked_first == asked_again
        assert words == sentence(letter.partition(") ")[2] or letter)


def test_independent_turns_are_conversations() -> None:
    together, apart = asked(turns=4), asked(turns=4, independent=True)
    assert [len(talk) for talk in together[3].conversations] == [4]
    assert [len(talk) for talk in apart[3].conversations] == [1] * 4
    assert together[3].turns == apart[3].turns


def features(seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(
        torch.randn(5, 8, generator=generator).bfloat16(),
        torch.randn(8, generator=generator).bfloat16(),
        torch.arange(5, dtype=torch.int32),
        Grid(2, 3, 4),
        (0.5, 1.5),
        2.0,
    )


def test_features_survive_on_disk(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    for seed in range(300):
        cache.put(f"key {seed}", features(seed))
    assert len(list(tmp_path.glob("shard_*"))) == 1
    cache.flush()
    again = FeatureCache(tmp_path)
    assert len(again) == 300
    for seed in (0, 255, 256, 299):
        found = again.get(f"key {seed}")
        assert found is not None
        assert torch.equal(found.tokens, features(seed).tokens)
        assert (found.grid, found.times_s, found.duration_s) == (Grid(2, 3, 4), (0.5, 1.5), 2.0)
        assert f"key {seed}" in again
    assert again.get("other") is None
    assert stack([features(1), features(2)]).tokens.shape == (2, 5, 8)
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".tmp"]


def test_without_a_folder_nothing_is_kept() -> None:
    cache = FeatureCache(None)
    cache.put("a", features(0))
    assert cache.get("a") is None

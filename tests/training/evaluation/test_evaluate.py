"""The evaluation commands as people run them: results, resuming, several processes, missing videos."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from encoder.checkpoint import save_tensors, weights_hash
from encoder.errors import CheckpointError, DataError
from encoder.fluxvit import FluxViT
from llm_bridge.clip_head import read_clip_head
from tests.encoder.video import video_files as vf
from tests.llm_bridge.text_encoders.tiny_towers import sentence_folder
from tests.patience import PATIENCE_S
from tests.training.synthetic.tiny_world import TINY, command, make_encoder
from training.evaluate import main
from training.evaluation.journal import Journal, Sharing, run_blocks

PROVENANCE = {
    *("command", "commit", "recipe", "decoder", "machine", "weights", "dtype", "views", "pool", "seed"),
    *("dataset", "alignment", "block", "interval", "settings"),
}


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tower")
    sentence_folder(folder)
    return folder


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos with captions, one of which is missing and one broken."""
    folder = tmp_path_factory.mktemp("videos")
    rows = []
    for number in range(7):
        name = f"{number}.mp4"
        if number < 5:
            vf.write(folder / name, [i / 10 for i in range(8 + 3 * number)], size=(96, 64))
        rows.append({"video": name, "caption": [f"dog {number}", f"cat {number} runs"]})
    (folder / "5.mp4").write_bytes(b"not a video")
    (folder / "test.json").write_text(json.dumps(rows))
    (folder / "val.csv").write_text("\n".join(f"{n}.mp4 {n % 3}" for n in range(7)))
    return folder


def retrieval(run: Path, tower: Path, videos: Path, out: Path, *more: str) -> list[str]:
    return [
        *("retrieval", "--dataset", "msvd", "--annotations", str(videos / "test.json")),
        *("--videos", str(videos), "--encoder", str(run / "encoder"), "--alignment", str(run)),
        *("--text-tower", str(tower), "--setting", "4x56:32", "--block", "2", "--out", str(out), *more),
    ]


# -- retrieval ----------------------------------------------------------------------------------------------


def test_retrieval_on_files(run, tower, videos, tmp_path, capsys) -> None:
    assert (
        main(retrieval(run, tower, videos, tmp_path / "r.json", "--setting", "4x56:32", "4x56:16/random"))
        == 0
    )
    shown = capsys.readouterr().out
    assert "T2V R@1" in shown
    assert "dual softmax" in shown
    result = json.loads((tmp_path / "r.json").read_text())
    assert set(result) >= PROVENANCE
    assert result["machine"]["processes"] == 1
    first, second = result["settings"]
    assert (first["frames"], first["resolution"], first["K"], first["selector"]) == (4, 56, 32, "flux")
    assert second["selector"] == "random"
    # What cannot be read is named and left out, with its captions.
    assert (first["videos"], first["texts"]) == (5, 10)
    assert set(first["missing"]) == {"5.mp4", "6.mp4"}
    assert "no such file" in first["missing"]["6.mp4"]
    ways = first["scores"]["plain"]
    assert ways["T2V"]["R@10"] == {"value": 1.0, "low": ways["T2V"]["R@10"]["low"], "high": 1.0, "n": 10}
    assert ways["V2T"]["R@5"]["n"] == 5


@pytest.mark.parametrize("pool", [1, 2])
def test_figures_are_those_of_the_encoder_by_hand(run, tower, videos, tmp_path, pool: int) -> None:
    from encoder.preprocess import preprocess
    from encoder.video.reader import read_clip
    from llm_bridge.text_encoders.text_towers import open_tower
    from training.evaluation.metrics import retrieval as recall

    # Pool 1 is what runs that kept no note of it trained; this one's says pool 2 for few tokens.
    tensors = {**load_file(run / "alignment.safetensors"), "pools": torch.tensor([[0, 1], [24, 2], [99, 0]])}
    shutil.copytree(run, tmp_path / "noted")
    save_tensors(tensors, tmp_path / "noted" / "alignment.safetensors")
    run = run if pool == 1 else tmp_path / "noted"
    main(retrieval(run, tower, videos, tmp_path / "r.json"))
    model, align = FluxViT.from_pretrained(run / "encoder").eval(), read_clip_head(run).align
    vectors = []
    for number in range(5):
        pixels = preprocess(read_clip(videos / f"{number}.mp4", 4), 56, 56)
        with torch.inference_mode():
            pooled = model.pool(model(pixels[None], 32), pool)
            vectors.append(torch.nn.functional.normalize(align(pooled), dim=-1)[0])
    texts = [text for n in range(5) for text in (f"dog {n}", f"cat {n} runs")]
    owner = [n for n in range(5) for _ in range(2)]
    found = recall(torch.stack(vectors), open_tower(tower).embed(texts), owner, texts, dsl=True)
    result = json.loads((tmp_path / "r.json").read_text())["settings"][0]["scores"]["dual softmax"]
    assert result["T2V"]["R@1"] == found["T2V"]["R@1"].to_dict()
    assert result["V2T"]["R@1"] == found["V2T"]["R@1"].to_dict()


@pytest.mark.slow
def test_going_on_after_a_stop_gives_the_same(run, tower, videos, tmp_path) -> None:
    whole, stopped = tmp_path / "whole.json", tmp_path / "stopped.json"
    main(retrieval(run, tower, videos, whole))
    main(retrieval(run, tower, videos, stopped))
    journal = stopped.with_name("stopped.journal") / "0.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:4]) + lines[4][:40])  # killed while it wrote
    stopped.unlink()
    main(retrieval(run, tower, videos, stopped))
    first, second = (json.loads(path.read_text())["settings"] for path in (whole, stopped))
    assert first == second
    kept = journal.read_text().splitlines(keepends=True)
    assert kept[:4] == lines[:4]
    assert sorted(kept) == sorted(set(kept))


def test_a_video_that_turns_up_is_used_the_next_time(run, tower, videos, tmp_path) -> None:
    import shutil

    copy = tmp_path / "videos"
    shutil.copytree(videos, copy)
    main(retrieval(run, tower, copy, tmp_path / "r.json"))
    shutil.copy(copy / "0.mp4", copy / "6.mp4")
    main(retrieval(run, tower, copy, tmp_path / "r.json"))
    [only] = json.loads((tmp_path / "r.json").read_text())["settings"]
    assert set(only["missing"]) == {"5.mp4"}
    assert only["videos"] == 6


@pytest.mark.slow  # quick: test_blocks_are_shared_and_never_split
def test_two_processes_give_the_same(run, tower, videos, tmp_path) -> None:
    alone, shared = tmp_path / "alone.json", tmp_path / "shared.json"
    main(retrieval(run, tower, videos, alone))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = [
        command(
            "training.evaluate",
            *retrieval(run, tower, videos, shared),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=PATIENCE_S) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], told
    assert "T2V" in told[0][0]
    assert told[1][0] == ""  # only the first one speaks
    one, two = json.loads(alone.read_text()), json.loads(shared.read_text())
    assert two["machine"]["processes"] == 2
    assert one["settings"] == two["settings"]
    own = [(tmp_path / "shared.journal" / f"{rank}.jsonl").read_text().count("vector") for rank in range(2)]
    assert own == [3, 2]  # blocks of two, taken in turn


def test_another_model_does_not_continue_a_journal(run, tower, videos, tmp_path, capsys) -> None:
    assert main(retrieval(run, tower, videos, tmp_path / "r.json")) == 0
    other = make_encoder(tmp_path / "other")
    tensors = {k: v + 1 for k, v in FluxViT.from_pretrained(other / "encoder").state_dict().items()}
    save_tensors(tensors, other / "encoder" / "model.safetensors")
    assert main(retrieval(other, tower, videos, tmp_path / "r.json")) == 2
    assert "another evaluation (other weights)" in capsys.readouterr().err


# -- classes ------------------------------------------------------------------------------------------------


def test_classify_by_class_heads_mean_probabilities(videos, tmp_path, capsys) -> None:
    torch.manual_seed(3)
    FluxViT(TINY.replace(num_classes=3)).save_pretrained(tmp_path / "encoder")
    arguments = [
        *("classify", "--dataset", "k400", "--annotations", str(videos / "val.csv"), "--videos", str(videos)),
        *("--encoder", str(tmp_path / "encoder"), "--setting", "4x56:32", "8x56", "--block", "3"),
        *("--out", str(tmp_path / "c.json")),
    ]
    assert main([*arguments, "--clips-per-video", "2"]) == 0
    result = json.loads((tmp_path / "c.json").read_text())
    assert result["views"] == "2x3"
    assert [s["n"] for s in result["settings"]] == [5, 5]
    assert result["settings"][0]["top1"]["n"] == 5
    assert "top5" not in result["settings"][0]
    (videos / "five.csv").write_text("0.mp4 4\n1.mp4 0\n")
    arguments[4] = str(videos / "five.csv")
    assert main([*arguments, "--out", str(tmp_path / "d.json")]) == 2
    assert "3 classes" in capsys.readouterr().err


def test_action_by_prompts(run, tower, videos, tmp_path) -> None:
    (tmp_path / "names.txt").write_text("dog\ncat\nruns\n")
    assert (
        main(
            [
                *("action", "--dataset", "k400", "--annotations", str(videos / "val.csv")),
                *("--videos", str(videos), "--classes", str(tmp_path / "names.txt")),
                *("--encoder", str(run / "encoder"), "--alignment", str(run), "--text-tower", str(tower)),
                *("--setting", "4x56:32", "--out", str(tmp_path / "a.json")),
            ]
        )
        == 0
    )
    [only] = json.loads((tmp_path / "a.json").read_text())["settings"]
    assert (only["classes"], only["n"], len(only["prompt"])) == (3, 5, 16)


def test_ensemble_is_the_mean_cosine_over_prompts() -> None:
    from training.evaluation.classification import mean_cosines

    torch.manual_seed(0)
    video, classes = torch.randn(4, 8), torch.randn(3, 5, 8)
    expected = torch.stack([video @ prompt.T for prompt in classes]).mean(0)
    torch.testing.assert_close(mean_cosines(video, classes), expected)


def test_softmax_before_the_mean_mean_probabilities() -> None:
    from training.evaluation.views import mean_probabilities

    logits = torch.tensor([[10.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert mean_probabilities(logits).argmax() == 0  # one sure view outweighs two unsure ones here
    torch.testing.assert_close(mean_probabilities(logits).sum(), torch.tensor(1.0))


# -- the world ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_world_encoder_command(run, tower, cached_world, tmp_path) -> None:
    process = command(
        *("training.evaluate", "world", "--encoder", run / "encoder", "--alignment", run),
        *("--text-tower", tower, "--clips", "10", "--budget", "16", "--selector", "flux", "random"),
        *("--out", tmp_path / "w.json"),
        cache=cached_world,
    )
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    assert "noun" in out
    result = json.loads((tmp_path / "w.json").read_text())
    assert (result["dataset"], result["split"], result["preset"]) == ("world", "test", "full")
    flux, random = result["settings"]
    assert (flux["frames"], flux["resolution"], flux["K"]) == (8, 84, 16)
    assert flux["noun"]["top1"]["n"] == 10
    assert flux["noun"]["chance"] == pytest.approx(1 / 12)
    assert flux["retrieval"]["plain"]["T2V"]["R@10"]["n"] == 10
    assert random["selector"] == "random"


@pytest.mark.parametrize("table_name", ["retrieval", "action", "classify"])
def test_every_table_runs_on_the_world(table_name, run, tower, cached_world, tmp_path, capsys) -> None:
    arguments = [
        *(table_name, "--dataset", "world", "--encoder", str(run / "encoder"), "--alignment", str(run)),
        *("--text-tower", str(tower), "--clips", "6", "--budget", "16", "--out", str(tmp_path / "t.json")),
    ]
    assert main(arguments) == 0
    result = json.loads((tmp_path / "t.json").read_text())
    assert result["dataset"] == "world"
    assert result["settings"][0]["missing"] == {}
    assert "16 (8x84:16)" in capsys.readouterr().out


def test_a_head_of_another_world_is_refused(cached_world, tmp_path, capsys) -> None:
    other = make_encoder(tmp_path / "other", nouns=7)
    arguments = ["world", "--encoder", str(other / "encoder"), "--alignment", str(other), "--clips", "4"]
    assert main([*arguments, "--no-retrieval"]) == 2
    assert "7 classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["world"], "either --model"),
        (["world", "--encoder", "none", "--alignment", "none"], "no encoder at none"),
        (["retrieval", "--dataset", "msvd", "--encoder", "RUN", "--alignment", "RUN"], "--annotations"),
        (["action", "--dataset", "k400", "--encoder", "RUN"], "alignment"),
        (["classify", "--dataset", "world", "--encoder", "RUN", "--setting", "8x57"], "multiple of 14"),
        (["mvbench", "--model", "none"], "none is not a FluxChat model"),
    ],
)
def test_wrong_use_is_one_line(arguments, words, run, tower, cached_world, monkeypatch, capsys) -> None:
    monkeypatch.chdir(run)
    filled = [
        "encoder" if a == "RUN" and arguments[i - 1] == "--encoder" else a for i, a in enumerate(arguments)
    ]
    filled = ["." if a == "RUN" else a for a in filled]
    extra = ["--text-tower", str(tower)] if filled[0] in ("retrieval", "action") else []
    assert main([*filled, *extra]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert words in told[-1]


# -- journals -----------------------------------------------------------------------------------------------


class NoWait(Sharing):
    def wait(self) -> None:
        pass


def test_blocks_are_shared_and_never_split(tmp_path) -> None:
    ids = [f"i{n}" for n in range(7)]
    seen: list[list[int]] = []

    def work(numbers):
        seen.append(list(numbers))
        return [{"value": number} for number in numbers]

    # The second of two processes whose first one died.
    second = Journal(tmp_path / "r.json", {"x": 1}, NoWait(2, 1))
    with pytest.raises(DataError, match="were not worked on"):
        run_blocks(ids, work, second, block=3, label="")
    assert seen == [[3, 4, 5]]
    first = Journal(tmp_path / "r.json", {"x": 1}, Sharing(1, 0))
    rows = run_blocks(ids, work, first, block=3, label="")
    assert seen == [[3, 4, 5], [0, 1, 2], [6]]
    assert [row["value"] for row in rows] == list(range(7))


def test_names_must_differ(tmp_path) -> None:
    with pytest.raises(DataError, match="'a' twice"):
        run_blocks(["a", "b", "a"], lambda n: [], Journal(None, {}), block=1, label="")


def test_several_processes_need_files() -> None:
    with pytest.raises(DataError, match="--out"):
        Journal(None, {}, Sharing(2, 0))


def test_hash_of_weights_sees_every_value() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    before = weights_hash(model)
    with torch.no_grad():
        model.weight[0, 0], model.weight[0, 1] = model.weight[0, 1].item(), model.weight[0, 0].item()
    assert weights_hash(model) != before
    assert weights_hash(model) == weights_hash(model)


def test_alignments_of_both_forms(tmp_path) -> None:
    torch.manual_seed(0)
    tensors = {
        "vision_align.0.weight": torch.rand(6),
        "vision_align.0.bias": torch.rand(6),
        "vision_align.1.weight": torch.rand(4, 6),
        "vision_align.1.bias": torch.rand(4),
    }
    save_tensors(tensors, tmp_path / "a.safetensors")
    alignment = read_clip_head(tmp_path / "a.safetensors")
    x = torch.randn(3, 6)
    norm = torch.nn.functional.layer_norm(
        x, (6,), *[tensors[f"vision_align.0.{n}"] for n in ("weight", "bias")]
    )
    expected = norm @ tensors["vision_align.1.weight"].T + tensors["vision_align.1.bias"]
    torch.testing.assert_close(alignment.embed(x), torch.nn.functional.normalize(expected, dim=-1))
    save_tensors({"other": torch.rand(2)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="no alignment"):
        read_clip_head(tmp_path / "b.safetensors")

"""Stock video models taken apart give what they give whole; and what the selection drops is gone, no more."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from encoder.budget import Budget, Plan
from encoder.errors import BudgetError, ConfigError, ModelError
from encoder.selection import Selector
from encoder.video.reader import Clip, read_clip
from llm_bridge.chat_model import load_chat_model
from llm_bridge.compute_worker import ComputeWorker
from llm_bridge.engines import LocalEngine, Request
from llm_bridge.engines.local import LocalAnswer, piece_ends
from llm_bridge.generation import Generation
from llm_bridge.kv_cache import PrefixCache
from llm_bridge.prompt import PLACEHOLDER, Message, Prompt, Visual, render
from llm_bridge.sampling import SamplingParams
from llm_bridge.towers.number_words import in_words
from llm_bridge.towers.stock import StockModel
from llm_bridge.towers.tower import Looked, Stage
from tests import tiny_video_models
from tests.llm_bridge.test_prefill import assert_same, while_held, worker_of
from tests.tiny_video_models import KINDS, ONE_QUICK

FRAMES = 8
BEFORE = ["smolvlm", "qwen3_vl"]
ALWAYS = {"llava_onevision": 1}  # embeddings beside those of the cells
STAGES = [(kind, "after") for kind in KINDS] + [(kind, "before") for kind in BEFORE]
QUICK_STAGES = [
    cell if cell[0] == KINDS[0] else pytest.param(*cell, marks=pytest.mark.slow) for cell in STAGES
]
TIMES = tuple(0.5 + index for index in range(FRAMES))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stock")
    return {kind: tiny_video_models.make(root / kind, kind) for kind in KINDS}


_loaded: dict[tuple[str, str], StockModel] = {}


@pytest.fixture(scope="module")
def load(folders: dict[str, Path]) -> Any:
    def of(kind: str, stage: Stage = "after") -> StockModel:
        if (kind, stage) not in _loaded:
            model = load_chat_model(folders[kind], stage=stage, dtype=torch.float32)
            assert isinstance(model, StockModel)
            _loaded[kind, stage] = model
        return _loaded[kind, stage]

    return of


def frames(count: int = FRAMES, height: int = 96, width: int = 96) -> Tensor:
    """uint8 (T, H, W, 3): a square that moves over noise."""
    rng = np.random.default_rng(5)
    still = rng.integers(0, 256, (height, width, 3), np.uint8)
    video = np.stack([still] * count)
    for index in range(count):
        video[index, 20:50, 8 * index : 8 * index + 30] = 255 - 20 * index
    return torch.from_numpy(video)


def clip_of(video: Tensor) -> Clip:
    return read_clip(list(video.numpy()), len(video))


def full_plan(model: StockModel, count: int = FRAMES) -> Plan:
    space = model.tower.space
    side = space.sides[0] if space.keeps_aspect else space.sides[-1]  # as small as it takes
    plan = Plan(count, side, side, 1, space.cell, space.frames_per_cell)
    return Plan(count, side, side, plan.grid.size, space.cell, space.frames_per_cell)


def kept_plan(plan: Plan, keep: int) -> Plan:
    return replace(plan, keep=keep)


def look(
    model: StockModel, plan: Plan, selector: Selector = "flux", *, image: bool = False
) -> tuple[Looked, Visual, Tensor]:
    tower = model.tower
    times = () if image else TIMES[: plan.frames]
    pixels = tower.pixels(clip_of(frames(plan.frames)), plan)
    looked = tower.look(pixels, plan, selector, times)
    layout = tower.layout(plan, looked.kept.tolist(), times, float(len(times)))
    key = f"{plan}{selector}{tower.stage}{image}"
    return looked, Visual(len(looked.embedding), key, float(len(times)), times, layout), pixels


def prompt_of(model: StockModel, *messages: Message[Visual]) -> Prompt:
    return render(
        model.llm.tokenizer, messages, time_form="none", marks=model.tower.marks, axes=model.llm.axes
    )


def question(visual: Visual, text: str = "What is it?") -> Message[Visual]:
    return Message.of("user", visual, text)


def answer(model: StockModel, prompt: Prompt, rows: list[Tensor], new: int = 16, **options: Any) -> list[int]:
    """Greedy token ids, the end of the turn forbidden, so that all have the same length."""
    ends = sorted(model.llm.eos_ids)
    sampling = SamplingParams(max_new_tokens=new, logit_bias=dict.fromkeys(ends, -100.0))
    generation = Generation(model.llm, prompt, rows, sampling, **options)
    ids: list[int] = []
    engine = LocalEngine(model.llm, options.get("worker"), options.get("prefixes"))
    start = engine.start

    def recording(request: Request) -> Any:
        running = start(request)
        decode = running._decode

        def recorded(*args: Any) -> Any:
            for token in decode(*args):
                ids.append(token)
                yield token

        running._decode = recorded  # type: ignore[method-assign]
        return running

    engine.start = recording  # type: ignore[method-assign]
    generation.engine = engine
    for _ in generation:
        pass
    return ids


def whole_model(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def own_inputs(kind: str, pixels: Tensor, ids: list[int], model: Any) -> dict[str, Any]:
    """What the model's own forward takes for this prompt and these pixels (3, T, H, W)."""
    image = pixels.shape[1] == 1
    config = model.config
    as_images = kind == "smolvlm" or (image and kind != "llava_onevision")
    token = config.image_token_id if as_images else config.video_token_id
    places = torch.tensor([[i == PLACEHOLDER for i in ids]])
    inputs = {"input_ids": torch.tensor([ids]).masked_fill(places, token)}
    if kind == "smolvlm":
        return inputs | {"pixel_values": pixels.transpose(0, 1)[None]}
    if kind == "llava_onevision":
        return inputs | {"pixel_values_videos": pixels.transpose(0, 1)[None]}
    patch = config.vision_config.patch_size
    rows, grid = qwen_rows(pixels, patch)
    names = ("pixel_values", "image_grid_thw") if image else ("pixel_values_videos", "video_grid_thw")
    inputs |= dict(zip(names, (rows, grid), strict=True)) | {"mm_token_type_ids": places * (2 - image)}
    if kind == "qwen2_5_vl" and not image:
        inputs["second_per_grid_ts"] = torch.tensor([2 * (TIMES[1] - TIMES[0])])
    return inputs


def qwen_rows(pixels: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Pixels (3, T, H, W) as the processors of Qwen-VL models cut them, and their grid."""
    if pixels.shape[1] % 2:
        pixels = torch.cat([pixels, pixels[:, -1:]], dim=1)
    _, frames, height, width = pixels.shape
    grid = frames // 2, height // patch, width // patch
    cut = pixels.reshape(3, grid[0], 2, grid[1] // 2, 2, patch, grid[2] // 2, 2, patch)
    rows = cut.permute(1, 3, 6, 4, 7, 0, 2, 5, 8).flatten(5).flatten(0, 4)
    return rows, torch.tensor([grid])


@pytest.mark.parametrize(("kind", "stage"), STAGES)
@pytest.mark.parametrize("image", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.quick(1)
def test_all_cells_equal_the_whole_model(
    kind: str, image: bool, stage: Stage, folders: dict[str, Path], load: Any
) -> None:
    model = load(kind, stage)
    plan = full_plan(model, 1 if image else FRAMES)
    looked, visual, pixels = look(model, plan, image=image)
    prompt = prompt_of(model, question(visual))
    whole = whole_model(folders[kind])
    inputs = own_inputs(kind, pixels, list(prompt.ids), whole)
    with torch.inference_mode():
        logits = whole(**inputs).logits[0, -1]
        banned = [[end] for end in sorted(model.llm.eos_ids)]
        made = whole.generate(
            **inputs, do_sample=False, max_new_tokens=16, bad_words_ids=banned, pad_token_id=0
        )
    generation = LocalAnswer(model.llm, Request(prompt, [looked.embedding]))
    _, ours = generation.prefill([len(prompt)])
    assert ours is not None
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))
    expected = made[0, len(prompt) :].tolist()
    assert len(set(expected)) > 3  # a model that answers one word would prove nothing
    assert answer(model, prompt, [looked.embedding]) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.quick(1)
def test_a_prefill_in_pieces_and_a_second_turn_equal_a_fresh_one(kind: str, load: Any) -> None:
    model = load(kind)
    plan = kept_plan(full_plan(model), 60)
    looked, visual, _ = look(model, plan)
    first = prompt_of(model, question(visual))
    cache = PrefixCache(2**26, model.llm.kv_bytes_per_token)
    words = answer(model, first, [looked.embedding], prefixes=cache)
    assert words == answer(model, first, [looked.embedding])
    text = model.llm.tokenizer.decode(words)
    second = prompt_of(
        model, question(visual), Message.of("assistant", text), Message.of("user", "And then?")
    )
    kept = Generation(model.llm, second, [looked.embedding], SamplingParams(max_new_tokens=4), cache)
    for _ in kept:
        pass
    assert kept.stats.cached_tokens > plan.keep
    assert answer(model, second, [looked.embedding], prefixes=cache) == answer(
        model, second, [looked.embedding]
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.quick(1)
def test_rows_of_a_batch_equal_each_alone(kind: str, load: Any) -> None:
    import threading

    model = load(kind)
    plans = [kept_plan(full_plan(model), keep) for keep in (20, 45, 90)]
    asked = []
    for plan in plans:
        looked, visual, _ = look(model, plan)
        asked.append((prompt_of(model, question(visual)), [looked.embedding]))
    alone = [answer(model, prompt, rows) for prompt, rows in asked]
    worker = ComputeWorker(model.llm, len(asked))
    found: dict[int, list[int]] = {}
    threads = [
        threading.Thread(
            target=lambda i=index, a=one: found.update({i: answer(model, a[0], a[1], worker=worker)})  # type: ignore[misc]
        )
        for index, one in enumerate(asked)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    worker.close()
    assert [found[index] for index in range(len(asked))] == alone


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.quick(1)
def test_prompts_computed_together_equal_each_alone(kind: str, load: Any) -> None:
    """Positions on several axes, rows that layers add; also behind what is kept, and beside a text alone."""
    model = load(kind)
    looks = [look(model, kept_plan(full_plan(model), keep)) for keep in (20, 45, 90)]
    prefixes = PrefixCache(2**26, model.llm.kv_bytes_per_token)
    with worker_of(model.llm) as worker:
        for text in ("What is it?", "Where does the red car move?"):
            asked = [(prompt_of(model, question(v, text)), [looked.embedding]) for looked, v, _ in looks]
            asked.append((prompt_of(model, Message.of("user", text)), []))
            requests = [Request(prompt, rows) for prompt, rows in asked]
            pieces = [piece_ends(prompt) for prompt, _ in asked]
            expected = [
                LocalAnswer(model.llm, one).prefill(ends) for one, ends in zip(requests, pieces, strict=True)
            ]
            jobs = [
                partial(LocalAnswer(model.llm, one, worker).prefill, ends)
                for one, ends in zip(requests, pieces, strict=True)
            ]
            before = worker.prefills
            for future, own in zip(while_held(worker, jobs), expected, strict=True):
                assert_same(future.result(), own)
            assert worker.prefills - before < sum(map(len, pieces))
            readers = [
                partial(answer, model, prompt, rows, worker=worker, prefixes=prefixes)
                for prompt, rows in asked
            ]
            alone = [answer(model, prompt, rows) for prompt, rows in asked]
            assert [future.result() for future in while_held(worker, readers)] == alone


@pytest.mark.parametrize(("kind", "stage"), QUICK_STAGES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_k_tokens_are_k_at_their_own_positions(
    kind: str, stage: Stage, load: Any, data: st.DataObject
) -> None:
    model = load(kind, stage)
    full = full_plan(model)
    plan = kept_plan(full, data.draw(st.integers(1, full.grid.size)))
    selector = data.draw(st.sampled_from(["flux", "uniform", "random", "tube", "evs"]))
    looked, visual, pixels = look(model, plan, selector)
    more = ALWAYS.get(kind, 0)
    assert visual.tokens - more == plan.keep == len(looked.kept)
    assert torch.equal(model.tower.select(pixels, plan, selector), looked.kept)
    prompt = prompt_of(model, question(visual))
    assert sum(i == PLACEHOLDER for i in prompt.ids) == plan.keep + more
    # Each kept token, and all text, stands where it stands in the prompt of all cells.
    _, all_cells, _ = look(model, full)
    whole = prompt_of(model, question(all_cells))
    places = [index for index, token in enumerate(whole.ids) if token == PLACEHOLDER]
    stays = sorted(
        {*range(len(whole))} - {*places[: full.grid.size]} | {places[cell] for cell in looked.kept.tolist()}
    )
    positions = whole.positions or (tuple(range(len(whole))),)
    assert prompt.positions == tuple(tuple(axis[index] for index in stays) for axis in positions)
    assert prompt.next_position == whole.next_position


@pytest.mark.parametrize("kind", sorted({*KINDS} - {*BEFORE}))
def test_dropping_before_an_encoder_that_it_would_harm_is_refused(
    kind: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(ConfigError, match="select after it"):
        load_chat_model(folders[kind], stage="before", dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_after_gives_the_very_embeddings_of_all_cells(kind: str, load: Any) -> None:
    model = load(kind)
    full = full_plan(model)
    everything, _, _ = look(model, full)
    some, _, _ = look(model, kept_plan(full, 33))
    torch.testing.assert_close(some.embedding[:33], everything.embedding[some.kept], rtol=0, atol=1e-5)
    torch.testing.assert_close(some.embedding[33:], everything.embedding[full.grid.size :], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_moves_is_kept(kind: str, load: Any) -> None:
    model = load(kind)
    full = full_plan(model)
    kept = look(model, kept_plan(full, full.grid.size // 8))[0].kept
    rows = (kept % (full.grid.height * full.grid.width)) // full.grid.width
    # The square moves between 20/96 and 50/96 of the height: the other cells are the same in every frame.
    assert int(rows.max()) <= 50 * full.grid.height // 96


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_equal_the_image_processor(kind: str, folders: dict[str, Path], load: Any) -> None:
    from transformers import AutoImageProcessor

    model = load(kind)
    processor = AutoImageProcessor.from_pretrained(folders[kind], backend="pil")
    plan = full_plan(model, 1)
    video = frames(1, 96, 96)
    theirs = processor(Image.fromarray(video[0].numpy()), return_tensors="pt")["pixel_values"]
    ours = model.tower.pixels(clip_of(video), plan)
    if kind.startswith("qwen"):
        ours = qwen_rows(ours, model.tower.space.cell // 2)[0]
    else:
        ours, theirs = ours[:, 0], theirs.flatten(0, -4)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_numbers_in_words() -> None:
    assert [in_words(n) for n in (0, 8, 16, 20, 21, 64, 100, 105, 999, 1000)] == [
        *("zero", "eight", "sixteen", "twenty", "twenty-one", "sixty-four", "one hundred"),
        *("one hundred and five", "nine hundred and ninety-nine", "1000"),
    ]


def test_the_prompt_of_smolvlm_is_its_processors(load: Any) -> None:
    model = load("smolvlm")
    visual = look(model, full_plan(model, 2))[1]
    prompt = prompt_of(model, question(visual))
    text = model.llm.tokenizer.decode([i for i in prompt.ids if i != PLACEHOLDER])
    frame = "<fake_token_around_image><global-img><fake_token_around_image>"
    assert text == (
        "<|im_start|>User: You are provided the following series of two frames from a 0:00:02 "
        "[H:MM:SS] video.\n"
        f"\nFrame from 00:00:{frame}\nFrame from 00:01:{frame}\n\nWhat is it?<end_of_utterance>\nAssistant:"
    )


QWEN = [kind for kind in KINDS if kind.startswith("qwen")]


@pytest.mark.parametrize("kind", QWEN)
def test_an_odd_number_of_wide_frames_equals_the_whole_model(
    kind: str, folders: dict[str, Path], load: Any
) -> None:
    model = load(kind)
    cell = model.tower.space.cell
    plan = Plan(5, 3 * cell, 8 * cell, 72, cell, 2)
    looked, visual, pixels = look(model, plan)
    prompt = prompt_of(model, question(visual))
    whole = whole_model(folders[kind])
    with torch.inference_mode():
        logits = whole(**own_inputs(kind, pixels, list(prompt.ids), whole)).logits[0, -1]
    _, ours = LocalAnswer(model.llm, Request(prompt, [looked.embedding])).prefill([len(prompt)])
    assert ours is not None
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))


def qwen3_processor(model: StockModel, plan: Plan) -> Any:
    """transformers' own processor, run as it is but for the pixels of videos, which need torchvision."""
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
    from transformers.video_utils import VideoMetadata

    class Videos:
        """The grid and times that a video processor returns for frames at 0.5, 1.5, ... seconds."""

        merge_size = temporal_patch_size = 2
        model_input_names = ("pixel_values_videos", "video_grid_thw")

        def __call__(self, videos: Any, **_: Any) -> dict[str, Any]:
            size = [plan.grid.frames, 2 * plan.grid.height, 2 * plan.grid.width]
            metadata = VideoMetadata(
                total_num_frames=2 * plan.frames, fps=2.0, frames_indices=list(range(1, 2 * plan.frames, 2))
            )
            return {"video_grid_thw": torch.tensor([size]), "video_metadata": [metadata]}

    processor = Qwen3VLProcessor.__new__(Qwen3VLProcessor)  # whose __init__ asks for torchvision
    tokenizer = model.llm.tokenizer
    processor.tokenizer, processor.video_processor, processor.chat_template = tokenizer, Videos(), None
    processor.image_token, processor.video_token = "<|image_pad|>", "<|video_pad|>"
    processor.image_token_id, processor.video_token_id = tokenizer.convert_tokens_to_ids(
        ["<|image_pad|>", "<|video_pad|>"]
    )
    processor.vision_start_token, processor.vision_end_token = "<|vision_start|>", "<|vision_end|>"
    return processor


@pytest.mark.parametrize("count", [2, 5, 8])
def test_the_prompt_of_qwen3_vl_is_its_processors(count: int, load: Any) -> None:
    model = load("qwen3_vl")
    plan = full_plan(model, count)
    prompt = prompt_of(model, question(look(model, plan)[1]))
    parts = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What is it?"}]}]
    text = model.llm.tokenizer.apply_chat_template(parts, tokenize=False, add_generation_prompt=True)
    made = qwen3_processor(model, plan)(text=[text], videos=[frames(count).permute(0, 3, 1, 2)])
    ids = model.llm.tokenizer.convert_tokens_to_ids
    start, end, pad = (ids(f"<|{name}|>") for name in ("vision_start", "vision_end", "video_pad"))
    ours = [pad if i == PLACEHOLDER else i for i in prompt.ids]
    # The processor that came out with the model replaced the template's own marks (transformers 4.57, vLLM);
    # that of transformers 5.24 leaves them around it all. Beyond that they are the same.
    last = len(ours) - 1 - ours[::-1].index(end)
    first = next(i for i in range(len(ours)) if made["input_ids"][0][i] != ours[i])
    assert made["input_ids"][0] == [*ours[:first], start, *ours[first : last + 1], end, *ours[last + 1 :]]


def test_the_prompt_of_qwen2_5_vl_is_its_processors(load: Any) -> None:
    model = load("qwen2_5_vl")
    prompt = prompt_of(model, question(look(model, full_plan(model, 4))[1]))
    text = model.llm.tokenizer.decode([i for i in prompt.ids if i != PLACEHOLDER])
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|vision_end|>What is it?<|im_end|>\n<|im_start|>assistant\n"
    )
    # Times reach beyond the text, which goes on behind the larger side of a frame all the same.
    assert prompt.next_position == 1 + prompt.positions[0][-1] < max(prompt.positions[0])


def test_the_prompt_of_llava_onevision_is_its_processors(load: Any) -> None:
    model = load("llava_onevision")
    prompt = prompt_of(model, question(look(model, full_plan(model, 2))[1]))
    places = sum(i == PLACEHOLDER for i in prompt.ids)
    text = model.llm.tokenizer.decode([i for i in prompt.ids if i != PLACEHOLDER])
    assert text == "<|im_start|>user \nWhat is it?<|im_end|><|im_start|>assistant\n"
    assert places == 2 * 4 * 4 + 1  # the pooled ones of two frames, and a newline


def test_a_size_that_llava_onevision_lacks_is_refused(load: Any) -> None:
    model = load("llava_onevision")
    cell = model.tower.space.cell
    with pytest.raises(BudgetError, match="takes 56 pixels a side"):
        model.tower.pixels(clip_of(frames(2)), Plan(2, 2 * cell, 2 * cell, 4, cell))


@pytest.mark.parametrize(("kind", "stage"), STAGES)
@pytest.mark.parametrize("part", [1, 4])
@pytest.mark.quick(4)
def test_the_price_is_the_work_that_is_done(kind: str, stage: Stage, part: int, load: Any) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = load(kind, stage)
    full = full_plan(model)
    plan = kept_plan(full, full.grid.size // part)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # others are not counted
        look(model, plan, "uniform")
    counted = {str(name): flops / 2e9 for name, flops in counter.get_flop_counts()["Global"].items()}
    _, embedding, linear, attention = model.tower.features(plan)
    twice = 1 if kind in BEFORE else 2  # where the choice embeds patches of its own
    assert counted["aten.convolution"] == pytest.approx(twice * embedding)
    products = counted.get("aten.addmm", 0) + counted.get("aten.mm", 0)
    assert products == pytest.approx(linear, rel=0.02)  # weights of the price count biases
    assert counted["aten.bmm"] == pytest.approx(attention, rel=0.02)


# -- several media ------------------------------------------------------------------------------------------

# Turns of media and text, in the order that people give them.
ORDERS = [
    ("VI",),
    ("IV",),
    ("VIV",),
    ("IVI",),
    ("VVI",),
    ("V", "I"),
    ("I", "V"),
    ("VI", "IV"),
    ("V", "VI"),
]


def several(
    model: StockModel, turns: tuple[str, ...]
) -> tuple[Prompt, list[Tensor], list[Tensor], list[str]]:
    """A conversation whose media are V and I; per medium, in order: embeddings, pixels, kind."""
    rows, pixels, kinds = [], [], []
    messages: list[Message[Visual]] = []
    for number, media in enumerate(turns):
        shown = []
        for kind in media:
            count = 1 if kind == "I" else 4
            plan = full_plan(model, count)
            video = frames(count).roll(7 * len(rows), dims=2)  # no two are the same
            seen = model.tower.pixels(clip_of(video), plan)
            times = TIMES[:count] if kind == "V" else ()
            looked = model.tower.look(seen, plan, "flux", times)
            layout = model.tower.layout(plan, looked.kept.tolist(), times, float(count))
            shown.append(Visual(len(looked.embedding), f"{len(rows)}", float(count), times, layout))
            rows.append(looked.embedding)
            pixels.append(seen)
            kinds.append(kind)
        if number:
            messages.append(Message.of("assistant", "It is so."))
        first, *rest = shown
        messages.append(Message.of("user", first, "Is it?", *rest, "What is it?"))
    return prompt_of(model, *messages), rows, pixels, kinds


def whole_inputs(
    kind: str, model: StockModel, whole: Any, prompt: Prompt, pixels: list[Tensor], kinds: list[str]
) -> dict[str, Any]:
    """What the model's own forward takes, media of a kind in the order of their marks in the prompt."""
    config = whole.config
    order = sorted(range(len(kinds)), key=lambda index: prompt.spans[index][0])
    ids = list(prompt.ids)
    token_types = torch.zeros(1, len(ids), dtype=torch.long)
    for index, (start, count) in enumerate(prompt.spans):
        image = kinds[index] == "I" or kind == "smolvlm"
        token = config.image_token_id if image and kind != "llava_onevision" else config.video_token_id
        for place in range(start, start + count):
            if ids[place] == PLACEHOLDER:
                ids[place] = token
                token_types[0, place] = 1 if image else 2
    inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])}
    if kind == "smolvlm":
        frames_ = torch.cat([pixels[index].transpose(0, 1) for index in order])
        return inputs | {"pixel_values": frames_[None]}
    if kind == "llava_onevision":  # videos of other lengths go through it one by one
        embedded = whole.get_input_embeddings()(inputs["input_ids"])
        parts = [pixels[index].transpose(0, 1)[None] for index in order]
        features = torch.cat([whole.model.get_video_features(part).pooler_output[0] for part in parts])
        places = inputs["input_ids"] == config.video_token_id
        return {"inputs_embeds": embedded.masked_scatter(places[..., None], features)}
    for name, rows_name, grid_name in (
        ("I", "pixel_values", "image_grid_thw"),
        ("V", "pixel_values_videos", "video_grid_thw"),
    ):
        cut = [
            qwen_rows(pixels[index], config.vision_config.patch_size)
            for index in order
            if kinds[index] == name
        ]
        inputs |= {rows_name: torch.cat([rows for rows, _ in cut]), grid_name: torch.cat([g for _, g in cut])}
    if kind == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.full((kinds.count("V"),), 2 * (TIMES[1] - TIMES[0]))
    return inputs | {"mm_token_type_ids": token_types}


@pytest.mark.parametrize("turns", ORDERS, ids="/".join)
@pytest.mark.parametrize("kind", ONE_QUICK)
@pytest.mark.quick(2)
def test_media_in_any_order_equal_the_whole_model(
    kind: str, turns: tuple[str, ...], folders: dict[str, Path], load: Any
) -> None:
    model = load(kind)
    prompt, rows, pixels, kinds = several(model, turns)
    starts = [start for start, _ in prompt.spans]
    if kind != "llava_onevision":  # whose template writes the images of a turn first
        assert starts == sorted(starts)
    elif turns == ("VI",):
        assert starts[1] < starts[0]
    whole = whole_model(folders[kind])
    with torch.inference_mode():
        logits = whole(**whole_inputs(kind, model, whole, prompt, pixels, kinds)).logits[0, -1]
    cache = PrefixCache(2**26, model.llm.kv_bytes_per_token)
    for prefixes in (None, cache):  # computed in one go, and in pieces
        answer = LocalAnswer(model.llm, Request(prompt, rows), prefixes=prefixes)
        _, ours = answer.prefill(piece_ends(prompt) if prefixes else [len(prompt)])
        assert ours is not None
        torch.testing.assert_close(ours, logits, rtol=0, atol=2e-5 * float(logits.abs().max()))


# -- adapters and quantisation ------------------------------------------------------------------------------

LORA: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "all linear": {"target_modules": "all-linear"},
    "with magnitudes": {"target_modules": ["q_proj"], "use_dora": True},
}


def save_adapter(folder: Path, out: Path, **settings: Any) -> Path:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, init_lora_weights=False, **settings)
    get_peft_model(whole_model(folder), config).save_pretrained(out)
    return out


@pytest.mark.parametrize("kind", ONE_QUICK)
@pytest.mark.parametrize("form", LORA)
@pytest.mark.quick(1)
def test_an_adapter_answers_as_the_whole_model_with_it_merged(
    kind: str, form: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    from peft import PeftModel

    adapter = save_adapter(folders[kind], tmp_path / "adapter", **LORA[form])
    model = load_chat_model(folders[kind], dtype=torch.float32, adapters=[adapter])
    plan = full_plan(model, 4)
    looked, visual, pixels = look(model, plan)
    prompt = prompt_of(model, question(visual))
    merged = PeftModel.from_pretrained(whole_model(folders[kind]), str(adapter)).merge_and_unload()
    with torch.inference_mode():
        logits = merged(**own_inputs(kind, pixels, list(prompt.ids), merged)).logits[0, -1]
        plain = whole_model(folders[kind])(**own_inputs(kind, pixels, list(prompt.ids), merged)).logits[0, -1]
    _, ours = LocalAnswer(model.llm, Request(prompt, [looked.embedding])).prefill([len(prompt)])
    assert ours is not None
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))
    assert (logits - plain).abs().max() > 0.01 * logits.abs().max()


@pytest.mark.parametrize("quantize", [None, "8bit"])
def test_an_adapter_of_another_kind_is_refused(
    quantize: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Its layers have the names that it asks for, at other places."""
    adapter = save_adapter(folders["smolvlm"], tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    with pytest.raises(ModelError, match="does not fit the language model"):
        load_chat_model(folders["qwen3_vl"], dtype=torch.float32, adapters=[adapter], quantize=quantize)


@pytest.mark.parametrize("kind", ONE_QUICK)
@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_quantised_the_tower_stays_as_it_is(
    kind: str, quantize: Any, folders: dict[str, Path], load: Any
) -> None:
    model = load_chat_model(folders[kind], device="cpu", dtype=torch.bfloat16, quantize=quantize)
    assert isinstance(model, StockModel)
    quantised = {type(layer).__name__ for layer in model.llm.model.modules()}
    assert quantised & {"Linear8bitLt", "Linear4bit"}
    plan = full_plan(load(kind), 4)
    looked, visual, _ = look(model, plan)
    exact = load_chat_model(folders[kind], device="cpu", dtype=torch.bfloat16)
    assert torch.equal(looked.embedding, look(exact, plan)[0].embedding)  # type: ignore[arg-type]
    prompt = prompt_of(model, question(visual))
    scores = []
    for one in (model, exact):
        _, logits = LocalAnswer(one.llm, Request(prompt, [looked.embedding])).prefill([len(prompt)])
        assert logits is not None
        scores.append(logits)
    assert 0 < (scores[0] - scores[1]).norm() / scores[1].norm() < 0.8
    assert len(answer(model, prompt, [looked.embedding], new=4)) == 4


def test_widths_that_4_bit_cannot_run_on_a_cpu_are_refused(tmp_path: Path) -> None:
    text = {
        **{"model_type": "llama", "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 520, "pad_token_id": 0},
    }
    folder = tiny_video_models.make(tmp_path / "odd", "smolvlm", text=text)
    with pytest.raises(ModelError, match=r"96 wide, no multiple of 64. Use 8bit\.$"):
        load_chat_model(folder, device="cpu", dtype=torch.bfloat16, quantize="4bit")


# -- tiles of images ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SmolVLM whose processor cuts images into tiles, four along the longer side."""
    folder = tiny_video_models.make(tmp_path_factory.mktemp("tiling"), "smolvlm")
    settings_ = json.loads((folder / "preprocessor_config.json").read_text())
    settings_ |= {"do_image_splitting": True, "size": {"longest_edge": 256}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings_))
    return folder


def image_of(height: int, width: int) -> Clip:
    file = io.BytesIO()
    Image.fromarray(frames(1, height, width)[0].numpy()).save(file, "png")
    return read_clip(file.getvalue(), 1)


def looked_at(model: StockModel, clip: Clip, plan: Plan) -> tuple[Tensor, Prompt, Looked]:
    pixels = model.tower.pixels(clip, plan)
    looked = model.tower.look(pixels, plan, "flux")
    assert torch.equal(model.tower.select(pixels, plan, "flux"), looked.kept)
    layout = model.tower.layout(plan, looked.kept.tolist(), (), 0.0)
    return pixels, prompt_of(model, question(Visual(len(looked.embedding), "image", 0.0, (), layout))), looked


@pytest.mark.parametrize("size", [(96, 96), (96, 130), (200, 77), (60, 400)])
@pytest.mark.parametrize("stage", ["after", pytest.param("before", marks=pytest.mark.slow)])
@pytest.mark.quick(1)
def test_a_full_budget_sees_the_tiles_of_the_processor(
    size: tuple[int, int], stage: Stage, tiling: Path, load: Any
) -> None:
    from transformers import AutoImageProcessor
    from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

    model = load_chat_model(tiling, stage=stage, dtype=torch.float32)
    assert isinstance(model, StockModel)
    clip = image_of(*size)
    plan = Budget.full().plan(clip.info, model.tower.space)
    pixels, prompt, looked = looked_at(model, clip, plan)
    processor = AutoImageProcessor.from_pretrained(tiling, backend="pil")
    theirs = processor(Image.fromarray(clip.frames[0].numpy()), return_tensors="pt", return_row_col_info=True)
    assert plan.tiles == (theirs["rows"][0][0], theirs["cols"][0][0])
    torch.testing.assert_close(pixels.transpose(0, 1), theirs["pixel_values"][0], rtol=0, atol=1e-5)
    token = "<image>"
    marks = "<fake_token_around_image>", token, "<global-img>"
    per_view = plan.whole_tokens
    text = get_image_prompt_string(
        *plan.tiles, per_view, marks[0], image_token=token, global_image_token=marks[2]
    )
    tokenizer, image = model.llm.tokenizer, model.llm.tokenizer.convert_tokens_to_ids(token)
    whole_text = f"<|im_start|>User:{text}What is it?<end_of_utterance>\nAssistant:"
    assert [image if i == PLACEHOLDER else i for i in prompt.ids] == tokenizer(whole_text).input_ids
    whole = whole_model(tiling)
    ids = torch.tensor([tokenizer(whole_text).input_ids])
    with torch.inference_mode():
        logits = whole(input_ids=ids, pixel_values=theirs["pixel_values"]).logits[0, -1]
        banned = [[end] for end in sorted(model.llm.eos_ids)]
        made = whole.generate(
            input_ids=ids,
            pixel_values=theirs["pixel_values"],
            do_sample=False,
            max_new_tokens=8,
            bad_words_ids=banned,
            pad_token_id=0,
        )
    _, ours = LocalAnswer(model.llm, Request(prompt, [looked.embedding])).prefill([len(prompt)])
    assert ours is not None
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))
    assert answer(model, prompt, [looked.embedding], new=8) == made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("stage", ["after", "before"])
def test_a_budget_buys_tiles(stage: Stage, tiling: Path) -> None:
    model = load_chat_model(tiling, stage=stage, dtype=torch.float32)
    assert isinstance(model, StockModel)
    clip, space = image_of(96, 130), model.tower.space
    per_view = space.tokens(1, 64)
    seen = set()
    for tokens in (1, 4, 16, 20, 31, 32, 40, 64, 100, 200, 1000):
        plan = Budget(tokens).plan(clip.info, space)
        _, prompt, looked = looked_at(model, clip, plan)
        assert len(looked.embedding) == plan.keep + plan.whole_tokens <= tokens
        assert sum(i == PLACEHOLDER for i in prompt.ids) == len(looked.embedding)
        assert looked.kept.tolist() == sorted(set(looked.kept.tolist()))
        assert int(looked.kept.max()) < plan.grid.size
        assert (plan.tile > 0) == (tokens >= 2 * per_view)  # a small budget buys one view
        seen.add(plan.tiles)
        # Each kept embedding stands where it stands with all of them.
        every = kept_plan(plan, plan.grid.size)
        _, everything, all_looked = looked_at(model, clip, every)
        assert prompt.next_position == everything.next_position
        if stage == "after":
            at = dict(zip(everything_positions(everything), all_looked.embedding, strict=True))
            mine = torch.stack([at[place] for place in everything_positions(prompt)])
            torch.testing.assert_close(looked.embedding, mine, rtol=0, atol=1e-5)
        assert model.tower.prompt_tokens(plan) == pytest.approx(len(prompt), rel=0.9)
    assert {(0, 0), (2, 2)} <= seen


def everything_positions(prompt: Prompt) -> list[int]:
    """Positions of the embeddings of a prompt."""
    [axis] = prompt.positions or [tuple(range(len(prompt)))]
    return [place for place, token in zip(axis, prompt.ids, strict=True) if token == PLACEHOLDER]


def test_a_video_of_a_tiling_model_has_none(tiling: Path, load: Any) -> None:
    space = load_chat_model(tiling, dtype=torch.float32).tower.space
    plain = load("smolvlm").tower.space
    clip = clip_of(frames(4))
    assert Budget.full().plan(clip.info, space) == Budget.full().plan(clip.info, plain)
    with pytest.raises(BudgetError, match="multiple of 64 pixels, not 80"):
        Budget(40, resolution=80).plan(image_of(96, 96).info, space)

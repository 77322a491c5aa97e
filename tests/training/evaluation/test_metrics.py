"""Metrics against independent implementations: by hand, by sorting, and by scikit-learn."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.errors import DataError
from training.evaluation.metrics import (
    Share,
    best_ranks,
    dual_softmax,
    mean_interval,
    paired_recalls,
    recalls,
    relevance,
    retrieval,
    top_k,
    wilson,
)


def rank_by_sorting(scores: list[float], right: list[bool]) -> int:
    """Place of the first right candidate when candidates are sorted, wrong ones first among equals."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], right[i]))
    return next(place for place, i in enumerate(order) if right[i])


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_ranks_equal_sorting_with_ties(data: st.DataObject) -> None:
    queries, candidates = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 8))
    # Few distinct values, so that ties are common.
    value = st.sampled_from([-0.5, 0.0, 0.25, 0.5])
    row = st.lists(value, min_size=candidates, max_size=candidates)
    scores = data.draw(st.lists(row, min_size=queries, max_size=queries))
    flags = st.lists(st.booleans(), min_size=candidates, max_size=candidates).filter(any)
    right = data.draw(st.lists(flags, min_size=queries, max_size=queries))
    expected = [rank_by_sorting(s, r) for s, r in zip(scores, right, strict=True)]
    assert best_ranks(torch.tensor(scores), torch.tensor(right)).tolist() == expected


def test_saying_the_same_of_everything_earns_nothing() -> None:
    ranks = best_ranks(torch.zeros(20, 20), torch.eye(20).bool())
    assert [share.right for share in recalls(ranks).values()] == [0, 0, 0]
    broken = best_ranks(torch.full((4, 12), torch.nan), torch.eye(12)[:4].bool())
    assert recalls(broken)["R@10"].right == 0


def test_recalls_by_hand() -> None:
    found = recalls(torch.tensor([0, 0, 3, 5, 9, 10]))
    assert {k: (s.right, s.total) for k, s in found.items()} == {"R@1": (2, 6), "R@5": (3, 6), "R@10": (5, 6)}


def test_a_query_without_answer_is_an_error() -> None:
    with pytest.raises(DataError, match="no right candidate"):
        best_ranks(torch.zeros(2, 2), torch.tensor([[True, False], [False, False]]))


@pytest.mark.slow
def test_top_k_equals_scikit_learn() -> None:
    from sklearn.metrics import top_k_accuracy_score  # here, since every run collects this file

    rng = np.random.default_rng(0)
    scores, labels = rng.standard_normal((300, 12)), rng.integers(0, 12, 300)
    for k in (1, 3, 5):
        ours = top_k(torch.from_numpy(scores), torch.from_numpy(labels), k).float().mean().item()
        assert ours == pytest.approx(top_k_accuracy_score(labels, scores, k=k, labels=range(12)))


def test_top_k_with_ties_by_hand() -> None:
    scores = torch.tensor([[0.5, 0.5, 0.1], [0.5, 0.4, 0.1]])
    assert top_k(scores, torch.tensor([0, 0]), 1).tolist() == [False, True]
    assert top_k(scores, torch.tensor([0, 1]), 2).tolist() == [True, True]


def test_dual_softmax_by_its_definition() -> None:
    rng = np.random.default_rng(1)
    cosines = rng.uniform(-1, 1, (5, 7))
    for scale in (1.0, 100.0):
        weight = np.exp(scale * cosines) / np.exp(scale * cosines).sum(axis=0, keepdims=True)
        ours = dual_softmax(torch.from_numpy(cosines), scale)
        np.testing.assert_allclose(ours.numpy(), cosines * weight, atol=1e-12)


def unit(rows: list[list[float]]) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.tensor(rows), dim=-1)


def test_retrieval_with_several_captions_by_hand() -> None:
    # Video 0 has two captions, one of them closer to video 1; video 1 has one good caption.
    video = unit([[1.0, 0.0], [0.0, 1.0]])
    text = unit([[1.0, 0.1], [0.2, 1.0], [0.0, 1.0]])
    found = retrieval(video, text, [0, 0, 1], ["a", "b", "c"], dsl=False)
    # Each caption is a query: the second one finds the wrong video.
    assert (found["T2V"]["R@1"].right, found["T2V"]["R@1"].total) == (2, 3)
    # For a video its best-placed caption counts.
    assert (found["V2T"]["R@1"].right, found["V2T"]["R@1"].total) == (2, 2)


def test_duplicate_captions() -> None:
    # Two videos with the same caption: the text cannot tell them apart.
    video = unit([[1.0, 0.1], [1.0, -0.1], [0.0, 1.0]])
    text = unit([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    texts = ["a dog", "a dog", "a cat"]
    strict = retrieval(video, text, [0, 1, 2], texts, dsl=False)
    equal = retrieval(video, text, [0, 1, 2], texts, dsl=False, duplicates="equal")
    assert strict["T2V"]["R@1"].right == 1
    assert strict["V2T"]["R@1"].right == 1
    assert equal["T2V"]["R@1"].right == 3
    assert equal["V2T"]["R@1"].right == 3


def test_relevance_of_shared_texts() -> None:
    right = relevance([0, 1, 1, 2], 3, ["a", "b", "a", "c"], "equal")
    assert right.int().tolist() == [[1, 1, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert relevance([0, 1, 1, 2], 3, ["a", "b", "a", "c"], "strict").sum() == 4


def reference_recall(cosines: np.ndarray, owner: list[int], k: int) -> tuple[float, float]:
    """T2V and V2T R@k as the published evaluation counts: argsort per row, best caption per video."""
    to_video = np.argsort(-cosines, axis=1)
    text_hits = [owner[i] in to_video[i, :k] for i in range(len(owner))]
    to_text = np.argsort(-cosines.T, axis=1)
    video_hits = []
    for v in range(cosines.shape[1]):
        mine = [i for i, o in enumerate(owner) if o == v]
        video_hits.append(min(int(np.where(to_text[v] == i)[0][0]) for i in mine) < k)
    return float(np.mean(text_hits)), float(np.mean(video_hits))


@pytest.mark.parametrize("dsl", [False, True])
def test_retrieval_equals_the_published_counting(dsl: bool) -> None:
    rng = np.random.default_rng(2)
    owner = sorted(rng.integers(0, 20, 40).tolist() + list(range(20)))
    video = torch.nn.functional.normalize(torch.from_numpy(rng.standard_normal((20, 16))).float(), dim=-1)
    text = torch.nn.functional.normalize(
        video[owner] + 0.25 * torch.from_numpy(rng.standard_normal((60, 16))).float(), dim=-1
    )
    found = retrieval(video, text, owner, [str(i) for i in range(60)], dsl=dsl)
    cosines = (text @ video.T).numpy().astype(np.float64)
    columns = np.exp(cosines) / np.exp(cosines).sum(axis=0, keepdims=True)
    rows = np.exp(cosines.T) / np.exp(cosines.T).sum(axis=0, keepdims=True)
    for k in (1, 5, 10):
        t2v = reference_recall(cosines * columns if dsl else cosines, owner, k)[0]
        v2t = reference_recall((cosines.T * rows).T if dsl else cosines, owner, k)[1]
        assert found["T2V"][f"R@{k}"].value == pytest.approx(t2v)
        assert found["V2T"][f"R@{k}"].value == pytest.approx(v2t)


def test_share_of_nothing() -> None:
    assert Share(0, 0).to_dict() == {"value": 0.0, "low": 0.0, "high": 1.0, "n": 0}


def test_pairs_in_rows_are_retrieval_with_one_caption_each() -> None:
    torch.manual_seed(0)
    video = torch.nn.functional.normalize(torch.randn(12, 8), dim=-1)
    text = torch.nn.functional.normalize(video + 0.5 * torch.randn(12, 8), dim=-1)
    ways = retrieval(video, text, range(12), [str(i) for i in range(12)], dsl=False)
    expected = {f"{way.lower()}_r{k}": ways[way][f"R@{k}"].value for way in ways for k in (1, 5)}
    assert paired_recalls(video, text) == expected
    # What is the same for all is never right; nothing is found by a model that cannot tell clips apart.
    same = video[:1].expand(12, -1)
    assert set(paired_recalls(same, same).values()) == {0.0}


# -- intervals ----------------------------------------------------------------------------------------------


@given(st.integers(0, 200), st.integers(1, 200))
def test_wilson_holds_the_share(right: int, total: int) -> None:
    right = min(right, total)
    low, high = wilson(right, total)
    assert 0 <= low <= right / total + 1e-9
    assert right / total - 1e-9 <= high <= 1
    wider = wilson(right * 4, total * 4)
    assert wider[1] - wider[0] < high - low + 1e-9


def test_wilson_by_hand() -> None:
    # p = 0.5, n = 100: centre 0.5, half-width 1.96 / 2 / sqrt(100 + 1.96^2).
    low, high = wilson(50, 100)
    assert (low, high) == pytest.approx((0.40383, 0.59617), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), min_size=1, max_size=8))
def test_the_interval_of_a_mean_holds_it(shares) -> None:
    shares = [(min(right, total), total) for right, total in shares]
    low, high = mean_interval(shares)
    mean = sum(right / total for right, total in shares) / len(shares)
    assert 0 <= low <= mean + 1e-9
    assert mean - 1e-9 <= high <= 1


def test_the_interval_of_a_mean_by_hand() -> None:
    assert mean_interval([(3, 10)]) == pytest.approx(wilson(3, 10))
    # Four like shares: half the distances of one.
    low, high = wilson(50, 100)
    assert mean_interval([(50, 100)] * 4) == pytest.approx((0.5 - (0.5 - low) / 2, 0.5 + (high - 0.5) / 2))

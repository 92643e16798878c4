"""From verl's rows to votes and back; needs no verl."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

import mgrpo_kernels as K
from mgrpo.config import from_dict
from mgrpo.grading.checker import AnswerChecker
from mgrpo.grading.extract import make_extractor
from mgrpo.integrations.shared import make_truth_reader
from mgrpo.integrations.verl.groups import Rows, arrange, credit_rows, merge_rows, place_rewards, places_in_groups

M, N = 4, 2
CONFIG = from_dict(
    {
        "rollout": {"num_policy": M, "num_momentum": N, "num_prompts": 2, "max_new_tokens": 5},
        "filter": {"applies_to": "none"},
        "answer": {"extract": r"regex:#(\d+)", "equivalence": "exact"},
    }
)
# By prompt: answers of the policy, of the momentum model.
ANSWERS = {"a": (["1", "1", "2", None], ["2", "2"]), "b": (["7", "7", "7", "8"], ["7", None])}


def make_rows(answers=ANSWERS, *, entropy=None, true=None) -> Rows:
    """Rows of three to five tokens each, of the entropy that is asked for by key, else 1."""
    keys, texts = [], []
    for uid, (policy, momentum) in answers.items():
        for name, given in ((uid, policy), (f"{uid}-momentum", momentum)):
            for session, answer in enumerate(given):
                keys.append(f"{name}_{session}_0")
                texts.append("no answer" if answer is None else f"so it is #{answer}")
    lengths = torch.tensor([3 + i % 3 for i in range(len(keys))])
    mask = torch.arange(5) < lengths[:, None]
    values = torch.tensor([(entropy or {}).get(key, 1.0) for key in keys])[:, None].expand(mask.shape)
    return Rows(
        keys=keys,
        texts=texts,
        entropy=values.masked_fill(~mask, 99.0),
        mask=mask,
        truncated=lengths == 5,
        true_answers=[(true or {}).get(key.split("_")[0].removesuffix("-momentum")) for key in keys],
    )


def shuffled(rows: Rows, seed: int) -> tuple[Rows, list[int]]:
    order = list(range(len(rows.keys)))
    random.Random(seed).shuffle(order)
    return Rows(
        keys=[rows.keys[i] for i in order],
        texts=[rows.texts[i] for i in order],
        entropy=rows.entropy[order],
        mask=rows.mask[order],
        truncated=rows.truncated[order],
        true_answers=[rows.true_answers[i] for i in order],
    ), order


def run(rows, config=CONFIG):
    with AnswerChecker(mode="exact") as checker:
        return credit_rows(rows, config, extract=make_extractor(config.answer.extract), checker=checker)


def by_key(rows, values):
    return dict(zip(rows.keys, values.tolist(), strict=True))


def test_votes_are_of_each_prompt_and_momentum_rollouts_take_part_in_them():
    rows = make_rows()
    credit = run(rows)
    rewards = by_key(rows, credit.rewards)
    # Two of four policy rollouts of `a` say 1; with the momentum model's two votes the label is 2.
    assert credit.credit.labels == ["2", "7"]
    assert [rewards[f"a_{i}_0"] for i in range(M)] == [0, 0, 1, 0]
    assert [rewards[f"a-momentum_{i}_0"] for i in range(N)] == [1, 1]
    assert [rewards[f"b_{i}_0"] for i in range(M)] == [1, 1, 1, 0]
    alone = run(rows, replace(CONFIG, vote=replace(CONFIG.vote, pool="policy")))
    assert alone.credit.labels == ["1", "7"]


def test_momentum_rollouts_do_not_train_and_advantages_are_the_kernels():
    rows = make_rows()
    credit = run(rows)
    trains, advantage = by_key(rows, credit.trains), by_key(rows, credit.advantage)
    assert all(trains[key] == ("momentum" not in key) for key in rows.keys)
    assert all(advantage[key] == 0 for key in rows.keys if "momentum" in key)
    expected = K.group_advantage(torch.tensor([[0.0, 0, 1, 0], [1, 1, 1, 0]]))
    found = [[advantage[f"{uid}_{i}_0"] for i in range(M)] for uid in "ab"]
    torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=0)
    assert expected.abs().min() > 0.1


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_rows_changes_nothing(seed):
    rows = make_rows(true={"a": "2", "b": "8"})
    straight = run(rows)
    mixed, _ = shuffled(rows, seed)
    credit = run(mixed)
    for name in ("rewards", "advantage", "trains"):
        assert by_key(mixed, getattr(credit, name)) == by_key(rows, getattr(straight, name)), name
    assert credit.metrics == pytest.approx(straight.metrics)
    assert sorted(credit.credit.labels) == sorted(straight.credit.labels)


def test_a_dropped_trajectory_neither_votes_nor_trains():
    # `a_2` and one momentum rollout say 2 with far lower entropy than the rest, so 1 wins.
    spread = {f"{p}_{i}_0": 1 + 0.05 * i for p in ("a", "b") for i in range(M)}
    low = spread | {"a_2_0": 0.01, "a-momentum_0_0": 0.01}
    rows = make_rows(entropy=low)
    config = replace(CONFIG, filter=replace(CONFIG.filter, applies_to="vote-and-loss"))
    credit = run(rows, config)
    trains, advantage = by_key(rows, credit.trains), by_key(rows, credit.advantage)
    assert not trains["a_2_0"] and advantage["a_2_0"] == 0
    assert trains["a_0_0"] and trains["a_3_0"]
    assert credit.credit.labels[0] == "1"
    kept = run(make_rows(entropy=spread), config)
    assert by_key(rows, kept.trains)["a_2_0"] and kept.credit.labels[0] == "2"
    # What padding holds is never read: it is 99 everywhere above.
    assert credit.metrics["pruned_share"] == pytest.approx(2 / 12)


def test_the_sum_of_entropies_can_be_what_the_filter_looks_at():
    rows = make_rows()
    rows.mask[0, 1:] = False  # one token of entropy 1, where the others have three to five
    config = replace(CONFIG, filter=replace(CONFIG.filter, applies_to="vote-and-loss", entropy="sum", k=0.0))
    assert run(rows, config).trains[:M].tolist() == [False, True, True, True]
    mean = replace(config, filter=replace(config.filter, entropy="mean"))
    assert run(rows, mean).trains[:M].tolist() == [True] * M


def test_true_answers_feed_metrics_alone():
    blind, right, wrong = (run(make_rows(true=t)) for t in (None, {"a": "2", "b": "7"}, {"a": "7", "b": "2"}))
    for other in (right, wrong):
        assert torch.equal(blind.rewards, other.rewards) and torch.equal(blind.advantage, other.advantage)
    assert (right.metrics["vote_accuracy"], wrong.metrics["vote_accuracy"]) == (1.0, 0.0)
    assert right.metrics["accuracy"] == 4 / 8 and blind.metrics["accuracy"] is None
    labels = replace(CONFIG, objective=replace(CONFIG.objective, reward="labels"))
    by_label = run(make_rows(true={"a": "1", "b": "7"}), labels)
    assert by_label.rewards[:M].tolist() == [1, 1, 0, 0]


def test_labels_are_read_as_the_trainer_reads_them(caplog):
    """A worked solution, a box, a number or several answers; a text without a mark is no label, and said to be none."""
    make_truth_reader.cache_clear()  # which warns once in a process
    for two, seven in ((r"\boxed{2}", "so\n#### 7"), (2, 7.0), (["1", "2"], ["7"])):
        assert run(make_rows(true={"a": two, "b": seven})).metrics["vote_accuracy"] == 1.0
    assert not caplog.records
    rows = make_rows(true={"a": "x" * 300, "b": "7"})
    assert run(rows).metrics["vote_accuracy"] == run(rows).metrics["vote_accuracy"] == 1.0
    assert [record.message[:46] for record in caplog.records] == ["mgrpo: no answer was found in the label 'xxxxx"]
    config = replace(CONFIG, answer=replace(CONFIG.answer, label_extract="last-number"))
    assert run(make_rows(true={"a": "is 2", "b": "is 7."}), config).metrics["vote_accuracy"] == 1.0


def test_fewer_rollouts_may_train_than_vote():
    config = replace(CONFIG, vote=replace(CONFIG.vote, num_train=3))
    rows = make_rows()
    trains = by_key(rows, run(rows, config).trains)
    assert [trains[f"a_{i}_0"] for i in range(M)] == [True, True, True, False]
    masked = replace(CONFIG, rollout=replace(CONFIG.rollout, truncated="mask"))
    trains = run(rows, masked).trains
    policy = torch.tensor(["momentum" not in key for key in rows.keys])
    assert torch.equal(trains, policy & ~rows.truncated) and rows.truncated[policy].any()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("b_3_0", r"4 policy and 2 momentum rollouts, got 3 and 2 for b, .* 1 of 2 prompts"),
        ("a-momentum_1_0", r"4 policy and 2 momentum rollouts, got 4 and 1 for a"),
    ],
)
def test_uneven_groups_are_refused(missing, message):
    keys = [key for key in make_rows().keys if key != missing]
    with pytest.raises(ValueError, match=message):
        arrange(keys, M, N)


def test_several_outputs_of_a_rollout_and_no_rollouts_are_refused():
    with pytest.raises(ValueError, match=r"must be one trajectory, got output 1 of a_0_1"):
        arrange(["a_0_0", "a_0_1"], 1, 0)
    with pytest.raises(ValueError, match=r"got 0 and 0 for no prompt"):
        arrange([], 1, 0)


def test_sessions_are_in_order_even_past_nine():
    keys = [f"x_{i}_0" for i in (10, 2, 0, 1, 11, 9, 8, 7, 6, 5, 4, 3)]
    assert [keys[row] for row in arrange(keys, 12, 0)[0].tolist()] == [f"x_{i}_0" for i in range(12)]


def test_places_count_up_within_each_group():
    prompt, place = places_in_groups(["q", "p", "q", "q", "p"])
    assert prompt.tolist() == [0, 1, 0, 0, 1] and place.tolist() == [0, 0, 1, 2, 1]


def test_rows_of_other_lengths_are_merged_without_reading_padding():
    rows = make_rows()
    short = Rows(
        keys=["c_0_0"],
        texts=["#1"],
        entropy=torch.tensor([[2.0, 4.0]]),
        mask=torch.ones(1, 2, dtype=torch.bool),
        truncated=torch.tensor([False]),
        true_answers=[None],
    )
    both = merge_rows([short, rows])
    assert both.keys == ["c_0_0", *rows.keys] and both.mask.shape == (13, 5)
    assert both.mask[0].tolist() == [True, True, False, False, False]
    assert K.trajectory_entropy(both.entropy, mask=both.mask)[0] == 3.0
    assert torch.equal(both.entropy[1:], rows.entropy)


def test_a_reward_stands_at_the_last_token_that_the_model_wrote():
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0], [1, 1, 1]])
    placed = place_rewards(torch.tensor([1.0, 2.0, 3.0, 4.0]), mask)
    assert placed.tolist() == [[0, 1, 0], [0, 0, 2], [0, 0, 0], [0, 0, 4]]

"""What is read from verl's queue and written back. R rows, L response tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.utils import tensordict_utils as tu

from mgrpo.config import from_dict
from mgrpo.grading.checker import AnswerChecker
from mgrpo.integrations.verl import queue as verl_queue
from mgrpo.integrations.verl import trainer as verl_trainer
from mgrpo.integrations.verl.groups import credit_rows, merge_rows
from mgrpo.integrations.verl_reward import compute_score

CONFIG = from_dict(
    {
        "rollout": {"num_policy": 2, "num_momentum": 1, "num_prompts": 1, "max_new_tokens": 4},
        "filter": {"applies_to": "none"},
    }
)
EOS = 1


class Tokenizer:
    eos_token_id = EOS

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(i) for i in ids if i != EOS or not skip_special_tokens)

    def batch_decode(self, rows, skip_special_tokens):
        assert skip_special_tokens
        return [self.decode(row, skip_special_tokens) for row in rows]


class Queue:
    """The two calls of TransferQueue, by key."""

    def __init__(self):
        self.rows: dict[str, dict] = {}

    def kv_batch_get(self, keys, partition_id, select_fields):
        rows = [self.rows[key] for key in keys]
        fields = {
            name: torch.nested.as_nested_tensor([row[name] for row in rows], layout=torch.jagged)
            for name in select_fields
            if name != "reward_model"
        }
        data = TensorDict(fields, batch_size=len(keys))
        labels = np.array([row["reward_model"] for row in rows], dtype=object)
        tu.assign_non_tensor_stack(data, "reward_model", labels.tolist())
        return data

    def kv_batch_put(self, keys, partition_id, fields):
        for name, values in fields.items():
            for key, value in zip(keys, values.unbind(), strict=True):
                self.rows[key][name] = value.clone()


@pytest.fixture
def queue(monkeypatch):
    queue = Queue()
    monkeypatch.setattr(verl_queue, "tq", queue)
    return queue


def put(queue, key, response, *, mask=None, truth=None, padding=False):
    ids = [*map(ord, response)]
    ids = [EOS if i == ord("$") else i for i in ids]
    queue.rows[key] = {
        "prompts": torch.tensor([ord("?")]),
        "responses": torch.tensor(ids),
        "response_mask": torch.tensor(mask or [1] * len(ids)),
        "entropy": torch.full((len(ids),), 0.5),
        "reward_model": {"ground_truth": truth},
    }
    return key, {"is_padding": True} if padding else {}


def batch_of(*rows):
    keys, tags = zip(*rows, strict=True)
    return KVBatchMeta(keys=list(keys), tags=list(tags), partition_id="train")


def assign_credit(policy, momentum, config=CONFIG):
    with AnswerChecker(mode="exact") as checker:
        rows = merge_rows([policy.rows, momentum.rows])
        return credit_rows(rows, config, extract=lambda text: text[0] if text else None, checker=checker)


def test_rewards_masks_and_advantages_reach_the_rows_they_are_of(queue):
    # In any order, with a row that verl has added between them.
    policy = batch_of(
        put(queue, "a_1_0", "9bcd"), put(queue, "pad0_0_0", "$", padding=True), put(queue, "a_0_0", "7b$")
    )
    momentum = batch_of(put(queue, "a-momentum_0_0", "7$"))
    fetched = verl_queue.fetch(policy, Tokenizer(), 4), verl_queue.fetch(momentum, Tokenizer(), 4)
    rows = fetched[0].rows
    assert rows.keys == ["a_1_0", "a_0_0"] and rows.texts == ["9bcd", "7b"]
    assert rows.truncated.tolist() == [True, False]
    credit = assign_credit(*fetched)
    assert credit.credit.labels == ["7"]
    fetched[0].write_rewards(credit)
    fetched[0].write_advantages(credit)
    found = {key: {n: v.tolist() for n, v in queue.rows[key].items() if n != "reward_model"} for key in policy.keys}
    assert found["a_0_0"]["rm_scores"] == [0, 0, 1] and found["a_1_0"]["rm_scores"] == [0, 0, 0, 0]
    assert found["a_0_0"]["response_mask"] == found["a_0_0"]["loss_mask"] == [1, 1, 1]
    assert found["pad0_0_0"]["advantages"] == [0] and found["pad0_0_0"]["response_mask"] == [0]
    high, low = found["a_0_0"]["advantages"], found["a_1_0"]["advantages"]
    assert high == found["a_0_0"]["returns"] and len(set(high)) == 1
    assert high[0] == pytest.approx(0.7071, abs=1e-3) and low == pytest.approx([-high[0]] * 4)
    assert "advantages" not in queue.rows["a-momentum_0_0"]


def test_a_row_that_does_not_train_has_no_token_in_either_mask(queue):
    policy = batch_of(put(queue, "a_0_0", "7$"), put(queue, "a_1_0", "9bcd"))
    momentum = batch_of(put(queue, "a-momentum_0_0", "7$"))
    fetched = verl_queue.fetch(policy, Tokenizer(), 4), verl_queue.fetch(momentum, Tokenizer(), 4)
    masked = from_dict({"rollout": {**vars(CONFIG.rollout), "truncated": "mask"}, "filter": {"applies_to": "none"}})
    credit = assign_credit(*fetched, masked)
    fetched[0].write_rewards(credit)
    assert queue.rows["a_1_0"]["response_mask"].tolist() == queue.rows["a_1_0"]["loss_mask"].tolist() == [0] * 4
    assert queue.rows["a_0_0"]["loss_mask"].tolist() == [1, 1]
    assert queue.rows["a_0_0"]["loss_mask"].dtype == torch.int64  # as verl has it


def test_tokens_that_a_tool_wrote_are_not_the_models(queue):
    policy = batch_of(put(queue, "a_0_0", "7xy$", mask=[1, 0, 0, 1]), put(queue, "a_1_0", "9$"))
    momentum = batch_of(put(queue, "a-momentum_0_0", "7$"))
    fetched = verl_queue.fetch(policy, Tokenizer(), 4), verl_queue.fetch(momentum, Tokenizer(), 4)
    credit = assign_credit(*fetched)
    fetched[0].write_rewards(credit)
    fetched[0].write_advantages(credit)
    row = queue.rows["a_0_0"]
    assert row["response_mask"].tolist() == [1, 0, 0, 1] and row["rm_scores"].tolist() == [0, 0, 0, 1]
    assert row["advantages"].tolist()[1:3] == [0, 0] and row["advantages"][3] > 0.5


def test_true_answers_are_read_where_there_are_any(queue):
    batch = batch_of(put(queue, "a_0_0", "7$", truth=7), put(queue, "a_1_0", "9$"))
    assert verl_queue.fetch(batch, Tokenizer(), 4).rows.true_answers == [7, None]


def test_momentum_prompts_have_names_of_their_own_and_leave_the_policys_alone():
    def make(uids):
        return tu.get_tensordict({"uid": np.array(uids, dtype=object), "index": torch.arange(len(uids))})

    prompts = [make(["p", "q"]), make(["r"])]
    for given, wanted in ((prompts, ["p", "q", "r"]), (prompts[:1], ["p", "q"])):
        batch = verl_trainer.momentum_prompts(given, 3)
        assert list(batch["uid"]) == [f"{uid}-momentum" for uid in wanted]
        assert batch["__rollout_n__"] == 3 and batch["index"].tolist()[:2] == [0, 1]
    assert list(prompts[0]["uid"]) == ["p", "q"] and "__rollout_n__" not in prompts[0]


def test_the_score_for_metrics_is_one_for_the_right_answer():
    options = {"extract": r"regex:#(\d+)", "equivalence": "exact"}
    assert compute_score("any", "so #12", "12", **options) == {"score": 1.0, "acc": 1.0}
    assert compute_score("any", "so #12", "13", {"split": "x"}, **options)["acc"] == 0.0
    assert compute_score("any", "so #12", None, **options)["score"] == 0.0
    assert compute_score("any", r"\boxed{1/2}", "0.5")["score"] == 1.0
    for truth in (r"So \boxed{\frac{1}{2}}.", "half\n#### 0.5", 0.5, ["3", "1/2"], np.array([0.5]), np.float32(0.5)):
        assert compute_score("any", r"\boxed{1/2}", truth)["score"] == 1.0
    assert compute_score("any", r"\boxed{12}", "It is 12.", label_extract="last-number")["score"] == 1.0
    assert compute_score("any", r"\boxed{12}", {"style": "rule"})["score"] == 0.0
    # Data without labels have no answer that could be right.
    assert compute_score("any", r"\boxed{None}", None, equivalence="exact")["score"] == 0.0

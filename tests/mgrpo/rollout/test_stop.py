"""Texts that end a response: where they are seen, what is read before them, and what a run makes of them."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
import torch
from helpers import one_by_one
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mgrpo.errors import ConfigError, InputError
from mgrpo.evaluate import main as evaluate_main
from mgrpo.grading.extract import make_extractor
from mgrpo.rollout.stop import StopTexts, find_label, make_stop, read_texts
from mgrpo.rollout.transformers import TransformersEngine
from mgrpo.training.trainer import Trainer
from mgrpo.types import Sampling, WeightTag, join

CORPUS = [
    "Question: What is 3+4?\nAnswer: 7\n\nQuestion: né 中文 🙂 x?\nAnswer: #### 5.\n\n",
    "Human: tell me.\n\nAssistant: the answer is 12;\n### Question: a b  c\n",
]
SPECIAL = ["<pad>", "</s>", "<|im_end|>"]


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Tokenizers of the kinds in use, their tokens long and short."""
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
        tokenizer.train_from_iterator(CORPUS, trainer)
    elif kind == "words":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<pad>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.decoder = decoders.WordPiece()
        tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=90, special_tokens=SPECIAL))
    else:  # as Llama 2: spaces are a letter, bytes stand in for what the vocabulary has not
        pieces = [
            "▁",
            "\n",
            "▁Question",
            "Question",
            ":",
            "▁a",
            "n",
            "é",
            "+",
            "Ans",
            "wer",
            ":▁",
            "\n\n",
            "▁\n",
            "5",
            ".",
        ]
        vocabulary = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *pieces]
        tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(vocabulary)}, [], byte_fallback=True))
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{"pad_token": "<pad>", "eos_token": "</s>", "extra_special_tokens": ["<|im_end|>"]},
    )


TOKENIZERS = {kind: make_tokenizer(kind) for kind in ("bytes", "words", "spaces")}
TEXTS = {
    "bytes": ["\n\nQuestion:", "\n", "é", "中", "🙂", ":", " ", "tion", "\n\n", "ion: ", "  c"],
    "words": ["Question :", "tion", "answer", "?", " ", "##", ". Human"],
    "spaces": ["\nQuestion:", "\n", "é", "中", " ", " Question", ":", "\n\n", "+ ", "n: ", "é中"],
}


def first_end(tokenizer, texts, row) -> int | None:
    """Tokens up to the first whose decoding, with all ahead of it, holds a text; the definition, token by token."""
    for end in range(1, len(row) + 1):
        decoded = tokenizer.decode(row[:end], skip_special_tokens=True)
        if any(text in decoded for text in texts):
            return end
    return None


def random_rows(kind: str, rng: random.Random, num_rows: int, length: int) -> list[list[int]]:
    """Tokens at random, with what the texts are made of more often, and tokens without text in between."""
    tokenizer = TOKENIZERS[kind]
    often = [tokenizer(text, add_special_tokens=False).input_ids for text in CORPUS + TEXTS[kind]]
    if kind == "spaces":
        often += [[3 + byte for byte in text.encode()] for text in TEXTS[kind]]
        often += [[i] for i in range(len(tokenizer) - 14, len(tokenizer))]
    rows = []
    for _ in range(num_rows):
        row: list[int] = []
        while len(row) < length:
            pieces = rng.choice(often)
            start = rng.randrange(len(pieces) or 1)
            row += pieces[start : start + rng.randint(1, 6)]
            row += rng.choice([[], [], [rng.randrange(len(tokenizer))], [0] * rng.choice([1, 40])])
        rows.append(row[:length])
    return rows


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_first_token_that_completes_a_text_ends_the_response(kind):
    """Against the definition, for texts within, across and of parts of tokens, whatever else is in the batch."""
    rng, tokenizer, seen = random.Random(0), TOKENIZERS[kind], set()
    for _ in range(60):
        texts = rng.sample(TEXTS[kind], rng.choice([1, 1, 2, 3]))
        stop = StopTexts(texts, tokenizer)
        rows = random_rows(kind, rng, 6, rng.choice([5, 90]))
        expected = [first_end(tokenizer, texts, row) for row in rows]
        assert [stop.end(row) for row in rows] == expected, (texts, rows)
        tokens, found = torch.tensor(rows), [None] * len(rows)
        alive = list(range(len(rows)))
        for t in range(tokens.shape[1]):
            rng.shuffle(alive)
            ended = stop.ended(tokens[:, : t + 1], torch.tensor(alive))
            for row, is_end in zip(list(alive), ended.tolist(), strict=True):
                if is_end:
                    found[row] = t + 1
                    alive.remove(row)
            if not alive:
                break
        assert found == expected, (texts, rows)
        seen |= {end if end is None else min(end, 40) for end in expected}
    assert None in seen and len(seen) > 12


def test_few_tokens_are_decoded():
    """A token that can not complete a text is decoded once, alone; and of a long row only the tail."""
    tokenizer, sizes = TOKENIZERS["bytes"], []

    class Counting:
        added_tokens_decoder = tokenizer.added_tokens_decoder

        def decode(self, ids, **options):
            sizes.append(len(ids))
            return tokenizer.decode(ids, **options)

    stop = StopTexts(["\n\nQuestion:"], Counting())
    row = torch.tensor([tokenizer("Answer: the n " * 100).input_ids])
    for t in range(row.shape[1]):
        stop.ended(row[:, : t + 1], torch.tensor([0]))
    assert max(sizes) <= 64 and sum(sizes) < 20 * row.shape[1]
    assert sizes.count(1) == len(set(row[0].tolist()))


@pytest.mark.parametrize(
    ("texts", "text", "before"),
    [
        (["\nQuestion:"], " 5\nQuestion: 3+4?", " 5"),
        (["\nQuestion:", "\n"], " 5\nQuestion:", " 5"),
        (["Question:", "\nQuestion:"], " 5\nQuestion:", " 5"),  # both end there: the longer one was meant
        (["ab", "b"], "xab", "x"),
        (["abc", "b"], "xab", "xa"),
        (["\nQuestion:"], " 5\nQuestion", " 5\nQuestion"),
        (["\nQuestion:"], "", ""),
        (["z", "5"], "1 5 z 5", "1 "),
    ],
)
def test_what_is_read_stands_before_the_text(texts, text, before):
    assert StopTexts(texts, TOKENIZERS["bytes"]).cut(text) == before


@pytest.mark.parametrize(
    ("extract", "text", "answer"),
    [
        ("last-number", " 5.\n\nQuestion: What is 9+4?\nAnswer: 13", "5"),
        ("hash", " 2+3\n#### 5\n\nQuestion: What is 9+4?\nAnswer: 9+4\n#### 13", "5"),
        ("boxed", r" \boxed{5} Question: \boxed{13}", "5"),
        (r"regex:is (\d+)", " it is 5; Question: What is 13?", "5"),
    ],
)
def test_the_answer_is_not_that_of_a_question_the_model_asks(extract, text, answer):
    tokenizer = TOKENIZERS["bytes"]
    stop, ids = StopTexts(["Question:"], tokenizer), tokenizer(text).input_ids
    assert make_extractor(extract)(read_texts(tokenizer, [ids], None)[0]) != answer
    # Both as it is written and with the stop text at its end.
    for response in (ids, ids[: stop.end(ids)]):
        assert make_extractor(extract)(read_texts(tokenizer, [response], stop)[0]) == answer


@pytest.mark.parametrize(
    ("template", "label"),
    [
        (r"Question: {prompt}\nAnswer:", "\nQuestion:"),
        ("Question: {prompt}\nAnswer:", "\nQuestion:"),
        (r"Q: 1+1\nA: 2\n\nQ: {prompt}\nA:", "\nQ:"),
        (r"Answer it.\n\n### Instruction:\n{prompt}\n\n### Response:\n", "\n### Instruction:"),
        ("User: {prompt}\nAssistant:", "\nUser:"),
        ("问题\uff1a{prompt}", "\n问题\uff1a"),
        ("{prompt}", None),
        (r"{prompt}\nAnswer:", None),
        ("Please solve {prompt}", None),
        (r"<|user|>\n{prompt}", None),
        (": {prompt}", None),
        (r"Here is a task that wants all of your attention, so read it well: {prompt}", None),
        ("chat", None),
        (None, None),
    ],
)
def test_the_label_of_a_template_ends_a_response(template, label):
    assert find_label(template) == label
    stop = make_stop(None, template, TOKENIZERS["bytes"])
    assert (stop and stop.texts) == ((label,) if label else None)
    assert make_stop((), template, TOKENIZERS["bytes"]) is make_stop(("",), template, TOKENIZERS["bytes"]) is None
    given = make_stop((r"\n\n", "###"), template, TOKENIZERS["bytes"])
    assert given is not None and given.texts == ("\n\n", "###")


def test_a_special_token_alone_is_met_as_a_token_and_refused_beside_text():
    tokenizer = TOKENIZERS["bytes"]
    stop = StopTexts(["<|im_end|>", "###"], tokenizer)
    assert stop.token_ids == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    with pytest.raises(InputError, match=r"must be text without special tokens or one of them alone, got '<\|im_end"):
        StopTexts(["<|im_end|>\n"], tokenizer)
    assert make_stop(None, "<|im_end|>Question: {prompt}", tokenizer) is None


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("", "a"), r"config: --rollout.stop must be texts of 1 to 1000 characters, or '' alone for none, got 0"),
        (("a" * 1001,), "got 1001"),
        (("\ufffd",), "must be text that a model can write"),
        (("\udcff",), "must be text that a model can write"),
    ],
)
def test_texts_that_no_response_can_hold_are_refused(small, texts, message):
    with pytest.raises(ConfigError, match=message):
        small({"rollout.stop": texts})


# ---- the embedded engine


def run_engine(loaded, prompts, stop, *, n=1, batch_size=64, max_new_tokens=36, temperature=0.0):
    arguments = {"eos_ids": loaded.eos_ids, "pad_id": loaded.pad_id, "dtype": torch.float32}
    engine = TransformersEngine(loaded.model, **arguments, batch_size=batch_size, stop=stop)
    engine.update_weights(loaded.model.state_dict(), WeightTag("policy", 0))
    sampling = Sampling(temperature=temperature, max_new_tokens=max_new_tokens, seed=3)
    return engine.generate(prompts, n, sampling, WeightTag("policy", 0))


@pytest.fixture
def base(small, trained):
    """The shipped model with its prompts, which writes steps such as 7+8=15;15+9=24#24."""
    trainer, _ = trained(small({"data.train": "arithmetic:24:3-5:0"}), 0)
    return trainer.loaded, [prompt.ids for prompt in trainer.data.prompts]


@pytest.mark.parametrize("texts", [["#"], ["=1", "=2"], ["5"], ["nowhere"]])
def test_responses_are_those_without_stop_up_to_the_text(base, texts):
    loaded, prompts = base
    stop = StopTexts(texts, loaded.tokenizer)
    whole, got = run_engine(loaded, prompts, None), run_engine(loaded, prompts, stop)
    assert len(set(got.lengths.tolist())) > 1
    for row in range(len(prompts)):
        end = first_end(loaded.tokenizer, texts, whole.response(row))
        length = len(whole.response(row)) if end is None else end
        assert got.response(row) == whole.response(row)[:length]
        assert torch.allclose(got.logprobs[row, :length], whole.logprobs[row, :length], atol=1e-5)
        assert got.logprobs[row, length:].eq(0).all() and got.tokens[row, length:].eq(loaded.pad_id).all()
        assert bool(got.truncated[row]) == (bool(whole.truncated[row]) if end is None else False)
    one_a_batch = run_engine(loaded, prompts, stop, batch_size=1)
    assert torch.equal(one_a_batch.tokens, got.tokens) and torch.equal(one_a_batch.lengths, got.lengths)


def test_a_text_completed_by_the_last_token_that_is_allowed_is_no_truncation(base):
    loaded, prompts = base
    stop = StopTexts(["="], loaded.tokenizer)
    lengths = run_engine(loaded, prompts, stop).lengths
    limit = int(lengths.max())
    assert not run_engine(loaded, prompts, stop, max_new_tokens=limit).truncated.any()
    assert run_engine(loaded, prompts, stop, max_new_tokens=limit - 1).truncated.tolist() == [
        bool(length == limit) for length in lengths
    ]


def test_a_special_token_ends_a_response_too(base):
    loaded, prompts = base
    stop = StopTexts([loaded.tokenizer.eos_token], loaded.tokenizer)
    with_token = run_engine(SimpleNamespace(**{**vars(loaded), "eos_ids": ()}), prompts, stop)
    assert torch.equal(with_token.tokens, run_engine(loaded, prompts, None).tokens) and not with_token.truncated.all()


def test_sampled_log_probs_are_the_scorers_up_to_the_text(base):
    loaded, prompts = base
    got = run_engine(loaded, prompts, StopTexts(["="], loaded.tokenizer), n=4, temperature=1.3)
    expected = one_by_one(loaded.model, join(prompts, got, None), 1.3)[0]
    assert torch.allclose(got.logprobs, expected, atol=1e-4) and got.mask.sum() > 100


# ---- a run


def test_a_run_trains_up_to_the_text_and_reads_before_it(small, trained):
    """In the built-in task # precedes the answer, so that a run that stops there finds none, and is never cut."""
    config = small({"rollout.stop": ("#",), "rollout.max_new_tokens": 40, "answer.extract": r"regex:=(\d+)$"})
    trainer, (row,) = trained(config, 1)
    assert row["truncated_share"] == 0 and row["unparseable_share"] < 0.2
    rollouts = trainer.engine.generate(
        [prompt.ids for prompt in trainer.data.prompts[:4]], 4, Sampling(seed=1), WeightTag("policy", 0)
    )
    texts = trainer.loaded.tokenizer.batch_decode([rollouts.response(i) for i in range(16)])
    assert all(text.index("#") == len(text) - 1 for text in texts)


@pytest.mark.parametrize("stop", [("#",), None])
def test_the_probe_and_greedy_answers_stop_too(small, trained, stop):
    options = {"rollout.stop": stop, "answer.extract": r"regex:#(\d\d)", "data.probe": "arithmetic:6:2-2:1"}
    trainer, _ = trained(small(options), 0)
    evaluation = trainer.evaluator.evaluate("policy", 0)
    prompts = [prompt.ids for prompt in trainer.data.prompts[:6]]
    answers = trainer.grader.read(prompts, trainer.generator.answer(prompts, 0))
    assert [answer is None for answer in answers] == [stop is not None] * 6
    assert evaluation.unparseable_share == (1 if stop else 0) and evaluation.truncated_share == 0


def test_the_plan_and_the_run_say_where_responses_end(launch, capsys, tmp_path):
    template = {"data.template": "Sum: {prompt}"}
    assert launch(template, "--dry-run") == 0
    assert r"EOS, '\nSum:'; by --data.template, --rollout.stop '' turns it off" in _said(capsys)
    assert launch(template | {"steps": 1}, run_dir=tmp_path / "other") == 0
    assert r"responses end at '\nSum:', by --data.template" in _said(capsys)
    assert launch(template, "--dry-run", "--rollout.stop", "") == 0
    assert "responses end at" not in _said(capsys)
    assert launch(template, "--dry-run", "--rollout.stop", r"\n#", "[b]") == 0
    assert r"EOS, '\n#', '[b]'" in _said(capsys)
    assert launch({}, "--rollout.stop", "", "a") == launch({}, "--dry-run", "--rollout.stop", "<eos>x") == 2
    assert "or one of them alone, got '<eos>x'" in capsys.readouterr().err


def _said(capsys) -> str:
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_a_resumed_run_stops_where_it_did(launch, resume, tmp_path, capsys):
    assert launch({"steps": 4}, "--stop-after", "1", "--rollout.stop", "#", "=") == 0
    assert resume("--stop-after", "2") == 0
    capsys.readouterr()
    assert resume("--rollout.stop", "#") == 2
    assert "--rollout.stop must be ('#', '='), as the run was started, got ('#',)" in capsys.readouterr().err.replace(
        "\n", " "
    )


def test_a_run_from_before_goes_on_without(launch, resume, tmp_path):
    assert launch({"steps": 4, "data.template": "Sum: {prompt}"}, "--stop-after", "1", "--rollout.stop", "") == 0
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    del config["rollout"]["stop"]
    path.write_text(json.dumps(config))
    assert resume("--stop-after", "2") == 0
    assert json.loads(path.read_text())["rollout"]["stop"] == []


def test_evaluation_stops_by_its_own_option(tmp_path, capsys):
    out = tmp_path / "out.json"
    options = [
        "--data.probe",
        "arithmetic:6:2-2:1",
        "--samples",
        "2",
        "--answer.extract",
        r"regex:#(\d\d)",
        "--out",
        str(out),
    ]
    shares = []
    for extra in ([], ["--rollout.stop", "#"], ["--rollout.stop", ""]):
        assert evaluate_main([*options, *extra]) == 0
        shares.append(json.loads(out.read_text())["evaluation"]["unparseable_share"])
    assert shares[0] == shares[2] < 0.5 and shares[1] == 1
    assert evaluate_main([*options, "--rollout.stop", "", "#"]) == 2
    assert "evaluate: --rollout.stop must be texts of 1 to 1000 characters" in capsys.readouterr().err
    assert evaluate_main([*options, "--data.template", "Sum: {prompt}"]) == 0
    assert r"responses end at '\nSum:', by --data.template" in capsys.readouterr().err


def test_trainer_without_texts_has_none(small):
    trainer = Trainer(small())
    assert trainer.grader.stop is None and trainer.engine.stop is None
    trainer.close()

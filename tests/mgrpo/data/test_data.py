"""Prompts through real tokenizers, and the sampler's promises."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from mgrpo.data import prompts as data
from mgrpo.data.prompts import make_dataset
from mgrpo.data.records import Record, load_records
from mgrpo.data.sampler import Sampler
from mgrpo.errors import InputError
from mgrpo.tasks.arithmetic import make_tokenizer

RECORDS = [
    Record(prompt="12+34=", answer="46", origin="t:1"),
    Record(prompt="50-08=", answer="42", origin="t:2"),
]
CHAT = "{% for m in messages %}{{ m['content'] }};{% endfor %}{% if add_generation_prompt %}#{% endif %}"
MESSAGES = [{"role": "system", "content": "11"}, {"role": "user", "content": "22+33="}]


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture
def special_tokenizer(tokenizer):
    """Puts `<pad>` before and `<eos>` behind every text, and has a chat template."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A <eos>", special_tokens=[("<pad>", 0), ("<eos>", 1)]
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def encode(text):
    return tuple(2 + "0123456789+-=;#".index(character) for character in text)


def test_plain_prompts_are_encoded_as_they_are(tokenizer):
    dataset = make_dataset(RECORDS, tokenizer, template=None, max_prompt_tokens=6)
    assert len(dataset) == 2 and dataset.num_overlong == 0
    assert [(p.ids, p.text, p.answer, p.index) for p in dataset.prompts] == [
        (encode("12+34="), "12+34=", "46", 0),
        (encode("50-08="), "50-08=", "42", 1),
    ]


def test_template_replaces_only_its_placeholder(tokenizer):
    records = [Record(prompt="{prompt}{0}", answer=None, origin="t:1")]
    dataset = make_dataset(records, tokenizer, template=r"{a}\n{prompt}\n{}", max_prompt_tokens=50)
    assert dataset.prompts[0].text == "{a}\n{prompt}{0}\n{}"
    dataset = make_dataset(RECORDS, tokenizer, template="#{prompt};", max_prompt_tokens=50)
    assert [p.ids for p in dataset.prompts] == [encode("#12+34=;"), encode("#50-08=;")]


def test_added_eos_is_stripped_and_other_special_tokens_stay(special_tokenizer):
    assert special_tokenizer("12").input_ids == [0, *encode("12"), 1]
    dataset = make_dataset(RECORDS, special_tokenizer, template="{prompt}", max_prompt_tokens=50)
    assert dataset.prompts[0].ids == (0, *encode("12+34="))


def test_written_eos_is_kept_where_the_tokenizer_adds_none(tokenizer):
    dataset = make_dataset(RECORDS, tokenizer, template="{prompt}<eos>", max_prompt_tokens=50)
    assert dataset.prompts[0].ids == (*encode("12+34="), 1)


def test_chat_template_renders_text_and_messages(chat_tokenizer):
    records = [RECORDS[0], Record(prompt=MESSAGES, answer=None, origin="t:3")]
    dataset = make_dataset(records, chat_tokenizer, template="chat", max_prompt_tokens=50)
    assert [p.text for p in dataset.prompts] == ["12+34=;#", "11;22+33=;#"]
    assert [p.ids for p in dataset.prompts] == [encode("12+34=;#"), encode("11;22+33=;#")]


def test_messages_without_template_are_chat_and_get_special_tokens_once(special_tokenizer):
    special_tokenizer.chat_template = "<pad>" + CHAT
    records = [Record(prompt=MESSAGES, answer=None, origin="t:1"), RECORDS[0], RECORDS[1]]
    dataset = make_dataset(records, special_tokenizer, template=None, max_prompt_tokens=50)
    assert [p.ids for p in dataset.prompts] == [
        (0, *encode("11;22+33=;#")),
        (0, *encode("12+34=")),
        (0, *encode("50-08=")),
    ]
    expected = special_tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=True).input_ids
    assert list(dataset.prompts[0].ids) == expected


def test_order_is_kept_over_encoding_chunks(tokenizer, monkeypatch):
    monkeypatch.setattr(data, "ENCODE_CHUNK", 3)
    records = load_records("arithmetic:8:2-4:0")
    dataset = make_dataset(records, tokenizer, template=None, max_prompt_tokens=50)
    assert [p.ids for p in dataset.prompts] == [encode(record.prompt) for record in records]
    assert [(p.text, p.answer) for p in dataset.prompts] == [(record.prompt, record.answer) for record in records]


def test_overlong_prompts_are_dropped_and_counted(tokenizer):
    records = [Record(prompt="1" * n, answer=str(n), origin=f"t:{n}") for n in (5, 2, 6, 4)]
    dataset = make_dataset(records, tokenizer, template=None, max_prompt_tokens=4, overlong="drop")
    assert [(p.ids, p.answer, p.index) for p in dataset.prompts] == [(encode("11"), "2", 0), (encode("1111"), "4", 1)]
    assert dataset.num_overlong == 2
    kept = make_dataset([records[1], records[3]], tokenizer, template=None, max_prompt_tokens=4)
    assert dataset.fingerprint == kept.fingerprint


def test_overlong_prompts_are_refused_by_default(tokenizer):
    records = [Record(prompt="1" * n, answer=None, origin=f"t:{n}") for n in (2, 5, 6)]
    match = (
        r"^probe: prompts must have at most 4 tokens, got 2 of 3 longer ones, the first t:5 with 5\. "
        r"Set --data\.overlong drop or a smaller --rollout\.max-new-tokens\."
    )
    with pytest.raises(InputError, match=match):
        make_dataset(records, tokenizer, template=None, max_prompt_tokens=4, source="probe")


def test_dropping_every_prompt_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"got 2 of 2 longer ones, .* Set a smaller --rollout\.max-new-tokens\."):
        make_dataset(RECORDS, tokenizer, template=None, max_prompt_tokens=5, overlong="drop")


@pytest.mark.parametrize("template", ["no place", "", "{ prompt }", "{prompt} {prompt}"])
def test_template_needs_its_placeholder_once(tokenizer, template):
    with pytest.raises(
        InputError, match=r"template must hold \{prompt\} exactly once or be 'chat', got .*--data\.templ"
    ):
        make_dataset(RECORDS, tokenizer, template=template, max_prompt_tokens=50)


def test_template_with_lone_surrogate(tokenizer):
    with pytest.raises(InputError, match=r"template must be valid Unicode.*U\+DCFF"):
        make_dataset(RECORDS, tokenizer, template="\udcff{prompt}", max_prompt_tokens=50)


@pytest.mark.parametrize(("template", "prompt"), [("chat", "1+1="), (None, MESSAGES)])
def test_chat_needs_a_chat_template(tokenizer, template, prompt):
    with pytest.raises(InputError, match=r"t:1: tokenizer must have a chat template, got none\. Use an instruct"):
        make_dataset(
            [Record(prompt=prompt, answer=None, origin="t:1")], tokenizer, template=template, max_prompt_tokens=9
        )


def test_messages_do_not_fit_a_text_template(chat_tokenizer):
    with pytest.raises(InputError, match=r"t:1: template must be 'chat' for chat messages, got '#\{prompt\}'"):
        make_dataset(
            [Record(prompt=MESSAGES, answer=None, origin="t:1")],
            chat_tokenizer,
            template="#{prompt}",
            max_prompt_tokens=9,
        )


def test_messages_that_the_chat_template_refuses(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        InputError, match="t:1: the tokenizer's chat template refused the messages: roles must alternate"
    ):
        make_dataset(RECORDS, chat_tokenizer, template="chat", max_prompt_tokens=9)


def test_prompt_without_tokens(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ '' }}"
    with pytest.raises(InputError, match="data: t:1: prompt must have tokens, got none"):
        make_dataset(RECORDS, chat_tokenizer, template="chat", max_prompt_tokens=9)


def test_no_records_no_room_and_unknown_overlong(tokenizer):
    with pytest.raises(InputError, match="data: data set must hold at least one record, got none"):
        make_dataset([], tokenizer, template=None, max_prompt_tokens=9)
    with pytest.raises(InputError, match=r"max_prompt_tokens must be at least 1, got 0\. Set a smaller --rollout"):
        make_dataset(RECORDS, tokenizer, template=None, max_prompt_tokens=0)
    with pytest.raises(ValueError, match="overlong must be 'error' or 'drop', got 'cut'"):
        make_dataset(RECORDS, tokenizer, template=None, max_prompt_tokens=9, overlong="cut")


def fingerprint(tokenizer, prompts, answer=None, template=None):
    records = [Record(prompt=prompt, answer=answer, origin="t:1") for prompt in prompts]
    return make_dataset(records, tokenizer, template=template, max_prompt_tokens=50).fingerprint


def test_fingerprint_depends_on_tokens_and_order_alone(tokenizer):
    base = fingerprint(tokenizer, ["12", "345"])
    assert len(base) == 64 and fingerprint(tokenizer, ["12", "345"], answer="9") == base
    others = [["12", "346"], ["345", "12"], ["123", "45"], ["12"], ["12", "345", "12"]]
    changed = [fingerprint(tokenizer, prompts) for prompts in others]
    changed.append(fingerprint(tokenizer, ["12", "345"], template="{prompt};"))
    assert len({base, *changed}) == 7


sizes = st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n), st.integers(0, 2**40)))


@settings(deadline=None, max_examples=60)
@given(sizes)
def test_sampler_epochs_are_permutations_and_batches_hold_no_prompt_twice(size):
    num_prompts, batch_size, seed = size
    sampler = Sampler(num_prompts, batch_size, seed)
    batches = [sampler.next() for _ in range(4 * num_prompts)]
    assert all(len(batch) == len(set(batch)) == batch_size for batch in batches)
    stream = [i for batch in batches for i in batch]
    for start in range(0, len(stream) - num_prompts + 1, num_prompts):
        assert sorted(stream[start : start + num_prompts]) == list(range(num_prompts))


@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(0, 30), st.integers(0, 30))
def test_sampler_resumes_anywhere_with_the_same_continuation(size, drawn, drawn_by_other):
    sampler, other = Sampler(*size), Sampler(*size)
    for _ in range(drawn):
        sampler.next()
    for _ in range(drawn_by_other):
        other.next()
    other.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert other.state_dict() == sampler.state_dict()
    assert [other.next() for _ in range(20)] == [sampler.next() for _ in range(20)]


def test_sampler_orders_differ_by_epoch_and_by_seed():
    def epochs(seed):
        sampler = Sampler(50, 50, seed)
        return [tuple(sampler.next()) for _ in range(4)]

    orders = [order for seed in range(4) for order in epochs(seed)]
    assert len(set(orders)) == 16
    assert epochs(2) == epochs(2)
    assert tuple(range(50)) not in orders


def test_sampler_orders_are_uniform():
    counts = [0] * 4
    for seed in range(2000):
        counts[Sampler(4, 1, seed).next()[0]] += 1
    assert all(abs(count - 500) < 100 for count in counts)  # five standard deviations


@pytest.mark.parametrize(("num_prompts", "batch_size"), [(3, 4), (3, 0), (0, 1)])
def test_sampler_needs_a_batch_of_different_prompts(num_prompts, batch_size):
    match = rf"batch_size must be from 1 to the number of prompts \({num_prompts}\), got {batch_size}\. Set another"
    with pytest.raises(InputError, match=match):
        Sampler(num_prompts, batch_size, 0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_prompts": 11}, "num_prompts of the state must be 10, got 11. Resume with the data"),
        ({"batch_size": 2}, "batch_size of the state must be 3, got 2"),
        ({"seed": 6}, "seed of the state must be 5, got 6"),
        ({"seed": None}, "seed of the state must be 5, got None"),
        ({"num_batches": -1}, "num_batches of the state must be 0 or more, got -1"),
        ({"num_batches": None}, "num_batches of the state must be 0 or more, got None"),
    ],
)
def test_sampler_refuses_a_foreign_state_and_stays_as_it_is(change, match):
    sampler = Sampler(10, 3, 5)
    sampler.next()
    state = sampler.state_dict()
    with pytest.raises(ValueError, match=match):
        sampler.load_state_dict(state | change)
    assert sampler.state_dict() == state


USER, ANSWERED = {"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}


def chats(tokenizer, *prompts, **options):
    records = [Record(prompt=prompt, answer="7", origin=f"t:{i}") for i, prompt in enumerate(prompts, 1)]
    return make_dataset(records, tokenizer, template=None, max_prompt_tokens=50, **options)


@pytest.mark.parametrize("role", ["assistant", "Assistant", "gpt", "chatgpt", "model", "bot"])
def test_assistants_turns_at_the_end_are_left_off_and_counted(chat_tokenizer, role):
    last = {"role": role, "content": "2"}
    dataset = chats(chat_tokenizer, [USER, last], [USER], [USER, last, USER, last, last], [USER, last, USER])
    assert [p.text for p in dataset.prompts] == ["1+1=;#", "1+1=;#", "1+1=;2;1+1=;#", "1+1=;2;1+1=;#"]
    assert dataset.num_answered == 2 and {p.answer for p in dataset.prompts} == {"7"}


@pytest.mark.parametrize("turns", [[ANSWERED], [ANSWERED, ANSWERED], [{"role": "system", "content": "1"}, ANSWERED]])
def test_a_conversation_with_nothing_left_is_refused(chat_tokenizer, turns):
    with pytest.raises(
        InputError, match=r"t:2: conversation must have a user's turn before the assistant's at its end"
    ):
        chats(chat_tokenizer, [USER], turns)


def test_overlong_prompts_are_not_counted_as_cut(chat_tokenizer):
    dataset = chats(
        chat_tokenizer, [USER, ANSWERED], [{"role": "user", "content": "1" * 60}, ANSWERED], overlong="drop"
    )
    assert (len(dataset), dataset.num_overlong, dataset.num_answered) == (1, 1, 1)


THINKING = (
    "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %};{% endif %}"
    "{% if enable_thinking is defined and enable_thinking is false %}##{% endif %}"
    "{% if budget %}{{ budget + 1 }}{% endif %}{% if style is none %}-{% elif style %}{{ style }}{% endif %}"
)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([], "1+1=;-"),
        (["enable_thinking=false"], "1+1=;##-"),
        (["enable_thinking=False"], "1+1=;##-"),
        (["enable_thinking=true", "style=12"], "1+1=;12"),
        (["budget=41", "style=null"], "1+1=;42-"),
        (['style="3"', "budget=0"], "1+1=;3"),
        (["style=3=3"], "1+1=;3=3"),
    ],
)
def test_arguments_of_the_chat_template(chat_tokenizer, given, text):
    chat_tokenizer.chat_template = THINKING.replace("style is none", "style is not defined or style is none")
    dataset = chats(chat_tokenizer, [USER], template_args=given)
    assert dataset.prompts[0].text == text
    assert (dataset.fingerprint == chats(chat_tokenizer, [USER]).fingerprint) == (text == "1+1=;-")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["enable_thinkng=false"], r"got 'enable_thinkng'\. Did you mean enable_thinking\?"),
        (["zzz=1"], r"got 'zzz'\. It reads budget, enable_thinking, style\."),
        (["add_generation_prompt=false"], r"reads, got 'add_generation_prompt'"),
        (["tokenize=true"], r"got 'tokenize'"),
        (["messages=1"], r"got 'messages'"),
        (["enable_thinking"], r"must be KEY=VALUE, got 'enable_thinking'"),
        (["=1"], r"must be KEY=VALUE, got '=1'"),
        (["budget=1", "budget=2"], r"must be given once, got 'budget=2'"),
        (["style=\udc00"], r"must be valid Unicode"),
    ],
)
def test_arguments_that_no_template_reads_are_refused(chat_tokenizer, given, message):
    chat_tokenizer.chat_template = THINKING
    with pytest.raises(InputError, match=message):
        chats(chat_tokenizer, [USER], template_args=given)


@pytest.mark.parametrize("template", [None, "{prompt}"])
def test_arguments_need_a_chat_template_in_use(tokenizer, chat_tokenizer, template):
    for known in (tokenizer, chat_tokenizer):
        known.chat_template = THINKING
        with pytest.raises(
            InputError, match=r"t:1: --data\.template-args must come with a chat template, got a prompt"
        ):
            make_dataset(
                RECORDS, known, template=template, max_prompt_tokens=50, template_args=["enable_thinking=false"]
            )

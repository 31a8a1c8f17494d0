"""What is learned: decoded from the labels, for every kind of template, format and policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_api.failures import Reason
from finetune_api.spec import LossOn, Overlength
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.chat import ChatRenderer, chat_template, check_template, load_tokenizer
from finetune_trainer.prepare.encode import IGNORED, Dropped, Encoded, Encoder, fit
from finetune_trainer.prepare.examples import Completion, Conversation, Text, Tokenized
from finetune_trainer.prepare.problems import RowProblem
from finetune_trainer.prepare.turns import Message
from tests.support.learned import learned
from tests.support.tiny_model import CHATML, write_tokenizer

LLAMA3 = (
    "{{- bos_token }}{%- if strftime_now is defined %}{%- set date = strftime_now('%d %b %Y') %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}{%- set messages = messages[1:] %}"
    "{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date + '\n\n' + system + '<|eot_id|>' }}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen 3: only the last answer keeps its thoughts, and an empty thought is written where there is none.
THOUGHTS = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% set content = message['content'].split('</think>')[-1].lstrip('\n') %}"
    "{{ '<|im_start|>assistant\n' + ('<think>\n\n</think>\n\n' if loop.last else '') + content + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_ENDING = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
REMEMBERS_TWO = CHATML.replace("in messages", "in messages[-2:]")
FORGETS = "{{ messages[0]['content'] }}"
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML

TALK: list[Message] = [
    {"role": "user", "content": "What is one?"},
    {"role": "assistant", "content": "One is 1."},
    {"role": "user", "content": "And two?"},
    {"role": "assistant", "content": "Two is 2."},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    tokenizer = load_tokenizer(folder, False)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]}
    )
    return tokenizer


def encode(
    tokenizer: Any, template: str, messages: list[Message], loss_on: LossOn = LossOn.ASSISTANT, **kw: Any
) -> Encoded:
    return Encoder(tokenizer, ChatRenderer(tokenizer, template), loss_on).encode(Conversation(messages, **kw))


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (SMOLLM2, "<|im_end|>"),
        (LLAMA3, "<|eot_id|>"),
        (MARKED, "<|im_end|>"),
        (THOUGHTS, "<|im_end|>"),
    ],
    ids=["ChatML", "SmolLM2", "Llama 3", "marked", "thoughts"],
)
def test_all_answers_are_learned_with_their_ending_and_nothing_else(tokenizer: Any, template: str, end: str) -> None:
    last = "<think>\n\n</think>\n\nTwo is 2." if template == THOUGHTS else "Two is 2."
    encoded = encode(tokenizer, template, TALK)
    assert learned(tokenizer, encoded) == [f"One is 1.{end}", f"{last}{end}"]
    assert learned(tokenizer, encode(tokenizer, template, TALK, LossOn.COMPLETION)) == [f"{last}{end}"]
    everything = encode(tokenizer, template, TALK, LossOn.ALL)
    assert (everything.labels == everything.ids).all()


@pytest.mark.parametrize("template", [CHATML, SMOLLM2, LLAMA3, MARKED], ids=["ChatML", "SmolLM2", "Llama 3", "marked"])
def test_the_prompt_is_exactly_what_a_model_is_asked(tokenizer: Any, template: str) -> None:
    encoded = encode(tokenizer, template, TALK)
    frozen = ChatRenderer(tokenizer, template)
    asked = frozen.question(TALK[:-1])
    assert encoded.ids[: encoded.prompt_tokens].tolist() == tokenizer(asked, add_special_tokens=False)["input_ids"]


SAID = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(
    lambda text: bool(text.strip())
)


@pytest.mark.parametrize(
    ("template", "end"),
    [(CHATML, "<|im_end|>"), (SMOLLM2, "<|im_end|>"), (LLAMA3, "<|eot_id|>"), (MARKED, "<|im_end|>")],
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(said=st.lists(SAID, min_size=2, max_size=6).map(lambda texts: texts[: len(texts) // 2 * 2]))
def test_whatever_is_said_exactly_the_answers_are_learned(
    tokenizer: Any, template: str, end: str, said: list[str]
) -> None:
    talk = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    answers = [text.strip() if template == LLAMA3 else text for text in said[1::2]]
    assert learned(tokenizer, encode(tokenizer, template, talk)) == [answer + end for answer in answers]


# As Hermes and Qwen: tools first, calls as JSON in the answer.
CALLING = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}{{ '<tool_call>' + (call['function']['arguments'] | tojson) + '</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALLS: list[Message] = [
    {"role": "user", "content": "Add."},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "Two."},
]
TOOLS = [{"type": "function", "function": {"name": "add"}}]


def test_calls_are_learned_results_are_not_and_tools_stand_in_the_prompt(tokenizer: Any) -> None:
    encoded = encode(tokenizer, CALLING, CALLS, tools=TOOLS)
    call = '<tool_call>{"a": 1}</tool_call><|im_end|>'
    assert learned(tokenizer, encoded) == [call, "Two.<|im_end|>"]
    assert '"name": "add"' in tokenizer.decode(encoded.ids[: encoded.prompt_tokens])
    assert learned(tokenizer, encode(tokenizer, CALLING, CALLS, LossOn.COMPLETION, tools=TOOLS)) == ["Two.<|im_end|>"]


def test_a_call_that_a_template_rewrites_later_is_no_row_and_never_half_learned(tokenizer: Any) -> None:
    """Only its text would be found by looking for it."""
    later = CALLING.replace("message['content'] }}", "('' if loop.last else '(earlier) ') + message['content'] }}")
    talking = [CALLS[0], {**CALLS[1], "content": "Let me see."}, *CALLS[2:]]
    with pytest.raises(RowProblem, match="drops or rewrites this answer"):
        encode(tokenizer, later, talking, tools=TOOLS)


def test_tools_that_a_template_leaves_out_are_no_row(tokenizer: Any) -> None:
    with pytest.raises(RowProblem, match="the chat template has no place for them"):
        encode(tokenizer, CHATML, TALK, tools=TOOLS)


@pytest.mark.parametrize(
    ("labels", "prompt_tokens"),
    [([5, 6, 7, 8], 0), ([-100, -100, 7, 8], 2), ([-100, 6, -100, 8], 3), ([-100, 6, 7, -100], 1)],
)
def test_tokens_are_learned_by_their_labels(tokenizer: Any, labels: list[int], prompt_tokens: int) -> None:
    encoded = Encoder(tokenizer, None, LossOn.ASSISTANT).encode(Tokenized([5, 6, 7, 8], labels))
    assert encoded.ids.tolist() == [5, 6, 7, 8]
    assert encoded.labels.tolist() == labels
    assert encoded.prompt_tokens == prompt_tokens


def test_todays_date_never_gets_into_the_tokens(tokenizer: Any) -> None:
    assert "Today Date: 26 Jul 2024" in tokenizer.decode(encode(tokenizer, LLAMA3, TALK).ids)


def test_trimmed_answers_are_found(tokenizer: Any) -> None:
    talk = [TALK[0], {"role": "assistant", "content": "  One is 1.\n"}]
    assert learned(tokenizer, encode(tokenizer, LLAMA3, talk)) == ["One is 1.<|eot_id|>"]


def test_the_same_answer_twice_and_answers_inside_questions_are_told_apart(tokenizer: Any) -> None:
    talk = [{"role": r, "content": "yes"} for r in ("user", "assistant", "user", "assistant")]
    for template in (CHATML, THOUGHTS, MARKED):
        encoded = encode(tokenizer, template, talk)
        assert [t.rpartition("\n")[2] for t in learned(tokenizer, encoded)] == ["yes<|im_end|>"] * 2


def test_a_template_without_an_ending_gets_eos(tokenizer: Any) -> None:
    encoded = encode(tokenizer, NO_ENDING, TALK)
    assert learned(tokenizer, encoded)[-1].strip() == "Two is 2.\n<|im_end|>"
    assert encoded.ids[-1] == encoded.labels[-1] == tokenizer.eos_token_id


def test_only_the_completions_answers_are_learned_in_chat_style_completions(tokenizer: Any) -> None:
    encoded = encode(tokenizer, CHATML, TALK, learn_from=2)
    assert learned(tokenizer, encoded) == ["Two is 2.<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "text"), [(REMEMBERS_TWO, "leaves this system turn out"), (STRICT, "no system role")]
)
def test_a_template_that_hides_or_refuses_names_the_row_not_silently_learns_nothing(
    tokenizer: Any, template: str, text: str
) -> None:
    with pytest.raises(RowProblem, match=text):
        encode(tokenizer, template, [{"role": "system", "content": "s"}, *TALK])


@pytest.mark.parametrize(
    "template", [REMEMBERS_TWO, CHATML, NO_ENDING, LLAMA3], ids=["drops turns", "ChatML", "no ending", "Llama 3"]
)
def test_with_loss_on_all_answers_need_not_be_found(tokenizer: Any, template: str) -> None:
    encoded = encode(tokenizer, template, [*TALK, *TALK], LossOn.ALL)
    assert (encoded.labels == encoded.ids).all()
    text = tokenizer.decode(encoded.ids)
    assert text.startswith(ChatRenderer(tokenizer, template).plain([*TALK, *TALK]).rstrip())
    assert text.rstrip().endswith(("<|im_end|>", "<|eot_id|>"))
    assert text.count("Two is 2.") == (1 if template == REMEMBERS_TWO else 2)


def test_a_template_that_forgets_answers_is_found_before_any_row(tokenizer: Any) -> None:
    with pytest.raises(StageError) as info:
        check_template(ChatRenderer(tokenizer, FORGETS))
    assert info.value.reason is Reason.UNSUPPORTED_MODEL


@pytest.mark.parametrize("loss_on", list(LossOn))
@pytest.mark.parametrize(
    ("prompt", "completion"), [("Say: ", "hello"), ("Say:", " hello"), ("The q", "uick fox"), ("é", "é")]
)
def test_completions_are_learned_with_eos_and_prompts_are_not(
    tokenizer: Any, loss_on: LossOn, prompt: str, completion: str
) -> None:
    encoded = Encoder(tokenizer, None, loss_on).encode(Completion(prompt, completion))
    assert encoded.ids[: encoded.prompt_tokens].tolist() == tokenizer(prompt)["input_ids"]
    whole = [prompt + completion + "<|im_end|>"] if loss_on is LossOn.ALL else [completion + "<|im_end|>"]
    assert learned(tokenizer, encoded) == whole


def test_texts_are_learned_whole_with_one_eos(tokenizer: Any) -> None:
    for text in ("some text", "some text<|im_end|>"):
        encoded = Encoder(tokenizer, None, LossOn.ASSISTANT).encode(Text(text))
        assert learned(tokenizer, encoded) == ["some text<|im_end|>"]
        assert encoded.targets == len(encoded.ids) - 1
        assert encoded.prompt_tokens == 0


def sized(prompt: int, answer: int) -> Encoded:
    ids = np.arange(prompt + answer, dtype=np.int32)
    return Encoded(ids, np.where(ids < prompt, np.int32(IGNORED), ids), prompt, prompt + answer)


def test_overlength_rows_follow_the_policy_and_never_stay_without_targets() -> None:
    row = sized(10, 10)
    assert fit(row, 20, Overlength.FAIL) is row
    cut = fit(row, 15, Overlength.TRUNCATE)
    assert (len(cut.ids), cut.targets, cut.prompt_tokens, cut.length) == (15, 5, 10, 20)
    with pytest.raises(Dropped, match="the prompt alone has 10"):
        fit(row, 10, Overlength.TRUNCATE)
    with pytest.raises(Dropped, match="20 tokens, more than 15"):
        fit(row, 15, Overlength.DROP)
    with pytest.raises(RowProblem, match="expected at most 15"):
        fit(row, 15, Overlength.FAIL)
    with pytest.raises(RowProblem, match="nothing to learn"):
        fit(sized(0, 1), 15, Overlength.TRUNCATE)


def test_the_tokenizers_own_template_is_used(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, None)
    assert chat_template(load_tokenizer(tmp_path, False)) is None
    write_tokenizer(tmp_path)
    assert chat_template(load_tokenizer(tmp_path, False)) == CHATML


def test_a_folder_without_tokenizer_is_an_unsupported_model(tmp_path: Path) -> None:
    with pytest.raises(StageError) as info:
        load_tokenizer(tmp_path, False)
    assert info.value.reason is Reason.UNSUPPORTED_MODEL

"""Chat templates as they are published (tests/trainer/templates), with what each writes of an answer, written down by hand, and small
tokenizers that know their special tokens."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).parents[1] / "trainer" / "templates"
CORPUS = ["What is one? One is 1. And two? Two is 2. user assistant system tool model yes"] * 5
# As the templates write them; of words in capitals, those of Mistral.
SPECIAL = re.compile(
    r"<\|[a-zA-Z_]+\|>|<｜[^｜>]+｜>|<(?:start|end)_of_turn>"
    r"|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_RESULTS|SYSTEM_PROMPT|TOOL_CALLS|TOOL_CONTENT|CALL_ID|ARGS)\]"
)
QWEN_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
MISTRAL_CALL = '{"name": "add", "arguments": {"a": 1}, "id": "abcdefghi"}]</s>'


@dataclass(frozen=True)
class Published:
    """A template and what must be learned with it: ``{}`` stands for what the row says."""

    name: str
    eos: str
    last: str
    """Of the last answer."""
    earlier: str = ""
    """Of answers before it, where that differs."""
    call: str = ""
    """Of a turn that calls ``add`` with a: 1; empty: calls cannot be learned."""
    trims: bool = False
    """Blanks around an answer are left out."""
    system: bool = True
    """System turns are written where an answer follows."""
    bos: str = "<s>"

    def answer(self, said: str, *, last: bool) -> str:
        """What is learned of an answer."""
        return (self.last if last or not self.earlier else self.earlier).format(said.strip() if self.trims else said)

    @property
    def template(self) -> str:
        """The template's text."""
        return (FOLDER / f"{self.name}.jinja").read_text(encoding="utf-8")


PUBLISHED = [
    Published("cohere", "<|END_OF_TURN_TOKEN|>", "{}<|END_OF_TURN_TOKEN|>", trims=True),
    Published("deepseek-r1-distill", "<｜end▁of▁sentence｜>", "{}<｜end▁of▁sentence｜>"),
    Published("deepseek-v3", "<｜end▁of▁sentence｜>", "{}<｜end▁of▁sentence｜>"),
    Published("gemma-2", "<eos>", "{}<end_of_turn>", trims=True, system=False, bos="<bos>"),
    Published("gemma-3", "<eos>", "{}<end_of_turn>", trims=True, bos="<bos>"),
    Published(
        "gpt-oss",
        "<|return|>",
        "<|channel|>final<|message|>{}<|return|>",
        earlier="<|channel|>final<|message|>{}<|end|>",
        call=' to=functions.add<|channel|>commentary json<|message|>{"a": 1}<|call|>',
        bos="<|startoftext|>",
    ),
    Published("granite-3.3", "<|end_of_text|>", "{}<|end_of_text|>"),
    Published("lfm2", "<|im_end|>", "{}<|im_end|>"),
    Published(
        "llama-3.1", "<|eot_id|>", "{}<|eot_id|>", call='{"name": "add", "parameters": {"a": 1}}<|eot_id|>', trims=True
    ),
    Published(
        "llama-3.2", "<|eot_id|>", "{}<|eot_id|>", call='{"name": "add", "parameters": {"a": 1}}<|eot_id|>', trims=True
    ),
    Published("mistral-v0.2", "</s>", "{}</s>", system=False),
    Published("mistral-v1", "</s>", " {}</s>"),
    Published("mistral-v0.3", "</s>", " {}</s>", call=f"[TOOL_CALLS] [{MISTRAL_CALL}", trims=True, system=False),
    Published("mistral-nemo", "</s>", "{}</s>", call=f"[TOOL_CALLS][{MISTRAL_CALL}", system=False),
    Published("mistral-small-3.2", "</s>", "{}</s>", call='[TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{"a": 1}</s>'),
    # It closes a conversation with EOS, besides.
    Published("phi-3", "<|endoftext|>", "{}<|end|>\n<|endoftext|>", earlier="{}<|end|>"),
    Published("phi-3.5", "<|endoftext|>", "{}<|end|>\n<|endoftext|>", earlier="{}<|end|>"),
    Published("phi-4", "<|im_end|>", "{}<|im_end|>"),
    Published("qwen2.5", "<|im_end|>", "{}<|im_end|>", call=QWEN_CALL),
    # No thought is an empty thought, in the last answer.
    Published("qwen3", "<|im_end|>", "<think>\n\n</think>\n\n{}<|im_end|>", earlier="{}<|im_end|>", call=QWEN_CALL),
    Published(
        "qwen3-marked", "<|im_end|>", "<think>\n\n</think>\n\n{}<|im_end|>", call=f"<think>\n\n</think>\n\n{QWEN_CALL}"
    ),
    Published("qwen3-instruct-2507", "<|im_end|>", "{}<|im_end|>", call=QWEN_CALL),
    Published("smollm3", "<|im_end|>", "{}<|im_end|>"),
    Published("zephyr", "</s>", "{}</s>"),
]


def byte_level(published: Published) -> PreTrainedTokenizerFast:
    """As those of GPT-2, Llama 3 and Qwen: a blank and the word behind it are one token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    _train(made, published, pre_tokenizers.ByteLevel.alphabet())
    return _wrapped(made, published)


def sentence_piece(published: Published) -> PreTrainedTokenizerFast:
    """As those of Gemma and Mistral: blanks are ▁, and unknown characters bytes."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    _train(made, published, [])
    parts = json.loads(made.to_str())
    known = parts["model"]["vocab"]
    # Bytes are no special tokens, which a trainer would make of them.
    known |= {f"<0x{byte:02X}>": max(known.values()) + 1 + byte for byte in range(256)}
    return _wrapped(Tokenizer.from_str(json.dumps(parts)), published)


def _train(made: Tokenizer, published: Published, alphabet: list[str]) -> None:
    special = sorted({*SPECIAL.findall(published.template), published.eos, published.bos, "<unk>"})
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )


def _wrapped(made: Tokenizer, published: Published) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=published.bos,
        eos_token=published.eos,
        unk_token="<unk>",
        chat_template=published.template,
    )

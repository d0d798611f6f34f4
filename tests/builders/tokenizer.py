"""A byte tokenizer: no training, 256 bytes and a few special tokens."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def byte_tokenizer(chat: bool = True, merges: list[tuple[str, str]] | None = None) -> PreTrainedTokenizerFast:
    """Return a fast tokenizer over bytes: pad 256, end of turn 257, start of turn 258.

    Args:
        chat: Give it a chat template.
        merges: Pairs of symbols that become one token, for tests of tokens across a border.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate(alphabet)}
    for special in ("<|pad|>", "<|end|>", "<|start|>"):
        vocabulary[special] = len(vocabulary)
    for left, right in merges or []:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges or []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|start|>"],
        model_max_length=256,
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast

"""The character tokenizer shared by every model.

Qwen2's own tokenizer with a vocabulary of single characters and no merges, so `AutoTokenizer` loads
it like that of any other Qwen2 checkpoint. A character outside `tasks.ALPHABET` is dropped, as no
byte of it is in the vocabulary.
"""

from __future__ import annotations

from transformers import Qwen2Tokenizer

from resmerge_stream.experts.tasks import ALPHABET

PAD = "<pad>"
EOS = "<eos>"
UNKNOWN = "<unk>"

VOCABULARY = (PAD, EOS, UNKNOWN, *ALPHABET)

PAD_ID = VOCABULARY.index(PAD)
EOS_ID = VOCABULARY.index(EOS)


def build_tokenizer(*, model_max_length: int) -> Qwen2Tokenizer:
    """Build the tokenizer.

    Args:
        model_max_length: longest prompt and completion together, in tokens.
    """
    return Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate(VOCABULARY)},
        merges=[],
        pad_token=PAD,
        eos_token=EOS,
        # Never produced; without it the class would add its default as a 51st token.
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=model_max_length,
    )

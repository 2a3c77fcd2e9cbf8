"""Token ids of a prompt: what a model is given to answer."""

from typing import TYPE_CHECKING

import numpy as np

from mcore_core.data.rows import Conversation, RowDropped, RowError
from mcore_core.data.template import TOO_LONG, Template

if TYPE_CHECKING:
    from numpy.typing import NDArray


def encode_prompt(template: Template, conversation: Conversation) -> "NDArray[np.int32]":
    """Tokenize the messages and the start of the assistant's turn; or plain text as it is.

    Returns:
        ids [P], at most max_length: truncation_strategy left and right cut, delete drops.

    Raises:
        RowDropped: Too long.
        RowError: The template refuses these messages, or there is nothing.
        UsageError: The tokenizer has no template.
    """
    special = True
    if conversation.text is not None:
        text = conversation.text
    elif not template.config.use_chat_template:
        text = "".join(message["content"] for message in conversation.messages)
    else:
        text, special = template.render_prompt(conversation), False
    bos = template.tokenizer.bos_token
    special = special and not (bos and text.startswith(bos))
    ids = np.asarray(template.tokenizer(text, add_special_tokens=special)["input_ids"], np.int32)
    eos = template.tokenizer.eos_token_id
    if special and len(ids) > 1 and ids[-1] == eos:  # some tokenizers end every text
        ids = ids[:-1]
    if not len(ids):
        raise RowError("the prompt is empty")
    if template.max_length is not None and len(ids) > template.max_length:
        match template.config.truncation_strategy:
            case "left":
                ids = ids[-template.max_length :]
            case "right":
                ids = ids[: template.max_length]
            case _:
                raise RowDropped(TOO_LONG)
    return ids

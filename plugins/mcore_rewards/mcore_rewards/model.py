"""The scores of a sequence-classification model, in batches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mcore_core.errors import usage_error
from mcore_core.protocols import Rollout

BATCH_TOKENS = 16_384
"""Padded tokens in a forward pass."""


class RewardModel:
    """A Hugging Face sequence-classification checkpoint with one label."""

    def __init__(self, source: str, *, device: Any = "cpu", max_length: int | None = None) -> None:  # noqa: ANN401
        """Load the model in its own precision.

        Args:
            source: A folder or a hub id.
            device: Where it runs.
            max_length: Longer conversations lose their beginning. None: as the model says.

        Raises:
            UsageError: It cannot be read, or has another number of labels.
        """
        import torch  # noqa: PLC0415
        from transformers import (  # noqa: PLC0415
            AutoModelForSequenceClassification,
            AutoTokenizer,
        )

        path = Path(source).expanduser()
        name = str(path) if path.exists() else source
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.model = AutoModelForSequenceClassification.from_pretrained(name, dtype="auto")
        except (OSError, ValueError) as error:
            raise usage_error(
                "MC344",
                f"the reward model {source} cannot be read",
                str(error).splitlines()[0],
                "fix: --reward_model with the folder of a sequence-classification checkpoint",
            ) from error
        labels = self.model.config.num_labels
        if labels != 1:
            raise usage_error(
                "MC344",
                f"the reward model {source} has {labels} labels; a reward is one number",
                "fix: name a model that was trained with num_labels 1",
            )
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model.to(device).eval()
        self.device, self._torch = device, torch
        limit = getattr(self.model.config, "max_position_embeddings", None)
        self.max_length = max_length or limit

    def __call__(self, rollouts: Sequence[Rollout], /) -> list[float]:
        """Return the score of each conversation."""
        torch = self._torch
        ids = [self._ids(rollout) for rollout in rollouts]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        scores = [0.0] * len(ids)
        at = 0
        while at < len(order):
            size = 1
            while at + size < len(order):
                if len(ids[order[at + size]]) * (size + 1) > BATCH_TOKENS:
                    break
                size += 1
            chosen = order[at : at + size]
            batch = self.tokenizer.pad(
                {"input_ids": [ids[i] for i in chosen]}, return_tensors="pt", padding_side="right"
            ).to(self.device)
            with torch.no_grad():
                values = self.model(**batch).logits[:, 0].float().tolist()
            for i, value in zip(chosen, values, strict=True):
                scores[i] = value
            at += size
        return scores

    def _ids(self, rollout: Rollout) -> list[int]:
        tokenizer = self.tokenizer
        if tokenizer.chat_template is not None and rollout.messages:
            messages: Any = list(rollout.messages)
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            text = "".join(m["content"] for m in rollout.messages) or rollout.text
            ids = tokenizer(text)["input_ids"]
        return list(ids[-self.max_length :] if self.max_length else ids)

"""TRL's own loss code, called with log-probabilities instead of a model."""

import contextlib
from collections import defaultdict
from types import SimpleNamespace

import torch
from preference_tools import facts_of


class _Accelerator:
    device = torch.device("cpu")
    autocast = staticmethod(contextlib.nullcontext)

    @staticmethod
    def gather(values):
        return values

    gather_for_metrics = gather


def _trainer(cls, **attributes):
    trainer = cls.__new__(cls)
    common = {
        "accelerator": _Accelerator(),
        "model": SimpleNamespace(training=True),
        "aux_loss_enabled": False,
        "ld_alpha": None,
        "use_weighting": False,
        "precompute_ref_logps": True,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    for name, value in {**common, **attributes}.items():
        object.__setattr__(trainer, name, value)
    return trainer


def _outputs(logps):
    """What TRL's head gives: facts as the tests' own head makes them."""
    facts = facts_of(logps)
    return SimpleNamespace(
        log_probs=logps,
        entropy=facts["entropy_T"],
        mean_logits=facts["mean_logit_T"],
        is_top1=facts["top_T"] > 0,
    )


def dpo(logps, mask, ref, options):
    """Return the loss and the metrics of DPOTrainer.

    Args:
        logps: [2 P, L] log-probabilities, 0 where the mask is; all chosen, then all rejected.
        mask: [2 P, L], which of them are an answer's.
        ref: [2 P] summed, of the reference.
        options: A DPOConfig.
    """
    from trl.trainer.dpo_trainer import DPOTrainer

    f_divergence, coefficient = options.f_divergence_type, 1.0
    if f_divergence == "alpha_divergence":  # as the formulas have it: TRL's exponent is shifted
        f_divergence = "forward_kl"
    trainer = _trainer(
        DPOTrainer,
        beta=options.beta,
        loss_types=list(options.losses),
        loss_weights=list(options.weights),
        f_divergence_type=f_divergence,
        f_alpha_divergence_coef=coefficient,
        label_smoothing=options.label_smoothing,
        args=SimpleNamespace(discopop_tau=0.05),
    )
    completion = torch.cat((torch.zeros_like(mask[:, :1]), mask), 1).long()
    chosen, rejected = ref.chunk(2)
    inputs = {
        "input_ids": torch.ones_like(completion),
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    loss = trainer._compute_loss(lambda **_: _outputs(logps), inputs, return_outputs=False)
    return loss, {k: v[-1] for k, v in trainer._metrics["train"].items()}


def cpo(chosen, rejected, options, loss_type):
    """Return the losses and rewards of CPOTrainer: of CPO without its NLL, and of SimPO."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    trainer = _trainer(
        CPOTrainer,
        alpha=0.0,
        beta=options.beta,
        loss_type=loss_type,
        simpo_gamma=options.simpo_gamma,
        label_smoothing=options.label_smoothing,
    )
    return trainer.cpo_loss(chosen, rejected)


def orpo(chosen, rejected, options):
    """Return what ORPOTrainer takes off its NLL, [P], in float32; rewards, and means of odds."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    return _trainer(ORPOTrainer, beta=options.beta).odds_ratio_loss(chosen, rejected)


def kto(logps, mask, ref, good, divergence, options):
    """Return the loss and the metrics of KTOTrainer.

    Args:
        logps: [S, L], as in dpo.
        mask: [S, L].
        ref: [S].
        good: [S] labels.
        divergence: [S] policy minus reference of the mismatched answers.
        options: A KTOConfig.
    """
    from trl.trainer.kto_trainer import KTOTrainer

    trainer = _trainer(
        KTOTrainer,
        beta=options.beta,
        loss_type=options.loss_type,
        desirable_weight=options.desirable_weight,
        undesirable_weight=options.undesirable_weight,
        calculate_KL=options.loss_type == "kto",
        _compute_kl_logps=lambda model, batch: divergence,
    )
    completion = torch.cat((torch.zeros_like(mask[:, :1]), mask), 1).long()
    inputs = {
        "input_ids": torch.ones_like(completion),
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
        "label": good,
        "ref_logps": ref,
        "ref_KL_logps": torch.zeros_like(divergence),
    }
    loss = trainer._compute_loss(lambda **_: _outputs(logps), inputs, return_outputs=False)
    return loss, {k: v[-1] for k, v in trainer._metrics["train"].items()}


def rm(chosen, rejected, margins, coefficient):
    """Return the loss of RewardTrainer for [P] scores."""
    from trl.trainer.reward_trainer import RewardTrainer

    trainer = _trainer(RewardTrainer, args=SimpleNamespace(center_rewards_coefficient=coefficient))
    scores = torch.cat((chosen, rejected)).unsqueeze(-1)
    inputs = {"attention_mask": torch.ones(len(scores), 1)}
    if margins is not None:
        inputs["margin"] = margins

    def model(**_):
        return SimpleNamespace(logits=scores)

    loss = trainer.compute_loss(model, inputs)
    return loss, {k: v[-1] for k, v in trainer._metrics["train"].items()}

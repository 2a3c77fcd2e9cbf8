"""The losses over pairs of answers: pure functions of summed log-probabilities, one value a pair.

P pairs; z is the difference of the scores of a pair (policy minus reference, chosen minus
rejected), b is beta, e label smoothing, l(x) = log sigmoid(x).
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mcore_rlhf.dpo.config import DPOConfig
from mcore_rlhf.dpo.pairs import Pairs

type PairLoss = Callable[[Pairs, DPOConfig], Tensor]
"""P pairs and the options -> one loss a pair, [P]."""

EXO_SMOOTHING = 1e-3
"""Used by exo_pair where label_smoothing is 0, for which it is infinite."""
DISCOPOP_TAU = 0.05


def _z(pairs: Pairs, options: DPOConfig) -> Tensor:
    chosen_P, rejected_P = pairs.scores(options)
    return chosen_P - rejected_P


def _z_of_means(pairs: Pairs, options: DPOConfig) -> Tensor:
    chosen_P, rejected_P = pairs.scores(options)
    return chosen_P / pairs.chosen_tokens_P - rejected_P / pairs.rejected_tokens_P


def _smoothed(x_P: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * F.logsigmoid(x_P) - smoothing * F.logsigmoid(-x_P)


def sigmoid(pairs: Pairs, options: DPOConfig) -> Tensor:
    """-(1-e) l(bz) - e l(-bz): DPO (Rafailov et al. 2023), with e conservative DPO."""
    return _smoothed(options.beta * _z(pairs, options), options.label_smoothing)


def sigmoid_norm(pairs: Pairs, options: DPOConfig) -> Tensor:
    """Sigmoid with each answer's score divided by its tokens."""
    return _smoothed(options.beta * _z_of_means(pairs, options), options.label_smoothing)


def robust(pairs: Pairs, options: DPOConfig) -> Tensor:
    """[-(1-e) l(bz) + e l(-bz)] / (1-2e): unbiased under flipped labels (Chowdhury et al. 2024)."""
    x_P, e = options.beta * _z(pairs, options), options.label_smoothing
    return (-(1 - e) * F.logsigmoid(x_P) + e * F.logsigmoid(-x_P)) / (1 - 2 * e)


def hinge(pairs: Pairs, options: DPOConfig) -> Tensor:
    """max(0, 1 - bz): SLiC (Zhao et al. 2023)."""
    return torch.relu(1 - options.beta * _z(pairs, options))


def ipo(pairs: Pairs, options: DPOConfig) -> Tensor:
    """(z' - 1/(2b))^2, z' from scores per token: IPO (Azar et al. 2023)."""
    return (_z_of_means(pairs, options) - 1 / (2 * options.beta)) ** 2


def exo_pair(pairs: Pairs, options: DPOConfig) -> Tensor:
    """s(bz)[l(bz) - ln(1-e)] + s(-bz)[l(-bz) - ln e]: EXO (Ji et al. 2024), equation 16."""
    x_P = options.beta * _z(pairs, options)
    e = torch.tensor(options.label_smoothing or EXO_SMOOTHING, dtype=x_P.dtype, device=x_P.device)
    right_P = torch.sigmoid(x_P) * (F.logsigmoid(x_P) - torch.log1p(-e))
    return right_P + torch.sigmoid(-x_P) * (F.logsigmoid(-x_P) - torch.log(e))


def nca_pair(pairs: Pairs, options: DPOConfig) -> Tensor:
    """-l(b Dc) - l(-b Dc)/2 - l(-b Dr)/2: NCA (Chen et al. 2024)."""
    chosen_P = options.beta * pairs.chosen_ratio_P
    rejected_P = options.beta * pairs.rejected_ratio_P
    pushed_P = F.logsigmoid(-chosen_P) + F.logsigmoid(-rejected_P)
    return -F.logsigmoid(chosen_P) - 0.5 * pushed_P


def bco_pair(pairs: Pairs, options: DPOConfig) -> Tensor:
    """-l(b Dc - d) - l(d - b Dr), d the running mean of rewards: BCO (Jung et al. 2024)."""
    chosen_P = options.beta * pairs.chosen_ratio_P - pairs.delta
    rejected_P = options.beta * pairs.rejected_ratio_P - pairs.delta
    return -F.logsigmoid(chosen_P) - F.logsigmoid(-rejected_P)


def sppo_hard(pairs: Pairs, options: DPOConfig) -> Tensor:
    """(Dc - 1/(2b))^2 + (Dr + 1/(2b))^2: SPPO with hard labels (Wu et al. 2024)."""
    half = 0.5 / options.beta
    return (pairs.chosen_ratio_P - half) ** 2 + (pairs.rejected_ratio_P + half) ** 2


def aot(pairs: Pairs, options: DPOConfig) -> Tensor:
    """Sigmoid on sorted policy margins minus sorted reference margins: AOT (Melnyk et al. 2024)."""
    policy_P = torch.sort(pairs.chosen_P - pairs.rejected_P).values
    reference_P = torch.sort(pairs.ref_chosen_P - pairs.ref_rejected_P).values
    return _smoothed(options.beta * (policy_P - reference_P), options.label_smoothing)


def aot_unpaired(pairs: Pairs, options: DPOConfig) -> Tensor:
    """Sigmoid on sort(Dc) - sort(Dr): AOT for answers that need not be pairs."""
    chosen_P = torch.sort(pairs.chosen_ratio_P).values
    rejected_P = torch.sort(pairs.rejected_ratio_P).values
    return _smoothed(options.beta * (chosen_P - rejected_P), options.label_smoothing)


def apo_zero(pairs: Pairs, options: DPOConfig) -> Tensor:
    """1 - s(b Dc) + s(b Dr): APO (D'Oosterlinck et al. 2024), equation 7."""
    chosen_P = torch.sigmoid(options.beta * pairs.chosen_ratio_P)
    return 1 - chosen_P + torch.sigmoid(options.beta * pairs.rejected_ratio_P)


def apo_down(pairs: Pairs, options: DPOConfig) -> Tensor:
    """s(b Dc) + 1 - s(b(Dc - Dr)): APO, equation 8."""
    margin_P = pairs.chosen_ratio_P - pairs.rejected_ratio_P
    chosen_P = torch.sigmoid(options.beta * pairs.chosen_ratio_P)
    return chosen_P + 1 - torch.sigmoid(options.beta * margin_P)


def discopop(pairs: Pairs, options: DPOConfig) -> Tensor:
    """(1-m)(-l(bz)) + m exp(-bz), m = s(bz / 0.05): DiscoPOP (Lu et al. 2024), equation 5."""
    x_P = options.beta * _z(pairs, options)
    modulation_P = x_P / DISCOPOP_TAU
    # m exp(-x) as one exponential: 0, not 0 times infinity, where x is far below 0
    exponential_P = torch.exp(F.logsigmoid(modulation_P) - x_P)
    return torch.sigmoid(-modulation_P) * -F.logsigmoid(x_P) + exponential_P


def sft(pairs: Pairs, options: DPOConfig) -> Tensor:
    """Negative log-likelihood of the chosen answers, a mean over the global batch's tokens."""
    return -pairs.chosen_P * pairs.nll_scale_P


def cpo(pairs: Pairs, options: DPOConfig) -> Tensor:
    """Sigmoid without a reference, plus cpo_alpha times the NLL: CPO (Xu et al. 2024)."""
    x_P = options.beta * (pairs.chosen_P - pairs.rejected_P)
    return _smoothed(x_P, options.label_smoothing) + options.cpo_alpha * sft(pairs, options)


def simpo(pairs: Pairs, options: DPOConfig) -> Tensor:
    """Sigmoid of b times the difference of token means, less gamma: SimPO (Meng et al. 2024)."""
    chosen_P = pairs.chosen_P / pairs.chosen_tokens_P
    rejected_P = pairs.rejected_P / pairs.rejected_tokens_P
    x_P = options.beta * (chosen_P - rejected_P) - options.simpo_gamma
    return _smoothed(x_P, options.label_smoothing)


def orpo(pairs: Pairs, options: DPOConfig) -> Tensor:
    """NLL minus b l(log odds ratio), from means per token: ORPO (Hong et al. 2024), equation 6."""
    return sft(pairs, options) - options.beta * F.logsigmoid(log_odds(pairs))


def log_odds(pairs: Pairs) -> Tensor:
    """Return the log odds ratio of chosen and rejected answers, from means per token, [P]."""
    chosen_P = pairs.chosen_P / pairs.chosen_tokens_P
    rejected_P = pairs.rejected_P / pairs.rejected_tokens_P
    return (chosen_P - rejected_P) - (_log1mexp(chosen_P) - _log1mexp(rejected_P))


def _log1mexp(x_P: Tensor) -> Tensor:
    """log(1 - exp(x)), x < 0, stable at both ends (Maechler 2012); 0 is taken for just below."""
    x_P = x_P.clamp(max=-torch.finfo(x_P.dtype).tiny)
    near_P = x_P > -0.6931471805599453
    # each branch gets an argument that it can differentiate, so that no NaN meets a zero
    small_P = torch.log(-torch.expm1(torch.where(near_P, x_P, -1.0)))
    large_P = torch.log1p(-torch.exp(torch.where(near_P, -1.0, x_P)))
    return torch.where(near_P, small_P, large_P)


LOSSES: Mapping[str, PairLoss] = {
    f.__name__: f
    for f in (
        sigmoid,
        robust,
        hinge,
        ipo,
        exo_pair,
        nca_pair,
        bco_pair,
        sppo_hard,
        aot,
        aot_unpaired,
        apo_zero,
        apo_down,
        discopop,
        sft,
        sigmoid_norm,
        cpo,
        simpo,
        orpo,
    )
}
"""Every loss by its name."""

"""Random pairs and answers, and a recipe's loss on them without a model or ranks."""

from types import SimpleNamespace

from mcore_core import compat

compat.apply()  # before anything imports megatron

import numpy as np  # noqa: E402
import torch  # noqa: E402
from data_tools import make_template  # noqa: E402

from mcore_core.config.kernel import kernel_config  # noqa: E402
from mcore_core.parallel.reduce import RowReduce  # noqa: E402
from mcore_core.protocols import HeadOut  # noqa: E402
from mcore_core.train.place import select  # noqa: E402


def config(*groups, **options):
    return kernel_config(*groups, **options)


def template(**options):
    return make_template(**{"loss_scale": "last_round", **options})


def side(rng, longest=9):
    """Ids and weights of one conversation: a prompt, an answer, perhaps an untrained end."""
    prompt, answer, end = rng.integers(1, 4), rng.integers(1, longest), rng.integers(0, 2)
    weights = np.repeat(np.float32([0, 1, 0]), [prompt, answer, end])
    return rng.integers(0, 50, len(weights)).astype(np.int32), weights


def random_pair(rng, longest=9, scale=4.0):
    (a, wa), (b, wb) = side(rng, longest), side(rng, longest)
    sums = [-scale * rng.random() * w.sum() for w in (wa, wb)]
    return {
        "input_ids": np.concatenate((a, b)),
        "weights": np.concatenate((wa, wb)),
        "chosen_length": len(a),
        "length": len(a) + len(b),
        "ref_logps": tuple(sums),
    }


def random_answer(rng, good, longest=9, scale=4.0):
    ids, weights = side(rng, longest)
    return {
        "input_ids": ids,
        "weights": weights,
        "prompt_length": int(np.flatnonzero(weights)[0]),
        "label": int(good),
        "length": len(ids),
        "ref_logps": -scale * rng.random() * weights.sum(),
    }


def logps_of(rng, units, scale=4.0):
    """Log-probabilities of the targets of each unit's tokens, float64, also of untrained ones."""
    return [-scale * rng.random(unit["length"]) for unit in units]


def reduce_of(batch):
    lengths = torch.tensor(batch.lengths)
    index = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return RowReduce(index, torch.ones(len(lengths), dtype=torch.bool))


def facts_of(logps):
    """What the head gives beside log-probabilities: any numbers that differ between tokens."""
    entropy = logps.detach() ** 2
    return {"entropy_T": entropy, "mean_logit_T": entropy - 3, "top_T": (entropy > 4).float()}


def loss_of(recipe, units, logps):
    """Return what the recipe says of one micro-batch, and the log-probabilities as a leaf."""
    batch = recipe.collate(units)
    logps_T = torch.tensor(np.concatenate(logps), requires_grad=True)
    kept = batch.weights_T.nonzero().squeeze(-1)
    out = HeadOut(logps_T=logps_T[kept], **facts_of(logps_T[kept]))
    return recipe.loss(out, select(batch, kept), reduce_of(batch).take(kept)), logps_T


def padded(units, logps, halves=("chosen", "rejected")):
    """Return logps [S, L] with zeros where nothing trains, and the mask: first sides first."""
    rows, masks = [], []
    for number in range(len(halves)):
        for unit, values in zip(units, logps, strict=True):
            at = unit.get("chosen_length", unit["length"])
            part = slice(0, at) if number == 0 else slice(at, None)
            weights = unit["weights"][part]
            rows.append(torch.tensor(values[part][:-1]))
            masks.append(torch.tensor(weights[1:] > 0))
    pad = torch.nn.utils.rnn.pad_sequence
    values, mask = pad(rows, batch_first=True), pad(masks, batch_first=True)
    return torch.where(mask, values, 0.0), mask


class View(SimpleNamespace):
    """A StepRun of one rank whose models are functions of a unit."""

    step, training, dp = 1, True, (0, 1)

    def gather(self, value):
        return [value]

    def score(self, model, units):
        return [getattr(self, model)(unit) for unit in units]

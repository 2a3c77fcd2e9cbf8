"""A reward of the tokens themselves."""


def parity(rollouts):
    return [(sum(r.token_ids) % 7) / 3 for r in rollouts]

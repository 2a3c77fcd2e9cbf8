"""A reference that follows the policy: what its weights become, and which cannot follow."""

import pytest
import torch

from mcore_core import compat

compat.apply()  # before anything imports megatron

from mcore_core.errors import UsageError  # noqa: E402
from mcore_core.train.frozen import check_movable  # noqa: E402
from mcore_core.train.services import blend  # noqa: E402


def test_weights_go_the_share_of_the_way():
    torch.manual_seed(0)
    ref, policy = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    wanted = {
        n: 0.7 * w + 0.3 * dict(policy.named_parameters())[n] for n, w in ref.named_parameters()
    }
    kept = {n: w.clone() for n, w in policy.named_parameters()}
    blend([ref], [policy], 0.3)
    for name, weight in ref.named_parameters():
        torch.testing.assert_close(weight, wanted[name])
        assert torch.equal(dict(policy.named_parameters())[name], kept[name])


def test_the_bias_of_routers_goes_along_and_counts_do_not():
    ref, policy = (torch.nn.Sequential(torch.nn.Linear(2, 2)) for _ in range(2))
    for model, value in ((ref, 0.0), (policy, 1.0)):
        model[0].register_buffer("expert_bias", torch.full((2,), value))
        model[0].register_buffer("local_tokens_per_expert", torch.full((2,), value))
    blend([ref], [policy], 0.25)
    assert ref[0].expert_bias.tolist() == [0.25, 0.25]
    assert ref[0].local_tokens_per_expert.tolist() == [0.0, 0.0]
    assert policy[0].expert_bias.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("other", "found"),
    [
        (torch.nn.Linear(4, 2), "weight: (2, 4), in the policy (2, 3)"),
        (torch.nn.Linear(3, 2, bias=False), "bias: none, in the policy (2,)"),
    ],
)
def test_other_tensors_cannot_follow(other, found):
    policy = torch.nn.Linear(3, 2)
    check_movable({"ref": [torch.nn.Linear(3, 2)]}, [policy])
    with pytest.raises(UsageError) as error:
        check_movable({"ref": [other]}, [policy])
    (problem,) = error.value.problems
    assert problem.code == "MC358"
    assert found in problem.notes

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

"""The arithmetic of layouts."""

import pytest

from mcore_core.parallel.topology import Layout


@pytest.mark.parametrize(
    ("layout", "dp", "stages", "sequence", "row", "text"),
    [
        (Layout(), 1, 1, 1, 1, "one rank"),
        (Layout(world=4), 4, 1, 1, 1, "dp4"),
        (Layout(world=8, tp=2, pp=2), 2, 2, 1, 1, "tp2+pp2+dp2"),
        (Layout(world=2, tp=2, sp=True), 1, 1, 1, 2, "tp2+sp"),
        (Layout(world=2, pp=2, vpp=3), 1, 6, 1, 1, "pp2+vpp3"),
        (Layout(world=2, cp=2), 1, 1, 4, 1, "cp2"),
        (Layout(world=4, cp=2, tp=2), 1, 1, 4, 1, "tp2+cp2"),
        (Layout(world=4, cp=2, tp=2, sp=True), 1, 1, 8, 1, "tp2+cp2+sp"),
        (Layout(world=4, ep=2), 4, 1, 1, 1, "ep2+dp4"),
    ],
)
def test_layout(layout, dp, stages, sequence, row, text):
    got = (layout.dp, layout.stages, layout.seq_multiple, layout.row_multiple, str(layout))
    assert got == (dp, stages, sequence, row, text)


def test_a_row_under_sequence_parallelism_divides_by_tp():
    """With context parallelism every sequence does already, on every rank."""
    for cp in (2, 4):
        for tp in (2, 3, 4):
            layout = Layout(world=cp * tp, cp=cp, tp=tp, sp=True)
            assert layout.seq_multiple // cp % tp == 0
            assert layout.seq_multiple % (2 * cp) == 0

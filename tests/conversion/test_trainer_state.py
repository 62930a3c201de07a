"""What is kept of the original's optimizer: numbers under our names, or nothing and a note."""

import pytest
import torch

from effnet_hf.conversion.trainer_state import trainer_state_of, write_trainer_state


ENDLESS: list = []
ENDLESS += [ENDLESS, ENDLESS]
ONE = {"square_avg": torch.ones(2, dtype=torch.float64), "step": torch.tensor([3])}
GROUP = {"params": [0], "lr": 0.1, "betas": (0.9, 0.99)}


def optimizer_of(optimizer):
    """What is kept of an optimizer of the one parameter `a.weight`, and what is said."""
    return trainer_state_of({"epoch": 3, "optimizer": optimizer}, ["a.weight"], {"a.weight": "w"}, {"w": (2,)})


def test_an_optimizers_numbers_become_float32_and_what_is_no_setting_is_left_out(tmp_path):
    strange = {"nested": ENDLESS, "huge": 10**400, "infinite": float("inf"), ("a", 1): 2, "tensor": torch.ones(3)}
    state, notes = optimizer_of({"param_groups": [{**GROUP, **strange}], "state": {0: ONE}})
    assert state.param_groups == [{"lr": 0.1, "betas": (0.9, 0.99), "params": ["w"]}] and not notes
    kept = state.optimizer_state["w"]
    assert kept["square_avg"].dtype == torch.float32 and (kept["step"].shape, kept["step"].item()) == ((), 3)
    write_trainer_state(state, tmp_path)


@pytest.mark.parametrize(
    "optimizer, words",
    [
        (3, "not subscriptable"),
        ({"state": {}}, "param_groups"),
        ({"param_groups": torch.ones(3), "state": {}}, "fit"),
        ({"param_groups": [torch.ones(3)], "state": {}}, "fit"),
        ({"param_groups": [GROUP], "state": torch.ones(3)}, "items"),
        ({"param_groups": [GROUP], "state": {0: {**ONE, 1: torch.ones(2)}}}, "calls something 1"),
        ({"param_groups": [GROUP], "state": {0: {**ONE, "a/b": torch.ones(2)}}}, "calls something 'a/b'"),
        ({"param_groups": [GROUP], "state": {0: {**ONE, "\ud800": torch.ones(2)}}}, r"calls something '\ud800'"),
        ({"param_groups": [GROUP], "state": {0: {**ONE, "square_avg": -torch.ones(2)}}}, "holds negative numbers"),
        ({"param_groups": [GROUP], "state": {0: {**ONE, "square_avg": 3}}}, "square_avg of w is 3"),
        ({"param_groups": [GROUP], "state": {0: {**ONE, "step": -1}}}, "step of w is -1"),
        ({"param_groups": [GROUP], "state": {0: {"exp_avg": ONE["square_avg"] * 1e300}}}, "holds NaN or infinity"),
    ],
)
def test_an_optimizer_that_is_none_is_left_out_and_said(optimizer, words):
    state, (note,) = optimizer_of(optimizer)
    assert (state.epoch, state.param_groups, state.optimizer_state) == (3, [], {})
    assert note.startswith("The optimizer state does not fit") and words in note and note.isprintable(), note
    assert len(note) < 300

"""`explain`: every operation by name."""

from command_line import call


def test_explain_names_what_serves_each_operation():
    outcome = call("explain")
    assert outcome.code == 0
    assert "transition_log_prob" in outcome.out
    assert "reference" in outcome.out

"""`adascope-fast config`: what can be configured, in words and as a page."""

from command_line import call

from adascope_fast.config import reference


def test_a_name_shows_that_part_alone():
    finished = call("config", "late_start")
    assert finished.code == 0
    assert finished.out == reference.text(reference.find("late_start")) + "\n"
    assert '[selector] name = "late_start"' in finished.out


def test_without_a_name_it_shows_everything():
    finished = call("config", "--markdown")
    assert finished.code == 0
    assert finished.out == reference.markdown(reference.entries()) + "\n"


def test_an_unknown_name_is_one_line_and_exit_code_2():
    finished = call("config", "windw")
    assert finished.code == 2
    assert finished.err == ("error: config shows a section or a choice of one, got 'windw'; did you mean window?\n")

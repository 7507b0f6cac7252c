"""The section on processes of a report: numbers by hand, nothing for one process, and damage that does no harm."""

import json
from pathlib import Path

import pytest
from run_folders import make_run, page_of, words_of

from adascope_fast.reporting import processes

RANKS = [
    {"idle_share": 0.1, "bytes_sent": 2**20, "forwards_sampled": 100, "rows_trained": 40, "peak_memory_mb": 900},
    {"idle_share": 0.3, "bytes_sent": 2**21, "forwards_sampled": 60, "rows_trained": 41, "peak_memory_mb": 800},
]
SWAPPED = [RANKS[0] | {"idle_share": 0.5}, RANKS[1] | {"mfu": 0.25}]


def test_a_row_for_each_process_by_hand():
    # Idle of rank 0: (0.1 + 0.5) / 2, above the least (0.1 and 0.3): (0 + 0.2) / 2.
    first, second = processes.table([{"ranks": RANKS}, {"ranks": SWAPPED}])
    assert first == ("0", "200", "80", "30.0%", "10.0%", "1.0 MiB an iteration", "900 MB", "-")
    assert second == ("1", "120", "82", "30.0%", "10.0%", "2.0 MiB an iteration", "800 MB", "-")
    assert processes.table([{"ranks": SWAPPED}])[1][-1] == "25.0%"


def test_one_process_has_no_section():
    assert processes.table([{"ranks": RANKS[:1]}, {}]) == []
    assert processes.imbalance([{}]) == ""


def test_a_run_that_went_on_with_more_processes_tells_of_each():
    rows = processes.table([{"ranks": RANKS}, {"ranks": [*RANKS, RANKS[0]]}])
    assert [row[1] for row in rows] == ["200", "120", "100"]


def test_the_imbalance_in_words():
    assert "20% more than the mean at worst, 15% on average" in processes.imbalance(
        [{"imbalance": 0.1}, {"imbalance": 0.2}, {"imbalance": None}]
    )


@pytest.mark.parametrize("ranks", [None, "nothing", [1, 2], [{}, {}], [{"idle_share": "x"}, {"bytes_sent": None}]])
def test_damaged_records_do_no_harm(ranks: object):
    assert all(set(row[1:]) == {"-"} for row in processes.table([{"ranks": ranks}]))


def test_the_page_has_the_section_where_there_were_several(tmp_path: Path):
    folder = make_run(tmp_path / "run")
    assert "Processes" not in words_of(page_of(folder))
    lines = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    told = [line | {"ranks": RANKS, "imbalance": 0.5} for line in lines]
    (folder / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    words = words_of(page_of(folder))
    assert "Processes process sampled, images x steps trained, rows idle waiting sent peak memory MFU 0 3,000" in words
    assert "50% more than the mean at worst" in words

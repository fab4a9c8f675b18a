"""The page of figures: where what it says leads to."""

from world.bench import report


def test_what_is_missed_points_to_the_page_s_last_section_which_says_why():
    heading = report.REMARKS.read_text().partition("\n")[0]
    assert heading == f"## {report.REMARKS_TITLE}"
    assert report.REMARKS_ANCHOR == f"#{report.anchor(report.REMARKS_TITLE)}"
    missed = report.bars([("what", "≥ 1", "0.9", False)])
    assert report.MISSED in missed and report.REMARKS_ANCHOR in report.MISSED


def test_the_summary_counts_a_missed_bar_as_missed():
    bars = report.bars([("this", "≥ 1", "0.9", False), ("that", "≥ 1", "1.1", True)])
    summary = report.summarise({"Some section": bars, "Another": "no bars"})
    assert "| [Some section](#some-section) | 1 of 2 |" in summary
    assert "| Some section | this | ≥ 1 | 0.9 |" in summary
    assert report.REMARKS_ANCHOR in summary
    assert "that" not in summary

"""Every module of timm by its smallest model: what changes with a release of timm shows here."""

import pytest

from scripts.survey_encoders import Row, survey, survey_all


def test_a_row_of_the_survey():
    row = survey("vision_transformer", "test_vit")
    assert row == Row(
        *("vision_transformer", "test_vit", "160", "100x64", "yes"),
        *("96: 36x64", "yes", "149: refused, fits 144, 160"),
    )


def test_a_fault_in_a_model_is_told_as_one(monkeypatch):
    def fail(_):
        raise OSError("no such thing")

    monkeypatch.setattr("scripts.survey_encoders.check_size", fail)
    assert survey("vision_transformer", "test_vit").own == "CRASH OSError: no such thing"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_modules_of_timm_work_at_their_own_size_and_are_refused_or_right_elsewhere():
    rows = survey_all()
    told = [" ".join(vars(row).values()) for row in rows]
    assert not [line for line in told if "CRASH" in line or "NO" in line]
    assert not [row.module for row in rows if not row.works]
    counts = {
        "modules": len(rows),
        "layer -1 is forward_features": sum(row.final == "yes" for row in rows),
        "refused at another size": sum("refused" in row.other for row in rows),
        "refused at an odd size": sum("refused" in row.odd for row in rows),
    }
    assert counts == {
        "modules": 98,
        "layer -1 is forward_features": 84,
        "refused at another size": 13,
        "refused at an odd size": 54,
    }

"""What the commands that lead engines share."""

from __future__ import annotations

import json

import pytest

from checkpoint_engine import ParameterServer, Report, UpdateFailed
from checkpoint_engine.cli.fleet import leading


@pytest.mark.parametrize("as_json", [True, False])
def test_the_report_of_an_update_that_failed_is_printed_where_json_is_asked_for(
    lone_server: ParameterServer, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    failed = UpdateFailed("no", Report.not_taking_part("step-1"))
    with pytest.raises(UpdateFailed, match="no"), leading(lone_server, as_json=as_json):
        raise failed
    said = capsys.readouterr().out
    assert (json.loads(said)["version"] == "step-1") if as_json else (said == "")

import json

from fgd.doctor.findings import FAULT, OK, WARNING, Finding, Report

FINDINGS = [
    Finding("weights", OK, "144 tensors"),
    Finding("quality", FAULT, "AP50 3.0,\nfloor 20", "another teacher"),
    Finding("losses", FAULT, "all 0", "set the weights"),
]


def test_the_report_names_its_faults_in_one_line_and_in_json(tmp_path):
    report = Report(FINDINGS, {"teacher_ap50": 3.0}, ["a table"])
    assert report.complaint() == (
        "quality: AP50 3.0, floor 20. another teacher | losses: all 0. set the weights"
    )
    report.write(str(tmp_path / "doctor.json"))
    content = json.loads((tmp_path / "doctor.json").read_text())
    assert content["teacher_ap50"] == 3.0 and len(content["findings"]) == 3
    assert content["findings"][0] == {
        "name": "weights",
        "verdict": "ok",
        "found": "144 tensors",
        "advice": "",
    }
    text = report.text()
    assert text.endswith("\n\na table") and text.index("weights") < text.index("quality")


def test_accepted_faults_are_warnings_and_others_are_not():
    report = Report(FINDINGS).accepting(["quality", "weights"])
    assert [x.verdict for x in report.findings] == [OK, WARNING, FAULT]
    assert report.findings[1].advice == "accepted by DOCTOR.ACCEPT; another teacher"
    assert Report(FINDINGS[:1]).complaint() == ""

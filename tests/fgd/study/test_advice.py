from pathlib import Path

from fgd.study.advice import ways_out

FOLDER = Path("out/FGD_0")
ANEW = " (in a study: delete out/FGD_0 and call the study again to train the run anew)"


def test_options_that_a_study_has_not_are_told_in_its_own_words():
    lost = "nothing can be continued from. Put a whole checkpoint there, or start anew with"
    for message, text in (
        ("--resume: not this run. Start anew, or add --allow-config-change", ANEW),
        (f"--resume: {lost} --overwrite", ANEW),
        (
            "stopped by SIGTERM; go on with: train_net.py --resume --config-file x.yaml",
            " (in a study: call the study again: it goes on with the run)",
        ),
        (
            "look at what --doctor finds",
            " (in a study: out/FGD_0/doctor.json has what the doctor found)",
        ),
        ("no such cow; --threads 2, --resumed", ""),
    ):
        assert ways_out(message, FOLDER) == text

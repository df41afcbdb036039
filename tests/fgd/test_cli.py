import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile

import pytest
import torch
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model

from fgd import cli, files, job
from fgd.config import get_fgd_cfg, load_config
from fgd.errors import UserError
from tests.fgd.engine.killing import metrics

from .training import assert_equal, distilled, training_cfg


@pytest.fixture
def config_file(tmp_path):
    """A run of two steps on a JSON dataset, as a user's yaml."""
    cfg = training_cfg(tmp_path, opts=("SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (1,)))
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    return path


def run(capfd, *argv):
    """Exit code and stderr of the command in this process."""
    capfd.readouterr()
    code = cli.main([str(x) for x in argv])
    return code, capfd.readouterr().err


def error_line(text):
    """The one line of an error, sure that there is no traceback."""
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, text
    return lines[0]


def test_train_resume_evaluate(tmp_path, config_file, capfd):
    out = tmp_path / "out"
    assert cli.main(["--config-file", str(config_file)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["iteration"] == 2 and results["bbox"].keys() >= {"AP", "AP50"}
    assert (out / "model_final.pth").exists() and (out / "config.yaml").exists()
    log = (out / "log.txt").read_text()
    for line in ("Distillation is OFF: plain RetinaNet", "Starting training from iteration 0"):
        assert log.count(line) == 1
    assert 'MODEL.WEIGHTS is "": the student starts as built' in log

    lines = metrics(out)
    assert sum("bbox/AP" in line for line in lines) == 1
    assert cli.main(["--config-file", str(config_file), "--resume"]) == 0
    assert "Training already complete (iteration 2 of 2)" in (out / "log.txt").read_text()
    assert metrics(out) == lines
    (out / "results.json").unlink()  # as if stopped during the last evaluation
    assert cli.main(["--config-file", str(config_file), "--resume"]) == 0
    assert json.loads((out / "results.json").read_text()) == results
    assert metrics(out) == lines

    (out / "results.json").unlink()
    weights = ["MODEL.WEIGHTS", str(out / "model_final.pth")]
    assert cli.main(["--config-file", str(out / "config.yaml"), "--eval-only", *weights]) == 0
    assert json.loads((out / "results.json").read_text()) == results
    assert cli.main(["--config-file", str(out / "config.yaml"), "--eval-only", "--resume"]) == 0

    code, err = run(capfd, "--config-file", out / "config.yaml", "--eval-only")
    assert code == 2 and "name the checkpoint to evaluate" in error_line(err)


def test_distilled_run_needs_its_teacher_only_for_training(tmp_path, config_file, capfd):
    cfg = distilled(load_config(str(config_file)), tmp_path)
    config_file.write_text(cfg.dump())
    code, err = run(capfd, "--config-file", config_file, "SOLVER.STEPS", "()")
    assert code == 0, err
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "Distillation is ON: FGD on p3, p4, p5, p6, p7" in log and "teacher.pth" in log
    state = torch.load(tmp_path / "teacher.pth", weights_only=True)
    state["model"].popitem()
    torch.save(state, tmp_path / "teacher.pth")
    code, err = run(capfd, "--config-file", config_file, "OUTPUT_DIR", tmp_path / "other")
    assert code == 2 and "1 not in the file" in error_line(err)
    (tmp_path / "teacher.pth").unlink()
    final = tmp_path / "out" / "model_final.pth"
    code, err = run(capfd, "--config-file", config_file, "--eval-only", "MODEL.WEIGHTS", final)
    assert code == 0, err


MISTAKES = {
    "key": (["MODEL.FOO", "1"], "MODEL.FOO"),
    "device": (["MODEL.DEVICE", "tpu9"], "'tpu9' is not a device"),
    "amp": (["SOLVER.AMP.ENABLED", "True"], "mixed precision needs CUDA"),
    "optimizer": (["SOLVER.OPTIMIZER", "Adam"], "neither 'SGD' nor 'AdamW'"),
    "classes": (["MODEL.RETINANET.NUM_CLASSES", "2"], "NUM_CLASSES"),
    "data": (["DATASETS.JSON.TRAIN", "/nowhere.json"], "/nowhere.json"),
    "weights": (["MODEL.WEIGHTS", "/nowhere.pth"], "/nowhere.pth: cannot read weights"),
    "output": (["OUTPUT_DIR", "{file}/out"], "cannot write there"),
    "remote": (["OUTPUT_DIR", "s3://bucket"], "is not a local folder"),
    "machines": (["--num-machines", "2"], "--dist-url tcp://"),
    "distiller": (["MODEL.META_ARCHITECTURE", "Distiller"], "MODEL.DISTILLER.TEACHER"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line_and_exit_code_2(case, config_file, tmp_path, capfd):
    arguments, message = MISTAKES[case]
    arguments = [x.replace("{file}", str(config_file)) for x in arguments]
    code, err = run(capfd, "--config-file", config_file, *arguments)
    assert code == 2 and message in error_line(err)
    assert not list(tmp_path.glob("out/*.pth"))


def test_a_line_is_written_as_a_whole(config_file, monkeypatch):
    """Processes of two machines write to one stderr, whose lines must not run together."""
    written = []
    monkeypatch.setattr(sys.stderr, "write", written.append)
    assert cli.main(["--config-file", str(config_file), "MODEL.FOO", "1"]) == 2
    (line,) = [x for x in written if x.startswith("error: ")]
    assert line.endswith("\n") and "MODEL.FOO" in line


def test_cuda_on_a_machine_without_it(config_file, capfd, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, err = run(capfd, "--config-file", config_file, "MODEL.DEVICE", "cuda")
    assert code == 2 and "add MODEL.DEVICE cpu" in error_line(err)


def test_debug_adds_the_traceback(config_file, capfd):
    code, err = run(capfd, "--config-file", config_file, "--debug", "MODEL.FOO", "1")
    assert code == 2 and "Traceback" in err and err.startswith("error: ")


def test_unexpected_errors_are_exit_code_1_with_traceback(config_file, capfd, monkeypatch):
    monkeypatch.setattr(job, "FGDTrainer", lambda *args: 1 / 0)
    code, err = run(capfd, "--config-file", config_file)
    assert code == 1 and "error: division by zero" in err and "ZeroDivisionError" in err


def test_incomplete_weights_cannot_be_evaluated(config_file, tmp_path, capfd):
    state = build_model(load_config(str(config_file))).state_dict()
    state.popitem()
    torch.save({"model": state}, tmp_path / "m.pth")
    arguments = ["--eval-only", "MODEL.WEIGHTS", str(tmp_path / "m.pth")]
    code, err = run(capfd, "--config-file", config_file, *arguments)
    assert code == 2 and "model weights" in err and "1 not in the file" in error_line(err)


def test_two_processes_that_diverge_are_one_line_and_exit_code_3(config_file):
    """The installed command itself, as a user types it."""
    script = os.path.join(os.path.dirname(sys.executable), "train_net.py")
    command = [sys.executable, script, "--config-file", config_file, "--num-gpus", "2"]
    command += ["SOLVER.BASE_LR", "1e30", "SOLVER.WARMUP_ITERS", "0", "SOLVER.MAX_ITER", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stderr
    line = error_line(done.stderr)
    assert re.search(r"iteration \d+: a loss became infinite or NaN on rank 0, 1 \(loss_cls", line)


def test_parser_has_detectron2s_options_and_real_examples():
    parser = cli.build_parser()
    theirs = {x for a in default_argument_parser()._actions for x in a.option_strings}
    ours = {x for a in parser._actions for x in a.option_strings}
    added = {
        "--debug",
        "--timeout",
        "--allow-config-change",
        "--overwrite",
        "--doctor",
        "--balance",
        "--starts-as",
        "--trust-config",
    }
    assert ours - theirs == added and theirs <= ours
    text = parser.format_help()
    for name in re.findall(r"--config-file (configs/\S+)", text):
        assert name.startswith("configs/fgd_")
    for name in ("--resume", "--eval-only", "MODEL.DEVICE cpu", "Exit codes"):
        assert name in text


def test_results_are_valid_json_whatever_the_metrics(tmp_path):
    results = {"bbox": {"AP": float("nan"), "AP50": 12.5}}
    cfg = get_fgd_cfg()
    cfg.OUTPUT_DIR, cfg.DATASETS.TEST = str(tmp_path), ()
    job.write_results(cfg, results, None)
    content = json.loads((tmp_path / "results.json").read_text())
    assert content == {"iteration": None, "evaluated": {}, "bbox": {"AP": None, "AP50": 12.5}}


def test_an_undefined_ap_is_said(tmp_path, caplog):
    cfg = get_fgd_cfg()
    cfg.OUTPUT_DIR, cfg.DATASETS.TEST = str(tmp_path), ()
    job.write_results(cfg, {"a": {"bbox": {"AP": float("nan")}}, "b": {"bbox": {"AP": 0.0}}}, 1)
    (record,) = caplog.records
    told = "a bbox has no AP, which is null in results.json: nothing was detected"
    assert record.getMessage() == told and record.levelname == "WARNING"


def test_results_of_another_checkpoint_are_made_again(tmp_path, caplog):
    cfg = get_fgd_cfg()
    cfg.OUTPUT_DIR, cfg.DATASETS.TEST = str(tmp_path), ()
    assert not job.has_results(cfg)
    weights = tmp_path / "model_final.pth"
    weights.write_bytes(b"one")
    job.write_results(cfg, {"bbox": {"AP": 12.5}}, 3, str(weights))
    assert job.has_results(cfg)
    weights.write_bytes(b"another")
    assert not job.has_results(cfg)
    path = tmp_path / "results.json"
    told = f"{path} is of another checkpoint than {weights}; it is evaluated again"
    assert caplog.messages == [told]
    path.write_text('{"iteration": 3, "bbox": {"AP": 12.5}}')  # of an earlier version
    assert job.has_results(cfg)


def test_output_dir_is_made_and_proved_writable(tmp_path):
    files.check_output_dir(str(tmp_path / "a" / "b"))
    assert os.listdir(tmp_path / "a" / "b") == []
    with pytest.raises(UserError, match="not a local folder"):
        files.check_output_dir("")


def test_a_refused_run_changes_nothing_and_says_what_to_do(tmp_path, config_file, capfd):
    command = ["--config-file", config_file]
    assert run(capfd, *command)[0] == 0
    out = tmp_path / "out"
    before = {x.name: x.read_bytes() for x in out.iterdir() if x.suffix in (".pth", ".yaml")}
    code, err = run(capfd, *command, "SOLVER.BASE_LR", "0.5")
    assert code == 2 and "holds another run (last_checkpoint, model_final.pth)" in error_line(err)
    longer = ["SOLVER.MAX_ITER", "3", "SOLVER.BASE_LR", "0.005"]
    code, err = run(capfd, *command, "--resume", *longer)
    assert code == 2 and "SOLVER.BASE_LR: 0.01 -> 0.005" in error_line(err)
    for name, content in before.items():
        assert (out / name).read_bytes() == content
    code, err = run(capfd, *command, "--resume", "--allow-config-change", *longer)
    assert code == 0, err
    assert "BASE_LR: 0.005" in (out / "config.yaml").read_text()
    assert json.loads((out / "results.json").read_text())["iteration"] == 3
    code, err = run(capfd, *command, "--overwrite")
    assert code == 0, err
    assert torch.load(out / "model_final.pth", weights_only=True)["iteration"] == 1
    assert json.loads((out / "results.json").read_text())["iteration"] == 2


def test_a_lowered_length_finds_the_run_complete(tmp_path, config_file, capfd):
    """With its last checkpoint as the final one, also after a kill just before that."""
    out, final = tmp_path / "out", tmp_path / "out" / "model_final.pth"
    command = ["--config-file", config_file, "--resume", "SOLVER.STEPS", "()"]
    command += ["SOLVER.CHECKPOINT_PERIOD", "1"]
    assert run(capfd, *command)[0] == 0
    whole = torch.load(final, weights_only=True)
    for pointer, steps, done in (("1", 2, 2), ("0", 1, 1), ("1", 1, 2)):
        for name in ("model_final.pth", "results.json"):
            (out / name).unlink()
        (out / "last_checkpoint").write_text(f"model_000000{pointer}.pth")
        code, err = run(capfd, *command, "SOLVER.MAX_ITER", steps)
        assert code == 0, err
        assert f"already complete (iteration {done} of {steps})" in (out / "log.txt").read_text()
        assert json.loads((out / "results.json").read_text())["iteration"] == done
        assert torch.load(final, weights_only=True)["iteration"] == done - 1
        if steps == 2:
            assert_equal(whole, torch.load(final, weights_only=True))


def test_a_second_job_in_the_folder_is_refused(tmp_path, config_file, capfd):
    (tmp_path / "out").mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX)"
    command = [sys.executable, "-c", f"{hold}; print(1, flush=True); sys.stdin.read()"]
    command.append(str(tmp_path / "out" / ".fgd_lock"))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        code, err = run(capfd, "--config-file", config_file)
        assert code == 2 and "is in use by another training run" in error_line(err)
        assert os.listdir(tmp_path / "out") == [".fgd_lock"]
        other.stdin.close()


def _check_as_nobody(path, answer):
    if os.getuid() == 0:  # for whom no folder is read-only
        os.setuid(65534)
    try:
        files.check_output_dir(path)
    except UserError as error:
        answer.put(str(error))
    else:
        answer.put("")


@pytest.mark.parametrize("mode, message", [(0o555, "Permission denied"), (0o777, "")])
def test_a_read_only_folder_is_refused(mode, message):
    folder = tempfile.mkdtemp()  # pytest's own are closed to nobody
    os.chmod(folder, mode)
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    try:
        process = context.Process(target=_check_as_nobody, args=(folder, answer))
        process.start()
        text = answer.get()
        process.join()
        assert text == (f"OUTPUT_DIR {folder}: cannot write there ({message})" if message else "")
        assert os.listdir(folder) == []
    finally:
        os.rmdir(folder)
    with pytest.raises(UserError, match="cannot write there"):
        files.check_output_dir("/proc/no/such/place")

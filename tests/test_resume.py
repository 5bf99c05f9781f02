"""A run that is stopped with Ctrl-C goes on with the chapter that was interrupted."""
import json
import signal
import subprocess
import sys
import time

RSGROUND = [sys.executable, "-c", "import sys; from rsground_nb.run import main; sys.exit(main())"]


def test_interrupted_and_resumed(tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen([*RSGROUND, "run", "--out", str(out)], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if "02_scenes …" in line: break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    said = process.stdout.read()
    assert process.wait(60) == 130 and "rsground run --resume --out" in said
    assert list(json.loads((out / "run.json").read_text())["chapters"]) == ["00_tour", "01_boxes"]
    first = (out / "notebooks" / "01_boxes.ipynb").stat().st_mtime_ns
    process = subprocess.Popen([*RSGROUND, "run", "--resume", "--out", str(out)], stdout=subprocess.PIPE,
                               text=True)
    for line in process.stdout:
        if "02_scenes:" in line: break
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert list(json.loads((out / "run.json").read_text())["chapters"]) == ["00_tour", "01_boxes",
                                                                            "02_scenes"]
    assert (out / "notebooks" / "01_boxes.ipynb").stat().st_mtime_ns == first

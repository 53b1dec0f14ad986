"""docs/notebook.ipynb, run from its first cell to its last; and what a kernel must survive.

`python -m tests.docs.test_notebook` runs it and stores it with its output.
"""

import os
import re
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"
LARGEST_BYTES = 200_000


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)  # of a run in this process
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def executed(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """The notebook with the output of this machine."""
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return notebook


def printed(cell: NotebookNode) -> str:
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)


def machine_paths(text: str) -> list[str]:
    return re.findall(r"/(?:tmp|home|root|work|usr|Users|mnt)/[^\s\"']*", text)


@pytest.mark.slow
def test_every_cell_runs(tmp_path):
    notebook = executed(nbformat.read(NOTEBOOK, as_version=4), tmp_path)
    shown = {cell.source.split("\n")[0]: printed(cell) for cell in notebook.cells if cell.cell_type == "code"}
    (training,) = [text for source, text in shown.items() if source.startswith("recipe = load_recipe")]
    assert re.search(r"^train ━+ 80/80", training, re.MULTILINE)
    assert "step 80: dev mIoU" in training
    (scores,) = [text for source, text in shown.items() if source.startswith("(scores,)")]
    assert float(re.search(r"mIoU ([\d.]+) on 6 images", scores)[1]) > 0.5  # a ground alone has 0.3
    pictures = [o for cell in notebook.cells for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})]
    assert len(pictures) == 2
    assert (tmp_path / "runs" / "shapes" / "report.html").is_file()


def test_it_is_stored_with_output_and_without_traces_of_a_machine():
    stored = nbformat.read(NOTEBOOK, as_version=4)
    assert NOTEBOOK.stat().st_size < LARGEST_BYTES
    assert machine_paths(NOTEBOOK.read_text(encoding="utf-8")) == []
    outputs = [output for cell in stored.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.get("name") == "stderr" or output.output_type == "error" for output in outputs)


TRAINED_TWICE = """
import os, signal
from maskmatch_scale.recipe import load_recipe
from maskmatch_scale.train import train
from maskmatch_scale.training.callbacks import Callback

numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
handlers, descriptor = [signal.getsignal(number) for number in numbers], signal.set_wakeup_fd(-1)
signal.set_wakeup_fd(descriptor)
class Interrupted(Callback):
    times = 1
    def before_step(self, step):
        if step == 1:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)  # what "interrupt the kernel" sends
class Twice(Interrupted):
    times = 2
"""


def test_a_kernel_survives_runs_and_their_interruption(make_recipe, tmp_path):
    recipe = make_recipe(engine={"precision": "fp32", "library": "accelerate", "zero_stage": 0}, run={"steps": 4})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    load = 'load_recipe("recipe.yaml", ["run.dir={}"])'.format
    guarded = "try:\n    train({})\nexcept BaseException as error:\n    print(repr(error))".format
    cells = [
        TRAINED_TWICE,
        f"train({load('a')})\nRANKS = [name for name in os.environ if name in ('RANK', 'MASTER_PORT', 'WORLD_SIZE')]",
        guarded(f"{load('b')}, callbacks=[Interrupted]"),
        guarded(f"{load('b')}, 'auto', callbacks=[Twice]"),
        guarded(f"{load('c')}, callbacks=[Twice]"),
        f"print(train({load('b')}, 'auto'))",
        "after = signal.set_wakeup_fd(-1)\n"
        "print(RANKS, [signal.getsignal(number) for number in numbers] == handlers, after == descriptor)",
    ]
    notebook = executed(new_notebook(cells=[new_code_cell(cell) for cell in cells]), tmp_path)
    _, first, stopped, resumed, twice, last, kept = map(printed, notebook.cells)
    assert re.search(r"^train ━+ 4/4", first, re.MULTILINE)
    assert "step 4/4" not in first  # no lines beside the bar
    assert "\x1b" not in first
    assert re.search(r"got SIGINT; stopped after step \d, checkpoint", stopped)
    assert "KeyboardInterrupt" not in resumed  # that step was taken before, so nothing was interrupted
    assert twice.rstrip().endswith("KeyboardInterrupt()")
    assert last.rstrip().endswith("b")
    assert kept.strip() == "[] True True"


def store() -> None:
    """Run the notebook, and store it without the messages of libraries."""
    os.environ["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        notebook = executed(nbformat.read(NOTEBOOK, as_version=4), Path(folder))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)
            kept = [output for output in cell.outputs if output.get("name") != "stderr"]
            cell.outputs = [output for output in kept if not machine_paths(str(output))]
    notebook.metadata.pop("widgets", None)
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    store()

"""Run the notebooks from top to bottom and keep what they print and draw.

    python notebooks/run.py

It takes about a minute and a half on one core. What goes to stderr is not kept: bars and warnings are of one machine.
"""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = sorted(Path(__file__).parent.glob("*.ipynb"))


def main() -> None:
    """Run and save each notebook."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        with TemporaryDirectory() as work:
            resources = {"metadata": {"path": work}}
            NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
        for cell in notebook.cells:
            cell.metadata.clear()  # when it ran
            if cell.cell_type == "code":
                cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
        notebook.metadata["language_info"] = {"name": "python"}
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()

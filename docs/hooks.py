"""What the site shows of the repository beside `docs/`: the examples, and the results of the benchmarks."""

from __future__ import annotations

import pathlib
import re
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = "benchmarks/results/*.json*", "benchmarks/results/*/*.png", "benchmarks/results/*/report.md"
SHOWN = *RESULTS, "examples/*.ipynb", "examples/kubernetes/*.yaml"
# In the repository a link leaves `docs/` by one `../` more than in the site, which holds these folders itself.
OUTSIDE = re.compile(r"(\]\((?:\.\./)*)\.\./((?:examples|benchmarks)/)")
EXAMPLE = re.compile(r"(\]\([^)]*examples/[\w/]+)\.py\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the results of the benchmarks and the notebooks, and a page for each other example."""
    root = pathlib.Path(config.config_file_path).parent
    for pattern in SHOWN:
        for path in sorted(root.glob(pattern)):
            files.append(File(str(path.relative_to(root)), str(root), config.site_dir, config.use_directory_urls))
    for path in sorted((root / "examples").glob("**/*.py")):
        name = path.relative_to(root)
        page = f"# {name}\n\n```python\n{path.read_text()}```\n"
        files.append(File.generated(config, str(name.with_suffix(".md")), content=page))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links into the repository into links within the site."""
    return EXAMPLE.sub(r"\1.md)", OUTSIDE.sub(r"\1\2", markdown))

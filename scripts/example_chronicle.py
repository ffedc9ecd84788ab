"""Draw the example logbook: OPT-175B's record of incidents, replayed through the real supervisor.

    python scripts/example_chronicle.py incidents-opt175b.csv --seed 7

The script replays the record, draws the logbook, marks every page as simulated, and writes Markdown and HTML into
chronicles/examples/opt-175b. It prints what tests/chronicles/logbook/test_budgets.py holds to its budgets.
With `--kept FOLDER` it draws a run folder that `opt-ops replay --keep` has written.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "chronicles" / "examples" / "opt-175b"
LARGEST = 3 * 10**6  # bytes of the page
LINEAGE = "12"

_SAYS = (
    "Simulated. OPT-175B's published record of incidents is replayed in virtual time; a seed decides what the record "
    "leaves open. The cluster, its failures and the loss curve are simulated. The supervisor and this logbook are real."
)
# It stays in sight where there is room for it; a link must not lead below it. A fixed box is printed on every sheet.
_BANNER = f"""<style>
.simulated {{ padding: .4rem 1rem; background: #8a5a00; color: #fff; font: 13px/1.35 sans-serif }}
@media screen and (min-width: 700px) {{
  :root {{ --banner: 4.2rem }}
  .simulated {{ position: sticky; top: 0; z-index: 9; min-height: var(--banner); display: flex; align-items: center }}
}}
@media screen and (min-width: 1000px) {{ :root {{ --banner: 3.1rem }} }}
@media print {{ .simulated {{ position: fixed; bottom: 0; font-size: 8px }} }}
</style>
<div class="simulated" role="note">{_SAYS}</div>
"""


def opt_ops(folder: Path, *arguments: str) -> None:
    """Run a command of opt-ops in a folder."""
    subprocess.run([sys.executable, "-m", "opt_ops", *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def marked(path: Path) -> str:
    """A page of the logbook, marked as simulated."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return f"> **{_SAYS}**\n\n{text}"
    begun, count = re.subn(r"(<body[^>]*>)", lambda match: match[1] + "\n" + _BANNER, text, count=1)
    if count != 1:
        sys.exit(f"{path} has no body to mark")
    return begun


def measured(markdown: str) -> dict[str, float]:
    """What a reader's patience depends on: words, and how many headings are alike without digits and names of nodes."""
    heads = re.findall(r"^#{3,} .*$", markdown, re.MULTILINE)
    bare = [" ".join(re.sub(r"\bn\d+\b|\d+", "", head).split()) for head in heads]
    story = re.search(r"^## Story\n(.*?)^## ", markdown, re.MULTILINE | re.DOTALL)
    return {
        "words": len(markdown.split()),
        "words of the story": len(story[1].split()) if story else 0,
        "headings": len(heads),
        "share of different headings": len(set(bare)) / len(bare) if bare else 1.0,
        "longest run of headings that are alike": max((len(list(same)) for _, same in groupby(bare)), default=0),
    }


def main() -> None:
    """Replay the record, draw the logbook, mark its pages and copy them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path, help="incidents-opt175b.csv")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--kept", type=Path, help="draw this run folder; do not replay")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        site = Path(temporary)
        runs = site / "runs"
        if given.kept is not None:
            runs.mkdir()
            (runs / LINEAGE).symlink_to(given.kept.resolve())
        else:
            record, kept = str(given.record.resolve()), str(runs / LINEAGE)
            opt_ops(site, "replay", record, "--scenario", "opt-175b", "--seeds", str(given.seed), "--keep", kept)
        (site / "opt-ops.toml").write_text('runs = "runs"\n')
        opt_ops(site, "logbook", "render", LINEAGE)
        pages = {
            page.name: marked(page)
            for page in sorted((runs / LINEAGE / "chronicle").iterdir())
            if page.suffix in (".md", ".html")
        }
    size = len(pages["logbook.html"].encode())
    if size > LARGEST:
        sys.exit(f"the page has {size / 1e6:.2f} MB; {LARGEST / 1e6:.0f} MB are allowed")
    TARGET.mkdir(parents=True, exist_ok=True)
    for name, text in pages.items():
        (TARGET / name).write_text(text, encoding="utf-8")
    print(f"{TARGET.relative_to(ROOT)}: {', '.join(pages)}; the page has {size / 1e6:.2f} MB")
    for what, number in measured(pages["logbook.md"]).items():
        print(f"{what}: {number:,.2f}".rstrip("0").rstrip("."))


if __name__ == "__main__":
    main()

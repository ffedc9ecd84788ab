"""The command ``python -m trainer.checkpoint``: verify checkpoints, and fetch them from a second place."""

import argparse
import sys
import tempfile
from pathlib import Path

from opt_ops.contract.exit_codes import ExitCode
from opt_ops.contract.manifest import CheckpointError
from trainer.checkpoint import mirror
from trainer.checkpoint.content import examine

_EXAMPLES = """\
examples:
  python -m trainer.checkpoint verify runs/12/12.01/checkpoints/step-00012000
  python -m trainer.checkpoint verify s3://bucket/12/12.01/step-00012000
  python -m trainer.checkpoint fetch s3://bucket/12/12.01/step-00012000 runs/12/12.01/checkpoints

exit codes:
  0 all are good; 65 a checkpoint is missing, torn, damaged or stale, or its content is not a state of training
"""


def main() -> int:
    """Run the command, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.checkpoint",
        description="Verify checkpoints, and fetch them from a second place.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="check every byte and every number of checkpoints")
    verify.add_argument("paths", metavar="PATH", nargs="+", help="a step-… or snapshot-… folder, or a URL of one")
    fetch = commands.add_parser("fetch", help="download a checkpoint and verify it")
    fetch.add_argument("url", metavar="URL", help="URL of the step-… folder")
    fetch.add_argument(
        "folder", metavar="DIR", type=Path, help="folder to download into; the checkpoint keeps its name"
    )
    arguments = parser.parse_args()
    if arguments.command == "fetch":
        return _report(arguments.url, arguments.folder)
    return max(_report(path) for path in arguments.paths)


def _report(path: str, folder: Path | None = None) -> int:
    try:
        with tempfile.TemporaryDirectory() as temporary:
            remote = folder is not None or "://" in path
            local = mirror.fetch(path, folder or Path(temporary)) if remote else Path(path)
            found = examine(local)
    except (CheckpointError, OSError) as error:
        print(f"{path}: refused: {error}", file=sys.stderr)
        return ExitCode.CHECKPOINT_REFUSED
    size = sum(file["size"] for file in found.manifest.files.values())
    what = f"{path}: step {found.manifest.step}, {len(found.manifest.files)} files, {size / 1e6:,.1f} MB"
    if found.tensors is None:
        print(f"{what}: every byte is as it was saved; its tensors were not read: another trainer wrote them")
        return ExitCode.DONE
    since = "no earlier save to compare with" if found.before is None else f"compared with step {found.before}"
    same = f": {len(found.unchanged)} tensors are the same there" if found.unchanged else ""
    print(f"{what}, {found.tensors} tensors: whole and finite; {since}{same}")
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())

"""Stands in for a trainer that knows memberships and warm starts. It trains nothing, and says in files what it is told.

Each process appends JSON lines to `<folder>/said/<pid>`: who it is, and each membership that it reads.
"""

import json
import os
import sys
import time
from pathlib import Path

from opt_ops.contract import warm_start
from opt_ops.contract.membership import MembersFile, is_standby, lost_file, tell_ready


def main() -> None:
    """Wait for memberships until this process has no place any more."""
    prepared_by = None
    if warm_start.asked():
        if "cannot-be-warm" in sys.argv:
            sys.exit(3)
        prepared_by = os.getpid()
        warm_start.serve(outdated=(Path(sys.argv[1]) / "changed").exists)
    folder = Path(sys.argv[1])
    said = folder / "said" / str(os.getpid())
    said.parent.mkdir(exist_ok=True)

    def say(**what: object) -> None:
        with said.open("a") as file:
            file.write(json.dumps(what) + "\n")

    names = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "OPT_OPS_MEMBERS",
        "OPT_OPS_STANDBY",
        "OPT_OPS_WARM",
        "MARK",
    )
    say(
        options=sys.argv[1:],
        prepared_by=prepared_by,
        environment={name: os.environ.get(name) for name in names},
        session=os.getsid(0),
        parent=os.getppid(),
        directory=str(Path.cwd()),
    )
    print("begins", os.environ.get("RANK"), flush=True)
    members, generation = MembersFile.of(os.environ), 1
    assert members.path is not None
    if is_standby(os.environ) and not (folder / "slow").exists():
        tell_ready(members.path, os.getpid())
    while True:
        if (newer := members.newer(generation)) is not None:
            generation = newer.generation
            say(generation=generation, rank=newer.rank, nodes=newer.nodes, new=newer.new, port=newer.port)
            if newer.rank is None:
                os._exit(83)
        if (folder / f"lose-{os.environ.get('RANK')}").exists() and generation == 1:
            lost_file(members.path).touch()
        time.sleep(0.02)


if __name__ == "__main__":
    main()

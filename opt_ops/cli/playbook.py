"""`opt-ops playbook …`: list, show, check and try playbooks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from opt_ops.cli.shared.options import FormatOption, HeaderOption, IdArgument, QuietOption, lineage_folder, settings
from opt_ops.cli.shared.output import Column, Format, say, show
from opt_ops.core.state.fold import replay
from opt_ops.core.text import printable
from opt_ops.errors import NotFound, OptOpsError
from opt_ops.runfolder import lineages

app = typer.Typer(no_args_is_help=True, help="List, show, check and try playbooks.")

FolderOption = Annotated[Path | None, typer.Option("--from", help="Folder of playbook pages. [default: the site's]")]


def _folder(given: Path | None) -> Path:
    from opt_ops import playbook_loader

    return given or settings.config.playbooks or playbook_loader.folder()


def _complete_page(incomplete: str) -> list[str]:
    from opt_ops import playbook_loader

    try:
        _, pages = playbook_loader.load(_folder(None))
    except OptOpsError:
        return []
    return [page.playbook.name for page in pages if page.playbook.name.startswith(incomplete)]


@app.command("list")
def list_(folder: FolderOption = None, output: FormatOption = Format.TABLE, header: HeaderOption = True) -> None:
    """List the playbooks: triggers, ladders, retry budgets.

    Example: opt-ops playbook list -o wide
    """
    from opt_ops import playbook_loader

    _, pages = playbook_loader.load(_folder(folder))
    rows = [
        {
            "name": page.playbook.name,
            "version": page.playbook.version,
            "title": page.playbook.title,
            "triggers": list(page.playbook.triggers),
            "ladder": [str(rung.action) for rung in page.playbook.ladder],
            "budget": f"{page.playbook.budget.actions} in {page.playbook.budget.hours:g} h",
            "path": str(page.path),
        }
        for page in pages
    ]
    columns = [
        Column("NAME", "name"),
        Column("V", "version", right=True),
        Column("TRIGGERS", "triggers"),
        Column("LADDER", "ladder"),
        Column("BUDGET", "budget"),
        Column("TITLE", "title", wide=True),
        Column("PATH", "path", wide=True),
    ]
    show("opt-ops/playbook-list/1", rows, columns, output, header=header)


@app.command("show")
def show_(
    name: Annotated[
        str,
        typer.Argument(help="Name of a playbook, or a failure class that triggers it.", autocompletion=_complete_page),
    ],
    folder: FolderOption = None,
) -> None:
    """Print the page of a playbook.

    Example: opt-ops playbook show loss_spike
    """
    from opt_ops import playbook_loader

    _, pages = playbook_loader.load(_folder(folder))
    page = next((p for p in pages if name == p.playbook.name or name in p.playbook.triggers), None)
    if page is None:
        raise NotFound(f"no playbook has the name or the trigger {name}", "opt-ops playbook list")
    for line in page.path.read_text(encoding="utf-8").splitlines():
        print(printable(line))


@app.command()
def check(folder: FolderOption = None, quiet: QuietOption = False) -> None:
    """Check all playbook pages, as the daemon does. An error names file and line.

    Example: opt-ops playbook check --from playbooks/
    """
    from opt_ops import playbook_loader

    policy, pages = playbook_loader.load(_folder(folder))
    print(f"{len(pages)} playbooks, {len(policy.playbooks)} failure classes, policy {policy.version}")
    if uncovered := playbook_loader.classes_without_page(policy):
        say(f"no playbook for {', '.join(uncovered)}: the playbook unknown decides", quiet)
    say("  next: opt-ops playbook try", quiet)


@app.command("try")
def try_(
    identifier: IdArgument,
    folder: FolderOption = None,
    every: Annotated[bool, typer.Option("--all", help="Also print the decisions that would be the same.")] = False,
    output: FormatOption = Format.TABLE,
    header: HeaderOption = True,
    quiet: QuietOption = False,
) -> None:
    """Compare past decisions with those of edited playbooks.

    Each decision of the journal is made again, on the state of that moment. The loss detectors run again over the
    telemetry. What a different decision would have led to is unknown, so each one is compared alone.

    Example: opt-ops playbook try 12 --from my-playbooks/
    """
    from opt_ops.laboratory import playbook_trial
    from opt_ops.supervise.site_policy import site_policy

    path = lineage_folder(identifier)
    entries = lineages.entries(path)
    state = replay(entries)
    policy = site_policy(settings.config, folder)
    rows = [
        {
            "incident": compared.was.incident,
            "was": playbook_trial.described(compared.was),
            "would_be": playbook_trial.described(compared.would_be),
            "differs": compared.differs,
        }
        for compared in playbook_trial.decisions(entries, policy)
    ]
    for attempt, finding in playbook_trial.loss_findings(path, state, policy):
        found = f"{finding.signal} ({finding.tier}) at step {finding.step}, since {finding.onset_step}"
        raised = playbook_trial.was_raised(state, attempt, finding)
        row = {"incident": attempt, "was": found if raised else "not seen", "would_be": found, "differs": not raised}
        rows.append(row)
    columns = [Column(heading.upper().replace("_", " "), heading) for heading in ("incident", "was", "would_be")]
    show("opt-ops/playbook-trial/1", [row for row in rows if every or row["differs"]], columns, output, header=header)
    say(f"{sum(bool(row['differs']) for row in rows)} of {len(rows)} decisions would differ.", quiet)

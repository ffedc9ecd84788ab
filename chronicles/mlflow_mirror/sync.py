"""Mirrors a lineage into MLflow. It may run late and often: neither training nor the daemon waits for MLflow.

Runs are found by their tags, and points have times of their own, so sending anything again adds nothing. The cursor in
`chronicle/mlflow.json` only saves work: without it, everything is sent once more.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from chronicles.logbook.render import FOLDER, write
from chronicles.mlflow_mirror import assets, content, pages, parameters, saved_view, words
from chronicles.mlflow_mirror.columns import columns
from chronicles.mlflow_mirror.cursor import Cursor, store_name
from chronicles.mlflow_mirror.experiment_note import NOTE, SIGNED, experiment_note, mirrored
from chronicles.mlflow_mirror.scores import score_samples
from chronicles.mlflow_mirror.store import (
    artifact_folder,
    default_environment,
    is_server,
    lineage_lock,
    probe_database,
    server_name,
    without_passwords,
)
from chronicles.record import LineageRecord, load
from chronicles.report.build import build
from chronicles.report.model import LineageReport
from opt_ops.config import Rates
from opt_ops.core.names import attempt_folder
from opt_ops.core.text import printable, printable_lines
from opt_ops.errors import OptOpsError, Unavailable
from opt_ops.runfolder.files import Tail, read_json
from opt_ops.runfolder.node_files import FileAgents

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.exceptions import MlflowException

BATCH = 1_000  # metrics in one call: MLflow's limit
_EXTERNAL = "mlflow.model.isExternal"  # as mlflow.create_external_model marks a model without files
_SMALL = 100  # tags or parameters in one call: MLflow's limit

_NOTE_LIMIT = 19_000  # characters: MLflow refuses tags of experiments beyond 20,000
_LINEAGES = 40  # rows of an experiment's front page


def sync(folder: Path, tracking_uri: str, experiment: str, rates: Rates | None = None) -> str:
    """Bring MLflow up to date with the lineage in `folder`; return one line about what was sent.

    Raises:
        Unavailable: the store does not answer, or another sync of this lineage runs. Nothing is lost.
        OptOpsError: MLflow refuses, for example because the experiment is deleted.
        JournalError: the journal cannot be trusted.
    """
    record = load(folder)
    if record.state.lineage is None:
        return "nothing is journaled yet"
    report = build(record, rates)
    files = write(folder, record, report)
    with lineage_lock(folder), default_environment(), _answering(tracking_uri):
        return _Mirror(folder, record, report, tracking_uri, experiment).send(files)


class _Mirror:
    """One sync of one lineage into one experiment of one store."""

    def __init__(
        self, folder: Path, record: LineageRecord, report: LineageReport, tracking_uri: str, experiment: str
    ) -> None:
        from mlflow import MlflowClient

        self._folder, self._record, self._report = folder, record, report
        self._uri = tracking_uri
        probe_database(tracking_uri)
        self._client: MlflowClient = MlflowClient(tracking_uri=tracking_uri)
        self._experiment_name = experiment
        self._experiment = self._find_experiment(experiment)
        self._cursor = Cursor(folder / FOLDER / "mlflow.json", store_name(tracking_uri, experiment))
        self._points = 0
        self._left_out: list[str] = []

    def send(self, files: list[Path]) -> str:
        """Runs first, then the logbook, then points, data and models, which a server of an older line may lack."""
        state = self._record.state
        configs = {name: config for name in state.attempts if (config := self._config(name)) is not None}
        parent, *children = content.mlflow_runs(self._record, self._report, configs)
        runs = self._find_runs()
        top = self._ensure(parent, runs.get(""), "")
        ids = {child.run: self._ensure(child, runs.get(child.run), top) for child in children}
        self._cursor.begin(self._experiment, {"": top, **ids})
        self._describe_runs(runs, ids)
        sent = sum(self._send_file(run, path) for run in (top, *ids.values()) for path in files)
        for name, attempt in state.attempts.items():
            self._send_attempt(name, ids[attempt.run])
        self._send_kept_curve(top)
        self._send_columns({"": top, **ids})
        self._send_scores({"": top, **ids})
        self._if_served("data sets", lambda: self._send_data(runs, {"": top, **ids}, configs))
        self._if_served("models", lambda: self._send_milestones(ids))
        self._send_machines(ids)
        self._describe()
        self._save_view()
        self._cursor.done(state.seq)
        new = sum(name not in runs for name in ("", *ids))
        news = f"{new} new runs, {self._points} points, {sent} files" if new or self._points or sent else "nothing new"
        where = f"experiment {self._experiment_name}"
        if is_server(self._uri):
            where = pages.lineage_page(self._folder, pages.Store(uri=self._uri, experiment=self._experiment_name))
        return f"{news} → {where}" + "".join(f"; {each}" for each in self._left_out)

    def _if_served(self, what: str, send: Callable[[], None]) -> None:
        """Send what a server of an older line has no interface for; leave it out there, with a remark."""
        from mlflow.exceptions import MlflowException

        try:
            send()
        except MlflowException as error:
            if not _lacks_interface(error):
                raise
            self._left_out.append(f"{what} left out: {server_name(self._uri)} has no interface for them")

    def _config(self, attempt: str) -> parameters.Json | None:
        try:
            return read_json(self._folder / attempt_folder(attempt) / "config.json")
        except OptOpsError:
            return None  # another trainer may write none: then its settings are not known

    # ---- runs ----

    def _find_experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            local = not is_server(self._uri)
            # By default, MLflow puts the files of a database store below the folder that this process runs in.
            place = (artifact_folder(self._folder.parent) / name).absolute().as_uri() if local else None
            return self._client.create_experiment(name, artifact_location=place)
        if found.lifecycle_stage != "active":
            raise OptOpsError(
                f"MLflow's experiment {name} is deleted", f"mlflow experiments restore -x {found.experiment_id}"
            )
        return found.experiment_id

    def _find_runs(self) -> dict[str, Run]:
        """By the name of the run; the name of the lineage's own run is empty."""
        key = content.lineage_key(self._record.state)
        found: dict[str, Run] = {}
        token = None
        while True:
            page = self._client.search_runs([self._experiment], f"tags.`opt.lineage_key` = '{key}'", page_token=token)
            for run in page:
                found[run.data.tags.get("opt.run", "")] = run
            token = page.token
            if not token:
                return found

    def _ensure(self, target: content.MlflowRun, run: Run | None, parent: str) -> str:
        """Create the run, or bring it up to date. Returns its id."""
        from mlflow.entities import Param, RunTag

        tags = {**target.tags, **({"mlflow.parentRunId": parent} if parent else {})}
        if run is None:
            # Created with its tags: if this sync is killed now, the next one finds the run.
            first = {key: value for key, value in tags.items() if value}
            run = self._client.create_run(self._experiment, target.start, first, target.name)
        identity = run.info.run_id
        fresh = [RunTag(key, value) for key, value in tags.items() if run.data.tags.get(key, "") != value]
        earlier = any(key.startswith("settings.") for key in run.data.params)  # under other names, and there they stay
        wanted = {} if earlier else target.params
        params = [Param(key, value) for key, value in wanted.items() if key not in run.data.params]
        for start in range(0, max(len(fresh), len(params)), _SMALL):
            some = slice(start, start + _SMALL)
            self._client.log_batch(identity, params=params[some], tags=fresh[some])
        if run.info.run_name != target.name:
            self._client.update_run(identity, name=target.name)
        if target.status == "RUNNING":
            if run.info.status != "RUNNING":
                self._client.update_run(identity, status="RUNNING")
        elif (run.info.status, run.info.end_time) != (target.status, target.end):
            self._client.set_terminated(identity, target.status, target.end)
        return identity

    def _describe_runs(self, runs: Mapping[str, Run], ids: Mapping[str, str]) -> None:
        """Write what became of each run, with links to the others: so this is done once all have ids."""
        links = words.ExperimentLinks(self._experiment, ids)
        newest = self._record.state.run
        for run in self._report.runs:
            text = printable_lines(
                words.description(self._report, run, links, newest=newest is not None and run.run == newest.name)
            )
            if run.run not in runs or runs[run.run].data.tags.get(NOTE) != text:
                self._client.set_tag(ids[run.run], NOTE, text[: content.TAG_LIMIT])

    def _describe(self) -> None:
        """Write the front page of the experiment, about all lineages in it. A page that a person wrote stays."""
        experiment = self._client.get_experiment(self._experiment)
        known = (experiment.tags if experiment else {}).get(NOTE, "")
        if known and SIGNED not in known:
            return
        newest = ["attributes.start_time DESC"]
        found = self._client.search_runs(
            [self._experiment], "tags.`opt.kind` = 'lineage'", max_results=_LINEAGES, order_by=newest
        )
        note = experiment_note(
            [mirrored(run.info.run_id, run.data.tags) for run in found],
            lambda run: f"#/experiments/{self._experiment}/runs/{run}?{pages.TRAINING}",
            _NOTE_LIMIT,
        )
        if note != known:
            self._client.set_experiment_tag(self._experiment, NOTE, note)

    def _save_view(self) -> None:
        """Keep the columns of the list of lineages for everybody, unless somebody changed them."""
        experiment = self._client.get_experiment(self._experiment)
        known = (experiment.tags if experiment else {}).get(saved_view.TAG, "")
        view = saved_view.saved_view(known)
        if view != known:
            self._client.set_experiment_tag(self._experiment, saved_view.TAG, view)

    # ---- points and files ----

    def _send_attempt(self, attempt: str, run: str) -> None:
        wanted = content.choice(self._report, attempt)
        sent, before = self._cursor.attempt(attempt)
        lines = Tail(self._folder / attempt_folder(attempt) / "telemetry.jsonl").read()
        read = 0
        waiting: list[content.Sample] = []
        for read, samples in content.unsent(lines, wanted, sent, before):
            waiting += samples
            if len(waiting) > BATCH - len(content.SERIES):
                self._log(run, waiting)
                self._cursor.sent_attempt(attempt, read, wanted)
                waiting = []
        self._log(run, waiting)
        if (sent, before) != (read, wanted):
            self._cursor.sent_attempt(attempt, read, wanted)

    def _send_kept_curve(self, run: str) -> None:
        was = step, attempts, costs = self._cursor.kept
        after = reached = content.resend_after(self._record, step, attempts)
        known = len(self._record.curves)
        waiting: list[content.Sample] = []
        for reached, samples in content.kept_samples(self._record, self._report.total_steps, after):
            waiting += samples
            if len(waiting) > BATCH - len(content.SERIES):
                self._log(run, waiting)
                self._cursor.sent_kept(reached, known, costs)
                waiting = []
        ledger = content.ledger_samples(self._report)
        if len(ledger) != costs:
            self._log(run, ledger)
        self._log(run, waiting)
        if (reached, known, len(ledger)) != was:
            self._cursor.sent_kept(reached, known, len(ledger))

    def _send_columns(self, ids: Mapping[str, str]) -> None:
        for name, found in columns(self._record, self._report).items():
            progress, marks = known = self._cursor.columns(name)
            if progress > len(found.progress):
                progress = 0
            new = [*found.progress[progress:], *(found.marks if marks != len(found.marks) else ())]
            self._log(ids[name], new)
            if known != (len(found.progress), len(found.marks)):
                self._cursor.sent_columns(name, len(found.progress), len(found.marks))

    def _send_scores(self, ids: Mapping[str, str]) -> None:
        for name, samples in score_samples(self._report, self._record.state).items():
            digest = hashlib.sha256(repr(samples).encode()).hexdigest()
            if not self._cursor.has_file(ids[name], "scores", digest):  # all again: what is there already adds nothing
                self._log(ids[name], samples)
                self._cursor.sent_file(ids[name], "scores", digest)

    def _log(self, run: str, samples: Sequence[content.Sample]) -> None:
        from mlflow.entities import Metric

        for start in range(0, len(samples), BATCH):  # a line may hold many validation corpora
            some = samples[start : start + BATCH]
            self._client.log_batch(run, [Metric(s.key, s.value, s.timestamp, s.step) for s in some])
        self._points += len({sample.step for sample in samples})

    # ---- data, milestones, machines ----

    def _send_data(
        self, runs: Mapping[str, Run], ids: Mapping[str, str], configs: Mapping[str, parameters.Json]
    ) -> None:
        """Send what was trained on, once for each run and for the lineage."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        for name, config in configs.items():
            data = assets.dataset(config)
            for run in ("", self._record.state.attempts[name].run) if data else ():
                assert data is not None
                if self._cursor.has_file(ids[run], f"data {data.digest}", data.digest):
                    continue
                inputs = runs[run].inputs if run in runs else None
                known = inputs.dataset_inputs if inputs else []
                if all(each.dataset.digest != data.digest for each in known):
                    dataset = Dataset(data.name, data.digest, "local", data.source, profile=data.profile)
                    self._client.log_inputs(
                        ids[run], [DatasetInput(dataset, [InputTag("mlflow.data.context", "train")])]
                    )
                self._cursor.sent_file(ids[run], f"data {data.digest}", data.digest)

    def _send_milestones(self, ids: Mapping[str, str]) -> None:
        """Send each once, as a model without files: the checkpoint stays where it is."""
        wanted = assets.milestones(self._record.state, self._report.total_steps)
        new = [each for each in wanted if not self._cursor.has_file(ids[each.run], each.name, each.path)]
        if not new:
            return
        key = content.lineage_key(self._record.state)
        held = self._client.search_logged_models([self._experiment], f"tags.`opt.lineage_key` = '{key}'")
        there = {(model.name, model.source_run_id): model for model in held}
        for each in new:
            model = there.get((each.name, ids[each.run]))
            if model is None:
                tags = {"opt.lineage_key": key, "opt.run": each.run, "opt.path": each.path, _EXTERNAL: "true"}
                params = {"step": str(each.step), "path": each.path[: parameters.LIMIT]}
                model = self._client.create_logged_model(
                    self._experiment, each.name, ids[each.run], tags, params, model_type="checkpoint"
                )
            if str(model.status) != "READY":  # it is new, or the sync that created it was killed
                self._client.finalize_logged_model(model.model_id, "READY")
            self._cursor.sent_file(ids[each.run], each.name, each.path)

    def _send_machines(self, ids: Mapping[str, str]) -> None:
        """Send the state of the newest attempt's GPUs: one point for each sync, and the hottest GPU by name."""
        attempt = self._record.state.attempt
        if attempt is None or not attempt.live or attempt.last_step is None:
            return
        beats = [beat for beat in FileAgents(self._folder).newest() if beat.node in attempt.nodes]
        gpus = assets.gpu_summary(beats)
        if gpus is not None:
            at = round(gpus.ts * 1000)
            samples = [
                content.Sample(key=key, value=value, timestamp=at, step=attempt.last_step)
                for key, value in gpus.values.items()
            ]
            self._log(ids[attempt.run], samples)
            self._client.set_tag(ids[attempt.run], "opt.worst_gpu", printable(gpus.hottest))

    def _send_file(self, run: str, path: Path) -> bool:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if self._cursor.has_file(run, path.name, digest):
            return False
        self._client.log_artifact(run, str(path), FOLDER)
        self._cursor.sent_file(run, path.name, digest)
        return True


def _lacks_interface(error: MlflowException) -> bool:
    """Whether the server answered that it has no such interface, and not that a thing does not exist."""
    unknown = re.search(r"failed with error code (404|405|501)\b", str(error))
    return error.error_code == "ENDPOINT_NOT_FOUND" or unknown is not None


@contextmanager
def _answering(uri: str) -> Iterator[None]:
    """Turn what MLflow, its transport or its database raise into `Unavailable`."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, RequestException, SQLAlchemyError, OSError) as error:
        why = " ".join(without_passwords(str(error)).split())[:300]
        refused = re.search(r"\b40[13]\b|UNAUTHENTICATED|PERMISSION_DENIED|not authenticated", str(error))
        raise Unavailable(
            f"MLflow at {without_passwords(uri)} did not accept the chronicle: {why}",
            f"nothing is lost, because the journal has everything; {_CREDENTIALS if refused else _LATER}",
        ) from error


_LATER = "run opt-ops mlflow sync again when MLflow answers"
_CREDENTIALS = (
    "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, where the daemon is started, "
    "and run opt-ops mlflow sync"
)

"""Lineages of any course: what Hypothesis draws is told event by event, for the rules of the story."""

from __future__ import annotations

from pathlib import Path

from hypothesis import strategies as st

from opt_ops.core import events as e
from opt_ops.core.values import Action, Fault, Outcome, Tier, Verdict
from tests.chronicles.told import Told

WHAT = (
    "died",
    "hung",
    "silent",
    "dead on arrival",
    "spare",
    "alert",
    "note",
    "halt",
    "pause",
    "drill",
    "rollback",
    "wait",
)

courses = st.lists(
    st.tuples(st.sampled_from(WHAT), st.integers(1, 90), st.sampled_from([2.0, 45.0, 900.0, 40_000.0, 100_000.0])),
    min_size=1,
    max_size=10,
)


class Rambling(Told):
    """A lineage that goes on from its last checkpoint, whatever happens."""

    def begins(self) -> Rambling:
        self.begin().plan("12.00").hold("n1", "n2", "n3", "n4")
        self.attempts = self.runs = self.step = self.asked = 0
        self.point = None
        self.pending: str | None = None  # the incident that the next steps prove to be over
        self._launch(None)
        self._train(60)
        return self

    def happens(self, what: str, steps: int, seconds: float) -> None:
        """A long step of `seconds`, one thing, then some steps."""
        self.now += seconds
        self._train(1)
        self.asked += 1
        kinds = {"died": "process_death", "hung": "hang", "silent": "silent_node", "dead on arrival": "process_death"}
        if what in kinds:
            self._restart(kinds[what], steps, fails=what == "dead on arrival")
        elif what == "spare":
            self._spare()
        elif what == "alert":
            raised = e.SignalRaised(
                signal="loss_spike", tier=Tier.ALERT, attempt=self._name, step=self.step, onset_step=None,
                at=self.now, rule="the detector's rule", evidence={"loss": 3.0},
            )  # fmt: skip
            self.see(raised)
        elif what == "note":
            self.see(e.NoteAdded(request=f"n{self.asked}", author="ann", target="12", text=f"{steps} looks odd"))
        elif what == "halt":
            self._halt()
        elif what == "pause":
            self._pause()
        elif what == "rollback":
            self._rollback(steps)
        elif what == "drill":
            self._drill(steps)
        self._train(steps)

    @property
    def _name(self) -> str:
        return f"12.{self.runs:02d}-a{self.attempts}"

    def _launch(self, incident: str | None) -> None:
        self.pending = incident
        self.launch(self._name, self.point, incident)

    def _train(self, steps: int) -> None:
        self.train(self._name, self.step + 1, self.step + steps)
        self.step += steps
        if self.pending is not None:
            self.close(self.pending)
            self.pending = None
        if self.step % 2:
            self.point = self.save(f"12.{self.runs:02d}", self.step)

    def _ends(self) -> None:
        self.end(self._name, Outcome.FAILED, self.step)
        self.step = self.point.step if self.point else 0

    def _restart(self, kind: str, steps: int, fails: bool = False, drill: str | None = None) -> None:
        incident = self.incident(kind, "it broke", self._name, self.step, nodes=(f"n{steps}",), drill=drill)
        self.decide(incident, Action.RESTART)
        self._ends()
        self.attempts += 1
        self._launch(incident)
        if fails:
            self.end(self._name, Outcome.FAILED, None)
            self.see(
                e.IncidentClosed(
                    incident=incident, proven=None, proof={}, step_resumed=None, steps_lost=None, seconds_down=None
                )
            )
            again = self.incident(kind, "it broke again", self._name, None)
            self.decide(again, Action.RESTART)
            self.attempts += 1
            self._launch(again)

    def _rollback(self, steps: int) -> None:
        incident = self.incident(
            "loss_spike", "the loss jumped", self._name, self.step, onset_step=max(1, self.step - steps)
        )
        self.decide(incident, Action.ROLLBACK, checkpoint=self.point, lr_factor=0.75)
        self._ends()
        parent = f"12.{self.runs:02d}"
        self.runs, self.attempts = self.runs + 1, 0
        self.plan(f"12.{self.runs:02d}", parent, self.point, [(self.step, 0.75)], incident, cause="the loss jumped")
        self._launch(incident)

    def _spare(self) -> None:
        judged = e.NodeJudged(
            node="n4", host="n4", verdict=Verdict.BAD, reason="gpu_lost", source="NVML", at=self.now, evidence={}
        )
        self.see(judged)
        incident = self.incident("bad_gpu", "n4: gpu_lost", None, None, nodes=("n4",))
        self.decide(incident, Action.EXCLUDE, exclude=("n4",))
        self.see(
            e.IncidentClosed(
                incident=incident, proven=True, proof={}, step_resumed=None, steps_lost=0, seconds_down=0.0
            )
        )

    def _halt(self) -> None:
        incident = self.incident("user_error", "it refused", self._name, self.step)
        self.decide(incident, Action.HALT)
        self._ends()
        self.see(e.LineageHalted(why="a person is needed", incident=incident))
        self.see(e.ResumeRequested(request=f"r{self.asked}", author="ann", reason="mended"), seconds=3000.0)
        self.hold("n1", "n2", "n3", "n4")
        self.attempts += 1
        self._launch(None)

    def _pause(self) -> None:
        self.see(e.PauseRequested(request=f"p{self.asked}", author="bob", reason="power work", keep_nodes=True))
        self._ends()
        self.see(e.LineagePaused(why="bob"))
        self.see(e.ResumeRequested(request=f"q{self.asked}", author="bob", reason=""), seconds=500.0)
        self.attempts += 1
        self._launch(None)

    def _drill(self, steps: int) -> None:
        drill = f"d{self.asked:03d}"
        self.see(
            e.DrillRequested(
                request=f"x{self.asked}", drill=drill, author="ann", fault=Fault.KILL_RANK, attempt=self._name,
                arguments={"rank": 1},
            )
        )  # fmt: skip
        self._restart("process_death", steps, drill=drill)


def told(folder: Path, course: list[tuple[str, int, float]]) -> Path:
    """A lineage of this course, in its folder."""
    lineage = Rambling(folder / "12", steps=4000)
    lineage.begins()
    for what, steps, seconds in course:
        lineage.happens(what, steps, seconds)
    lineage.journal.close()
    return lineage.folder

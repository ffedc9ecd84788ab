"""Where ranks come from: a process that has imported torch already, which takes seconds otherwise."""

from tests.forks import Forks

FORKS = Forks("trainer.loop", "torch._dynamo")

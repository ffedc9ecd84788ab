"""The configuration: every wrong value is refused, with its key, itself, and what it must be."""

from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
from pydantic import BaseModel

from opt_ops.config import Config, load
from opt_ops.errors import UsageError


def tables(model: type[BaseModel] = Config, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], str, Any]]:
    """Every key with its table and its annotation."""
    found: list[tuple[tuple[str, ...], str, Any]] = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += tables(field.annotation, (*path, name))
        else:
            found.append((path, name, field.annotation))
    return found


def is_number(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return any(kind in (int, float) for kind in (annotation, *get_args(annotation)))


NUMBERS = [".".join([*path, name]) for path, name, annotation in tables() if is_number(annotation)]


def refused(folder: Path, line: str) -> str:
    key, _, value = line.partition(" = ")
    table, _, name = key.rpartition(".")
    file = folder / "opt-ops.toml"
    file.write_text(f"[{table}]\n{name} = {value}\n" if table else f"{line}\n")
    with pytest.raises(UsageError) as error:
        load(file)
    return str(error.value)


def test_all_numbers_are_known():
    assert len(NUMBERS) >= 15


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "-1", "1e300", "true", '"1"', "[1]"])
@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_is_finite_and_in_a_range_that_the_error_names(tmp_path: Path, key: str, value: str):
    said = refused(tmp_path, f"{key} = {value}")
    assert f"{key}: " in said
    assert "number from" in said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("tick_seconds = 0", "from 0.01 to 10"),
        ('local.nodes = ["a", "b", "a"]', "a must be there only once"),
        ('local.nodes = ["../x"]', "the name of a node must"),
        ('local.nodes = [".."]', "the name of a node must"),
        ('local.nodes = ["a/b"]', "the name of a node must"),
        ('local.nodes = ["-n"]', "the name of a node must"),
        ("local.nodes = []", "at least 1 item"),
        ('mlflow.experiment = ""', "must not be empty"),
        ('mlflow.experiment = "  "', "must not be empty"),
        ('slurm.account = "a\\u0000b"', "no control characters"),
        ("slurm.additional = {requeue = true}", "requeue: opt-ops says that to sbatch itself"),
        ('slurm.additional = {job_name = "mine"}', "job_name: opt-ops says that to sbatch itself"),
        ('trainer.command = ["python", ""]', "must not be empty"),
        ('runs = ""', "must not be empty"),
    ],
)
def test_a_wrong_value_is_refused(tmp_path: Path, line: str, said: str):
    message = refused(tmp_path, line)
    assert said in message
    assert line.split(" ", 1)[0] in message

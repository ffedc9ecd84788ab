"""Where hung ranks are, from what faulthandler really writes."""

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from opt_ops.core.detect.stacks import group, main_thread

WAITING = """Thread 0x00007f1 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 324 in wait
  File "/usr/lib/python3.11/threading.py", line 629 in run

Current thread 0x00007f2 (most recent call first):
  File "/site/torch/distributed/distributed_c10d.py", line 2501 in all_reduce
  File "/site/trainer/loop.py", line 88 in train
  File "/site/trainer/__main__.py", line 12 in <module>
"""
READING = WAITING.replace(
    'torch/distributed/distributed_c10d.py", line 2501 in all_reduce', 'trainer/data/samples.py", line 40 in batch'
)


def test_the_main_threads_frames_without_paths_and_line_numbers():
    assert main_thread(WAITING) == ("distributed_c10d.py:all_reduce", "loop.py:train", "__main__.py:<module>")
    assert main_thread("") == ()
    assert main_thread("end of dump 1.0\n\n") == ()


def test_the_newest_of_several_dumps_counts():
    assert main_thread(READING + "end of dump 1.0\n\n" + WAITING + "end of dump 2.0\n")[0].endswith("all_reduce")


def test_the_one_that_is_elsewhere_is_named():
    found = group({0: WAITING, 1: WAITING, 2: READING, 3: WAITING}, 4)
    assert [each.ranks for each in found.groups] == [(0, 1, 3), (2,)]
    assert found.odd == (2,)


def test_the_one_that_does_not_answer_is_named():
    found = group({0: WAITING, 2: WAITING}, 3)
    assert (found.odd, found.silent) == ((1,), (1,))


def test_of_two_that_differ_nobody_can_be_named():
    assert group({0: WAITING, 1: READING}, 2).odd == ()


def test_all_alike_is_nobodys_fault():
    assert group({0: WAITING, 1: WAITING}, 2).odd == ()


def test_silence_everywhere_names_nobody():
    found = group({}, 3)
    assert (found.groups, found.odd, found.silent) == ((), (), (0, 1, 2))


@given(st.lists(st.sampled_from([WAITING, READING, ""]), min_size=1, max_size=40))
def test_every_rank_is_in_one_place_and_the_odd_are_fewer_than_the_rest(texts: list[str]):
    found = group(dict(enumerate(texts)), len(texts))
    grouped = [rank for each in found.groups for rank in each.ranks]
    assert sorted([*grouped, *found.silent]) == list(range(len(texts)))
    assert len(found.odd) <= len(texts) / 2
    assert set(found.odd).isdisjoint(found.groups[0].ranks if found.groups else ())


def test_a_real_dump():
    program = """
import faulthandler, threading, time
def rests(): time.sleep(5)
threading.Thread(target=rests, daemon=True).start()
def works(): faulthandler.dump_traceback(all_threads=True)
works()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert main_thread(done.stderr)[:2] == ("<string>:works", "<string>:<module>")

"""Watches a training job that somebody else started, by its log alone. Read only: the job is never touched.

reading.py       what one line of a log tells, and how numbers are written in logs
line_formats.py  one small parser for each trainer, and the table of them
bars.py          progress bars (tqdm): Lightning's, and those of Hugging Face's Trainer
recognition.py   which format a log has; labels of ranks
log_follower.py  a file that grows, is truncated, rotated or not there yet, as clean lines
attempts.py      the order of steps: where a restarted job began again
silence.py       how long without a line is too long
remarks.py       findings that a trainer's own line tells: no loss, skipped and NaN iterations
telemetry_line.py  a reading as a line of telemetry; how long an update takes
ends.py          how the job ended: Slurm's word, and the lines of its log that name a cause
job.py           what Slurm says of the job, by scontrol show, sacct and nothing else that changes anything
job_poll.py      asks for that in a thread, so that a slow controller holds up nothing
lineage.py       the lineage that the watch writes: journal, telemetry, decisions as advice, alerts
watch.py         the loop
"""

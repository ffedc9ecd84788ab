"""A script with options of its own, as users have them, that ends in a Trainer. Its model draws random numbers."""

import opt_ops.integrations.transformers as hf  # isort: skip

import argparse

from transformers import Trainer, TrainingArguments

from tests.integrations.hf_runs import Data, Model

parser = argparse.ArgumentParser()
parser.add_argument("--samples", type=int, default=64)
own = parser.parse_args()
args = TrainingArguments(
    output_dir="out", use_cpu=True, report_to=[], disable_tqdm=True, per_device_train_batch_size=4, max_steps=12
)
trainer = Trainer(model=Model(), args=args, train_dataset=Data(own.samples))
hf.supervise(trainer)
trainer.train()

"""Trains a tiny OPT with Hugging Face's Trainer. Two lines make opt-ops supervise it: the import and the call.

python examples/hf_trainer.py                       # alone, as any script
opt-ops run start tiny --set steps=400 --nodes 2    # with [trainer] command = ["python", "examples/hf_trainer.py"]
"""

from opt_ops.integrations.transformers import supervise  # before transformers: it handles signals from here on

import time

import torch
from torch.utils.data import Dataset
from opt_ops.contract import parse
from transformers import HfArgumentParser, OPTConfig, OPTForCausalLM, Trainer, TrainingArguments, set_seed

VOCABULARY, LENGTH = 128, 32
PAUSE = float(parse().settings.get("pause", "0"))  # seconds a sample, in place of a larger model's work


class Text(Dataset):
    """Sequences with a rule that a model can learn: the next token follows from the last one, but for some noise."""

    def __len__(self) -> int:
        return 2048

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        time.sleep(PAUSE)
        noise = torch.Generator().manual_seed(index)
        tokens = [int(torch.randint(VOCABULARY, (), generator=noise))]
        jumps = torch.randint(8, (LENGTH,), generator=noise)
        for jump in jumps[1:]:
            tokens.append((3 * tokens[-1] + 7 + int(jump == 0)) % VOCABULARY)
        ids = torch.tensor(tokens)
        return {"input_ids": ids, "labels": ids}


def main() -> None:
    """Train."""
    parser = HfArgumentParser(TrainingArguments)
    parser.set_defaults(output_dir="out", use_cpu=True, report_to="none", disable_tqdm=True, max_steps=400)
    parser.set_defaults(learning_rate=2e-3, warmup_steps=20, per_device_train_batch_size=4, save_steps=50)
    (args,) = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = OPTConfig(
        vocab_size=VOCABULARY, max_position_embeddings=LENGTH, word_embed_proj_dim=32, dropout=0.0, **sizes
    )
    trainer = Trainer(model=OPTForCausalLM(config), args=args, train_dataset=Text())
    supervise(trainer)
    trainer.train()


if __name__ == "__main__":
    main()

"""OPT weights between the formats people have them in: Hugging Face, metaseq, and this trainer's checkpoints."""

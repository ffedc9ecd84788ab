"""Convert OPT weights between the formats of Hugging Face, metaseq and this trainer."""

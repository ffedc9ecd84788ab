"""The command ``python -m trainer.tokens.count TOKENIZER.JSON``: say how many tokens texts have.

It reads a JSON list of texts from each line of stdin, and prints a JSON list of numbers for it. Tokens that the
tokenizer puts in front, such as ``</s>``, count. It ends with stdin.
"""

import json
import sys

from tokenizers import Tokenizer


def main(path: str) -> None:
    """Answer until stdin ends."""
    tokenizer = Tokenizer.from_file(path)
    tokenizer.no_truncation()
    for line in sys.stdin.buffer:
        numbers = [len(each.ids) for each in tokenizer.encode_batch(json.loads(line))]
        sys.stdout.write(json.dumps(numbers) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])

"""A program for transformers 4: log-probabilities and tokens of model folders, and the folders rewritten.

    PYTHONPATH=FOLDER_OF_TRANSFORMERS_4 python transformers_4.py EXPORTS OUT

EXPORTS has a folder for each model. OUT/results.json has, by its name, the log-probability of each of TOKENS
but the first, and the tokens of TEXT.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

TOKENS = list(range(3, 60))
TEXT = "What is 12 + 34? <tool>"


def main(exports: Path, out: Path) -> None:
    import torch
    import transformers

    assert transformers.__version__.startswith("4."), transformers.__version__
    results = {}
    for folder in sorted(exports.iterdir()):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
        with torch.no_grad():
            logits = model(torch.tensor([TOKENS])).logits[0, :-1]
        log_probs = logits.log_softmax(-1).gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0]
        results[folder.name] = {"log_probs": log_probs.tolist(), "tokens": tokenizer(TEXT).input_ids}
        model.save_pretrained(out / folder.name)
    (out / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

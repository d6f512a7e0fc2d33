"""Load a model directory as a service does that runs PyTorch: run by `test_pytorch.py`, in another environment.

python torch_logits.py DIRECTORY TOKENS.json LOGITS.json
"""

import json
import sys
from pathlib import Path

import torch
import transformers

directory, tokens, output = sys.argv[1:]
model, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(directory, output_loading_info=True)
tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
rows = json.loads(Path(tokens).read_text())
logits = []
with torch.no_grad():
    for row in rows:
        decoder_input = [model.config.decoder_start_token_id, *row["labels"][:-1]]
        answer = model(input_ids=torch.tensor([row["input_ids"]]), decoder_input_ids=torch.tensor([decoder_input]))
        logits.append(answer.logits[0].tolist())
found = {
    "torch": torch.__version__,
    "transformers": transformers.__version__,
    "faults": {name: sorted(map(str, value)) for name, value in report.items() if value},
    "ids": [tokenizer(row["text"])["input_ids"] for row in rows],
    "logits": logits,
}
Path(output).write_text(json.dumps(found))

"""A Hugging Face checkpoint with random weights: python write_hf.py OUT SIZES_JSON. Needs torch and transformers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def main() -> None:
    out, sizes = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, **sizes}
    LlamaForCausalLM(LlamaConfig(bos_token_id=0, eos_token_id=1, **config)).save_pretrained(out)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(["<s>", "</s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(out)


if __name__ == "__main__":
    main()

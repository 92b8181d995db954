"""A GGUF file with random Q4_0 weights in every matrix: python write_gguf.py OUT SIZES_JSON, gguf-py on the path.

What `llama-quantize --pure` makes of a checkpoint, without the checkpoint: the values do not change the speed.
"""

from __future__ import annotations

import itertools
import json
import sys

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType

BLOCK = 32  # weights that share a float16 scale


def q4_0(generator: np.random.Generator, n: int, k: int) -> npt.NDArray[np.uint8]:
    """[N, K / 32 blocks of 18 bytes], weights uniform within ±2 / sqrt(K)."""
    blocks = np.empty((n, k // BLOCK, 2 + BLOCK // 2), np.uint8)
    blocks[..., :2] = np.array([k**-0.5 / 4], np.float16).view(np.uint8)
    blocks[..., 2:] = generator.integers(0, 256, (n, k // BLOCK, BLOCK // 2), np.uint8)
    return blocks.reshape(n, -1)


def tokens(vocab: int) -> list[str]:
    """The 256 bytes as GPT-2 writes them, then two special tokens, then words of letters."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = iter(range(256, 512))
    alphabet = [chr(byte if byte in plain else next(extra)) for byte in range(256)]
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ("".join(word) for length in itertools.count(2) for word in itertools.product(letters, repeat=length))
    return [*alphabet, "<s>", "</s>", *itertools.islice(words, vocab - 258)]


def main() -> None:
    out, sizes = sys.argv[1], json.loads(sys.argv[2])
    hidden, inner, vocab = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    heads, kv_heads, dim = sizes["num_attention_heads"], sizes["num_key_value_heads"], sizes["head_dim"]
    writer = GGUFWriter(out, "llama")
    writer.add_context_length(sizes["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(sizes["num_hidden_layers"])
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(dim)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(sizes["rms_norm_eps"])
    writer.add_vocab_size(vocab)
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens(vocab))
    writer.add_token_types([TokenType.CONTROL if i in (256, 257) else TokenType.NORMAL for i in range(vocab)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)

    generator = np.random.default_rng(0)
    norm = np.ones(hidden, np.float32)
    layer = {
        "attn_q": q4_0(generator, heads * dim, hidden),
        "attn_k": q4_0(generator, kv_heads * dim, hidden),
        "attn_v": q4_0(generator, kv_heads * dim, hidden),
        "attn_output": q4_0(generator, hidden, heads * dim),
        "ffn_gate": q4_0(generator, inner, hidden),
        "ffn_up": q4_0(generator, inner, hidden),
        "ffn_down": q4_0(generator, hidden, inner),
    }
    matrices = {f"blk.{i}.{name}.weight": matrix for i in range(sizes["num_hidden_layers"])
                for name, matrix in layer.items()}
    matrices["token_embd.weight"] = q4_0(generator, vocab, hidden)
    if not sizes["tie_word_embeddings"]:
        matrices["output.weight"] = q4_0(generator, vocab, hidden)
    for name, matrix in matrices.items():
        writer.add_tensor(name, matrix, raw_dtype=GGMLQuantizationType.Q4_0)
    for i in range(sizes["num_hidden_layers"]):
        writer.add_tensor(f"blk.{i}.attn_norm.weight", norm)
        writer.add_tensor(f"blk.{i}.ffn_norm.weight", norm)
    writer.add_tensor("output_norm.weight", norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()

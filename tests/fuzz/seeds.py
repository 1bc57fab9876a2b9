#!/usr/bin/env python3
"""Writes small inputs of every known shape into corpus/, for the fuzzer to start from."""
import json
import pathlib
import struct

CORPUS = pathlib.Path(__file__).parent / "corpus"
LLAMA3 = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def write(target, name, data):
    path = CORPUS / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def gguf(arch):
    """A model of one layer, without its weights."""
    text = lambda s: struct.pack("<Q", len(s.encode())) + s.encode()
    def pair(key, kind, value):
        head = text(key) + struct.pack("<I", kind)
        if kind == 8:
            return head + text(value)
        if kind == 9:
            element, values = value
            head += struct.pack("<IQ", element, len(values))
            return head + b"".join(text(v) if element == 8 else struct.pack({5: "<i", 6: "<f"}[element], v) for v in values)
        return head + struct.pack({4: "<I", 6: "<f"}[kind], value)
    sizes = {"block_count": 1, "embedding_length": 32, "feed_forward_length": 64, "context_length": 64,
             "attention.head_count": 2, "attention.head_count_kv": 1, "rope.dimension_count": 16}
    pairs = [pair("general.architecture", 8, arch)]
    pairs += [pair(f"{arch}.{key}", 4, value) for key, value in sizes.items()]
    pairs += [pair(f"{arch}.attention.layer_norm_rms_epsilon", 6, 1e-5), pair(f"{arch}.rope.freq_base", 6, 1e4)]
    pairs += [pair("tokenizer.ggml.model", 8, "gpt2"), pair("tokenizer.ggml.tokens", 9, (8, ["a", "b", "ab"])),
              pair("tokenizer.ggml.token_type", 9, (5, [1, 1, 3])), pair("tokenizer.ggml.scores", 9, (6, [0, -1, 2]))]
    tensors, offset = b"", 0
    for name, dims, size in [("token_embd.weight", [32, 3], 384), ("output_norm.weight", [32], 128)]:
        tensors += text(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims) + struct.pack("<IQ", 0, offset)
        offset += size
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, len(pairs)) + b"".join(pairs) + tensors
    return head + bytes(-len(head) % 32) + bytes(offset)


def tokenizers():
    """Name, normalizer, pre_tokenizer, decoder of each known shape."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
    digits = {"type": "Digits", "individual_digits": True}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    decoder = {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
    yield "smollm", None, {"type": "Sequence", "pretokenizers": [digits, byte_level]}, byte_level
    yield "qwen2", {"type": "NFC"}, {"type": "Sequence", "pretokenizers": [split, byte_level | {"use_regex": False}]}, byte_level
    yield "llama2", {"type": "Sequence", "normalizers": [prepend, replace]}, None, decoder
    yield "mistral", None, metaspace, decoder


def tokenizer_json(normalizer, pre_tokenizer, decoder):
    byte_level = decoder["type"] == "ByteLevel"
    texts = ["a", "b", "Ġ", "ab", "Ġa"] if byte_level else ["a", "b", "▁", "ab", "▁a"] + [f"<0x{b:02X}>" for b in range(256)]
    merges = ["a b", "Ġ a"] if byte_level else [["a", "b"], ["▁", "a"]]
    flags = {"single_word": False, "lstrip": False, "rstrip": True, "normalized": False}
    added = [{"id": len(texts), "content": "<s>", "special": True, **flags},
             {"id": len(texts) + 1, "content": "<tool>", "special": False, **flags, "normalized": True}]
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [len(texts)], "tokens": ["<s>"]}}}
    model = {"type": "BPE", "unk_token": None, "byte_fallback": not byte_level, "ignore_merges": byte_level,
             "vocab": {text: i for i, text in enumerate(texts)}, "merges": merges}
    file = {"added_tokens": added, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": template, "decoder": decoder, "model": model}
    config = {"bos_token": "<s>", "eos_token": {"content": "ab"}, "add_bos_token": True,
              "chat_template": [{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": "{{ tools }}"}]}
    return json.dumps(file, ensure_ascii=False).encode() + b"\0" + json.dumps(config).encode()


def safetensors():
    """A model's index and its only file."""
    tensors, offset = {}, 0
    for name, shape in [("model.embed_tokens.weight", [4, 4]), ("model.norm.weight", [4]), ("model.layers.0.self_attn.q_norm.weight", [4])]:
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        tensors[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    index = {"metadata": {"total_size": offset}, "weight_map": {name: "model.safetensors" for name in tensors}}
    header = json.dumps({"__metadata__": {"format": "pt"}} | tensors).encode()
    return json.dumps(index).encode(), struct.pack("<Q", len(header)) + header + bytes(range(offset))


def config(model_type, more):
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "hidden_act": "silu"}
    return json.dumps({"model_type": model_type, "torch_dtype": "bfloat16", "eos_token_id": [1, 2]} | sizes | more).encode()


LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
GEMMA3 = {"head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 6, "query_pre_attn_scalar": 8, "rope_local_base_freq": 1e4,
          "hidden_activation": "gelu_pytorch_tanh", "layer_types": ["sliding_attention", "full_attention"]}
CONFIGS = {"llama": {"rope_scaling": LLAMA3_ROPE}, "mistral": {"sliding_window": None}, "qwen2": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
           "qwen3": {"head_dim": 8}, "gemma3_text": GEMMA3, "phi3": {"rope_scaling": LONGROPE, "original_max_position_embeddings": 32}}
for model_type, more in CONFIGS.items():
    write("config", model_type, config(model_type, more) + b'\0{"temperature": 0.6, "top_p": 0.9, "top_k": 20, "eos_token_id": 3}')
index, file = safetensors()
write("safetensors", "sharded", index + b"\0" + file)
write("safetensors", "single", b"\0" + file)
for arch in ["llama", "qwen2", "qwen3", "gemma3", "phi3"]:
    write("gguf", arch, gguf(arch))
for name, *parts in tokenizers():
    write("tokenizer_json", name, tokenizer_json(*parts))
write("chat_template", "chatml", b"{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] | trim }}"
      b"{% generation %}{{ m.content | tojson(indent=2) }}{% endgeneration %}{% endfor %}\0hi <|im_start|> there")

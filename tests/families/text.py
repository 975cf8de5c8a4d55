"""Text-only families."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from . import templates
from .parts import save, text_sizes, tokenizer, tokenizer_with


def llama(folder: Path, *, seed=0, width=32, layers=2, pad=0, tok=None, **more) -> str:
    """A text-only Llama with the tokenizer's own ChatML."""
    torch.manual_seed(seed)
    tok = tok or tokenizer()
    return save(folder, LlamaForCausalLM(LlamaConfig(**text_sizes(len(tok) + pad, width, layers, **more))), tok)


def _made(folder: Path, config_class, model_class, tok, template: str, seed: int, sizes: dict) -> str:
    torch.manual_seed(seed)
    tok.chat_template = template
    ids = {"bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id}
    return save(folder, model_class(config_class(**sizes | {"vocab_size": len(tok)} | ids)), tok)


def llama3(folder: Path, *, seed=0, width=32, layers=2, tok=None, **more) -> str:
    """Llama 3: header tokens, two newlines before the answer, an end-of-turn token of its own."""
    headers = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tok = tokenizer_with(tok, *headers, bos="<|begin_of_text|>", eos="<|eot_id|>", adds_bos=True)
    sizes = text_sizes(0, width, layers, **more)
    return _made(folder, LlamaConfig, LlamaForCausalLM, tok, templates.LLAMA3, seed, sizes)


def qwen2(folder: Path, *, seed=0, width=32, layers=2, tok=None, **more) -> str:
    """Qwen2: a default system turn, no begin of text. AutoTokenizer gives it Qwen2's own pre-tokenizer, whatever
    ``tok`` has."""
    tok = tokenizer_with(tok, "<|im_start|>", bos=None, eos="<|im_end|>", pad="<|endoftext|>")
    sizes = text_sizes(0, width, layers, **more)
    return _made(folder, Qwen2Config, Qwen2ForCausalLM, tok, templates.QWEN2, seed, sizes)


def qwen3(folder: Path, *, seed=0, width=32, layers=2, tok=None, **more) -> str:
    """Qwen3: its template strips the thoughts of earlier answers and writes empty ones before the last."""
    tok = tokenizer_with(tok, "<|im_start|>", bos=None, eos="<|im_end|>")
    sizes = text_sizes(0, width, layers, head_dim=8, **more)
    return _made(folder, Qwen3Config, Qwen3ForCausalLM, tok, templates.QWEN3, seed, sizes)


def gemma2(folder: Path, *, seed=0, width=32, layers=2, tok=None, **more) -> str:
    """Gemma 2: soft-capped logits, tied embeddings; the template strips texts and knows no system turn."""
    tok = tokenizer_with(tok, "<start_of_turn>", "<end_of_turn>", bos="<bos>", eos="<eos>", adds_bos=True)
    sizes = text_sizes(0, width, layers, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=30.0, **more)
    sizes |= {"tie_word_embeddings": True}
    return _made(folder, Gemma2Config, Gemma2ForCausalLM, tok, templates.GEMMA2, seed, sizes)


def phi3(folder: Path, *, seed=0, width=32, layers=2, tok=None, **more) -> str:
    """Phi 3: an end-of-turn token that is not the end of text, which the template writes after all turns."""
    roles = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    tok = tokenizer_with(tok, *roles, bos="<s>", eos="<|endoftext|>", adds_bos=True)
    sizes = text_sizes(0, width, layers, **more)
    return _made(folder, Phi3Config, Phi3ForCausalLM, tok, templates.PHI3, seed, sizes)

"""A tiny LLaVA and a tiny Llama with a tokenizer trained here, and a file of questions about drawn pictures."""

import json

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SPECIAL = ["<pad>", "<s>", "<eos>", "<image>", "<|end|>"]
PARTS_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEXT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
COLORS = ["red", "green", "blue", "yellow", "teal", "gray", "black", "brown", "orange", "purple", "navy", "lime"]
TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def make_tokenizer(template):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["what colour is it? is it " + color for color in COLORS], trainer)
    tokenizer.decoder = decoders.ByteLevel()
    # Adds a beginning-of-text token by itself, as Llama's does: after a template that would be a second one.
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=template,
        padding_side="right",  # wrong on purpose: evaluation must not depend on it
    )


def spread_weights(model):
    """Weights large enough that different questions and pictures get different answers, some of which end early."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.6 / parameter.shape[-1] ** 0.5 * 3)
    model.generation_config.eos_token_id = 4
    return model.eval()


@pytest.fixture(scope="session")
def vlm():
    tokenizer = make_tokenizer(PARTS_TEMPLATE)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        ),
        text_config=LlamaConfig(vocab_size=len(tokenizer), **TEXT),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"height": 16, "width": 16}, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=PARTS_TEMPLATE,
    )
    return spread_weights(LlavaForConditionalGeneration(config)), processor


@pytest.fixture(scope="session")
def language_model():
    tokenizer = make_tokenizer(TEXT_TEMPLATE)
    return spread_weights(LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **TEXT))), tokenizer


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    """Twelve rows with questions of different lengths, two categories, one row without a picture."""
    folder = tmp_path_factory.mktemp("questions")
    rows = []
    for index, color in enumerate(COLORS):
        Image.new("RGB", (16, 16), color).save(folder / f"{color}.png")
        row = {
            "id": index,
            "image": f"{color}.png",
            "question": "what colour is it" + " really" * (index * 5 % 7) + "?",
            "answer": color,
            "category": "dark" if index % 3 == 0 else "light",
        }
        if index == 5:
            del row["image"]
        rows.append(row)
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
